"""Any sound .npy image loads; anything else is named, all at once, and nothing in a file runs."""

import io
import math
import os
import pickle
import re
import shutil
import sys
import time
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from conftest import DATA
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import dataset
from dataset import NpyDataset, diffusion_transforms, epoch_batches, load_parts, normalize, some_of_each_class, split_of
from image_files import read_image
from layouts import are_classes, is_class_name
from settings import InputError

CLASSES = ("axion", "cdm", "no_sub")
IMAGE = np.random.default_rng(0).random((64, 64))
FEW = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path, array, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array, **kwargs)
    return path


def object_array(*values):
    array = np.empty(len(values), object)
    array[:] = values
    return array


# What loads


@pytest.mark.parametrize("shape", [(64, 64), (1, 64, 64), (64, 64, 1)])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f8", ">i2", "u1", "i8", "u8", "bool", np.longdouble])
def test_every_shape_and_numeric_type_gives_one_image_from_0_to_1(tmp_path, shape, dtype):
    original = (100 * IMAGE - 50 * (dtype == "bool")).clip(0).astype(dtype)
    image, mass = read_image(write(tmp_path / "x.npy", original.reshape(shape)))
    expected = original.astype(float)
    expected = (expected - expected.min()) / np.ptp(expected)
    assert image.shape == (1, 64, 64)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image[0], expected, atol=1e-6)
    assert np.isnan(mass)


@pytest.mark.parametrize("shape", [(64, 64), (4, 32, 32), (32, 32, 4)])
def test_column_major_files_are_not_transposed(tmp_path, shape):
    image, _ = read_image(write(tmp_path / "x.npy", np.asfortranarray(IMAGE.reshape(shape))))
    np.testing.assert_allclose(image, normalize(IMAGE.reshape(shape)), atol=1e-6)


@settings(FEW, max_examples=40)
@given(
    st.integers(8, 40),
    st.integers(1, 16),
    st.sampled_from(["(s, s)", "(c, s, s)", "(s, s, c)"]),
    st.sampled_from(["f4", "f8", ">i2", "u2", "u1"]),
    st.integers(0, 99),
)
@example(256, 3, "(s, s, c)", "f4", 0)
@example(8, 8, "(c, s, s)", "f4", 0)
@example(8, 16, "(s, s, c)", "f4", 0)
def test_any_size_channels_and_order_of_axes_gives_the_same_image(tmp_path, size, channels, axes, dtype, seed):
    """The colours are kept: all channels are scaled by one minimum and maximum."""
    assume(axes != "(s, s, c)" or channels != size)  # then it is taken for (c, s, s)
    channels = 1 if axes == "(s, s)" else channels
    original = (250 * np.random.default_rng(seed).random((channels, size, size))).astype(dtype)
    arrays = {"(s, s)": original[0], "(c, s, s)": original, "(s, s, c)": np.moveaxis(original, 0, -1)}
    image, _ = read_image(write(tmp_path / "x.npy", arrays[axes]))
    values = original.astype(float)
    np.testing.assert_allclose(image, (values - values.min()) / np.ptp(values), atol=1e-6)
    assert (image.min(), image.max(), image.dtype) == (0, 1, np.float32)
    np.testing.assert_allclose(normalize(arrays[axes].astype(float)), image, atol=1e-6)
    torch.testing.assert_close(normalize(image), torch.from_numpy(image))
    torch.testing.assert_close(diffusion_transforms(image), torch.from_numpy(2 * image - 1))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    hnp.arrays(
        st.sampled_from(["f4", "f8", "i4", "u2"]),
        (64, 64),
        elements=st.nothing() | st.integers(0, 60000),
        fill=st.integers(0, 60000),
    ),
    st.sampled_from([1, 1e-30, 1e30]),
)
@example(np.zeros((64, 64)), 1)
@example(np.full((64, 64), 7), 1)
def test_range_is_any(tmp_path, array, factor):
    scaled = array * np.float64(factor)
    image = normalize(scaled).numpy()
    assert image.min() == 0
    assert image.max() == (1 if np.ptp(scaled) > 0 else 0)
    order = np.argsort(scaled, axis=None, kind="stable")
    assert (np.diff(image.flatten()[order]) >= 0).all()
    try:
        read, _ = read_image(write(tmp_path / "x.npy", scaled))
    except InputError as error:
        assert re.search("is blank|hide the others", str(error))  # noqa: PT017
    else:
        np.testing.assert_array_equal(read, image)


@pytest.mark.parametrize("values", [(0, 5e-324), (-1.7e308, 1.7e308), (1e10, 1e10 + 1e-3), (-3, -2)])
def test_extreme_ranges(values):
    array = np.full((64, 64), values[0], np.float64)
    array[20:30] = values[1]
    image = normalize(array)
    assert set(image.unique().tolist()) == {0.0, 1.0}


