"""Pictures are what their name says, whatever the user's own matplotlib is set to."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import plots
from settings import InputError

CODE = """
import numpy as np, plots, sys
plots.training_curves(sys.argv[1], [{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 0.5}], [["loss"]])
plots.save(plots.image_grid({"a_b": np.zeros((1, 8, 8))}, "x_y"), sys.argv[1] + "/grid.png")
"""


@pytest.mark.parametrize("setting", ["text.usetex: True", "savefig.format: pdf", "axes.facecolor: black"])
def test_somebody_elses_matplotlibrc_changes_no_picture(tmp_path, setting):
    (tmp_path / "matplotlibrc").write_text(setting)
    written = {}
    for folder, environment in (("plain", {}), ("styled", {"MATPLOTLIBRC": str(tmp_path)})):
        command = [sys.executable, "-c", CODE, str(tmp_path / folder)]
        subprocess.run(command, cwd=ROOT, env={"PATH": "", **environment}, check=True, capture_output=True)
        written[folder] = [(tmp_path / folder / name).read_bytes() for name in ("training_metrics.png", "grid.png")]
    assert written["plain"] == written["styled"]


@pytest.mark.parametrize(
    ("ending", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml"), ("PNG", b"\x89P")]
)
def test_a_picture_is_in_the_format_of_its_name(tmp_path, ending, start):
    path = tmp_path / f"picture.{ending}"
    plots.check_format(path)
    plots.save(plots.image_grid({"a": np.zeros((1, 8, 8))}), path)
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize("name", ["picture", "picture.", "picture.docx", "png", "picture.pgf"])
def test_a_format_that_is_none_is_named_before_anything_else(name):
    with pytest.raises(InputError, match=rf"{name}: its name must end in one of .*\.pdf"):
        plots.check_format(name)


def test_a_folder_is_no_picture(tmp_path):
    (tmp_path / "lenses.png").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        plots.check_format(tmp_path / "lenses.png")


def test_names_of_folders_are_shown_as_they_are(tmp_path):
    name, curve = "a$x^$b_{", np.ones((3, 5))
    for number, figure in enumerate(
        [
            plots.image_grid({name: np.zeros((1, 8, 8))}, name),
            plots.bands(np.arange(5), {"cdm": {name: curve}, "axion": {name: curve}}, "x", "y", log=True),
            plots.histograms({"cdm": {name: curve[0]}, "axion": {name: curve[0]}}, "x"),
            plots.confusion_matrix(np.eye(3, dtype=int), ("a", "b", "c"), name),
        ]
    ):
        plots.save(figure, tmp_path / f"{number}.png")


@pytest.mark.parametrize(("channels", "shown"), [(1, (8, 8)), (2, (8, 8)), (3, (8, 8, 3)), (5, (8, 8))])
def test_three_channels_are_shown_in_colour_and_others_as_their_mean(channels, shown):
    images = np.random.default_rng(0).random((2, channels, 8, 8))
    images[..., :5] = 0  # a dark sky
    figure = plots.image_grid({"a": images, "difference": images - 0.5}, signed={"difference"})
    image, _, difference, _ = (axes.images[0].get_array() for axes in figure.axes)
    assert image.shape == shown
    if channels == 3:
        faint = np.moveaxis(0.1 * images[0], 0, 2)
        shown_faint = plots.stretched(0.1 * images[0])
        assert (shown_faint[..., 5:, :] > 2 * faint[..., 5:, :]).all()  # faint light is brightened
        np.testing.assert_allclose(
            shown_faint[0, 5:, 0] / shown_faint[0, 5:, 1], (faint[..., 0] / faint[..., 1])[0, 5:]
        )
        assert image.max() <= 1
    else:
        np.testing.assert_allclose(image, images[0].mean(0))
    np.testing.assert_allclose(difference, images[0].mean(0) - 0.5, atol=1e-12)


def test_a_noisy_sky_is_dark_and_not_grey():
    random = np.random.default_rng(0)
    noisy = 0.3 + 0.05 * random.standard_normal((1, 64, 64))
    noisy[0, 30, 30] = 1
    shown = plots.stretched(noisy)
    assert np.median(shown) == pytest.approx(0.05 / 0.75, abs=0.01)  # one standard deviation of the noise
    assert shown[30, 30] == pytest.approx(1)


@pytest.mark.parametrize("classes", [("lens",), ("a$b", "c$d"), tuple("abcdefghij")])
def test_pictures_are_of_any_number_of_classes(classes, tmp_path):
    curves = {name: {"real": np.ones((3, 5))} for name in classes}
    values = {name: {"real": np.ones(3)} for name in classes}
    plots.save(plots.bands(np.arange(5), curves, "x", "y"), tmp_path / "bands.png")
    plots.save(plots.histograms(values, "x"), tmp_path / "histograms.png")
    plots.save(plots.confusion_matrix(np.eye(len(classes), dtype=int), classes), tmp_path / "confusion.png")
