"""The recipe of simulate_lenses.py for many images at once, in float32 on any device, with the formulas of caustics.

For timing: the strongest simulator that a generator can be compared with. The main lens is the same in every image, so
its deflections are computed once, by lenstronomy; the point masses are those of each image.

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

from simulate.simulate_lenses import einstein_radius, point_masses, psf_matrix, source_light, source_plane, telescope

_SCALE = 0.6343147  # of deflections, which lenstronomy takes to be meant for a source at z = 2.5


def render_many(rows: Sequence[dict[str, Any]], device: torch.device | str = "cpu") -> Tensor:
    """Images (n, 64, 64), float32, of rows of ``parameter_table`` of one class; their unit is not that of the files."""
    x, y, ray_x, ray_y, psf = _main_lens(torch.device(device))
    masses, positions = zip(*map(point_masses, rows), strict=True)
    radii = _to_device(einstein_radius(np.stack(masses)), device)[:, :, None, None]
    centre = _to_device(np.stack(positions), device)[:, :, None, None]
    points = func.reduced_deflection_angle_point(centre[..., 0], centre[..., 1], radii, x, y)
    ray_x, ray_y = ray_x - _SCALE * points[0].sum(1), ray_y - _SCALE * points[1].sum(1)
    source = _to_device(np.stack([row["source_xy"] for row in rows]), device)[:, :, None, None]
    light = source_light()
    phi, q = (torch.tensor(value) for value in ellipticity2phi_q(light["e1"], light["e2"]))
    index, radius = torch.tensor(light["n_sersic"]), light["R_sersic"] / q**0.5  # lenstronomy's is the mean of the axes
    brightness = func.brightness_sersic(
        *(source[:, 0], source[:, 1], q, phi, index, radius, 1.0, ray_x, ray_y, SersicUtil().b_n(light["n_sersic"]))
    )
    return psf @ brightness @ psf.T


@cache
def _main_lens(device: torch.device) -> tuple[Tensor, ...]:
    """Pixels' x and y in arcsec, where their rays meet the source plane without point masses, and the PSF's matrix."""
    pixels = np.stack(telescope(0)[1].ImageNumerics.coordinates_evaluate).reshape(2, 64, 64)
    return tuple(_to_device(part, device) for part in (*pixels, *source_plane(), psf_matrix()))


def _to_device(values: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.from_numpy(values).float().to(device)
