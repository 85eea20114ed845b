"""Samples of a generator in training, to look at and to load."""

from pathlib import Path

import numpy as np
import torch

import plots
from dataset import CLASSES
from models.model import NanoDiT


def write_samples(output: Path, epoch: int, model: NanoDiT, num_per_class: int) -> None:
    """A grid of samples, a row a class, and their arrays. The noise is the same every time, to show progress."""
    labels = torch.arange(len(CLASSES)).repeat_interleave(num_per_class)
    images = model.eval().generate(labels).squeeze(1).numpy()
    by_class = {name: images[labels == label] for label, name in enumerate(CLASSES)}
    grid = plots.image_grid(by_class, f"epoch {epoch}")
    plots.save(grid, output / "dit_conditional_images" / f"sample_epoch_{epoch}.png")
    folder = output / "dit_conditional_npy" / f"sample_epoch_{epoch}"
    folder.mkdir(parents=True, exist_ok=True)
    for label, name in enumerate(CLASSES):
        for i, image in enumerate(by_class[name]):
            np.save(folder / f"class_{label}_sample_{i}.npy", image)
