"""Physical parameters of lenses: their units, scales and ranges, and their phases, the angles that networks see."""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from settings import InputError

SCALES = ("linear", "log10", "angle")
_PERIODS = dict.fromkeys(("rad", "radian", "radians"), 2 * math.pi)  # a whole turn, by unit
_PERIODS |= dict.fromkeys(("deg", "degree", "degrees"), 360.0) | {"arcmin": 360.0 * 60, "arcsec": 360.0 * 3600}
_LOGARITHMIC = 30  # largest over smallest value, above which a parameter is scaled by its logarithm
_MARGIN = 0.02  # share of the range by which the extremes of a training set may fall short of it by chance
_LARGEST = 1e30  # largest phase that anybody may ask for
_FEW = 0.05  # share of a folder's values that may be outside the range of training without a warning
_MOST = 1000  # parameters of a checkpoint, at most


class Column(NamedTuple):
    """Values (n,) float64 of the images, NaN where unknown, and their unit, "" without any."""

    values: np.ndarray
    unit: str = ""


@dataclass(frozen=True)
class Parameter:
    """A parameter as a network knows it.

    Args:
        unit: of its values, "" without any.
        scale: "linear", "log10", or "angle", which repeats after ``period``.
        low, high: its range in training.
        mean, deviation: of its values in training, or of their logarithms; 0 and 1 for angles.
        period: of an angle, in its unit; 0 for others.
        classes: names of the classes whose training images had it.
    """

    name: str
    unit: str
    scale: str
    low: float
    high: float
    mean: float
    deviation: float
    period: float
    classes: tuple[str, ...]

    @property
    def specification(self) -> str:
        """Name and scale, as ``fit`` takes them."""
        turns = round(_PERIODS.get(self.unit.lower(), 2 * math.pi) / self.period) if self.period else 1
        return f"{self.name}:{self.scale}" + (f"/{turns}" if turns > 1 else "")

    def phase(self, values: np.ndarray) -> np.ndarray:
        """Values as phases, the angles that a network sees. The phase of an angle grows by 2 pi in a period; that of
        others is half the distance from the mean in standard deviations, or NaN for a value without a logarithm."""
        if self.scale == "angle":
            return 2 * np.pi / self.period * values
        with np.errstate(invalid="ignore", divide="ignore"):
            scaled = np.log10(values) if self.scale == "log10" else values
        return np.where(np.isfinite(scaled), (scaled - self.mean) / (2 * self.deviation), np.nan)[()]

    def value(self, phases: np.ndarray) -> np.ndarray:
        """The inverse of ``phase``; angles from 0 to their period."""
        if self.scale == "angle":
            return phases / (2 * np.pi) * self.period % self.period
        scaled = self.mean + 2 * self.deviation * phases
        return 10**scaled if self.scale == "log10" else scaled

    def beyond(self, values: np.ndarray) -> np.ndarray:
        """Whether values are outside the range of training by more than chance; for angles, beyond a whole turn."""
        if self.scale == "angle":
            return np.abs(values) > 1.001 * _PERIODS.get(self.unit.lower(), 2 * math.pi)
        low, high = self.phase(np.array([self.low, self.high]))
        margin = _MARGIN * (high - low)
        phases = self.phase(values)
        return ~((low - margin <= phases) & (phases <= high + margin))  # values without a logarithm are outside, too

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.name}, {self.low:.3g} to {self.high:.3g}{unit}"


def fit(specifications: Sequence[str], columns: Mapping[str, Column], of_classes: Sequence[str]) -> list[Parameter]:
    """The parameters of a training set.

    A quantity of several objects, such as subhalo_mass_1 and subhalo_mass_2, has one scale, mean and deviation for all:
    a network treats these objects alike, so equal phases must mean equal masses.

    Args:
        specifications: names, each with a colon and its scale, unless the values are to decide: "source_x:linear",
            "axion_mass:log10", or "vortex_angle:angle/2" for a direction, which is the same after half a turn.
        columns: of the training images.
        of_classes: class of each image.

    Raises:
        InputError: for a scale that does not fit, or for a parameter that is known nowhere or the same in all images.
    """
    told = list(map(_parse, specifications))
    alike = {}
    for (name, scale), (kind, quantity, number) in zip(told, _owners([name for name, _ in told]), strict=True):
        values, unit = columns[name]
        alike.setdefault((kind, quantity, scale, unit) if number else name, {})[name] = values[np.isfinite(values)]
    of_kind, found = {}, []
    for of in alike.values():
        of_kind |= dict.fromkeys(of, np.concatenate(list(of.values())))
    for name, scale in told:
        values, unit = columns[name]
        known = np.isfinite(values)
        some = values[known]
        if not known.any():
            raise InputError(f"parameter {name}: no training image has it", 2)
        scale = scale or _scale_of(of_kind[name], unit)
        period = 0.0
        if scale.startswith("angle"):
            whole = _PERIODS.get(unit.lower(), 2 * math.pi)
            if unit.lower() not in _PERIODS and (largest := np.abs(some).max()) > 1.001 * whole:
                raise InputError(f"parameter {name}: up to {largest:g} without a unit of angles, such as [deg]", 2)
            period, scale = whole / float(scale.partition("/")[2] or 1), "angle"
        if scale == "log10" and some.min() <= 0:
            raise InputError(f"parameter {name}: has a value of {some.min():g}, which has no logarithm", 2)
        scaled = of_kind[name]
        scaled = np.log10(scaled[scaled > 0]) if scale == "log10" else scaled
        mean, deviation = (0.0, 1.0) if scale == "angle" else (float(scaled.mean()), float(scaled.std()))
        if not math.isfinite(deviation):
            raise InputError(f"parameter {name}: its values, up to {some.max():g}, are too large", 2)
        if deviation <= 1e-12 * abs(mean) or (some == some[0]).all():
            raise InputError(f"parameter {name}: is {some[0]:g} in every training image", 2)
        classes = tuple(sorted({of for of, there in zip(of_classes, known.tolist(), strict=True) if there}))
        low, high = float(some.min()), float(some.max())
        found.append(Parameter(name, unit, scale, low, high, mean, deviation, period, classes))
    return found