def test_constant_images_become_zeros():
    assert normalize(np.full((64, 64), 3.0)).eq(0).all()
    assert diffusion_transforms(np.full((64, 64), 3.0)).eq(-1).all()


def test_published_axion_files_load_with_their_mass():
    for path in sorted((DATA / "published_format" / "axion").glob("*.npy")):
        expected_image, expected_mass = np.load(path, allow_pickle=True)  # our own file, so this is safe
        image, mass = read_image(path)
        np.testing.assert_allclose(image, normalize(expected_image), atol=1e-7)
        assert mass == expected_mass
        assert 1e-24 <= mass <= 1e-22


@pytest.mark.parametrize("mass", [3e-23, np.float64(3e-23), np.float32(3e-23), np.array(3e-23)])
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_pairs_written_by_this_numpy_load_too(tmp_path, mass, protocol):
    content = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": (2,)}
    np.lib.format.write_array_header_1_0(content, header)
    pickle.dump(object_array(IMAGE, mass), content, protocol=protocol)
    path = tmp_path / "x.npy"
    path.write_bytes(content.getvalue())
    image, read_mass = read_image(path)
    np.testing.assert_allclose(image, normalize(IMAGE), atol=1e-7)
    assert read_mass == pytest.approx(3e-23, rel=1e-6)


# What does not load


