"""One file of images: its bytes are read and checked here, whatever its format; nothing in a file can run code.

A file holds one square image of any numeric type and range, (s, s), (c, s, s) or (s, s, c), or a stack of n of them,
(n, s, s), (n, c, s, s) or (n, s, s, c):

    .npy                     an array, or a pickled ``[image, axion mass]`` or ``[image, v1, v2, v3, v4]``
    .npz                     its only array, or the one called image or images
    .fits .fit (.gz .fz)     the first image in it that has pixels

An image is bad if scaling would hide it: it has a NaN, a pixel of -999, say, or the same value everywhere.
"""

import errno
import io
import math
import os
import pickle
import re
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from settings import InputError

if TYPE_CHECKING:
    from astropy.io import fits

Shape = tuple[int, int, int]  # channels, height and width of an image

KINDS = ".npy, .npz or FITS files"  # what is read, in words
MOST_VALUES = 4  # numbers that may follow the image in a pickled file
_FITS = (".fits", ".fit", ".fits.gz", ".fit.gz", ".fits.fz", ".fit.fz")
_ENDINGS = (".npy", ".npz", *_FITS)
_SIZES, _MOST_CHANNELS = range(8, 257), 16  # pixels on a side, and channels
# Some pixels hide the others when all but 1% on either side span less than _LEAST of the range of an image, or when a
# gap without any pixel value spans at least _GAP of it
_LEAST, _GAP = 0.002, 0.9
_LARGEST_FILE = 2**25  # bytes; the largest image of the widest numeric type takes half of it
_LARGEST_PAIR = 2**22  # bytes; many small objects take many times the size of their pickle in memory
_MOST_HDUS = 100  # HDUs of a FITS file that are searched for the image
_LONGEST_HEADER = 2**16  # bytes, of a .npy file; NumPy itself refuses a longer header only after reading it


class StackError(InputError):
    """A stack where one image was wanted; ``read_stack`` reads it."""


class LensImage(tuple):
    """An image, (c, s, s) float32 in [0, 1], and its axion mass in eV, NaN if it has none: ``image, mass = ...``

    Attributes:
        low, high: minimum and maximum of the pixels in the file; these became 0 and 1.
        values: (4,) numbers that follow the image in a pickled file, the axion mass first; NaN where there are none.
        pixel_scale: in arcsec, from the FITS header; NaN for other files.
    """

    low: float
    high: float
    values: tuple[float, ...]
    pixel_scale: float

    def __new__(cls, pixels: np.ndarray, values: Sequence[float] = (), pixel_scale: float = np.nan) -> "LensImage":
        values = (*values, *[np.nan] * (MOST_VALUES - len(values)))
        image = super().__new__(cls, (normalize(pixels).numpy(), values[0]))
        image.low, image.high = float(pixels.min()), float(pixels.max())
        image.values, image.pixel_scale = values, pixel_scale
        return image


def is_image_file(name: str) -> bool:
    """Whether a file of this name counts as an image; hidden ones, such as caches and a Mac's "._0.npy", do not."""
    return name.lower().endswith(_ENDINGS) and not name.startswith(".")


def stem_of(name: str) -> str:
    """The name of a file without the ending of an image, which may have two parts, such as ".fits.gz"."""
    ending = max((ending for ending in _ENDINGS if name.lower().endswith(ending)), key=len, default="")
    return name[: len(name) - len(ending)]


def read_image(path: str | Path, shape: Shape | None = None) -> LensImage:
    """The image of a file that holds one: ``image, mass = read_image(path)``, see ``LensImage``.

    Args:
        shape: that the image must have; None takes any.

    Raises:
        InputError: with the path and what is wrong with the file; a ``StackError`` when it is a stack.
    """
    with _naming(path), _opened(path) as array:
        if count_images(array.shape) is not None:
            one = f"an image is {_wanted()}"
            raise StackError(f"has shape {array.shape}: as a stack it holds {array.shape[0]} images, {one}")
        pixels = array.whole()
        return _checked(pixels, array, shape)


