"""Each of the four models is what its recipe says, worked out by hand beside the code that simulates it."""

import json
from dataclasses import replace
from importlib.util import find_spec

import h5py
import numpy as np
import pytest
import torch
from astropy.cosmology import FlatLambdaCDM
from astropy.table import Table
from conftest import DATA, ROOT, run_script
from lenstronomy.LensModel.lens_model import LensModel
from scipy import stats
from scipy.ndimage import gaussian_filter
from scipy.special import gamma

from dataset import NpyDataset
from image_files import read_image
from metrics.measure import measure
from models.classifier import load_classifier
from settings import InputError
from simulate import model_iv, recipes, renderer, simulate_lenses
from simulate.recipes import MODELS, recipe_of

CLASSES = ("axion", "cdm", "no_sub")
# pixels, arcsec a pixel, FWHM of the PSF in arcsec and where it ends in standard deviations
CAMERAS = {"I": (150, 0.05, 0.087, 3), "II": (64, 0.101, 0.16, 5), "III": (64, 0.08, 0.08, 5)}


def scale_of(h0=69.7, om0=0.2814, ob0=0.0464):
    """The factor that turns deflections of a source at redshift 2.5 into those of a source at redshift 1."""
    cosmology = FlatLambdaCDM(H0=h0, Om0=om0, Ob0=ob0)
    lens, source, convention = cosmology.comoving_distance([0.5, 1.0, 2.5]).value
    return (source - lens) / source / ((convention - lens) / convention)


def by_hand(model, row, scale=None):
    """The noise-free image of a row, in flux a pixel, for a source of total flux 1 or of amplitude 20."""
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
    images = NpyDataset(folder)
    assert images.counts() == dict.fromkeys(CLASSES, 2)
    sources = dict(zip(images.files, images.columns(["source_x"])["source_x"].values, strict=True))
    assert sources == {f"{of['class']}/{of['class']}_sim_{of['index']}.npy": of["source_xy"][0] for of in table}


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
        assert not recipe_of(CLASSES, shape, folder).lens_equation
        data = NpyDataset(folder)
        assert data.classes == CLASSES
        assert recipes.scale_of(data) == (CAMERAS[model][1], "arcsec")
        assert recipe_of(CLASSES, (1, 32, 32), folder) is None
    published = simulate("published", "--num_per_class", 1, "--as_published", "true")
    assert recipe_of(CLASSES, (1, 64, 64), published).zero_point == 24.0
    assert (facts["III"]["model"], facts["III"]["pixel_scale"]) == ("III", 0.08)
    assert recipe_of(CLASSES, (1, 64, 64), lens_data) == MODELS["II"]
    assert recipe_of(CLASSES, (1, 64, 64), lens_data).lens_equation


def test_without_a_word_of_the_folder_classes_and_shape_tell(tmp_path):
    assert recipe_of(CLASSES, (1, 64, 64), tmp_path).model == "II"
    assert recipe_of(CLASSES, (1, 64, 64), tmp_path).lens_equation
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


def test_generated_images_are_measured_by_the_recipe_of_the_real_ones(simulate, tmp_path):
    """Their own folder has no recipe.json, so it does not know the recipe."""
    flags = ["--num_per_class", 2]
    real, lens = NpyDataset(simulate("real", *flags, "--model", "III")), NpyDataset(simulate("II", *flags))
    (tmp_path / "II" / "recipe.json").unlink()
    classifier = load_classifier(ROOT / "weights" / "resnet18_lens.safetensors")
    index = torch.arange(6)
    own, as_real = (measure(lens, index, classifier, None, 8, of) for of in (None, real))
    np.testing.assert_allclose(as_real["ring_radius"], own["ring_radius"] * 0.08 / 0.101, rtol=1e-5)
    assert "lens_residual" in own
    assert "lens_residual" not in as_real
    assert "lens_residual" not in measure(real, index, classifier)


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


# Model IV

