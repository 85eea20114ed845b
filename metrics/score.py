"""Every metric of the evaluation, which compares two samples of images of the same size, beside its floor.

The floor is the same metric of real images against real images. A metric is a function with the decorator ``metric``
below, or a number of each image in ``physics.describe``: that is all it takes to be in the tables and the report.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.stats import kstest
from scipy.stats import t as student_t
from torch import Tensor, nn
from tqdm import tqdm

import distributed
from dataset import NpyDataset, some_of_each_class
from metrics import distances, physics, usefulness
from metrics.measure import Measured, Sample, fewest, find_nearest, masks, measure, measure_cached, select, thumbnails
from metrics.two_sample import HELD_OUT, Read, c2st
from metrics.usefulness import Usefulness
from settings import InputError
from simulate.recipes import scale_of

COPY_QUANTILE = 0.05  # a copy is nearer to a training image than all but this share of the test images
SHARES = {"copy_share", "two_sample_accuracy", "class_accuracy", *usefulness.TITLES}  # printed as percentages
DISTANCES = {"fid_inception", "frechet_lens"}  # shown also as a ratio to the floor
TITLES: dict[str, str] = {}  # name of a metric in report.json -> title; ``titles_of`` has all of them
ROUNDING = 1e-5  # error of float32 in the residuals of images that obey the lens equation exactly

_Comparison = Callable[[Measured, Measured, Measured], dict[str, float]]
_COMPARISONS: list[_Comparison] = []
_OfSubsets = dict[str, dict[str, float]]  # subset -> metric -> value


def metric(**titles: str) -> Callable[[_Comparison], _Comparison]:
    """Decorator for a function of real, other and training measurements that returns the metrics titled here, or an
    empty dict if it lacks what they need."""

    def register(function: _Comparison) -> _Comparison:
        TITLES.update(titles)
        _COMPARISONS.append(function)
        return function

    return register


@metric(fid_inception="FID, Inception")
def _fid(real: Measured, other: Measured, train: Measured) -> dict[str, float]:
    features = [sample["inception"] for sample in (real, other) if "inception" in sample]
    return {"fid_inception": distances.frechet_distance(*features)} if features else {}


@metric(
    frechet_lens="Fréchet distance, lens features",
    kid_lens="KID, lens features",
    precision="Precision (sharp enough?)",
    recall="Recall (broad enough?)",
    density="Density",
    coverage="Coverage",
    fld="FLD, feature likelihood divergence",
    fld_gap="FLD gap, far below 0 if memorized",
)
def _lens_features(real: Measured, other: Measured, train: Measured) -> dict[str, float]:
    of_real, of_other, of_train = (sample["features"] for sample in (real, other, train))
    found = {"frechet_lens": distances.frechet_distance(of_real, of_other)}
    found["kid_lens"], found["kid_lens standard_error"] = distances.kernel_distance(of_real, of_other)
    found["fld"], found["fld_gap"] = distances.feature_likelihood_divergence(of_train, of_real, of_other)
    return found | distances.precision_recall_density_coverage(of_real, of_other)


@metric(copy_share="Share of copies of training images")
def _copies(real: Measured, other: Measured, train: Measured) -> dict[str, float]:
    near = torch.quantile(real["train_distance"], COPY_QUANTILE)
    return {"copy_share": (other["train_distance"] < near).double().mean().item()}


# These need the images themselves: see ``Reference.score``
TITLES["two_sample_accuracy"] = "C2ST, accuracy against real"
TITLES |= usefulness.TITLES


@metric(pqmass="PQMass, p-value (1/2 if all is well)")
def _pqmass(real: Measured, other: Measured, train: Measured) -> dict[str, Any]:
    p_values = distances.pqmass(real["thumbnail"], other["thumbnail"])
    return {"pqmass": float(np.mean(p_values)), "pqmass p_values": p_values} if p_values else {}


@metric(class_accuracy="Classifier accuracy, generated")
def _accuracy(real: Measured, other: Measured, train: Measured) -> dict[str, float]:
    if "probabilities" not in other:
        return {}
    return {"class_accuracy": (other["probabilities"].argmax(1) == other["label"]).double().mean().item()}


def titles_of(dataset: NpyDataset) -> dict[str, str]:
    """Titles of all metrics of the images of a dataset; some may have no value, such as FID without its network."""
    size, (_, unit) = dataset.image_shape[-1], scale_of(dataset)
    bands = physics.bands(size).items()
    residuals = {f"residual_{band}": f"Lens residual, {low}-{high} cycles, W1" for band, (low, high) in bands}
    titles = TITLES | {"lens_residual": "Residual of the lens equation, W1"} | physics.titles(size, unit) | residuals
    brightness = "counts per second" if dataset.observer else "the unit of the files"
    return titles | physics.flux_titles(brightness) if dataset.keeps_flux else titles


def compare(real: Measured, other: Measured, train: Measured, titles: dict[str, str]) -> dict[str, float]:
    """Every metric of two samples of one size but C2ST and usefulness; numbers of an image are compared by W1."""
    numbers = [name for name in titles if name in real]
    found = {name: distances.wasserstein(real[name], other[name], physics.PERIODS.get(name)) for name in numbers}
    for comparison in _COMPARISONS:
        found |= comparison(real, other, train)
    return found


def subsets_of(dataset: NpyDataset) -> tuple[str, ...]:
    """Names of the subsets that metrics are computed for: all images, then each class."""
    return ("overall", *dataset.classes)


def half_size(test: NpyDataset, most: int) -> int:
    """Images of a class in each of two halves of the test images, ``most`` or fewer.

    Raises:
        InputError: for fewer than 3, which a metric needs.
    """
    count = min(most, fewest(test) // 2)
    if count < 3:
        raise InputError(f"{test.root_dir}: fewer than 6 test images of a class, or --images_per_class below 3")
    return count


def halves(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of two disjoint random sets, each with ``count`` images of every class, class by class."""
    both = some_of_each_class(labels, 2 * count, seed).view(-1, 2, count)
    return both[:, 0].flatten(), both[:, 1].flatten()


