"""A folder of generated images that says how they were made, and which of them are still as they were written.

FOLDER/generated_by.json    checkpoint, sampler and seed; nothing is written to a folder that has files but not this one
FOLDER/SHA256SUMS           checksums of the images, as ``sha256sum -c`` reads them; one file for each process
FOLDER/{class}/{i}.npy      image i of the class and seed
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import distributed
from files import contents, hold, is_empty, npy_bytes, set_aside, whole
from models import flow
from models.generator import Generator
from scaling import Scaling
from settings import InputError

_WAY = ("sha256", "sampler", "seed")  # entries of a source that decide the images; the checkpoint's path does not
_MARKER, _SUMS = "generated_by.json", "SHA256SUMS"
_CLASS_STRIDE = 10**9  # images of class k are numbered from k times this, so that each starts from noise of its own


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
        if not isinstance(source, dict) or not source.keys() >= {"checkpoint", *_WAY}:
            return None
        Scaling(**source.get("scaling", {}))
    except (ValueError, TypeError):
        advice = "remove that file to have the images scored as they are, or choose another folder to generate to"
        raise InputError(f"{marker} is damaged: {advice}") from None
    return source


def begin(folder: Path, source: dict[str, Any]) -> None:
    """Prepares a folder for images of a source and holds it for this process; sets images of another source aside.

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
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise InputError(
            f"{folder}: not as written here: {', '.join(changed[:3])}{more}. Move them away, or choose another "
            "--output_dir"
        )
    before = source_of(folder)
    if before is None or any(before[name] != source[name] for name in _WAY):
        classes = sorted({path.parent for path in folder.glob("*/*.npy")})
        set_aside(folder, [folder / _MARKER, *folder.glob(f"{_SUMS}*"), *classes])
        with whole(folder / _MARKER) as file:
            file.write(json.dumps(source, indent=1).encode())


def generate_to_folder(model: Generator, folder: Path, count: int, source: dict[str, Any], batch_size: int) -> None:
    """Writes images 0 to count - 1 of each class, float32 in the unit of the data, to a folder prepared by ``begin``;
    continues a run that was stopped.

    No two images start from the same noise, and image i of a class and seed is always the same.
    """
    sampler = flow.Sampler(**source["sampler"])
    print(
        f"Generating {count} images of each class in {sampler.steps} {sampler.solver} steps, guidance "
        f"{sampler.cfg_scale:g}, on {model.device}"
    )
    batches = [(label, first) for label in range(len(model.classes)) for first in range(0, count, batch_size)]
    bar = tqdm(total=count * len(model.classes) // distributed.size(), unit="image", desc="generating", leave=False)

    def generate_batch(batch: tuple[int, int]) -> None:
        label, first = batch
        names = [f"{model.classes[label]}/{i}.npy" for i in range(first, min(first + batch_size, count))]
        if not all((folder / name).exists() for name in names):
            labels = torch.full((len(names),), label)
            images = model.generate(labels, sampler, source["seed"], batch_size, label * _CLASS_STRIDE + first)
            images = model.scaling.undo(images)
            for name, image in zip(names, images.numpy(), strict=True):
                if not (folder / name).exists():
                    _write(folder, name, image[0] if len(image) == 1 else image)
        bar.update(len(names))

    with bar:
        distributed.spread(generate_batch, batches)


def _write(folder: Path, name: str, image: np.ndarray) -> None:
    """Writes the checksum of an image and then the image: if killed between the two, a run makes the image again."""
    content = npy_bytes(image)
    process = f"-{distributed.rank()}" if distributed.rank() else ""
    with open(folder / f"{_SUMS}{process}", "a", encoding="utf-8", errors="surrogateescape") as sums:
        sums.write(f"{hashlib.sha256(content).hexdigest()}  {name}\n")
    with whole(folder / name) as file:
        file.write(content)


def altered(folder: Path) -> list[str]:
    """The numbered images of a folder that are not as they were written here."""
    sums = [path.read_text("utf-8", "surrogateescape") for path in folder.glob(f"{_SUMS}*")]
    written = {tuple(line.split("  ", 1)) for text in sums for line in text.split("\n")}  # names may hold other breaks
    images = [path for path in folder.glob("*/*.npy") if path.stem.isdecimal()]
    images.sort(key=lambda path: (path.parent, int(path.stem)))
    names = {path: path.relative_to(folder).as_posix() for path in images}
    return [name for path, name in names.items() if (sha256(path), name) not in written]


def numbered(count: int, classes: Iterable[str]) -> list[str]:
    """Names of images 0 to count - 1 of every class."""
    return [f"{name}/{i}.npy" for name in classes for i in range(count)]


def sha256(path: str | Path) -> str:
    """Checksum of a file, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