needs_haloes = pytest.mark.skipif(not (find_spec("pyHalo") and find_spec("galsim")), reason="requirements-model-iv.txt")


@pytest.fixture(scope="module")
def galaxies(tmp_path_factory):
    """A file like that of Galaxy10, whose only nearby unbarred spiral is a round Gaussian of 20 pixels on a sky."""
    path = tmp_path_factory.mktemp("galaxies") / "galaxies.h5"
    axis = np.arange(256) - 127.5
    blob = np.exp(-(axis[:, None] ** 2 + axis**2) / (2 * 20**2))
    images = np.full((4, 256, 256, 3), 99, np.uint8)
    images[2] = np.rint(7 + np.multiply.outer(blob, [240, 200, 120]))
    with h5py.File(path, "w") as file:
        file["images"], file["ans"] = images, np.array([6, 5, 6, 7])
        file["redshift"] = [0.02, 0.001, 0.019, 0.001]
    return str(path)


@pytest.fixture
def few_haloes(monkeypatch):
    """Leaves only the cold haloes in the middle of the image: the others take most of half a minute an image."""
    monkeypatch.setattr(model_iv, "_CONE", 1)
    model_iv._populations.cache_clear()
    yield
    model_iv._populations.cache_clear()


def four_by_hand(row, deflection):
    """The noise-free image of a row whose source is the Gaussian, (3, 64, 64) in counts per second."""
    axis = (np.arange(64) - 31.5) * 0.101
    x, y = np.meshgrid(axis, axis)
    sx, sy = np.array([x, y]) - scale_of() * np.reshape(deflection(x.ravel(), y.ravel()), (2, 64, 64))
    sigma = 20 * 0.0025
    source = np.exp(-(np.hypot(sx - row["source_xy"][0], sy - row["source_xy"][1]) ** 2) / (2 * sigma**2))
    bands = []
    for of_source, of_lens in ((22, 17), (19, 18), (18, 19)):
        light = 10 ** (-0.4 * (of_source - 24)) * source / (2 * np.pi * sigma**2)
        for magnitude, size, n, e2 in ((of_lens, 0.4, 2.3, 0.05), (28, 1.5, 1.2, 0.3)):
            q, b = (1 - e2) / (1 + e2), 1.9992 * n - 0.3271  # longest along the diagonal
            along, across = (x + y) / np.sqrt(2), (x - y) / np.sqrt(2)
            radius = np.sqrt(q * along**2 + across**2 / q) / size
            total = size**2 * 2 * np.pi * n * np.exp(b) * b ** (-2 * n) * gamma(2 * n)
            light += 10 ** (-0.4 * (magnitude - 24)) / total * np.exp(-b * (radius ** (1 / n) - 1))
        bands.append(gaussian_filter(light * 0.101**2, 0.16 / 0.101 / 2.3548200, mode="nearest", truncate=5))
    return np.stack(bands)


def smooth_lens_of(row):
    if row["class"] != "no":
        lens, main = LensModel(["SIE", "SHEAR"]), [{"theta_E": 1.5, "e1": 0, "e2": 0}, {"gamma1": 0.05, "gamma2": 0}]
        return lambda x, y: lens.alpha(x, y, main)
    cosmology = FlatLambdaCDM(H0=69.7, Om0=0.2814, Ob0=0.0464)
    near, far = cosmology.comoving_distance([0.5, 2.5]).value
    radius = 4 * np.pi * (row["sigma_v"] / 299792.458) ** 2 * (far - near) / far * 180 / np.pi * 3600
    return lambda x, y: radius * np.array([x, y]) / np.hypot(x, y)


