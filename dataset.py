"""Folders of lens images: read and checked once, packed, split the same way for everybody.

    data/axion/*   data/cdm/*   data/no_sub/*      or any other classes, one folder each

The folder says what it holds: its subfolders are the classes, in alphabetical order, and its files have the size and
the channels of the images. In general it is ``[split/][class/]file``, where a file holds an image or a stack of them:

    data/{train,val,test}/{class}/*     splits as they are given; a hash takes one that is missing out of train
    data/{class}/*  data_test/{class}/* two folders side by side: the test images, and all others
    data/*                              one class, called images
    data/{class}.npy                    a stack for each class
    data/images.npy  data/labels.npy    a stack, and the class of each image

All of these may be in split folders. What a file may be is in ``image_files``.
"""

import copy
import hashlib
import math
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

import nanodit_path  # noqa: F401
from files import contents, save_array, write_arrays
from image_files import (  # noqa: F401
    KINDS,
    MOST_VALUES,
    LensImage,
    Shape,
    StackError,
    is_image_file,
    is_image_shape,
    is_stack,
    is_table,
    normalize,
    other_shape,
    read_image,
    read_stack,
    stem_of,
)
from parameters import TABLES, Column, Parameter, converted, phases, read_columns
from scaling import Scaling
from settings import InputError

_SPLITS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}  # names of folders
_ALL = "overall"  # in tables of metrics, all classes together
_ONE_CLASS = "images"  # of images without labels
_VERSION = 3  # of the cache; change it when what is read from a file changes
_MOST_STACKS = 100  # in a folder with a stack for each class
_MOST_NAMED = 20  # bad files in a report
_ABANDONED = 3600  # seconds since anything was added to a cache that is not whole


