"""Generation is reproducible and in range; distances are right where they are known; nothing missing causes a crash."""

import errno
import hashlib
import html
import io
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

import files
from dataset import NpyDataset
from evaluate.evaluate_fld import generate_image, load_model
from metrics import measure, report, score, verdict
from metrics.inception import load_inception
from metrics.measure import measure as real_measure
from models import flow, generated_folder
from models.checkpoint import load_checkpoint, save_checkpoint
from models.classifier import build_classifier, load_classifier
from models.generator import Generator, build_untrained
from settings import InputError
from simulate.instrument import observer_of
from simulate.recipes import MODEL_II

CLASSES = MODEL_II.classes


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
    for name in ("sampler", "network", "classes", "image_shape"):  # older and published checkpoints have none
        del content[name]
    content["model_config"] |= {"prediction": content.pop("prediction")}
    save_checkpoint(tmp_path / "published.pt", **content)
    assert load_model(tmp_path / "published.pt", "cpu").sampler == flow.Sampler(50, 5.0, "euler", "uniform")
    save_checkpoint(tmp_path / "wrong.pt", **content, sampler={"steps": 10**9})
    with pytest.raises(InputError, match="its configuration is not that of a generator"):
        load_model(tmp_path / "wrong.pt", "cpu")


def test_a_class_that_is_none_is_named(model):
    for wrong in (3, -1, "CDM", "", 1.0, True, None, np.array([1]), [1]):
        with pytest.raises(InputError, match=r"target_class .* is not one of 0 to 2: axion, cdm, no_sub"):
            generate_image(model, wrong)


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        *(("num_samples", value) for value in (0, -1, 1.5, "2", None, True)),
        *(("seed", value) for value in (-1, 0.5, "0", None, np.array([1, 2]))),
        *(("ode_steps", value) for value in (0, 1.0, "2", 10**6, np.array([2]))),
        *(("cfg_scale", value) for value in (-1, "5", float("nan"), float("inf"), 1e30, True)),
    ],
)
def test_an_argument_that_cannot_be_is_named(model, argument, wrong):
    with pytest.raises(InputError, match=f"{argument}: .* is not a"):
        generate_image(model, 1, **{argument: wrong})


def test_names_and_numbers_of_numpy_are_arguments_too(model):
    expected = generate_image(model, 1, 2, 1.5, 2, 7)
    for label in ("cdm", np.int64(1), torch.tensor(1)):
        numbers = {
            "ode_steps": np.int64(2),
            "cfg_scale": np.float32(1.5),
            "num_samples": np.int32(2),
            "seed": np.uint8(7),
        }
        torch.testing.assert_close(generate_image(model, label, **numbers), expected)


def test_evaluate_is_ours_where_another_package_has_the_name(tmp_path):
    package = tmp_path / "site" / "evaluate"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the other evaluate')")
    code = "from evaluate.evaluate_fld import load_model, generate_image; print('ours')"
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "ours\n", done.stderr


NAMESAKES = ("settings", "dataset", "distributed", "files", "plots", "models", "simulate", "train", "metrics")


def test_an_evaluate_of_others_makes_way(tmp_path):
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "__init__.py").write_text("ours = False")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import evaluate; sys.path.append({str(ROOT)!r}); "
        "import nanodit_path; from evaluate import evaluate_fld; print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.parametrize(
    ("code", "imported"),
    [
        ("from evaluate.evaluate_fld import load_model, generate_image", True),
        ("from models.model import NanoDiT", False),
        ("import plots, distributed", False),
        ("from train.run import Run", True),
        ("from simulate.renderer import render_row", False),
    ],
)
def test_modules_of_others_with_our_names_do_not_matter(tmp_path, code, imported):
    """In a notebook: somebody's project comes first on the path, or was even imported already."""
    first = code.split()[1].split(".")[0].rstrip(",")
    for name in NAMESAKES:
        if name != first or imported:
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("ours = False")
    theirs = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; "
    if imported:
        theirs += (
            f"import settings, models, dataset; sys.path.remove({str(tmp_path)!r}); sys.modules.pop({first!r}, None); "
        )
    code = f"{theirs}sys.path.append({str(ROOT)!r}); {code}; print('fine')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path.parent, capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr
    if imported:
        assert "from now on these names import what is in" in done.stderr


