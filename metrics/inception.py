"""Inception, the network of the usual FID, if its weights can be had."""

import socket

import torch
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as _URL
from torchmetrics.image.fid import NoTrainInceptionV3

from settings import InputError


def load_inception(path: str | None, device: torch.device) -> NoTrainInceptionV3 | None:
    """Inception with weights from a file or from the internet. If they cannot be fetched, prints how to get them and
    returns None.

    Raises:
        InputError: for a file without weights of that network.
    """
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        if path:
            torch.load(path, weights_only=True)  # first: torch-fidelity would run whatever code is in the file
        else:
            torch.hub.load_state_dict_from_url(_URL, check_hash=True, weights_only=True)
        return NoTrainInceptionV3("inception-v3-compat", ["2048"], path).to(device)
    except Exception:
        if path:
            raise InputError(f"--inception_weights_path {path}: no file with weights of that network") from None
        print(
            "FID with Inception is left out: its weights cannot be fetched; --inception_weights_path takes the file "
            f"{_URL}"
        )
        return None
    finally:
        socket.setdefaulttimeout(timeout)
