"""Training lenses, from which a new lens takes the parameters that nobody asks for.

A network that gets all parameters draws exactly that lens. One that gets a few must invent the others, and does so with
too little variety. Hence the others are first taken from a training lens of the class (a "hot deck", Andridge & Little
2010, doi:10.1111/j.1751-5823.2010.00103.x): one for which the given parameters predict about the same others as for the
new lens ("predictive mean matching", Little 1988, doi:10.1080/07350015.1988.10509663).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dataset import some_of_each_class
from parameters import Parameter

_MOST = 8000  # lenses kept of each class, at most
_ALIKE = 100  # lenses to choose from, if the given parameters predict any of the others
_CHANCE = 0.025  # standard deviation of the noise added to a phase, so that no training lens is drawn again exactly
_THE_SAME = 1e-5  # share of the largest variance below which combinations of parameters are left out as redundant
_SIGNIFICANT = 4.0  # standard errors that a slope must differ from 0 by
_LARGEST = 1e6  # largest phase of a lens


@dataclass(frozen=True)
class Population:
    """Training lenses of every class.

    Args:
        labels: of their classes, (lenses,) integers.
        phases: of their parameters, (lenses, parameters) as ``parameters.phases`` has them, NaN where unknown.
        parameters: what these are.

    Raises:
        ValueError: if the three do not fit together, or phases are no floats, infinite or too large.
    """

    labels: Tensor
    phases: Tensor
    parameters: Sequence[Parameter]

    def __post_init__(self):
        shape = (len(self.labels), len(self.parameters))
        integers = self.labels.dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
        numbers = self.phases.is_floating_point() and not (self.phases.float().abs() > _LARGEST).any()
        if not (integers and numbers) or self.phases.shape != shape or self.labels.shape != shape[:1]:
            raise ValueError(f"not {len(self.parameters)} parameters of lenses")

    @classmethod
    def of(cls, labels: Tensor, phases: Tensor, parameters: Sequence[Parameter]) -> "Population":
        """Some of the lenses of a training set with any known parameter; labels are (n,), phases (n, parameters)."""
        known = torch.nonzero(phases.isfinite().any(1))[:, 0]
        some = known[some_of_each_class(labels[known], _MOST)]
        angle = torch.tensor([of.scale == "angle" for of in parameters])
        phases = torch.where(angle, phases[some].remainder(2 * math.pi), phases[some])
        return cls(labels[some].short(), phases.half(), parameters)

    def state_dict(self) -> dict[str, Tensor]:
        return {"labels": self.labels, "phases": self.phases}

    def fill(self, labels: Tensor, asked: Tensor | None, seed: int, first: int = 0) -> Tensor:
        """Fills in the NaN of ``asked`` phases (n, parameters), or draws all; what no lens of a class has stays NaN.

        Image k of a seed, counted from ``first``, always takes the parameters of the same lens, unless given parameters
        predict any of the others.
        """
        labels, size = labels.cpu(), len(self.parameters)
        filled = torch.full((len(labels), size), torch.nan) if asked is None else asked.cpu().float().clone()
        chance = _uniform((len(labels), 1 + size), seed, first)
        kinds, of_kind = torch.cat([labels[:, None], filled.isfinite()], 1).unique(dim=0, return_inverse=True)
        for kind, (label, *given) in enumerate(kinds.tolist()):
            given = torch.tensor(given, dtype=torch.bool)
            if label not in self._classes or not (self._classes[label].known & ~given).any():
                continue
            lenses, here = self._classes[label], torch.nonzero(of_kind == kind)[:, 0]
            taken = lenses.phases[lenses.alike(given, filled[here], chance[here, 0])]
            drawn = taken + _CHANCE * torch.special.ndtri(chance[here, 1:]).float()
            filled[here] = torch.where(given, filled[here], drawn)
        return filled

    @cached_property
    def _classes(self) -> dict[int, "_Class"]:
        angle = torch.tensor([of.scale == "angle" for of in self.parameters])
        return {label: _Class(self.phases[self.labels == label], angle) for label in self.labels.unique().tolist()}


class _Class:
    """Lenses of a class, and how their parameters predict each other by linear regression.

    Args:
        phases: (lenses, parameters).
        angle: which parameters are angles, (parameters,); sine and cosine take the place of an angle.
    """

    def __init__(self, phases: Tensor, angle: Tensor):
        self.phases, self.angle = phases.float(), angle
        self.known = self.phases.isfinite().any(0)
        places = torch.arange(len(angle))
        self.owner = torch.cat([places[~angle], places[angle], places[angle]])  # parameter of each feature
        self.features = self._features(self.phases)
        x, there = self.features - self.features.nanmean(0), self.features.isfinite().double()
        self.pairs = (there.T @ there).clamp_min(1)  # number of lenses in which both features are known
        self.moments = x.nan_to_num().T @ x.nan_to_num() / self.pairs

    def _features(self, phases: Tensor) -> Tensor:
        angles = phases[:, self.angle].double()
        return torch.cat([phases[:, ~self.angle].double(), angles.sin(), angles.cos()], 1)

    def alike(self, given: Tensor, asked: Tensor, chance: Tensor) -> Tensor:
        """The lens whose parameters each image takes, (n,): ``chance`` (n,) from 0 to 1 picks one that is alike.

        A lens is alike if its ``given`` parameters predict nearly the same others as those ``asked`` (n, parameters).
        All lenses are alike if the given parameters predict nothing, or if no lens has all of them.
        """
        given = (given & self.known)[self.owner]
        slopes = self._slopes(given)
        able = torch.nonzero(self.features[:, given].isfinite().all(1))[:, 0]  # lenses with all given parameters
        if not slopes.any() or not len(able):
            return (chance * len(self.phases)).long()
        predicted, wanted, found = self.features[able][:, given] @ slopes, self._features(asked)[:, given] @ slopes, []
        for some, of_some in zip(wanted.split(1024), chance.split(1024), strict=True):
            distance = torch.cdist(some, predicted)
            alike = distance <= distance.kthvalue(min(_ALIKE, len(able)), 1, True).values
            number = (of_some * alike.sum(1)).long()
            found.append(able[(alike.cumsum(1) > number[:, None]).int().argmax(1)])
        return torch.cat(found)

    def _slopes(self, given: Tensor) -> Tensor:
        """Slopes (given, others) of the regression of the other features on the given ones; 0 where not significant."""
        among, across = self.moments[given][:, given], self.moments[given][:, ~given]
        inverse = torch.linalg.pinv(among, rtol=_THE_SAME, hermitian=True)
        slopes = inverse @ across
        left = (self.moments.diagonal()[~given] - (slopes * across).sum(0)).clamp_min(0)
        error = (inverse.diagonal()[:, None] * left / self.pairs[given][:, ~given]).sqrt()
        return slopes.where(slopes.abs() > _SIGNIFICANT * error, 0.0)


def _uniform(shape: tuple[int, int], seed: int, first: int) -> Tensor:
    """Numbers from 0 to 1, (n, m) float64, for images first, first + 1, ...; they depend on seed and image alone."""
    count, size = shape
    blocks = math.ceil(size / 4)  # of four numbers; Philox can begin at any block (doi:10.1145/2063384.2063405)
    random = np.random.Philox(np.random.SeedSequence([seed, 2])).advance(first * blocks)
    return torch.from_numpy(np.random.Generator(random).random((count, 4 * blocks))[:, :size]).clamp_min(1e-12)