class Bomb:
    """Loading its pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


BAD_FILES = {
    "empty": (b"", "is empty"),
    "text": (b"1 2 3\n4 5 6\n", "not a .npy file"),
    "only the magic": (b"\x93NUMPY", "damaged header"),
    "damaged header": (b"\x93NUMPY\x01\x00\x76\x00{'descr': 'x", "damaged header"),
    "unknown version": (b"\x93NUMPY\x09\x00\x76\x00" + b" " * 200, "damaged header"),
    "wrong shape": (np.zeros((32, 64)), r"shape \(32, 64\)"),
    "17 channels": (np.zeros((17, 64, 64)), r"shape \(17, 64, 64\): .* with 16 channels at most"),
    "17 channels behind": (np.zeros((64, 64, 17)), r"shape \(64, 64, 17\): .* with 16 channels at most"),
    "no channel": (np.zeros((0, 64, 64)), r"shape \(0, 64, 64\)"),
    "channels that are not square": (np.zeros((3, 32, 64)), r"shape \(3, 32, 64\): an image is square"),
    "channels in the middle": (np.zeros((64, 3, 64)), r"shape \(64, 3, 64\): an image is square"),
    "a batch of one": (np.zeros((1, 1, 64, 64)), r"shape \(1, 1, 64, 64\)"),
    "too large": (np.zeros((257, 257)), r"shape \(257, 257\): an image is square, of 8 to 256 pixels"),
    "too small": (np.zeros((7, 7)), r"shape \(7, 7\): an image is square, of 8 to 256 pixels"),
    "one row": (np.zeros(64), r"shape \(64,\)"),
    "a scalar": (np.float64(3), r"shape \(\)"),
    "NaN": (np.where(IMAGE > 0.99, np.nan, IMAGE), "NaN or Inf"),
    "Inf": (np.where(IMAGE > 0.99, np.inf, IMAGE), "NaN or Inf"),
    "blank": (np.zeros((64, 64)), "is blank: every pixel is 0"),
    "constant": (np.full((64, 64), 7, "u2"), "is blank: every pixel is 7"),
    "complex": (IMAGE + 1j, "complex128, not real"),
    "words": (np.full((64, 64), "a"), "not real numbers"),
    "dates": (np.zeros((64, 64), "datetime64[s]"), "not real numbers"),
    "records": (np.zeros((64, 64), [("a", float)]), "not real numbers"),
    "image and image": (object_array(IMAGE, IMAGE), "not a pair"),
    "pair in a wrong shape": (object_array(IMAGE[:5], 1e-23), r"shape \(5, 64\)"),
    "pair of words": (object_array("image", "mass"), "not a pair"),
    "three objects": (object_array(IMAGE, 1e-23, 0), "not real numbers"),
    "a pair of a large image": (object_array(np.zeros((3, 257, 257)), 1e-23), r"shape \(3, 257, 257\)"),
    "a pair larger than any": (object_array(IMAGE, [0] * 2**22), "is larger than any pair"),
    "nested objects": (object_array(object_array(IMAGE, 1e-23), 1e-23), "not real numbers|not a pair|shape"),
    "pickle bomb": (object_array(Bomb(os.mkdir, "bombed"), 1e-23), "refused: its pickle asks for posix.mkdir|nt.mkdir"),
    "pickle bomb inside": (object_array(IMAGE, Bomb(eval, "open('bombed', 'w')")), "refused: .* builtins.eval"),
    "NumPy's own eval": (object_array(Bomb(np.load, "x"), 1), "refused: .* numpy.*load"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_named_and_run_nothing(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    content, complaint = BAD_FILES[kind]
    path = tmp_path / "x.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(InputError, match=complaint) as raised:
        read_image(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "bombed").exists()


def with_pixels(value, count=1, image=None):
    """An image in which some pixels have another value."""
    lens = next((DATA / "published_format" / "no_sub").glob("*.npy"))
    image = (np.load(lens) if image is None else image).copy()
    image.flat[100 : 100 + count] = value
    return image


@pytest.mark.parametrize("count", [1, 4, 5, 64, 800])
@pytest.mark.parametrize("value", [-999, -9999, -32768, 65535, 1e6, -1e30, 1e300])
def test_pixels_that_hide_the_others_are_named(tmp_path, value, count):
    """Bad pixels, a dead row, a gap between two detectors: after scaling, they would leave nothing of the lens."""
    count_of = "1 pixel" if count == 1 else f"{count} pixels"
    with pytest.raises(
        InputError, match=rf"x\.npy: has {count_of} from \S+ to \S+, which hide the others, from \S+ to"
    ):
        read_image(write(tmp_path / "x.npy", with_pixels(value, count)))


@pytest.mark.parametrize(
    "values",
    [(500, 1000), (-999, 999), (-32768, 32767), tuple(10 ** np.linspace(2, 5, 12)), tuple(range(100, 4000, 100))],
)
def test_bad_pixels_of_several_values_are_named(tmp_path, values):
    image = with_pixels(values, len(values))
    with pytest.raises(InputError, match=r"x\.npy: has \S+( pixels?)? from \S+ to \S+, which hide the others, from"):
        read_image(write(tmp_path / "x.npy", image))


def test_noise_and_faint_lenses_are_images(tmp_path):
    """The pixels of noise-free lenses, without 1% on either side, span at least a third of the range."""
    rng = np.random.default_rng(0)
    lens = with_pixels(0, 0)
    for sky in (0.01, 1, 100):  # times the peak
        read_image(write(tmp_path / "x.npy", lens + rng.normal(0, sky * lens.max(), lens.shape)))
    read_image(write(tmp_path / "x.npy", rng.poisson(3 * lens).astype("u2")))
    point = np.exp(-0.5 * (np.hypot(*np.mgrid[-32:32, -32:32]) / 0.8) ** 2)  # a quasar, ten times as bright
    for times in (10, 100):  # in colour, with the light of the lens, they can span still less
        read_image(write(tmp_path / "x.npy", lens + times * lens.max() * point))


def test_a_bad_pixel_on_nothing_else_is_named(tmp_path):
    with pytest.raises(InputError, match="hide the others, from 5 to 5"):
        read_image(write(tmp_path / "x.npy", with_pixels(-999, 1, np.full((64, 64), 5.0))))


@pytest.mark.parametrize(
    "image",
    [
        with_pixels(10.0),  # a star twice as bright as the lens
        with_pixels(-0.5),  # noise below the sky
        np.eye(64),  # a picture in two values
        np.where(np.hypot(*np.mgrid[-32:32, -32:32]) < 20, 3.0, 0),
    ],
)
def test_bright_stars_and_masks_are_images_all_the_same(tmp_path, image):
    read, _ = read_image(write(tmp_path / "x.npy", image))
    np.testing.assert_allclose(read[0], (image - image.min()) / np.ptp(image), atol=1e-6)


def test_no_simulated_image_is_taken_for_a_bad_one(lens_data):
    assert len(NpyDataset(lens_data)) == 144


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("source", ["plain", "pair"])
def test_truncated_files_are_named(tmp_path, share, source):
    path = write(tmp_path / "x.npy", IMAGE if source == "plain" else object_array(IMAGE, 1e-23))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(InputError, match=r"truncated|damaged"):
        read_image(path)


def test_a_header_that_claims_more_than_memory_holds_allocates_nothing(tmp_path):
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "<f8", "fortran_order": False, "shape": (2**20, 2**20)})
    (tmp_path / "x.npy").write_bytes(content.getvalue())
    with pytest.raises(InputError, match="shape"):
        read_image(tmp_path / "x.npy")


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "folder.npy").mkdir()
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "loop.npy").symlink_to(tmp_path / "loop.npy")
    with (tmp_path / "huge.npy").open("wb") as file:
        file.truncate(2**34)
    for name, complaint in [
        ("folder", "not a file"),
        ("loop", "cannot be read"),
        ("pipe", "not a file"),
        ("huge", "larger"),
        ("no", "No"),
    ]:
        with pytest.raises(InputError, match=complaint):
            read_image(tmp_path / f"{name}.npy")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_bytes_give_an_image_or_an_input_error(tmp_path, data):
    source = data.draw(st.sampled_from(sorted((DATA / "published_format").rglob("*.npy"))))
    content = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, 500) | st.integers(-300, -1))
        content[where] = data.draw(st.integers(0, 255))
    path = tmp_path / "x.npy"
    path.write_bytes(content[: data.draw(st.integers(0, len(content))) or None])
    try:
        image, _ = read_image(path)
    except InputError:
        return
    assert image.shape == (1, 64, 64)
    assert np.isfinite(image).all()


# Folders


def test_a_folder_gives_images_labels_and_masses():
    data = NpyDataset(DATA / "published_format", diffusion_transforms)
    assert data.classes == CLASSES
    assert data.image_shape == (1, 64, 64)
    assert data.class_to_idx == {"axion": 0, "cdm": 1, "no_sub": 2}
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.isfinite(data.axion_mass).tolist() == [True, True, False, False, False, False]
    image, label = data[3]
    assert image.shape == (1, 64, 64)
    assert (image.min().item(), image.max().item(), label) == (-1, 1, 1)


def test_all_bad_files_are_reported_at_once_before_anything_else(data_copy, capsys):
    (data_copy / "axion" / "0.npy").write_bytes(b"")
    (data_copy / "cdm" / "1.npy").write_text("text")
    with pytest.raises(InputError) as raised:
        NpyDataset(data_copy)
    for part in ("2 bad files of 144", "axion/0.npy: is empty", "cdm/1.npy: is not a .npy file", "--on_bad_file skip"):
        assert part in str(raised.value)
    assert len(NpyDataset(data_copy, on_bad_file="skip")) == 142
    assert "axion/0.npy: is empty" in capsys.readouterr().out
    with pytest.raises(InputError):  # skipping once does not hide them the next time
        NpyDataset(data_copy)


def some_images(folder, classes, shape=(64, 64), count=3):
    """A folder of random images of classes; the first three of a class are one for each split."""
    rng = np.random.default_rng(1)
    for name in classes:
        for i in (0, 2, 7, 1, 3, 4)[:count]:
            write(folder / name / f"{i}.npy", rng.random(shape))
    return folder


def check_folder(folder, classes, shape, monkeypatch):
    """Checks that everything a data set does works for these classes and this shape."""
    first = NpyDataset(folder, diffusion_transforms)
    assert first.classes == tuple(sorted(classes))
    assert first.image_shape == first.images.shape[1:] == shape
    for file, image, label in zip(first.files, first.images, first.labels.tolist(), strict=True):
        assert file.startswith(f"{first.classes[label]}/")
        torch.testing.assert_close(image, normalize(np.load(folder / file)))
    assert list(first.counts()) == list(first.classes)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "read_image", lambda path: pytest.fail("read a file again"))
        parts = load_parts(folder, "train", "val", "test")
        second = NpyDataset(folder)
    assert torch.equal(first.images, second.images)
    assert (first.files, first.classes, first.identity) == (second.files, second.classes, second.identity)
    assert sorted(file for part in parts for file in part.files) == first.files
    assert len({first.identity, *(part.identity for part in parts)}) == 4
    image, _ = first[0]
    assert (image.min(), image.max(), tuple(image.shape)) == (-1, 1, shape)
    (some,) = load_parts(folder, "train", classes=first.classes[:1])
    assert some.classes == first.classes[:1]
    assert set(some.labels.tolist()) == {0}


@pytest.mark.parametrize(
    "classes",
    [
        ("no", "sphere", "vort"),
        (*CLASSES, "wdm"),
        ("lenses",),
        ("0", "1", "10", "2"),
        ("cold dark matter", "-f", "a,b'\"c", "%s{0}\\n", "ünï🔭"),
        (os.fsdecode(b"\xff\xe9"), "a" * 200),
    ],
)
def test_classes_are_called_as_their_folders(tmp_path, monkeypatch, capsys, classes):
    sys.stdout.reconfigure(errors="replace")  # as a script does
    check_folder(some_images(tmp_path, classes), classes, (1, 64, 64), monkeypatch)
    first, *table = capsys.readouterr().out.splitlines()[:5]
    assert first.endswith(": 64x64 pixels in 1 channel(s)")
    assert len({len(line) for line in table}) == 1
    if all(map(str.isprintable, classes)):
        assert all(f" {name}" in table[0] for name in classes)


@pytest.mark.parametrize(
    ("of_file", "shape"),
    [
        ((32, 32), (1, 32, 32)),
        ((1, 128, 128), (1, 128, 128)),
        ((3, 64, 64), (3, 64, 64)),
        ((64, 64, 3), (3, 64, 64)),
        ((8, 8, 16), (16, 8, 8)),
        ((16, 128, 128), (16, 128, 128)),
        ((256, 256, 2), (2, 256, 256)),
    ],
)
def test_size_and_channels_are_those_of_the_files(tmp_path, monkeypatch, of_file, shape):
    check_folder(some_images(tmp_path, CLASSES, of_file), CLASSES, shape, monkeypatch)


@FEW
@given(st.data())
def test_any_folder_of_images_comes_back(tmp_path_factory, data):
    text = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=60)
    name = (text | st.binary(min_size=1, max_size=99).map(os.fsdecode)).filter(is_class_name)
    classes = data.draw(st.sets(name, min_size=1, max_size=4))
    size, channels = data.draw(st.integers(8, 24)), data.draw(st.integers(1, 4))
    folder = some_images(tmp_path_factory.mktemp("any"), classes, (channels, size, size), data.draw(st.integers(3, 6)))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
        check_folder(folder, classes, (channels, size, size), patch)


NO_NAMES = ["", ".", "..", "../up", "/etc", "a/b", "a\0b", ".git", "__pycache__", "earlier_1", 3, None]


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_no_class_is_called(name):
    assert not is_class_name(name)


def test_what_no_classes_are():
    assert are_classes(list(CLASSES))
    assert are_classes(("lenses",))
    for names in ([], None, 3, "axion", {"axion": 0}, ["a", "b", "a"], ["a", ".."], ["a", 3], [["a"]], [{}]):
        assert not are_classes(names)


def test_folders_that_are_no_class(tmp_path):
    some_images(tmp_path, CLASSES, count=1)
    for name in (".git", "__pycache__", "earlier_1"):
        write(tmp_path / name / "0.npy", IMAGE)
    write(tmp_path / "notes.npy", IMAGE)
    assert NpyDataset(tmp_path).classes == CLASSES
    write(tmp_path / "earlier" / "0.npy", IMAGE)
    assert NpyDataset(tmp_path).classes == ("axion", "cdm", "earlier", "no_sub")


def test_classes_may_be_given_as_those_of_a_checkpoint(data_copy):
    """They come in the checkpoint's order, and a class whose folder is missing is named."""
    two = NpyDataset(data_copy, classes=("no_sub", "axion"))
    assert two.counts() == {"no_sub": 48, "axion": 48}
    assert all(file.startswith(two.classes[label]) for file, label in zip(two.files, two.labels.tolist(), strict=True))
    for wanted in (("axion", "wdm"), ("wdm",)):
        with pytest.raises(InputError, match=rf"{data_copy}: no folder wdm with \.npy, \.npz or FITS files") as raised:
            NpyDataset(data_copy, classes=wanted)
        assert raised.value.status == 2
        assert "\n" not in str(raised.value)


