"""Every layout of folders and every format of files gives the images, classes and splits that were written."""

import gzip
import hashlib
import os
import pickle
import re
import tempfile
import tracemalloc
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from astropy.io import fits
from conftest import run_script

import dataset
from dataset import NpyDataset, load_parts, read_entries
from image_files import is_table, read_image, read_stack
from layouts import classes_with_files
from settings import InputError

RANDOM = np.random.default_rng(0)


def some_images(count: int, channels: int = 1, size: int = 16) -> np.ndarray:
    """Images (count, channels, size, size) of whole numbers, exact in every format; each has a range of its own."""
    scale = RANDOM.integers(20, 200, (count, 1, 1, 1))
    return (scale * RANDOM.integers(1, 100, (count, channels, size, size)) - 300).astype("i2")


def split_by_hash(name: str) -> str:
    """The published split, by the SHA-256 hash of the name alone: 70% train, 15% val, 15% test."""
    part = int(hashlib.sha256(name.split("/")[-1].encode()).hexdigest()[:16], 16) / 16**16
    return "train" if part < 0.7 else "val" if part < 0.85 else "test"


def check(root: Path, expected: dict[str, tuple[str, str, np.ndarray]], classes: list[str]) -> NpyDataset:
    """Compares a loaded folder with what was written: name -> (class, split, image)."""
    data = NpyDataset(root, on_missing_class="go_on")
    assert data.classes == tuple(classes)
    assert sorted(data.files) == sorted(expected)
    assert len(data.images) == len(data.files)
    for i, file in enumerate(data.files):
        of, _, image = expected[file]
        assert data.classes[data.labels[i]] == of
        values = image.astype(float)
        np.testing.assert_allclose(data.images[i], (values - values.min()) / np.ptp(values), atol=1e-6)
        assert (data.low[i], data.high[i]) == (values.min(), values.max())
    for split in ("train", "val", "test"):
        part = data.part(split, "go_on") if any(split == of for _, of, _ in expected.values()) else data.only([])
        assert set(part.files) == {name for name, (_, of, _) in expected.items() if of == split}
        torch.testing.assert_close(part.images, data.images[[data.files.index(name) for name in part.files]])
    again = NpyDataset(root, on_missing_class="go_on")  # from its cache
    assert (again.files, again.labels.tolist()) == (data.files, data.labels.tolist())
    assert torch.equal(again.images, data.images)
    return data


# Layouts: [split/][class/]file; images written to the same file make a stack

