"""Lens images from .npy files: read and checked once, packed, held in memory, split the same way for everybody.

    data/axion/*.npy   data/cdm/*.npy   data/no_sub/*.npy

A file holds one 64x64 image of any numeric type and any range. The published axion files hold ``[image, axion mass]``
as a pickled object array; they load too, but nothing in a file can run code: see ``_read_pickled_pair``. What hides an
image when it is scaled (NaN, a pixel of -999, the same value everywhere) makes its file a bad one.
"""

import copy
import hashlib
import io
import os
import pickle
import stat
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvf
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

import nanodit_path  # noqa: F401
from files import save_array
from settings import InputError

CLASSES = ("axion", "cdm", "no_sub")  # alphabetical, as the published labels 0, 1, 2
IMG_SIZE = 64

_SHAPES = ((IMG_SIZE, IMG_SIZE), (1, IMG_SIZE, IMG_SIZE), (IMG_SIZE, IMG_SIZE, 1))
_VERSION = 2  # of the cache; change it when what is read from a file changes
# Some pixels hide the others when all but 1% on either side have less than this share of the range of an image, or when
# no pixel has a value in so large a share of it
_LEAST, _GAP = 0.02, 0.9
_LARGEST_FILE = 2**20  # bytes; an image of the widest numeric type takes an eighth of it


class NpyDataset(Dataset):
    """The images of a folder, or of one part of it, with their labels.

    Args:
        root_dir: folder with the class folders ``axion``, ``cdm`` and ``no_sub``.
        transform: what ``dataset[i]`` applies to the images, (..., 1, 64, 64) in [0, 1]; nothing when None.
        split: "train", "val", "test" or "all"; see ``split_of``.
        on_bad_file: "raise" reports every bad file of the folder and stops, "skip" reports them and goes on.
        on_missing_class: "raise" stops when a class has no image in the split, "go_on" does not.
        cache_dir: where the packed images are kept; in ``root_dir`` when None.

    Attributes:
        images: (n, 1, 64, 64) float32, each scaled to [0, 1] by its own minimum and maximum; read when first used.
        labels: (n,) int64, index into ``classes``.
        axion_mass: (n,) float64 in eV, NaN where the file gives none.
        files: path of each image relative to ``root_dir``.
        cache_dir: where what is computed of the images is kept.
        fingerprint: another one when any file of the folder has been written anew.

    Raises:
        InputError: for a folder without the three classes, with bad files, or with no image of a class in the split.
    """

    def __init__(
        self,
        root_dir: str | Path,
        transform: Callable[[Tensor], Tensor] | None = None,
        split: str = "all",
        on_bad_file: str = "raise",
        on_missing_class: str = "raise",
        cache_dir: str | Path | None = None,
    ):
        self.root_dir = Path(root_dir)
        self.cache_dir = _cache_folder(self.root_dir, cache_dir)
        self.transform = transform
        self.classes = CLASSES
        self.class_to_idx = {name: label for label, name in enumerate(CLASSES)}
        self._packed, self.fingerprint = _load_folder(self.root_dir, on_bad_file, self.cache_dir)
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
        other.__dict__.pop("images", None)
        other._keep = np.flatnonzero([file in wanted for file in self._names])
        other.files = [self._names[i] for i in other._keep]
        other.labels = torch.tensor([self.class_to_idx[file.split("/")[0]] for file in other.files], dtype=torch.long)
        other.axion_mass = self._packed["axion_mass"][other._keep].copy()
        return other

    def counts(self) -> dict[str, int]:
        """Number of images of each class."""
        return dict(zip(CLASSES, torch.bincount(self.labels, minlength=len(CLASSES)).tolist(), strict=True))

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
) -> list[NpyDataset]:
    """Splits of a folder, which is read once, after a table of how many images of each class every split has.

    Raises:
        InputError: see ``NpyDataset``.
    """
    folder = NpyDataset(root_dir, None, "all", on_bad_file, "go_on", cache_dir)
    print_counts({split: folder.part(split, "go_on") for split in ("train", "val", "test")}, str(root_dir))
    return [folder.part(split, on_missing_class) for split in splits]


def print_counts(parts: dict[str, NpyDataset], title: str) -> None:
    """A table of the images of each class in each part."""
    width = max(map(len, (title, *parts)))
    print(f"{title:{width}}" + "".join(f"{name:>9}" for name in CLASSES))
    for name, part in parts.items():
        print(f"{name:{width}}" + "".join(f"{count:9,}" for count in part.counts().values()))


