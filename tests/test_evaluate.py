"""Generation is reproducible and in range; distances are right where they are known; nothing missing is a crash."""

import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from torch_fidelity import feature_extractor_inceptionv3
from torchmetrics.image.fid import NoTrainInceptionV3

from dataset import CLASSES, NpyDataset
from evaluate import evaluate_fld, measure
from evaluate.evaluate_fld import generate_image, load_model
from evaluate.figures import TITLES
from evaluate.measure import measure as real_measure
from models import flow
from models.checkpoint import load_checkpoint, save_checkpoint
from models.classifier import load_classifier
from settings import InputError


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint, "cpu")


def test_generate_image_is_the_published_interface(model):
    images = generate_image(model, target_class=1, ode_steps=3, cfg_scale=5.0, num_samples=4)
    assert images.shape == (4, 1, 64, 64)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.01
    assert generate_image(model, 0, ode_steps=1).shape == (1, 1, 64, 64)


def test_images_depend_on_seed_class_and_guidance_and_on_nothing_else(model):
    image = generate_image(model, 1, 3, 5.0, 2)
    torch.testing.assert_close(generate_image(model, 1, 3, 5.0, 5)[:2], image)
    for other in (generate_image(model, 1, 3, 5.0, 2, seed=1), generate_image(model, 0, 3, 5.0, 2)):
        assert not torch.allclose(other, image)
    assert not torch.allclose(generate_image(model, 1, 3, 1.0, 2), image)


def test_images_are_made_as_their_checkpoint_says_unless_told_otherwise(model, checkpoint, tmp_path):
    torch.testing.assert_close(generate_image(model, 1, num_samples=2), generate_image(model, 1, 2, 1.5, 2))
    content = load_checkpoint(checkpoint) | {"sampler": asdict(flow.Sampler(4, 1, "multistep", "cosine"))}
    save_checkpoint(tmp_path / "few.pt", **content)
    few = load_model(tmp_path / "few.pt", "cpu")
    noise = flow.noise_images(few.sample_shape, 0, range(2))
    with torch.inference_mode():
        expected, finer = (
            flow.to_unit_range(flow.multistep(few, noise, torch.tensor([1, 1]), flow.time_grid(steps, "cosine")))
            for steps in (4, 8)
        )
    torch.testing.assert_close(generate_image(few, 1, num_samples=2), expected)
    few.sampler = replace(few.sampler, tolerance=0.0)
    torch.testing.assert_close(generate_image(few, 1, num_samples=2), finer)
    torch.testing.assert_close(generate_image(few, 1, ode_steps=4, num_samples=2), expected)  # so many and no more
    other = [generate_image(few, 1, **given, num_samples=2) for given in ({"ode_steps": 3}, {"cfg_scale": 2.0})]
    assert all((image - expected).abs().max() > 1e-3 for image in other)
    del content["sampler"]  # the published checkpoints have none
    save_checkpoint(tmp_path / "published.pt", **content)
    assert load_model(tmp_path / "published.pt", "cpu").sampler == flow.Sampler(50, 5.0, "euler", "uniform")
    save_checkpoint(tmp_path / "wrong.pt", **content, sampler={"steps": 10**9})
    with pytest.raises(InputError, match="its configuration is not that of a NanoDiT"):
        load_model(tmp_path / "wrong.pt", "cpu")


def test_a_class_that_is_none_is_named(model):
    with pytest.raises(InputError, match="target_class 3 is not one of 0 to 2: axion, cdm, no_sub"):
        generate_image(model, 3)


def test_evaluate_is_ours_where_another_package_has_the_name(tmp_path):
    package = tmp_path / "site" / "evaluate"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the other evaluate')")
    code = "from evaluate.evaluate_fld import load_model, generate_image; print('ours')"
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "ours\n", done.stderr


# The scripts