IN_SPLITS = ("train/", "val/", "test/")
LAYOUTS = {
    # title: (path of an image, values of {place}: folders of splits or beside the root, axes of an array)
    "class folders": ("{place}{of}/{k}.npy", [""], "s s"),
    "given splits": ("{place}{of}/{k}.npy", IN_SPLITS, "c s s"),
    "validation": ("{place}{of}/{k}.npy", ("train/", "validation/", "test/"), "s s"),
    "valid, and test out of train": ("{place}{of}/{k}.npy", ("train/", "valid/"), "s s c"),
    "val out of train": ("{place}{of}/{k}.npy", ("train/", "test/"), "s s"),
    "val and test out of train": ("{place}{of}/{k}.npy", ("train/",), "s s"),
    "side by side": ("{place}{of}/{k}.npy", ("", "../data_test/"), "s s"),
    "images without labels": ("{place}{of}{k}.npy", [""], "s s"),
    "splits without labels": ("{place}{of}{k}.npy", IN_SPLITS, "s s"),
    "a stack for each class": ("{place}{of}.npy", [""], "n s s"),
    "a stack in each class folder": ("{place}{of}/all.npy", [""], "n c s s"),
    "a stack for each class and split": ("{place}{of}.npy", IN_SPLITS, "n s s c"),
    "stacks side by side": ("{place}{of}.npy", ("", "../data_test/"), "n s s"),
    "images.npy and labels.npy": ("{place}images.npy", [""], "n s s"),
    "the same in splits": ("{place}images.npy", ("train/", "test/"), "n c s s"),
    "a stack of images without labels": ("{place}images.npy", [""], "n s s c"),
}
LABELS = {"images.npy and labels.npy": "as numbers", "the same in splits": "as texts"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_of_any_layout_loads_as_it_was_written(layout, tmp_path, capsys):
    pattern, places, axes = LAYOUTS[layout]
    labels, root = LABELS.get(layout), tmp_path / "data"
    classes = ["2", "9", "10"] if labels == "as numbers" else ["cdm", "no", "vortex"]
    files, expected = defaultdict(list), {}
    given = {"val" if "val" in place else place.strip("/").removeprefix("../data_") for place in places}
    for place in places:
        images = some_images(90, 3 if "c" in axes else 1)
        for k, image in enumerate(images):
            of = classes[k % 3]
            path = pattern.format(place=place, k=k, of=of)
            files[path].append((of, image))
            name = f"{path}#{len(files[path]) - 1}" if "n" in axes else path
            split = split_by_hash(name)
            if place not in ("", "train/"):
                split = "val" if "val" in place else "test"
            elif split in given:
                split = "train"
            expected[name] = (of if "{of}/" in pattern or "{of}." in pattern or labels else "images", split, image)
    for path, entries in files.items():
        array = np.stack([image for _, image in entries])
        array = array if "c" in axes else array[:, 0]
        array = np.moveaxis(array, 1, -1) if axes.endswith("s s c") else array
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / path, array if "n" in axes else array[0])
        if labels:
            of = [of for of, _ in entries]
            np.save((root / path).with_name("labels.npy"), np.array(of, int if labels == "as numbers" else str))
    if labels is None and "{of}" not in pattern.replace("{of}{k}", ""):
        classes = ["images"]
    check(root, expected, classes)
    said = f"{tmp_path / 'data_test'}: its images are the test images of {root}\n"
    assert (said in capsys.readouterr().out) == ("../data_test/" in places)


# Formats of one image, (c, s, s) of int16


def as_pickle(*values):
    def save(path, image):
        array = np.empty(1 + len(values), object)
        array[:] = [image, *values]
        np.save(path, array, allow_pickle=True)

    return save


def as_fits(*before, scale=(1, 0), compressed=False, header=()):
    def save(path, image):
        pixels = image[0] if len(image) == 1 else image
        if compressed:
            hdus = [fits.PrimaryHDU(), fits.CompImageHDU(pixels)]
        else:
            hdus = [*(make() for make in before), (fits.ImageHDU if before else fits.PrimaryHDU)(pixels)]
        if scale != (1, 0):
            hdus[-1].data = hdus[-1].data.astype("f8")
            hdus[-1].scale("int16", bscale=scale[0], bzero=scale[1])
        hdus[-1].header.update(header)
        fits.HDUList(hdus).writeto(path)

    return save


def catalogue():
    return fits.BinTableHDU.from_columns([fits.Column("mass", "D", array=np.arange(9.0))])