def read_stack(path: str | Path, count: int | None = None) -> Iterator[LensImage | InputError]:
    """Yields the images of a stack in order, an InputError in place of a bad one; one image at a time is in memory.

    Args:
        count: number of images that there must be; an array (count, s, s) is then a stack, not an image of channels.

    Raises:
        InputError: with the path and what is wrong with the whole file.
    """
    with _naming(path), _opened(path) as array:
        shape, found = array.shape, count_images(array.shape)
        if len(shape) == 3 and count == shape[0] and is_image_shape((1, *shape[1:])):
            found = count
        if count not in (None, found):
            raise InputError(f"holds {found or 'no stack of'} images, but there are {count} labels")
        for k, pixels in enumerate(array.parts()):
            try:
                with _naming(f"{path}#{k}"):
                    yield _checked(pixels, array)
            except InputError as error:
                yield error


def is_stack(path: str | Path) -> bool | None:
    """Whether a file is a stack of images, True, or one image, False; None when it is neither."""
    with suppress(InputError), _naming(path), _opened(path) as array:
        return count_images(array.shape) not in (None, 1)  # radio telescopes write one image as a stack of one
    return None


def read_keywords(path: str | Path, names: Sequence[str]) -> dict[str, tuple[float, str]]:
    """Those of ``names`` that are numbers in the image header of a FITS file, with their units, given in brackets at
    the start of the comments; {} for any other file."""
    found = {}
    if str(path).lower().endswith(_FITS):
        with suppress(OSError, InputError), open(path, "rb") as file, _parsing("FITS"), _hdus(file) as hdus:
            header = _image_of(hdus).header
            for name in names:
                if isinstance(value := header.get(name), int | float) and not isinstance(value, bool):
                    unit = re.match(r"\[(.*?)\]", header.comments[name])
                    found[name] = float(value), unit[1] if unit else ""
    return found


def is_table(path: str | Path) -> bool:
    """Whether a file is a sound FITS file without any image, as a catalogue is."""
    if not str(path).lower().endswith(_FITS):
        return False
    with suppress(OSError, InputError), open(path, "rb") as file, _parsing("FITS"):
        if re.search(rb"NAXIS   = +[1-9]", file.read(2880)):  # an image comes first; asking astropy takes milliseconds
            return False
        file.seek(0)
        with _hdus(file) as hdus:
            return _image_of(hdus) is None
    return False


def count_images(shape: tuple[int, ...]) -> int | None:
    """Number of images in a stack of a shape; None for the shape of one image.

    Raises:
        InputError: for any other shape.
    """
    if is_image_shape(_channels_first(shape)):
        return None
    if len(shape) in (3, 4) and shape[0] > 0 and is_image_shape(_channels_first(shape[1:])):
        return shape[0]
    raise InputError(f"has shape {shape}: an image is {_wanted()}{_how_to_crop(shape)}")


def other_shape(found: Shape, wanted: Shape) -> str:
    """The complaint about an image of another shape; it leaves out the axis of a single channel."""
    remedy = ""
    if found[0] == wanted[0]:
        size, to = found[-1], wanted[-1]
        remedy = f": resize it, as with scipy.ndimage.zoom(image, {to / size:g})" if size < to else _slices(found, to)
    found, wanted = (str(shape[1:] if shape[0] == 1 else shape) for shape in (found, wanted))
    return f"has shape {found}, not {wanted}{remedy}"


def _wanted() -> str:
    return f"square, of {_SIZES[0]} to {_SIZES[-1]} pixels, with {_MOST_CHANNELS} channels at most"


