"""Views of training images for a classifier: as a telescope sees them, and some that are altered to be unlike them."""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from simulate.instrument import Observer
from train.orientations import SYMMETRIES, draw_orientations, oriented, turned

KINDS = ("like", "noisier", "another scale", "another sharpness", "turned or mirrored", "no such lens")
_FAINT = (1e-3, 0.3)  # times the least depth: from pure noise to images somewhat noisier than usual
_ZOOM = (1.15, 1.8)  # times larger or smaller
_BLUR = (0.5, 2.5)  # pixels, standard deviation
_SHARPEN = (0.7, 3.0)  # times the detail that a blur by 0.8 pixels removes
_PIECES = 4  # on a side, into which an image is cut to be put together in another order


@dataclass(frozen=True)
class Views:
    """Random views of images.

    Args:
        observer: the telescope; None leaves images without noise.
        depths: least and most exposure time, relative to that of ``observer``; drawn log-uniformly for each image.
        clean: share of images without noise.
        symmetry: orientations that images are shown in, a name of ``SYMMETRIES``.
        shift: largest shift of an image along each axis, in pixels.
        unlike: share of extra images that are made unlike the others.
    """

    observer: Observer | None
    depths: tuple[float, float]
    clean: float
    symmetry: str
    shift: int
    unlike: float

    def shown(self, images: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Views of images (n, c, s, s) in [0, 1], followed by m that are made unlike them, (n + m, c, s, s); and for
        each its index in KINDS, (n + m,)."""
        like, some = self._observed(self._moved(images, random), random), round(self.unlike * len(images))
        kinds = torch.zeros(len(images), dtype=torch.long, device=images.device)
        if not some:
            return like, kinds
        others, of_others = self.made_unlike(images[:some], random)
        return torch.cat([like, others]), torch.cat([kinds, of_others])

    def of_all(self, images: Tensor, seed: int, depth: float | None = None) -> Tensor:
        """One view of each image, always the same for a seed; all have ``depth`` if it is given."""
        views = self if depth is None else replace(self, depths=(depth, depth), clean=0.0)
        random = torch.Generator().manual_seed(seed)
        parts = (views._observed(self._moved(part, random), random) for part in images.split(1024))
        return torch.cat(list(parts))

    def made_unlike(self, images: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Views of images, each altered to be unlike them in one way, and the index of that way in KINDS, (n,)."""
        others = [way for way in SYMMETRIES["square"] if way not in SYMMETRIES[self.symmetry]]
        possible = [k for k in range(1, len(KINDS)) if (k != 1 or self.observer) and (k != 4 or others)]
        number = torch.randint(len(possible), (len(images),), generator=random, device=random.device)
        kinds = torch.tensor(possible, device=random.device)[number]
        images = self._moved(images, random)
        pairs = zip(images, kinds.tolist(), strict=True)
        made = torch.stack([self._made(image, kind, others, random) for image, kind in pairs])
        return self._observed(made, random, kinds == 1), kinds

    def _made(self, image: Tensor, kind: int, others: list, random: torch.Generator) -> Tensor:
        """An image (c, s, s) altered in the way of KINDS[kind]; "noisier" is left to ``_observed``."""
        u, up = torch.rand(2, generator=random, device=random.device).tolist()
        if kind == 2:
            return _zoomed(image, _between(_ZOOM, u) ** (1 if up < 0.5 else -1))
        if kind == 3:
            return _blurred(image, _between(_BLUR, u)) if up < 0.5 else _sharpened(image, _between(_SHARPEN, u))
        if kind == 4:
            return turned(image, *others[int(u * len(others))])
        return _reordered(image, random) if kind == 5 else image

    def _moved(self, images: Tensor, random: torch.Generator) -> Tensor:
        images = oriented(images, draw_orientations(self.symmetry, len(images), random), self.symmetry)
        return shifted(images, self.shift, random)

    def _observed(self, images: Tensor, random: torch.Generator, noisier: Tensor | None = None) -> Tensor:
        if self.observer is None:
            return images
        n = len(images)
        least, most = self.depths
        u, clean = torch.rand(2, n, generator=random, device=random.device)
        depth = torch.where(clean < self.clean, math.inf, least * (most / least) ** u)
        if noisier is not None:
            faintest, faint = _FAINT
            depth = torch.where(noisier, least * faintest * (faint / faintest) ** u, depth)
        low, high = torch.zeros(n, device=images.device), torch.ones(n, device=images.device)
        return self.observer(images, low, high, random=random, depth=depth)[0]


def shifted(images: Tensor, most: int, random: torch.Generator) -> Tensor:
    """Images (n, c, s, s), each moved by up to ``most`` whole pixels; edges are repeated."""
    if most == 0:
        return images
    size = images.shape[-1]
    starts = torch.randint(-most, most + 1, (2, len(images), 1), generator=random, device=random.device)
    rows, columns = (starts + torch.arange(size, device=random.device)).clamp(0, size - 1)
    number = torch.arange(len(images), device=random.device)[:, None, None]
    return images[number, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _between(ends: tuple[float, float], u: float) -> float:
    return ends[0] * (ends[1] / ends[0]) ** u


def _zoomed(image: Tensor, factor: float) -> Tensor:
    """An image (c, s, s) magnified by ``factor`` around its centre; beyond its edge, the edge is repeated."""
    grid = F.affine_grid(torch.eye(2, 3, device=image.device)[None] / factor, [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None], grid, "bilinear", "border", align_corners=False)[0]


def _blurred(image: Tensor, deviation: float) -> Tensor:
    from torchvision.transforms.v2.functional import gaussian_blur

    width = 2 * math.ceil(3 * deviation) + 1
    return gaussian_blur(image, [width, width], [deviation, deviation])


def _sharpened(image: Tensor, times: float) -> Tensor:
    return (image + times * (image - _blurred(image, 0.8))).clamp_min(0)


def _reordered(image: Tensor, random: torch.Generator) -> Tensor:
    """An image (c, s, s) cut into squares that are put together in another order."""
    side = image.shape[-1] // _PIECES
    cut = image[:, : side * _PIECES, : side * _PIECES]
    pieces = cut.unfold(1, side, side).unfold(2, side, side).flatten(1, 2)
    order = torch.randperm(_PIECES**2, generator=random, device=random.device)
    whole = pieces[:, order].unflatten(1, (_PIECES, _PIECES)).transpose(2, 3).reshape(cut.shape)
    made = image.clone()
    made[:, : side * _PIECES, : side * _PIECES] = whole
    return made
