"""Whether generated lenses have the parameters that they were asked for, and equal a simulator's images of them.

The test images say what to ask for. A lens is generated from the class and the parameters of each, and compared with
the test image itself: pixel by pixel (emulation), and by what a regressor reads off both (recovery).
"""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from scipy.stats import circstd, spearmanr
from torch import Tensor

from dataset import NpyDataset, some_of_each_class
from metrics.distances import wasserstein
from models.flow import Sampler
from models.generator import Generator
from models.regressor import LensRegressor, Recovery
from scaling import in_unit
from settings import InputError
from simulate.instrument import INSTRUMENTS, observer_of
from simulate.recipes import recipe_behind

_SWEPT, _STEPS = 30, 7  # lenses of which a parameter is swept, and the number of values it takes
_FEWEST = 20  # images at least, to compare a free parameter
WORST = 8  # images that are kept to be shown


def obedience(
    model: Generator,
    regressor: LensRegressor | None,
    test: NpyDataset,
    count: int,
    seed: int,
    batch_size: int,
    sampler: Sampler | None = None,
) -> dict[str, Any]:
    """Everything that the report says about a generator with parameters, from ``count`` test images of each class.

    The generator's own sampler is used unless another one is given. Images are compared in the unit of the data, or
    scaled to [0, 1] where no flux is kept.

    Returns:
        "emulation", by class: RMS over peak of the difference from the test image, if the generator is given all its
        known parameters ("given"), only those that every class has, such as the source ("common"), or its class alone
        ("class"); beside it, the RMS of the noise of each telescope;
        "recovery", by parameter: R^2 and more of generated and real images;
        "conditionals", by parameter that not every class has: W1, in standard deviations, between its values read off
        "common" images and off real ones, beside that of real images against each other;
        "order", by parameter: rank correlation of asked and read values as that parameter alone is swept;
        and what is drawn: "panels", "worst" images with "captions", and "errors".
    """
    index = some_of_each_class(test.labels, count, seed)
    labels, asked = test.labels[index], test.phases(model.lens_parameters, lenient=True)[index]
    images, low, high = test.look(index)
    real = in_unit(images, low, high).float() if model.scaling.keeps_flux else images

    def draw(labels: Tensor, phases: Tensor | None, first: int = 0) -> Tensor:
        return model.scaling.undo(model.generate(labels, sampler, seed, batch_size, first, phases))

    drawn = {"given": draw(labels, asked), "class": draw(labels, None, len(labels))}
    of_some = torch.tensor([not {*of.classes} >= {*model.classes} for of in model.lens_parameters])
    if of_some.any() and not of_some.all():
        drawn["common"] = draw(labels, asked.masked_fill(of_some, math.nan), 2 * len(labels))
    faintest, brightest = real.amin((1, 2, 3), keepdim=True), real.amax((1, 2, 3), keepdim=True)
    drawn = {name: (images - faintest) / (brightest - faintest) for name, images in drawn.items()}
    real = (real - faintest) / (brightest - faintest)
    off = {name: _rms(images - real) for name, images in drawn.items()}
    given, errors = drawn["given"], off["given"]
    found = {"emulation": _emulation(test, index, off), "errors": {}}
    for label, name in enumerate(test.classes):
        found["errors"][name] = errors[labels == label].numpy()
    worst = errors.argsort(descending=True)[:WORST]
    found["worst"] = {"asked for": real[worst], "generated": given[worst], "difference, ±0.05": (given - real)[worst]}
    found["captions"] = [f"{test.classes[labels[i]]}, {errors[i]:.1%}" for i in worst]
    if regressor:
        known = test.phases(regressor.lens_parameters, lenient=True)[index]
        of_given, of_real = (Recovery.between(regressor, known, images) for images in (given, real))
        found["recovery"] = {"generated": of_given.table(), "real": of_real.table()}
        found["panels"] = {"generated": of_given.panels(), "real": of_real.panels()}
        found["conditionals"] = (
            _conditionals(model, regressor, labels, real, drawn["common"]) if "common" in drawn else {}
        )
        found["order"] = _order(model, regressor, labels, asked, draw)
    return found


def _emulation(test: NpyDataset, index: Tensor, errors: dict[str, Tensor]) -> dict[str, Any]:
    """Errors by class, for each choice of parameters that are given, beside the noise of telescopes."""
    noises = {}
    for instrument in INSTRUMENTS if recipe_behind(test) else ():  # else their brightness is unknown
        with suppress(InputError):  # images that already have noise are refused
            observers = (observer_of(test, instrument, seed=seed) for seed in (0, 1))
            looks = [test.observed(observer).read(index) for observer in observers]
            noises[instrument] = _rms(looks[0] - looks[1]) / 2**0.5
    found, labels = {}, test.labels[index]
    for label, name in enumerate(test.classes):
        here = labels == label
        found[name] = {key: _root_mean_square(of[here]) for key, of in errors.items()}
        found[name] |= {"median": errors["given"][here].median().item(), "worst": errors["given"][here].max().item()}
        found[name] |= {instrument: _root_mean_square(noise[here]) for instrument, noise in noises.items()}
    return found


def _conditionals(
    model: Generator, regressor: LensRegressor, labels: Tensor, real: Tensor, images: Tensor
) -> dict[str, Any]:
    """W1 between ``images`` and real ones, in each parameter that was free: only those of every class were given."""
    generated, real = (regressor.read(some).double().numpy() for some in (images, real))
    found, even = {}, np.arange(len(labels)) % 2 == 0
    for i, of in enumerate(regressor.lens_parameters):
        here = np.isin(labels, [label for label, name in enumerate(model.classes) if name in of.classes])
        if {*of.classes} >= {*model.classes} or here.sum() < _FEWEST:
            continue
        period, deviation = (2 * math.pi, circstd) if of.scale == "angle" else (None, np.std)
        if not (spread := deviation(real[here, i])) > 0:
            continue
        values = {
            "value": wasserstein(generated[here, i], real[here, i], period),
            # Between halves, whose distance is larger than that of full samples by the root of two
            "floor": wasserstein(real[here & even, i], real[here & ~even, i], period) / 2**0.5,
        }
        found[of.name] = {name: float(value / spread) for name, value in values.items()}
    return found


def _order(
    model: Generator, regressor: LensRegressor, labels: Tensor, asked: Tensor, draw: Callable[..., Tensor]
) -> dict[str, float]:
    """Mean over lenses of the rank correlation between the values a parameter is swept through and those read."""
    found = {}
    places = {of.name: i for i, of in enumerate(model.lens_parameters)}
    for read_at, of in enumerate(regressor.lens_parameters):
        if of.name not in places or of.scale == "angle":
            continue
        place = places[of.name]
        lenses = torch.nonzero(asked[:, place].isfinite()).flatten()
        if not len(lenses):
            continue
        lenses = lenses[:: math.ceil(len(lenses) / _SWEPT)]
        grid = torch.linspace(*asked[lenses, place].aminmax(), _STEPS)
        if grid[0] == grid[-1]:
            continue
        read = []
        for value in grid:  # each from the same noise
            phases = asked[lenses].clone()
            phases[:, place] = value
            read.append(regressor.read(draw(labels[lenses], phases))[:, read_at])
        read = torch.stack(read, 1)
        alike = read.amax(1) == read.amin(1)  # these have no rank correlation, and count as 0
        found[of.name] = sum(spearmanr(grid, row).statistic for row in read[~alike]) / len(read)
    return found


def _rms(images: Tensor) -> Tensor:
    return images.square().mean((1, 2, 3)).sqrt()


def _root_mean_square(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
