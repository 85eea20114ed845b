"""A telescope's blur and noise: lenstronomy's own, the pinned numbers, and each image with the noise of its seed."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lenstronomy.SimulationAPI.observation_api import SingleBand
from scipy.ndimage import gaussian_filter

from dataset import NpyDataset
from settings import InputError
from simulate.instrument import INSTRUMENTS, Instrument, Observation, Observer, observer_of, observers_of, seeded_noise
from simulate.recipes import MODEL_II

PINNED = {  # sky noise in counts per second a pixel, and total exposure, by hand from what lenstronomy's versions say
    "euclid": (0.00587, 2260),
    "euclid_in_flight": (0.01090, 2264),
    "hst": (0.00592, 5400),
}


def sharp(instrument: Instrument, pixel_scale: float = 0.1) -> Observation:
    """An observation of images that already have the blur of the telescope."""
    return Observation(instrument, pixel_scale, instrument.psf_fwhm)


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_the_noise_has_the_pinned_numbers(name):
    instrument = INSTRUMENTS[name]
    found = Observation(instrument, instrument.pixel_scale)
    sky, seconds = PINNED[name]
    assert found.sky_noise == pytest.approx(sky, abs=5e-6)
    assert found.shot_noise == pytest.approx(seconds**-0.5, rel=1e-6)


@pytest.mark.parametrize("gain", [1.0, 2.5])
def test_the_noise_is_lenstronomys_in_mean_and_variance(gain):
    """10,000 draws at each of 16 levels of brightness, some below zero."""
    instrument = Instrument(2, 300, 22.0, 24.5, 5.0, 0.2, 0.1, gain)
    light, draws = np.linspace(-0.05, 2, 16).reshape(4, 4), 10_000
    band = SingleBand(0.1, 300, 24.5, 5.0, gain, 22.0, 0.2, 2, data_count_unit="ADU")
    np.random.seed(0)  # noqa: NPY002, lenstronomy's numbers
    theirs = np.stack([light + band.noise_for_model(light) for _ in range(draws)])
    random = torch.Generator().manual_seed(0)
    many = torch.from_numpy(light).expand(draws, 1, 4, 4)
    ours = sharp(instrument)(many, torch.randn(many.shape, generator=random, dtype=torch.double))[:, 0].numpy()
    variance = theirs.var(0)
    assert np.all(np.abs(ours.mean(0) - theirs.mean(0)) < 5 * np.sqrt(2 * variance / draws))
    assert np.all(np.abs(ours.var(0) / variance - 1) < 5 * np.sqrt(2 * 2 / draws))
    assert variance.max() > 1.5 * variance.min()  # shot noise is part of it


def test_longer_exposures_have_less_noise():
    light = torch.full((3, 1, 64, 64), 1.0)
    noise = torch.randn(light.shape, generator=torch.Generator().manual_seed(0))
    seen = sharp(INSTRUMENTS["euclid"])(light, noise, torch.tensor([1.0, 100, math.inf])) - light
    assert torch.allclose(seen[0] / noise[0] * 0.1, seen[1] / noise[1], atol=1e-3)
    assert not seen[2].any()


@pytest.mark.parametrize("fwhm", [0.0, 0.16])
def test_images_are_blurred_by_what_they_lack(fwhm):
    telescope = Instrument(1, 1e30, 22.0, 25.0, 0.0, 0.5, 0.1)  # looks so long that there is no noise
    light = torch.zeros(1, 2, 41, 41)
    light[0, :, 20, 20] = 1
    seen = Observation(telescope, 0.1, fwhm)(light, torch.zeros_like(light))
    deviation = math.sqrt(0.5**2 - fwhm**2) / 0.1 / 2.35482
    expected = gaussian_filter(light[0, 0].double().numpy(), deviation, truncate=6)
    np.testing.assert_allclose(seen[0, 1], expected, atol=2e-5)
    as_sharp = Observation(telescope, 0.1, 0.5)(light, torch.zeros_like(light))
    assert torch.equal(as_sharp, light)


def test_the_noise_of_an_image_is_that_of_its_seed_and_number():
    first, second = (seeded_noise(0, torch.tensor(numbers), (1, 8, 8)) for numbers in ([3, 4], [4, 9, 3]))
    assert torch.equal(first[0], second[2])
    assert torch.equal(first[1], second[0])
    others = torch.cat([seeded_noise(seed, torch.arange(3), (1, 8, 8)) for seed in (0, 1, 2)])
    assert len(torch.unique(others.flatten(1), dim=0)) == 9


# Of a dataset


def test_a_dataset_is_seen_and_stays_what_it_was(lens_data):
    data = NpyDataset(lens_data, None, "test")
    observer, before = observer_of(data, "euclid"), data.images.clone()
    seen = data.observed(observer)
    index = torch.arange(len(data))
    images, low, high = seen.look(index)
    assert torch.equal(data.read(index), before)
    assert images.amin((1, 2, 3)).eq(0).all()
    assert images.amax((1, 2, 3)).eq(1).all()
    assert torch.equal(seen.read(index.flip(0)).flip(0), images)  # whatever the order
    assert not torch.equal(seen.read(index, torch.Generator().manual_seed(0)), images)
    other = data.observed(observer_of(data, "euclid", seed=1)).read(index)
    assert (other - images).std() > 0.001
    # Counts per second of the published instrument: the files are twice the model, at another zero point
    expected = np.median(data.high) / 2 * 10 ** (0.4 * (24.0 - MODEL_II.zero_point))
    assert observer.peak == pytest.approx(expected, rel=1e-9)
    assert expected == pytest.approx(2, abs=0.1)
    corner = (images * (high - low).view(-1, 1, 1, 1) + low.view(-1, 1, 1, 1))[:, 0, :8, :8]
    assert corner.std().item() == pytest.approx(0.00587, rel=0.05)


def test_published_images_are_as_bright_as_those_made_here(lens_data):
    """Their counts have another zero point, which nothing in their folder says."""
    published, here = NpyDataset(Path(__file__).parent / "data" / "published_format"), NpyDataset(lens_data)
    ratio = np.median(here.high) / np.median(published.high)
    assert ratio == pytest.approx(10 ** (0.4 * 1.72), rel=0.15)
    peaks = [observer_of(data, "euclid").peak for data in (published, here)]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.15)


def test_flux_is_kept_where_images_keep_it(tmp_path):
    (tmp_path / "a").mkdir()
    for k in range(6):  # as bright as their number says on one side, and dark on the other
        image = np.full((16, 16), 10.0 * (k + 1))
        image[:, :8] = 0
        np.save(tmp_path / "a" / f"{k}.npy", image)
    data = NpyDataset(tmp_path)
    numbers = torch.arange(6)
    data.keeps_flux = True
    _, _, high = data.observed(observer_of(data, "hst")).look(numbers)
    brightest = torch.tensor([float(image) for image in data.high])
    assert torch.allclose(high.float(), brightest, rtol=0.05)
    data.keeps_flux = False
    _, _, high = data.observed(observer_of(data, "hst", 50.0)).look(numbers)
    assert torch.allclose(high, torch.full_like(high, 50), rtol=0.05)


def test_images_with_noise_are_refused(shared):
    flags = ["--model", "III", "--noise", "on", "--num_per_class", 12, "--num_workers", 1, "--data_dir"]
    data = NpyDataset(shared("noisy", "simulate/simulate_lenses.py", *flags))
    with pytest.raises(InputError, match="have the noise of a telescope already"):
        observer_of(data, "hst")


def test_lengths_are_those_of_files_or_recipe_or_else_of_the_instrument(lens_data, tmp_path, capsys):
    data = NpyDataset(lens_data)
    assert observer_of(data, "hst").observation == Observation(INSTRUMENTS["hst"], 0.101, 0.16)
    data.pixel_scale = 0.2  # as FITS headers say
    assert observer_of(data, "hst").observation.pixel_scale == 0.2
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a" / "0.npy", np.random.default_rng(0).random((16, 16)))
    found = observer_of(unknown := NpyDataset(tmp_path), "hst")
    assert found.observation == Observation(INSTRUMENTS["hst"], 0.08, 0.0)
    assert found.unit == 1
    observers_of(unknown, "hst", None, 0, 1)
    assert "taken for sharp light in counts per second, 0.08 arcsec a pixel: no recipe" in capsys.readouterr().out
    observers_of(data, "hst", None, 0, 1)
    assert "taken for" not in capsys.readouterr().out


def test_each_observation_of_one_image_is_another():
    observer = Observer(sharp(INSTRUMENTS["euclid"]), 2.0)
    images, ends = torch.rand(2, 3, 16, 16), (torch.zeros(2), torch.ones(2))
    random = torch.Generator().manual_seed(0)
    first, second = (observer(images, *ends, random=random)[0] for _ in range(2))
    assert first.shape == (2, 3, 16, 16)
    assert 0.001 < (first - second).std() < 0.1
