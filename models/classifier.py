"""The lens classifier: torchvision's ResNet18 (He et al. 2015, arXiv:1512.03385) with three classes.

Its 512 pooled features are also the space in which generated images are compared with real ones.
"""

from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from tqdm import tqdm

from dataset import CLASSES, classifier_transforms
from models.checkpoint import load_checkpoint, load_weights
from settings import InputError


def build_classifier(image_size: int) -> nn.Module:
    """An untrained ResNet18; ``image_size`` is the size in pixels that images are resized to for it."""
    model = torchvision.models.resnet18(num_classes=len(CLASSES), zero_init_residual=True)  # learns faster from scratch
    model.image_size = image_size
    return model.to(memory_format=torch.channels_last)


def load_classifier(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The trained classifier of a checkpoint, in evaluation mode; the published ones took 224 pixels.

    Raises:
        InputError: for a file that is not a checkpoint of this classifier.
    """
    content = load_checkpoint(path, device)
    image_size = content.get("image_size", 224)
    if not isinstance(image_size, int) or not 8 <= image_size <= 1024:
        raise InputError(f"{path}: its weights are of another network")
    model = build_classifier(image_size)
    load_weights(model, content["model_state_dict"], path)
    return model.to(device).eval().requires_grad_(False)


@torch.inference_mode()
def classify(
    model: nn.Module, images: Tensor, batch_size: int = 128, show_progress: bool = True
) -> tuple[Tensor, Tensor]:
    """Probabilities (n, 3) and pooled features (n, 512) of images (n, 1, 64, 64) of any range, on the CPU."""
    device = model.fc.weight.device
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
