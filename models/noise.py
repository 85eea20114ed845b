"""Noise of images, learned from what a smooth description of them leaves over, and drawn anew for every image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS, _BRIGHTNESSES, _SCORES = 8, 96, 49  # knots of the law
_FARTHEST = 4.0  # normal score of the last knot: 1 in 30,000 pixels lies beyond it
_FEWEST, _TAIL = 50, 5  # pixels that quantiles are taken of, and that a quantile leaves beyond it
_IMAGES, _FIELDS = 2048, 256  # that quantiles and correlations are fitted to, at most


class NoiseLaw(nn.Module):
    """Distribution of a pixel, given its smooth brightness and the noise level of its image; and how pixels correlate.

    A Gaussian copula (Sklar 1959): a field of correlated normal scores, of which each pixel is taken to the quantile of
    its score. Quantiles hold whatever a detector does, such as a sky clipped at 0 or shot noise, without a model of it.

    Args:
        image_shape: (c, h, w).
    """

    def __init__(self, image_shape: tuple[int, ...]):
        super().__init__()
        c, h, w = image_shape
        self.level_ends = nn.Parameter(torch.zeros(2), requires_grad=False)  # logarithms of the first and last knot
        self.brightness_ends = nn.Parameter(torch.zeros(c, 2), requires_grad=False)  # see ``_brightness``
        self.quantiles = nn.Parameter(torch.zeros(c, _LEVELS, _BRIGHTNESSES, _SCORES), requires_grad=False)
        self.least = nn.Parameter(torch.zeros(c), requires_grad=False)  # that a pixel can be
        self.amplitude = nn.Parameter(torch.ones(c, h, w // 2 + 1), requires_grad=False)  # of the field's waves

    def fit(self, images: Tensor, smooth: Tensor, level: Tensor) -> None:
        """Learns the law from images (n, c, h, w), their smooth parts (n, c, h, w) and their noise levels (n,)."""
        images, smooth, level = images[:_IMAGES], smooth[:_IMAGES], level[:_IMAGES]
        self.level_ends.copy_(level.quantile(torch.tensor([0.01, 0.99])).log() + torch.tensor([0, 1e-3]))
        brightness = _brightness(smooth, level)
        ends = brightness.movedim(1, 0).flatten(1)
        self.brightness_ends.copy_(torch.stack([ends.amin(1), ends.amax(1) + 1e-3], 1))
        at_level, at_brightness = (part.round().long() for part in self._knots(brightness, level))
        bins = at_level[:, None, None, None] * _BRIGHTNESSES + at_brightness
        self.least.copy_(images.amin((0, 2, 3)))
        relative = images / level.view(-1, 1, 1, 1)
        for of_channel, values, bins_of, (low, high) in zip(
            self.quantiles, relative.unbind(1), bins.unbind(1), self.brightness_ends, strict=True
        ):
            of_channel.copy_(_quantiles(values, bins_of, torch.linspace(low, high, _BRIGHTNESSES).sinh()))
        parts = zip(images[:_FIELDS].split(16), smooth.split(16), level.split(16), strict=False)
        waves = torch.fft.fft2(torch.cat([self._scores_of(*part) for part in parts])).abs().square().mean(0)
        self.amplitude.copy_((waves / waves.mean((1, 2), keepdim=True)).sqrt()[..., : self.amplitude.shape[-1]])

    def draw(self, smooth: Tensor, level: Tensor, white: Tensor) -> Tensor:
        """Noisy images (n, c, h, w) of smooth parts (n, c, h, w) and noise levels (n,), made from white Gaussian noise
        (n, c, h, w)."""
        scores = torch.fft.irfft2(torch.fft.rfft2(white) * self.amplitude, s=white.shape[-2:])
        return self._pixels(smooth, level, scores)

    def _pixels(self, smooth: Tensor, level: Tensor, scores: Tensor) -> Tensor:
        """Pixels (n, c, h, w) that lie in their distribution as normal scores (n, c, h, w) do in theirs."""
        at_level, at_brightness = self._knots(_brightness(smooth, level), level)
        place = [
            scores / _FARTHEST,
            2 * at_brightness / (_BRIGHTNESSES - 1) - 1,
            (2 * at_level / (_LEVELS - 1) - 1)[:, None, None, None].expand_as(scores),
        ]
        place = torch.stack(place, -1).movedim(1, 0).flatten(1, 2)[:, None]  # (c, 1, n * h, w, 3)
        found = F.grid_sample(self.quantiles[:, None], place, padding_mode="border", align_corners=True)
        found = found.view(-1, *smooth.shape[:1], *smooth.shape[2:]).movedim(0, 1) * level.view(-1, 1, 1, 1)
        return found.maximum(self.least[:, None, None])

    def _knots(self, brightness: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Places of levels (n,) and brightnesses (n, c, h, w) between the knots, from 0 to their number less 1."""
        low, high = self.level_ends
        at_level = (level.log() - low) / (high - low) * (_LEVELS - 1)
        low, high = self.brightness_ends.T[:, :, None, None]
        at_brightness = (brightness - low) / (high - low) * (_BRIGHTNESSES - 1)
        return at_level.clamp(0, _LEVELS - 1), at_brightness.clamp(0, _BRIGHTNESSES - 1)

    def _scores_of(self, images: Tensor, smooth: Tensor, level: Tensor) -> Tensor:
        """Normal scores (n, c, h, w) of pixels, the inverse of ``_pixels``.

        A pixel lies between two knots of the law, or on several of one value, such as 0 in a clipped sky. Its score is
        a random one of those that it can have.
        """
        knots = torch.linspace(-_FARTHEST, _FARTHEST, _SCORES)
        values = torch.stack([self._pixels(smooth, level, torch.full_like(smooth, score)) for score in knots])
        below, upto = (values < images).sum(0), (values <= images).sum(0)
        low, high = (torch.special.ndtr(knots[at]) for at in ((below - 1).clamp_min(0), upto.clamp_max(_SCORES - 1)))
        random = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
        return torch.special.ndtri(torch.lerp(low, high, random))


