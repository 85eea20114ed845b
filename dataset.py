"""Images from .npy files: read and checked once, packed, held in memory, split the same way for everybody.

    data/axion/*.npy   data/cdm/*.npy   data/no_sub/*.npy      or any other classes, one folder each

The folder says what it holds: its subfolders are the classes, in alphabetical order, and its files have the size and
the channels of the images. A file holds one square image of any numeric type and range, (s, s), (c, s, s) or (s, s, c).
The published axion files hold ``[image, axion mass]`` as a pickled object array; they load too, but nothing in a file
can run code: see ``_read_pickled_pair``. What hides an image when it is scaled (NaN, a pixel of -999, the same value
everywhere) makes its file a bad one.
"""

import copy
import hashlib
import io
import math
import os
import pickle
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

import nanodit_path  # noqa: F401
from files import contents, save_array
from settings import InputError

Shape = tuple[int, int, int]  # channels, height and width of an image

_SIZES, _MOST_CHANNELS = range(8, 257), 16  # pixels on a side
_ALL = "overall"  # in tables of metrics, all classes together
_VERSION = 2  # of the cache; change it when what is read from a file changes
# Some pixels hide the others when all but 1% on either side have less than this share of the range of an image, or when
# no pixel has a value in so large a share of it
_LEAST, _GAP = 0.02, 0.9
_LARGEST_FILE = 2**25  # bytes; the largest image of the widest numeric type takes half of it
_LARGEST_PAIR = 2**22  # bytes; a pickle of many small things takes many times its size


class NpyDataset(Dataset):
    """The images of a folder, or of one split of it, with their labels.

    Args:
        root_dir: folder with a folder of images for each class.
        transform: applied to the images of ``dataset[i]``, (..., c, s, s) in [0, 1]; None leaves them as they are.
        split: "train", "val", "test" or "all"; see ``split_of``.
        on_bad_file: "raise" reports every bad file of the folder and stops, "skip" reports them and goes on.
        on_missing_class: "raise" stops when a class has no image in the split, "go_on" does not.
        cache_dir: where the packed images are kept; in ``root_dir`` when None.
        classes: names of the class folders, as of a checkpoint; None finds them, see ``find_classes``.

    Attributes:
        classes: names of the labels 0, 1, ...
        image_shape: (c, s, s).
        images: (n, c, s, s) float32, each scaled to [0, 1] by its own minimum and maximum; read when first used.
        labels: (n,) int64, index into ``classes``.
        axion_mass: (n,) float64 in eV, NaN where the file gives none.
        files: path of each image relative to ``root_dir``.
        cache_dir: where results computed from the images are kept.
        fingerprint: another one when any file of the folder has been written anew.

    Raises:
        InputError: for a folder without classes, with bad files, or with no image of a class in the split.
    """

    def __init__(
        self,
        root_dir: str | Path,
        transform: Callable[[Tensor], Tensor] | None = None,
        split: str = "all",
        on_bad_file: str = "raise",
        on_missing_class: str = "raise",
        cache_dir: str | Path | None = None,
        classes: Iterable[str] | None = None,
    ):
        self.root_dir = Path(root_dir)
        self.cache_dir = _cache_folder(self.root_dir, cache_dir)
        self.transform = transform
        self.classes = find_classes(self.root_dir) if classes is None else tuple(classes)
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        self._packed, self.fingerprint = _load_folder(self.root_dir, self.classes, on_bad_file, self.cache_dir)
        self.image_shape: Shape = self._packed.dtype["image"].shape
        self._names = self._packed["file"].tolist()  # once: they lie scattered over the whole file
        vars(self).update(vars(self.part(split, on_missing_class)))

    def part(self, split: str, on_missing_class: str = "raise") -> "NpyDataset":
        """Another split of the same folder, which is not read again."""
        other = self.only(file for file in self._names if split in ("all", split_of(file)))
        missing = [name for name, count in other.counts().items() if not count]
        if missing and (on_missing_class == "raise" or not len(other)):
            classes = [file.split("/")[0] for file in self._names]
            problems = (_why_missing(self.root_dir / name, classes.count(name), split) for name in missing)
            raise InputError("; ".join(problems), status=2)
        return other

    def only(self, files: Iterable[str]) -> "NpyDataset":
        """The images of the same folder whose paths in it are among ``files``."""
        other, wanted = copy.copy(self), set(files)
        for computed in ("images", "identity"):
            vars(other).pop(computed, None)
        other._keep = np.flatnonzero([file in wanted for file in self._names])
        other.files = [self._names[i] for i in other._keep]
        other.labels = torch.tensor([self.class_to_idx[file.split("/")[0]] for file in other.files], dtype=torch.long)
        other.axion_mass = self._packed["axion_mass"][other._keep].copy()
        return other

    def counts(self) -> dict[str, int]:
        """Number of images of each class."""
        return dict(zip(self.classes, torch.bincount(self.labels, minlength=len(self.classes)).tolist(), strict=True))

    @cached_property
    def identity(self) -> str:
        """A hash of names and pixels, the same for a copy of the folder; another one when an image is another."""
        digest = hashlib.blake2b(repr(self.files).encode(), digest_size=8)
        for some in torch.arange(len(self)).split(4096):
            digest.update(self.read(some).numpy())
        return digest.hexdigest()

    @cached_property
    def images(self) -> Tensor:
        return self.read(slice(None))

    def read(self, index: Tensor | slice) -> Tensor:
        """Some of ``images``, read from the cache on disk without keeping the others in memory."""
        index = self._keep[np.asarray(index) if isinstance(index, Tensor) else index]
        return torch.from_numpy(self._packed["image"][index])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | Tensor) -> tuple[Tensor, Tensor]:
        """Image and label of an index, or images (n, ...) and labels (n,) of a tensor of indices."""
        images = self.images[index]
        return self.transform(images) if self.transform else images, self.labels[index]

    def to(self, device: str | torch.device) -> "NpyDataset":
        """Moves the whole set to a GPU when it takes less than half of the memory free there."""
        device = torch.device(device)
        if device.type == "cuda" and self.images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            self.images, self.labels = self.images.to(device), self.labels.to(device)
        return self