@needs_haloes
@pytest.mark.parametrize("name", ["axion", "cdm", "no"])
def test_images_of_model_iv_are_those_worked_out_by_hand_but_for_the_haloes(galaxies, few_haloes, name):
    draw, render = model_iv.with_galaxies(galaxies)
    assert len(model_iv._galaxies(galaxies)) == 1
    for seed in range(3 if name == "no" else 1):
        recipe = MODELS["IV"]
        row = draw(np.random.default_rng(seed), name) | {"class": name, "exposure": 2260.0, "noise_seed": seed}
        image, noisy = render(row, replace(recipe, noise=False)), render(row, recipe)
        expected = np.moveaxis(four_by_hand(row, smooth_lens_of(row)), 0, 2)
        peak = expected.max()
        assert image.shape == (64, 64, 3)
        assert (image.min() >= 0, image.max(), noisy.max()) == (True, 1, 1)
        difference = np.abs(image - expected / peak)
        if name == "no":
            assert (difference.max((0, 1)) < 0.006 * image.max((0, 1))).all()
            np.testing.assert_allclose(image.sum((0, 1)), expected.sum((0, 1)) / peak, rtol=0.02)
            noise = noisy / noisy[image == 1] - image  # the brightest pixel has noise too
            sigma = np.sqrt(0.00587**2 + expected / 2260) / peak
            there = (expected / peak > 5 * sigma) & (expected < 0.2 * peak)
            assert (noise / sigma)[there].std() == pytest.approx(1, abs=0.1)
        else:  # haloes have an effect, and a small one
            assert 1e-4 < difference.max() < 0.35
            assert difference.mean() < 0.01


