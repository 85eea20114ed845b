"""Scaling of brightness to what networks see, and back to the unit of the data."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

KINDS = ("image", "set", "asinh")
_SOFTENING = 1e-4  # least softening of "asinh", as a share of the range


@dataclass(frozen=True)
class Scaling:
    """Scaling of images to about [0, 1].

    "image" scales each image by its own minimum and maximum over all channels, the convention of the field. The unit is
    lost: generated images are in [0, 1]. "set" scales all images by the same linear map, so that flux is kept. "asinh",
    for images of high contrast, keeps flux, too: its scale, the same for all images, is linear in the noise and
    logarithmic above it (Lupton et al. 1999, astro-ph/9903081).

    Args:
        low, high: of "set" and "asinh", the brightness that becomes 0 and 1, in the unit of the data: the sky, and the
            peak that one image in a hundred exceeds.
        softening: brightness above the sky where "asinh" turns from linear to logarithmic: the noise of the sky.
    """

    kind: Literal["image", "set", "asinh"] = "image"
    low: float = 0.0
    high: float = 1.0
    softening: float = 1.0

    @property
    def keeps_flux(self) -> bool:
        return self.kind != "image"

    @classmethod
    def of(cls, kind: str, images: Tensor, low: Tensor, high: Tensor) -> "Scaling":
        """The scaling of a kind for images (n, c, s, s), each of which fills [0, 1], of minima and maxima (n,).

        Raises:
            ValueError: when the images are no brighter than their sky.
        """
        if kind == "image":
            return cls()
        pixels = in_unit(images, low, high).flatten(1)
        sky = pixels.median(1).values
        noise = 1.4826 * (pixels - sky[:, None]).abs().median(1).values.median().item()  # standard deviation, Gaussian
        sky, brightest = sky.median().item(), high.quantile(0.99).item()
        if brightest <= sky:
            raise ValueError("nothing is brighter than the sky")
        return cls(kind, sky, brightest, max(noise, _SOFTENING * (brightest - sky)))

    def apply(self, images: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Scales images (n, c, s, s), each of which fills [0, 1], of minima and maxima (n,) in the unit of the data."""
        if not self.keeps_flux:
            return images
        above = in_unit(images, low, high) - self.low
        if self.kind == "asinh":
            return ((above / self.softening).asinh() / self._asinh_of_high()).float()
        return (above / (self.high - self.low)).float()

    def undo(self, scaled: Tensor) -> Tensor:
        """Takes scaled images back to the unit of the data; leaves them as they are where the unit is lost."""
        if self.kind == "asinh":
            return (scaled * self._asinh_of_high()).sinh() * self.softening + self.low
        return scaled * (self.high - self.low) + self.low if self.keeps_flux else scaled

    def _asinh_of_high(self) -> Tensor:
        return torch.tensor((self.high - self.low) / self.softening).asinh()


def in_unit(images: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Images (n, c, s, s), each of which fills [0, 1], in the unit of their minima and maxima (n,) float64."""
    low, high = (values.view(-1, 1, 1, 1) for values in (low, high))
    return low + images * (high - low)