HEAVY = (
    "lenstronomy",
    "astropy",
    "torchmetrics",
    "torch_fidelity",
    "torchvision",
    "scipy",
    "matplotlib",
    "ema_pytorch",
)


def test_to_draw_a_lens_imports_nothing_that_only_scoring_takes():
    code = "import sys; from evaluate.evaluate_fld import load_model, generate_image; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {module.split(".")[0] for module in done.stdout.split()} & set(HEAVY)


# The scripts


@pytest.fixture
def pictures():
    """Pictures take most of the time of an evaluation: only tests that ask for this have them drawn."""


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(report, "write_lenses", lambda *args: None)
        monkeypatch.setattr(report, "write_html", lambda *args: None)


@pytest.fixture
def flags(lens_data, checkpoint, classifier, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    return [
        *("--data_dir", lens_data, "--checkpoint_path", checkpoint, "--classifier_path", classifier),
        *("--output_dir", tmp_path / "generated_npy", "--figure_path", tmp_path / "lenses.png"),
        *("--report_dir", tmp_path / "report", "--num_ode_steps", 2, "--cfg_scale", 1, "--device", "cpu"),
        *("--num_splits", 2),
    ]


def no_network(*args, **kwargs):
    raise OSError("no route to host")


def test_without_inception_weights_and_network_the_rest_is_computed(flags, pictures, tmp_path, monkeypatch, capsys):
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
    run_script("evaluate/evaluate_fld.py", *flags, "--num_ode_steps", 3)
    assert not set(map(Path.read_bytes, folder.glob("*/*.npy"))) & {content for _, content in before.values()}
    kept = {path.read_bytes() for path in (folder / "earlier_1").glob("*/*.npy")}
    assert kept == {content for _, content in before.values()}
    same_elsewhere = shutil.copy(flags[3], tmp_path / "copy.pt")  # makes the same images
    run_script("evaluate/evaluate_fld.py", *flags, "--num_ode_steps", 3, "--checkpoint_path", same_elsewhere)
    assert not (folder / "earlier_2").exists()
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert checked.stdout.count(": OK\n") == 9, checked


@pytest.fixture
def scored_files(monkeypatch):
    """Names of the images that each call of Reference.score has scored."""
    found = []

    def score_and_note(self, name, dataset, splits, seed, original=score.Reference.score):
        sample = original(self, name, dataset, splits, seed)
        found.append({dataset.files[i] for i in sample.index.tolist()})
        return sample

    monkeypatch.setattr(score.Reference, "score", score_and_note)
    return found


def test_exactly_the_images_asked_for_are_scored(flags, model, tmp_path, scored_files):
    """Twelve are there, three are asked for; by name, 10 and 11 would come before 2."""
    folder = tmp_path / "generated_npy"
    run_script("evaluate/evaluate_fld.py", *flags)
    source = json.loads((folder / "generated_by.json").read_text())
    generated_folder.generate_to_folder(model, folder, 12, source, batch_size=128)
    files.release()
    run_script("evaluate/evaluate_fld.py", *flags)
    run_script("evaluate/evaluate_fld.py", *flags, "--generated_dir", folder)
    assert scored_files == [{f"{name}/{i}.npy" for name in CLASSES for i in range(3)}] * 3


@pytest.mark.parametrize("change", ["edited", "exchanged", "more than were made", "other settings"])
def test_an_image_that_was_changed_is_named_and_never_written_to(flags, tmp_path, capsys, change):
    folder = tmp_path / "generated_npy"
    run_script("evaluate/evaluate_fld.py", *flags)
    path = folder / "cdm" / ("77.npy" if change == "more than were made" else "1.npy")
    if change == "exchanged":
        shutil.copy(folder / "cdm" / "0.npy", path)
    else:
        np.save(path, np.random.default_rng(0).random((64, 64)))
    before = path.read_bytes()
    more = ["--seed", 5] if change == "other settings" else []
    with pytest.raises(SystemExit) as stopped:
        run_script("evaluate/evaluate_fld.py", *flags, *more)
    assert stopped.value.code == 1
    assert f"not as written here: cdm/{path.name}. Move them away" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert len(list(folder.glob("*/*.npy"))) == 9 + (change == "more than were made")


def test_a_damaged_note_of_how_images_were_made_is_one_line(flags, tmp_path, capsys):
    folder = tmp_path / "generated_npy"
    run_script("evaluate/evaluate_fld.py", *flags)
    source = json.loads((folder / "generated_by.json").read_text())
    scalings = [json.dumps(source | {"scaling": scaling}).encode() for scaling in (None, {"x": 1})]
    for content in (b"{", b"\xff\xfe", *scalings):
        (folder / "generated_by.json").write_bytes(content)
        for other in ([], ["--generated_dir", folder]):
            with pytest.raises(SystemExit):
                run_script("evaluate/evaluate_fld.py", *flags, *other)
            assert "generated_by.json is damaged: remove that file" in capsys.readouterr().err.strip().splitlines()[-1]
    for content in (b'["stylegan"]', b'{"model": "StyleGAN3"}'):  # somebody else has such a file too
        (folder / "generated_by.json").write_bytes(content)
        assert generated_folder.source_of(folder) is None
        with pytest.raises(SystemExit):
            run_script("evaluate/evaluate_fld.py", *flags)
        assert "was not made here" in capsys.readouterr().err


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
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}
    run_script("evaluate/evaluate_fld.py", *flags)
    out = capsys.readouterr().out
    assert f"Scoring the images of {folder}: nothing is generated" in out
    assert re.search(r"^images +6 +6 +6$", out, re.M)
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))} == before
    assert not (tmp_path / "generated_npy").exists()
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["source"] == {"folder": str(folder)}