OTHER_SHAPES = {
    "another size": ((32, 32), r"has shape \(32, 32\), not \(64, 64\)"),
    "three channels": ((3, 64, 64), r"has shape \(3, 64, 64\), not \(64, 64\)"),
    "three channels behind": ((64, 64, 3), r"has shape \(3, 64, 64\), not \(64, 64\)"),
}


@pytest.mark.parametrize("kind", OTHER_SHAPES)
@pytest.mark.parametrize("few", ["first", "last"])
def test_images_of_another_shape_than_most_are_bad_files(data_copy, capsys, kind, few):
    """They are reported together with the other bad files, wherever they are."""
    shape, complaint = OTHER_SHAPES[kind]
    names = [f"{i}.npy" for i in range(48)][:4] if few == "first" else ["44.npy", "45.npy", "46.npy", "47.npy"]
    folder = data_copy / ("axion" if few == "first" else "no_sub")
    for name in names:
        write(folder / name, np.random.default_rng(0).random(shape))
    (data_copy / "cdm" / "1.npy").write_bytes(b"")
    with pytest.raises(InputError, match=r"^5 bad files of 144") as raised:
        NpyDataset(data_copy)
    assert len(re.findall(complaint, str(raised.value))) == 4
    assert "cdm/1.npy: is empty" in str(raised.value)
    rest = NpyDataset(data_copy, on_bad_file="skip")
    assert (len(rest), rest.image_shape) == (139, (1, 64, 64))


