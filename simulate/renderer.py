"""Lenses of the DeepLense Models I, II and III: their random parameters, point masses, and images by lenstronomy.

Recipes: Alexander et al. 2020 (arXiv:1909.07346) as coded in DeepLenseSim, rendered by lenstronomy (Birrer & Amara
2018, arXiv:1803.09746). Every function uses the recipe of Model II unless it is given another one.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from astropy import constants, units
from astropy.cosmology import FlatLambdaCDM
from astropy.table import Table
from lenstronomy.ImSim.image_model import ImageModel
from lenstronomy.SimulationAPI.sim_api import SimAPI

from simulate.recipes import MODEL_II, Recipe

_PIXELS = MODEL_II.image_shape[-1]
_HALO_MASS = 1e12  # solar masses, like all masses here
_VORTEX_MASS, _VORTEX_POINTS = 3e10, 100
_SUBHALO_COUNT, _SUBHALO_MASSES, _SUBHALO_SLOPE, _SUBHALO_RADII = 25, (1e6, 1e10), -0.9, (0.25, 2.0)  # radii in arcsec
_SOURCE_BOX = 0.35  # the source lies within +-0.35" on each axis
_COSMOLOGIES = {"WMAP9": (69.7, 0.2814, 0.0464), "Planck18": (67.5, 0.309, 0.049)}  # pyHalo's until, and since, 2022
_UNITS = {"source_xy": "arcsec", "subhalo_xy": "arcsec", "axion_mass": "eV", "vortex_angle": "rad"}
_UNITS |= {"subhalo_mass": "solMass", "exposure": "s", "source_angle": "rad", "sigma_v": "km/s", "inclination": "rad"}


def draw_lens(rng: np.random.Generator, name: str) -> dict[str, Any]:
    """The parameters of an image of a class, without those of its noise; NaN where the class has no such parameter."""
    row = {
        "source_xy": rng.uniform(-_SOURCE_BOX, _SOURCE_BOX, 2),
        "axion_mass": np.nan,
        "vortex_angle": np.nan,
        "subhalo_mass": np.full(_SUBHALO_COUNT, np.nan),
        "subhalo_xy": np.full((_SUBHALO_COUNT, 2), np.nan),
    }
    if name == "axion":
        row["axion_mass"] = 10 ** rng.uniform(-24, -22)
        row["vortex_angle"] = rng.uniform(0, 2 * np.pi)
    if name == "cdm":
        low, high = np.power(_SUBHALO_MASSES, _SUBHALO_SLOPE + 1)  # inverse CDF of p(m) ~ m^-0.9
        row["subhalo_mass"] = (low + (high - low) * rng.random(_SUBHALO_COUNT)) ** (1 / (_SUBHALO_SLOPE + 1))
        radius, angle = rng.uniform(*_SUBHALO_RADII, _SUBHALO_COUNT), rng.uniform(0, 2 * np.pi, _SUBHALO_COUNT)
        row["subhalo_xy"] = np.stack([radius * np.sin(angle), radius * np.cos(angle)], axis=1)
    return row


def parameter_table(
    num_per_class: int,
    seed: int,
    recipe: Recipe = MODEL_II,
    draw: Callable[[np.random.Generator, str], dict[str, Any]] = draw_lens,
) -> Table:
    """Table of the parameters drawn for every image, one row each; an image depends on nothing but its row.

    Row k depends on ``seed``, its class and its index alone. Angles are in radians, positions in arcsec, masses in
    solar masses, the axion mass in eV, exposures in seconds.
    """
    rows = []
    for index in range(num_per_class):
        for label, name in enumerate(recipe.classes):
            rng = np.random.default_rng([seed, label, index])
            row = {"class": name, "index": index} | draw(rng, name)
            if recipe.noise:
                least, most = recipe.exposure
                row |= {"exposure": least * (most / least) ** rng.random(), "noise_seed": rng.integers(2**63)}
            rows.append(row)
    return Table(
        {key: [row[key] for row in rows] for key in rows[0]}, units={k: _UNITS[k] for k in _UNITS if k in rows[0]}
    )


def point_masses(row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Substructure of an image: masses (n,) in solar masses and positions (n, 2) in arcsec; n is 0 for no_sub."""
    if row["class"] == "axion":
        # A vortex as long as the de Broglie wavelength: 100 equal points on a line through the centre
        length = 0.06 / (2 * row["axion_mass"]) * 1e-22
        direction = [np.cos(row["vortex_angle"]), np.sin(row["vortex_angle"])]
        positions = np.linspace(-length, length, _VORTEX_POINTS)[:, None] * direction
        return np.full(_VORTEX_POINTS, _VORTEX_MASS / _VORTEX_POINTS), positions
    if row["class"] == "cdm":
        return np.asarray(row["subhalo_mass"]), np.asarray(row["subhalo_xy"])
    return np.empty(0), np.empty((0, 2))


