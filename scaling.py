"""How bright pixels are to the networks, and back to the unit of the data."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

KINDS = ("image", "set", "asinh")
_SOFTENING = 1e-4  # least softening of "asinh", as a share of the range


@dataclass(frozen=True)
class Scaling:
    """Scaling of images to about [0, 1].

    "image" takes each image from its own minimum to its own maximum over all channels, the convention of the field. The
    unit is lost: generated images are in [0, 1]. "set" takes all images along one line, so that flux is kept; "asinh"
    likewise, on a scale that is linear in the noise and logarithmic above it (Lupton et al. 1999, astro-ph/9903081),
    for images of high contrast.

    Args:
        low, high: what becomes 0 and 1, in the unit of the data: the sky, and the peak of all but the brightest images;
            of "set" and "asinh".
        softening: brightness above the sky where "asinh" turns from linear to logarithmic, that of the noise.
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
        """The scaling of a kind for images (n, c, s, s) that fill [0, 1] each, and their minima and maxima (n,).

        Raises:
            ValueError: for images that are no light on a darker sky.
        """
        if kind == "image":
            return cls()
        pixels = in_unit(images, low, high).flatten(1)
        sky = pixels.median(1).values
        noise = 1.4826 * (pixels - sky[:, None]).abs().median(1).values.median().item()  # of a Gaussian sky
        sky, brightest = sky.median().item(), high.quantile(0.99).item()
        if brightest <= sky:
            raise ValueError("nothing is brighter than the sky")
        return cls(kind, sky, brightest, max(noise, _SOFTENING * (brightest - sky)))

    def apply(self, images: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Images (n, c, s, s) that fill [0, 1] each, of minima and maxima (n,), to scaled ones."""
        if not self.keeps_flux:
            return images
        above = in_unit(images, low, high) - self.low
        if self.kind == "asinh":
            return ((above / self.softening).asinh() / self._asinh_of_high()).float()
        return (above / (self.high - self.low)).float()

    def undo(self, scaled: Tensor) -> Tensor:
        """Scaled images to the unit of the data, where that is known."""
        if self.kind == "asinh":
            return (scaled * self._asinh_of_high()).sinh() * self.softening + self.low
        return scaled * (self.high - self.low) + self.low if self.keeps_flux else scaled

    def _asinh_of_high(self) -> Tensor:
        return torch.tensor((self.high - self.low) / self.softening).asinh()


def in_unit(images: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Images (n, c, s, s) that fill [0, 1] each, of minima and maxima (n,) float64, in the unit of these."""
    low, high = (values.view(-1, 1, 1, 1) for values in (low, high))
    return low + images * (high - low)