FORMATS = {
    # title: (ending, how an image is written, its channels)
    "(s, s)": (".npy", lambda path, image: np.save(path, image[0]), 1),
    "big-endian, columns first": (".npy", lambda path, image: np.save(path, np.asfortranarray(image).astype(">i4")), 3),
    "(s, s, c)": (".npy", lambda path, image: np.save(path, np.moveaxis(image, 0, -1)), 15),
    "a pickled pair": (".npy", as_pickle(3e-23), 1),
    "a pickled image with four values": (".npy", as_pickle(3e-23, 1.5, 2, -4.0), 3),
    ".npz": (".npz", lambda path, image: np.savez(path, image[0]), 1),
    ".npz, columns first": (".npz", lambda path, image: np.savez(path, np.asfortranarray(image)), 3),
    ".npz of several arrays": (
        ".npz",
        lambda path, image: np.savez_compressed(path, mask=image > 0, image=image, a=[1]),
        3,
    ),
    "FITS": (".fits", as_fits(), 1),
    "FITS, short and in capitals": (".FIT", as_fits(), 3),
    "FITS behind others": (".fits", as_fits(fits.PrimaryHDU, catalogue), 1),
    "FITS with BSCALE and BZERO": (".fits", as_fits(scale=(4, -1000)), 1),
    "FITS, gzip": (".fits.gz", as_fits(), 1),
    "FITS, Rice": (".fits.fz", as_fits(compressed=True), 3),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_of_any_format_is_read_as_it_was_written(kind, tmp_path):
    ending, save, channels = FORMATS[kind]
    expected = {}
    for k, image in enumerate(some_images(6, channels)):
        of = "ab"[k % 2]
        image = 4 * (image // 4) if "BSCALE" in kind else image
        (tmp_path / of).mkdir(exist_ok=True)
        save(tmp_path / of / f"{k}{ending}", image)
        expected[f"{of}/{k}{ending}"] = (of, split_by_hash(f"{k}{ending}"), image)
    (tmp_path / "a" / ".hidden.npy").touch()
    (tmp_path / "a" / "notes.txt").touch()
    data = check(tmp_path, expected, ["a", "b"])
    values = {"a pickled pair": [3e-23] + [np.nan] * 3, "a pickled image with four values": [3e-23, 1.5, 2, -4]}
    np.testing.assert_array_equal(data.values, [values.get(kind, [np.nan] * 4)] * 6)
    np.testing.assert_array_equal(data.axion_mass, data.values[:, 0])
    assert data.pixel_scale is None
    image, mass = read_image(tmp_path / data.files[0])
    assert np.array_equal(image, data.images[0])
    assert mass == data.axion_mass[0] or np.isnan(mass)


def test_kinds_of_files_and_stacks_may_be_mixed(tmp_path):
    images, expected = some_images(60), {}
    for of in "ab":
        (tmp_path / of).mkdir()
    FORMATS["FITS"][1](tmp_path / "a" / "1.fits", images[0])
    FORMATS[".npz"][1](tmp_path / "b" / "2.npz", images[1])
    np.save(tmp_path / "a" / "s.npy", images[2:22, 0])
    np.save(tmp_path / "b" / "columns.npy", np.asfortranarray(images[22:42, 0]))
    np.savez_compressed(tmp_path / "b" / "s.npz", images[42:51])
    fits.PrimaryHDU(images[51:]).writeto(tmp_path / "b" / "s.fits")
    places = {"a/1.fits": 0, "b/2.npz": 1} | {f"a/s.npy#{k}": 2 + k for k in range(20)}
    places |= {f"b/columns.npy#{k}": 22 + k for k in range(20)} | {f"b/s.npz#{k}": 42 + k for k in range(9)}
    places |= {f"b/s.fits#{k}": 51 + k for k in range(9)}
    expected = {name: (name[0], split_by_hash(name), images[k]) for name, k in places.items()}
    check(tmp_path, expected, ["a", "b"])


@pytest.mark.parametrize("how", ["CDELT", "CD", "PC", "none"])
def test_pixel_scale_is_the_median_of_what_headers_say(how, tmp_path):
    sky = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 10.0, "CRVAL2": 60.0}
    turn = np.array([[0.8, -0.6], [0.6, 0.8]])
    for k, arcsec in enumerate((0.05, 0.101, 0.2)):
        scale = arcsec / 3600
        cards = {
            "CDELT": {"CDELT1": -scale, "CDELT2": scale},
            "CD": {f"CD{i + 1}_{j + 1}": scale * turn[i, j] for i in (0, 1) for j in (0, 1)},
            "PC": {"CDELT1": scale, "CDELT2": scale}
            | {f"PC{i + 1}_{j + 1}": turn[i, j] for i in (0, 1) for j in (0, 1)},
            "none": {},
        }
        (tmp_path / "a").mkdir(exist_ok=True)
        header = sky | cards[how] if how != "none" else {}
        as_fits(header=header)(tmp_path / "a" / f"{k}.fits", some_images(1)[0])
    np.save(tmp_path / "a" / "0.npy", some_images(1)[0])
    found = NpyDataset(tmp_path).pixel_scale
    assert found is None if how == "none" else found == pytest.approx(0.101)


def test_what_lies_beside_images_is_not_one(tmp_path):
    """Catalogues and notes at the top; arrays as well, where there are class folders."""
    images = some_images(4)
    for k, image in enumerate(images):
        np.save(tmp_path / f"{k}.npy", image)
    fits.HDUList([fits.PrimaryHDU(), catalogue()]).writeto(tmp_path / "parameters.fits")
    for name in ("recipe.json", "SHA256SUMS", "labels.csv", ".hidden.npy"):
        (tmp_path / name).touch()
    assert NpyDataset(tmp_path).files == [f"{k}.npy" for k in range(4)]
    (tmp_path / "cdm").mkdir()
    np.save(tmp_path / "cdm" / "7.npy", images[0])
    (tmp_path / "earlier_1").mkdir()
    data = NpyDataset(tmp_path)
    assert (data.files, data.classes) == (["cdm/7.npy"], ("cdm",))


def test_a_class_called_train_beside_others_is_one(tmp_path):
    for name in ("train", "test", "cdm"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "0.npy", some_images(1)[0])
    assert NpyDataset(tmp_path).classes == ("cdm", "test", "train")


@pytest.mark.parametrize("other", ["cdm and more", "none"])
def test_a_folder_beside_with_other_classes_is_left_alone(other, tmp_path, capsys):
    for place in ("data", "data_test"):
        for of in ("cdm", "no") if place == "data" else {"cdm and more": ("cdm", "no", "x"), "none": ()}[other]:
            (tmp_path / place / of).mkdir(parents=True)
            np.save(tmp_path / place / of / "0.npy", some_images(1)[0])
    (tmp_path / "data_test").mkdir(exist_ok=True)
    assert NpyDataset(tmp_path / "data").files == ["cdm/0.npy", "no/0.npy"]
    assert "data_test" not in capsys.readouterr().out


def test_a_class_that_its_split_folder_lacks_is_named(tmp_path):
    for path in ("train/cdm", "train/no", "test/cdm"):
        (tmp_path / path).mkdir(parents=True)
        for k in range(9):
            np.save(tmp_path / path / f"{k}.npy", some_images(1)[0])
    with pytest.raises(
        InputError, match=r"no: none of its 9 images is in the split 'test', which folders give here: add"
    ):
        load_parts(tmp_path, "test")
    (val,) = load_parts(tmp_path, "val")
    assert all(split_by_hash(file) == "val" for file in val.files)


def test_classes_of_a_checkpoint_are_taken_out_of_any_layout(tmp_path):
    images = some_images(60)
    np.save(tmp_path / "images.npy", images[:, 0])
    np.save(tmp_path / "labels.npy", np.arange(60) % 3)
    data = NpyDataset(tmp_path, classes=("2", "0"))
    assert data.counts() == {"2": 20, "0": 20}
    assert data.files[:2] == ["images.npy#0", "images.npy#2"]
    with pytest.raises(InputError, match="no folder 3 with"):
        NpyDataset(tmp_path, classes=("0", "3"))
    assert classes_with_files(tmp_path) == {"0", "1", "2"}


# What does not load


def in_class(name, content):
    def write(root):
        (root / "a").mkdir()
        path = root / "a" / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, np.ndarray):
            np.save(path, content)
        else:
            content(path)

    return write