def flat_arrays(folder):
    for i in range(5):
        np.save(folder / f"{i}.npy", np.eye(64))


FOLDERS = {
    "misspelt": (lambda folder: folder.rmdir(), "does not exist"),
    "empty": (lambda folder: None, "is empty"),
    "flat .npy": (flat_arrays, "holds 5 .npy files"),
    "one .npz": (lambda folder: np.savez(folder / "all.npz", np.zeros((9, 64, 64))), "holds 1 .npz file"),
    "pictures": (lambda folder: [(folder / f"{i}.png").write_bytes(b"x") for i in (1, 2)], "holds 2 .png files"),
    "pictures of classes": (
        lambda folder: ((folder / "axion").mkdir(), (folder / "axion" / "0.png").touch()),
        "holds axion/",
    ),
    "hidden files": (lambda folder: (folder / ".DS_Store").touch(), "is empty"),
}


@pytest.mark.parametrize(
    ("kind", "how"),
    [*((kind, "--generated_dir") for kind in FOLDERS), ("empty", "--compare_path"), ("flat .npy", "--compare_path")],
)
def test_a_folder_with_nothing_to_score_is_named_and_not_filled(flags, tmp_path, capsys, kind, how):
    fill, found = FOLDERS[kind]
    folder = tmp_path / "theirs"
    folder.mkdir()
    fill(folder)
    before = sorted(folder.rglob("*")) if folder.exists() else None
    with pytest.raises(SystemExit) as stopped:
        run_script("evaluate/evaluate_fld.py", *flags, how, folder)
    assert stopped.value.code == 2
    assert re.search(rf"{folder}: nothing to score: .*; it {found}", capsys.readouterr().err.strip().splitlines()[-1])
    assert (sorted(folder.rglob("*")) if folder.exists() else None) == before
    assert not list(tmp_path.glob("generated_npy*/*/*"))


@pytest.mark.parametrize("what", ["their images", "a thesis"])
def test_images_are_never_generated_into_somebody_elses_folder(flags, lens_data, tmp_path, capsys, what):
    folder = tmp_path / "mine"
    if what == "a thesis":
        folder.mkdir()
        (folder / "thesis.tex").touch()
    else:
        foreign_folder(lens_data, folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit):
        run_script("evaluate/evaluate_fld.py", *flags, "--output_dir", folder)
    assert f"{folder} was not made here, so nothing is written to it: it holds" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_images_that_are_scored_and_those_they_are_scored_against_are_chosen_at_random(
    flags, lens_data, tmp_path, scored_files
):
    folder = foreign_folder(lens_data, tmp_path / "others")
    for seed in (1, 2):
        run_script("evaluate/evaluate_fld.py", *flags, "--generated_dir", folder, "--seed", seed)
    first, second = scored_files
    assert len(first) == len(second) == 9
    assert first != second
    assert first != {f"{name}/other_{i}.npy" for name in CLASSES for i in range(3)}


