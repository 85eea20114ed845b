"""The lens classifier: torchvision's ResNet18 (He et al. 2015, arXiv:1512.03385) with an output for each class.

Its 512 pooled features are also the space in which generated images are compared with real ones.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as tvf
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from tqdm import tqdm

from dataset import normalize
from layouts import are_classes
from models.checkpoint import load_checkpoint, load_weights
from settings import ROOT, InputError, first_there

# What the published checkpoints leave out
_PUBLISHED = {"image_size": 224, "classes": ("axion", "cdm", "no_sub"), "channels": 1, "kinds": ()}
_LIKE = 0.99  # share of the validation images that count as like those of training
_LEAST_VARIANCE = 1e-4  # of features in any direction, as a share of the largest


def classifier_transforms(images: np.ndarray | Tensor, size: int = 224) -> Tensor:
    """Turns images of any range into ResNet18's input, (..., 3 or c, size, size), with ImageNet's mean and deviation.

    One channel is repeated three times; other numbers of channels stay as they are.
    """
    images = normalize(images)
    if images.shape[-1] != size:
        images = tvf.resize(images, [size, size], antialias=True)
    if images.shape[-3] not in (1, 3):
        return (images - 0.45) / 0.225
    images = images.expand(*images.shape[:-3], 3, size, size)
    return tvf.normalize(images, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


class LensClassifier(torchvision.models.ResNet):
    """ResNet18 for the classes of lens images.

    Attributes:
        image_size: pixels that images are resized to.
        classes: names of its outputs.
        channels: of the images.
        kinds: "like", then the ways to differ from the training images that it has learned; empty if it learned none.
        calibration: how far its answers can be trusted, see ``Calibration``; None before ``calibrate``.
    """

    def __init__(self, image_size: int, classes: Sequence[str], channels: int = 1, kinds: Sequence[str] = ()):
        # The last layers of residual blocks start at zero, since it learns faster from scratch then
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=len(classes), zero_init_residual=True)
        if channels not in (1, 3):
            self.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        self.kind = nn.Linear(self.fc.in_features, len(kinds)) if kinds else None
        self.calibration: Calibration | None = None
        self.image_size, self.classes, self.channels, self.kinds = image_size, tuple(classes), channels, tuple(kinds)

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (n, 512) of images as ``classifier_transforms`` gives them."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.avgpool(self.layer4(self.layer3(self.layer2(self.layer1(x))))).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.features(images))

    def description(self) -> dict[str, Any]:
        """Its configuration, as a checkpoint holds it."""
        told = {"image_size": self.image_size, "classes": list(self.classes), "channels": self.channels}
        return told | ({"kinds": list(self.kinds)} if self.kinds else {})


class Calibration(nn.Module):
    """Makes the probabilities of a classifier right on average, and tells whether an image is like its training images.

    Buffers:
        temperature: the logits are divided by it (Guo et al. 2017, arXiv:1706.04599).
        centre, whitening: mean (512,) and whitening matrix (512, 512) of the features of training images, by which
            ``distance`` is that of Mahalanobis (Lee et al. 2018, arXiv:1807.03888).
        pixels: side of the training images in pixels; images of another size are resized, which blurs them.
        limit: distance that one in a hundred validation images exceeds, or one in a hundred of the faintest ones,
            whichever is larger.
    """

    def __init__(self, features: int = 512):
        super().__init__()
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("centre", torch.zeros(features))
        self.register_buffer("whitening", torch.eye(features))
        self.register_buffer("limit", torch.ones(()))
        self.register_buffer("pixels", torch.zeros(()))

    def distance(self, features: Tensor) -> Tensor:
        """Distances (n,) of features (n, 512) from those of training images, in units of ``limit``."""
        white = (features.to(self.centre) - self.centre) @ self.whitening
        return white.square().mean(1).sqrt() / self.limit


def build_classifier(
    image_size: int, classes: Sequence[str], channels: int = 1, kinds: Sequence[str] = ()
) -> LensClassifier:
    """An untrained classifier for images of these classes and channels, which are resized to ``image_size`` pixels."""
    return LensClassifier(image_size, classes, channels, kinds).to(memory_format=torch.channels_last)


def load_classifier(path: str | Path, device: str | torch.device = "cpu") -> LensClassifier:
    """The trained classifier of a checkpoint, in evaluation mode.

    Raises:
        InputError: for a file that is not a checkpoint of a classifier.
    """
    content = load_checkpoint(path, device)
    if "model_config" in content:
        raise InputError(f"{path}: its weights are of another network: a generator's, where a classifier is wanted")
    image_size, classes, channels, kinds = (content.get(name, default) for name, default in _PUBLISHED.items())
    known = isinstance(image_size, int) and 8 <= image_size <= 1024 and isinstance(channels, int) and 0 < channels <= 16
    if not known or not are_classes(classes) or not (kinds == () or are_classes(kinds)):
        raise InputError(f"{path}: its weights are of another network")
    model = build_classifier(image_size, classes, channels, kinds)
    if any(name.startswith("calibration.") for name in content["model_state_dict"]):
        model.calibration = Calibration(model.fc.in_features)
        content["model_state_dict"].setdefault("calibration.pixels", torch.tensor(float(image_size)))  # older files
    load_weights(model, content["model_state_dict"], path)
    return model.to(device).eval().requires_grad_(False)


def default_classifier(instrument: str | None = None) -> str:
    """The path of the classifier that was trained here, or else of one in weights/: that for noise-free images, or, if
    an instrument is named, that for images as a telescope sees them."""
    shipped = "resnet18_observed" if instrument else "resnet18_lens"
    here = "classifier_training_resnet18/classifier_ckpts/resnet18_best.pt"
    return str(ROOT / first_there(here, f"weights/{shipped}.safetensors"))


@torch.inference_mode()
def classify(
    model: LensClassifier, images: Tensor, batch_size: int = 128, show_progress: bool = True
) -> tuple[Tensor, Tensor]:
    """Probabilities (n, classes) and pooled features (n, 512) of images (n, c, h, w) of any range, on the CPU.

    A classifier of one channel sees the mean of all channels.
    """
    device = model.fc.weight.device
    images = images.mean(1, keepdim=True) if model.channels == 1 and images.shape[1] > 1 else images
    temperature = model.calibration.temperature if model.calibration else 1.0
    probabilities, pooled = [], []
    for batch in tqdm(images.split(batch_size), "classifying", unit="batch", leave=False, disable=not show_progress):
        features = model.features(classifier_transforms(batch.to(device), model.image_size))
        probabilities.append((model.fc(features) / temperature).softmax(1).cpu())
        pooled.append(features.cpu())
    return torch.cat(probabilities), torch.cat(pooled)


@torch.inference_mode()
def unlikeness(model: LensClassifier, features: Tensor, size: int) -> list[str]:
    """How images of ``size`` pixels on a side, with features (n, 512), differ from a classifier's training images.

    For each image "another size", one of ``kinds``, or "unlike"; "" for an image that is like the training images, and
    for every image if there is no ``calibration``.
    """
    if model.calibration is None:
        return [""] * len(features)
    if size != model.calibration.pixels:
        return ["another size"] * len(features)
    features = features.to(model.fc.weight.device)
    far = model.calibration.distance(features) > 1
    if not model.kinds:
        return ["unlike" if is_far else "" for is_far in far.tolist()]
    names = ("unlike", *model.kinds[1:])
    kinds = model.kind(features).argmax(1)
    return [names[kind] if is_far or kind else "" for is_far, kind in zip(far.tolist(), kinds.tolist(), strict=True)]


@torch.inference_mode()
def calibrate(
    model: LensClassifier, train: Tensor, validation: Tensor, labels: Tensor, faintest: Tensor | None = None
) -> None:
    """Finds the ``calibration`` of a trained classifier.

    Args:
        train: training images (n, c, s, s), whose features give ``centre`` and ``whitening``.
        validation, labels: other images (m, c, s, s) and their classes (m,).
        faintest: images with the most noise that the classifier has seen; these count as like training images, too.
    """
    from scipy.optimize import minimize_scalar  # here: classifying does not need it

    model.calibration = None
    probabilities, features = classify(model, validation)
    logits = probabilities.clamp_min(1e-12).log()

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(logits / math.exp(log_temperature), labels).item()

    found = Calibration(model.fc.in_features)
    found.temperature.fill_(math.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))
    known = classify(model, train)[1].double()
    found.centre.copy_(known.mean(0))
    variance, directions = torch.linalg.eigh(known.T.cov())
    # Directions without any variance say nothing: theirs is set to the least variance that counts
    least = _LEAST_VARIANCE * variance[-1]
    found.whitening.copy_(directions / variance.clamp_min(least).sqrt())
    like = [features] if faintest is None else [features, classify(model, faintest)[1]]
    found.pixels.fill_(train.shape[-1])
    found.limit.copy_(max(found.distance(some).quantile(_LIKE) for some in like))
    model.calibration = found.to(model.fc.weight.device)


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599): mean difference between confidence and accuracy,
    over bins of confidence."""
    confidence, called = probabilities.max(1)
    number = (confidence * bins).long().clamp_max(bins - 1)
    gap = torch.zeros(bins, dtype=torch.double)
    gap.index_add_(0, number, confidence.double() - (called == labels).double())
    return gap.abs().sum().item() / len(labels)
