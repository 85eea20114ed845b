"""Facts about the images that simulate/ makes, for whoever reads such images. Imports nothing that takes time."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How images were simulated."""

    name: str
    classes: tuple[str, ...]  # names of the class folders, alphabetical
    smooth_classes: tuple[str, ...]  # those without substructure
    image_shape: tuple[int, int, int]  # channels, height, width
    pixel_scale: float  # arcsec a pixel
    z_lens: float
    z_source: float
    z_convention: float  # of the source that deflections are meant for
    deflection_scale: float  # what they are multiplied by for a source at z_source


MODEL_II = Recipe("Model II", ("axion", "cdm", "no_sub"), ("no_sub",), (1, 64, 64), 0.101, 0.5, 1.0, 2.5, 0.6343147)
RECIPES = (MODEL_II,)


def recipe_of(classes: Sequence[str], image_shape: Sequence[int]) -> Recipe | None:
    """The recipe that makes images of these classes and this shape; None for images of unknown origin."""
    found = (r for r in RECIPES if (r.classes, r.image_shape) == (tuple(classes), tuple(image_shape)))
    return next(found, None)


def pixel_scale_of(classes: Sequence[str], image_shape: Sequence[int]) -> tuple[float, str]:
    """Pixel scale and the unit of lengths: arcsec where a recipe is known, else pixels."""
    recipe = recipe_of(classes, image_shape)
    return (recipe.pixel_scale, "arcsec") if recipe else (1.0, "pixels")
