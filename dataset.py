"""Folders of lens images: read and checked once, packed into a cache, and split the same way in every script.

    data/axion/*   data/cdm/*   data/no_sub/*      or any other classes, one folder each

The folder says what it holds: its subfolders are the classes, in alphabetical order, and its files give the size and
the channels of the images. ``layouts`` describes the other layouts of a folder, ``image_files`` the formats of a file.
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
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

import nanodit_path  # noqa: F401
from files import save_array, write_arrays
from image_files import MOST_VALUES, LensImage, Shape, StackError, normalize, other_shape, read_image, read_stack
from layouts import Source, find_classes, find_sources, list_files, read_labels, why_missing
from parameter_tables import read_columns
from parameters import Column, Parameter, converted, phases, warn_of_others
from scaling import Scaling
from settings import InputError

_VERSION = 3  # of the cache; change it when the code reads something else from a file
_MOST_NAMED = 20  # bad files that a report lists
_ABANDONED = 3600  # seconds without a change after which an unfinished cache counts as abandoned


class NpyDataset(Dataset):
    """The images of a folder, or of one split of it, with their labels.

    Args:
        root_dir: folder with a subfolder of images for each class, or with another layout of ``layouts``.
        transform: applied to the images of ``dataset[i]``, (..., c, s, s) in [0, 1]; None leaves them as they are.
        split: "train", "val", "test" or "all". Folders give the splits, or else a hash does, see ``split_of``.
        on_bad_file: "raise" reports every bad file of the folder and stops, "skip" reports them and goes on.
        on_missing_class: "raise" stops when a class has no image in the split, "go_on" does not.
        cache_dir: where the packed images are kept; in ``root_dir`` when None.
        classes: names of the classes, such as those of a checkpoint; None finds them, see ``find_classes``.

    Attributes:
        classes: names of the labels 0, 1, ...
        image_shape: (c, s, s).
        scaling: how brightness is scaled, see ``Scaling``; may be set before the images are read.
        keeps_flux: whether metrics compare brightness in the unit of the files, too.
        observer: what a telescope makes of the images, see ``observed``; None leaves them as they are.
        images: (n, c, s, s) float32, read when first used. Each image is scaled to [0, 1] by its own minimum and
            maximum, unless ``scaling`` says otherwise.
        labels: (n,) int64, index into ``classes``.
        low, high: (n,) float64, minimum and maximum of each image in the unit of its file; these became 0 and 1.
        values: (n, 4) float64, the numbers that follow the image in a pickled file; NaN where there are none.
        axion_mass: (n,) float64 in eV, the first of ``values``.
        pixel_scale: in arcsec, the median over the FITS headers that give it; None when none does.
        files: path of each image relative to ``root_dir``; "name.npy#k" is number k of a stack.
        cache_dir: where results computed from the images are kept.
        fingerprint: a hash that changes when any file of the folder is rewritten.

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
        sources = find_sources(self.root_dir)
        self.classes = find_classes(self.root_dir, sources) if classes is None else tuple(classes)
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        listing = list_files(self.root_dir, sources, self.classes)
        self._listed = Counter(file.of for file in listing)
        self._given = {source.split for source in sources}
        self._packed, self._records, self.fingerprint = _load(
            self.root_dir, listing, self._given, on_bad_file, self.cache_dir
        )
        self.image_shape: Shape = self._packed.shape[1:]
        self._read_before: dict[tuple[tuple[str, ...], bool], dict[str, Column]] = {}  # shared by all parts
        vars(self).update(vars(self.part(split, on_missing_class)))

    def part(self, split: str, on_missing_class: str = "raise") -> "NpyDataset":
        """Another split of the same folder, without reading the folder again."""
        other = self._where((self._records["split"] == split) | (split == "all"))
        missing = [name for name, count in other.counts().items() if not count]
        if missing and (on_missing_class == "raise" or not len(other)):
            counts = Counter(self._records["class"].tolist())
            hashed = "" in self._given or ("train" in self._given and split not in self._given)
            problems = (why_missing(self.root_dir / of, self._listed[of], counts[of], split, hashed) for of in missing)
            raise InputError("; ".join(problems), status=2)
        return other

    def only(self, files: Iterable[str]) -> "NpyDataset":
        """The images of the same folder whose paths relative to it are among ``files``."""
        wanted = set(files)
        return self._where([file in wanted for file in self._records["file"].tolist()])

    def _where(self, keep: np.ndarray | list[bool]) -> "NpyDataset":
        """The images of the whole folder for which ``keep`` is true."""
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

    def check_match(self, path: str | Path, classes: Sequence[str], image_shape: Sequence[int], advice: str) -> None:
        """Raises InputError unless this folder has the classes and images of the network or folder at ``path``."""
        ours, theirs = (
            (f"the classes {', '.join(names)}", f"images of {size_in_words(shape)}")
            for names, shape in ((self.classes, self.image_shape), (classes, image_shape))
        )
        for here, there in zip(ours, theirs, strict=True):
            if here != there:
                raise InputError(f"{path} is of {there}, but {self.root_dir} of {here}: {advice}", 2)

    def columns(self, names: Iterable[str], lenient: bool = False) -> dict[str, Column]:
        """Physical parameters of the images by name, from tables, pickled files or headers; see ``parameter_tables``.

        Raises:
            InputError: for a parameter that none of these gives for any image of the folder, unless ``lenient``.
        """
        files, pickled = self._records["file"].tolist(), self._records["values"]
        wanted = tuple(names), lenient
        if wanted not in self._read_before:  # a validation loss asks for the same in every epoch
            self._read_before[wanted] = read_columns(self.root_dir, files, pickled, *wanted)
        found = self._read_before[wanted]
        return {name: column._replace(values=column.values[self._keep]) for name, column in found.items()}

    def phases(self, parameters: Sequence[Parameter], lenient: bool = False) -> Tensor:
        """Parameters of the images as networks see them, (n, parameters) float32, NaN where unknown."""
        columns = self.columns((of.name for of in parameters), lenient)
        values = {of.name: converted(of.name, columns[of.name], of.unit) for of in parameters}
        warn_of_others(parameters, values, self.root_dir)
        return phases(parameters, values)

    @cached_property
    def identity(self) -> str:
        """A hash of names and pixels: the same for a copy of the folder, another one when any image differs."""
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

        Observed images get the noise that belongs to their number, always the same, or fresh noise from ``random``.
        """
        return self.look(index, random)[0]

    def look(self, index: Tensor | slice, random: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What ``read`` returns, and the minima and maxima (n,): in the unit of the files, or as observed."""
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
    """Splits of a folder. Reads the folder once, and prints how many images of each class every split has.

    Raises:
        InputError: see ``NpyDataset``.
    """
    folder = NpyDataset(root_dir, None, "all", on_bad_file, "go_on", cache_dir, classes)
    print_counts({split: folder.part(split, "go_on") for split in ("train", "val", "test")}, str(root_dir))
    return [folder.part(split, on_missing_class) for split in splits]