def einstein_radius(mass: np.ndarray | float, convention: str = "luminosity") -> np.ndarray:
    """Einstein radius in arcsec of point masses in solar masses, for the redshifts of the recipe.

    ``sqrt(4 G M / c^2 * D_LS / (D_L D_S))``. The published images take luminosity distances and D_LS = D_S - D_L
    (1.28149" for 1e12 solar masses); the textbook takes angular-diameter distances throughout.
    """
    return np.sqrt(np.asarray(mass)) * _einstein_radius_of_one(convention)


@cache
def _einstein_radius_of_one(convention: str) -> float:
    cosmology = FlatLambdaCDM(H0=70, Om0=0.3, Ob0=0.05)
    lens, source = cosmology.comoving_distance([MODEL_II.z_lens, MODEL_II.z_source])
    if convention == "luminosity":
        lens, source = lens * (1 + MODEL_II.z_lens), source * (1 + MODEL_II.z_source)
        between = source - lens
    else:
        between = (source - lens) / (1 + MODEL_II.z_source)  # in a flat universe
        lens, source = lens / (1 + MODEL_II.z_lens), source / (1 + MODEL_II.z_source)
    angle = np.sqrt(4 * constants.G * units.solMass / constants.c**2 * between / (lens * source))
    return 206265 * angle.to_value("")


@cache
def telescope(num_points: int, recipe: Recipe = MODEL_II) -> tuple[SimAPI, ImageModel]:
    """lenstronomy's simulator and image model for a lens with ``num_points`` point masses; slow to build, then fast."""
    lenses = ["SIE", "SHEAR"] + ["POINT_MASS"] * num_points
    return build_telescope(recipe, lenses, [recipe.z_lens] * len(lenses), source_light_model_list=["SERSIC_ELLIPSE"])