def test_what_two_generators_have_in_common_is_scored(flags, lens_data, tmp_path, scored_files):
    """A folder has fewer images than asked for: of the other generator, as many are scored, and no more are made."""
    folder = foreign_folder(lens_data, tmp_path / "others")
    run_script("evaluate/evaluate_fld.py", *flags, "--compare_path", folder)
    assert [len(names) for names in scored_files] == [9, 9]
    assert len(list((tmp_path / "generated_npy").glob("*/*.npy"))) == 9
    made = tmp_path / "generated_npy"
    run_script("evaluate/evaluate_fld.py", *flags, "--generated_dir", folder, "--compare_path", made)
    assert scored_files[3] == {f"{name}/{i}.npy" for name in CLASSES for i in range(3)}


def test_a_folder_that_is_called_real_is_not_taken_for_the_reference(flags, lens_data, tmp_path):
    folder = foreign_folder(lens_data, tmp_path / "real")
    run_script("evaluate/evaluate_fld.py", *flags, "--generated_dir", folder)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert list(report["lens_fit"]) == list(report["confusion"]) == ["real", str(folder)]


def test_images_without_an_instrument_are_beside_those_with_one_only(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_script("evaluate/evaluate_fld.py", *flags, "--beside", "true")
    assert stopped.value.code == 2
    assert "name it, as INSTRUMENT" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--report_dir", "--figure_path"])
def test_nothing_is_written_into_the_folder_that_is_scored(flags, lens_data, tmp_path, capsys, flag):
    folder = foreign_folder(lens_data, tmp_path / "others")
    inside = folder / ("lenses.png" if flag == "--figure_path" else "report")
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        run_script("evaluate/evaluate_fld.py", *flags, "--generated_dir", folder, flag, inside)
    assert stopped.value.code == 2
    assert f"{folder} is only to be scored" in capsys.readouterr().err
    assert [path for path in sorted(folder.rglob("*")) if not path.is_dir()] == [p for p in before if not p.is_dir()]


def test_a_second_generator_is_checked_before_the_first_one_works(flags, tmp_path, capsys):
    (tmp_path / "generated_npy_compared").mkdir()
    (tmp_path / "generated_npy_compared" / "thesis.tex").touch()
    for other in ("nowhere.pt", flags[3]):
        with pytest.raises(SystemExit):
            run_script("evaluate/evaluate_fld.py", *flags, "--compare_path", other)
        assert "nowhere.pt: cannot be read" in (error := capsys.readouterr().err) or "was not made here" in error
    assert not list((tmp_path / "generated_npy").glob("*/*.npy"))


def test_a_folder_that_is_still_being_written_to_is_not_scored(flags, lens_data, tmp_path, capsys):
    folder = foreign_folder(lens_data, tmp_path / "others")
    code = "import files, sys; files.hold(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(folder)]
    holder = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(SystemExit):
        run_script("evaluate/evaluate_fld.py", *flags, "--generated_dir", folder)
    holder.communicate()
    assert f"{folder} is in use; it belongs to process {holder.pid}" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", "cuda:0", None])
def test_a_device_that_is_none_is_named(checkpoint, monkeypatch, device):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match=r"is none: auto, cpu|no cuda:0 device on this machine"):
        load_model(checkpoint, device)
    assert load_model(checkpoint, torch.device("cpu"))


def test_a_path_is_no_model(checkpoint):
    with pytest.raises(InputError, match="is none: load_model gives one"):
        generate_image(checkpoint, "cdm")