def test_a_shape_that_is_not_that_of_most_images_but_of_the_first(tmp_path):
    """The very first file has a rare shape; the sound images are those of the most common shape."""
    some_images(tmp_path, ("a",), (3, 32, 32), 2)
    some_images(tmp_path, ("b", "c"), (3, 16, 16), 2)
    with pytest.raises(InputError, match=r"a/0\.npy: has shape \(3, 32, 32\), not \(3, 16, 16\)"):
        NpyDataset(tmp_path)
    rest = NpyDataset(tmp_path, on_bad_file="skip", on_missing_class="go_on")
    assert rest.counts() == {"a": 0, "b": 2, "c": 2}


def test_a_file_can_be_required_to_have_a_shape(tmp_path):
    path = write(tmp_path / "x.npy", IMAGE)
    np.testing.assert_array_equal(read_image(path, (1, 64, 64))[0], read_image(path)[0])
    with pytest.raises(InputError, match=r"x\.npy: has shape \(64, 64\), not \(3, 32, 32\)"):
        read_image(path, (3, 32, 32))


def test_a_folder_without_classes_is_named(tmp_path):
    with pytest.raises(
        InputError, match=r"nowhere: no class folders with \.npy, \.npz or FITS files, there is no such folder"
    ):
        NpyDataset(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no class folders with \.npy, \.npz or FITS files, it is empty"):
        NpyDataset(tmp_path)
    (tmp_path / "image.png").touch()
    with pytest.raises(InputError, match=r"no class folders with \.npy, \.npz or FITS files, it holds 1 \.png file"):
        NpyDataset(tmp_path)
    for name in CLASSES:
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=r"no \.npy, \.npz or FITS files") as raised:
        NpyDataset(tmp_path)
    assert all(f"{tmp_path / name}: no .npy, .npz or FITS files in it" in str(raised.value) for name in CLASSES)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def no_folder(folder):
    shutil.rmtree(folder)