def _how_to_crop(shape: tuple[int, ...]) -> str:
    """The advice to crop an array that is no image to its central square; "" where that would be no image either."""
    if len(shape) not in (2, 3, 4) or (len(shape) == 3 and shape[0] == shape[1] and shape[2] > _MOST_CHANNELS):
        return ""
    behind = len(shape) > 2 and shape[-1] <= _MOST_CHANNELS < min(shape[-3:-1])  # channels are the last axis
    sides = shape[-3:-1] if behind else shape[-2:]
    size = min(*sides, _SIZES[-1])
    return _slices(sides, size, ", :" if behind else "") if size in _SIZES and {*sides} != {size} else ""


def _slices(sides: Sequence[int], size: int, behind: str = "") -> str:
    """The advice for an image that is too large: to crop it to its central square of ``size`` pixels."""
    starts = [(side - size) // 2 for side in sides[-2:]]
    square = ", ".join(f"{start}:{start + size}" for start in starts)
    return f": crop it, as with image[..., {square}{behind}], or resize it"


class _Array(NamedTuple):
    """What is known of the array in a file before its pixels are read."""

    shape: tuple[int, ...]
    whole: Callable[[], np.ndarray]  # its pixels
    parts: Callable[[], Iterator[np.ndarray]]  # the same, image by image
    values: tuple[float, ...] = ()
    pixel_scale: float = np.nan


def _checked(pixels: np.ndarray, array: _Array, shape: Shape | None = None) -> LensImage:
    """An image, from its pixels with their axes as in the file."""
    pixels = pixels.astype(np.float64)
    image = LensImage(pixels, array.values, array.pixel_scale)
    if shape is not None and image[0].shape != shape:
        raise InputError(other_shape(image[0].shape, shape))
    if problem := _what_hides(pixels):
        raise InputError(problem)
    return image


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Puts the path of a file in front of the errors about it."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


@contextmanager
def _opened(path: str | Path) -> Iterator[_Array]:
    """The array of a file, to be read while it is open.

    Raises:
        InputError: with what is wrong with the file, without its path.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # a folder; a pipe or a device, which would never end
        raise InputError("is not a file")
    name, size = str(path).lower(), status.st_size
    with open(path, "rb") as file:
        if not file.peek(1):
            raise InputError("is empty")
        if name.endswith(".npz"):
            with _parsing(".npz"), zipfile.ZipFile(file) as archive:
                yield _open_npz(archive)
        elif name.endswith(_FITS):
            with _parsing("FITS"), _hdus(file) as hdus:
                yield _open_fits(hdus)
        else:
            array = _open_npy(file, size)
            if size > _LARGEST_FILE and count_images(array.shape) is None:
                raise InputError("is larger than any image")
            yield array


@contextmanager
def _parsing(kind: str) -> Iterator[None]:
    """Reports a file as damaged, whatever error reading it raises: that can be nearly anything."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise InputError(f"is not a {kind} file, or is damaged") from None


def _open_npy(file: BinaryIO, size: int, zipped: bool = False) -> _Array:
    """The array of a .npy file of ``size`` bytes; a ``zipped`` file can only be read from its start to its end."""
    head = file.read(_LONGEST_HEADER)
    if not head.startswith(np.lib.format.MAGIC_PREFIX):
        raise InputError("is larger than any image" if size > _LARGEST_FILE else "is not a .npy file")
    start = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(start)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(start)
    except Exception:  # NumPy parses the header as Python text: a damaged one can raise nearly anything
        raise InputError("has a damaged header") from None
    offset = start.tell()
    if dtype.kind == "O" and shape in ((2,), (1 + MOST_VALUES,)) and not zipped:
        body = head[offset:] + file.read(_LARGEST_PAIR + 1)
        image, values = _read_pickled(body, shape[0] - 1)
        return _Array(image.shape, lambda: image, lambda: iter((image,)), values)
    _check_type(dtype)
    count_images(shape)  # raises before as much is read as a damaged header asks for
    order = "F" if fortran_order else "C"
    if size < offset + dtype.itemsize * math.prod(shape):
        raise InputError("is truncated")
    rest = head[offset:]

    def read(shape: tuple[int, ...]) -> np.ndarray:
        nonlocal rest
        length = dtype.itemsize * math.prod(shape)
        content, rest = rest[:length], rest[length:]
        content += file.read(length - len(content))
        if len(content) < length:
            raise InputError("is truncated")
        return np.frombuffer(content, dtype).reshape(shape, order=order)

    def parts() -> Iterator[np.ndarray]:
        if fortran_order and zipped:
            raise InputError("is in Fortran order: np.ascontiguousarray puts one image after the other")
        if fortran_order:
            yield from np.memmap(file, dtype, "r", offset, shape, order)
        else:
            for _ in range(shape[0]):
                yield read(shape[1:])

    return _Array(shape, lambda: read(shape), parts)


def _check_type(dtype: np.dtype) -> None:
    """Raises InputError unless pixels can have this type."""
    if dtype.kind not in "buif":
        raise InputError(f"holds values of type {dtype}, not real numbers")


def _what_hides(pixels: np.ndarray) -> str | None:
    """The complaint about an image of which nothing is visible when scaled by its minimum and maximum; None for others.

    A few pixels far from all others hide the rest, and so do wide tails of a hundredth of all pixels on either side.
    """
    if not np.isfinite(pixels).all():
        return "holds NaN or Inf"
    values = np.sort(pixels, axis=None)
    if values[0] == values[-1]:
        return f"is blank: every pixel is {values[0]:g}"
    scaled = values / max(abs(values[0]), abs(values[-1]))
    steps, whole_range, tail = np.diff(scaled), scaled[-1] - scaled[0], len(values) // 100
    edge = int(steps.argmax()) + 1
    few, rest = sorted((values[:edge], values[edge:]), key=len)
    hiding = "1 pixel" if len(few) == 1 else f"{len(few)} pixels"
    if steps.max() < _GAP * whole_range or (len(few) > 4 and rest[0] == rest[-1]):  # a picture of two values is sound
        if not 0 < scaled[-1 - tail] - scaled[tail] < _LEAST * whole_range:
            return None
        hiding, few, rest = "pixels", values, values[tail : -1 - tail]
    return f"has {hiding} from {few[0]:g} to {few[-1]:g}, which hide the others, from {rest[0]:g} to {rest[-1]:g}"


class _NumpyUnpickler(pickle._Unpickler):
    """Builds NumPy arrays and scalars and refuses everything else that a pickle can name.

    It extends the unpickler written in Python, since the one in C allocates whatever a damaged file asks for.
    """

    ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
        ("multiarray", "scalar"): np._core.multiarray.scalar,
        ("numeric", "_frombuffer"): np._core.numeric._frombuffer,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str):
        short = module.removeprefix("numpy.core.").removeprefix("numpy._core.")  # NumPy 1 and NumPy 2
        if (short, name) not in self.ALLOWED:
            raise InputError(f"refused: its pickle asks for {module}.{name}")
        return self.ALLOWED[short, name]