@needs_haloes
def test_the_velocities_and_sources_of_model_iv_are_drawn_as_the_recipe_says():
    table = renderer.parameter_table(1000, 0, MODELS["IV"], model_iv.draw_lens)
    smooth = table["class"] == "no"
    assert stats.kstest(table["sigma_v"][smooth], stats.norm(260, 20).cdf).pvalue > 1e-3
    assert np.isnan(table["sigma_v"][~smooth]).all()
    assert stats.kstest(np.asarray(table["source_xy"]).ravel(), stats.uniform(-0.3, 0.6).cdf).pvalue > 1e-3
    assert stats.kstest(table["source_angle"], stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-3


@needs_haloes
def test_haloes_are_of_the_row_whatever_was_drawn_before(galaxies, few_haloes):
    draw, render = model_iv.with_galaxies(galaxies)
    rows = [draw(np.random.default_rng(0), name) | {"class": name} for name in ("cdm", "axion")]
    recipe = replace(MODELS["IV"], noise=False)
    first = [render(row, recipe) for row in rows]
    model_iv._populations.cache_clear()  # as in another process
    np.random.seed(7)  # noqa: NPY002
    render(rows[0], replace(recipe, cosmology="Planck18"))
    again = [render(row, recipe) for row in rows[::-1]][::-1]
    np.testing.assert_array_equal(again, first)
    other = render(rows[0] | {"halo_seed": 1}, recipe)
    assert np.abs(other - first[0]).max() > 1e-5


@needs_haloes
def test_what_pyhalo_keeps_of_one_cosmology_is_not_taken_for_another():
    from colossus.lss.bias import twoHaloTerm
    from pyHalo.Halos import lens_cosmo

    for recipe in (MODELS["IV"], replace(MODELS["IV"], cosmology="Planck18")):
        model_iv._lens({"class": "axion", "halo_seed": 0}, recipe)
        where = 1.0, 1e13, 0.5, "200c"  # Mpc/h, solar masses/h, redshift
        assert lens_cosmo.twoHaloTerm is not twoHaloTerm
        assert lens_cosmo.twoHaloTerm(*where) == twoHaloTerm(*where)


@needs_haloes
def test_cold_haloes_do_not_depend_on_earlier_ones_to_the_last_digit(monkeypatch):
    monkeypatch.setattr(model_iv, "_CONE", 2)
    model_iv._populations.cache_clear()
    seeds = (4, 2, 1, 4)  # in this order, pyHalo left to itself gives different haloes
    first, *_, again = (model_iv._lens({"class": "cdm", "halo_seed": seed}, MODELS["IV"]) for seed in seeds)
    model_iv._populations.cache_clear()
    assert len(first[0]) > 20
    assert first == again


@needs_haloes
def test_drawn_galaxies_have_a_dark_corner_and_a_colour_and_lie_flat():
    row = model_iv.draw_lens(np.random.default_rng(0), "no") | {"inclination": np.arccos(0.2)}
    galaxy = model_iv.draw_galaxy(row)
    assert galaxy.shape == (256, 256, 3)
    assert galaxy[:50, :50].mean() < 0.01 * galaxy.mean()
    axis = np.arange(256) - 127.5
    disc = galaxy.sum(2)
    y, x = (np.sqrt((disc * square).sum() / disc.sum()) for square in (axis[:, None] ** 2, axis**2))
    assert 0.2 < y / x < 0.5
    blue = galaxy / galaxy.sum((0, 1))
    assert blue[126:130, 126:130, 2].sum() > 1.5 * blue[126:130, 126:130, 0].sum()  # the bulge is red


@needs_haloes
def test_files_of_model_iv_have_the_channels_last_and_come_in_two_splits(simulate, few_haloes):
    flags = ["--model", "IV", "--num_per_class", 2]
    simple, published = simulate("simple", *flags), simulate("published", *flags, "--as_published", "true")
    assert sorted(bytes_in(published)) == [
        f"{split}/{name}/sim_{i}.npy" for split, i in (("train", 1), ("val", 0)) for name in ("axion", "cdm", "no")
    ]
    for split, i in (("train", 1), ("val", 0)):
        dataset = NpyDataset(published / split)
        assert (dataset.classes, dataset.image_shape) == (("axion", "cdm", "no"), (3, 64, 64))
        recipe = recipe_of(dataset.classes, dataset.image_shape, published / split)
        assert (recipe, recipe.lens_equation) == (MODELS["IV"], False)
        for name in dataset.classes:
            image, here = np.load(published / split / name / f"sim_{i}.npy"), np.load(simple / name / f"{i}.npy")
            assert (image.dtype, here.dtype, image.max(), image.min()) == (np.float64, np.float32, 1, 0)
            np.testing.assert_array_equal(image.astype(np.float32), here)
            read, _ = read_image(simple / name / f"{i}.npy")
            np.testing.assert_allclose(read, np.moveaxis(here, 2, 0), atol=1e-6)
    before = bytes_in(simple)
    (simple / "cdm" / "1.npy").unlink()
    assert bytes_in(simulate("simple", *flags)) == before


def test_every_tenth_image_of_model_iv_is_for_validation(tmp_path):
    rows = [{"class": "no", "index": i} for i in range(30)]
    paths = [simulate_lenses.image_path(tmp_path, row, MODELS["IV"], True).relative_to(tmp_path).parts for row in rows]
    assert [i for i, path in enumerate(paths) if path[0] == "val"] == [0, 10, 20]
    assert {path[1] for path in paths} == {"no"}


def test_model_iv_names_the_command_that_installs_what_is_missing(monkeypatch, simulate, capsys):
    monkeypatch.setattr(model_iv, "find_spec", lambda name: name == "colossus")
    with pytest.raises(SystemExit):
        simulate("data", "--model", "IV")
    error = capsys.readouterr().err.strip().splitlines()
    assert error == ["Model IV needs pyHalo, mcfit, galsim: pip install -r requirements-model-iv.txt"]


def test_a_file_without_galaxies_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(model_iv, "find_spec", lambda name: True)
    path = tmp_path / "galaxies.h5"
    with pytest.raises(InputError, match="is no Galaxy10 DECaLS file"):
        model_iv.with_galaxies(str(path))
    with h5py.File(path, "w") as file:
        file["images"], file["ans"], file["redshift"] = np.zeros((2, 256, 256, 3), np.uint8), [6, 1], [0.5, 0.01]
    with pytest.raises(InputError, match="is no Galaxy10 DECaLS file"):
        model_iv.with_galaxies(str(path))