def one_folder_deeper(folder):
    folder.rename(folder.with_name("images"))
    folder.mkdir()
    folder.with_name("images").rename(folder / "images")


def all_bad(folder):
    for path in folder.glob("*.npy"):
        path.write_bytes(b"")


def all_of_another_shape(folder):
    for path in folder.glob("*.npy"):
        write(path, IMAGE.reshape(4, 32, 32))


def all_of_another_ending(folder):
    for path in folder.glob("*.npy"):
        path.rename(path.with_suffix(".png"))


def none_in_training(folder):
    empty(folder)
    for name in [f"{i}.npy" for i in range(99) if split_of(f"{i}.npy") == "val"][:3]:
        write(folder / name, IMAGE)


CLASS_IS_NOT_THERE = {
    empty: r"axion: no \.npy, \.npz or FITS files in it: add some, or move it away if it is no class$",
    one_folder_deeper: r"axion: no \.npy, \.npz or FITS files in it, but in \S+axion/images: move them up",
    all_bad: "axion: all of its 48 files are bad",
    all_of_another_shape: "axion: all of its 48 files are bad",
    all_of_another_ending: r"axion: no \.npy, \.npz or FITS files in it: add some, or move it away if it is no class$",
    none_in_training: "axion: none of its 3 images is in the split 'train'",
}


@pytest.mark.parametrize("done", CLASS_IS_NOT_THERE)
def test_a_class_without_images_in_a_split_is_one_line_and_status_2(data_copy, capsys, done):
    done(data_copy / "axion")
    with pytest.raises(InputError, match=CLASS_IS_NOT_THERE[done]) as raised:
        load_parts(data_copy, "train", on_bad_file="skip")
    assert raised.value.status == 2
    assert "\n" not in str(raised.value)
    counts = re.search(r"^train((?: +\d+){3})$", capsys.readouterr().out, re.M)
    assert counts[1].split()[0] == "0"
    (train,) = load_parts(data_copy, "train", on_bad_file="skip", on_missing_class="go_on")
    assert set(train.labels.tolist()) == {1, 2}


def test_a_class_without_a_folder_makes_another_data_set(data_copy):
    """This does not hold where the classes are given, as by a checkpoint."""
    no_folder(data_copy / "axion")
    (train,) = load_parts(data_copy, "train")
    assert train.classes == ("cdm", "no_sub")
    assert set(train.labels.tolist()) == {0, 1}
    with pytest.raises(InputError, match=rf"^{data_copy}: no folder axion with \.npy, \.npz or FITS files$") as raised:
        load_parts(data_copy, "train", classes=CLASSES)
    assert raised.value.status == 2
    (train,) = load_parts(data_copy, "train", classes=CLASSES, on_missing_class="go_on")
    assert set(train.labels.tolist()) == {1, 2}


def test_images_deeper_in_a_class_folder_are_said_to_be_left_out(data_copy, capsys):
    write(data_copy / "cdm" / "more" / "0.npy", IMAGE)
    (data_copy / "axion" / "empty").mkdir()
    assert len(NpyDataset(data_copy)) == 144
    assert capsys.readouterr().out.startswith(f"{data_copy / 'cdm' / 'more'}: its images are left out")