def noise_level(residual: Tensor) -> Tensor:
    """Root mean square of what smooth parts leave over of images, (n, ...) to (n,)."""
    return residual.square().flatten(1).mean(1).sqrt()


def _brightness(smooth: Tensor, level: Tensor) -> Tensor:
    """Smooth brightness in units of the noise level, on a scale that is linear below it and logarithmic above."""
    return (smooth / level.view(-1, 1, 1, 1)).asinh()


def _quantiles(values: Tensor, bins: Tensor, brightness: Tensor) -> Tensor:
    """Quantiles of values (...) in each bin, (levels, brightnesses, scores).

    A bin of few values takes those of the nearest one of many, shifted by as much as its ``brightness`` is larger.
    """
    scores = torch.linspace(-_FARTHEST, _FARTHEST, _SCORES)
    order = torch.argsort(bins.flatten(), stable=True)
    counts = torch.bincount(bins.flatten(), minlength=_LEVELS * _BRIGHTNESSES)
    found, fewest = torch.zeros(len(counts), _SCORES), min(_FEWEST, int(counts.max()))
    for number, of_bin in enumerate(values.flatten()[order].split(counts.tolist())):
        if len(of_bin) >= fewest:
            found[number] = _normal_quantiles(of_bin.sort().values, scores)
    found, counts = found.view(_LEVELS, _BRIGHTNESSES, _SCORES), counts.view(_LEVELS, _BRIGHTNESSES)
    filled = torch.nonzero(counts >= fewest)
    at = torch.cartesian_prod(torch.arange(_LEVELS), torch.arange(_BRIGHTNESSES))
    distance = torch.cdist(at * torch.tensor([2.0, 1.0]), filled * torch.tensor([2.0, 1.0]))
    level, nearest = filled[distance.argmin(1)].T
    shift = (brightness[at[:, 1]] - brightness[nearest]).clamp_min(0)  # a sky may be clipped at 0
    return (found[level, nearest] + shift[:, None]).view_as(found)


def _normal_quantiles(ordered: Tensor, scores: Tensor) -> Tensor:
    """Quantiles of ordered values at normal scores, continued as a straight line where fewer than ``_TAIL`` values
    lie beyond."""
    last = torch.special.ndtri(torch.tensor(max(1 - _TAIL / len(ordered), 0.6), dtype=torch.float64))
    inner = torch.stack([-last, -last + 0.5, last - 0.5, last])

    def at(scores: Tensor) -> Tensor:
        place = torch.special.ndtr(scores.double()) * (len(ordered) - 1)
        low = place.long()
        return torch.lerp(ordered[low], ordered[(low + 1).clamp_max(len(ordered) - 1)], (place - low).float())

    first, second, before, end = at(inner)
    beyond = (scores.abs() - last.float()).clamp_min(0) / 0.5
    slope = torch.where(scores < 0, first - second, end - before)
    return at(scores.clamp(-last.float(), last.float())) + beyond * slope