class Bomb:
    """Loading its pickle calls a function."""

    def __reduce__(self):
        return os.mkdir, ("bombed",)


def cut(save, share):
    def write(path):
        save(path, RANDOM.integers(0, 9, (1, 64, 64), "i2"))
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return write


def labelled(images, labels):
    def write(root):
        np.save(root / "images.npy", images)
        np.save(root / "labels.npy", labels, allow_pickle=True)

    return write


def a_stack_and_an_image(root):
    np.save(root / "a.npy", some_images(20)[:, 0])
    np.save(root / "b.npy", some_images(1)[0])


def a_stack_of_few_images(root):
    """In one of the splits, where it could be an image of several channels."""
    for split, count in (("train", 20), ("val", 9)):
        (root / split).mkdir()
        np.save(root / split / "a.npy", some_images(count)[:, 0])


def a_split_without_classes(root):
    for k, path in enumerate(("train/a", "val")):
        (root / path).mkdir(parents=True)
        np.save(root / path / f"{k}.npy", some_images(1)[0])


def masked(path):
    hdu = fits.PrimaryHDU(some_images(1)[0, 0])
    hdu.header["BLANK"] = int(hdu.data[3, 3])
    hdu.writeto(path)


def claims_too_much(path):
    as_fits()(path, some_images(1)[0])
    path.write_bytes(path.read_bytes().replace(b"NAXIS1  =                   16", b"NAXIS1  =          16000000000"))


