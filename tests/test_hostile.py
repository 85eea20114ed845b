"""The table of bad inputs: each ends in one line that names it, and none runs code, harms a file or hangs."""

import errno
import io
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import DATA, TINY_TRAINING, run_script
from fuzz import content_of, fuzz

from dataset import NpyDataset
from models.checkpoint import load_checkpoint
from models.classifier import build_classifier, load_classifier
from models.generator import build_untrained, generate_image, load_model
from settings import InputError

CLASSES = ("axion", "cdm", "no_sub")
IMAGE = np.random.default_rng(0).random((64, 64))


class Bomb:
    """Loaded as a pickle, it writes a file."""

    def __reduce__(self):
        return (open, ("bombed", "w"))


# What takes the place of images of cdm


def npy(array, **kwargs) -> bytes:
    content = io.BytesIO()
    np.save(content, array, **kwargs)
    return content.getvalue()


def pair(*values) -> bytes:
    array = np.empty(len(values), object)
    array[:] = values
    return npy(array, allow_pickle=True)


def header(shape) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return content.getvalue()


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_device_without_end(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_broken_link(path: Path) -> None:
    path.symlink_to(path.with_name("deleted"))


def a_file_with_errors(path: Path) -> None:
    path.symlink_to("/proc/self/mem")  # reading it from its start is an I/O error


def a_large_file(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**34)


def a_pickle_of_lists_without_end() -> bytes:
    head = pair(IMAGE, 0)
    return head[:128] + b"\x80\x04" + b"]" * 2**24


FILES = [
    ("truncated header", npy(IMAGE)[:40], "damaged header"),
    ("truncated body", npy(IMAGE)[:5000], "truncated"),
    ("a header that claims 2^40 elements", header((2**20, 2**20)), "has shape"),
    ("a negative shape", header((-64, 64)), "has shape"),
    ("an empty file", b"", "is empty"),
    ("text", b"1 2 3\n", "not a .npy file"),
    ("a pickle", pickle.dumps(IMAGE), "not a .npy file"),
    ("a malicious pickle", pair(IMAGE, Bomb()), "refused: its pickle asks for"),
    ("nested objects", pair(np.array([IMAGE, None], object), 1e-23), "not real numbers|not a pair|has shape"),
    ("an object that holds itself", npy(np.array([[], []], object), allow_pickle=True), "not real|has shape"),
    ("words", npy(np.full((64, 64), "a")), "not real numbers"),
    ("complex numbers", npy(IMAGE + 1j), "complex128"),
    ("NaN", npy(np.where(IMAGE > 0.9, np.nan, IMAGE)), "NaN or Inf"),
    ("Inf", npy(np.where(IMAGE > 0.9, np.inf, IMAGE)), "NaN or Inf"),
    ("another size", npy(IMAGE[:32, :32]), r"shape \(32, 32\), not \(64, 64\)"),
    ("a movie", npy(np.stack(9 * [IMAGE])), r"shape \(9, 64, 64\), not \(64, 64\)"),
    ("a long movie", npy(np.zeros((99, 64, 48))), r"shape \(99, 64, 48\): .* 16 channels at most"),
    ("a large image", npy(np.zeros((600, 600))), r"shape \(600, 600\): an image is square, of 8 to 256 pixels"),
    ("a small image", npy(IMAGE[:7, :7]), r"shape \(7, 7\): an image is square, of 8 to 256 pixels"),
    ("a large file", a_large_file, "is larger than any image"),
    ("a pickle of 2^24 lists", a_pickle_of_lists_without_end(), "is larger than any pair"),
    ("a link to itself", a_link_to_itself, "cannot be read"),
    ("a broken link", a_broken_link, "cannot be read"),
    ("a file that fails to be read", a_file_with_errors, "cannot be read"),
    ("a pipe", a_pipe, "is not a file"),
    ("a device without end", a_device_without_end, "is not a file"),
    ("a folder", Path.mkdir, "is not a file"),
]


def put(path: Path, what) -> None:
    if isinstance(what, bytes):
        path.write_bytes(what)
    else:
        what(path)


def one_line(capsys, script, *flags) -> str:
    """The lines that a script ends with; its status must not be 0, and it must show no traceback."""
    with pytest.raises(SystemExit) as ended:
        run_script(script, *flags)
    assert ended.value.code not in (0, None)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return captured.err.replace("\r", "\n").strip().splitlines()


def state_of(folder: Path) -> dict:
    """Every file of a folder, to see that none was harmed."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".lens_" not in path.name}


@pytest.mark.parametrize("rows", [FILES[::2], FILES[1::2]], ids=["even", "odd"])
def test_all_bad_files_are_named_by_training_and_by_classification(
    rows, data_copy, classifier, tmp_path, monkeypatch, capsys
):
    """The files are tested in two halves, because training names at most 20 bad files."""
    monkeypatch.chdir(tmp_path)
    paths = [data_copy / "cdm" / f"{i}.npy" for i in range(48)][-len(rows) :]  # behind sound ones
    for path, (_, what, _) in zip(paths, rows, strict=True):
        path.unlink()
        put(path, what)
    output = tmp_path / "run"
    flags = ["--data_dir", data_copy, "--output_dir", output]
    lines = one_line(capsys, "train/train_diffusion.py", *TINY_TRAINING, *flags)[-len(rows) - 2 :]
    assert lines[0] == f"{len(rows)} bad files of 144 in {data_copy}:"
    assert lines[-1] == "remove or mend them, or go on without them: --on_bad_file skip"
    named = dict(line.strip().split(": ", 1) for line in lines[1:-1])
    assert not output.exists()

    flags = ["--model_path", classifier, "--npy_path"]
    lines = one_line(capsys, "evaluate/evaluate_classify.py", *flags, data_copy / "cdm")
    assert lines.pop() == "--on_bad_file skip goes on without them"
    classified = dict(line.split(": ", 1) for line in lines if line.startswith(str(data_copy)))
    for path, (kind, _, complaint) in zip(paths, rows, strict=True):
        assert re.search(complaint, named[str(path)]), kind
        # The classifier resizes each image, but takes no other number of channels
        expected = {"another size": "", "a movie": "has 9 channels, but .* takes 1"}.get(kind, complaint)
        assert re.search(expected, classified.get(str(path), "")), kind
        assert (str(path) in classified) == (kind != "another size")
    lines = one_line(capsys, "evaluate/evaluate_classify.py", *flags, paths[0])
    assert re.fullmatch(rf"{paths[0]}: (has a|is) {rows[0][2]}", lines[-1])
    assert not (tmp_path / "bombed").exists()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("nope", "cannot be read"),
        ("nope/axion/", "cannot be read"),
        ("notes.md", "is not a .npy file"),
        ("f.npy", "is empty"),
    ],
)
def test_what_is_no_image_is_named_by_classification(name, complaint, classifier, tmp_path, capsys):
    (tmp_path / "notes.md").write_text("notes")
    (tmp_path / "f.npy").write_text("")
    flags = ["--model_path", classifier, "--npy_path", f"{tmp_path}/{name}"]
    (line,) = one_line(capsys, "evaluate/evaluate_classify.py", *flags)
    assert line.startswith(f"{(tmp_path / name)}: {complaint}")


def test_a_folder_that_must_not_be_read_is_named(data_copy, classifier, monkeypatch, capsys):
    scandir = os.scandir

    def forbidden(path):
        if str(path).endswith("axion"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    flags = ["--model_path", classifier, "--npy_path", data_copy]
    assert one_line(capsys, "evaluate/evaluate_classify.py", *flags)[-1] == f"{data_copy}/axion: Permission denied"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_must_not_be_read_is_named(data_copy, tmp_path, capsys):
    (data_copy / "cdm" / "7.npy").chmod(0)
    assert "cannot be read" in "".join(one_line(capsys, "train/train_diffusion.py", "--data_dir", data_copy))


def test_a_file_deleted_while_reading_is_named(data_copy, monkeypatch, capsys):
    import dataset

    original = dataset.read_image

    def slow(path):
        (data_copy / "no_sub" / "47.npy").unlink(missing_ok=True)
        return original(path)

    monkeypatch.setattr(dataset, "read_image", slow)
    lines = one_line(capsys, "train/train_diffusion.py", "--data_dir", data_copy)
    assert lines[-2].endswith("no_sub/47.npy: cannot be read (No such file or directory)")


# Data folders


def an_empty_class(folder):
    for path in (folder / "axion").iterdir():
        path.unlink()


def another_ending(folder):
    for path in (folder / "axion").iterdir():
        path.rename(path.with_suffix(".png"))


def one_folder_deeper(folder):
    (folder / "axion" / "images").mkdir()
    for path in (folder / "axion").glob("*.npy"):
        path.rename(folder / "axion" / "images" / path.name)


def empty(folder):
    for path in folder.glob("*/*.npy"):
        path.unlink()


def one_image(folder):
    for path in sorted(folder.glob("*/*.npy"))[1:]:
        path.unlink()


def a_file_instead(folder):
    shutil.rmtree(folder)
    folder.write_text("")


FOLDERS = [
    ("an empty class", an_empty_class, r"axion: no \.npy, \.npz or FITS files in it: add some"),
    ("a class of another ending", another_ending, r"axion: no \.npy, \.npz or FITS files in it: add some"),
    (
        "a class one folder deeper",
        one_folder_deeper,
        r"axion: no \.npy, \.npz or FITS files in it, but in \S+/axion/images: move them",
    ),
    ("an empty folder", empty, "no .npy, .npz or FITS files in its class folders"),
    ("one image", one_image, "add images|more than the"),
    ("a file instead of a folder", a_file_instead, "is a file: name the folder that it is in"),
    ("no folder", shutil.rmtree, "no class folders with .npy, .npz or FITS files"),
]


@pytest.mark.parametrize(("change", "complaint"), [row[1:] for row in FOLDERS], ids=[row[0] for row in FOLDERS])
@pytest.mark.parametrize(
    "script", ["train/train_diffusion.py", "train/train_classifier.py", "evaluate/evaluate_fld.py"]
)
def test_a_bad_data_folder_is_named(script, change, complaint, data_copy, tmp_path, capsys):
    change(data_copy)
    flags = ["--data_dir", data_copy] + (["--output_dir", tmp_path / "run"] if "train" in script else [])
    line = one_line(capsys, script, *flags)[-1]
    assert str(data_copy) in line
    assert re.search(complaint, line)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", ["a missing class", "a class too many", "another size"])
def test_data_that_a_checkpoint_does_not_know_are_named(change, data_copy, checkpoint, classifier, tmp_path, capsys):
    """Training would simply take them as other data."""
    if change == "a missing class":
        shutil.rmtree(data_copy / "axion")
    elif change == "a class too many":
        shutil.copytree(data_copy / "cdm", data_copy / "wdm")
    else:
        for path in data_copy.glob("*/*.npy"):
            np.save(path, np.load(path)[16:48, 16:48])
    found = NpyDataset(data_copy)
    assert (found.image_shape == (1, 64, 64)) == (change != "another size")
    flags = ["--data_dir", data_copy, "--classifier_path", classifier, "--checkpoint_path", checkpoint]
    flags += ["--output_dir", tmp_path / "g", "--report_dir", tmp_path / "r", "--figure_path", tmp_path / "r" / "l.png"]
    line = one_line(capsys, "evaluate/evaluate_fld.py", *flags)[-1]
    if change == "another size":
        assert f"{checkpoint} is of images of 64x64 pixels in 1 channel(s)" in line
    else:
        assert f"{classifier} is of the classes axion, cdm, no_sub" in line
        assert f"{data_copy} of the classes {', '.join(found.classes)}" in line
    assert not (tmp_path / "g").exists()
    given = NpyDataset(data_copy, classes=CLASSES, on_missing_class="go_on")  # an extra class is ignored
    assert given.classes == CLASSES
    assert len(given) == (96 if change == "a missing class" else 144)


# Checkpoints


def archive(**content) -> bytes:
    packed = io.BytesIO()
    torch.save(content, packed)
    return packed.getvalue()


def network(**config) -> dict:
    return content_of(CLASSES, (1, 64, 64), **config)


def compressed(content: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, bytes(2**22) if "/data/" in name else source.read(name))
    return packed.getvalue()


def with_config(**changes) -> bytes:
    content = network()
    return archive(**content | {"model_config": content["model_config"] | changes})


def of_classes(*names) -> bytes:
    return archive(**network() | {"classes": list(names)})


def older(**changes) -> bytes:
    """A checkpoint of an older version, which did not say what its data was."""
    content = network()
    config = content["model_config"] | {"prediction": "image"} | changes
    return archive(model_state_dict=content["model_state_dict"], model_config=config)


def components(**changes) -> bytes:
    generator = build_untrained("ComponentMLP-512", CLASSES, (1, 16, 16), hidden_size=16, depth=1, components=64)
    content = {"model_state_dict": generator.network.state_dict(), "codec_state_dict": generator.codec.state_dict()}
    return archive(**content | {"sampler": {}} | generator.description() | changes)


CHECKPOINTS = [
    ("a truncated checkpoint", lambda: archive(**network())[:9000], "not a checkpoint"),
    ("an empty file", lambda: b"", "not a checkpoint"),
    ("a text file", lambda: b"weights\n", "not a checkpoint"),
    ("a pickle bomb", lambda: pickle.dumps(Bomb()), "not a checkpoint"),
    ("a bomb inside", lambda: archive(**network(), epoch=Bomb()), "asks to run code: refused"),
    (
        "an archive that unpacks to a hundred times its size",
        lambda: compressed(archive(**network())),
        "unpacks to more",
    ),
    ("a view of 2^40 numbers", lambda: archive(model_state_dict={"w": torch.zeros(1).expand(2**40)}), "larger than"),
    ("no weights", lambda: archive(epoch=3), "no 'model_state_dict'"),
    ("weights that are none", lambda: archive(model_state_dict=[1]), "no 'model_state_dict'"),
    ("weights of words", lambda: archive(model_state_dict={"a": "b"}), "not that of a generator|another network"),
    (
        "another architecture",
        lambda: archive(**network(hidden_size=32) | {"model_config": network()["model_config"]}),
        "another network",
    ),
    ("another number of classes", lambda: with_config(num_classes=5), "not that of a generator"),
    ("an older one of another number of classes", lambda: older(num_classes=5), "not that of a generator"),
    ("10^9 blocks", lambda: with_config(depth=10**9), "not that of a generator"),
    ("a width of 10^9", lambda: with_config(hidden_size=10**9), "another network|not that of a generator"),
    ("a setting that is none", lambda: with_config(run="rm"), "not that of a generator"),
    ("a patch of 0", lambda: with_config(patch_size=0), "not that of a generator"),
    ("an unknown network", lambda: archive(**network() | {"network": "os.system"}), "not that of a generator"),
    ("an unknown prediction", lambda: archive(**network() | {"prediction": "rm"}), "not that of a generator"),
    ("no sampler", lambda: archive(**network() | {"sampler": None}), "not that of a generator"),
    ("10^9 steps", lambda: archive(**network() | {"sampler": {"steps": 10**9}}), "not that of a generator"),
    ("an unknown solver", lambda: archive(**network() | {"sampler": {"solver": "rm"}}), "not that of a generator"),
    ("a number as classes", lambda: archive(**network() | {"classes": 3}), "not that of a generator"),
    ("numbers as classes", lambda: of_classes(1, 2, 3), "not that of a generator"),
    ("the same class twice", lambda: of_classes("a", "b", "a"), "not that of a generator"),
    ("a class in another folder", lambda: of_classes("a", "../b", "c"), "not that of a generator"),
    ("a class in a folder of the system", lambda: of_classes("a", "/etc", "c"), "not that of a generator"),
    ("a class that is the folder", lambda: of_classes("a", ".", "c"), "not that of a generator"),
    ("a class with an end in its name", lambda: of_classes("a", "b\0", "c"), "not that of a generator"),
    ("images of 2^40 pixels", lambda: archive(**network() | {"image_shape": [1, 2**20, 2**20]}), "not that of a gen"),
    ("images of words", lambda: archive(**network() | {"image_shape": "1x64x64"}), "not that of a generator"),
    ("components of 2^40 pixels", lambda: components(image_shape=[1, 2**20, 2**20]), "another network|not that of a"),
    ("components of a negative size", lambda: components(image_shape=[1, -16, -16]), "not that of a generator"),
    ("components of a strip", lambda: components(image_shape=[1, 2, 128]), "not that of a generator"),
    ("components without a codec", lambda: components(codec_state_dict={}), "another network"),
    ("components that are none", lambda: components(codec_state_dict=None), "not that of a generator"),
    (
        "a checkpoint of the classifier",
        lambda: archive(
            model_state_dict=build_classifier(64, CLASSES).state_dict(), image_size=64, classes=CLASSES, channels=1
        ),
        "another network",
    ),
    ("a changed number", lambda: archive(**network(), checksum="0"), "checksum does not match"),
    (
        "safetensors under another name",
        lambda: safetensors.torch.save(network()["model_state_dict"]),
        "not a checkpoint",
    ),
]


@pytest.mark.parametrize(
    ("content", "complaint"), [row[1:] for row in CHECKPOINTS], ids=[row[0] for row in CHECKPOINTS]
)
def test_a_bad_checkpoint_is_named(content, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pt"
    path.write_bytes(content())
    with pytest.raises(InputError) as raised:
        load_model(path)
    line = str(raised.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    assert re.search(complaint, line)
    assert not (tmp_path / "bombed").exists()


@pytest.mark.parametrize(
    "content", [CHECKPOINTS[0][1], CHECKPOINTS[4][1], lambda: with_config(depth=10**9)], ids=["cut", "bomb", "config"]
)
def test_a_bad_checkpoint_harms_nothing_written(content, lens_data, classifier, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pt"
    path.write_bytes(content())
    generated = shutil.copytree(lens_data, tmp_path / "generated", ignore=shutil.ignore_patterns(".lens*", "*.fits"))
    (generated / "generated_by.json").write_text("{}")
    before = state_of(generated)
    flags = ["--data_dir", lens_data, "--classifier_path", classifier, "--checkpoint_path", path]
    flags += ["--output_dir", generated, "--report_dir", tmp_path / "r", "--figure_path", tmp_path / "r" / "l.png"]
    line = one_line(capsys, "evaluate/evaluate_fld.py", *flags)[-1]
    assert line.startswith(f"{path}: ")
    assert state_of(generated) == before
    assert not (tmp_path / "bombed").exists()


def test_the_sound_ones_of_these_checkpoints_load(tmp_path):
    """This shows that each bad one is refused for what its name says."""
    path = tmp_path / "good.pt"
    for content in (archive(**network()), with_config(), older(), components()):
        path.write_bytes(content)
        assert load_model(path, "cpu").classes == CLASSES


CLASSIFIERS = [
    ("another number of classes", {"classes": ["a", "b"]}),
    ("a number as classes", {"classes": 3}),
    ("numbers as classes", {"classes": [1, 2, 3]}),
    ("the same class twice", {"classes": ["a", "b", "a"]}),
    ("10^9 pixels", {"image_size": 10**9}),
    ("a size in words", {"image_size": "64"}),
    ("10^9 channels", {"channels": 10**9}),
    ("another number of channels", {"channels": 4}),
    ("no channels", {"channels": 0}),
    ("weights of a generator", {"model_state_dict": {"w": torch.zeros(3)}}),
]


def test_a_bad_classifier_is_named(tmp_path):
    path, weights = tmp_path / "bad.pt", build_classifier(64, CLASSES).state_dict()
    sound = {"model_state_dict": weights, "image_size": 64, "classes": list(CLASSES), "channels": 1}
    path.write_bytes(archive(**sound))
    assert load_classifier(path).classes == CLASSES
    for kind, changes in CLASSIFIERS:
        path.write_bytes(archive(**sound | changes))
        try:
            load_classifier(path)
        except InputError as error:
            assert str(error) == f"{path}: its weights are of another network", kind  # noqa: PT017
        else:
            pytest.fail(f"{kind}: loaded")


@pytest.mark.parametrize("content", [b"", b"\xff" * 8 + b"{}", b"\x02" + bytes(7) + b"{}", b"text that is none of it"])
def test_a_bad_safetensors_file_is_named(content, tmp_path, capsys):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    line = one_line(capsys, "evaluate/evaluate_classify.py", "--npy_path", "x", "--model_path", path)[-1]
    assert line.startswith(f"{path}: ")


# Flags and devices

FLAGS = [
    ("train/train_diffusion.py", "--batch_size", "-1", "from 1 to"),
    ("train/train_diffusion.py", "--batch_size", "0", "from 1 to"),
    ("train/train_diffusion.py", "--batch_size", "many", "not a whole number"),
    ("train/train_diffusion.py", "--batch_size", "1.5", "not a whole number"),
    ("train/train_diffusion.py", "--learning_rate", "nan", "finite"),
    ("train/train_diffusion.py", "--learning_rate", "inf", "finite"),
    ("train/train_diffusion.py", "--compile", "maybe", "not true or false"),
    ("train/train_diffusion.py", "--amp_dtype", "float8", "not one of"),
    ("train/train_diffusion.py", "--epochs", "1000000000", "from 1 to 1,000,000"),
    ("train/train_diffusion.py", "--batchsize", "3", "unrecognized"),
    ("train/train_diffusion.py", "--device", "tpu", "not one of"),
    ("evaluate/evaluate_fld.py", "--num_ode_steps", "1000000000", "from 1 to 10,000"),
    ("evaluate/evaluate_fld.py", "--num_splits", "1", "from 2 to"),
    ("simulate/simulate_lenses.py", "--num_per_class", "1e9", "not a whole number"),
    ("evaluate/evaluate_classify.py", "--model_path", "m.pt", "--npy_path"),
]


@pytest.mark.parametrize(("script", "flag", "value", "complaint"), FLAGS, ids=[f"{f} {v}" for _, f, v, _ in FLAGS])
def test_a_bad_flag_is_named(script, flag, value, complaint, capsys):
    (line,) = one_line(capsys, script, flag, value)
    assert flag in line or complaint == "--npy_path"
    assert complaint in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "script", ["train/train_diffusion.py", "train/train_classifier.py", "evaluate/evaluate_fld.py"]
)
def test_a_device_that_is_not_there_is_named(script, capsys):
    (line,) = one_line(capsys, script, "--device", "cuda")
    assert "no cuda device on this machine: --device auto takes what is there" in line


# Weights to share


def test_exported_weights_stand_in_for_their_checkpoint(checkpoint, classifier, lens_data, tmp_path, capsys):
    for source, name in ((checkpoint, "generator"), (classifier, "classifier")):
        path = tmp_path / f"{name}.safetensors"
        run_script("train/export_weights.py", "--checkpoint_path", source, "--output_path", path)
        assert f"{path}: " in capsys.readouterr().out
        assert load_checkpoint(path)["epoch"] == load_checkpoint(source)["epoch"]
    of_checkpoint, of_weights = (
        generate_image(load_model(path, "cpu"), 1, ode_steps=2)
        for path in (checkpoint, tmp_path / "generator.safetensors")
    )
    assert torch.equal(of_checkpoint, of_weights)
    assert of_checkpoint.std() > 0
    exported = load_classifier(tmp_path / "classifier.safetensors")
    assert (exported.image_size, exported.classes, exported.channels) == (32, CLASSES, 1)
    for name, value in load_classifier(classifier).state_dict().items():
        assert torch.equal(exported.state_dict()[name], value)


def test_weights_lie_in_folders_of_any_name(checkpoint, tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xe9\xff"))
    run_script("train/export_weights.py", "--checkpoint_path", checkpoint, "--output_path", folder / "w.safetensors")
    assert load_checkpoint(folder / "w.safetensors")["epoch"] == 4


def test_exported_weights_can_be_halved(classifier, tmp_path):
    flags = ["--checkpoint_path", classifier, "--output_path", tmp_path / "w.safetensors"]
    trained = load_classifier(classifier).state_dict()
    sizes = []
    for pattern, first_letters in (("", "-"), ("layer4*", "layer4"), ("*", "")):
        run_script("train/export_weights.py", *flags, "--halved", pattern)
        sizes.append((tmp_path / "w.safetensors").stat().st_size)
        for name, value in load_checkpoint(tmp_path / "w.safetensors")["model_state_dict"].items():
            halved = name.startswith(first_letters) and name.endswith(("weight", "bias"))  # no running averages
            assert (value.dtype == torch.float16) == halved, name
            torch.testing.assert_close(value.to(trained[name].dtype), trained[name], rtol=1e-3, atol=1e-4)
    assert sizes[0] > sizes[1] > sizes[2] > 0.5 * sizes[0]


def test_a_changed_number_in_exported_weights_is_found(checkpoint, tmp_path, capsys):
    path = tmp_path / "w.safetensors"
    run_script("train/export_weights.py", "--checkpoint_path", checkpoint, "--output_path", path)
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(Exception, match="checksum does not match"):
        load_checkpoint(path)
    lines = one_line(capsys, "train/export_weights.py", "--checkpoint_path", checkpoint, "--output_path", "w.pt")
    assert lines[-1].endswith("its name must end in .safetensors")


# At random


@pytest.mark.parametrize("cases", [600, pytest.param(10_000, marks=pytest.mark.long)])
def test_damaged_files_end_in_an_error_or_a_right_result(cases, checkpoint, tmp_path):
    grown = fuzz(cases, sorted((DATA / "published_format").rglob("*.npy")), checkpoint, tmp_path, seed=0)
    assert grown < 100e6
