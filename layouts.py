"""Layouts of a folder of images: which files are in it, and the class and split of each.

    data/axion/*   data/cdm/*   data/no_sub/*      or any other classes, one folder each

In general it is ``[split/][class/]file``, where a file holds an image or a stack of them:

    data/{train,val,test}/{class}/*     given splits; a hash takes a missing val or test out of train
    data/{class}/*  data_test/{class}/* two folders side by side; the second one has the test images
    data/*                              one class, called images
    data/{class}.npy                    a stack for each class
    data/images.npy  data/labels.npy    a stack, and the class of each image

All of these may be in split folders. Of the files, only labels are read here; ``image_files`` reads images.
"""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from files import contents
from image_files import KINDS, is_image_file, is_stack, is_table, stem_of
from parameter_tables import TABLES
from settings import InputError

_SPLITS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}  # names of folders
_ALL = "overall"  # in tables of metrics, all classes together
_ONE_CLASS = "images"  # name of the class of images without labels
_MOST_STACKS = 100  # files in a folder with a stack for each class, at most


class Source(NamedTuple):
    """A folder of images, or a file of images, of one class in one split.

    ``name`` is its path relative to the root. ``of`` is its class, or None if labels.npy beside it gives the class of
    each image. ``split`` is what its folder says, or "" if a hash of the name decides.
    """

    path: Path
    name: str
    of: str | None
    split: str
    state: tuple[int, ...] = ()  # size and times of change of a file


def find_sources(root: Path) -> list[Source]:
    """Class folders of a folder, of its split folders or of the two side by side; if there are none, image files.

    Raises:
        InputError: for a split folder without what the others hold, or for other folders beside split folders.
    """
    folders = _folders(root)
    splits = [name for name in folders if name.lower() in _SPLITS]
    others = [name for name in folders if name not in splits]
    if splits and others and all(_folders(root / name) for name in splits):
        raise InputError(f"{root}: {', '.join(splits)} are splits; move {', '.join(others)} away from beside them", 2)
    if splits and not others:
        places = [Source(root / name, f"{name}/", "", _SPLITS[name.lower()]) for name in folders]
        found = _in_places(places)
        for place in places:
            if not any(source.name.startswith(place.name) for source in found):
                what = "class folders" if found and found[0].path.is_dir() else KINDS
                raise InputError(f"{place.path}: no {what} in it: add some, or move it away", 2)
        return found
    test = Path(f"{os.path.abspath(root)}_test")
    if test.is_dir():
        of_root = _in_places([Source(root, "", "", "train")])
        of_test = _in_places([Source(test, f"../{test.name}/", "", "test")])
        if of_root and _classes_of(of_root) == _classes_of(of_test):
            return of_root + of_test
    return _in_places([Source(root, "", "", "")])


def list_files(root: Path, sources: list[Source], classes: tuple[str, ...]) -> list[Source]:
    """Every image file of these classes, with its size and times, which change when the file is rewritten."""
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
        problems = "; ".join(why_missing(root / name, 0, 0, "all", True) for name in classes)
        raise InputError(f"{root}: no {KINDS} in its class folders: {problems}", status=2)
    return sorted(listing, key=lambda file: file.name)


def find_classes(root: Path, sources: list[Source]) -> tuple[str, ...]:
    """Names of the classes of a folder, from its class folders, stacks or labels, in the order of the labels 0, 1, ...

    They are in alphabetical order; whole numbers in files of labels are in numerical order. Every class folder counts,
    even an empty one: it is a class whose images are missing.

    Raises:
        InputError: when there is no class, or one with a name that no class can have.
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
    if root.is_file():
        raise InputError(f"{root} is a file: name the folder that it is in", status=2)
    what = f"it {contents(root)}" if root.is_dir() else "there is no such folder"
    advice = "simulate/simulate_lenses.py makes some"
    raise InputError(f"{root}: no class folders with {KINDS}, {what}; {advice}", status=2)


def classes_with_files(root: str | Path) -> set[str]:
    """Names of the classes that have files in a folder, sound or not; empty for a folder without classes."""
    sources = find_sources(Path(root))
    folders = {source.path: os.listdir(source.path) for source in sources if source.path.is_dir()}
    return _classes_of([source for source in sources if any(map(is_image_file, folders.get(source.path, ["x.npy"])))])


def read_labels(path: Path) -> list[str] | None:
    """The class of every image of the stack images.npy, from labels.npy beside it; None for any other file.

    Raises:
        InputError: when labels.npy does not hold whole numbers or texts, one for each image.
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
    kind = f"{labels.dtype} of shape {labels.shape}"
    if labels.dtype.kind == "b" or (labels.dtype.kind == "f" and (labels % 1 == 0).all()):
        labels = labels.astype(np.int64)
    if labels.dtype.kind not in "uiU" or labels.size != max(labels.shape, default=0):
        raise InputError(f"{file}: holds {kind}, not a whole number or a text for each image")
    return list(map(str, labels.ravel().tolist()))


def is_class_name(name: Any) -> bool:
    """Whether a class, and so its folder, can have this name: not that of a hidden folder or of one scripts make."""
    return isinstance(name, str) and bool(re.fullmatch(r"(?!\.|__pycache__$|earlier_\d+$)[^/\0]+", name))


def are_classes(names: Any) -> bool:
    """Whether names read from a file can be the classes of data: a list of different names that a class can have."""
    return (
        isinstance(names, list | tuple) and all(map(is_class_name, names)) and len({*names} - {_ALL}) == len(names) > 0
    )


def why_missing(folder: Path, listed: int, count: int, split: str, hashed: bool) -> str:
    """The reason why a class of ``listed`` files and ``count`` images has no image in a split, and what to do."""
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


def _classes_of(sources: list[Source]) -> set[str]:
    names = [[source.of] if source.of is not None else read_labels(source.path) for source in sources]
    return set().union(*names)


def _folders(folder: Path) -> list[str]:
    """Names of the subfolders of a folder that can be class folders, in alphabetical order."""
    inside = folder.iterdir() if folder.is_dir() else []
    return sorted(path.name for path in inside if path.is_dir() and is_class_name(path.name))


def _in_places(places: list[Source]) -> list[Source]:
    """The class folders in ``places``; if there are none, the image files in ``places``."""
    found = [
        place._replace(path=place.path / name, name=f"{place.name}{name}", of=name)
        for place in places
        for name in _folders(place.path)
    ]
    return found or _files_of(places)


def _files_of(places: list[Source]) -> list[Source]:
    """Image files of folders without class folders: labelled stacks, a stack for each class, or images of one class."""
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


def _state(entry: "os.DirEntry | Path") -> tuple[int, ...]:
    with suppress(OSError):  # a broken link; reading it will say so
        status = entry.stat()
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return -1, -1, -1
