"""Lenses of the DeepLense Model IV: galaxies in three bands behind populations of dark-matter haloes.

pyHalo (Gilman et al. 2020, arXiv:1908.06983) draws the haloes. They lie on dozens of planes along the line of sight, so
an image takes seconds. If the user has no images of galaxies, GalSim (Rowe et al. 2015, arXiv:1407.7676) draws some.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
from lenstronomy.LightModel.light_model import LightModel

from settings import InputError
from simulate.recipes import MODEL_IV, Recipe
from simulate.renderer import add_noise, build_telescope, cosmology

_SOURCE_BOX = 0.3  # the source lies within +-0.3" on each axis
_SOURCE_MAGNITUDES = (22, 19, 18)  # in g, r and i
_GALAXY_PIXELS, _GALAXY_SCALE, _CORNER = 256, 0.0025, 50  # pixels, arcsec a pixel, pixels that are sky
_LENS_LIGHT = (  # magnitudes in g, r and i, and the rest as lenstronomy takes it
    ((17, 18, 19), {"R_sersic": 0.4, "n_sersic": 2.3, "e1": 0.0, "e2": 0.05}),
    ((28, 28, 28), {"R_sersic": 1.5, "n_sersic": 1.2, "e1": 0.0, "e2": 0.3}),
)
_VELOCITY = 260, 20  # velocity dispersion of lenses without haloes in km/s: mean and standard deviation
_MAIN_LENS = ({"theta_E": 1.5, "e1": 0.0, "e2": 0.0}, {"gamma1": 0.05, "gamma2": 0.0})  # with haloes, in arcsec
_CONE = 10  # opening angle, in arcsec, of the cone that holds the haloes of cold dark matter
_LEAST_HALO = 6.0  # least mass of these haloes, log10 of solar masses; with 7, an image takes 2 s instead of 18
_AXION_MASS = -21  # log10 of eV
# Brightness in g, r and i (columns) of the bulge, the disc and the knots (rows) of a galaxy that is drawn here
_COLOURS = np.array([[0.6, 1.0, 1.3], [1.0, 1.0, 1.0], [1.6, 1.0, 0.7]])


def with_galaxies(path: str | None) -> tuple[Callable[..., dict[str, Any]], Callable[..., np.ndarray]]:
    """Functions that draw an image's parameters and that render it, with galaxies of a Galaxy10 file or drawn ones.

    Raises:
        InputError: when a package is missing or the file is not that of Galaxy10.
    """
    missing = [name for name in ("pyHalo", "colossus", "mcfit", *([] if path else ["galsim"])) if not find_spec(name)]
    if missing:
        command = "pip install -r requirements-model-iv.txt"
        raise InputError(f"Model IV needs {', '.join(missing)}: {command}")
    count = len(_galaxies(path)) if path else None
    return partial(draw_lens, galaxies=count), partial(render_row, path=path)


def draw_lens(rng: np.random.Generator, name: str, galaxies: int | None = None) -> dict[str, Any]:
    """The parameters of an image of a class, without those of its noise; NaN where the class has no such parameter."""
    row = {
        "source_xy": rng.uniform(-_SOURCE_BOX, _SOURCE_BOX, 2),
        "source_angle": rng.uniform(-np.pi, np.pi),
        "sigma_v": rng.normal(*_VELOCITY) if name == "no" else np.nan,
        "halo_seed": rng.integers(2**63),
    }
    if galaxies:
        return row | {"galaxy": rng.integers(galaxies)}
    return row | {
        "bulge_share": rng.uniform(0.1, 0.4),
        "knot_share": rng.uniform(0.1, 0.3),
        "knots": rng.integers(30, 100),
        "disc_radius": rng.uniform(14, 26),  # pixels
        "inclination": np.arccos(rng.uniform(0.2, 1)),
        "galaxy_seed": rng.integers(1, 2**31),
    }


def render_row(row: dict[str, Any], recipe: Recipe = MODEL_IV, path: str | None = None) -> np.ndarray:
    """The image of a row, (h, w, 3) float64: as published, clipped at 0 and divided by its brightest pixel."""
    lenses, redshifts, parameters = _lens(row, recipe)
    simulator, image_model = build_telescope(recipe, lenses, redshifts, source_light_model_list=["INTERPOL"])
    if row["class"] == "no":
        parameters = simulator.physical2lensing_conversion(parameters)
    rays = image_model.source_mapping.image2source(*image_model.ImageNumerics.coordinates_evaluate, parameters, 0)
    galaxy = _galaxies(path)[row["galaxy"]].astype(float) if path else draw_galaxy(row)
    x, y = row["source_xy"]
    place = {"center_x": x, "center_y": y, "phi_G": row["source_angle"], "scale": _GALAXY_SCALE}
    bands = []
    for band, magnitude in zip(np.moveaxis(galaxy, 2, 0), _SOURCE_MAGNITUDES, strict=True):
        band = band - np.median(band[:_CORNER, :_CORNER])
        amplitude = simulator.magnitude2cps(magnitude) / (band.sum() * _GALAXY_SCALE**2)
        light = LightModel(["INTERPOL"]).surface_brightness(*rays, [{"image": band, "amp": amplitude, **place}])
        bands.append(image_model.ImageNumerics.re_size_convolve(light))
    image = np.stack(bands) + _lens_light(recipe)
    image = add_noise(image, row, recipe) if recipe.noise else image
    return np.moveaxis(image.clip(0) / image.max(), 0, 2)


def _lens(row: dict[str, Any], recipe: Recipe) -> tuple[list[str], list[float], list[dict[str, float]]]:
    """Names of lenstronomy's profiles, their redshifts and their parameters."""
    if row["class"] == "no":
        return ["SIE"], [recipe.z_lens], [{"sigma_v": row["sigma_v"], "e1": 0.0, "e2": 0.0}]
    population = _populations(recipe)[row["class"]]
    _forget_truncation()
    np.random.set_state(np.random.MT19937(row["halo_seed"]).state)  # noqa: NPY002 (pyHalo draws from NumPy's own)
    haloes, redshifts, parameters, _ = population().lensing_quantities()
    return ["SIE", "SHEAR", *haloes], [recipe.z_lens] * 2 + list(redshifts), [*_MAIN_LENS, *parameters]