def are_of(specifications: Sequence[str], parameters: Sequence[Parameter]) -> bool:
    """Whether specifications name these parameters in this order, with their scales where any are given."""
    known = [of.specification.partition(":")[::2] for of in parameters]
    told = [_parse(specification) for specification in specifications]
    return len(told) == len(known) and all(
        name == of and scale in ("", own) for (name, scale), (of, own) in zip(told, known, strict=True)
    )


def name_of(specification: str) -> str:
    """The name in a specification, without the scale."""
    return _parse(specification)[0]


def converted(name: str, column: Column, unit: str) -> np.ndarray:
    """Values of a column converted to a unit; unchanged if either unit is not given.

    Raises:
        InputError: for units that do not convert, or an unknown unit.
    """
    values, own = column
    if not (own and unit) or own == unit:
        return values
    if own.lower() in _PERIODS and unit.lower() in _PERIODS:
        return values * (_PERIODS[unit.lower()] / _PERIODS[own.lower()])
    from astropy.units import Unit  # here, since it takes a second and few need it

    try:
        return Unit(own).to(Unit(unit), values)
    except (ValueError, TypeError):
        raise InputError(f"parameter {name}: is in {own}, and in {unit} elsewhere", 2) from None


def warn_of_others(parameters: Sequence[Parameter], columns: Mapping[str, np.ndarray], of: str | Path) -> None:
    """Warns if many values of a folder are outside the range that a network was trained on, as with another unit."""
    for parameter in parameters:
        values = columns[parameter.name]
        values = values[np.isfinite(values)]
        if len(values) and (share := parameter.beyond(values).mean()) > _FEW:
            warnings.warn(f"{of}: {share:.0%} of its values are outside what is known of {parameter}", stacklevel=3)


def phases(parameters: Sequence[Parameter], columns: Mapping[str, np.ndarray]) -> Tensor:
    """Phases (n, parameters) float32, as a network sees them, of values (n,) by name; NaN where unknown."""
    return torch.from_numpy(np.stack([of.phase(columns[of.name]) for of in parameters], 1).astype(np.float32))


def objects(parameters: Sequence[Parameter], beside_lens: bool = True) -> list[list[list[int]]]:
    """Indices of the parameters of each object: a list for each kind of object, and in it a list for each object.

    An object beside the lens, such as a subhalo, has the lens's parameters behind its own, since what it does to an
    image depends on the lens. Parameters that share a number, such as subhalo_x_3 and subhalo_y_3, are of one object if
    it has a mass, subhalo_mass_3. All others are of the lens, even gamma_1 and gamma_2.

    Args:
        beside_lens: False gives such an object its own parameters alone, as older generators see them.
    """
    found = _by_object(parameters)
    kinds: dict[tuple[str, ...], list[list[int]]] = {}
    for (kind, number), of_object in found.items():
        quantities = sorted(of_object)
        same = (kind, *quantities) if number else ()
        kinds.setdefault(same, []).append([of_object[quantity] for quantity in quantities])
    lens = kinds.get((), [[]])[0] if beside_lens else []
    return [[one + lens if kind else one for one in of_kind] for kind, of_kind in kinds.items()]


def placed(parameters: Sequence[Parameter]) -> list[list[int]]:
    """Indices of the parameters, x and y last, of each object beside the lens that has a position, as subhalo_x_1 and
    subhalo_y_1 give it. If several kinds of objects have positions, only the kind with the most objects counts."""
    kinds: dict[tuple[str, ...], list[list[int]]] = {}
    for (kind, number), of_object in _by_object(parameters).items():
        if number and {"x", "y"} < of_object.keys():
            quantities = [*sorted(of_object.keys() - {"x", "y"}), "x", "y"]
            kinds.setdefault((kind, *quantities), []).append([of_object[quantity] for quantity in quantities])
    return max(kinds.values(), key=len, default=[])