def goes_back_without_end(path):
    """A catalogue whose size is negative: the next one begins where this one does."""
    catalogue().writeto(path)
    rows = b"NAXIS2  =                    9"
    assert rows in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(rows, b"NAXIS2  =                 -360"))


STACK = some_images(20)[:, 0]
REFUSED = {
    "wide": (
        in_class("x.npy", np.eye(64)[16:48]),
        r"shape \(32, 64\).*: crop it, as with image\[\.\.\., 0:32, 16:48\]",
    ),
    "wide, in colours": (
        in_class("x.npy", np.zeros((32, 65, 3))),
        r"as with image\[\.\.\., 0:32, 16:48, :\], or resize it",
    ),
    "wide, a stack": (in_class("x.npy", np.zeros((99, 64, 32))), r"as with image\[\.\.\., 16:48, 0:32\]"),
    "wide, a stack in colours": (in_class("x.npy", np.zeros((99, 3, 64, 32))), r"as with image\[\.\.\., 16:48, 0:32\]"),
    "large": (in_class("x.npy", np.zeros((300, 300))), r"image\[\.\.\., 22:278, 22:278\], or resize it"),
    "a pickled stack": (in_class("x.npy", lambda path: as_pickle(1.0)(path, STACK)), r"shape \(20, 16, 16\): an image"),
    "a malicious pickle": (
        in_class("x.npy", lambda path: as_pickle(1, 2, 3, Bomb())(path, STACK[0])),
        "refused: its p",
    ),
    "a malicious pickle in a .npz": (
        in_class("x.npz", lambda path: np.savez(path, np.array([Bomb(), 1], object))),
        "holds values of type object",
    ),
    "a pickle called FITS": (in_class("x.fits", pickle.dumps(Bomb())), "is not a FITS file, or is damaged"),
    "a pickle called .npz": (in_class("x.npz", pickle.dumps(Bomb())), r"is not a \.npz file, or is damaged"),
    "an empty .npz": (in_class("x.npz", b""), "is empty"),
    "a truncated .npz": (in_class("x.npz", cut(FORMATS[".npz"][1], 0.5)), r"is not a \.npz file, or is damaged"),
    "a truncated FITS": (in_class("x.fits", cut(FORMATS["FITS"][1], 0.5)), "is not a FITS file, or is damaged"),
    "a FITS header cut": (in_class("x.fits", cut(FORMATS["FITS"][1], 0.01)), "is not a FITS file, or is damaged"),
    "a truncated gzip": (
        in_class("x.fits.gz", cut(FORMATS["FITS, gzip"][1], 0.5)),
        "is not a FITS file, or is damaged",
    ),
    "gzip of nothing": (in_class("x.fits.gz", gzip.compress(b"")), "is not a FITS file, or is damaged"),
    "a FITS header that claims 2^40 pixels": (in_class("x.fits", claims_too_much), "has shape"),
    "a truncated stack": (in_class("x.npy", lambda path: path.write_bytes(npy_of(STACK)[:-9])), "is truncated"),
    "a catalogue": (in_class("x.fits", lambda path: catalogue().writeto(path)), "holds no image"),
    "a FITS file that goes back": (in_class("x.fits", goes_back_without_end), "holds no image|is damaged"),
    "masked pixels": (in_class("x.fits", masked), "holds NaN or Inf"),
    "labels within": (
        in_class("x.npz", lambda path: np.savez(path, images=STACK, labels=np.arange(20))),
        r"x.npz: holds labels, too: save both as images.npy and labels.npy",
    ),
    "two arrays": (in_class("x.npz", lambda path: np.savez(path, a=STACK, b=STACK)), "holds 2 arrays: call"),
    "a bad image in a stack": (
        in_class("x.npy", np.concatenate([STACK, np.zeros((1, 16, 16), "i2")])),
        r"^1 bad images of 21 in .*:\n +\S+a/x\.npy#20: is blank: every pixel is 0\n",
    ),
    "too few labels": (labelled(STACK, np.arange(19)), "images.npy: holds 20 images, but there are 19 labels"),
    "labels of one image": (labelled(STACK[:3], np.arange(4)), "but there are 4 labels"),
    "labels that are no numbers": (labelled(STACK, np.arange(20) / 2), "labels.npy: holds float64 of shape"),
    "labels of two axes, as floats": (labelled(STACK, np.eye(20)), r"labels.npy: holds float64 of shape \(20, 20\)"),
    "labels of two axes": (labelled(STACK, np.eye(20, dtype=int)), r"labels.npy: holds int64 of shape \(20, 20\)"),
    "malicious labels": (labelled(STACK, np.array([Bomb()] * 20)), "labels.npy: is not a .npy file of numbers or"),
    "a label that is no name": (labelled(STACK, np.array(["../a"] * 20)), r"no class can have the name '\.\./a'"),
    "a stack beside an image": (a_stack_and_an_image, "b.npy is one image, and .*a.npy is a stack of images: put"),
    "stacks of many and of few": (a_stack_of_few_images, "val/a.npy is one image, and .*train/a.npy is a stack"),
    "a split without classes": (a_split_without_classes, "val: no class folders in it: add some, or move it away"),
}