def test_the_images_of_each_class_and_split_are_counted(lens_data, capsys):
    parts = dict(zip(("train", "val", "test"), load_parts(lens_data, "train", "val", "test"), strict=True))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert " ".join(lines[0]) == f"{lens_data}: 64x64 pixels in 1 channel(s)"
    assert lines[1] == [*CLASSES]
    for name, *counts in lines[2:]:
        assert [int(count) for count in counts] == torch.bincount(parts[name].labels).tolist()
        assert sum(map(int, counts)) == len(parts[name])


def test_a_subset_that_stands_for_the_whole_is_chosen_at_random():
    labels = torch.arange(3).repeat_interleave(100)
    index = some_of_each_class(labels, 40, seed=1)
    assert labels[index].tolist() == [0] * 40 + [1] * 40 + [2] * 40
    assert len(index.unique()) == 120
    for of_class in index.view(3, 40) % 100:
        assert 35 < of_class.double().mean() < 64  # the mean of the first 40 would be about 20
        assert of_class.diff().min() < 0
    assert torch.equal(index, some_of_each_class(labels, 40, seed=1))
    assert not torch.equal(index, some_of_each_class(labels, 40, seed=2))
    assert some_of_each_class(labels[95:], 40)[:5].sort().values.tolist() == [0, 1, 2, 3, 4]  # all that there are
    assert labels[100:][some_of_each_class(labels[100:], 7)].tolist() == [1] * 7 + [2] * 7  # not of a missing class


def test_file_names_may_be_any_bytes(tmp_path):
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for i in range(9):
            with open(os.fsencode(tmp_path / name) + b"/\xff\xe9%d.npy" % i, "wb") as file:
                np.save(file, IMAGE)
    first, second = NpyDataset(tmp_path), NpyDataset(tmp_path)
    assert len(list(tmp_path.glob(".lens_cache*"))) == 1
    assert first.files == second.files
    assert sum(len(first.part(part, "go_on")) for part in ("train", "val", "test")) == 27


def test_the_identity_of_images_outlives_a_copy_and_not_a_change(data_copy, tmp_path):
    def identity(folder):
        return NpyDataset(folder, split="train").identity

    before = identity(data_copy)
    shutil.copytree(data_copy, tmp_path / "copy")
    assert identity(tmp_path / "copy") == before
    path = data_copy / "cdm" / "0.npy"
    write(path, np.rot90(np.load(path)))
    assert identity(data_copy) != before


def test_every_subset_has_an_identity_of_its_own(lens_data):
    whole = NpyDataset(lens_data)
    before = whole.identity
    found = {before, *(whole.part(split).identity for split in ("train", "val", "test")), whole.only([]).identity}
    assert len(found) == 5
    assert whole.part("all").identity == before


# Split


def test_split_is_70_15_15_and_disjoint(lens_data):
    parts = [split_of(f"{i}.npy") for i in range(20000)]
    for part, share in {"train": 0.7, "val": 0.15, "test": 0.15}.items():
        assert abs(parts.count(part) / len(parts) - share) < 0.012  # four standard deviations
    files = [set(NpyDataset(lens_data, split=part).files) for part in ("train", "val", "test")]
    assert sum(map(len, files)) == len(set.union(*files)) == 144


def test_split_of_known_names_never_changes():
    assert " ".join(split_of(f"{i}.npy") for i in range(12)) == (
        "train train val train train train train test train val train train"
    )
    assert [split_of(f"data/axion/{i}.npy") for i in range(12)] == [split_of(f"elsewhere/{i}.npy") for i in range(12)]


def test_adding_files_moves_none(data_copy):
    before = set(NpyDataset(data_copy, split="test").files)
    for i in range(100, 120):
        write(data_copy / "cdm" / f"{i}.npy", IMAGE)
    after = set(NpyDataset(data_copy, split="test").files)
    assert before <= after
    assert len(NpyDataset(data_copy)) == 164


# Cache


def test_the_second_time_no_file_is_read(data_copy, monkeypatch):
    first = NpyDataset(data_copy)
    monkeypatch.setattr(dataset, "read_image", lambda path: pytest.fail("read a file again"))
    second = NpyDataset(data_copy)
    assert torch.equal(first.images, second.images)
    assert first.files == second.files


@pytest.mark.parametrize("change", ["add", "remove", "replace", "replace, same size and time", "rename"])
def test_a_changed_folder_is_read_again(data_copy, change):
    NpyDataset(data_copy)
    path = data_copy / "cdm" / "7.npy"
    status = path.stat()
    if change == "add":
        write(data_copy / "cdm" / "1000.npy", IMAGE)
    elif change == "remove":
        path.unlink()
    elif change == "rename":
        path.rename(data_copy / "cdm" / "1007.npy")
    else:
        write(path, IMAGE.astype(np.float32))
        if "time" in change:
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    data = NpyDataset(data_copy)
    files = sorted(str(p.relative_to(data_copy)) for p in data_copy.glob("*/*.npy"))
    assert sorted(data.files) == files
    if "replace" in change:
        np.testing.assert_allclose(data.images[data.files.index("cdm/7.npy")], normalize(IMAGE), atol=1e-6)
    assert len(list(data_copy.glob(".lens_cache*"))) == 1


