"""The numbers read off a lens image, on images whose numbers are known; the lens equation, on lenses and on noise."""

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from dataset import normalize
from metrics import physics
from metrics.lens_equation import fit_smooth_lens, fits
from simulate import renderer as sim
from simulate.recipes import MODEL_II, recipe_of, scale_of

SCALE = MODEL_II.pixel_scale
AXIS = (np.arange(64) - 31.5) * SCALE
Y, X = np.meshgrid(AXIS, AXIS, indexing="ij")


def described(image, pixel_scale=SCALE):
    return {name: float(value[0]) for name, value in physics.describe(normalize(image)[None], pixel_scale).items()}


@pytest.mark.parametrize(
    ("size", "edges"),
    [
        (8, [1, 4]),
        (32, [1, 4, 8, 16]),
        (64, [1, 4, 8, 16, 32]),
        (128, [1, 4, 8, 16, 32, 64]),
        (150, [1, 4, 8, 16, 32, 64, 75]),
    ],
)
def test_bands_reach_to_the_smallest_scales_of_an_image_of_any_size(size, edges):
    pairs = list(pairwise(edges))
    assert physics.bands(size) == {f"{low}_{high}": (low, high) for low, high in pairs}
    found = physics.describe(torch.rand(2, 1, size, size))
    assert [name for name in found if name.startswith("power_")] == [f"power_{low}_{high}" for low, high in pairs]
    assert set(physics.titles(size, "pixels")) == set(found)


@pytest.mark.parametrize(("size", "channels"), [(32, 1), (75, 1), (128, 3), (150, 16)])
def test_a_ring_is_as_wide_in_any_number_of_pixels_and_channels(size, channels):
    """For data without a recipe, lengths are in pixels; several channels count as their mean."""
    axis = np.arange(size) - (size - 1) / 2
    radius = np.hypot(axis[:, None], axis[None])
    ring = np.exp(-((radius - 0.3 * size) ** 2) / (2 * (0.05 * size) ** 2))
    brightness = np.linspace(0.5, 1, channels)[:, None, None]
    found = described(brightness * ring, pixel_scale=1.0)
    assert found["ring_radius"] == pytest.approx(0.3 * size, abs=0.15)
    assert found["ring_width"] == pytest.approx(0.05 * size, abs=0.15)
    assert found["flux_over_peak"] == pytest.approx(ring.sum() / ring.max(), rel=1e-4)


def test_the_pixel_scale_is_that_of_the_recipe_or_one():
    def images(classes, shape, pixel_scale=None):
        return SimpleNamespace(classes=classes, image_shape=shape, root_dir="nowhere", pixel_scale=pixel_scale)

    assert scale_of(images(MODEL_II.classes, MODEL_II.image_shape)) == (0.101, "arcsec")
    assert scale_of(images(MODEL_II.classes, MODEL_II.image_shape, 0.05)) == (0.05, "arcsec")  # from a FITS header
    for classes, shape in ((("cdm", "wdm"), (1, 64, 64)), (MODEL_II.classes, (1, 128, 128))):
        assert recipe_of(classes, shape) is None
        assert scale_of(images(classes, shape)) == (1.0, "pixels")


def test_ring_radius_and_width_of_a_gaussian_ring():
    ring = np.exp(-((np.hypot(X, Y) - 1.2) ** 2) / (2 * 0.2**2))
    found = described(ring)
    assert found["ring_radius"] == pytest.approx(1.2, abs=0.01)
    assert found["ring_width"] == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("angle", [0.0, 0.4, 1.5, 3.0])
def test_ellipticity_and_its_angle(angle):
    along, across = X * np.cos(angle) + Y * np.sin(angle), -X * np.sin(angle) + Y * np.cos(angle)
    found = described(np.exp(-(along**2) / (2 * 0.6**2) - across**2 / (2 * 0.4**2)))
    assert found["ellipticity"] == pytest.approx((0.6**2 - 0.4**2) / (0.6**2 + 0.4**2), abs=0.01)
    assert abs(math.remainder(found["ellipticity_angle"] - angle, math.pi)) < 0.01