def print_counts(parts: dict[str, NpyDataset], title: str) -> None:
    """Prints how large the images of a folder are, and how many of each class are in each subset."""
    counts = {name: part.counts() for name, part in parts.items()}
    classes = list(next(iter(counts.values())))
    first, width = max(map(len, parts)), max(9, 2 + max(map(len, classes)))
    print(f"{title}: {size_in_words(next(iter(parts.values())).image_shape)}")
    print(" " * first + "".join(f"{name:>{width}}" for name in classes))
    for name, of_classes in counts.items():
        print(f"{name:{first}}" + "".join(f"{count:{width},}" for count in of_classes.values()))


def size_in_words(shape: Sequence[int]) -> str:
    """The shape (c, h, w) of an image, in words."""
    channels, height, width = shape
    return f"{height}x{width} pixels in {channels} channel(s)"


def some_of_each_class(labels: Tensor, count: int, seed: int = 0) -> Tensor:
    """Indices of ``count`` random images of every class, or of all if it has fewer; class by class.

    Random, since files may be sorted by a property of the lenses.
    """
    generator = torch.Generator().manual_seed(seed)
    of_classes = (torch.nonzero(labels == label).flatten() for label in labels.unique())
    return torch.cat([of[torch.randperm(len(of), generator=generator)[:count]] for of in of_classes])


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """All n images of an epoch in random order, in batches of at most ``batch_size`` whose sizes differ by at most one.

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
    name = os.fsencode(Path(file).name)  # a name need not be UTF-8
    fraction = int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64
    if fraction < 0.7:
        return "train"
    return "val" if fraction < 0.85 else "test"


def _cache_folder(root: Path, cache_dir: str | Path | None) -> Path:
    """The folder of the cache of ``root``: ``root`` itself, or a subfolder of ``cache_dir`` for this ``root`` alone."""
    if cache_dir is None or Path(cache_dir).resolve() == root.resolve():  # a new subfolder would look like a class
        return root
    place = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:8]
    return Path(cache_dir) / f"{root.resolve().name}_{place}"


def read_entries(path: Path, of: str | None = None) -> Iterator[tuple[str, str | None, LensImage | InputError]]:
    """Yields ("", class, image) for a file of one image, or ("#k", class, image) for each image of a stack.

    The class is ``of``, or, if that is None, the one from ``read_labels``. In place of a bad image, the InputError that
    says what is wrong with it is yielded, not raised.
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


