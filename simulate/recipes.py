"""The recipes by which simulate/ makes images, and which recipe made the images of a folder. Imports nothing slow."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataset import NpyDataset

RECIPE_FILE = "recipe.json"  # beside the class folders
CHOICES = ("noise", "cosmology", "convention", "zero_point")  # what may differ between images of the same model


@dataclass(frozen=True)
class Recipe:
    """How images are simulated. A source of magnitude ``zero_point`` gives 1 count per second."""

    model: str  # of DeepLense: I, II, III or IV
    classes: tuple[str, ...]  # names of the class folders, alphabetical
    smooth_classes: tuple[str, ...]  # those without substructure
    image_shape: tuple[int, int, int]  # channels, height, width
    pixel_scale: float  # arcsec a pixel
    psf_fwhm: float  # arcsec; the point spread function is a Gaussian
    zero_point: float  # magnitude
    exposure: tuple[float, float]  # least and most, in seconds; log-uniform in between, the same for all bands
    sky_noise: float  # standard deviation, counts per second a pixel, at ``published_zero_point``
    published_zero_point: float  # zero point of the published code, with an older lenstronomy, and of the noise
    z_convention: float | None  # redshift of the source that deflections are meant for; None takes them as they are
    noise: bool
    z_lens: float = 0.5
    z_source: float = 1.0
    deflection_scale: float = 0.6343147  # what z_convention multiplies deflections by, in the cosmology WMAP9
    source: tuple[str, float] = ("magnitude", 20)  # or ("amp", brightness at R_sersic in counts per second / arcsec^2)
    psf_truncation: float = 5  # standard deviations
    photons: bool = False  # images are numbers of photons in place of counts per second
    times: float = 2  # published images without noise are the model times this: a slip of their code
    published_file: str = "{class}/{class}_sim_{index}.npy"
    cosmology: str = "WMAP9"  # of the ray tracing
    convention: str = "luminosity"  # of distances in Einstein radii

    @property
    def lens_equation(self) -> bool:
        """Whether the smooth lens that metrics/lens_equation.py fits is that of these images."""
        return replace(self, zero_point=MODEL_II.zero_point) == MODEL_II


def sky_noise(
    exposures: int, seconds: float, sky: float, zero_point: float, read_noise: float, pixel_scale: float
) -> float:
    """Standard deviation of the sky and the read noise (electrons an exposure), in counts per second a pixel.

    ``seconds`` is the length of one exposure, ``sky`` in magnitudes per square arcsec.
    """
    total = exposures * seconds
    return (exposures * read_noise**2 + total * 10 ** (-0.4 * (sky - zero_point)) * pixel_scale**2) ** 0.5 / total


_KINDS = ("axion", "cdm", "no_sub"), ("no_sub",)

# Euclid VIS over 6 years as in lenstronomy 1.9.2, which the published code used. Only the zero point is that of
# lenstronomy 1.14.2, in which all images have been written here
MODEL_II = Recipe(
    *("II", *_KINDS, (1, 64, 64)),
    pixel_scale=0.101,
    psf_fwhm=0.16,
    zero_point=25.72,
    exposure=(4 * 565, 4 * 565),
    sky_noise=sky_noise(4, 565, 22.35, 24.0, 4.2, 0.101),
    published_zero_point=24.0,
    z_convention=2.5,
    noise=False,
)
# HST WFC3 F160W, one exposure, the same in both versions of lenstronomy
MODEL_III = replace(
    MODEL_II,
    model="III",
    pixel_scale=0.08,
    psf_fwhm=0.08,
    zero_point=25.96,
    exposure=(5400, 5400),
    sky_noise=sky_noise(1, 5400, 22.3, 25.96, 4, 0.08),
    published_zero_point=25.96,
)
# An instrument that stands for no real one, without magnitudes
MODEL_I = replace(
    MODEL_II,
    model="I",
    image_shape=(1, 150, 150),
    pixel_scale=0.05,
    psf_fwhm=0.087,
    zero_point=24.0,
    psf_truncation=3,
    exposure=(1e3, 10**3.5),
    sky_noise=0.01,
    z_convention=None,
    deflection_scale=1.0,
    source=("amp", 20),
    noise=True,
    photons=True,
    times=1,
)
# The instrument of Model II for each of three bands, called g, r and i; the lens and its light are in model_iv.py
MODEL_IV = replace(
    MODEL_II,
    model="IV",
    classes=("axion", "cdm", "no"),
    smooth_classes=("no",),
    image_shape=(3, 64, 64),
    zero_point=24.0,
    noise=True,
    times=1,
    published_file="{split}/{class}/sim_{index}.npy",
)
MODELS = {recipe.model: recipe for recipe in (MODEL_I, MODEL_II, MODEL_III, MODEL_IV)}


def recipe_of(classes: Sequence[str], image_shape: Sequence[int], root_dir: str | Path | None = None) -> Recipe | None:
    """The recipe that made images of these classes and this shape; None for images of unknown origin.

    A folder says it in its ``recipe.json``. Without that file, images with the shape and the classes of Model II are
    taken for Model II: as published, if a folder is given.
    """
    told = _read(Path(root_dir) / RECIPE_FILE) if root_dir is not None else {}
    recipe = MODELS.get(str(told.get("model", "II")))
    if recipe is None or (recipe.classes, recipe.image_shape) != (tuple(classes), tuple(image_shape)):
        return None
    if root_dir is not None and not told:
        return replace(recipe, zero_point=recipe.published_zero_point)
    return replace(recipe, **{name: told[name] for name in CHOICES if name in told})


def description(recipe: Recipe) -> dict[str, Any]:
    """Content of ``recipe.json``."""
    return {name: getattr(recipe, name) for name in ("model", "pixel_scale", *CHOICES)}


def _read(path: Path) -> dict[str, Any]:
    """Content of a recipe.json; {} if it is absent or damaged."""
    with suppress(OSError, ValueError):
        told = json.loads(path.read_bytes())
        return told if isinstance(told, dict) else {}
    return {}


def recipe_behind(dataset: "NpyDataset") -> Recipe | None:
    """``recipe_of`` the images of a dataset."""
    return recipe_of(dataset.classes, dataset.image_shape, dataset.root_dir)


def scale_of(dataset: "NpyDataset") -> tuple[float, str]:
    """Pixel scale and the unit of lengths: arcsec where files or a recipe say it, else pixels."""
    if dataset.pixel_scale:
        return dataset.pixel_scale, "arcsec"
    recipe = recipe_behind(dataset)
    return (recipe.pixel_scale, "arcsec") if recipe else (1.0, "pixels")