def load_parts(
    root_dir: str | Path,
    *splits: str,
    on_bad_file: str = "raise",
    on_missing_class: str = "raise",
    cache_dir: str | Path | None = None,
    classes: Iterable[str] | None = None,
) -> list[NpyDataset]:
    """Splits of a folder, which is read once, after a table of how many images of each class every split has.

    Raises:
        InputError: see ``NpyDataset``.
    """
    folder = NpyDataset(root_dir, None, "all", on_bad_file, "go_on", cache_dir, classes)
    print_counts({split: folder.part(split, "go_on") for split in ("train", "val", "test")}, str(root_dir))
    return [folder.part(split, on_missing_class) for split in splits]


def print_counts(parts: dict[str, NpyDataset], title: str) -> None:
    """A table of the images of each class in each subset."""
    counts = {name: part.counts() for name, part in parts.items()}
    classes = list(next(iter(counts.values())))
    first, width = max(map(len, (title, *parts))), max(9, 2 + max(map(len, classes)))
    print(f"{title:{first}}" + "".join(f"{name:>{width}}" for name in classes))
    for name, of_classes in counts.items():
        print(f"{name:{first}}" + "".join(f"{count:{width},}" for count in of_classes.values()))


def some_of_each_class(labels: Tensor, count: int, seed: int = 0) -> Tensor:
    """Indices of ``count`` random images of every class, or of all it has, class by class.

    Random, since the order of the files may be that of a property of the lenses.
    """
    generator = torch.Generator().manual_seed(seed)
    of_classes = (torch.nonzero(labels == label).flatten() for label in labels.unique())
    return torch.cat([of[torch.randperm(len(of), generator=generator)[:count]] for of in of_classes])


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """All n images of an epoch in random order, in batches of at most ``batch_size``, all as large to within one.

    The order depends on the seed and the epoch alone, and no image is left out or comes twice.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch))
    return order.tensor_split(math.ceil(n / batch_size))


def diffusion_transforms(images: np.ndarray | Tensor) -> Tensor:
    """Images of any range, (s, s) or (..., c, s, s), scaled for the generator: (..., c, s, s) in [-1, 1]."""
    return normalize(images).mul_(2).sub_(1)


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
        images = images.double()  # before the minimum is taken off: a faint source on a bright sky keeps its digits
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


def split_of(file: str | Path) -> str:
    """The split a file belongs to, "train" (70%), "val" (15%) or "test" (15%), by a hash of its name alone.

    So adding, removing or moving other files never changes it.
    """
    name = os.fsencode(Path(file).name)  # which need not be UTF-8
    fraction = int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64
    if fraction < 0.7:
        return "train"
    return "val" if fraction < 0.85 else "test"


def is_image_file(name: str) -> bool:
    """Whether a file of this name is taken for an image; hidden ones, caches and the "._0.npy" of a Mac, are not."""
    return name.endswith(".npy") and not name.startswith(".")


def read_image(path: str | Path, shape: Shape | None = None) -> tuple[np.ndarray, float]:
    """One .npy file: its image, (c, s, s) float32 in [0, 1], and its axion mass in eV, NaN if it has none.

    Args:
        shape: that the image must have; None takes any.

    Raises:
        InputError: with the path and what is wrong with the file.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a folder; a pipe or a device, which would never end
            raise InputError("is not a file")
        if status.st_size > _LARGEST_FILE:
            raise InputError("is larger than any image")
        pixels, mass = _read_npy(Path(path).read_bytes())
        image = normalize(pixels).numpy()
        if shape is not None and image.shape != shape:
            raise InputError(_other_shape(image.shape, shape))
        if problem := _what_hides(pixels):
            raise InputError(problem)
        return image, mass
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _other_shape(found: Shape, wanted: Shape) -> str:
    """The complaint about an image of another shape; the only channel is left out."""
    found, wanted = (str(shape[1:] if shape[0] == 1 else shape) for shape in (found, wanted))
    return f"has shape {found}, not {wanted}"


