"""Does an image obey the lens equation? The recipe's smooth lens is fitted to it; the residual is what is left over.

A smooth lens of Model II (SIE + shear, a Sérsic source, the telescope's PSF; see simulate/renderer.py) has two free
numbers, the position of its source. Its rays meet the source plane in the same places wherever the source is, so a
model image is one evaluation of the source's brightness there and one blur: a thousand fits take seconds.
"""

from functools import cache

import numpy as np
import torch
from lenstronomy.LensModel.Profiles.sersic_utils import SersicUtil
from lenstronomy.Util.param_util import transform_e1e2_product_average
from torch import Tensor

from dataset import normalize
from simulate.renderer import psf_matrix, source_light, source_plane

_BOX, _SPACING = 0.45, 0.03  # arcsec; sources of the recipe lie within +-0.35, a generator may overshoot
_STEPS = 6  # of Gauss-Newton; three are enough on a smooth lens
_DIFFERENCE = 1e-3  # arcsec, for the derivative
_LEAST_EXPLAINED = 0.5  # share of an image's variance; images of every class of the recipe reach 0.95, noise about 0


class _SmoothLens:
    """Model images of the smooth lens."""

    def __init__(self) -> None:
        source = source_light()
        e1, e2, radius, index = (source[key] for key in ("e1", "e2", "R_sersic", "n_sersic"))

        def circular(xy: np.ndarray) -> np.ndarray:  # linear coordinates (2, ...) in which the source is round
            return np.stack(transform_e1e2_product_average(*xy, e1, e2, 0.0, 0.0))

        self.rays = torch.from_numpy(circular(source_plane())).float()
        self.to_circular = torch.from_numpy(circular(np.eye(2))).float()
        self.radius, self.index, self.b = radius, index, float(SersicUtil().b_n(index))
        self.psf = torch.from_numpy(psf_matrix()).float()

    def light(self, xy: Tensor) -> Tensor:
        """Images (n, 1, h, w), not scaled, for source positions (n, 2) in arcsec."""
        offset = self.rays - (xy @ self.to_circular.T)[:, :, None, None]
        distance = offset.square().sum(1).sqrt()
        brightness = torch.exp(-self.b * (distance / self.radius) ** (1 / self.index))
        return (self.psf @ brightness @ self.psf.T)[:, None]


@cache
def _smooth_lens() -> _SmoothLens:
    return _SmoothLens()


@cache
def _grid() -> tuple[Tensor, Tensor]:
    """Source positions (m, 2) that cover the box, and their model images (m, pixels)."""
    axis = torch.arange(-_BOX, _BOX + _SPACING / 2, _SPACING)
    xy = torch.cartesian_prod(axis, axis)
    return xy, normalize(_smooth_lens().light(xy)).flatten(1)


def fit_smooth_lens(images: Tensor) -> tuple[Tensor, Tensor]:
    """Fits the source position of the smooth lens to each image, by least squares: a grid, then Gauss-Newton.

    Args:
        images: (n, 1, h, w) in [0, 1], each with its own peak at 1.

    Returns:
        Source positions (n, 2) in arcsec, and the residuals of the best models, image - model, (n, 1, h, w).
    """
    lens = _smooth_lens()
    positions, models = _grid()
    data = images.flatten(1)
    xy = positions[(models.square().sum(1) - 2 * data @ models.T).argmin(1)]
    shift = _DIFFERENCE * torch.eye(2)
    light = lens.light(xy)
    model = normalize(light).flatten(1)
    scale = torch.ones(len(data), 1)
    for _ in range(_STEPS):
        # Image and model are scaled by their brightest pixel, which may change in a step: each step also fits a scale
        slopes = [(lens.light(xy + d) - light).flatten(1) / _DIFFERENCE for d in shift]
        terms = torch.stack([*slopes, light.flatten(1), torch.ones_like(data)], dim=2)
        found = torch.linalg.lstsq(terms, data[:, :, None]).solution[:, :, 0]
        step = (found[:, :2] / found[:, 2:3]).nan_to_num()
        trial_xy = xy + (scale * step).clamp(-2 * _SPACING, 2 * _SPACING)
        trial_light = lens.light(trial_xy)
        trial = normalize(trial_light).flatten(1)
        better = (data - trial).square().sum(1) < (data - model).square().sum(1)
        xy, model = torch.where(better[:, None], trial_xy, xy), torch.where(better[:, None], trial, model)
        light = torch.where(better[:, None, None, None], trial_light, light)
        scale = torch.where(better[:, None], scale, scale / 2)
    return xy, (data - model).view_as(images)


def fits(images: Tensor, residuals: Tensor) -> Tensor:
    """Whether the model explains more than half of an image's variance, (n,) bool; of noise it explains none."""
    return residuals.flatten(1).square().mean(1) < (1 - _LEAST_EXPLAINED) * images.flatten(1).var(1)
