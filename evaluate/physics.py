"""Numbers an astronomer reads off a lens image: ring, power spectrum, shape, flux, knots.

All of images (n, 1, 64, 64) in [0, 1]; lengths in arcsec, angles in radians, wave numbers in cycles an image.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import IMG_SIZE

PIXEL_SCALE = 0.101  # arcsec, of the Euclid images of the recipe
BANDS = {
    "1_4": (1, 4),
    "4_8": (4, 8),
    "8_16": (8, 16),
    "16_32": (16, 32),
}  # cycles an image, from large scales to small
PERIODS = {"ellipticity_angle": math.pi, "knot_angle": 2 * math.pi}  # of the figures that are angles
_KNOT_LEAST = 0.3  # of the peak; fainter maxima are no knots

_axis = (torch.arange(IMG_SIZE) - (IMG_SIZE - 1) / 2) * PIXEL_SCALE
_Y, _X = torch.meshgrid(_axis, _axis, indexing="ij")
_RADIUS = (_X.square() + _Y.square()).sqrt()
_RING = (_RADIUS / PIXEL_SCALE).long()  # number of each pixel's ring, one pixel wide
_frequency = torch.fft.fftfreq(IMG_SIZE, 1 / IMG_SIZE)
_WAVE_NUMBER = (_frequency[:, None].square() + _frequency[None].square()).sqrt().round().long()


def radial_profile(images: Tensor) -> Tensor:
    """Mean brightness at each distance from the centre, (n, 32), in rings one pixel wide."""
    return _mean_by_number(images[:, 0], _RING)[:, : IMG_SIZE // 2]


def power_spectrum(images: Tensor) -> Tensor:
    """Azimuthally averaged power of each wave number from 0 to 31, (n, 32): |FFT|^2 over the number of pixels."""
    return _mean_by_number(torch.fft.fft2(images[:, 0]).abs().square() / IMG_SIZE**2, _WAVE_NUMBER)[:, : IMG_SIZE // 2]


def band_power(spectrum: Tensor) -> dict[str, Tensor]:
    """Mean power of a spectrum (n, 32) in each of BANDS, (n,) each."""
    return {name: spectrum[:, low:high].mean(1) for name, (low, high) in BANDS.items()}


def describe(images: Tensor) -> dict[str, Tensor]:
    """Every number of an image, (n,) each.

    ring_radius, ring_width: mean and spread of the radius, with the radial profile as weight.
    power_*: log10 of the azimuthally averaged power in a band.
    ellipticity, ellipticity_angle: of the second moments of the light: (a^2 - b^2) / (a^2 + b^2), and the major axis,
    modulo pi.
    flux_over_peak: total over brightest pixel, in pixels.
    knot_count, knot_angle: maxima of their 5x5 surroundings brighter than 0.3 of the peak, and the position angle of
    the brightest one as seen from the centre, modulo 2 pi.
    """
    profile = radial_profile(images)
    powers = band_power(power_spectrum(images))
    radius = (torch.arange(profile.shape[1]) + 0.5) * PIXEL_SCALE
    weight = profile / profile.sum(1, keepdim=True).clamp_min(1e-12)
    ring_radius = (weight * radius).sum(1)
    ring_width = (weight * (radius - ring_radius[:, None]).square()).sum(1).sqrt()

    light = images[:, 0] / images[:, 0].sum((1, 2), keepdim=True).clamp_min(1e-12)
    x, y = (_X - (light * _X).sum((1, 2), keepdim=True)), (_Y - (light * _Y).sum((1, 2), keepdim=True))
    xx, yy, xy = ((light * a * b).sum((1, 2)) for a, b in ((x, x), (y, y), (x, y)))

    peaks = (images == F.max_pool2d(images, 5, 1, 2)) & (images > _KNOT_LEAST)
    brightest = images.flatten(1).argmax(1)
    return {
        "ring_radius": ring_radius,
        "ring_width": ring_width,
        **{f"power_{band}": power.clamp_min(1e-20).log10() for band, power in powers.items()},
        "ellipticity": torch.hypot(xx - yy, 2 * xy) / (xx + yy).clamp_min(1e-12),
        "ellipticity_angle": 0.5 * torch.atan2(2 * xy, xx - yy) % math.pi,
        "flux_over_peak": images.sum((1, 2, 3)) / images.amax((1, 2, 3)).clamp_min(1e-12),
        "knot_count": peaks.sum((1, 2, 3)).float(),
        "knot_angle": torch.atan2(_Y.flatten()[brightest], _X.flatten()[brightest]) % (2 * math.pi),
    }


def _mean_by_number(values: Tensor, number: Tensor) -> Tensor:
    """Means (n, k) of values (n, h, w) over the pixels with number 0 to k - 1."""
    count = torch.bincount(number.flatten())
    return torch.zeros(len(values), len(count)).index_add_(1, number.flatten(), values.flatten(1)) / count
