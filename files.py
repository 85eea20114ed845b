"""Files that appear whole or not at all, and folders that belong to one run at a time."""

import errno
import io
import itertools
import os
import shlex
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from settings import InputError

_LOCK, _HOLDER = ".lock", ".lock_holder"  # the lock of a folder, and a text for people that says who holds it
_held: dict[Path, FileLock] = {}


@contextmanager
def whole(path: str | Path, sync: bool = False) -> Iterator[BinaryIO]:
    """Opens a file for writing that appears under its name whole or not at all; makes its folder.

    What a killed process leaves behind ends in ``.part``. With ``sync`` the file also outlives a crash of the machine:
    it gets its name only once it is on the disk, which takes milliseconds.

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
        with suppress(OSError):  # it may not exist
            part.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def save_array(path: str | Path, *arrays: np.ndarray | Iterable[np.ndarray]) -> None:
    """Writes a .npy file, whole or not at all, see ``write_arrays``."""
    with whole(path) as file:
        write_arrays(file, *arrays)


def write_arrays(file: BinaryIO, *arrays: np.ndarray | Iterable[np.ndarray]) -> None:
    """Writes arrays one after the other: ``np.load`` reads each from an open file, but only the first from a path.

    An array too large for memory is given as an iterable of its parts along the first axis, at least one.
    """
    for array in arrays:
        if isinstance(array, np.ndarray):
            file.write(npy_bytes(array))
            continue
        start, length = file.tell(), 0
        for part in array:
            header = {"descr": np.lib.format.dtype_to_descr(part.dtype), "fortran_order": False}
            if not length:
                np.lib.format.write_array_header_1_0(file, header | {"shape": part.shape})
            file.write(np.ascontiguousarray(part).tobytes())
            length += len(part)
        end = file.tell()
        file.seek(start)
        np.lib.format.write_array_header_1_0(file, header | {"shape": (length, *part.shape[1:])})  # as long as before
        file.seek(end)


def npy_bytes(array: np.ndarray) -> memoryview:
    """The content of a .npy file, for others to write: NumPy itself fails on a full disk without saying why."""
    packed = io.BytesIO()
    np.save(packed, array)
    return packed.getbuffer()


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but hidden files, or does not exist."""
    return not folder.exists() or not any(not path.name.startswith(".") for path in folder.iterdir())


def contents(folder: Path) -> str:
    """Contents of a folder, in words that follow "it"."""
    if not folder.is_dir():
        return "is a file" if folder.exists() else "does not exist"
    if is_empty(folder):
        return "is empty"
    visible = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    endings = Counter(path.suffix or "other" for path in visible if not path.is_dir())
    files = [f"{count} {ending} file{'s' if count > 1 else ''}" for ending, count in endings.most_common(4)]
    folders = [f"{path.name}/" for path in visible if path.is_dir()]
    return f"holds {', '.join(files + folders[:6])}{', ...' if len(endings) > 4 or len(folders) > 6 else ''}"


def set_aside(folder: Path, paths: Iterable[Path]) -> None:
    """Moves those of ``paths`` that are files or non-empty folders to a new subfolder of ``folder``."""
    there = [path for path in paths if path.is_file() or (path.is_dir() and any(path.iterdir()))]
    if there:
        aside = next(path for n in itertools.count(1) if not (path := folder / f"earlier_{n}").exists())
        aside.mkdir()
        for path in there:
            path.rename(aside / path.name)
        print(f"What an earlier run has left in {folder} is in {aside} now")


def claim(folder: str | Path, marker: str) -> None:
    """Holds a folder that is empty or was made here, as a file called ``marker`` in it says.

    Raises:
        InputError: for a folder that something else made, or that another process holds.
    """
    folder = Path(folder)
    if not is_empty(folder) and not (folder / marker).exists():
        raise InputError(f"{folder} was not made here: it {contents(folder)}. Choose another folder to write to")
    hold(folder)
    with whole(folder / marker) as file:
        file.write(b"Made by a script, which may overwrite anything here.\n")


def hold(folder: str | Path) -> None:
    """Makes a folder, which then belongs to this process until it ends or calls ``release``.

    The lock is the operating system's, so a process that was killed holds nothing.

    Raises:
        InputError: when another process holds it; the text says which.
    """
    folder = Path(folder)
    if folder.is_file():
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    key = folder.resolve()
    if key in _held:
        return
    lock = FileLock(key / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = holder_of(folder) or "another process"
        raise InputError(f"{folder} is in use: wait, or choose another folder; it belongs to {who}") from None
    except NotImplementedError:  # a file system without locks
        print(f"{folder} cannot be locked on this file system: make sure that no other run writes there")
        return
    _held[key] = lock
    since, command = time.strftime("%Y-%m-%d %H:%M:%S"), shlex.join(sys.argv)
    who = f"process {os.getpid()} on {socket.gethostname()}, since {since}: {command}"
    with whole(key / _HOLDER) as file:
        file.write(who.encode("utf-8", "replace"))


def holder_of(folder: str | Path) -> str | None:
    """The other process that holds a folder, in words; None when there is none."""
    lock, who = Path(folder) / _LOCK, Path(folder) / _HOLDER
    if not lock.exists() or Path(folder).resolve() in _held:
        return None
    attempt = FileLock(lock)
    try:
        attempt.acquire(timeout=0)
        attempt.release()
    except Timeout:
        return who.read_text(encoding="utf-8", errors="replace") if who.exists() else "another process"
    except (OSError, NotImplementedError):  # nobody can write there
        return None
    return None


def release() -> None:
    """Gives back every folder that this process holds."""
    while _held:
        folder, lock = _held.popitem()
        with suppress(OSError):  # the folder may be gone
            (folder / _HOLDER).unlink()
        lock.release()