def test_the_power_of_a_wave_is_in_its_band():
    wave = torch.from_numpy(np.cos(2 * np.pi * 6 * np.arange(64) / 64)).float().expand(64, 64)
    spectrum = physics.power_spectrum(wave[None, None])[0]
    assert spectrum.argmax() == 6
    # |FFT|^2 / pixels of cos is 4096 / 4 at two wave vectors, shared by all with a wave number that rounds to 6
    number = np.rint(np.hypot(*np.meshgrid(*[np.fft.fftfreq(64, 1 / 64)] * 2)))
    assert spectrum[6].item() == pytest.approx(2 * 1024 / (number == 6).sum(), rel=1e-4)
    power = physics.band_power(spectrum[None])
    assert max(power, key=power.get) == "4_8"


def test_knots_are_counted_and_the_brightest_has_its_angle():
    image = np.zeros((64, 64))
    for x, y, peak in ((10, 10, 1.0), (-10, 10, 0.6), (0, -10, 0.5), (-15, -15, 0.1)):
        x, y = AXIS[32 + x], AXIS[32 + y]
        image += peak * np.exp(-((X - x) ** 2 + (Y - y) ** 2) / (2 * 0.15**2))
    found = described(image)
    assert found["knot_count"] == 3  # the faintest is none
    assert found["knot_angle"] == pytest.approx(math.pi / 4, abs=0.06)
    assert found["flux_over_peak"] == pytest.approx(2.2 * 2 * math.pi * 0.15**2 / SCALE**2, rel=0.05)


def test_an_empty_image_gives_finite_numbers():
    assert all(math.isfinite(value) for value in described(np.zeros((64, 64))).values())


# The lens equation


@pytest.fixture(scope="module")
def no_sub():
    """Source positions (200, 2) in arcsec and their images, by lenstronomy."""
    positions = np.random.default_rng(0).uniform(-0.35, 0.35, (200, 2))
    positions[0] = 0.1104, -0.0147  # between here and the grid another pixel becomes the brightest
    images = np.stack([sim.render(xy, np.empty(0), np.empty((0, 2))) for xy in positions])
    return positions, normalize(images[:, None])


def test_the_fit_finds_the_source_of_200_smooth_lenses_and_leaves_nothing_over(no_sub):
    positions, images = no_sub
    found, residual = fit_smooth_lens(images)
    assert np.abs(found.numpy() - positions).max() < 0.005
    assert residual.square().mean((1, 2, 3)).sqrt().max() < 0.002
    assert residual.abs().max() < 1e-4  # in fact nothing but the rounding of float32
    assert fits(images, residual).all()


def test_substructure_blur_and_rotation_leave_a_residual(no_sub):
    smooth = fit_smooth_lens(no_sub[1][:30])[1].square().mean((1, 2, 3)).sqrt()
    table = sim.parameter_table(30, seed=3)
    images = [sim.render_row(row) for row in table[table["class"] == "axion"]]
    blurred = gaussian_filter(no_sub[1][:30].numpy(), (0, 0, 1, 1))
    turned = np.rot90(no_sub[1][:30].numpy(), axes=(2, 3)).copy()
    for worse in (np.stack(images)[:, None], blurred, turned):
        residual = fit_smooth_lens(normalize(worse))[1].square().mean((1, 2, 3)).sqrt()
        assert (residual > 20 * smooth.max()).all()
        assert residual.median() > 0.005


def test_nothing_fits_noise():
    noise = torch.rand(50, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    for images in (noise, normalize(torch.erfinv(noise * 2 - 1).clamp(-3, 3))):
        assert not fits(images, fit_smooth_lens(images)[1]).any()


def test_flux_is_that_of_the_files():
    """Images have a sky of 100 and a square of 9 pixels 50 or 80 above it; they are given scaled to [0, 1]."""
    raw = torch.full((2, 1, 16, 16), 100.0)
    raw[:, :, 4:7, 4:7] += torch.tensor([50.0, 80.0]).view(2, 1, 1, 1)
    low, high = raw.amin((1, 2, 3)).double(), raw.amax((1, 2, 3)).double()
    scaled = (raw - 100) / (high - 100).view(-1, 1, 1, 1)
    found = physics.describe_flux(scaled.float(), low, high)
    assert found["sky"].tolist() == [100, 100]
    assert found["peak"].tolist() == [150, 180]
    assert found["flux"].tolist() == pytest.approx([450, 720])