def build_telescope(
    recipe: Recipe, lenses: list[str], redshifts: list[float], **light: list[str]
) -> tuple[SimAPI, ImageModel]:
    """lenstronomy's simulator and image model for lenses at redshifts, and for light under lenstronomy's names."""
    planes = {
        "lens_redshift_list": redshifts,
        "source_redshift_list": [recipe.z_source],
        # Deflections are meant for a source at this redshift: lenstronomy scales them to that of ours
        "z_source_convention": recipe.z_convention,
        "z_source": recipe.z_source,
        "cosmo": cosmology(recipe),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it asks us to check the cosmology that the recipe fixes
        simulator = SimAPI(
            num_pix=recipe.image_shape[-1],
            kwargs_single_band={
                "pixel_scale": recipe.pixel_scale,
                "psf_type": "GAUSSIAN",
                "seeing": recipe.psf_fwhm,
                "truncation": recipe.psf_truncation,
                "magnitude_zero_point": recipe.zero_point,
                "exposure_time": recipe.exposure[0],  # lenstronomy asks for this and the next, but does not use them
                "background_noise": recipe.sky_noise,
            },
            kwargs_model={"lens_model_list": lenses, **light, **(planes if recipe.z_convention else {})},
        )
        return simulator, simulator.image_model_class({"point_source_supersampling_factor": 1})


def cosmology(recipe: Recipe) -> FlatLambdaCDM:
    """The cosmology of the ray tracing."""
    h0, om0, ob0 = _COSMOLOGIES[recipe.cosmology]
    return FlatLambdaCDM(H0=h0, Om0=om0, Ob0=ob0)


def render(
    source_xy: np.ndarray,
    theta_e: np.ndarray,
    positions: np.ndarray,
    halo_theta_e: float | None = None,
    recipe: Recipe = MODEL_II,
) -> np.ndarray:
    """One noise-free image of the recipe, (h, w) float64 in counts per second.

    Args:
        source_xy: centre of the source in arcsec, (2,).
        theta_e: Einstein radii of the point masses in arcsec, (n,).
        positions: their positions in arcsec, (n, 2).
        halo_theta_e: Einstein radius of the main halo in arcsec; that of 1e12 solar masses when None.
    """
    simulator, image_model = telescope(len(theta_e), recipe)
    lens = smooth_lens(halo_theta_e)
    lens += [{"theta_E": t, "center_x": x, "center_y": y} for t, (x, y) in zip(theta_e, positions, strict=True)]
    x, y = source_xy
    light = [source_light(recipe) | {"center_x": x, "center_y": y}]
    if "magnitude" in light[0]:
        _, light, _ = simulator.magnitude2amplitude(kwargs_source_mag=light)
    return recipe.times * image_model.image(lens, light)


def render_row(row: dict[str, Any], recipe: Recipe = MODEL_II) -> np.ndarray:
    """The image of a row of ``parameter_table``: as ``render`` gives it, or with noise if the recipe has any."""
    masses, positions = point_masses(row)
    halo = einstein_radius(_HALO_MASS, recipe.convention)
    image = render(row["source_xy"], einstein_radius(masses, recipe.convention), positions, halo, recipe)
    return add_noise(image / recipe.times, row, recipe) if recipe.noise else image


def add_noise(model: np.ndarray, row: dict[str, Any], recipe: Recipe) -> np.ndarray:
    """Adds the shot noise and the sky noise of its exposure to a noise-free image ``model`` in counts per second.

    If a recipe counts photons, their number is drawn once more, around the noisy image, as the published code does.
    """
    rng = np.random.default_rng(row["noise_seed"])
    shot = rng.normal(0, np.sqrt(np.abs(model) / row["exposure"]))
    image = model + shot + rng.normal(0, recipe.sky_noise, model.shape)
    return rng.poisson(np.maximum(0, row["exposure"] * image)) if recipe.photons else image


def smooth_lens(halo_theta_e: float | None = None) -> list[dict[str, float]]:
    """The lens without substructure, as lenstronomy takes it."""
    halo_theta_e = einstein_radius(_HALO_MASS) if halo_theta_e is None else halo_theta_e
    return [
        {"theta_E": halo_theta_e, "e1": 0.1, "e2": 0.0, "center_x": 0.0, "center_y": 0.0},
        {"gamma1": 0.05, "gamma2": 0.0},
    ]


def source_light(recipe: Recipe = MODEL_II) -> dict[str, float]:
    """The source without its position, as lenstronomy's SERSIC_ELLIPSE takes it."""
    unit, brightness = recipe.source
    return {unit: brightness, "R_sersic": 0.25, "n_sersic": 1, "e1": -0.1, "e2": 0.1}


def pixel_centres() -> np.ndarray:
    """Coordinates x and y of the pixels, (2, h, w) in arcsec."""
    return np.stack(telescope(0)[1].ImageNumerics.coordinates_evaluate).reshape(2, _PIXELS, _PIXELS)


def source_plane() -> np.ndarray:
    """Points where the ray of each pixel meets the source plane behind the smooth lens, (2, h, w) in arcsec."""
    _, image_model = telescope(0)
    x, y = image_model.ImageNumerics.coordinates_evaluate
    rays = image_model.source_mapping.image2source(x, y, smooth_lens(), 0)
    return np.stack(rays).reshape(2, _PIXELS, _PIXELS)


def psf_matrix() -> np.ndarray:
    """P, (h, h), such that P @ image @ P.T is the image blurred by the telescope's Gaussian point spread function."""
    convolve = telescope(0)[1].ImageNumerics.re_size_convolve
    rows = np.repeat(np.eye(_PIXELS)[:, :, None], _PIXELS, axis=2)  # image i is 1 in row i
    matrix = np.stack([convolve(image.ravel())[:, 0] for image in rows], axis=1)
    return matrix / matrix.sum(1, keepdims=True)  # a flat image stays as it is
