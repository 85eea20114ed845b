"""The lens regressor: torchvision's ResNet18 (He et al. 2015, arXiv:1512.03385) that reads physical parameters off
images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from tqdm import tqdm

from dataset import NpyDataset
from models.checkpoint import load_checkpoint, load_weights
from models.classifier import classifier_transforms
from parameters import Parameter, as_plain, from_plain
from settings import InputError

_FEWEST = 10  # images in which a parameter must be known for it to be assessed


class LensRegressor(torchvision.models.ResNet):
    """ResNet18 with one output for the phase of each parameter, or two for an angle: the cosine and sine of its phase.

    Attributes:
        image_size: pixels that images are resized to.
        channels: of the images.
        lens_parameters: parameters that it reads, in order.
    """

    def __init__(self, image_size: int, channels: int, parameters: Sequence[Parameter]):
        outputs = sum(2 if of.scale == "angle" else 1 for of in parameters)
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=outputs, zero_init_residual=True)
        if channels not in (1, 3):
            self.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        self.image_size, self.channels, self.lens_parameters = image_size, channels, tuple(parameters)

    def description(self) -> dict[str, Any]:
        """Its configuration, as a checkpoint holds it."""
        return {
            "image_size": self.image_size,
            "channels": self.channels,
            "regressor_parameters": as_plain(self.lens_parameters),
        }

    def targets(self, phases: Tensor) -> Tensor:
        """Outputs (n, outputs) that phases (n, parameters) should have; NaN where unknown."""
        parts = []
        for phase, of in zip(phases.unbind(1), self.lens_parameters, strict=True):
            parts += [phase.cos(), phase.sin()] if of.scale == "angle" else [phase]
        return torch.stack(parts, 1)

    @torch.inference_mode()
    def outputs(self, images: Tensor, batch_size: int = 128) -> Tensor:
        """Outputs (n, outputs) for images (n, c, h, w) of any range, on the CPU."""
        device, found = self.fc.weight.device, []
        for batch in tqdm(images.split(batch_size), "reading parameters", unit="batch", leave=False, delay=1):
            found.append(self(classifier_transforms(batch.to(device), self.image_size)).float().cpu())
        return torch.cat(found)

    def read(self, images: Tensor, batch_size: int = 128) -> Tensor:
        """Phases (n, parameters) of images (n, c, h, w) of any range, on the CPU."""
        return phases_of(self.outputs(images, batch_size), self.lens_parameters)

    def read_values(self, images: Tensor, batch_size: int = 128) -> dict[str, np.ndarray]:
        """What ``read`` finds, as values (n,) of each parameter by name, in its unit."""
        phases = self.read(images, batch_size).double().numpy()
        return {of.name: of.value(phases[:, i]) for i, of in enumerate(self.lens_parameters)}


def phases_of(outputs: Tensor, parameters: Sequence[Parameter]) -> Tensor:
    """Phases (n, parameters) from outputs (n, outputs) of a regressor."""
    found, columns = [], iter(outputs.unbind(1))
    for of in parameters:
        value = next(columns)
        found.append(torch.atan2(next(columns), value) if of.scale == "angle" else value)
    return torch.stack(found, 1)


@dataclass
class Recovery:
    """Phases (n, parameters) that were asked for, NaN where nothing was, and what a regressor reads, (n, outputs)."""

    parameters: Sequence[Parameter]
    asked: np.ndarray
    outputs: Tensor

    @property
    def read(self) -> np.ndarray:
        return phases_of(self.outputs.double(), self.parameters).numpy()

    @classmethod
    def of(cls, regressor: LensRegressor, images: NpyDataset) -> "Recovery":
        """What a regressor reads off the images of a folder that gives their parameters."""
        return cls.between(regressor, images.phases(regressor.lens_parameters), images.images)

    @classmethod
    def between(cls, regressor: LensRegressor, asked: Tensor, images: Tensor) -> "Recovery":
        """What a regressor reads off images (n, c, s, s) that have, or should have, phases (n, parameters)."""
        return cls(regressor.lens_parameters, asked.double().numpy(), regressor.outputs(images))

    def loss(self) -> float:
        """Mean squared error of all phases, those of angles by sine and cosine."""
        return float(np.concatenate([self._errors(i)[0] for i in range(len(self.parameters))]).mean())

    def table(self) -> dict[str, dict[str, Any]]:
        """R^2, bias and scatter of each parameter, or of its logarithm if its scale is logarithmic.

        R^2 of an angle is that of its cosine and sine. Parameters that are the same in all images, or known in fewer
        than ten, are left out.
        """
        found = {}
        for i, of in enumerate(self.parameters):
            if np.isfinite(self.asked[:, i]).sum() < _FEWEST:
                continue
            squared, spread, difference = self._errors(i)
            if spread == 0:
                continue
            unit = f"log10 {of.unit}".strip() if of.scale == "log10" else of.unit
            r2, bias, scatter = 1 - squared.mean() / spread, difference.mean(), difference.std()
            found[of.name] = {"r2": float(r2), "bias": float(bias), "scatter": float(scatter)}
            found[of.name] |= {"unit": unit, "count": len(squared)}
        return found

    def panels(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Values asked for and read, by a title with the unit; their logarithms if the scale is logarithmic."""
        found = {}
        for i, of in enumerate(self.parameters):
            known = np.isfinite(self.asked[:, i])
            if known.sum() >= _FEWEST:
                asked, read = (phases[known, i] for phases in (self.asked, self.read))
                if of.scale == "angle":  # whole periods bring the angle that is read nearest to the one asked for
                    asked, read = (phases / (2 * np.pi) * of.period for phases in (asked, read))
                    asked = asked % of.period
                    read = asked + (read - asked + of.period / 2) % of.period - of.period / 2
                else:
                    asked, read = (of.mean + 2 * of.deviation * phases for phases in (asked, read))
                unit = f" ({'log10 ' if of.scale == 'log10' else ''}{of.unit})" if of.unit else ""
                found[f"{of.name}{unit}"] = asked, read
        return found

    def _errors(self, i: int) -> tuple[np.ndarray, float, np.ndarray]:
        """Squared errors of a parameter's phases, their variance, and the differences in its unit."""
        of, known = self.parameters[i], np.isfinite(self.asked[:, i])
        asked, read = self.asked[known, i], self.read[known, i]
        if of.scale == "angle":
            first = i + sum(before.scale == "angle" for before in self.parameters[:i])
            cosine, sine = self.outputs[known, first : first + 2].double().numpy().T
            asked, read = np.exp(1j * asked), cosine + 1j * sine
            difference = np.angle(read / asked) * of.period / (2 * np.pi)
            return np.abs(read - asked) ** 2, float(np.var(asked)), difference
        difference = read - asked
        return difference**2, float(asked.var()), 2 * of.deviation * difference


def build_regressor(image_size: int, channels: int, parameters: Sequence[Parameter]) -> LensRegressor:
    """An untrained regressor of these parameters, for images that are resized to ``image_size`` pixels."""
    return LensRegressor(image_size, channels, parameters).to(memory_format=torch.channels_last)


def regressor_in(content: dict[str, Any], path: str | Path) -> LensRegressor:
    """The regressor of the content of a checkpoint.

    Raises:
        InputError: with the ``path`` of a file that is not a checkpoint of a regressor.
    """
    try:
        size, channels, told = (content[name] for name in ("image_size", "channels", "regressor_parameters"))
        if not (isinstance(size, int) and 8 <= size <= 1024 and isinstance(channels, int) and 0 < channels <= 16):
            raise ValueError
        model = build_regressor(size, channels, from_plain(told))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: its weights are of another network, where a regressor is wanted") from None
    load_weights(model, content["model_state_dict"], path)
    return model


def load_regressor(path: str | Path, device: str | torch.device = "cpu") -> LensRegressor:
    """The trained regressor of a checkpoint, in evaluation mode; raises as ``regressor_in``."""
    return regressor_in(load_checkpoint(path, device), path).to(device).eval().requires_grad_(False)