def _forget_truncation() -> None:
    """Resets a table that pyHalo keeps of earlier haloes: it grows, and later haloes depend on its interpolation."""
    from pyHalo.Halos.galacticus_truncation import transfer_function_density_profile as module

    module.x_min, module.x_max, module.Mass_table_Initialized = 1e-6, 1e4, False  # as when it is imported


@cache
def _populations(recipe: Recipe) -> dict[str, Callable[[], Any]]:
    """The function that draws the haloes of each class."""
    import colossus.settings

    colossus.settings.PERSISTENCE = ""  # no files in the user's home: several processes would write them at once
    _keep_what_repeats()
    from pyHalo.PresetModels.cdm import CDM
    from pyHalo.PresetModels.uldm import ULDM

    universe = cosmology(recipe)
    universe = {"H0": universe.H0.value, "Om0": universe.Om0, "Ob0": universe.Ob0}
    cold = partial(CDM, recipe.z_lens, recipe.z_source, kwargs_cosmo=universe)
    # Without the fluctuations of the main halo: for these, pyHalo must be told where the lensed images lie
    axion = partial(ULDM, recipe.z_lens, recipe.z_source, _AXION_MASS, flucs=False, kwargs_cosmo=universe)
    return {"cdm": partial(cold, cone_opening_angle_arcsec=_CONE, log_mlow=_LEAST_HALO), "axion": axion}


@cache
def _keep_what_repeats() -> None:
    """Makes pyHalo keep what it would compute anew for every image; an image takes half the time, equal bit for bit."""
    from colossus.cosmology.cosmology import getCurrent, setCurrent
    from pyHalo import pyhalo
    from pyHalo.Halos import lens_cosmo, tidal_truncation

    kept = lru_cache(2**16)  # has room for all planes of a light cone, and memory does not grow
    universe, two_halo_term = pyhalo.Cosmology, lens_cosmo.twoHaloTerm
    universe.D_A, universe.D_A_z = kept(universe.D_A), kept(universe.D_A_z)
    tidal_truncation.tau_mf_interpolation = kept(tidal_truncation.tau_mf_interpolation)
    of_universe = kept(lambda _, *arguments, **named: two_halo_term(*arguments, **named))
    lens_cosmo.twoHaloTerm = lambda *arguments, **named: of_universe(getCurrent(), *arguments, **named)
    make = kept(lambda *parameters: universe(None, dict(parameters)))

    def current(_: Any, parameters: dict[str, float]) -> Any:
        made = make(*parameters.items())
        setCurrent(made.colossus)
        return made

    pyhalo.Cosmology = current


@cache
def _lens_light(recipe: Recipe) -> np.ndarray:
    """Light of the lens in each band, (3, h, w)."""
    profiles = ["SERSIC_ELLIPSE"] * len(_LENS_LIGHT)
    unbent = replace(recipe, z_convention=None)
    simulator, image_model = build_telescope(unbent, [], [], lens_light_model_list=profiles)
    bands = []
    for band in range(len(_SOURCE_MAGNITUDES)):
        light, _, _ = simulator.magnitude2amplitude([{"magnitude": m[band], **shape} for m, shape in _LENS_LIGHT])
        bands.append(image_model.lens_surface_brightness(light))
    return np.stack(bands)


@cache
def _galaxies(path: str) -> np.ndarray:
    """Images (n, 256, 256, 3) of the nearby unbarred spirals of a Galaxy10 DECaLS file."""
    import h5py

    try:
        with h5py.File(path) as file:
            # Class 6: unbarred tight spirals
            chosen = np.flatnonzero((file["ans"][:] == 6) & (file["redshift"][:] < 0.02))
            images = file["images"][chosen]
        if not len(images) or images.shape[1:] != (_GALAXY_PIXELS, _GALAXY_PIXELS, 3):
            raise ValueError
    except (OSError, KeyError, ValueError):
        raise InputError(f"{path} is no Galaxy10 DECaLS file with unbarred spirals of z < 0.02") from None
    return images


def draw_galaxy(row: dict[str, Any]) -> np.ndarray:
    """A spiral galaxy of a bulge, an inclined disc and knots of young stars, (256, 256, 3)."""
    import galsim

    radius, flat = row["disc_radius"], np.cos(row["inclination"])
    disc = galsim.InclinedExponential(row["inclination"] * galsim.radians, scale_radius=radius)
    random = galsim.BaseDeviate(int(row["galaxy_seed"]))
    knots = galsim.RandomKnots(int(row["knots"]), profile=galsim.Exponential(scale_radius=radius), rng=random)
    knots = knots.transform(1, 0, 0, flat) / flat  # in the plane of the disc
    parts = [galsim.Sersic(2.5, 0.4 * radius), disc, galsim.Convolve(knots, galsim.Gaussian(sigma=2.0))]
    shares = [row["bulge_share"], 1 - row["bulge_share"] - row["knot_share"], row["knot_share"]]
    images = [part.drawImage(nx=_GALAXY_PIXELS, ny=_GALAXY_PIXELS, scale=1).array for part in parts]
    return np.einsum("p,pb,phw->hwb", shares, _COLOURS, images)
