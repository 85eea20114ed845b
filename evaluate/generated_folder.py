"""A folder of generated images that says how they were made, and which of them are still as they were written.

FOLDER/generated_by.json    checkpoint, sampler and seed; without it, nothing is ever written to a folder
FOLDER/SHA256SUMS           checksums of the images, as ``sha256sum -c`` reads them; one file for each process
FOLDER/{class}/{i}.npy      image i of the class and seed
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

import distributed
from dataset import CLASSES
from files import contents, hold, is_empty, npy_bytes, set_aside, whole
from settings import InputError

_WAY = ("sha256", "sampler", "seed")  # of a source: the same checkpoint makes the same images wherever it lies
_MARKER, _SUMS = "generated_by.json", "SHA256SUMS"


def source_of(folder: Path) -> dict[str, Any] | None:
    """How the images of a folder were made; None for one that was not made here.

    Raises:
        InputError: when the file that says so is damaged.
    """
    marker = folder / _MARKER
    if not marker.exists():
        return None
    try:
        source = json.loads(marker.read_bytes())
    except ValueError:
        advice = "remove that file to have the images scored as they are, or choose another folder to generate to"
        raise InputError(f"{marker} is damaged: {advice}") from None
    return source if isinstance(source, dict) and source.keys() >= {"checkpoint", *_WAY} else None


def begin(folder: Path, source: dict[str, Any]) -> None:
    """Makes a folder ready for images made in one way, and this process's own; sets those made in another way aside.

    Raises:
        InputError: for a folder that something else made, that another process has, or whose images were changed.
    """
    if source_of(folder) is None and not is_empty(folder):
        raise InputError(
            f"{folder} was not made here, so nothing is written to it: it {contents(folder)}. --generated_dir scores a "
            "folder of images; another --output_dir takes new ones"
        )
    hold(folder)
    if changed := altered(folder):
        raise InputError(
            f"{folder}: not as written here: {_names(changed)}. Move them away, or choose another --output_dir"
        )
    before = source_of(folder)
    if before is None or any(before[name] != source[name] for name in _WAY):
        set_aside(folder, [folder / _MARKER, *folder.glob(f"{_SUMS}*"), *(folder / name for name in CLASSES)])
        with whole(folder / _MARKER) as file:
            file.write(json.dumps(source, indent=1).encode())


def write(folder: Path, name: str, image: np.ndarray) -> None:
    """Writes an image, and before it its checksum: what is killed between the two is made again."""
    content = npy_bytes(image)
    process = f"-{distributed.rank()}" if distributed.rank() else ""
    with open(folder / f"{_SUMS}{process}", "a", encoding="utf-8") as sums:
        sums.write(f"{hashlib.sha256(content).hexdigest()}  {name}\n")
    with whole(folder / name) as file:
        file.write(content)


def altered(folder: Path) -> list[str]:
    """The numbered images of a folder that are not as they were written here."""
    lines = [
        line.split() for sums in folder.glob(f"{_SUMS}*") for line in sums.read_text(encoding="utf-8").splitlines()
    ]
    written = {tuple(line) for line in lines}
    names = {path: path.relative_to(folder).as_posix() for path in _images(folder)}
    return [
        name for path, name in names.items() if (hashlib.sha256(path.read_bytes()).hexdigest(), name) not in written
    ]


def numbered(count: int) -> list[str]:
    """Names of images 0 to count - 1 of every class."""
    return [f"{name}/{i}.npy" for name in CLASSES for i in range(count)]


def _images(folder: Path) -> list[Path]:
    found = (path for name in CLASSES for path in (folder / name).glob("*.npy") if re.fullmatch(r"\d+", path.stem))
    return sorted(found, key=lambda path: (path.parent, int(path.stem)))


def _names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
