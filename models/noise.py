"""Noise of images: learned from how they differ from a smooth description, and drawn anew for every image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS, _BRIGHTNESSES, _SCORES = 8, 96, 49  # knots of the law
_AROUND = 3  # side, in pixels, of the square whose mean is the brightness of the pixel in its middle
_SKY_ENDS = 2.3, 3.2  # between these brightnesses, see ``_brightness``, a pixel turns from sky to light
_FARTHEST = 4.0  # normal score of the last knot: 1 in 30,000 pixels lies beyond it
_FEWEST, _TAIL = 50, 5  # least number of pixels that quantiles are taken of, and that must lie beyond a quantile
_IMAGES, _FIELDS = 2048, 256  # largest numbers of images that quantiles and correlations are fitted to


class NoiseLaw(nn.Module):
    """Distribution of a pixel, given its smooth brightness and the noise levels of its image; and how pixels correlate.

    Noise levels are (n, 2), of the sky and of light: pixels of either kind are described in units of its level.

    The law is a Gaussian copula (Sklar 1959): a field of correlated normal scores, where each pixel takes the quantile
    of its score. Quantiles describe whatever a detector does, such as a sky clipped at 0 or shot noise, with no model.

    Args:
        image_shape: (c, h, w).
    """

    def __init__(self, image_shape: tuple[int, ...]):
        super().__init__()
        c, h, w = image_shape
        self.level_ends = nn.Parameter(torch.zeros(2, 2), requires_grad=False)  # logarithms of first and last knots
        self.brightness_ends = nn.Parameter(torch.zeros(c, 2), requires_grad=False)  # see ``_brightness``
        self.quantiles = nn.Parameter(torch.zeros(c, _LEVELS, _BRIGHTNESSES, _SCORES), requires_grad=False)
        self.least = nn.Parameter(torch.zeros(c), requires_grad=False)  # smallest value of a pixel
        self.amplitude = nn.Parameter(torch.ones(c, h, w // 2 + 1), requires_grad=False)  # Fourier modes of the field

    def fit(self, images: Tensor, smooth: Tensor, level: Tensor) -> None:
        """Learns the law from images (n, c, h, w), their smooth parts (n, c, h, w) and their noise levels (n, 2)."""
        images, smooth, level = images[:_IMAGES], smooth[:_IMAGES], level[:_IMAGES]
        self.level_ends.copy_(level.quantile(torch.tensor([0.01, 0.99]), 0).log() + torch.tensor([[0], [1e-3]]))
        brightness = _brightness(smooth, level)
        ends = brightness.movedim(1, 0).flatten(1)
        self.brightness_ends.copy_(torch.stack([ends.amin(1), ends.amax(1) + 1e-3], 1))
        at_level, at_brightness = (part.round().long() for part in self._knots(brightness, level))
        bins = at_level * _BRIGHTNESSES + at_brightness
        self.least.copy_(images.amin((0, 2, 3)))
        relative = (images - _known(smooth, brightness)) / _unit(level, brightness)
        for of_channel, values, bins_of, (low, high) in zip(
            self.quantiles, relative.unbind(1), bins.unbind(1), self.brightness_ends, strict=True
        ):
            of_channel.copy_(_quantiles(values, bins_of, torch.linspace(low, high, _BRIGHTNESSES)))
        parts = zip(images[:_FIELDS].split(16), smooth.split(16), level.split(16), strict=False)
        waves = torch.fft.fft2(torch.cat([self._scores_of(*part) for part in parts])).abs().square().mean(0)
        self.amplitude.copy_((waves / waves.mean((1, 2), keepdim=True)).sqrt()[..., : self.amplitude.shape[-1]])

    def draw(self, smooth: Tensor, level: Tensor, white: Tensor) -> Tensor:
        """Noisy images (n, c, h, w) with smooth parts (n, c, h, w) and noise levels (n, 2), made from white Gaussian
        noise (n, c, h, w)."""
        scores = torch.fft.irfft2(torch.fft.rfft2(white) * self.amplitude, s=white.shape[-2:])
        return self._pixels(smooth, level, scores)

    def _pixels(self, smooth: Tensor, level: Tensor, scores: Tensor) -> Tensor:
        """Pixels (n, c, h, w): the quantiles of their distributions that normal scores (n, c, h, w) stand for."""
        brightness = _brightness(smooth, level)
        at_level, at_brightness = self._knots(brightness, level)
        place = [
            scores / _FARTHEST,
            2 * at_brightness / (_BRIGHTNESSES - 1) - 1,
            2 * at_level / (_LEVELS - 1) - 1,
        ]
        place = torch.stack(place, -1).movedim(1, 0).flatten(1, 2)[:, None]  # (c, 1, n * h, w, 3)
        found = F.grid_sample(self.quantiles[:, None], place, padding_mode="border", align_corners=True)
        found = found.view(-1, *smooth.shape[:1], *smooth.shape[2:]).movedim(0, 1)
        found = found * _unit(level, brightness) + _known(smooth, brightness)
        return found.maximum(self.least[:, None, None])

    def _knots(self, brightness: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of levels (n, 2) and brightnesses (n, c, h, w) among the knots: each (n, c, h, w), from 0 to the
        number of knots less 1. Sky pixels have the level of the sky, light pixels that of light."""
        low, high = self.level_ends
        at_level = _blended((level.log() - low) / (high - low) * (_LEVELS - 1), brightness)
        low, high = self.brightness_ends.T[:, :, None, None]
        at_brightness = (brightness - low) / (high - low) * (_BRIGHTNESSES - 1)
        return at_level.clamp(0, _LEVELS - 1), at_brightness.clamp(0, _BRIGHTNESSES - 1)

    def _scores_of(self, images: Tensor, smooth: Tensor, level: Tensor) -> Tensor:
        """Normal scores (n, c, h, w) of pixels, the inverse of ``_pixels``.

        A pixel lies between two knots of the law, or on several knots with the same value, such as 0 in a clipped sky.
        Its score is drawn at random from those that it can have.
        """
        knots = torch.linspace(-_FARTHEST, _FARTHEST, _SCORES)
        values = torch.stack([self._pixels(smooth, level, torch.full_like(smooth, score)) for score in knots])
        below, upto = (values < images).sum(0), (values <= images).sum(0)
        low, high = (torch.special.ndtr(knots[at]) for at in ((below - 1).clamp_min(0), upto.clamp_max(_SCORES - 1)))
        random = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
        return torch.special.ndtri(torch.lerp(low, high, random))