def some_of_each_class(labels: Tensor, count: int, seed: int = 0) -> Tensor:
    """Indices of ``count`` random images of every class, or of all it has, class by class.

    Random, since the order of the files may be that of a property of the lenses.
    """
    generator = torch.Generator().manual_seed(seed)
    of_classes = (torch.nonzero(labels == label).flatten() for label in range(len(CLASSES)))
    return torch.cat([of[torch.randperm(len(of), generator=generator)[:count]] for of in of_classes])


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """All n images of an epoch in random order, in batches of at most ``batch_size``, all as large to within one.

    The order depends on the seed and the epoch alone, and no image is left out or comes twice.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch))
    return order.tensor_split(-(-n // batch_size))


def diffusion_transforms(images: np.ndarray | Tensor) -> Tensor:
    """Images (..., 64, 64) of any range to what the generator is trained on: (..., 1, 64, 64) in [-1, 1]."""
    return normalize(images).mul_(2).sub_(1)


def classifier_transforms(images: np.ndarray | Tensor, size: int = 224) -> Tensor:
    """Images of any range to what ResNet18 takes: (..., 3, size, size) with the mean and spread of ImageNet."""
    images = normalize(images)
    if size != IMG_SIZE:
        images = tvf.resize(images, [size, size], antialias=True)
    images = images.expand(*images.shape[:-3], 3, size, size)
    return tvf.normalize(images, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


def normalize(images: np.ndarray | Tensor) -> Tensor:
    """Scales each image to [0, 1] by its own minimum and maximum; a constant image becomes zeros.

    Takes (64, 64), (64, 64, 1) or (..., 1, 64, 64) of any numeric type, returns (..., 1, 64, 64) float32.
    """
    images = torch.as_tensor(images)
    if tuple(images.shape[-3:]) == _SHAPES[2]:
        images = images.squeeze(-1)
    if images.dim() == 2:
        images = images[None]
    if images.dtype != torch.float32:
        images = images.double()  # before the minimum is taken off: a faint source on a bright sky keeps its digits
        images = images / images.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    low = images.amin((-2, -1), keepdim=True)
    images = images - low
    return images.div_(images.amax((-2, -1), keepdim=True).clamp_min_(torch.finfo(images.dtype).tiny)).float()


def split_of(file: str | Path) -> str:
    """The part a file belongs to, "train" (70%), "val" (15%) or "test" (15%), by a hash of its name alone.

    So adding, removing or moving other files never changes it.
    """
    name = os.fsencode(Path(file).name)  # which need not be UTF-8
    fraction = int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64
    return "train" if fraction < 0.7 else "val" if fraction < 0.85 else "test"


def is_image_file(name: str) -> bool:
    """Whether a file of this name is taken for an image; hidden ones, caches and the "._0.npy" of a Mac, are not."""
    return name.endswith(".npy") and not name.startswith(".")


def read_image(path: str | Path) -> tuple[np.ndarray, float]:
    """One .npy file: its image, (1, 64, 64) float32 in [0, 1], and its axion mass in eV, NaN if it has none.

    Raises:
        InputError: with the path and what is wrong with the file.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a folder; a pipe or a device, which would never end
            raise InputError("is not a file")
        if status.st_size > _LARGEST_FILE:
            raise InputError(f"is larger than any {IMG_SIZE}x{IMG_SIZE} image")
        image, mass = _read_npy(Path(path).read_bytes())
        if problem := _what_hides(image):
            raise InputError(problem)
        return normalize(image).numpy(), mass
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _what_hides(pixels: np.ndarray) -> str | None:
    """What leaves nothing of an image that is scaled to its minimum and maximum, in words; None for nothing."""
    if not np.isfinite(pixels).all():
        return "holds NaN or Inf"
    values = np.sort(pixels, axis=None)
    if values[0] == values[-1]:
        return f"is blank: every pixel is {values[0]:g}"
    scaled = values / max(abs(values[0]), abs(values[-1]))
    steps = np.diff(scaled)
    edge = int(steps.argmax()) + 1
    few, rest = sorted((values[:edge], values[edge:]), key=len)
    whole_range, one_in_a_hundred = scaled[-1] - scaled[0], len(values) // 100
    if steps.max() >= _GAP * whole_range and (len(few) <= 4 or rest[0] < rest[-1]):  # unless it is in two values
        count = "1 pixel" if len(few) == 1 else f"{len(few)} pixels"
        return f"has {count} from {few[0]:g} to {few[-1]:g}, which hide the others, from {rest[0]:g} to {rest[-1]:g}"
    most = scaled[-1 - one_in_a_hundred] - scaled[one_in_a_hundred]
    if 0 < most < _LEAST * whole_range:
        rest = values[one_in_a_hundred : -1 - one_in_a_hundred]
        return (
            f"has pixels from {values[0]:g} to {values[-1]:g}, which hide the others, from {rest[0]:g} to {rest[-1]:g}"
        )
    return None