@pytest.fixture
def flags(lens_data, checkpoint, classifier, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    return [
        *("--data_dir", lens_data, "--checkpoint_path", checkpoint, "--classifier_path", classifier),
        *("--generated_dir", tmp_path / "generated_npy", "--figure_path", tmp_path / "lenses.png"),
        *("--report_dir", tmp_path / "report", "--num_ode_steps", 2, "--cfg_scale", 1, "--device", "cpu"),
        *("--num_splits", 2),
    ]


def no_network(*args, **kwargs):
    raise OSError("no route to host")


def test_without_inception_weights_and_network_the_rest_is_computed(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    run_script("evaluate/evaluate_fld.py", *flags)
    out = capsys.readouterr().out
    assert "FID with Inception is left out: its weights cannot be fetched; --inception_weights_path" in out
    assert "3 images of a class are too few for the covariance of 512 features" in out
    table = out[out.index("images a class  ") :]
    assert table.splitlines()[0].split()[-4:] == ["overall", "axion", "cdm", "no_sub"]
    spread = r"((?:\s+[\d.e+-]+ ± [\d.e+-]+){4})$"
    for row, numbers in {
        "Fréchet distance, lens features": r"((?:\s+[\d.e+-]+){4})$",
        r"  floor: real against real \(lens features\)": spread,
        r"  ratio to the floor \(lens features\)": r"((?:\s+[\d.e+-]+){4})$",
        "Classifier accuracy, generated": r"((?:\s+[\d.]+%){4})$",
        "  classifier accuracy, real": r"((?:\s+[\d.]+% ± [\d.]+%){4})$",
    }.items():
        assert re.search(rf"^{row} *{numbers}", table, re.M), row
    assert (tmp_path / "lenses.png").stat().st_size > 10_000
    files = sorted((tmp_path / "generated_npy").glob("*/*.npy"))
    assert {file.parent.name for file in files} == set(CLASSES)
    image = np.load(files[0])
    assert image.shape == (64, 64)
    assert image.dtype == np.float32


def test_generated_files_are_the_images_of_one_checkpoint_and_each_of_its_own_noise(flags, model, tmp_path):
    """Another number of steps replaces them all; the same settings leave them, and make only what is missing."""
    folder = tmp_path / "generated_npy"
    run_script("evaluate/evaluate_fld.py", *flags)
    cdm, axion = np.load(folder / "cdm" / "2.npy"), np.load(folder / "axion" / "2.npy")
    np.testing.assert_allclose(axion, generate_image(model, 0, 2, 1.0, 3)[2, 0], atol=1e-5)
    assert np.abs(cdm - generate_image(model, 1, 2, 1.0, 3)[2, 0].numpy()).max() > 1e-3
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*/*.npy")}
    (folder / "no_sub" / "0.npy").unlink()
    run_script("evaluate/evaluate_fld.py", *flags)
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*/*.npy")}
    assert all(after[path][1] == content for path, (_, content) in before.items())
    assert {path.parent.name for path in before if after[path][0] != before[path][0]} == {"no_sub"}
    np.save(folder / "axion" / "99.npy", np.eye(64))
    run_script("evaluate/evaluate_fld.py", *flags, "--num_ode_steps", 3)
    assert not (folder / "axion" / "99.npy").exists()
    assert (folder / "axion" / "0.npy").read_bytes() != before[folder / "axion" / "0.npy"][1]


def foreign_folder(lens_data, folder):
    """Images that something else made: every real one, as float64 of another range, with names of their own."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for i in range(6):
            np.save(folder / name / f"other_{i}.npy", 7 * np.load(lens_data / name / f"{i}.npy").astype(float) - 3)
    return folder


def test_a_folder_of_somebody_elses_images_is_scored_and_not_touched(flags, lens_data, tmp_path, capsys):
    folder = foreign_folder(lens_data, tmp_path / "others")
    flags += ["--generated_dir", folder, "--checkpoint_path", "nowhere.pt", "--report_dir", tmp_path / "report"]
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*")}
    run_script("evaluate/evaluate_fld.py", *flags)
    assert "which were not made here: nothing is generated" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/*")} == before
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["source"] == {"folder": str(folder)}


def test_the_report_holds_every_figure_beside_its_floor(flags, lens_data, tmp_path):
    folder = foreign_folder(lens_data, tmp_path / "others")
    run_script("evaluate/evaluate_fld.py", *flags, "--compare_path", folder)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    promised = [
        "frechet_lens",
        "kid_lens",
        "precision",
        "recall",
        "density",
        "coverage",
        "fld",
        "fld_gap",
        "copy_share",
    ]
    promised += ["two_sample_accuracy", "class_accuracy", "lens_residual", "ring_radius", "ring_width", "power_16_32"]
    for figures in (report["figures"], report["compared"][0]["figures"]):
        for name in promised:
            for part in ("overall", *CLASSES):
                figure = figures[name][part]
                assert all(isinstance(figure[key], float) for key in ("value", "floor", "floor_std")), (name, part)
        assert figures["fid_inception"]["axion"] == {"value": None, "value_std": None, "floor": None, "floor_std": None}
    assert report["figures"] != report["compared"][0]["figures"]
    low, high = report["figures"]["class_accuracy"]["cdm"]["interval"]
    assert low <= report["figures"]["class_accuracy"]["cdm"]["value"] <= high
    assert "standard_error" in report["figures"]["kid_lens"]["overall"]
    assert report["counts"]["per_class"] == 3
    assert report["settings"]["NUM_SPLITS"] == 2
    assert report["source"]["sha256"] == hashlib.sha256(Path(report["source"]["checkpoint"]).read_bytes()).hexdigest()
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<img") == page.count("data:image/png;base64,") >= 10
    assert not re.search(r"(src|href)=.https?:", page)
    for text in (*(title for name, title in TITLES.items() if name != "fid_inception"), "generated_npy", "others"):
        assert html.escape(text) in page or text in page


def test_measurements_of_real_images_are_kept_until_something_changes(data_copy, classifier, monkeypatch):
    measured = []
    monkeypatch.setattr(measure, "measure", lambda *args: measured.append(1) or real_measure(*args))
    network = load_classifier(classifier)

    def again(network=network):
        measured.clear()
        dataset = NpyDataset(data_copy, None, "test")
        measure.measure_cached("test", dataset, torch.arange(4), network, None, 128)
        return bool(measured)

    assert [again(), again()] == [True, False]
    np.save(next((data_copy / "cdm").glob("*.npy")), np.eye(64))
    assert [again(), again()] == [True, False]
    with torch.no_grad():
        network.fc.bias += 1
    assert [again(), again()] == [True, False]
    next(data_copy.glob(".lens_measured_test_*")).write_bytes(b"half of it")
    assert [again(), again()] == [True, False]
    assert len(list(data_copy.glob(".lens_measured_test_*"))) == 1


@pytest.fixture
def inception_weights(tmp_path, monkeypatch):
    """A file with (random) weights of torch-fidelity's Inception network."""
    with monkeypatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, state: None)
        weights = NoTrainInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    torch.save(weights, tmp_path / "inception.pth")
    return tmp_path / "inception.pth"


def test_inception_weights_from_a_file_give_the_usual_fid(flags, inception_weights, capsys):
    run_script(
        "evaluate/evaluate_fld.py", *flags, "--inception_weights_path", inception_weights, "--images_per_class", 3
    )
    out = capsys.readouterr().out
    assert re.search(r"^FID, Inception\s+[\d.]+", out, re.M)
    assert "(Inception)" in out


class Bomb:
    def __reduce__(self):
        return (open, ("bombed", "w"))


@pytest.mark.parametrize("content", ["bomb", "text", None])
def test_a_bad_inception_file_is_one_line_and_runs_nothing(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "inception.pth"
    if content:
        torch.save(Bomb() if content == "bomb" else "text", path)
    monkeypatch.setattr(evaluate_fld, "INCEPTION_WEIGHTS_PATH", str(path))
    with pytest.raises(InputError, match="no file with weights of that network"):
        evaluate_fld.load_inception(torch.device("cpu"))
    assert not (tmp_path / "bombed").exists()


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (["--num_splits", 1], "--num_splits must be 2 or more"),
        (["--images_per_class", 2], "--images_per_class below 3"),
        (["--report_dir", "/proc/report"], "/proc/report: "),
        (["--compare_path", "nowhere.pt"], "nowhere.pt: cannot be read"),
        (["--real_dir", "nowhere"], "nowhere: no folder axion"),
        (["--generated_dir", __file__], f"{__file__}: not a folder"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(flags, capsys, wrong, complaint):
    with pytest.raises(SystemExit) as stopped:
        run_script("evaluate/evaluate_fld.py", *flags, *wrong)
    assert stopped.value.code == 1
    assert complaint in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_missing_checkpoint_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_script("evaluate/evaluate_fld.py", *flags, "--checkpoint_path", "nowhere.pt")
    assert stopped.value.code == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("nowhere.pt: cannot be read")


def test_a_file_is_classified_with_the_published_lines(lens_data, classifier, capsys):
    run_script("evaluate/evaluate_classify.py", "--npy_path", lens_data / "axion" / "0.npy", "--model_path", classifier)
    assert re.fullmatch(
        r"Predicted Class: '(axion' \(Index: 0|cdm' \(Index: 1|no_sub' \(Index: 2)\)\nConfidence: [01]\.\d{4}\n",
        capsys.readouterr().out,
    )


def test_a_folder_is_classified_with_a_table_and_the_accuracy_of_each_class(lens_data, classifier, tmp_path, capsys):
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for i in range(3):
            shutil.copy(lens_data / name / f"{i}.npy", tmp_path / name)
    (tmp_path / "axion" / "._0.npy").write_bytes(b"what a Mac writes beside a file")
    assert len(NpyDataset(tmp_path)) == 9
    assert list(tmp_path.glob(".lens_cache_*.npy"))
    run_script("evaluate/evaluate_classify.py", "--npy_path", tmp_path, "--model_path", classifier)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 9 + 3
    for name, line in zip(CLASSES, lines[10:], strict=True):
        right = sum(row.split()[1] == name for row in lines[1:10] if row.startswith(name))
        assert line == f"Accuracy on {name}: {right / 3:.2%} of 3"


def test_bad_files_to_classify_are_named(tmp_path, classifier, capsys):
    (tmp_path / "a.npy").write_bytes(b"")
    for path, complaint in [(tmp_path, "a.npy: is empty"), (tmp_path / "b.npy", "b.npy: cannot be read")]:
        with pytest.raises(SystemExit) as stopped:
            run_script("evaluate/evaluate_classify.py", "--npy_path", path, "--model_path", classifier)
        assert stopped.value.code == 1
        assert complaint in capsys.readouterr().err