def test_generated_images_that_are_bad_can_be_skipped(flags, model, tmp_path, monkeypatch, scored_files, capsys):
    """The generator draws blank images now and then."""

    def draws_nothing(self, labels, *args, original=Generator.generate):
        images = original(self, labels, *args).clone()
        images[0] = 0
        return images

    monkeypatch.setattr(Generator, "generate", draws_nothing)
    with pytest.raises(SystemExit):
        run_script("evaluate/evaluate_fld.py", *flags)
    assert "cdm/0.npy: is blank" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_script("evaluate/evaluate_fld.py", *flags, "--on_bad_file", "skip")
    assert "fewer than 3 sound images of a class to score" in capsys.readouterr().err


def test_a_full_disk_while_generating_names_the_file(tmp_path, monkeypatch):
    def full(path, mode="r", **kwargs):
        return FullDisk(io.BytesIO()) if "b" in mode and "w" in mode else open(path, mode, **kwargs)

    class FullDisk(io.BufferedWriter):
        def write(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "open", full, raising=False)
    with pytest.raises(OSError, match="No space left") as raised:
        files.save_array(tmp_path / "0.npy", np.eye(64))
    assert raised.value.filename == str(tmp_path / "0.npy")


def test_the_report_holds_every_metric_beside_its_floor(flags, pictures, lens_data, tmp_path, capsys):
    folder = foreign_folder(lens_data, tmp_path / "others")
    run_script("evaluate/evaluate_fld.py", *flags, "--compare_path", folder)
    found = json.loads((tmp_path / "report" / "report.json").read_text())
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
    for of_sample in (found["metrics"], found["compared"][0]["metrics"]):
        for name in promised:
            for subset in ("overall", *CLASSES):
                metric = of_sample[name][subset]
                assert all(isinstance(metric[key], float) for key in ("value", "floor", "floor_std")), (name, subset)
        assert of_sample["fid_inception"]["axion"] == dict.fromkeys(("value", "value_std", "floor", "floor_std"))
    assert found["metrics"] != found["compared"][0]["metrics"]
    low, high = found["metrics"]["class_accuracy"]["cdm"]["interval"]
    assert low <= found["metrics"]["class_accuracy"]["cdm"]["value"] <= high
    assert "standard_error" in found["metrics"]["kid_lens"]["overall"]
    assert found["counts"]["per_class"] == 3
    assert found["settings"]["NUM_SPLITS"] == 2
    assert found["source"]["sha256"] == hashlib.sha256(Path(found["source"]["checkpoint"]).read_bytes()).hexdigest()
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<img") == page.count("data:image/png;base64,") >= 10
    assert not re.search(r"(src|href)=.https?:", page)
    titles = score.titles_of(NpyDataset(lens_data))
    absent = {"fid_inception", "gain_30", "gain_100", "gain_300", "pqmass"}  # not for so few images
    for text in (*(title for name, title in titles.items() if name not in absent), "generated_npy", "others"):
        assert html.escape(text) in page or text in page
    # It opens with the verdict; all metrics and the settings fold open
    headings = re.findall(r"<h2>([^<]*)|<summary>([^<]*)", page)
    assert [a or b for a, b in headings][:4] == ["Verdict: generated_npy", "Verdict: others", "All metrics", "Images"]
    assert list(found["verdict"]) == [
        *("frechet_lens", "two_sample_accuracy", "class_accuracy", "copy_share"),
        "lens_residual",
    ]
    words = re.findall(r"<b>(at the floor|near|off)</b>", page)
    assert len(words) == 2 * 5 * 4
    assert words[:4] == list(found["verdict"]["frechet_lens"].values())
    assert verdict.RULE in page
    said = re.findall(r"^Of the five metrics that decide, .*$", capsys.readouterr().out, re.M)
    assert len(said) == 2
    assert all(html.escape(text) in page for text in said)