def _brightness(smooth: Tensor, level: Tensor) -> Tensor:
    """Smooth brightness around a pixel in units of the sky's noise, on a scale that is linear in noise and logarithmic
    above it.

    It is a mean over neighbouring pixels, since components hold some noise, which differs from pixel to pixel.
    """
    around = F.avg_pool2d(smooth, _AROUND, 1, _AROUND // 2, count_include_pad=False)
    return (around / level[:, 0].view(-1, 1, 1, 1)).asinh()


def _is_light(brightness: Tensor) -> Tensor:
    """0 in the sky, 1 in light, and between the two in between."""
    low, high = _SKY_ENDS
    return ((brightness - low) / (high - low)).clamp(0, 1)


def _blended(of_both: Tensor, brightness: Tensor) -> Tensor:
    """One number a pixel from two numbers an image (n, 2): the first in the sky, the second in light."""
    sky, light = of_both[:, :, None, None, None].unbind(1)
    return torch.lerp(sky.expand_as(brightness), light.expand_as(brightness), _is_light(brightness))


def _unit(level: Tensor, brightness: Tensor) -> Tensor:
    """Noise level of each pixel, (n, c, h, w): the unit that the pixel is described in."""
    return _blended(level.log(), brightness).exp()


def _known(smooth: Tensor, brightness: Tensor) -> Tensor:
    """Value that is subtracted from a pixel before it is described: 0 in the sky, which a detector may clip at 0; the
    smooth brightness in light, where the distance between knots is larger than the noise."""
    return smooth * _is_light(brightness)


def _quantiles(values: Tensor, bins: Tensor, brightness: Tensor) -> Tensor:
    """Quantiles of values (...) in each bin, (levels, brightnesses, scores).

    A bin with too few values takes the quantiles of the nearest bin with enough, shifted up if it is brighter itself.
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
    unknown = brightness.sinh() * (1 - _is_light(brightness))
    shift = (unknown[at[:, 1]] - unknown[nearest]).clamp_min(0)  # a sky may be clipped at 0
    return (found[level, nearest] + shift[:, None]).view_as(found)


def _normal_quantiles(ordered: Tensor, scores: Tensor) -> Tensor:
    """Quantiles of ordered values at normal scores, continued as a straight line where fewer than ``_TAIL`` values lie
    beyond a quantile."""
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