class NpyDataset(Dataset):
    """The images of a folder, or of one split of it, with their labels.

    Args:
        root_dir: folder with a folder of images for each class, or another one that the top of this file shows.
        transform: applied to the images of ``dataset[i]``, (..., c, s, s) in [0, 1]; None leaves them as they are.
        split: "train", "val", "test" or "all"; as folders give it, see ``split_of`` for those that none gives.
        on_bad_file: "raise" reports every bad file of the folder and stops, "skip" reports them and goes on.
        on_missing_class: "raise" stops when a class has no image in the split, "go_on" does not.
        cache_dir: where the packed images are kept; in ``root_dir`` when None.
        classes: names of the classes, as of a checkpoint; None finds them, see ``find_classes``.

    Attributes:
        classes: names of the labels 0, 1, ...
        image_shape: (c, s, s).
        scaling: of the images, may be set before they are read; see ``Scaling``.
        keeps_flux: whether brightness in the unit of the files is compared with that of other images.
        observer: what a telescope makes of the images, see ``observed``; None leaves them as they are.
        images: (n, c, s, s) float32, scaled to [0, 1], by its own minimum and maximum each unless ``scaling`` says
            otherwise; read when first used.
        labels: (n,) int64, index into ``classes``.
        low, high: (n,) float64, minimum and maximum of each image in the unit of its file, which became 0 and 1.
        values: (n, 4) float64 that a pickled file gives behind its image; NaN where there are none.
        axion_mass: (n,) float64 in eV, the first of them.
        pixel_scale: in arcsec, the median of what FITS headers say; None when none does.
        files: path of each image relative to ``root_dir``; "name.npy#k" is number k of a stack.
        cache_dir: where results computed from the images are kept.
        fingerprint: another one when any file of the folder has been written anew.

    Raises:
        InputError: for a folder without classes, with bad files, or with no image of a class in the split.
    """

    scaling, keeps_flux = Scaling(), False
    observer: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None

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
        sources = _sources(self.root_dir)
        self.classes = find_classes(self.root_dir, sources) if classes is None else tuple(classes)
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        listing = _list_files(self.root_dir, sources, self.classes)
        self._listed = Counter(file.of for file in listing)
        self._given = {source.split for source in sources}
        self._packed, self._records, self.fingerprint = _load(
            self.root_dir, listing, self._given, on_bad_file, self.cache_dir
        )
        self.image_shape: Shape = self._packed.shape[1:]
        self._read_before: dict[tuple[tuple[str, ...], bool], dict[str, Column]] = {}  # shared by all parts
        vars(self).update(vars(self.part(split, on_missing_class)))

    def part(self, split: str, on_missing_class: str = "raise") -> "NpyDataset":
        """Another split of the same folder, which is not read again."""
        other = self._where((self._records["split"] == split) | (split == "all"))
        missing = [name for name, count in other.counts().items() if not count]
        if missing and (on_missing_class == "raise" or not len(other)):
            counts = Counter(self._records["class"].tolist())
            hashed = "" in self._given or ("train" in self._given and split not in self._given)
            problems = (_why_missing(self.root_dir / of, self._listed[of], counts[of], split, hashed) for of in missing)
            raise InputError("; ".join(problems), status=2)
        return other

    def only(self, files: Iterable[str]) -> "NpyDataset":
        """The images of the same folder whose paths in it are among ``files``."""
        wanted = set(files)
        return self._where([file in wanted for file in self._records["file"].tolist()])

    def _where(self, keep: np.ndarray | list[bool]) -> "NpyDataset":
        """Those images of the whole folder that are to be kept."""
        other = copy.copy(self)
        for computed in ("images", "identity"):
            vars(other).pop(computed, None)
        other._keep = np.flatnonzero(np.asarray(keep) & np.isin(self._records["class"], self.classes))
        records = self._records[other._keep]
        other.files = records["file"].tolist()
        other.labels = torch.tensor([self.class_to_idx[name] for name in records["class"].tolist()], dtype=torch.long)
        other.low, other.high, other.values = (records[name].copy() for name in ("low", "high", "values"))
        other.axion_mass = other.values[:, 0].copy()
        scales = records["pixel_scale"][np.isfinite(records["pixel_scale"])]
        other.pixel_scale = float(np.median(scales)) if len(scales) else None
        return other

    def counts(self) -> dict[str, int]:
        """Number of images of each class."""
        return dict(zip(self.classes, torch.bincount(self.labels, minlength=len(self.classes)).tolist(), strict=True))

    def columns(self, names: Iterable[str], lenient: bool = False) -> dict[str, Column]:
        """Physical parameters of the images by name, as tables, pickled files and headers say them; see ``parameters``.

        Raises:
            InputError: for one that none of these has, of the whole folder, unless ``lenient``.
        """
        files, pickled = self._records["file"].tolist(), self._records["values"]
        wanted = tuple(names), lenient
        if wanted not in self._read_before:  # a validation loss asks for the same in every epoch
            self._read_before[wanted] = read_columns(self.root_dir, files, pickled, *wanted)
        found = self._read_before[wanted]
        return {name: column._replace(values=column.values[self._keep]) for name, column in found.items()}

    def phases(self, parameters: Sequence[Parameter], lenient: bool = False) -> Tensor:
        """The same as networks see them, (n, parameters) float32, NaN where unknown."""
        columns = self.columns((of.name for of in parameters), lenient)
        return phases(parameters, {of.name: converted(of.name, columns[of.name], of.unit) for of in parameters})

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

    def observed(self, observer: Callable[..., tuple[Tensor, Tensor, Tensor]] | None) -> "NpyDataset":
        """The same images as a telescope sees them, see ``simulate.instrument.Observer``."""
        other = copy.copy(self)
        vars(other).pop("images", None)
        other.observer = observer
        return other

    def read(self, index: Tensor | slice, random: torch.Generator | None = None) -> Tensor:
        """Some of ``images``, read from the cache on disk without keeping the others in memory.

        Observed images have the noise of their number, always the same, or fresh noise from ``random``.
        """
        return self.look(index, random)[0]

    def look(self, index: Tensor | slice, random: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``read``, and the minima and maxima (n,) of these images in the unit of their files, or as observed."""
        index = np.asarray(index) if isinstance(index, Tensor) else index
        numbers = self._keep[index]
        images, low, high = (torch.from_numpy(a) for a in (self._packed[numbers], self.low[index], self.high[index]))
        if self.observer:
            images, low, high = self.observer(images, low, high, torch.from_numpy(numbers), random)
        return self.scaling.apply(images, low, high), low, high

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


def split_of(file: str | Path) -> str:
    """The split a file belongs to, "train" (70%), "val" (15%) or "test" (15%), by a hash of its name alone.

    So adding, removing or moving other files never changes it.
    """
    name = os.fsencode(Path(file).name)  # which need not be UTF-8
    fraction = int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64
    if fraction < 0.7:
        return "train"
    return "val" if fraction < 0.85 else "test"


def _cache_folder(root: Path, cache_dir: str | Path | None) -> Path:
    """Where the cache of a folder is: in the folder, or in one of its own under ``cache_dir``."""
    if cache_dir is None or Path(cache_dir).resolve() == root.resolve():  # a folder more would be a class
        return root
    place = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:8]
    return Path(cache_dir) / f"{root.resolve().name}_{place}"


def _why_missing(folder: Path, listed: int, count: int, split: str, hashed: bool) -> str:
    """The reason that a class of ``listed`` files and ``count`` images has none in a split, and the remedy."""
    if count:
        how = "to which a hash of the name assigns them" if hashed else "which folders give here"
        return f"{folder}: none of its {count} images is in the split {split!r}, {how}: add images"
    if listed:
        return f"{folder}: all of its {listed} files are bad"
    if not folder.is_dir():
        return f"{folder.parent}: no folder {folder.name} with {KINDS}"
    deeper = next((path.parent for path in sorted(folder.glob("*/**/*")) if is_image_file(path.name)), None)
    advice = f", but in {deeper}: move them up" if deeper else ": add some, or move it away if it is no class"
    return f"{folder}: no {KINDS} in it{advice}"


class _Source(NamedTuple):
    """A folder of images, or a file of images, of one class in one split.

    ``name`` is its path relative to the root, ``of`` its class, None where labels.npy beside it says it, and ``split``
    what its folder says, "" where a hash of the name does.
    """

    path: Path
    name: str
    of: str | None
    split: str
    state: tuple[int, ...] = ()  # size and times of change of a file


def classes_with_files(root: str | Path) -> set[str]:
    """Names of the classes of a folder that there are files of, sound or not; none for a folder without classes."""
    sources = _sources(Path(root))
    folders = {source.path: os.listdir(source.path) for source in sources if source.path.is_dir()}
    return _classes_of([source for source in sources if any(map(is_image_file, folders.get(source.path, ["x.npy"])))])


def find_classes(root: Path, sources: list[_Source]) -> tuple[str, ...]:
    """Names of the classes of a folder, those of its class folders, stacks or labels, which gives the labels 0, 1, ...

    They are in alphabetical order; whole numbers in files of labels are in their own. Every class folder counts, also
    one without images, which is a class whose images are missing.

    Raises:
        InputError: when there is none, or one with a name that no class can have.
    """
    names = _classes_of(sources)
    if _ALL in names:
        raise InputError(f"{root / _ALL}: no class can have this name, which stands for all images: rename it", 2)
    if bad := sorted(name for name in names if not is_class_name(name)):
        raise InputError(f"{root}: no class can have the name {bad[0]!r}: rename it", 2)
    if names:
        of_labels = all(source.of is None for source in sources)
        numbers = of_labels and all(re.fullmatch(r"-?\d+", name) for name in names)
        return tuple(sorted(names, key=int if numbers else None))
    what = f"it {contents(root)}" if root.is_dir() else "there is no such folder"
    advice = "simulate/simulate_lenses.py makes some"
    raise InputError(f"{root}: no class folders with {KINDS}, {what}; {advice}", status=2)


def read_entries(path: Path, of: str | None = None) -> Iterator[tuple[str, str | None, LensImage | InputError]]:
    """("", class, image) of a file that holds one, or ("#k", class, image) of every one in a stack.

    The class is ``of``, or where that is None what ``read_labels`` gives. In place of a bad image stands what is wrong
    with it; no InputError is raised.
    """
    try:
        labels = read_labels(path) if of is None else None
        if labels is None:
            with suppress(StackError):
                yield "", of, read_image(path)
                return
        for k, image in enumerate(read_stack(path, None if labels is None else len(labels))):
            yield f"#{k}", labels[k] if labels else of, image
    except InputError as error:
        yield "", of, error


def read_labels(path: Path) -> list[str] | None:
    """The class of every image of the stack images.npy, as labels.npy beside it says it; None for any other file.

    Raises:
        InputError: when it does not hold whole numbers or texts, one for each image.
    """
    file = path.with_name("labels.npy")
    if stem_of(path.name) != "images" or not file.is_file():
        return None
    try:
        with open(file, "rb") as content:
            labels = np.lib.format.read_array(content, allow_pickle=False)
    except Exception:  # a damaged header can raise nearly anything
        raise InputError(f"{file}: is not a .npy file of numbers or texts, or is damaged") from None
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8", "replace")
    if labels.dtype.kind == "b" or (labels.dtype.kind == "f" and (labels % 1 == 0).all()):
        labels = labels.astype(np.int64)
    if labels.dtype.kind not in "uiU" or labels.size != max(labels.shape, default=0):
        kind = f"{labels.dtype} of shape {labels.shape}"
        raise InputError(f"{file}: holds {kind}, not a whole number or a text for each image")
    return list(map(str, labels.ravel().tolist()))


def _sources(root: Path) -> list[_Source]:
    """Class folders of a folder, of its split folders or of the two side by side; or, without any, files of images.

    Raises:
        InputError: for a split folder that holds nothing of what the others hold, or that has other folders beside it.
    """
    folders = _folders(root)
    splits = [name for name in folders if name.lower() in _SPLITS]
    others = [name for name in folders if name not in splits]
    if splits and others and all(_folders(root / name) for name in splits):
        raise InputError(f"{root}: {', '.join(splits)} are splits; move {', '.join(others)} away from beside them", 2)
    if splits and not others:
        places = [_Source(root / name, f"{name}/", "", _SPLITS[name.lower()]) for name in folders]
        found = _in_places(places)
        for place in places:
            if not any(source.name.startswith(place.name) for source in found):
                what = "class folders" if found and found[0].path.is_dir() else KINDS
                raise InputError(f"{place.path}: no {what} in it: add some, or move it away", 2)
        return found
    test = Path(f"{os.path.abspath(root)}_test")
    if test.is_dir():
        of_root = _in_places([_Source(root, "", "", "train")])
        of_test = _in_places([_Source(test, f"../{test.name}/", "", "test")])
        if of_root and _classes_of(of_root) == _classes_of(of_test):
            return of_root + of_test
    return _in_places([_Source(root, "", "", "")])


def _classes_of(sources: list[_Source]) -> set[str]:
    names = [[source.of] if source.of is not None else read_labels(source.path) for source in sources]
    return set().union(*names)


def _folders(folder: Path) -> list[str]:
    """Names of the folders in a folder that can be those of classes, in alphabetical order."""
    inside = folder.iterdir() if folder.is_dir() else []
    return sorted(path.name for path in inside if path.is_dir() and is_class_name(path.name))


def _in_places(places: list[_Source]) -> list[_Source]:
    """Class folders of some folders; where none of these has any, their files of images."""
    found = [
        place._replace(path=place.path / name, name=f"{place.name}{name}", of=name)
        for place in places
        for name in _folders(place.path)
    ]
    return found or _files_of(places)


def _files_of(places: list[_Source]) -> list[_Source]:
    """Files of images of folders without class folders: labelled stacks, a stack for each class, or images of one."""
    files = [
        place._replace(path=place.path / name, name=f"{place.name}{name}", of=_ONE_CLASS)
        for place in places
        for name in (sorted(os.listdir(place.path)) if place.path.is_dir() else [])
        if is_image_file(name) and not is_table(place.path / name)
    ]
    if labelled := [file._replace(of=None) for file in files if read_labels(file.path) is not None]:
        known = {path for file in labelled for path in (file.path, file.path.with_name("labels.npy"))}
        _say_left_out({file.path for file in files} - known, "as no labels.npy is of them")
        return labelled
    stacks = [is_stack(file.path) for file in files] if len(files) <= _MOST_STACKS else []
    if True not in stacks:
        return files
    if False in stacks:
        one, stack = files[stacks.index(False)], files[stacks.index(True)]
        advice = "put the files of each class into a folder of its own"
        raise InputError(f"{one.path} is one image, and {stack.path} is a stack of images: {advice}", 2)
    return [file._replace(of=stem_of(file.path.name)) for file in files]


def _say_left_out(paths: Iterable[Path], why: str) -> None:
    if paths := sorted(paths):
        print(f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: left out, {why}")


def is_class_name(name: Any) -> bool:
    """Whether a class can have this name, that of its folder: not of a hidden one, or one that scripts here make."""
    return isinstance(name, str) and bool(re.fullmatch(r"(?!\.|__pycache__$|earlier_\d+$)[^/\0]+", name))


def are_classes(names: Any) -> bool:
    """Whether data can have classes of these names, which a file gives: a list of different ones."""
    return (
        isinstance(names, list | tuple) and all(map(is_class_name, names)) and len({*names} - {_ALL}) == len(names) > 0
    )


def _load(
    root: Path, listing: list[_Source], given: set[str], on_bad_file: str, cache_dir: Path
) -> tuple[np.ndarray, np.ndarray, str]:
    """Images (n, c, s, s), which stay on disk, records of them, and fingerprint; from a cache when that is fresh.

    Raises:
        InputError: with every bad file, unless they are to be skipped; when there is no other one.
    """
    state = [(file.name, file.of, file.split, *file.state) for file in listing]
    fingerprint = hashlib.sha256(repr((state, sorted(given), _VERSION)).encode()).hexdigest()[:16]
    cache = cache_dir / f".lens_cache_{fingerprint}.npy"
    with suppress(OSError, ValueError, EOFError), open(cache, "rb") as file:  # absent, or cut short by a full disk
        return *_packed(file), fingerprint
    try:
        return *_pack(cache, _Reading(root, listing, given, on_bad_file)), fingerprint
    except _OtherShape as other:
        return *_pack(cache, _Reading(root, listing, given, on_bad_file, other.args[0])), fingerprint


def _packed(file: BinaryIO) -> tuple[np.ndarray, np.ndarray]:
    """The two arrays of a cache: images, which stay on disk, and records."""
    file.seek(0)
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    images = np.memmap(file, dtype, "r", file.tell(), shape)
    file.seek(images.offset + images.nbytes)
    return images, np.load(file, allow_pickle=False)


class _OtherShape(Exception):
    """Most images have another shape than the first one, that of ``args[0]``."""


class _Reading:
    """The images of the files of a listing, one at a time, and a record of each: (file, class, split, low, high,
    values, pixel_scale).

    Args:
        given: splits that folders give.
        shape: of the images; None is that of the first one.
    """

    def __init__(
        self, root: Path, listing: list[_Source], given: set[str], on_bad_file: str, shape: Shape | None = None
    ):
        self.root, self.listing, self.given, self.on_bad_file, self.shape = root, listing, given, on_bad_file, shape

    def images(self) -> Iterator[np.ndarray]:
        """Sound images, (1, c, s, s); in the end what is wrong with the others is reported.

        Raises:
            InputError: see ``_load``.
            _OtherShape: when most images do not have the shape.
        """
        self.rows, self.problems, shapes = [], [], Counter()
        for file in tqdm(self.listing, f"reading {self.root}", unit="file", leave=False):
            for end, of, image in read_entries(file.path, file.of):
                if not isinstance(image, InputError):
                    shapes[image[0].shape] += 1
                    self.shape = self.shape or image[0].shape
                    if image[0].shape != self.shape:
                        image = InputError(f"{file.path}{end}: {other_shape(image[0].shape, self.shape)}")
                if isinstance(image, InputError):
                    self.problems.append(str(image))
                    continue
                split = self._split(file.split, name := f"{file.name}{end}")
                self.rows.append((name, of, split, image.low, image.high, image.values, image.pixel_scale))
                yield image[0][None]
        if shapes and (most := max(shapes, key=shapes.get)) != self.shape:
            raise _OtherShape(most)
        self._report()

    def records(self) -> Iterator[np.ndarray]:
        """The records, all at once, when the images have been read."""
        names = [
            (name, f"U{max(len(row[i]) for row in self.rows)}") for i, name in enumerate(("file", "class", "split"))
        ]
        numbers = [("low", "f8"), ("high", "f8"), ("values", "f8", MOST_VALUES), ("pixel_scale", "f8")]
        yield np.array(self.rows, names + numbers)

    def _split(self, given: str, name: str) -> str:
        """The split of an image: that of its folder, but what no folder has is taken out of train."""
        hashed = split_of(name)
        return given if given in ("val", "test") or hashed in self.given else hashed

    def _report(self) -> None:
        if not self.problems:
            return
        total = len(self.rows) + len(self.problems)
        stacks = any("#" in row[0] for row in self.rows) or any(re.match(r".*#\d+: ", text) for text in self.problems)
        lines = self.problems[:_MOST_NAMED]
        if more := len(self.problems) - len(lines):
            kinds = Counter(re.sub(r"(\S*\d\S* ?)+", "... ", text.split(": ", 1)[1]).strip() for text in self.problems)
            lines.append(f"and {more} more; of all, " + "; ".join(f"{kind} ({n})" for kind, n in kinds.most_common(9)))
        title = f"{len(self.problems)} bad {'images' if stacks else 'files'} of {total} in {self.root}:"
        report = "\n  ".join((title, *lines))
        if self.on_bad_file == "raise" or not self.rows:
            raise InputError(report + "\nremove or mend them, or go on without them: --on_bad_file skip")
        print(report + "\nskipped")


def _pack(cache: Path, reading: _Reading) -> tuple[np.ndarray, np.ndarray]:
    """Writes images as they are read to the cache of a folder, in place of its older ones, and returns what it holds.

    It appears whole or not at all; not with bad files, so that every run reports them. The memory holds one image.
    """
    new = cache.with_name(f"{cache.name}.{os.getpid()}")
    try:
        save_array(new, reading.images(), reading.records())
        place = new if reading.problems else cache
        os.replace(new, place)
        with open(place, "rb") as file:
            found = _packed(file)
        with suppress(OSError):  # another script may be at the same
            for old in [new] if reading.problems else _older(cache):
                old.unlink()  # what is mapped is there until the process ends
        return found
    except OSError as error:
        advice = "the files will be read again next time, unless CACHE_DIR names a folder that can be written to"
        print(f"{cache} cannot be written ({error.strerror}): {advice}")
    try:
        with tempfile.TemporaryFile() as file:
            write_arrays(file, reading.images(), reading.records())
            file.flush()
            return _packed(file)
    except OSError as error:
        error.filename = tempfile.gettempdir()
        raise


def _older(cache: Path) -> Iterator[Path]:
    """Caches of a folder as it was before, and what is left of processes that were killed while they wrote one."""
    for path in cache.parent.glob(".lens_cache_*.npy*"):
        is_whole = path.suffix == ".npy"
        if path != cache and (is_whole or time.time() - path.stat().st_mtime > _ABANDONED):
            yield path


def _list_files(root: Path, sources: list[_Source], classes: tuple[str, ...]) -> list[_Source]:
    """Every file of images of some classes, with its size and times, which tell when the folder has changed."""
    listing = []
    if any(source.name.startswith("../") for source in sources):
        print(f"{os.path.abspath(root)}_test: its images are the test images of {root}")
    for folder in {source.path.parent for source in sources if source.path.is_dir()}:
        loose = [folder / name for name in os.listdir(folder) if is_image_file(name)]
        loose = [path for path in loose if len(loose) > _MOST_STACKS or not is_table(path)]
        _say_left_out(loose, "as the folders beside hold the classes")
    for source in sources:
        if source.of is None:
            listing.append(source._replace(state=(*_state(source.path), *_state(source.path.with_name("labels.npy")))))
        elif source.of in classes and not source.path.is_dir():
            listing.append(source._replace(state=_state(source.path)))
        elif source.of in classes:
            for entry in os.scandir(source.path):
                if entry.is_dir(follow_symlinks=False) and any(map(is_image_file, os.listdir(entry))):
                    print(f"{entry.path}: its images are left out, as only those of {source.path} itself count")
                elif is_image_file(entry.name) and entry.name not in TABLES:
                    name = f"{source.name}/{entry.name}"
                    listing.append(source._replace(path=Path(entry.path), name=name, state=_state(entry)))
    if not listing:
        problems = "; ".join(_why_missing(root / name, 0, 0, "all", True) for name in classes)
        raise InputError(f"{root}: no {KINDS} in its class folders: {problems}", status=2)
    return sorted(listing, key=lambda file: file.name)


def _state(entry: "os.DirEntry | Path") -> tuple[int, ...]:
    with suppress(OSError):  # a broken link; reading it will say so
        status = entry.stat()
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return -1, -1, -1
