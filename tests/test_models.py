"""Each of the four models is what its recipe says, worked out by hand beside the code that simulates it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from astropy.cosmology import FlatLambdaCDM
from astropy.table import Table
from conftest import DATA, run_script
from lenstronomy.LensModel.lens_model import LensModel
from scipy import stats
from scipy.ndimage import gaussian_filter
from scipy.special import gamma

from dataset import NpyDataset, read_image
from simulate import renderer
from simulate.recipes import MODELS, pixel_scale_of, recipe_of

CLASSES = ("axion", "cdm", "no_sub")
# pixels, arcsec a pixel, FWHM of the PSF in arcsec and where it ends in standard deviations
CAMERAS = {"I": (150, 0.05, 0.087, 3), "II": (64, 0.101, 0.16, 5), "III": (64, 0.08, 0.08, 5)}


def scale_of(h0=69.7, om0=0.2814, ob0=0.0464):
    """What deflections for a source at redshift 2.5 are multiplied by for one at 1."""
    cosmology = FlatLambdaCDM(H0=h0, Om0=om0, Ob0=ob0)
    lens, source, convention = cosmology.comoving_distance([0.5, 1.0, 2.5]).value
    return (source - lens) / source / ((convention - lens) / convention)


def by_hand(model, row, scale=None):
    """The noise-free image of a row: flux a pixel, for a total flux of the source of 1, or for an amplitude of 20."""
    pixels, width, fwhm, end = CAMERAS[model]
    scale = scale or (1.0 if model == "I" else scale_of())
    axis = (np.arange(pixels) - (pixels - 1) / 2) * width
    x, y = (c.ravel() for c in np.meshgrid(axis, axis))
    main = [{"theta_E": 1.2814863, "e1": 0.1, "e2": 0.0}, {"gamma1": 0.05, "gamma2": 0.0}]
    deflection = np.array(LensModel(["SIE", "SHEAR"]).alpha(x, y, main))
    if row["class"] == "axion":
        length = 3 * 1e-24 / row["axion_mass"]
        steps = np.linspace(-length, length, 100)
        points = np.outer(steps, [np.cos(row["vortex_angle"]), np.sin(row["vortex_angle"])])
        masses = np.full(100, 3e8)
    elif row["class"] == "cdm":
        points, masses = row["subhalo_xy"], row["subhalo_mass"]
    else:
        points, masses = np.empty((0, 2)), np.empty(0)
    for (px, py), mass in zip(points, masses, strict=True):
        squared = (x - px) ** 2 + (y - py) ** 2
        deflection += 1.2814863**2 * mass / 1e12 * np.array([x - px, y - py]) / squared
    sx, sy = np.array([x, y]) - scale * deflection - np.array(row["source_xy"])[:, None]
    # An elliptical exponential profile, (1 - q) / (1 + q) = hypot(e1, e2), half of whose light is within R
    e, angle = np.hypot(0.1, 0.1), np.arctan2(0.1, -0.1) / 2
    q = (1 - e) / (1 + e)
    along, across = sx * np.cos(angle) + sy * np.sin(angle), sy * np.cos(angle) - sx * np.sin(angle)
    radius = np.sqrt(q * along**2 + across**2 / q) / 0.25
    b = 1.9992 * 1 - 0.3271
    brightness = 20 * np.exp(-b * (radius - 1))
    if model != "I":
        brightness /= 20 * 2 * np.pi * 0.25**2 * np.exp(b) * b**-2 * gamma(2)
    image = brightness.reshape(pixels, pixels) * width**2
    return gaussian_filter(image, fwhm / width / 2.3548200, mode="nearest", truncate=end)


def rows_of(model, count, seed=3, **changes):
    recipe = replace(MODELS[model], **changes)
    table = renderer.parameter_table(count, seed, recipe)
    return recipe, [dict(zip(row.colnames, row, strict=True)) for row in table]


@pytest.mark.parametrize(("model", "zero_point"), [("I", None), ("II", 25.72), ("III", 25.96)])
def test_the_noise_free_images_are_those_worked_out_by_hand(model, zero_point):
    recipe, rows = rows_of(model, 3, noise=False)
    flux = 1 if zero_point is None else 2 * 10 ** (-0.4 * (20 - zero_point))  # twice, as published
    for row in rows:
        image, expected = renderer.render_row(row, recipe), flux * by_hand(model, row)
        assert image.shape == expected.shape
        np.testing.assert_allclose(image / expected.max(), expected / expected.max(), atol=1e-4, rtol=0)


def test_the_ring_of_model_iii_has_the_radius_of_its_convention():
    assert 1.2814863 * scale_of() == pytest.approx(0.813, abs=5e-4)
    row = {"class": "no_sub", "source_xy": np.zeros(2)}
    axis = (np.arange(64) - 31.5) * 0.08
    y, x = np.meshgrid(axis, axis, indexing="ij")
    for image in (renderer.render_row(row, MODELS["III"]), by_hand("III", row)):
        radius = np.hypot(x, y)[image > 0.8 * image.max()].mean()
        assert radius == pytest.approx(0.813, abs=0.08)  # a pixel


def test_the_newer_cosmology_bends_light_less():
    recipe, rows = rows_of("II", 1, cosmology="Planck18")
    for row in rows:
        image, expected = renderer.render_row(row, recipe), by_hand("II", row, scale_of(67.5, 0.309, 0.049))
        np.testing.assert_allclose(image / image.max(), expected / expected.max(), atol=1e-4, rtol=0)
        other = renderer.render_row(row, MODELS["II"])
        assert 1e-3 < np.abs(image / image.max() - other / other.max()).max() < 1e-2  # part of the peak


# Noise


@pytest.fixture(scope="module")
def counts_of_one_lens():
    """Images of Model I of one lens, all with the same exposure in seconds, and that lens without noise."""
    recipe, (row,) = rows_of("I", 1, classes=("no_sub",))
    exposure = 2000.0
    rows = [row | {"noise_seed": seed, "exposure": exposure} for seed in range(1000)]
    model = renderer.render_row(row, replace(recipe, noise=False))
    return np.stack([renderer.add_noise(model, row, recipe) for row in rows]), by_hand("I", row), exposure


def test_counts_of_model_i_have_the_mean_and_the_variance_of_photons_drawn_twice(counts_of_one_lens):
    counts, model, exposure = counts_of_one_lens
    assert counts.dtype.kind == "i"
    far = model * exposure > 6 * np.sqrt(model * exposure + (0.01 * exposure) ** 2)  # nothing is cut off at 0
    assert far.sum() > 400
    for low, high in ((0.0, 0.1), (0.1, 0.16), (0.16, 1.0)):
        here = far & (model >= low) & (model < high)
        expected = exposure * model[here]
        np.testing.assert_allclose(counts[:, here].mean(0).mean(), expected.mean(), rtol=2e-3)
        variance = 2 * expected + (0.01 * exposure) ** 2  # of the first draw, of the second, and of the sky
        np.testing.assert_allclose(counts[:, here].var(0).mean(), variance.mean(), rtol=0.01)
    deviations = (counts[:, far].mean(0) - exposure * model[far]) / np.sqrt(variance_of(model[far], exposure) / 1000)
    assert np.abs(deviations).max() < 5
    assert deviations.std() == pytest.approx(1, abs=0.1)


def variance_of(model, exposure):
    return 2 * exposure * model + (0.01 * exposure) ** 2


def test_the_sky_of_model_i_is_half_zeros(counts_of_one_lens):
    counts, model, exposure = counts_of_one_lens
    sky = counts[:, model < 1e-7]
    spread = 0.01 * exposure
    assert sky.shape[1] > 1000
    assert sky.mean() == pytest.approx(spread / np.sqrt(2 * np.pi), rel=0.01)  # of a normal deviate cut off at 0
    # No photon comes where the deviate is below 0, nor always where it is above
    zeros = 0.5 + np.exp(spread**2 / 2 + stats.norm.logsf(spread))
    assert (sky == 0).mean() == pytest.approx(zeros, abs=1e-3)


def test_the_exposures_of_model_i_are_drawn_as_the_recipe_says():
    _, rows = rows_of("I", 500)
    exposures = np.array([row["exposure"] for row in rows])
    assert stats.kstest(np.log10(exposures), stats.uniform(3, 0.5).cdf).pvalue > 1e-3
    assert len({row["noise_seed"] for row in rows}) == 1500


@pytest.mark.parametrize(
    ("model", "zero_point", "sky", "exposure"), [("II", 24, 0.00587, 2260), ("III", 25.96, 0.00592, 5400)]
)
def test_the_noise_that_models_ii_and_iii_lack_is_that_of_sky_and_photons(model, zero_point, sky, exposure):
    recipe, (row,) = rows_of(model, 1, noise=True, classes=("no_sub",), zero_point=zero_point)
    assert row["exposure"] == exposure
    expected = 10 ** (-0.4 * (20 - zero_point)) * by_hand(model, row)
    rows = [row | {"noise_seed": seed} for seed in range(300)]
    images = np.stack([renderer.add_noise(expected, row, recipe) for row in rows])
    dark, bright = expected < 1e-6 * expected.max(), expected > 0.5 * expected.max()
    assert images[:, dark].std() == pytest.approx(sky, rel=0.01)
    shot = expected[bright] / exposure
    assert images[:, bright].var(0).mean() == pytest.approx((shot + sky**2).mean(), rel=0.02)
    np.testing.assert_allclose(renderer.render_row(row, recipe), renderer.add_noise(expected, row, recipe), atol=1e-3)


# Files


@pytest.fixture
def simulate(tmp_path):
    def run(name, *flags):
        run_script("simulate/simulate_lenses.py", "--data_dir", tmp_path / name, "--num_workers", 1, *flags)
        return tmp_path / name

    return run


def bytes_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.npy"))}


@pytest.mark.parametrize("flags", [["--model", "I"], ["--model", "III"], ["--model", "II", "--noise", "on"]])
def test_images_depend_on_nothing_but_seed_class_and_number(simulate, flags):
    many = bytes_in(simulate("many", *flags, "--num_per_class", 3))
    folder = simulate("few", *flags, "--num_per_class", 2, "--num_workers", 2)
    assert len(bytes_in(folder)) == 6
    (folder / "cdm" / "1.npy").unlink()
    assert bytes_in(simulate("few", *flags, "--num_per_class", 3)) == many
    other = bytes_in(simulate("other", *flags, "--num_per_class", 3, "--seed", 1))
    assert not set(many.values()) & set(other.values())


def test_images_of_model_i_are_small_whole_numbers_and_read_back(simulate):
    folder = simulate("I", "--model", "I", "--num_per_class", 2)
    image = np.load(folder / "axion" / "0.npy")
    assert (image.shape, image.dtype) == ((150, 150), np.uint16)
    table = Table.read(folder / "parameters.fits")
    assert str(table["exposure"].unit) == "s"
    expected = table["exposure"][0] * by_hand("I", table[0])
    smooth = gaussian_filter(image - expected, 5)  # noise 40 at the peak, of which 5 pixels leave about 1 / 18
    assert np.abs(smooth[expected > 100]).max() < 15
    dataset = NpyDataset(folder)
    assert dataset.image_shape == (1, 150, 150)
    assert dataset.classes == CLASSES
    quiet = simulate("quiet", "--model", "I", "--num_per_class", 1, "--noise", "off")
    quiet = np.load(quiet / "axion" / "0.npy")
    assert quiet.dtype == np.float32
    np.testing.assert_allclose(quiet, by_hand("I", table[0]), atol=1e-4 * quiet.max())


@pytest.mark.parametrize(("model", "dtype"), [("I", "i8"), ("II", "f8"), ("III", "f8")])
def test_published_files_are_pickled_pairs_and_plain_arrays_that_are_read_back(simulate, model, dtype):
    flags = ["--model", model, "--num_per_class", 2]
    folder, simple = simulate("published", *flags, "--as_published", "true"), simulate("simple", *flags)
    table = Table.read(folder / "parameters.fits")
    assert sorted(path.name for path in (folder / "axion").iterdir()) == ["axion_sim_0.npy", "axion_sim_1.npy"]
    for row in table:
        path = folder / row["class"] / f"{row['class']}_sim_{row['index']}.npy"
        content = np.load(path, allow_pickle=row["class"] == "axion")
        image, mass = content if row["class"] == "axion" else (content, np.nan)
        assert image.dtype == dtype
        np.testing.assert_equal(mass, row["axion_mass"])
        read, read_mass = read_image(path)
        np.testing.assert_equal(read_mass, row["axion_mass"])
        np.testing.assert_allclose(read[0], (image - image.min()) / np.ptp(image), atol=1e-6)
        other, _ = read_image(simple / row["class"] / f"{row['index']}.npy")
        np.testing.assert_allclose(read, other, atol=1e-6)
        if model == "II":  # in the units of the published code
            np.testing.assert_allclose(image, 2 * 10**1.6 * by_hand("II", row), atol=1e-4 * image.max())
    assert NpyDataset(folder).counts() == dict.fromkeys(CLASSES, 2)


def test_published_files_of_model_ii_are_as_bright_as_the_published_ones(simulate):
    def peaks(folder):
        return [np.load(path).max() for path in (folder / "no_sub").iterdir()]

    ours = peaks(simulate("published", "--num_per_class", 40, "--as_published", "true"))
    assert min(ours) < np.mean(peaks(DATA / "published_format")) < max(ours)


# What a folder is


def test_a_folder_says_which_model_it_holds(simulate, lens_data):
    facts = {}
    for model, shape in {"I": (1, 150, 150), "III": (1, 64, 64)}.items():
        folder = simulate(model, "--model", model, "--num_per_class", 1)
        facts[model] = json.loads((folder / "recipe.json").read_text())
        assert recipe_of(CLASSES, shape, folder) == MODELS[model]
        assert pixel_scale_of(CLASSES, shape, folder) == (CAMERAS[model][1], "arcsec")
        assert not recipe_of(CLASSES, shape, folder).lens_equation
        assert NpyDataset(folder).classes == CLASSES
        assert recipe_of(CLASSES, (1, 32, 32), folder) is None
    assert (facts["III"]["model"], facts["III"]["pixel_scale"]) == ("III", 0.08)
    assert recipe_of(CLASSES, (1, 64, 64), lens_data) == MODELS["II"]
    assert recipe_of(CLASSES, (1, 64, 64), lens_data).lens_equation


def test_without_a_word_of_the_folder_classes_and_shape_tell(tmp_path):
    assert recipe_of(CLASSES, (1, 64, 64), tmp_path).model == "II"
    assert pixel_scale_of(CLASSES, (1, 64, 64)) == (0.101, "arcsec")
    assert recipe_of(CLASSES, (1, 150, 150), tmp_path) is None
    for content in ("", "[]", '{"model": ["II"]}', '{"model": "V"}'):
        (tmp_path / "recipe.json").write_text(content)
        found = recipe_of(CLASSES, (1, 64, 64), tmp_path)
        assert found is None if "model" in content else found.model == "II"


@pytest.mark.parametrize(
    "flags", [["--noise", "on"], ["--cosmology", "Planck18"], ["--einstein_radius_convention", "angular_diameter"]]
)
def test_the_lens_equation_is_asked_of_the_smooth_lens_of_model_ii_alone(simulate, flags):
    folder = simulate("data", "--num_per_class", 1, *flags)
    recipe = recipe_of(CLASSES, (1, 64, 64), folder)
    assert recipe.model == "II"
    assert not recipe.lens_equation


def test_models_and_formats_are_not_mixed_in_a_folder(simulate, capsys):
    simulate("data", "--num_per_class", 1, "--model", "III")
    for flags in (
        [],
        ["--model", "I"],
        ["--model", "III", "--noise", "on"],
        ["--model", "III", "--as_published", "true"],
    ):
        with pytest.raises(SystemExit):
            simulate("data", "--num_per_class", 1, *flags)
        assert "choose another --data_dir" in capsys.readouterr().err
