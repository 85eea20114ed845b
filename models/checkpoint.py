"""The checkpoint format: a dictionary saved by torch, with the network's own configuration inside.

``model_state_dict``, ``ema_state_dict`` (ema-pytorch's), ``model_config`` and whatever else training needs to go on.
Files of the published code, without a configuration and with NumPy scalars among their numbers, load too. No file can
run code: everything is read with ``weights_only=True``.
"""

import hashlib
import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.model import NanoDiT
from settings import InputError

# The published code built its one network without writing down how; it used the exact GELU
PUBLISHED_CONFIG = {"patch_size": 2, "hidden_size": 512, "depth": 6, "num_heads": 8, "gelu": "none"}

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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    packed = io.BytesIO()
    torch.save(content | {"checksum": checksum(content)}, packed)
    try:
        with open(part, "wb") as file:
            file.write(packed.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        error.filename = str(path)
        raise


def checksum(content: Any) -> str:
    """Of everything in a checkpoint, in hexadecimal; a bit that has changed on the disk changes it."""
    digest = hashlib.blake2b(digest_size=16)

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, dict):
            for key, item in value.items():
                add(key)
                add(item)
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    add(content)
    return digest.hexdigest()


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The content of a checkpoint.

    Raises:
        InputError: for a file that is absent, is no checkpoint or holds anything but tensors and plain values.
    """
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALAR):
            content = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); train it first, or give its path") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        # torch's own message would advise to load the file with code in it all the same
        raise InputError(f"{path}: not a checkpoint, a damaged one, or one that asks to run code: refused") from None
    if not isinstance(content, dict) or "model_state_dict" not in content:
        raise InputError(f"{path}: not a checkpoint: no 'model_state_dict' in it")
    expected = content.pop("checksum", None)  # the published checkpoints have none
    if expected is not None and checksum(content) != expected:
        raise InputError(f"{path}: damaged: its checksum does not match its content")
    return content


def load_weights(module: torch.nn.Module, weights: dict[str, torch.Tensor], path: str | Path) -> None:
    """Puts weights into a module, names as compiled modules save them included; all must fit."""
    try:
        module.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in weights.items()})
    except (RuntimeError, AttributeError):
        raise InputError(f"{path}: its weights are of another network") from None


def build_generator(content: dict[str, Any], path: str | Path) -> NanoDiT:
    """The network of a checkpoint with its EMA weights, or the plain ones when it has no EMA, in evaluation mode."""
    model = NanoDiT(**content.get("model_config", PUBLISHED_CONFIG))
    prefix = "ema_model."
    ema = {k.removeprefix(prefix): v for k, v in content.get("ema_state_dict", {}).items() if k.startswith(prefix)}
    load_weights(model, ema or content["model_state_dict"], path)
    return model.eval().requires_grad_(False)
