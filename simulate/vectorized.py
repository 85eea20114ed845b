"""Renders Model II for many images at once, in float32 on any device, with the formulas of caustics.

It is there for timing: the fastest simulator that a generator can be compared with. The main lens is the same in every
image, so its deflections are computed once, by lenstronomy; the point masses differ from image to image.

Formulas: caustics (Stone et al. 2024, arXiv:2406.15542).
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from caustics import func
from lenstronomy.LensModel.Profiles.sersic_utils import SersicUtil
from lenstronomy.Util.param_util import ellipticity2phi_q
from torch import Tensor

from simulate.recipes import MODEL_II
from simulate.renderer import einstein_radius, pixel_centres, point_masses, psf_matrix, source_light, source_plane


def render_many(rows: Sequence[dict[str, Any]], device: torch.device | str = "cpu") -> Tensor:
    """Images (n, h, w), float32, of rows of ``parameter_table`` of one class; their unit is not that of the files."""
    return shoot_rays(*to_tensors(rows, device))


def to_tensors(rows: Sequence[dict[str, Any]], device: torch.device | str) -> tuple[Tensor, ...]:
    """Arguments of ``shoot_rays``: sources (n, 2), radii (n, m) and positions (n, m, 2) in arcsec, then the recipe."""
    masses, positions = zip(*map(point_masses, rows), strict=True)
    sources = np.stack([row["source_xy"] for row in rows])
    of_rows = (sources, einstein_radius(np.stack(masses)), np.stack(positions))
    return *(_to_device(values, device) for values in of_rows), *_recipe(torch.device(device))


def shoot_rays(
    source: Tensor, radius: Tensor, centre: Tensor, pixels: Tensor, rays: Tensor, psf: Tensor, light: Tensor
) -> Tensor:
    """Images (n, h, w); takes nothing but tensors, so that torch can compile it.

    Args:
        source: centre of the source, (n, 2).
        radius, centre: Einstein radii and positions of the point masses, (n, m) and (n, m, 2).
        pixels, rays, psf, light: see ``_recipe``.
    """
    radius, centre = radius[:, :, None, None], centre[:, :, None, None]
    points = func.reduced_deflection_angle_point(centre[..., 0], centre[..., 1], radius, *pixels)
    ray_x, ray_y = (ray - MODEL_II.deflection_scale * point.sum(1) for ray, point in zip(rays, points, strict=True))
    x, y = source[:, :, None, None].unbind(1)
    q, phi, index, size, b = light
    return psf @ func.brightness_sersic(x, y, q, phi, index, size, 1.0, ray_x, ray_y, b) @ psf.T


@cache
def _recipe(device: torch.device) -> tuple[Tensor, ...]:
    """Coordinates of pixels (2, h, w) and of their rays in the source plane without point masses, in arcsec; the PSF's
    matrix (h, h); the source's axis ratio, angle, Sérsic index, radius and b_n."""
    light = source_light()
    phi, q = ellipticity2phi_q(light["e1"], light["e2"])
    size = light["R_sersic"] / np.sqrt(q)  # lenstronomy's radius is the geometric mean of the axes
    light = np.array([q, phi, light["n_sersic"], size, SersicUtil().b_n(light["n_sersic"])])
    return tuple(_to_device(values, device) for values in (pixel_centres(), source_plane(), psf_matrix(), light))


def _to_device(values: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.from_numpy(values).float().to(device)