def test_other_classes_and_channels_are_evaluated_with_no_edit(tmp_path, monkeypatch, capsys):
    """Four classes, 32 pixels in three channels: everything is read from the folder and the checkpoints."""
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    classes, shape = ("axion", "cdm", "no_sub", "wdm"), (3, 32, 32)
    random = np.random.default_rng(0)
    for name in classes:
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(60):
            np.save(tmp_path / "data" / name / f"{i}.npy", random.random(shape))
    torch.manual_seed(0)
    small = {"hidden_size": 32, "depth": 1, "num_heads": 2, "prediction": "velocity"}  # untrained, it gives noise
    generator = build_untrained("NanoDiT-S/16", classes, shape, **small)
    content = generator.description() | {"sampler": asdict(flow.Sampler(2, 1.0))}
    save_checkpoint(tmp_path / "g.pt", model_state_dict=generator.network.state_dict(), **content)
    classifier = build_classifier(32, classes, 3)
    content = {"image_size": 32, "classes": list(classes), "channels": 3}
    save_checkpoint(tmp_path / "c.pt", model_state_dict=classifier.state_dict(), **content)
    flags = ["--data_dir", tmp_path / "data", "--checkpoint_path", tmp_path / "g.pt", "--report_dir", tmp_path / "r"]
    flags += ["--classifier_path", tmp_path / "c.pt", "--output_dir", tmp_path / "out", "--num_splits", 2]
    flags += ["--figure_path", tmp_path / "lenses.png", "--device", "cpu", "--images_per_class", 3]
    run_script("evaluate/evaluate_fld.py", *flags)
    out = capsys.readouterr().out
    assert re.search(r"^3 images a class +overall +axion +cdm +no_sub +wdm$", out, re.M)
    assert "Ring radius, W1 in pixels" in out
    assert "lens equation" not in out
    found = json.loads((tmp_path / "r" / "report.json").read_text())
    assert found["metrics"]["lens_residual"]["wdm"]["value"] is None
    assert np.array(found["confusion"]["real"]).shape == (4, 4)
    assert list(found["verdict"])[-1] == "power_8_16"
    assert np.load(tmp_path / "out" / "wdm" / "0.npy").shape == shape
    shutil.rmtree(tmp_path / "data" / "wdm")  # so that networks and data do not go together
    with pytest.raises(SystemExit) as stopped:
        run_script("evaluate/evaluate_fld.py", *flags)
    assert stopped.value.code == 2
    complaint = f"is of the classes axion, cdm, no_sub, wdm, but {tmp_path / 'data'} of the classes axion, cdm, no_sub"
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("size", [64, 32])
def test_a_folder_of_other_classes_or_sizes_than_the_checkpoint_is_refused(flags, data_copy, tmp_path, capsys, size):
    if size == 64:
        shutil.copytree(data_copy / "cdm", data_copy / "wdm")
    else:
        for path in data_copy.glob("*/*.npy"):
            np.save(path, np.load(path)[::2, ::2])
    with pytest.raises(SystemExit) as stopped:
        run_script("evaluate/evaluate_fld.py", *flags, "--data_dir", data_copy)
    assert stopped.value.code == 2
    of = f"of the classes {', '.join((*CLASSES, 'wdm'))}" if size == 64 else "of images of 32x32 pixels in 1 channel(s)"
    advice = "train/train_classifier.py makes one of these" if size == 64 else "they do not go together"
    assert f"{data_copy} {of}: {advice}" in capsys.readouterr().err
    assert not (tmp_path / "generated_npy").exists()