def _read_pickled(body: bytes, count: int) -> tuple[np.ndarray, tuple[float, ...]]:
    """The published axion format, and others like it: an object array of an image and ``count`` values, pickled by
    NumPy 1.x or 2.x."""
    kind = "pair of image and axion mass" if count == 1 else f"image with {count} values"
    if len(body) > _LARGEST_PAIR:
        raise InputError(f"is larger than any {kind}")
    try:
        image, *values = _NumpyUnpickler(io.BytesIO(body)).load()
        _check_type(image.dtype)
        if len(values) != count or count_images(image.shape) is not None:
            raise InputError(f"has shape {image.shape}: an image is {_wanted()}")
        return image, tuple(map(float, values))
    except InputError:
        raise
    except Exception:  # a damaged pickle can raise nearly anything
        raise InputError(f"is not a{'n' if count > 1 else ''} {kind}, or is damaged") from None


def _open_npz(archive: zipfile.ZipFile) -> _Array:
    arrays = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    names = list(arrays) if len(arrays) == 1 else [name for name in ("image", "images") if name in arrays]
    if len(names) != 1:
        raise InputError(f"holds {len(arrays)} arrays: call that of the image, or images, 'images'")
    if names == ["images"] and "labels" in arrays:
        raise InputError("holds labels, too: save both as images.npy and labels.npy, which are read together")
    member = arrays[names[0]]
    return _open_npy(archive.open(member), member.file_size, zipped=True)


