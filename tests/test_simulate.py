"""The simulator gives the published code's images, and the same ones every time."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from astropy.table import Table
from conftest import DATA, ROOT, run_script
from lenstronomy.LensModel.lens_model import LensModel
from scipy import stats

from dataset import normalize
from metrics.two_sample import c2st
from settings import InputError
from simulate import renderer as sim
from simulate import simulate_lenses
from simulate.recipes import MODEL_II
from simulate.vectorized import render_many


def test_images_equal_the_published_codes_parameter_for_parameter():
    check = np.load(DATA / "recipe_check.npz")
    for i, kind in enumerate(check["kind"]):
        points = check["point_mass_thetaE_x_y_arcsec"][i]
        points = points[np.isfinite(points).all(1) & (points[:, 0] > 0)]
        assert len(points) == {"axion": 100, "cdm": 25, "no_sub": 0}[kind]
        image = sim.render(check["source_xy_arcsec"][i], points[:, 0], points[:, 1:])
        np.testing.assert_allclose(image / image.max(), check["image_over_peak"][i], rtol=0, atol=2e-14)


def test_the_facts_of_the_recipe_are_those_of_its_images():
    image_model = sim.telescope(0)[1]
    assert image_model.Data.pixel_width == pytest.approx(MODEL_II.pixel_scale)
    assert sim.render(np.zeros(2), np.empty(0), np.empty((0, 2))).shape == MODEL_II.image_shape[1:]
    halo, shear = sim.smooth_lens()
    x, y = np.array([0.7]), np.array([0.4])
    alone = LensModel(["SIE", "SHEAR"]).alpha(x, y, [halo, shear])
    scaled = image_model.LensModel.alpha(x, y, [halo, shear])
    np.testing.assert_allclose(scaled, MODEL_II.deflection_scale * np.array(alone), rtol=1e-6)


@pytest.mark.parametrize("kind", ["axion", "cdm", "no_sub"])
def test_the_vectorized_simulator_gives_the_same_images(kind):
    rows = [row for row in sim.parameter_table(12, seed=5) if row["class"] == kind]
    images = render_many(rows)
    for row, image in zip(rows, images.numpy(), strict=True):
        expected = sim.render_row(row)
        np.testing.assert_allclose(image / image.max(), expected / expected.max(), rtol=0, atol=1e-5)


def test_vortex_has_the_published_point_masses():
    check = np.load(DATA / "recipe_check.npz")
    for i in np.flatnonzero(check["kind"] == "axion"):
        row = {"class": "axion", "axion_mass": check["axion_mass_eV"][i], "vortex_angle": check["vortex_angle_rad"][i]}
        masses, positions = sim.point_masses(row)
        expected = check["point_mass_thetaE_x_y_arcsec"][i]
        np.testing.assert_allclose(sim.einstein_radius(masses), expected[:, 0], rtol=1e-12)
        np.testing.assert_allclose(positions, expected[:, 1:], atol=1e-12)
        assert masses.sum() == pytest.approx(3e10)


def test_einstein_radii_of_both_conventions():
    assert sim.einstein_radius(1e12) == pytest.approx(1.28149, abs=1e-5)
    assert sim.einstein_radius(3e8) == pytest.approx(0.022196, abs=1e-6)
    # sqrt(4GM/c^2 D_LS/(D_L D_S)) with D_L = 1259.08, D_S = 1651.91, D_LS = 707.6 Mpc, worked out by hand
    lens, source = 1.5 * 1259.08, 2 * 1651.91  # comoving Mpc
    between = (source - lens) / 2
    by_hand = 206265 * np.sqrt(4 * 4.30091e-9 * 1e12 / 299792.458**2 * between / (1259.08 * 1651.91))
    assert sim.einstein_radius(1e12, "angular_diameter") == pytest.approx(by_hand, rel=1e-4)


def test_parameters_are_drawn_as_the_recipe_says():
    table = sim.parameter_table(3000, seed=1)
    axion, cdm, no_sub = (table[table["class"] == name] for name in ("axion", "cdm", "no_sub"))
    uniform = stats.uniform(-0.35, 0.7).cdf
    assert stats.kstest(np.asarray(table["source_xy"]).ravel(), uniform).pvalue > 1e-3
    assert stats.kstest(np.log10(axion["axion_mass"]), stats.uniform(-24, 2).cdf).pvalue > 1e-3
    assert stats.kstest(axion["vortex_angle"], stats.uniform(0, 2 * np.pi).cdf).pvalue > 1e-3
    low, high = 1e6**0.1, 1e10**0.1  # p(m) ~ m^-0.9 between 1e6 and 1e10
    masses = np.asarray(cdm["subhalo_mass"]).ravel()
    assert stats.kstest(masses, lambda m: (m**0.1 - low) / (high - low)).pvalue > 1e-3
    radius = np.linalg.norm(cdm["subhalo_xy"], axis=-1).ravel()
    assert stats.kstest(radius, stats.uniform(0.25, 1.75).cdf).pvalue > 1e-3
    assert np.isnan(no_sub["axion_mass"]).all()
    assert np.isnan(no_sub["subhalo_mass"]).all()
    assert str(table["source_xy"].unit) == "arcsec"


def files_in(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("*/*.npy"))}


def test_the_same_images_whatever_the_number_of_processes_and_images(lens_data, tmp_path):
    run_script("simulate/simulate_lenses.py", "--data_dir", tmp_path, "--num_per_class", 3, "--num_workers", 2)
    few, many = files_in(tmp_path), files_in(lens_data)
    assert len(few) == 9
    assert few.items() <= many.items()
    image = np.load(tmp_path / "axion" / "0.npy")
    assert image.shape == (64, 64)
    assert image.dtype == np.float32


def test_another_seed_gives_other_images(lens_data, tmp_path):
    run_script("simulate/simulate_lenses.py", "--data_dir", tmp_path, "--num_per_class", 2, "--seed", 1)
    assert not set(files_in(tmp_path).values()) & set(files_in(lens_data).values())


def test_the_table_has_what_each_image_was_made_from(lens_data):
    table = Table.read(lens_data / "parameters.fits")
    assert len(table) == 144
    for row in table[np.asarray(table["index"]) == 5]:
        masses, positions = sim.point_masses(row)
        image = sim.render(row["source_xy"], sim.einstein_radius(masses), positions)
        np.testing.assert_array_equal(np.load(simulate_lenses.image_path(lens_data, row)), image.astype(np.float32))


def test_a_stopped_run_goes_on_without_making_any_image_again(data_copy):
    before = files_in(data_copy)
    stamps = {path: path.stat().st_mtime_ns for path in data_copy.glob("*/*.npy")}
    gone = data_copy / "cdm" / "3.npy"
    gone.unlink()
    run_script("simulate/simulate_lenses.py", "--data_dir", data_copy, "--num_per_class", 48)
    assert files_in(data_copy) == before
    assert [path.name for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp] == ["3.npy"]
    run_script("simulate/simulate_lenses.py", "--data_dir", data_copy, "--num_per_class", 49)
    assert len(files_in(data_copy)) == 147
    assert len(Table.read(data_copy / "parameters.fits")) == 147


def test_other_images_and_other_settings_are_not_mixed_in(data_copy, capsys):
    for flags, told in (
        (["--seed", 7], "SEED 0, not 7"),
        (["--einstein_radius_convention", "angular_diameter"], "THETA_E luminosity, not angular_diameter"),
        (["--model", "III", "--noise", "on"], "MODEL II, not III, NOISE as usual, not on"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_script("simulate/simulate_lenses.py", "--data_dir", data_copy, *flags)
        assert stopped.value.code == 1
        assert f"was simulated with {told}: choose another --data_dir" in capsys.readouterr().err
    (data_copy / "parameters.fits").unlink()
    with pytest.raises(InputError, match=r"not simulated here: it holds 1 .json file, axion/, cdm/, no_sub/"):
        simulate_lenses.reserve_folder(data_copy, sim.parameter_table(1, 0))


@pytest.mark.parametrize("theirs", ["notes.txt", "0.npy", "axion/0.png", "train/axion/0.npy"])
def test_somebody_elses_folder_is_not_filled(tmp_path, theirs):
    (tmp_path / theirs).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / theirs).touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=f"{tmp_path} was not simulated here: it holds "):
        simulate_lenses.reserve_folder(tmp_path, sim.parameter_table(1, 0))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("size", [0, 3000])
def test_a_damaged_table_is_named(data_copy, size):
    path = data_copy / "parameters.fits"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=f"{path} is damaged: remove {data_copy}"):
        simulate_lenses.reserve_folder(data_copy, sim.parameter_table(1, 0))


def test_ctrl_c_leaves_whole_files_and_one_line(tmp_path, heard):
    command = [sys.executable, str(ROOT / "simulate/simulate_lenses.py"), "--data_dir", str(tmp_path)]
    command += ["--num_per_class", "1000"]  # seconds of work
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stderr=pipe, stdout=pipe, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*/*.npy"))) < 20 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.decode().strip().splitlines()[-1].endswith("stopped")
    assert b"Traceback" not in errors
    sizes = {path.stat().st_size for path in tmp_path.glob("*/*.npy")}
    assert sizes == {128 + 4 * 64 * 64}


def test_ctrl_c_in_the_progress_bar_drops_what_has_not_begun(monkeypatch, tmp_path):
    def bar(images, **_):
        next(images)
        raise KeyboardInterrupt

    for name, value in {"DATA_DIR": tmp_path, "NUM_PER_CLASS": 200, "NUM_WORKERS": 1, "tqdm": bar}.items():
        monkeypatch.setattr(simulate_lenses, name, value)
    with pytest.raises(KeyboardInterrupt):
        simulate_lenses.main()
    assert len(list(tmp_path.glob("*/*.npy"))) < 200


# Against the published images themselves


def share_told_apart(a: np.ndarray, b: np.ndarray) -> float:
    """Accuracy on held-out images of a network trained to tell two sets of images apart; 0.5 is chance."""
    a, b = (normalize(images[:, None]) for images in (a, b))
    right, _ = c2st(lambda i, _: a[i], lambda i, _: b[i], torch.zeros(len(a), dtype=torch.long))
    return right.double().mean().item()


def simulated(name: str, count: int, convention: str = "luminosity") -> np.ndarray:
    table = sim.parameter_table(count, seed=5)
    recipe = replace(MODEL_II, convention=convention)
    return np.stack([sim.render_row(row, recipe) for row in table[table["class"] == name]])


@pytest.mark.skipif("LENS_REFERENCE" not in os.environ, reason="LENS_REFERENCE, an .npz of published images, not set")
@pytest.mark.usefixtures("full_c2st")
@pytest.mark.parametrize("name", ["axion", "cdm", "no_sub"])
def test_simulated_images_cannot_be_told_from_published_ones(name):
    published = np.load(os.environ["LENS_REFERENCE"])[name][:1000]
    share = share_told_apart(published, simulated(name, 1000))
    print(f"{name}: {share:.1%} told apart")
    assert share <= 0.55


@pytest.mark.usefixtures("full_c2st")
def test_the_textbook_einstein_radius_is_told_apart_at_once():
    """This shows what the test above can find: the same network detects images made with the other convention."""
    assert share_told_apart(simulated("no_sub", 150), simulated("no_sub", 150, "angular_diameter")) > 0.95