def _what_hides(pixels: np.ndarray) -> str | None:
    """The complaint about pixels that leave nothing of an image scaled to its minimum and maximum; None for sound ones.

    Few pixels do, far from all others, and so do wide tails: a hundredth of all on either side.
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
    if steps.max() < _GAP * whole_range or (len(few) > 4 and rest[0] == rest[-1]):  # a picture in two values is one
        if not 0 < scaled[-1 - tail] - scaled[tail] < _LEAST * whole_range:
            return None
        hiding, few, rest = "pixels", values, values[tail : -1 - tail]
    return f"has {hiding} from {few[0]:g} to {few[-1]:g}, which hide the others, from {rest[0]:g} to {rest[-1]:g}"


def _read_npy(content: bytes) -> tuple[np.ndarray, float]:
    """Pixels in float64, with their axes as in the file, and axion mass in the bytes of a .npy file."""
    if not content:
        raise InputError("is empty")
    if not content.startswith(np.lib.format.MAGIC_PREFIX):
        raise InputError("is not a .npy file")
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(file)
    except Exception:  # NumPy parses the header as Python text: a damaged one can raise nearly anything
        raise InputError("has a damaged header") from None
    body = content[file.tell() :]
    if dtype.kind == "O" and shape == (2,):
        return _read_pickled_pair(body)
    _check_image(shape, dtype)
    if len(body) < dtype.itemsize * math.prod(shape):
        raise InputError("is truncated")
    pixels = np.frombuffer(body, dtype, math.prod(shape)).reshape(shape, order="F" if fortran_order else "C")
    return pixels.astype(np.float64), np.nan


def _check_image(shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raises InputError unless an array is an image."""
    if dtype.kind not in "buif":
        raise InputError(f"holds values of type {dtype}, not real numbers")
    if not is_image_shape(_channels_first(shape)):
        wanted = f"square, of {_SIZES[0]} to {_SIZES[-1]} pixels, with {_MOST_CHANNELS} channels at most"
        raise InputError(f"has shape {shape}: an image is {wanted}")