def test_measurements_of_real_images_are_kept_until_something_changes(data_copy, classifier, monkeypatch):
    measured = []
    monkeypatch.setattr(measure, "measure", lambda *args: measured.append(1) or real_measure(*args))
    network = load_classifier(classifier)

    def again(observer=None):
        measured.clear()
        dataset = NpyDataset(data_copy, None, "test").observed(observer)
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
    observer = observer_of(NpyDataset(data_copy, None, "test"), "euclid")
    assert [again(observer), again(), again(observer)] == [True, False, False]


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
    with pytest.raises(InputError, match="no file with weights of that network"):
        load_inception(str(path), torch.device("cpu"))
    assert not (tmp_path / "bombed").exists()


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (["--images_per_class", 2], "--images_per_class below 3"),
        (["--report_dir", "/proc/report"], "/proc/report: "),
        (["--compare_path", "nowhere.pt"], "nowhere.pt: cannot be read"),
        (["--real_dir", "nowhere"], "nowhere: no class folders with .npy, .npz or FITS files"),
        (["--output_dir", __file__], f"{__file__}: Not a directory"),
        (["--figure_path", "lenses.docx"], "lenses.docx: its name must end in one of"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(flags, capsys, wrong, complaint):
    with pytest.raises(SystemExit) as stopped:
        run_script("evaluate/evaluate_fld.py", *flags, *wrong)
    assert stopped.value.code == (2 if "--real_dir" in wrong else 1)
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


def test_the_class_of_a_file_is_the_name_of_the_folder_around_it(lens_data, classifier, tmp_path, capsys):
    for name in ("axion/1.npy", "axion/night 2/2.npy", "cdm/no_sub/3.npy", "4.npy"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(lens_data / "cdm" / "0.npy", tmp_path / name)
    for folder, counts in ((tmp_path, {"axion": 2, "no_sub": 1}), (tmp_path / "axion", {"axion": 2})):
        run_script("evaluate/evaluate_classify.py", "--npy_path", folder, "--model_path", classifier)
        lines = capsys.readouterr().out.splitlines()
        found = [re.fullmatch(r"Accuracy on (\w+): .*% of (\d+)", line) for line in lines]
        assert {match[1]: int(match[2]) for match in found if match} == counts


def test_a_reader_that_has_seen_enough_is_no_error(lens_data, classifier):
    command = (
        f"{sys.executable} evaluate/evaluate_classify.py --npy_path {lens_data} --model_path {classifier} | head -1"
    )
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("file")
    assert not [line for line in done.stderr.splitlines() if "ipe" in line or "Traceback" in line]


def test_a_blank_image_is_not_classified_but_named(lens_data, tmp_path, classifier, capsys):
    blank, hidden = np.zeros((64, 64)), np.load(lens_data / "cdm" / "0.npy")
    hidden[3, 3] = -999
    for name, image in (("blank", blank), ("hidden", hidden)):
        np.save(tmp_path / f"{name}.npy", image)
    shutil.copy(lens_data / "cdm" / "1.npy", tmp_path / "lens.npy")
    flags = ["--model_path", classifier, "--npy_path"]
    for name, complaint in (
        ("blank", "is blank: every pixel is 0"),
        ("hidden", "has 1 pixel from -999 to -999, which hide"),
    ):
        with pytest.raises(SystemExit):
            run_script("evaluate/evaluate_classify.py", *flags, tmp_path / f"{name}.npy")
        assert f"{name}.npy: {complaint}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_script("evaluate/evaluate_classify.py", *flags, tmp_path)
    assert capsys.readouterr().err.splitlines()[2:] == ["--on_bad_file skip goes on without them"]
    run_script("evaluate/evaluate_classify.py", *flags, tmp_path, "--on_bad_file", "skip")
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith(": skipped") for line in lines] == [True, True, False, False]
    assert lines[3].split()[0] == "lens.npy"


def test_bad_files_to_classify_are_named(tmp_path, classifier, capsys):
    (tmp_path / "a.npy").write_bytes(b"")
    for path, complaint in [(tmp_path, "a.npy: is empty"), (tmp_path / "b.npy", "b.npy: cannot be read")]:
        with pytest.raises(SystemExit) as stopped:
            run_script("evaluate/evaluate_classify.py", "--npy_path", path, "--model_path", classifier)
        assert stopped.value.code == 1
        assert complaint in capsys.readouterr().err


def test_images_of_several_sizes_are_classified_together_as_alone(classifier, tmp_path, capsys):
    random = np.random.default_rng(0)
    for i, size in enumerate((32, 64, 64, 48)):
        np.save(tmp_path / f"{i}.npy", random.random((size, size)))
    run_script("evaluate/evaluate_classify.py", "--npy_path", tmp_path, "--model_path", classifier)
    lines = capsys.readouterr().out.splitlines()[1:]
    for i, line in enumerate(lines):
        run_script("evaluate/evaluate_classify.py", "--npy_path", tmp_path / f"{i}.npy", "--model_path", classifier)
        alone = re.findall(r"'(.*)'|Confidence: (.*)", capsys.readouterr().out)
        name, confidence = line.split()[1:3]
        assert name == alone[0][0]
        assert float(confidence) == pytest.approx(float(alone[1][1]), abs=2e-4)
    assert len(lines) == 4