def check_match(data: NpyDataset, others: dict[str, Any]) -> None:
    """Raises InputError unless generators, classifiers and folders, given by their paths, fit the images of the data.

    Images of a single class need no classifier of their own: features of any classifier will do.
    """
    for path, other in others.items():
        is_classifier = hasattr(other, "channels")
        if is_classifier and len(data.classes) == 1:
            continue
        shape = getattr(other, "image_shape", None) or (other.channels, *data.image_shape[1:])
        advice = "train/train_classifier.py makes one of these" if is_classifier else "they do not go together"
        data.check_match(path, other.classes, shape, advice)


class Reference:
    """The real images that others are scored against, measured once.

    Args:
        test: the reference images; twice ``count`` of each class, chosen at random, are used, for two halves without
            a common image.
        train: the training images, among which copies are sought; ``count`` of each class enter the FLD.
        count: images of a class in every metric, 3 or more.
        classifier, inception: the networks that give features.
        seed: of the choice of images.
        name: of the real images in pictures.

    Raises:
        InputError: for fewer than 2 training images of a class.
    """

    def __init__(
        self,
        test: NpyDataset,
        train: NpyDataset,
        count: int,
        classifier: nn.Module,
        inception: nn.Module | None = None,
        batch_size: int = 128,
        seed: int = 0,
        name: str = "real",
    ):
        if fewest(train) < 2:
            raise InputError(f"{train.root_dir}: fewer than 2 training images of a class")
        self.count, self.networks = count, (classifier, inception, batch_size)
        self.floors: dict[int, _OfSubsets] = {}  # by the seed of a split; the same for every sample
        index = some_of_each_class(test.labels, 2 * count, seed)
        self.sample = Sample(name, test, index, measure_cached("test", test, index, *self.networks), self)
        index = some_of_each_class(train.labels, count, seed)
        self.train = train
        self.train_measured = measure_cached("train", train, index, classifier, None, batch_size)
        self.train_thumbnails = thumbnails(train)
        find_nearest(self.sample.measured, self.train_thumbnails)
        self.usefulness = Usefulness(train, self.sample, count)

    def score(self, name: str, dataset: NpyDataset, splits: int, seed: int) -> Sample:
        """Every metric of a dataset's images against the real ones, beside its floor, over random splits.

        Each split takes two sets A and B of real images, without a common image. The value is the metric of the dataset
        against A, the floor that of B against A; both are means over the splits.

        Returns:
            The measured sample; its ``metrics`` are: metric -> "overall" or class -> value, value_std, floor and
            floor_std, None where it does not apply.
        """
        index = some_of_each_class(dataset.labels, self.count, seed)
        real = self.sample
        other = Sample(name, dataset, index, measure(dataset, index, *self.networks, real.dataset), self)
        find_nearest(other.measured, self.train_thumbnails)

        def score_split(split: int) -> tuple[_OfSubsets, _OfSubsets]:
            a, b = halves(real.measured["label"], self.count, seed + split)
            if seed + split not in self.floors:
                measured = select(real.measured, b)
                self.floors[seed + split] = self._against(a, measured, lambda i, r: real.read(b[i], r), seed + split)
            values = self._against(a, other.measured, other.read, seed + split)
            bar.update()
            return values, self.floors[seed + split]

        with tqdm(total=splits // distributed.size(), desc=f"scoring {name}", leave=False) as bar:
            of_splits = zip(*distributed.spread(score_split, range(splits)), strict=True)
        of_splits, of_trainings = tuple(of_splits), self.usefulness.score(other)
        for metric_name in titles_of(real.dataset):
            values, floors = of_trainings if metric_name in usefulness.TITLES else of_splits
            other.metrics[metric_name] = {
                subset: _summary(metric_name, subset, values, floors, self.count) for subset in subsets_of(real.dataset)
            }
        return other

    def _against(self, half: Tensor, measured: Measured, read: Read, seed: int) -> _OfSubsets:
        """Every metric of other images against one half of the real ones, of the same size."""
        data, labels, found = self.sample.dataset, measured["label"], {}
        of_half, of_train = select(self.sample.measured, half), masks(self.train_measured["label"], data.classes)
        for subset, mask in masks(labels, data.classes).items():
            train = select(self.train_measured, of_train[subset])
            found[subset] = compare(select(of_half, mask), select(measured, mask), train, titles_of(data))
        right, of_class = c2st(lambda i, random: self.sample.read(half[i], random), read, labels, seed)
        for subset, mask in masks(of_class, data.classes).items():
            found[subset]["two_sample_accuracy"] = right[mask].double().mean().item()
        return found


def apart(metric: dict[str, Any], splits: int) -> bool:
    """Whether a metric is so far from its floor as, by chance, only one in a thousand is (Student's t)."""
    if metric["value"] is None:
        return False
    limit = student_t.ppf(1 - 0.001 / 2, max(splits - 1, 1)) * math.hypot(metric["value_std"], metric["floor_std"])
    return abs(metric["value"] - metric["floor"]) > max(limit, ROUNDING)


def ratio(value: float, floor: float) -> float:
    """A metric over its floor."""
    return value / floor if floor else math.inf


def number(name: str, value: float | None, digits: int = 3) -> str:
    """A value of a metric as it is printed; a dash for one that does not apply."""
    if value is None:
        return "–"
    return f"{value:.1%}" if name in SHARES else f"{value:.{digits}g}"


def _summary(
    name: str, subset: str, values: tuple[_OfSubsets, ...], floors: tuple[_OfSubsets, ...], count: int
) -> dict[str, Any]:
    """Mean and standard deviation of a metric over the splits."""
    if not values or name not in values[0][subset]:
        return dict.fromkeys(("value", "value_std", "floor", "floor_std"))
    summary = {}
    for key, splits in (("value", values), ("floor", floors)):
        found = [split[subset][name] for split in splits]
        summary |= {key: float(np.mean(found)), f"{key}_std": float(np.std(found, ddof=min(1, len(found) - 1)))}
    if name == "pqmass":
        p_values = np.concatenate([split[subset]["pqmass p_values"] for split in values])
        summary["uniform"] = float(kstest(p_values, "uniform").pvalue)  # the Kolmogorov-Smirnov test
    if name == "kid_lens":
        summary["standard_error"] = float(np.mean([split[subset]["kid_lens standard_error"] for split in values]))
    images = count * (len(values[0]) - 1 if subset == "overall" else 1)
    if name == "class_accuracy":
        summary["interval"] = distances.wilson_interval(summary["value"], images)
        summary["floor_interval"] = distances.wilson_interval(summary["floor"], images)
        summary["difference"] = summary["value"] - summary["floor"]
    if name == "two_sample_accuracy":  # of the held-out images of one split
        classes = images // count
        summary["interval"] = distances.wilson_interval(summary["value"], classes * 2 * round(HELD_OUT * count))
    return summary