def npy_of(array):
    with tempfile.TemporaryFile() as file:
        np.save(file, array)
        file.seek(0)
        return file.read()


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_load_is_said_in_one_line(kind, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    write, complaint = REFUSED[kind]
    write(tmp_path / "data")
    with pytest.raises(InputError, match=complaint) as raised:
        NpyDataset(tmp_path / "data")
    assert len(str(raised.value).splitlines()) == (3 if " bad " in str(raised.value) else 1)
    assert not (tmp_path / "bombed").exists()


@pytest.mark.parametrize(
    "kind", [".npz", ".npz of several arrays", "FITS", "FITS behind others", "FITS, gzip", "FITS, Rice"]
)
def test_damaged_bytes_give_an_image_or_what_is_wrong(kind, tmp_path):
    ending, save, _ = FORMATS[kind]
    random = np.random.default_rng(1)
    save(tmp_path / f"whole{ending}", some_images(1, 3)[0])
    whole = (tmp_path / f"whole{ending}").read_bytes()
    path = tmp_path / f"x{ending}"
    for _ in range(40):
        content = bytearray(whole)
        for where in random.integers(0, len(whole), 4) % random.choice([400, 3000, len(whole)]):
            content[min(where, len(whole) - 1)] = random.integers(256)
        path.write_bytes(content[: random.integers(len(whole)) if random.random() < 0.3 else None])
        is_table(path)
        for _, _, image in read_entries(path, "a"):
            if isinstance(image, InputError):
                assert str(image).startswith(str(path))
            else:
                assert np.isfinite(image[0]).all()
                assert np.ptp(image[0]) == 1


def test_stacks_of_few_images_are_taken_for_channels_but_not_where_labels_count_them(tmp_path):
    images = some_images(4)[:, 0]
    np.save(tmp_path / "images.npy", images)
    assert NpyDataset(tmp_path).image_shape == (4, 16, 16)
    np.save(tmp_path / "labels.npy", np.arange(4))
    assert NpyDataset(tmp_path).image_shape == (1, 16, 16)
    np.save(tmp_path / "s.npy", STACK)
    with pytest.raises(InputError, match=r"s\.npy: has shape \(20, 16, 16\): as a stack it holds 20 images, an ima"):
        read_image(tmp_path / "s.npy")
    assert len(list(read_stack(tmp_path / "s.npy"))) == 20


def test_images_of_another_shape_say_how_to_crop_them(tmp_path):
    (tmp_path / "a").mkdir()
    for k, size in enumerate((16, 16, 16, 20, 8)):
        np.save(tmp_path / "a" / f"{k}.npy", some_images(1, size=size)[0])
    with pytest.raises(InputError) as raised:
        NpyDataset(tmp_path)
    assert "a/3.npy: has shape (20, 20), not (16, 16): crop it, as with image[..., 2:18, 2:18]" in str(raised.value)
    assert "a/4.npy: has shape (8, 8), not (16, 16): resize it, as with scipy.ndimage.zoom(im" in str(raised.value)


def test_of_many_bad_files_the_first_are_named_and_all_are_counted(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    for k in range(40):
        np.save(tmp_path / "a" / f"{k:02}.npy", np.full((16, 16), k) if k < 30 else some_images(1)[0])
    np.save(tmp_path / "a" / "wide.npy", np.zeros((16, 32)))
    with pytest.raises(InputError) as raised:
        NpyDataset(tmp_path)
    lines = str(raised.value).splitlines()
    assert lines[0] == f"31 bad files of 41 in {tmp_path}:"
    assert [line.split("/")[-1].split(":")[0] for line in lines[1:21]] == [f"{k:02}.npy" for k in range(20)]
    assert (
        lines[21].strip().startswith("and 11 more; of all, is blank: every pixel is ... (30); has shape ... an image")
    )
    assert len(lines) == 23
    assert len(NpyDataset(tmp_path, on_bad_file="skip")) == 10
    assert not list(tmp_path.glob(".lens*"))


# Memory


@pytest.mark.parametrize("how", ["files", "a stack", "bad files", "nowhere to write"])
def test_packing_takes_the_memory_of_a_few_images(how, tmp_path, monkeypatch, capsys):
    (tmp_path / "a").mkdir()
    images = some_images(64, size=256)
    if how == "a stack":
        np.save(tmp_path / "a" / "x.npy", images)
    for k, image in enumerate(images if how != "a stack" else []):
        np.save(tmp_path / "a" / f"{k}.npy", image)
    if how == "bad files":
        (tmp_path / "a" / "bad.npy").touch()
    if how == "nowhere to write":
        read_only = PermissionError(13, "Permission denied")
        monkeypatch.setattr(dataset, "save_array", lambda *args: (_ for _ in ()).throw(read_only))
    NpyDataset(tmp_path, on_bad_file="skip")  # now all that is imported and kept once is there
    for cache in tmp_path.glob(".lens*"):
        cache.unlink()
    tracemalloc.start()
    try:
        data = NpyDataset(tmp_path, on_bad_file="skip")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    held = len(images) * 4 * 256**2
    assert peak < held / 4  # 4 MB of 17; an image, its float64 copy and its sorted copy take 2
    for i in (0, 63):
        values = images[int(re.findall(r"\d+", data.files[i])[0])].astype(float)
        np.testing.assert_allclose(data.images[i], (values - values.min()) / np.ptp(values), atol=1e-6)
    assert len(list(tmp_path.glob(".lens*"))) == (how in ("files", "a stack"))


# Scripts that read images


def test_stacks_and_labels_are_classified_image_by_image(classifier, tmp_path, capsys):
    def classified(path):
        run_script("evaluate/evaluate_classify.py", "--model_path", classifier, "--npy_path", path)
        return capsys.readouterr().out.splitlines()

    images = some_images(18, size=64)
    np.save(tmp_path / "cdm.npy", images[:, 0])
    alone = classified(tmp_path / "cdm.npy")
    assert [line.split()[0] for line in alone[1:19]] == [f"cdm.npy#{k}" for k in range(18)]
    assert re.fullmatch(r"Accuracy on cdm: .*% of 18", alone[-1])
    fits.HDUList([fits.PrimaryHDU(), catalogue()]).writeto(tmp_path / "parameters.fits")
    (tmp_path / "more").mkdir()
    np.savez(tmp_path / "more" / "images.npz", images[:, 0])
    np.save(tmp_path / "more" / "labels.npy", np.array(["axion", "no_sub"] * 9))
    as_fits()(tmp_path / "more" / "one.fits", images[5])
    lines = classified(tmp_path)
    assert [line.split()[1:] for line in lines[1:19]] == [line.split()[1:] for line in alone[1:19]]
    assert [line.split()[0] for line in lines[19:38]] == ["more/one.fits", *(f"more/images.npz#{k}" for k in range(18))]
    assert lines[19].split()[1:] == lines[25].split()[1:]  # the same image gets the same class in both
    assert [re.sub(": .*%", "", line) for line in lines[38:]] == [
        "Accuracy on axion of 9",
        "Accuracy on cdm of 18",
        "Accuracy on no_sub of 9",
    ]


def test_images_to_score_may_be_of_any_layout(tmp_path, monkeypatch):
    from evaluate import evaluate_fld

    monkeypatch.setattr(evaluate_fld, "GENERATED_DIR", str(tmp_path / "theirs"))
    monkeypatch.setattr(evaluate_fld, "REPORT_DIR", str(tmp_path / "report"))
    (tmp_path / "theirs").mkdir()
    for of in ("cdm", "no"):
        np.save(tmp_path / "theirs" / f"{of}.npy", some_images(20)[:, 0])
    found = evaluate_fld.open_folder_or_checkpoint(str(tmp_path / "theirs"), ("cdm", "no"))
    assert found.counts() == {"cdm": 20, "no": 20}
    with pytest.raises(
        InputError, match=r"nothing to score: no \.npy, \.npz or FITS files in axion/; it holds 2 \.npy f"
    ):
        evaluate_fld.open_folder_or_checkpoint(str(tmp_path / "theirs"), ("axion", "no"))


def test_what_is_left_out_beside_classes_or_labels_is_said(tmp_path, capsys):
    for name in ("a/0.npy", "a/1.npy", "b/0.npy", "loose1.npy", "loose2.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / name, some_images(1)[0, 0])
    assert len(NpyDataset(tmp_path)) == 3
    assert "loose1.npy and 1 more: left out, as the folders beside hold the classes" in capsys.readouterr().out
    np.save(tmp_path / "a" / "images.npy", some_images(4)[:, 0])
    np.save(tmp_path / "a" / "labels.npy", np.array(["x", "y", "x", "y"]))
    assert NpyDataset(tmp_path / "a", on_missing_class="go_on").classes == ("x", "y")
    assert "0.npy and 1 more: left out, as no labels.npy is of them" in capsys.readouterr().out


def test_splits_are_seen_in_any_case_and_what_is_in_their_way_is_named(tmp_path):
    for split in ("Train", "Val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            np.save(tmp_path / split / name / "0.npy", some_images(1)[0, 0])
    data = NpyDataset(tmp_path)
    assert data.classes == ("a", "b")
    assert data.part("val").files == ["Val/a/0.npy", "Val/b/0.npy"]
    (tmp_path / "plots").mkdir()
    with pytest.raises(InputError, match="Train, Val are splits; move plots away"):
        NpyDataset(tmp_path)


def test_files_with_a_leading_axis_of_one_are_images_and_no_stacks(tmp_path):
    """As radio telescopes write them: (1, 1, s, s)."""
    for k in range(5):
        fits.PrimaryHDU(some_images(1)[:1].astype("f4")).writeto(tmp_path / f"{k}.fits")
    data = NpyDataset(tmp_path)
    assert (data.classes, len(data)) == (("images",), 5)
