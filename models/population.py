"""What is not asked for: training lenses, whose parameters a new lens takes over where nobody gives them.

A network that is told all parameters draws the very lens; one that is told a few would have to invent the others, and
does so with too little variety. Hence they are drawn before it begins: from a training lens of the class (a "hot deck",
Andridge & Little 2010, doi:10.1111/j.1751-5823.2010.00103.x), moved along a linear regression to what is asked for
(Beaumont et al. 2002, doi:10.1093/genetics/162.4.2025, Eq. 3), and a little by chance, so that no lens comes twice.
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

_MOST = 5000  # lenses of a class
_CHANCE = 0.025  # standard deviation of what is added to a phase: a twentieth of that of the phases themselves
_RIDGE = 1e-3  # of the variances: keeps slopes finite where parameters say the same


@dataclass(frozen=True)
class Population:
    """Training lenses of every class.

    Args:
        labels: of their classes, (lenses,) integers.
        phases: of their parameters, (lenses, parameters) as ``parameters.phases`` has them, NaN where unknown.
        parameters: what these are.

    Raises:
        ValueError: where the three do not fit together.
    """

    labels: Tensor
    phases: Tensor
    parameters: Sequence[Parameter]

    def __post_init__(self):
        shape = (len(self.labels), len(self.parameters))
        if self.phases.shape != shape or self.labels.shape != shape[:1] or self.labels.is_floating_point():
            raise ValueError(f"not {len(self.parameters)} parameters of lenses")

    @classmethod
    def of(cls, labels: Tensor, phases: Tensor, parameters: Sequence[Parameter]) -> "Population":
        """Some of the lenses (n,) of a training set; their phases (n, parameters) need no more than half precision."""
        some = some_of_each_class(labels.cpu(), _MOST)
        return cls(labels.cpu()[some].short(), phases[some].half(), parameters)

    def state_dict(self) -> dict[str, Tensor]:
        return {"labels": self.labels, "phases": self.phases}

    def fill(self, labels: Tensor, asked: Tensor | None, seed: int, first: int = 0) -> Tensor:
        """Draws what is NaN of phases (n, parameters), or all of them; what no lens of a class has stays NaN.

        Image k of a seed, counted from ``first``, takes over the same lens whatever is asked for.
        """
        filled = torch.full((len(labels), len(self.parameters)), torch.nan) if asked is None else asked.clone()
        chance = _uniform((len(labels), 1 + len(self.parameters)), seed, first)
        kinds, of_kind = torch.cat([labels[:, None], filled.isfinite()], 1).unique(dim=0, return_inverse=True)
        for kind, (label, *given) in enumerate(kinds.tolist()):
            given = torch.tensor(given, dtype=torch.bool)
            lenses, known = self._of_classes.get(label, (self.phases[:0], given))
            if not (known & ~given).any():
                continue
            here = torch.nonzero(of_kind == kind)[:, 0]
            taken = lenses[(chance[here, 0] * len(lenses)).long()]
            moved = taken + _CHANCE * torch.special.ndtri(chance[here, 1:]).float()
            if given.any():
                moved += self._moves(lenses, given, taken, filled[here])
            filled[here] = torch.where(given, filled[here], moved)
        return filled

    @cached_property
    def _of_classes(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Phases of the lenses of each class, and which of these any lens has."""
        lenses = {label: self.phases[self.labels == label].float() for label in self.labels.unique().tolist()}
        return {label: (of_class, of_class.isfinite().any(0)) for label, of_class in lenses.items()}

    def _moves(self, lenses: Tensor, given: Tensor, taken: Tensor, asked: Tensor) -> Tensor:
        """How far parameters of lenses ``taken`` move with those that are ``given`` and ``asked`` to be others.

        By the regression of all on the given ones over ``lenses``. Angles are given as sine and cosine, and move none.
        """
        angle = torch.tensor([of.scale == "angle" for of in self.parameters])

        def features(phases: Tensor) -> Tensor:
            return torch.cat(
                [phases[:, given & ~angle], *(wave(phases[:, given & angle]) for wave in (torch.sin, torch.cos))], 1
            )

        x, y = ((of - of.nanmean(0)).nan_to_num().double() for of in (features(lenses), lenses))
        known = lenses.isfinite().double().mean(0).clamp_min(1 / len(lenses))  # where x and y are, y being 0 elsewhere
        slopes = torch.linalg.solve(x.T @ x + _RIDGE * len(x) * torch.eye(x.shape[1]), x.T @ y / known)
        step = (features(asked) - features(taken)).nan_to_num().double()
        return (step @ slopes).float().masked_fill(angle, 0)


def _uniform(shape: tuple[int, int], seed: int, first: int) -> Tensor:
    """Numbers from 0 to 1 for images first, first + 1, ..., (n, m) float64, which follow from seed and image alone."""
    count, size = shape
    blocks = math.ceil(size / 4)  # of four numbers; Philox can begin at any (doi:10.1145/2063384.2063405)
    random = np.random.Philox(np.random.SeedSequence([seed, 2])).advance(first * blocks)
    return torch.from_numpy(np.random.Generator(random).random((count, 4 * blocks))[:, :size]).clamp_min(1e-12)
