"""The checkpoint format: a dictionary saved by torch, with the network's own configuration inside.

It holds ``model_state_dict``, ``ema_state_dict`` (ema-pytorch's), ``codec_state_dict`` and ``population_state_dict`` of
a generator that has these, the entries of ``Generator.description``, and what training needs to go on.
Files of the published code, without a configuration and with NumPy scalars among their numbers, load too, and so do
``.safetensors`` files, which hold the weights to use and how they were made. No file can run code, and none can make
the reader allocate more than a few times its own size: see ``load_checkpoint``.
"""

import hashlib
import io
import json
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from files import whole
from settings import InputError

PARTS = ("codec", "population")  # what a .safetensors file holds beside the network, under names "codec.mean" and so on
_RENAMED = {"nanodit_s64.safetensors": "component_mlp.safetensors"}  # files of weights/, by their old names
# The published checkpoints hold the loss and the learning rate as NumPy scalars, named as NumPy 1 or NumPy 2 names them
_NUMPY_SCALAR = [
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
]


def save_checkpoint(path: str | Path, **content: Any) -> None:
    """Writes a checkpoint with its checksum; the file appears whole and on the disk, or not at all.

    Raises:
        OSError: when it cannot be written; an older file of that name is still there.
    """
    packed = io.BytesIO()  # torch itself fails on a full disk without saying why
    torch.save(content | {"checksum": checksum(content)}, packed)
    with whole(path, sync=True) as file:
        file.write(packed.getbuffer())


def save_weights(path: str | Path, weights: dict[str, torch.Tensor], **content: Any) -> None:
    """Writes weights as safetensors, with plain values in its metadata and a checksum of everything.

    Raises:
        OSError: when it cannot be written; an older file of that name is still there.
    """
    weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    content |= {"checksum": checksum({"model_state_dict": weights, **content})}
    with whole(path, sync=True) as file:
        file.write(safetensors.torch.save(weights, {"format": "pt", "content": json.dumps(content)}))


def checksum(content: Any) -> str:
    """Checksum of everything in a checkpoint, in hexadecimal; any bit that changes on the disk changes it."""
    digest = hashlib.blake2b(digest_size=16)

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, dict):
            for key in sorted(value, key=repr):
                digest.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    add(content)
    return digest.hexdigest()


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The content of a checkpoint, or of a .safetensors file in the same form.

    Raises:
        InputError: for a file that is absent, is no checkpoint, is damaged or holds anything but tensors and plain
            values.
    """
    if not Path(path).exists() and Path(path).name in _RENAMED:
        path = Path(path).with_name(_RENAMED[Path(path).name])
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would never end
            raise InputError(f"{path}: not a file; give the path of a checkpoint")
        read = _read_safetensors if Path(path).suffix == ".safetensors" else _read_torch
        content = read(path, device)
        if not isinstance(content, dict) or not isinstance(content.get("model_state_dict"), dict):
            raise InputError(f"{path}: not a checkpoint: no 'model_state_dict' in it")
        if sum(value.nbytes for value in _tensors(content)) > 4 * status.st_size:  # a view can be of any size
            raise InputError(f"{path}: refused: its tensors are larger than the file")
        expected = content.pop("checksum", None)  # the published checkpoints have none
        if expected is not None and checksum(content) != expected:
            raise InputError(f"{path}: damaged: its checksum does not match its content")
        return _apart(content)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); train it first, or give its path") from None
    except Exception:  # a damaged file can raise nearly anything, and torch's own message would advise to load it
        raise InputError(f"{path}: not a checkpoint, a damaged one, or one that asks to run code: refused") from None


def progress(path: str | Path) -> tuple[float, str | None] | None:
    """Epochs that a checkpoint has been trained for, and the name of its run; None for a damaged file.

    Reads no tensor and runs no code of the file. ``load_checkpoint`` says what is wrong with a damaged one.
    """
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALAR):
            content = torch.load(path, map_location="meta", weights_only=True)
        return content["epoch"] + content.get("step_in_epoch", 0) / content.get("steps_per_epoch", 1), content.get(
            "run"
        )
    except Exception:  # a damaged file can raise nearly anything
        return None


def _read_torch(path: str | Path, device: str | torch.device) -> Any:
    size = os.path.getsize(path)
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > size:
            raise InputError(f"{path}: refused: it unpacks to more than its size")
        if archive.testzip():  # torch does not look at the archive's own checksums
            raise InputError(f"{path}: damaged: not a checkpoint any more")
    with torch.serialization.safe_globals(_NUMPY_SCALAR):
        return torch.load(path, map_location=device, weights_only=True)


def _read_safetensors(path: str | Path, device: str | torch.device) -> dict[str, Any]:
    packed = Path(path).read_bytes()  # safetensors itself opens no path that is not UTF-8
    header = json.loads(packed[8 : 8 + int.from_bytes(packed[:8], "little")])
    content = json.loads(header["__metadata__"]["content"])
    if "checksum" not in content:
        raise InputError(f"{path}: damaged: its checksum is gone")
    weights = safetensors.torch.load(packed)
    return content | {"model_state_dict": {name: value.to(device) for name, value in weights.items()}}


def _apart(content: dict[str, Any]) -> dict[str, Any]:
    """The content with the tensors of PARTS in dictionaries of their own; .safetensors files mix them with the rest."""
    for part in PARTS:
        weights, prefix = content["model_state_dict"], f"{part}."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if own:
            network = {name: value for name, value in weights.items() if not name.startswith(prefix)}
            content = content | {"model_state_dict": network, f"{part}_state_dict": own}
    return content


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor inside nested dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def generator_weights(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights to generate with, under plain names: those of the EMA, or the network's own if there is no EMA."""
    prefix = "ema_model."
    ema = {k.removeprefix(prefix): v for k, v in content.get("ema_state_dict", {}).items() if k.startswith(prefix)}
    return plain_names(ema or content["model_state_dict"])


def plain_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under names without the prefixes that compiled and data-parallel modules add."""
    return {re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "")): value for name, value in weights.items()}


def load_weights(module: torch.nn.Module, weights: dict[str, torch.Tensor], path: str | Path) -> None:
    """Loads weights into a module; their names may have the prefixes of compiled and data-parallel modules.

    Raises:
        InputError: when they do not fit the module, or hold NaN or Inf.
    """
    try:
        module.load_state_dict(plain_names(weights))
    except (RuntimeError, AttributeError, TypeError):
        raise InputError(f"{path}: its weights are of another network") from None
    check_numbers(weights, path)


def check_numbers(weights: dict[str, torch.Tensor], path: str | Path) -> None:
    """Raises InputError when the weights hold NaN or Inf."""
    for name, value in weights.items():
        if not value.isfinite().all():
            raise InputError(f"{path}: its weights {name} hold NaN or Inf: the training that made it had diverged")