def _load(
    root: Path, listing: list[Source], given: set[str], on_bad_file: str, cache_dir: Path
) -> tuple[np.ndarray, np.ndarray, str]:
    """Images (n, c, s, s), mapped from disk, their records, and the fingerprint; from the cache if it is up to date.

    Raises:
        InputError: with a list of the bad files, unless these are to be skipped; when all files are bad.
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
    """The two arrays of a cache: images, mapped from disk, and records."""
    file.seek(0)
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    images = np.memmap(file, dtype, "r", file.tell(), shape)
    file.seek(images.offset + images.nbytes)
    return images, np.load(file, allow_pickle=False)


class _OtherShape(Exception):
    """Most images have another shape than the first one; ``args[0]`` is the shape of most."""


class _Reading:
    """The images of the files of a listing, one at a time, and a record of each: (file, class, split, low, high,
    values, pixel_scale).

    Args:
        given: splits that have a folder.
        shape: of the images; None takes that of the first image.
    """

    def __init__(
        self, root: Path, listing: list[Source], given: set[str], on_bad_file: str, shape: Shape | None = None
    ):
        self.root, self.listing, self.given, self.on_bad_file, self.shape = root, listing, given, on_bad_file, shape

    def images(self) -> Iterator[np.ndarray]:
        """Yields the sound images, each (1, c, s, s); reports at the end what is wrong with the others.

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
        """Yields all records as one array, once ``images`` has been read to its end."""
        names = [
            (name, f"U{max(len(row[i]) for row in self.rows)}") for i, name in enumerate(("file", "class", "split"))
        ]
        numbers = [("low", "f8"), ("high", "f8"), ("values", "f8", MOST_VALUES), ("pixel_scale", "f8")]
        yield np.array(self.rows, names + numbers)

    def _split(self, given: str, name: str) -> str:
        """The split that the folder of an image gives; a split without a folder gets images of train, by their hash."""
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
    """Writes images to the cache of a folder as they are read, removes older caches, and returns the cache's arrays.

    The cache appears whole or not at all. None is kept if there are bad files, so that every run reports these. One
    image is in memory at a time.
    """
    new = cache.with_name(f"{cache.name}.{os.getpid()}")
    try:
        save_array(new, reading.images(), reading.records())
        place = new if reading.problems else cache
        os.replace(new, place)
        with open(place, "rb") as file:
            found = _packed(file)
        with suppress(OSError):  # another script may be deleting the same files
            for old in [new] if reading.problems else _older(cache):
                old.unlink()  # mapped arrays stay readable until the process ends
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
    """Outdated caches of a folder, and unfinished ones that killed processes left behind."""
    for path in cache.parent.glob(".lens_cache_*.npy*"):
        is_whole = path.suffix == ".npy"
        if path != cache and (is_whole or time.time() - path.stat().st_mtime > _ABANDONED):
            yield path