def _read_npy(content: bytes) -> tuple[np.ndarray, float]:
    """Pixels (a numeric array of one of _SHAPES) and axion mass in the bytes of a .npy file."""
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
    if len(body) < dtype.itemsize * IMG_SIZE**2:
        raise InputError("is truncated")
    pixels = np.frombuffer(body, dtype, IMG_SIZE**2).reshape(shape, order="F" if fortran_order else "C")
    return _as_pixels(pixels), np.nan


def _check_image(shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype.kind not in "buif":
        raise InputError(f"holds values of type {dtype}, not real numbers")
    if shape not in _SHAPES:
        raise InputError(f"has shape {shape}, not ({IMG_SIZE}, {IMG_SIZE})")


def _as_pixels(array: np.ndarray) -> np.ndarray:
    return array.reshape(IMG_SIZE, IMG_SIZE).astype(np.float64)


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
    try:
        image, mass = _NumpyUnpickler(io.BytesIO(body)).load()
        mass = float(mass)
        _check_image(image.shape, image.dtype)
        return _as_pixels(image), mass
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
    """Why a class has no image in a split, of ``count`` in all, and what can be done."""
    if count:
        return (
            f"{folder}: none of its {count} images is in the part {split!r}, to which a hash of the name assigns them: "
            "add images"
        )
    if not folder.is_dir():
        return f"{folder.parent}: no folder {folder.name} with .npy files; simulate/simulate_lenses.py makes all three"
    here = [name for name in os.listdir(folder) if is_image_file(name)]
    deeper = next((path.parent for path in sorted(folder.glob("*/**/*.npy")) if is_image_file(path.name)), None)
    if here:
        return f"{folder}: all of its {len(here)} files are bad"
    return f"{folder}: no .npy files in it" + (f", but in {deeper}: move them up" if deeper else "")


def _load_folder(root: Path, on_bad_file: str, cache_dir: Path) -> tuple[np.ndarray, str]:
    """All images of a folder as an array of records (file, image, axion_mass), from its cache when that is fresh.

    Also the fingerprint that tells when it is.
    """
    listing = _list_files(root)
    fingerprint = hashlib.sha256(repr((listing, _VERSION)).encode()).hexdigest()[:16]
    cache = cache_dir / f".lens_cache_{fingerprint}.npy"
    try:
        return np.load(cache, mmap_mode="r", allow_pickle=False), fingerprint
    except (OSError, ValueError, EOFError):  # absent, or cut short by a full disk
        pass
    names, problems = [file for file, *_ in listing], []
    pixels = ("image", np.float32, (1, IMG_SIZE, IMG_SIZE))
    packed = np.zeros(len(names), [("file", f"U{max(map(len, names))}"), pixels, ("axion_mass", float)])
    for i, name in enumerate(tqdm(names, f"reading {root}", unit="file", leave=False)):
        try:
            packed[i] = (name, *read_image(root / name))
        except InputError as error:
            problems.append(str(error))
    if problems:  # no cache: bad files are reported by every run
        report = f"{len(problems)} bad files of {len(listing)} in {root}:\n  " + "\n  ".join(problems)
        if on_bad_file == "raise" or len(problems) == len(listing):
            raise InputError(report + '\nremove or mend them, or set ON_BAD_FILE = "skip"')
        print(report + "\nskipped")
        return packed[packed["file"] != ""], fingerprint
    _write_cache(cache, packed)
    return packed, fingerprint


def _list_files(root: Path) -> list[tuple[str, int, int, int]]:
    """(relative path, size, times of change) of every image, which tells when the folder has changed."""
    there = [name for name in CLASSES if (root / name).is_dir()]
    if not there:
        raise InputError(
            f"{root}: no folder {' or '.join(CLASSES)} with .npy files; simulate/simulate_lenses.py makes all three", 2
        )
    listing = []
    for name in there:
        with os.scandir(root / name) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False) and any(map(is_image_file, os.listdir(entry))):
                    print(f"{entry.path}: its images are left out, as only those of {root / name} itself count")
                elif is_image_file(entry.name):
                    try:
                        status = entry.stat()
                        listing.append((f"{name}/{entry.name}", status.st_size, status.st_mtime_ns, status.st_ctime_ns))
                    except OSError:  # a broken link; reading it will say so
                        listing.append((f"{name}/{entry.name}", -1, -1, -1))
    if not listing:
        problems = "; ".join(_why_missing(root / name, 0, "all") for name in CLASSES)
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
