"""Numbers an astronomer reads off a lens image: ring, power spectrum, shape, flux, knots.

All take images (n, c, s, s) in [0, 1] and use their mean over the channels. Lengths are in units of the pixel scale,
arcsec or pixels; angles in radians; wave numbers in cycles an image.
"""

import math
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from scaling import in_unit

PERIODS = {"ellipticity_angle": math.pi, "knot_angle": 2 * math.pi}  # of the numbers that are angles
_KNOT_LEAST = 0.3  # of the peak; fainter maxima are no knots


def bands(size: int) -> dict[str, tuple[int, int]]:
    """Bands of wave number of images of ``size`` pixels, from large scales to small: 1 to 4, and then by factors of 2.

    The last one ends at ``size // 2``, where a wave is two pixels long.
    """
    edges = [1, 4]
    while edges[-1] < size // 2:
        edges.append(2 * edges[-1])
    edges[-1] = size // 2
    return {f"{low}_{high}": (low, high) for low, high in pairwise(edges)}


def titles(size: int, unit: str) -> dict[str, str]:
    """Titles of the metrics that compare each number of ``describe`` with that of real images."""
    return {
        "ring_radius": f"Ring radius, W1 in {unit}",
        "ring_width": f"Ring width, W1 in {unit}",
        **{f"power_{band}": f"log10 power, {low}-{high} cycles, W1" for band, (low, high) in bands(size).items()},
        "ellipticity": "Ellipticity, W1",
        "ellipticity_angle": "Angle of the ellipticity, W1 in rad",
        "flux_over_peak": "Flux over peak, W1 in pixels",
        "knot_count": "Number of bright knots, W1",
        "knot_angle": "Angle of the brightest knot, W1 in rad",
    }


def flux_titles(unit: str) -> dict[str, str]:
    """The same for ``describe_flux``."""
    titles = {"sky": "Sky", "peak": "Peak", "flux": "Flux above the sky"}
    return {name: f"{title}, W1 in {unit}" for name, title in titles.items()}


def radial_profile(images: Tensor) -> Tensor:
    """Mean brightness at each distance from the centre, (n, s // 2), in rings one pixel wide."""
    size = images.shape[-1]
    y, x = _coordinates(size)
    ring = (x.square() + y.square()).sqrt().long()
    return _mean_by_number(images.mean(1), ring)[:, : size // 2]


def power_spectrum(images: Tensor) -> Tensor:
    """Azimuthally averaged power of each wave number from 0 on, (n, s // 2): |FFT|^2 over the number of pixels."""
    size = images.shape[-1]
    frequency = torch.fft.fftfreq(size, 1 / size)
    wave_number = (frequency[:, None].square() + frequency[None].square()).sqrt().round().long()
    power = torch.fft.fft2(images.mean(1)).abs().square() / size**2
    return _mean_by_number(power, wave_number)[:, : size // 2]


def band_power(spectrum: Tensor) -> dict[str, Tensor]:
    """Mean power of a spectrum (n, s // 2) in each of the ``bands``, (n,) each."""
    return {name: spectrum[:, low:high].mean(1) for name, (low, high) in bands(2 * spectrum.shape[1]).items()}


def describe(images: Tensor, pixel_scale: float = 1.0) -> dict[str, Tensor]:
    """Every number of an image, (n,) each.

    ring_radius, ring_width: mean and standard deviation of the radius, with the radial profile as weight.
    power_*: log10 of the azimuthally averaged power in a band.
    ellipticity, ellipticity_angle: from the second moments of the light: (a^2 - b^2) / (a^2 + b^2), and the angle of
    the major axis, modulo pi.
    flux_over_peak: total over brightest pixel, in pixels.
    knot_count, knot_angle: number of pixels that are the maximum of their 5x5 surroundings and brighter than 0.3 of the
    peak, and the position angle of the brightest one as seen from the centre, modulo 2 pi.
    """
    images = images.mean(1, keepdim=True)
    profile = radial_profile(images)
    powers = band_power(power_spectrum(images))
    radius = (torch.arange(profile.shape[1]) + 0.5) * pixel_scale
    weight = profile / profile.sum(1, keepdim=True).clamp_min(1e-12)
    ring_radius = (weight * radius).sum(1)
    ring_width = (weight * (radius - ring_radius[:, None]).square()).sum(1).sqrt()

    y_axis, x_axis = (axis * pixel_scale for axis in _coordinates(images.shape[-1]))
    light = images[:, 0] / images[:, 0].sum((1, 2), keepdim=True).clamp_min(1e-12)
    x, y = (axis - (light * axis).sum((1, 2), keepdim=True) for axis in (x_axis, y_axis))
    xx, yy, xy = ((light * a * b).sum((1, 2)) for a, b in ((x, x), (y, y), (x, y)))

    peak = images.amax((1, 2, 3), keepdim=True)
    knots = (images == F.max_pool2d(images, 5, 1, 2)) & (images > _KNOT_LEAST * peak)
    brightest = images.flatten(1).argmax(1)
    return {
        "ring_radius": ring_radius,
        "ring_width": ring_width,
        **{f"power_{band}": power.clamp_min(1e-20).log10() for band, power in powers.items()},
        "ellipticity": torch.hypot(xx - yy, 2 * xy) / (xx + yy).clamp_min(1e-12),
        "ellipticity_angle": 0.5 * torch.atan2(2 * xy, xx - yy) % math.pi,
        "flux_over_peak": images.sum((1, 2, 3)) / peak.flatten().clamp_min(1e-12),
        "knot_count": knots.sum((1, 2, 3)).float(),
        "knot_angle": torch.atan2(y_axis.flatten()[brightest], x_axis.flatten()[brightest]) % (2 * math.pi),
    }


def describe_flux(images: Tensor, low: Tensor, high: Tensor) -> dict[str, Tensor]:
    """Sky, peak and flux above the sky, (n,) each, in the unit of the files. There, images range from ``low`` to
    ``high`` (n,)."""
    pixels = in_unit(images, low, high).flatten(1)
    sky = pixels.median(1).values
    found = {"sky": sky, "peak": high, "flux": (pixels - sky[:, None]).sum(1)}
    return {name: value.float() for name, value in found.items()}


@cache
def _coordinates(size: int) -> tuple[Tensor, Tensor]:
    """y and x of each pixel from the centre of the image, in pixels."""
    axis = torch.arange(size) - (size - 1) / 2
    return torch.meshgrid(axis, axis, indexing="ij")


def _mean_by_number(values: Tensor, number: Tensor) -> Tensor:
    """Means (n, k) of values (n, h, w) over the pixels with number 0 to k - 1."""
    count = torch.bincount(number.flatten())
    return torch.zeros(len(values), len(count)).index_add_(1, number.flatten(), values.flatten(1)) / count