class _NumpyUnpickler(pickle._Unpickler):
    """Builds NumPy arrays and scalars and refuses every other thing a pickle can name.

    The unpickler written in Python, since the one in C allocates whatever a damaged file asks for.
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


def _read_pickled_pair(body: bytes) -> tuple[np.ndarray, float]:
    """The published axion format: an object array ``[image, axion mass]``, pickled by NumPy 1.x or 2.x."""
    if len(body) > _LARGEST_PAIR:
        raise InputError("is larger than any pair of image and axion mass")
    try:
        image, mass = _NumpyUnpickler(io.BytesIO(body)).load()
        _check_image(image.shape, image.dtype)
        return image.astype(np.float64), float(mass)
    except InputError:
        raise
    except Exception:  # a damaged pickle can raise nearly anything
        raise InputError("is not a pair of image and axion mass, or is damaged") from None


def _cache_folder(root: Path, cache_dir: str | Path | None) -> Path:
    """Where the cache of a folder is: in the folder, or in one of its own under ``cache_dir``."""
    if cache_dir is None:
        return root
    place = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:8]
    return Path(cache_dir) / f"{root.resolve().name}_{place}"


def _why_missing(folder: Path, count: int, split: str) -> str:
    """The reason that a class of ``count`` images has none in a split, and the remedy."""
    if count:
        hashed = "to which a hash of the name assigns them: add images"
        return f"{folder}: none of its {count} images is in the split {split!r}, {hashed}"
    if not folder.is_dir():
        return f"{folder.parent}: no folder {folder.name} with .npy files"
    if here := list(filter(is_image_file, os.listdir(folder))):
        return f"{folder}: all of its {len(here)} files are bad"
    deeper = next((path.parent for path in sorted(folder.glob("*/**/*.npy")) if is_image_file(path.name)), None)
    advice = f", but in {deeper}: move them up" if deeper else ": add some, or move it away if it is no class"
    return f"{folder}: no .npy files in it{advice}"


def find_classes(root: Path) -> tuple[str, ...]:
    """Names of the class folders of a folder, in alphabetical order, which gives the labels 0, 1, ...

    Every folder counts, also one without images, which is a class whose images are missing.

    Raises:
        InputError: when there is none, or one with a name that no class can have.
    """
    folders = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    if classes := tuple(sorted(filter(is_class_name, folders))):
        if _ALL in classes:
            raise InputError(f"{root / _ALL}: no class can have this name, which stands for all images: rename it", 2)
        return classes
    what = f"it {contents(root)}" if root.is_dir() else "there is no such folder"
    advice = "simulate/simulate_lenses.py makes some"
    raise InputError(f"{root}: no class folders with .npy files, {what}; {advice}", status=2)


def is_class_name(name: Any) -> bool:
    """Whether a class can have this name, that of its folder: not of a hidden one, or one that scripts here make."""
    return isinstance(name, str) and bool(re.fullmatch(r"(?!\.|__pycache__$|earlier_\d+$)[^/\0]+", name))


def are_classes(names: Any) -> bool:
    """Whether data can have classes of these names, which a file gives: a list of different ones."""
    return (
        isinstance(names, list | tuple) and all(map(is_class_name, names)) and len({*names} - {_ALL}) == len(names) > 0
    )


def is_image_shape(shape: Sequence[int]) -> bool:
    """Whether an image can have this shape, (c, s, s)."""
    return len(shape) == 3 and 0 < shape[0] <= _MOST_CHANNELS and shape[1] == shape[2] and shape[1] in _SIZES


def _load_folder(root: Path, classes: tuple[str, ...], on_bad_file: str, cache_dir: Path) -> tuple[np.ndarray, str]:
    """The images of a folder as records (file, image, axion_mass), from its cache when that is fresh, and fingerprint.

    Raises:
        InputError: with every bad file, unless they are to be skipped; when there is no other one.
    """
    listing = _list_files(root, classes)
    fingerprint = hashlib.sha256(repr((listing, _VERSION)).encode()).hexdigest()[:16]
    cache = cache_dir / f".lens_cache_{fingerprint}.npy"
    with suppress(OSError, ValueError, EOFError):  # it is absent, or was cut short by a full disk
        return np.load(cache, mmap_mode="r", allow_pickle=False), fingerprint
    packed, problems = _read_files(root, [file for file, *_ in listing])
    if not problems:
        _write_cache(cache, packed)
        return packed, fingerprint
    report = f"{len(problems)} bad files of {len(listing)} in {root}:\n  " + "\n  ".join(problems)
    if on_bad_file == "raise" or len(problems) == len(listing):
        raise InputError(report + '\nremove or mend them, or set ON_BAD_FILE = "skip"')
    print(report + "\nskipped")
    return packed[packed["file"] != ""], fingerprint  # without a cache: every run reports its bad files


def _read_files(root: Path, names: list[str], shape: Shape | None = None) -> tuple[np.ndarray | None, list[str]]:
    """Records of the sound images, at the places of their names, and what is wrong with the other files.

    All have the shape of most of them: that of the first one, or else everything is read again.
    """
    packed, problems, shapes = None, [], Counter()
    for i, name in enumerate(tqdm(names, f"reading {root}", unit="file", leave=False)):
        try:
            image, mass = read_image(root / name)
            shape = shape or image.shape
            shapes[image.shape] += 1
            if image.shape != shape:
                raise InputError(f"{root / name}: {_other_shape(image.shape, shape)}")
            if packed is None:
                length = max(map(len, names))
                packed = np.zeros(len(names), [("file", f"U{length}"), ("image", "f4", shape), ("axion_mass", "f8")])
            packed[i] = (name, image, mass)
        except InputError as error:
            problems.append(str(error))
    most = max(shapes, key=shapes.get, default=shape)
    return (packed, problems) if most == shape else _read_files(root, names, most)


def _list_files(root: Path, classes: tuple[str, ...]) -> list[tuple[str, int, int, int]]:
    """(relative path, size, times of change) of every image, which tells when the folder has changed."""
    listing = []
    for folder in (root / name for name in classes if (root / name).is_dir()):
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False) and any(map(is_image_file, os.listdir(entry))):
                print(f"{entry.path}: its images are left out, as only those of {folder} itself count")
            elif is_image_file(entry.name):
                size_and_times = -1, -1, -1
                with suppress(OSError):  # a broken link; reading it will say so
                    status = entry.stat()
                    size_and_times = status.st_size, status.st_mtime_ns, status.st_ctime_ns
                listing.append((f"{folder.name}/{entry.name}", *size_and_times))
    if not listing:
        problems = "; ".join(_why_missing(root / name, 0, "all") for name in classes)
        raise InputError(f"{root}: no .npy files in its class folders: {problems}", status=2)
    return sorted(listing)


def _write_cache(path: Path, packed: np.ndarray) -> None:
    """Writes the cache of a folder in place of its older ones; it appears whole or not at all."""
    try:
        save_array(path, packed)
        for old in path.parent.glob(".lens_cache_*.npy"):
            if old != path:
                old.unlink(missing_ok=True)  # another script may be at the same
    except OSError as error:
        advice = "the files will be read again next time, unless CACHE_DIR names a folder that can be written to"
        print(f"{path} cannot be written ({error.strerror}): {advice}")
