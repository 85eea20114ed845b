"""The lens classifier: torchvision's ResNet18 (He et al. 2015, arXiv:1512.03385) with an output for each class.

Its 512 pooled features are also the space in which generated images are compared with real ones.
"""

from pathlib import Path

import numpy as np
import torch
import torchvision
import torchvision.transforms.v2.functional as tvf
from torch import Tensor, nn
from tqdm import tqdm

from dataset import are_classes, normalize
from models.checkpoint import load_checkpoint, load_weights
from settings import InputError

_PUBLISHED = {"image_size": 224, "classes": ("axion", "cdm", "no_sub"), "channels": 1}  # what its checkpoints leave out


def classifier_transforms(images: np.ndarray | Tensor, size: int = 224) -> Tensor:
    """Images of any range to the input of ResNet18, (..., 3 or c, size, size) with ImageNet's mean and deviation.

    One channel is repeated three times; a number of channels other than one and three keeps its own.
    """
    images = normalize(images)
    if images.shape[-1] != size:
        images = tvf.resize(images, [size, size], antialias=True)
    if images.shape[-3] not in (1, 3):
        return (images - 0.45) / 0.225
    images = images.expand(*images.shape[:-3], 3, size, size)
    return tvf.normalize(images, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


def build_classifier(image_size: int, classes: tuple[str, ...], channels: int = 1) -> nn.Module:
    """An untrained ResNet18 for images of these classes and channels, which are resized to ``image_size`` pixels."""
    model = torchvision.models.resnet18(num_classes=len(classes), zero_init_residual=True)  # learns faster from scratch
    if channels not in (1, 3):
        model.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    model.image_size, model.classes, model.channels = image_size, tuple(classes), channels
    return model.to(memory_format=torch.channels_last)


def load_classifier(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The trained classifier of a checkpoint, in evaluation mode; ``classes`` and ``image_size`` are attributes of it.

    Raises:
        InputError: for a file that is not a checkpoint of a classifier.
    """
    content = load_checkpoint(path, device)
    if "model_config" in content:
        raise InputError(f"{path}: its weights are of another network: a generator's, where a classifier is wanted")
    image_size, classes, channels = (content.get(name, default) for name, default in _PUBLISHED.items())
    known = isinstance(image_size, int) and 8 <= image_size <= 1024 and isinstance(channels, int) and 0 < channels <= 16
    if not known or not are_classes(classes):
        raise InputError(f"{path}: its weights are of another network")
    model = build_classifier(image_size, classes, channels)
    load_weights(model, content["model_state_dict"], path)
    return model.to(device).eval().requires_grad_(False)


@torch.inference_mode()
def classify(
    model: nn.Module, images: Tensor, batch_size: int = 128, show_progress: bool = True
) -> tuple[Tensor, Tensor]:
    """Probabilities (n, classes) and pooled features (n, 512) of images (n, c, h, w) of any range, on the CPU.

    A classifier of one channel sees the mean of several.
    """
    device = model.fc.weight.device
    images = images.mean(1, keepdim=True) if model.channels == 1 and images.shape[1] > 1 else images
    pooled = []
    hook = model.avgpool.register_forward_hook(lambda module, inputs, output: pooled.append(output.flatten(1).cpu()))
    try:
        probabilities = [
            model(classifier_transforms(batch.to(device), model.image_size)).softmax(1).cpu()
            for batch in tqdm(
                images.split(batch_size), "classifying", unit="batch", leave=False, disable=not show_progress
            )
        ]
    finally:
        hook.remove()
    return torch.cat(probabilities), torch.cat(pooled)