def test_a_damaged_cache_is_not_used(data_copy):
    expected = NpyDataset(data_copy).images
    (cache,) = data_copy.glob(".lens_cache*")
    cache.write_bytes(cache.read_bytes()[:5000])
    assert torch.equal(NpyDataset(data_copy).images, expected)


def test_what_a_killed_packing_has_left_goes_with_the_next_one(data_copy):
    for name, age in {"old.npy.17": 7200, "old.npy.17.17.part": 7200, "new.npy.18": 60}.items():
        path = data_copy / f".lens_cache_{name}"
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)  # what is newer may be another script's
    NpyDataset(data_copy)
    left = {path.name for path in data_copy.glob(".lens_cache*.npy.*")}
    assert left == {".lens_cache_new.npy.18"}


def test_a_folder_that_cannot_be_written_still_loads(data_copy, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(dataset, "save_array", refuse)
    assert len(NpyDataset(data_copy)) == 144
    assert "cannot be written" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_read_once_for_all_its_splits(data_copy, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    read = []
    monkeypatch.setattr(dataset, "save_array", refuse)
    monkeypatch.setattr(dataset, "read_image", lambda path: read.append(path) or read_image(path))
    assert sum(map(len, load_parts(data_copy, "train", "val", "test"))) == 144
    assert len(read) == 144
    assert capsys.readouterr().out.count("cannot be written") == 1


def test_the_cache_can_be_kept_outside_the_data(data_copy, tmp_path, monkeypatch):
    other = shutil.copytree(data_copy, tmp_path / "other" / "data")
    folders, images = (data_copy, other), []
    write(other / "cdm" / "0.npy", IMAGE)
    for folder in folders:
        images.append(NpyDataset(folder, cache_dir=tmp_path / "cache").images)
    assert not any(list(folder.glob(".lens*")) for folder in folders)
    monkeypatch.setattr(dataset, "read_image", lambda path: pytest.fail("read a file again"))
    for folder, expected in zip(folders, images, strict=True):
        assert torch.equal(NpyDataset(folder, cache_dir=tmp_path / "cache").images, expected)


def test_the_folder_of_the_images_is_where_the_cache_is_anyway(data_copy):
    for _ in range(2):
        assert NpyDataset(data_copy, cache_dir=data_copy).classes == CLASSES


# Transforms and batches


def test_transforms_of_arrays_of_any_range():
    from models.classifier import classifier_transforms

    raw = 1000 + 50 * IMAGE
    image = diffusion_transforms(raw)
    assert image.shape == (1, 64, 64)
    assert (image.min().item(), image.max().item()) == (-1, 1)
    for size in (224, 64, 32):
        batch = classifier_transforms(torch.rand(5, 1, 64, 64), size)
        assert batch.shape == (5, 3, size, size)
    image = classifier_transforms(raw, 64) * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    image = image + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    torch.testing.assert_close(image, normalize(raw).expand(3, 64, 64), atol=1e-6, rtol=0)


def test_an_image_is_what_its_file_holds_whatever_is_done_with_it(lens_data):
    data = NpyDataset(lens_data, diffusion_transforms)
    before = data.images.clone()
    order = torch.randperm(len(data))
    for some in (order[:50], order[:1], slice(3, 9)):  # NumPy takes a tensor of one number for a number
        torch.testing.assert_close(data.read(some), before[some])
    images, labels = data[order]
    torch.testing.assert_close(images, before[order] * 2 - 1)
    assert torch.equal(labels, data.labels[order])
    assert torch.equal(data.images, before)


@pytest.mark.parametrize(("n", "batch_size"), [(108, 16), (108, 108), (7, 3), (1000, 1), (63000, 160)])
def test_every_image_comes_once_an_epoch_in_batches_of_one_size(n, batch_size):
    batches = epoch_batches(n, batch_size, seed=42, epoch=3)
    sizes = {len(batch) for batch in batches}
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert len(batches) == math.ceil(n / batch_size)
    order = torch.cat(batches)
    assert torch.equal(order.sort().values, torch.arange(n))
    assert torch.equal(order, torch.cat(epoch_batches(n, n, seed=42, epoch=3)))
    assert not torch.equal(order, torch.cat(epoch_batches(n, batch_size, seed=42, epoch=4)))


def test_no_class_is_called_as_the_tables_call_all_of_them(data_copy):
    (data_copy / "no_sub").rename(data_copy / "overall")
    with pytest.raises(InputError, match="overall: no class can have this name"):
        NpyDataset(data_copy)
    assert not are_classes(["axion", "overall"])