def asked(
    parameters: Sequence[Parameter], given: Mapping[str, Any] | None, count: int, name: str
) -> dict[str, np.ndarray]:
    """Values (count,) that are asked for of every parameter, by name; NaN where none is asked for.

    Args:
        given: a number, or an array of ``count``, for some parameters by name.
        name: of the class that is asked for; a warning says which values are outside what it was trained on.

    Raises:
        InputError: for an unknown parameter, with the names, units and ranges of those that there are; for values that
            no image can have, with the name of the parameter.
    """
    columns = {parameter.name: np.full(count, np.nan) for parameter in parameters}
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"parameters {given!r}: values by name, as {{'source_x': 0.1}}")
    for key, values in (given or {}).items():
        if key not in columns:
            near = sorted(parameters, key=lambda of: -SequenceMatcher(None, of.name, str(key)).ratio())
            raise InputError(f"no parameter {key!r}: {some_of(near, '; ') if near else 'it was trained without any'}")
        parameter = next(of for of in parameters if of.name == key)
        try:
            if hasattr(values, "to_value"):  # an astropy quantity, which has a unit
                values = values.to_value(parameter.unit)
            if np.iscomplexobj(values):
                raise TypeError
            values = np.ma.filled(np.ma.asarray(values).astype(np.float64), np.nan)
            columns[key][:] = values
        except (TypeError, ValueError, RuntimeError, OverflowError):
            several = f"{count} of them, one for each image (num_samples)"
            raise InputError(f"parameter {key}: neither a number nor {several}") from None
        impossible = ~(np.abs(parameter.phase(values)) <= _LARGEST) & ~np.isnan(values)
        if impossible.any():
            raise InputError(f"parameter {key}: {values[impossible].flat[0]:g} cannot be; it is {parameter}")
        _warn_outside(parameter, columns[key], name)
    return columns


def as_plain(parameters: Sequence[Parameter]) -> list[dict[str, Any]]:
    """Parameters for a checkpoint; ``from_plain`` reads them back."""
    return [asdict(parameter) | {"classes": list(parameter.classes)} for parameter in parameters]


def from_plain(content: Any) -> list[Parameter]:
    """Parameters of a checkpoint.

    Raises:
        ValueError, TypeError: if they are not valid parameters.
    """
    found = [Parameter(**{**of, "classes": tuple(of["classes"])}) for of in content]
    for of in found:
        numbers = (of.low, of.high, of.mean, of.deviation, of.period)
        sound = all(isinstance(value, float) and math.isfinite(value) for value in numbers) and of.scale in SCALES
        sound &= of.deviation > 0 and (of.period > 0) == (of.scale == "angle")
        if not (sound and isinstance(of.name, str) and isinstance(of.unit, str)):
            raise ValueError(f"no parameter: {of}")
    if len(found) > _MOST or len({of.name for of in found}) < len(found):
        raise ValueError("parameters of the same name, or too many")
    return found


def _by_object(parameters: Sequence[Parameter]) -> dict[tuple[str, str], dict[str, int]]:
    """Indices of the parameters by quantity, for the lens, ("", ""), and for each object beside it, (kind, number)."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    for i, (kind, quantity, number) in enumerate(_owners([parameter.name for parameter in parameters])):
        found.setdefault((kind, number), {})[quantity] = i
    return found


def _owners(names: Sequence[str]) -> list[tuple[str, str, str]]:
    """The kind of object, the quantity and the number of the object in each name: "subhalo_", "x" and "3" for
    "subhalo_x_3"; "", "source_x" and "" for "source_x", which is of the lens."""
    masses = {match[1] for name in names if (match := re.fullmatch(r"(.*)mass_\d+", name))}
    found = []
    for name in names:
        of_mass = [match for of in masses if (match := re.fullmatch(rf"({re.escape(of)})(.*)_(\d+)", name))]
        found.append(max(of_mass, key=lambda match: len(match[1])).groups() if of_mass else ("", name, ""))
    return found


def _parse(specification: str) -> tuple[str, str]:
    """Name and scale, "" where none is given."""
    name, _, scale = (part.strip() for part in specification.partition(":"))
    if not name or not re.fullmatch(r"|linear|log10|angle(/[1-9]\d?)?", scale):
        raise InputError(f"parameter {specification!r}: a scale is linear, log10, angle or, say, angle/2", 2)
    return name, scale


def _scale_of(values: np.ndarray, unit: str) -> str:
    if unit.lower() in _PERIODS and not unit.lower().startswith("arc"):  # positions are in these
        return "angle"
    return "log10" if values.min() > 0 and values.max() > _LOGARITHMIC * values.min() else "linear"


def _warn_outside(parameter: Parameter, values: np.ndarray, name: str) -> None:
    asked_for = values[np.isfinite(values)]
    if len(asked_for) and name not in parameter.classes:
        warnings.warn(f"{parameter.name}: no image of {name} that this was trained on has it", stacklevel=4)
    elif (beyond := parameter.beyond(asked_for)).any():
        far = np.abs(parameter.phase(asked_for)) * beyond
        warnings.warn(f"{asked_for[far.argmax()]:g} is outside what this was trained on: {parameter}", stacklevel=4)


def some_of(names: Sequence[Any], between: str = ", ", most: int = 12) -> str:
    return between.join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
