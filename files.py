"""Files that are never half there."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np


@contextmanager
def whole(path: str | Path, sync: bool = False) -> Iterator[BinaryIO]:
    """A file to write to that appears under its name whole, or not at all; its folder is made.

    What a killed process leaves behind ends in ``.part``. With ``sync`` the file also outlives a crash of the machine:
    it has its name only once it is on the disk, which takes milliseconds.

    Raises:
        OSError: with the name of the file, when it cannot be written; an older file of that name is still there.
    """
    path = Path(path)
    if path.parent.is_file():
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(path.parent))
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):  # it may never have been there
            part.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def save_array(path: str | Path, array: np.ndarray) -> None:
    """Writes a .npy file, whole or not at all."""
    with whole(path) as file:
        np.save(file, array)