@contextmanager
def _hdus(file: BinaryIO) -> "Iterator[fits.HDUList]":
    from astropy.io import fits  # here, since it takes a second and few need it

    with _quiet():
        hdus = fits.open(file, memmap=False)
    with hdus:
        yield hdus


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the warnings of astropy: this file finds what is wrong with an image by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _image_of(hdus: "fits.HDUList") -> "fits.ImageHDU | None":
    """The first image that has pixels; None if there are only tables."""
    with _quiet():
        # A damaged header may make astropy go back in the file, again and again
        return next((hdu for hdu in islice(hdus, _MOST_HDUS) if hdu.is_image and hdu.shape), None)


def _open_fits(hdus: "fits.HDUList") -> _Array:
    """The first image of a FITS file; astropy swaps its bytes, scales it, and makes its blank pixels NaN."""
    hdu = _image_of(hdus)
    if hdu is None:
        raise InputError("holds no image")
    count_images(hdu.shape)  # raises before as much is read as a damaged header asks for

    def read(*index: int) -> np.ndarray:
        with _quiet():
            return np.asarray(hdu.section[index or ...])

    return _Array(hdu.shape, read, lambda: map(read, range(hdu.shape[0])), (), _pixel_scale(hdu.header))


def _pixel_scale(header: "fits.Header") -> float:
    """Pixel scale in arcsec, the mean of both axes, from the world coordinates of a header; NaN without sound ones."""
    if "CTYPE1" not in header:
        return np.nan
    from astropy.wcs import WCS
    from astropy.wcs.utils import proj_plane_pixel_scales

    with suppress(Exception), _quiet():  # astropy can raise nearly anything
        found = WCS(header)
        if found.has_celestial:
            return 3600 * float(np.mean(proj_plane_pixel_scales(found.celestial)))
    return np.nan


def is_image_shape(shape: Sequence[int]) -> bool:
    """Whether an image can have this shape, (c, s, s)."""
    return len(shape) == 3 and 0 < shape[0] <= _MOST_CHANNELS and shape[1] == shape[2] and shape[1] in _SIZES


def normalize(images: np.ndarray | Tensor) -> Tensor:
    """Scales each image to [0, 1] by its own minimum and maximum over all channels; a constant one becomes zeros.

    Takes (s, s), (s, s, c) or (..., c, s, s) of any numeric type, returns (..., c, s, s) float32.
    """
    images = torch.as_tensor(images)
    if images.dim() == 2:
        images = images[None]
    elif _channels_first(images.shape) != images.shape:
        images = images.movedim(-1, 0)
    if images.dtype != torch.float32:
        images = images.double()  # before the minimum is subtracted: a faint source on a bright sky keeps its digits
        images = images / images.abs().amax((-3, -2, -1), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    low = images.amin((-3, -2, -1), keepdim=True)
    images = images - low
    return images.div_(images.amax((-3, -2, -1), keepdim=True).clamp_min_(torch.finfo(images.dtype).tiny)).float()


def _channels_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape (c, s, s) of an image that is (s, s), (s, s, c) or (c, s, s); any other one as it is."""
    if len(shape) == 2:
        return 1, *shape
    if len(shape) == 3 and shape[0] == shape[1]:
        return shape[2], *shape[:2]
    return shape
