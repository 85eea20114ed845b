"""Every kind of data that people have is trained on, generated, classified and evaluated, and nothing is edited."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from astropy.io import fits
from conftest import run_script

from dataset import NpyDataset
from models.classifier import load_classifier
from models.generator import SIZES, generate_image, load_model
from scaling import Scaling

COUNT = 80  # images a class


def images_of(classes: tuple[str, ...], shape: tuple[int, ...], flux: float = 100) -> dict[str, np.ndarray]:
    """Images of a Gaussian in each channel, which lies elsewhere in each class, on a noisy sky."""
    random = np.random.default_rng(0)
    x, y = np.meshgrid(*2 * [np.linspace(-1, 1, shape[-1])])
    found = {}
    for label, name in enumerate(classes):
        place = random.normal(label / 2 - 0.5, 0.1, (2, COUNT, shape[0], 1, 1))
        width, peak = random.uniform(0.2, 0.4, (COUNT, 1, 1, 1)), flux * random.uniform(0.5, 1.5, (COUNT, 1, 1, 1))
        light = peak * np.exp(-((x - place[0]) ** 2 + (y - place[1]) ** 2) / width**2)
        found[name] = light + random.normal(0, 0.02 * flux, light.shape)
    return found


def save(path: Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array, **options)


# Ways to write images (n, c, s, s) of each class to a folder


def class_folders(root: Path, images: dict[str, np.ndarray], kind: type = float) -> None:
    for name, of_class in images.items():
        for k, image in enumerate(of_class):
            save(root / name / f"{k}.npy", image.astype(kind)[0] if len(image) == 1 else image.astype(kind))


def counts(root: Path, images: dict[str, np.ndarray]) -> None:
    class_folders(root, {name: np.random.default_rng(1).poisson(of.clip(0)) for name, of in images.items()}, np.uint16)


def pickled(root: Path, images: dict[str, np.ndarray]) -> None:
    for name, of_class in images.items():
        for k, image in enumerate(of_class):
            packed = np.empty(5, object)
            packed[:] = [image[0], 1e-23, 0.5, 0.1, 2.0]
            save(root / name / f"{k}.npy", packed, allow_pickle=True)


def splits(root: Path, images: dict[str, np.ndarray]) -> None:
    for name, of_class in images.items():
        for k, image in enumerate(of_class):
            save(root / ("val" if k % 5 == 0 else "train") / name / f"{k}.npy", image)


def side_by_side(root: Path, images: dict[str, np.ndarray]) -> None:
    class_folders(root, {name: of[:40] for name, of in images.items()})
    class_folders(root.with_name(f"{root.name}_test"), {name: of[40:] for name, of in images.items()})


def last_axis_channels(root: Path, images: dict[str, np.ndarray]) -> None:
    for name, of_class in images.items():
        for k, image in enumerate(of_class):
            save(root / name / f"{k}.npy", np.moveaxis(image, 0, -1))


def unlabelled_fits(root: Path, images: dict[str, np.ndarray]) -> None:
    root.mkdir()
    for k, image in enumerate(images["images"]):
        header = fits.Header({"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CDELT1": -0.1 / 3600, "CDELT2": 0.1 / 3600})
        fits.PrimaryHDU(image.squeeze().astype("f4"), header).writeto(root / f"{k}.fits.gz")


def stacks(root: Path, images: dict[str, np.ndarray]) -> None:
    for name, of_class in images.items():
        save(root / f"{name}.npy", of_class[:, 0])


def stack_and_labels(root: Path, images: dict[str, np.ndarray]) -> None:
    save(root / "images.npy", np.moveaxis(np.concatenate(list(images.values())), 1, -1))
    save(root / "labels.npy", np.repeat(list(map(int, images)), COUNT))


LENSES, TEST_I = ("axion", "cdm", "no_sub"), ("no", "sphere", "vort")
KINDS = {
    # kind: (classes, shape of an image, how it is written, flags of the training)
    "Model I: counts of 150 pixels": (LENSES, (1, 150, 150), counts, ["--model_size", "ComponentMLP-512"]),
    "Model II: axion pickled with four values": (LENSES, (1, 64, 64), pickled, []),
    "Model IV: three channels last": (("axion", "cdm", "no"), (3, 64, 64), last_axis_channels, []),
    "Common Test I: train/ and val/": (TEST_I, (1, 150, 150), splits, []),
    "Model_X and Model_X_test": (("a", "b", "c", "d"), (3, 32, 32), side_by_side, ["--augment", "square"]),
    "a folder of FITS": (("images",), (1, 40, 40), unlabelled_fits, ["--scaling", "asinh", "--augment", "square"]),
    "a stack for each class": (("one", "two"), (1, 101, 101), stacks, ["--scaling", "set"]),
    "images.npy and labels.npy": (("0", "1"), (5, 24, 24), stack_and_labels, ["--model_size", "ComponentMLP-512"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_data_is_no_edit(kind, tmp_path, undrawn, monkeypatch, capsys):
    classes, shape, write, flags = KINDS[kind]
    data, run = tmp_path / "data", tmp_path / "run"
    write(data, images_of(classes, shape))
    monkeypatch.setattr("metrics.report.write_html", lambda *args: None)
    for size in ("NanoDiT-S/16", "ComponentMLP-512"):
        monkeypatch.setitem(SIZES, size, SIZES[size] | {"hidden_size": 24, "depth": 1})
    flags += ["--epochs", 2, "--num_ode_steps", 2, "--data_dir", data, "--output_dir", run]
    run_script("train/train_diffusion.py", "--recipe", "first_look", *flags)

    checkpoint = run / "dit_conditional_ckpts" / "dit_conditional_final.pt"
    model = load_model(checkpoint, "cpu")
    assert (model.classes, model.image_shape) == (classes, shape)
    images = generate_image(model, classes[-1], num_samples=3)
    assert torch.equal(images, generate_image(model, len(classes) - 1, num_samples=3))
    assert images.shape == (3, *shape)
    assert images.isfinite().all()

    if len(classes) > 1:
        flags = ["--image_size", 32, "--batch_size", 32, "--epochs", 1, "--pretrained", "false", "--data_dir", data]
        run_script("train/train_classifier.py", *flags, "--output_dir", tmp_path / "c")
        classifier = tmp_path / "c" / "classifier_ckpts" / "resnet18_best.pt"
        assert load_classifier(classifier).classes == classes
        capsys.readouterr()
        run_script("evaluate/evaluate_classify.py", "--npy_path", data, "--model_path", classifier)
        assert f"Accuracy on {classes[-1]}: " in capsys.readouterr().out
    else:
        classifier = "weights/resnet18_lens.safetensors"  # its features alone
        with pytest.raises(SystemExit, match="2"):
            run_script("train/train_classifier.py", "--data_dir", data, "--output_dir", tmp_path / "c")
        assert "has one class, images: there is nothing to tell apart" in capsys.readouterr().err

    flags = ["--checkpoint_path", checkpoint, "--classifier_path", classifier, "--num_splits", 2, "--data_dir", data]
    flags += ["--output_dir", tmp_path / "generated", "--report_dir", tmp_path, "--figure_path", tmp_path / "l.png"]
    run_script("evaluate/evaluate_fld.py", *flags, "--num_ode_steps", 1)
    metrics = json.loads((tmp_path / "report.json").read_text())["metrics"]
    assert set(metrics["frechet_lens"]) == {"overall", *classes}
    assert metrics["frechet_lens"]["overall"]["value"] > 0
    assert (metrics["class_accuracy"]["overall"]["value"] is None) == (len(classes) == 1)
    unit = "arcsec" if write in (unlabelled_fits, pickled) else "pixels"
    assert f"Ring radius, W1 in {unit}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["set", "asinh"])
def test_flux_comes_back_in_the_unit_of_the_data(kind, tmp_path, undrawn, monkeypatch):
    """A generator of images with fluxes from 500 to 1500 draws such fluxes, even after few epochs."""
    images = images_of(("a", "b"), (1, 32, 32), flux=1000)
    class_folders(tmp_path / "data", images)
    size = "ComponentMLP-512"
    monkeypatch.setitem(SIZES, size, SIZES[size] | {"hidden_size": 24, "depth": 1})
    flags = ["--model_size", size, "--scaling", kind, "--data_dir", tmp_path / "data", "--epochs", 30]
    run_script("train/train_diffusion.py", "--recipe", "first_look", *flags, "--sample_interval", 30,
               "--output_dir", tmp_path / "run")  # fmt: skip
    model = load_model(tmp_path / "run" / "dit_conditional_ckpts" / "dit_conditional_final.pt", "cpu")
    made = generate_image(model, "a", num_samples=40)
    assert made.median() == pytest.approx(np.median(images["a"]), abs=60)
    peaks, real = made.amax((1, 2, 3)), images["a"].max((1, 2, 3))
    assert peaks.mean() == pytest.approx(real.mean(), rel=0.3)
    assert peaks.std() > 0.2 * real.std()  # some are brighter than others
    scaled = generate_image(model, "a", num_samples=40, scaled=True)
    torch.testing.assert_close(model.scaling.undo(scaled), made)
    saved = np.load(next(tmp_path.glob("run/dit_conditional_npy/*/class_0_sample_0.npy")))
    assert saved.max() > 200  # in the unit of the data, too


def test_images_darker_than_their_sky_keep_no_flux(tmp_path, capsys):
    images = np.ones((30, 16, 16))
    images[:, 6:9, 6:9] = 0.5
    class_folders(tmp_path / "data", {"a": images})
    with pytest.raises(SystemExit):
        run_script("train/train_diffusion.py", "--scaling", "set", "--batch_size", 5, "--data_dir", tmp_path / "data")
    assert "--scaling set: nothing is brighter than the sky; --scaling image takes" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["image", "set", "asinh"])
def test_a_scaling_is_undone_by_its_inverse(kind, tmp_path):
    """Against the formulas, written again, for counts with a sky of 7 and noise of 3 in all images."""
    random = np.random.default_rng(2)
    raw = 7 + random.normal(0, 3, (50, 2, 16, 16))
    raw[:, 0, 6:10, 6:10] += np.linspace(100, 5000, 50)[:, None, None] * np.linspace(0.1, 1, 16).reshape(4, 4)
    class_folders(tmp_path, {"a": raw})
    data = NpyDataset(tmp_path)
    order = [int(Path(file).stem) for file in data.files]
    low, high = torch.from_numpy(data.low), torch.from_numpy(data.high)
    scaling = data.scaling = Scaling.of(kind, data.images, low, high)
    scaled = data.read(slice(None))
    if kind == "image":
        assert (scaled.amin((1, 2, 3)), scaled.amax((1, 2, 3))) == pytest.approx((0, 1))
        assert torch.equal(scaling.undo(scaled), scaled)
        return
    assert scaling.softening == pytest.approx(3, rel=0.05)
    assert scaling.high == pytest.approx(5000, rel=0.03)
    torch.testing.assert_close(scaling.undo(scaled.double()), torch.from_numpy(raw)[order], rtol=1e-3, atol=0.05)
    above = (raw[order] - scaling.low) / (scaling.high - scaling.low)
    if kind == "asinh":
        above = np.arcsinh(above * (scaling.high - scaling.low) / 3) / np.arcsinh((scaling.high - scaling.low) / 3)
    np.testing.assert_allclose(scaled, above, atol=0.02)


def test_flux_is_compared_where_it_is_kept(tmp_path, undrawn, monkeypatch, capsys):
    """Images five times as bright differ from the original ones only in flux; a flag can ask for that metric, too."""
    images = images_of(("a", "b"), (1, 24, 24))
    class_folders(tmp_path / "data", images)
    class_folders(tmp_path / "brighter", {name: 5 * of + 1000 for name, of in images.items()})
    monkeypatch.setattr("metrics.report.write_html", lambda *args: None)
    monkeypatch.setattr("metrics.score.check_match", lambda *args: None)
    flags = ["--data_dir", tmp_path / "data", "--generated_dir", tmp_path / "brighter", "--num_splits", 2]
    flags += ["--report_dir", tmp_path, "--figure_path", tmp_path / "l.png"]
    flags += ["--classifier_path", "weights/resnet18_lens.safetensors"]
    for keeps in ("false", "true"):
        run_script("evaluate/evaluate_fld.py", *flags, "--keeps_flux", keeps)
        metrics = json.loads((tmp_path / "report.json").read_text())["metrics"]
        assert ("flux" in metrics) == (keeps == "true")
        assert metrics["ring_radius"]["a"]["value"] < 3 * metrics["ring_radius"]["a"]["floor"]
    assert metrics["peak"]["a"]["value"] > 10 * metrics["peak"]["a"]["floor"]
    assert metrics["sky"]["overall"]["value"] == pytest.approx(1000, rel=0.2)


@pytest.mark.parametrize("size", ["NanoDiT-S/16", "ComponentMLP-512"])
def test_a_run_goes_on_when_images_were_added(size, tmp_path, undrawn, monkeypatch, capsys):
    """Its scaling and its components stay as they were."""
    images = images_of(("a", "b"), (1, 24, 24))
    class_folders(tmp_path / "data", {name: of[:60] for name, of in images.items()})
    monkeypatch.setitem(SIZES, size, SIZES[size] | {"hidden_size": 24, "depth": 1})
    flags = ["--recipe", "first_look", "--model_size", size, "--scaling", "set", "--data_dir", tmp_path / "data"]
    flags += ["--output_dir", tmp_path / "run"]
    run_script("train/train_diffusion.py", *flags, "--epochs", 1)
    path = tmp_path / "run" / "dit_conditional_ckpts" / "dit_conditional_final.pt"
    before = load_model(path, "cpu")
    class_folders(tmp_path / "data", {name: 3 * of for name, of in images.items()})
    run_script("train/train_diffusion.py", *flags, "--epochs", 2)
    assert "is at epoch 1" in capsys.readouterr().out
    after = load_model(path, "cpu")
    assert after.scaling == before.scaling
    if before.codec:
        assert torch.equal(after.codec.vectors, before.codec.vectors)
    with pytest.raises(SystemExit):
        run_script("train/train_diffusion.py", *flags, "--epochs", 3, "--scaling", "asinh")
    assert "the generator to go on with takes images with --scaling set" in capsys.readouterr().err
