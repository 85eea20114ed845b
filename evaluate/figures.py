"""Every figure of the evaluation: of one sample of images against another of the same size, and beside its floor."""

import math
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student_t
from torch import Tensor, nn
from tqdm import tqdm

import distributed
from dataset import CLASSES, NpyDataset, some_of_each_class
from evaluate import metrics, physics
from evaluate.measure import Measured, Sample, find_nearest, measure, measure_cached, select, thumbnails
from evaluate.two_sample import HELD_OUT, told_apart
from settings import InputError

PARTS = ("overall", *CLASSES)
COPY_QUANTILE = 0.05  # a copy is nearer to a training image than all but this share of the test images
_ROUNDING = 1e-5  # of residuals in float32, where the lens equation is obeyed exactly

PHYSICS = (
    *("ring_radius", "ring_width", *(f"power_{band}" for band in physics.BANDS), "ellipticity", "ellipticity_angle"),
    *("flux_over_peak", "knot_count", "knot_angle", *(f"residual_{band}" for band in physics.BANDS)),
)

# Name of each figure in report.json, and for people
TITLES = {
    "fid_inception": "FID, Inception",
    "frechet_lens": "Fréchet distance, lens features",
    "kid_lens": "KID, lens features",
    "precision": "Precision (sharp enough?)",
    "recall": "Recall (broad enough?)",
    "density": "Density",
    "coverage": "Coverage",
    "fld": "FLD, feature likelihood divergence",
    "fld_gap": "FLD gap, far below 0 if memorized",
    "copy_share": "Share of copies of training images",
    "two_sample_accuracy": "Told from real by a network",
    "class_accuracy": "Classifier accuracy, generated",
    "lens_residual": "Residual of the lens equation, W1",
    "ring_radius": "Ring radius, W1 in arcsec",
    "ring_width": "Ring width, W1 in arcsec",
    **{f"power_{b}": f"log10 power, {b.replace('_', '-')} cycles, W1" for b in physics.BANDS},
    "ellipticity": "Ellipticity, W1",
    "ellipticity_angle": "Angle of the ellipticity, W1 in rad",
    "flux_over_peak": "Flux over peak, W1 in pixels",
    "knot_count": "Number of bright knots, W1",
    "knot_angle": "Angle of the brightest knot, W1 in rad",
    **{f"residual_{b}": f"Lens residual, {b.replace('_', '-')} cycles, W1" for b in physics.BANDS},
}
SHARES = {"copy_share", "two_sample_accuracy", "class_accuracy"}  # printed as percentages
DISTANCES = {"fid_inception", "frechet_lens"}  # shown also as a ratio to the floor

_OfParts = dict[str, dict[str, float]]  # part -> figure -> value
Figures = dict[str, dict[str, dict[str, Any]]]  # figure -> part -> value, value_std, floor, floor_std


def fewest(dataset: NpyDataset) -> int:
    """Number of images of the class that has the fewest."""
    return int(torch.bincount(dataset.labels, minlength=len(CLASSES)).min())


def half_size(test: NpyDataset, most: int) -> int:
    """Images of a class in each of two halves of the test images, ``most`` or fewer.

    Raises:
        InputError: for fewer than the 3 that a figure takes.
    """
    count = min(most, fewest(test) // 2)
    if count < 3:
        raise InputError(f"{test.root_dir}: fewer than 6 test images of a class, or --images_per_class below 3")
    return count


def halves(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of two disjoint random sets, each with ``count`` images of every class, class by class."""
    generator = torch.Generator().manual_seed(seed)
    first, second = [], []
    for label in range(len(CLASSES)):
        of_class = torch.nonzero(labels == label).flatten()
        order = of_class[torch.randperm(len(of_class), generator=generator)]
        first.append(order[:count])
        second.append(order[count : 2 * count])
    return torch.cat(first), torch.cat(second)


def compare(real: Measured, other: Measured, train: Measured) -> dict[str, float]:
    """Every figure of two samples of one size but the two-sample test, which needs the images themselves."""
    found = {}
    if "inception" in real and "inception" in other:
        found["fid_inception"] = metrics.frechet_distance(real["inception"], other["inception"])
    found["frechet_lens"] = metrics.frechet_distance(real["features"], other["features"])
    found["kid_lens"], found["kid_lens standard_error"] = metrics.kernel_distance(real["features"], other["features"])
    found |= metrics.precision_recall_density_coverage(real["features"], other["features"])
    found["fld"], found["fld_gap"] = metrics.feature_likelihood_divergence(
        train["features"], real["features"], other["features"]
    )
    near = torch.quantile(real["train_distance"], COPY_QUANTILE)
    found["copy_share"] = (other["train_distance"] < near).double().mean().item()
    found["class_accuracy"] = (other["probabilities"].argmax(1) == other["label"]).double().mean().item()
    for name in ("lens_residual", *PHYSICS):
        found[name] = metrics.wasserstein(real[name], other[name], physics.PERIODS.get(name))
    return found


class Reference:
    """The real images that others are scored against, measured once.

    Args:
        test: the reference images; twice ``count`` of each class, chosen at random, are used, for halves without a
            common image.
        train: the training images, among which copies are sought; ``count`` of each class enter the FLD.
        count: images of a class in every figure, 3 or more.
        classifier, inception: the networks that give features.
        seed: of the choice of images.
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
    ):
        self.count, self.networks = count, (classifier, inception, batch_size)
        index = some_of_each_class(test.labels, 2 * count, seed)
        self.sample = Sample("real", test, index, measure_cached("test", test, index, *self.networks))
        index = some_of_each_class(train.labels, count, seed)
        self.train = train
        self.train_measured = measure_cached("train", train, index, classifier, None, batch_size)
        self.train_thumbnails = thumbnails(train)
        find_nearest(self.sample.measured, self.train_thumbnails)

    def score(self, name: str, dataset: NpyDataset, splits: int, seed: int) -> Sample:
        """Every figure of a dataset's images against the real ones, beside its floor, over random splits.

        Each split takes two sets of real images without a common one, A and B. The value is the mean of the figure of
        the dataset against A, the floor that of B against A.

        Returns:
            The measured sample; its ``figures`` are: figure -> "overall" or class -> value, value_std, floor and
            floor_std, None where it does not apply.
        """
        index = some_of_each_class(dataset.labels, self.count, seed)
        other = Sample(name, dataset, index, measure(dataset, index, *self.networks))
        find_nearest(other.measured, self.train_thumbnails)
        real, labels = self.sample, other.measured["label"]
        bar = tqdm(total=splits * (len(PARTS) + 2) // distributed.size(), desc=f"scoring {name}", leave=False)

        def score_split(split: int) -> tuple[_OfParts, _OfParts]:
            values, floors = ({part: {} for part in PARTS} for _ in range(2))
            a, b = halves(real.measured["label"], self.count, seed + split)
            samples = (select(real.measured, a), select(real.measured, b), other.measured)
            for label, part in enumerate(PARTS, start=-1):
                of_part = labels >= 0 if part == "overall" else labels == label
                of_a, of_b, of_other = (select(sample, of_part) for sample in samples)
                known = self.train_measured["label"]
                train = select(self.train_measured, known >= 0 if part == "overall" else known == label)
                values[part] |= compare(of_a, of_other, train)
                floors[part] |= compare(of_a, of_b, train)
                bar.update()
            read_a, read_b = (lambda i, half=half: real.read(half[i]) for half in (a, b))
            for found, read in ((values, other.read), (floors, read_b)):
                right, of_class = told_apart(read_a, read, labels, seed + split)
                for label, part in enumerate(PARTS, start=-1):
                    of_part = right if part == "overall" else right[of_class == label]
                    found[part]["two_sample_accuracy"] = of_part.double().mean().item()
                bar.update()
            return values, floors

        with bar:
            values, floors = zip(*distributed.spread(score_split, range(splits)), strict=True)
        other.figures = {
            figure: {part: _summary(figure, part, values, floors, self.count) for part in PARTS} for figure in TITLES
        }
        return other


def apart(figure: dict[str, Any], splits: int) -> bool:
    """Whether a figure lies farther from its floor than chance takes one in a thousand (Student's t)."""
    if figure["value"] is None:
        return False
    limit = student_t.ppf(1 - 0.001 / 2, max(splits - 1, 1)) * math.hypot(figure["value_std"], figure["floor_std"])
    return abs(figure["value"] - figure["floor"]) > max(limit, _ROUNDING)


def _summary(
    name: str, part: str, values: tuple[_OfParts, ...], floors: tuple[_OfParts, ...], count: int
) -> dict[str, Any]:
    """Mean and standard deviation of a figure over the splits."""
    if name not in values[0][part]:
        return dict.fromkeys(("value", "value_std", "floor", "floor_std"))
    of_value, of_floor = ([split[part][name] for split in splits] for splits in (values, floors))
    summary = {
        "value": float(np.mean(of_value)),
        "value_std": float(np.std(of_value, ddof=min(1, len(values) - 1))),
        "floor": float(np.mean(of_floor)),
        "floor_std": float(np.std(of_floor, ddof=min(1, len(values) - 1))),
    }
    if name == "kid_lens":
        summary["standard_error"] = float(np.mean([split[part]["kid_lens standard_error"] for split in values]))
    classes = len(CLASSES) if part == "overall" else 1
    if name == "class_accuracy":
        summary["interval"] = metrics.wilson_interval(summary["value"], classes * count)
        summary["floor_interval"] = metrics.wilson_interval(summary["floor"], classes * count)
        summary["difference"] = summary["value"] - summary["floor"]
    if name == "two_sample_accuracy":  # of the held-out images of one split
        summary["interval"] = metrics.wilson_interval(summary["value"], classes * 2 * round(HELD_OUT * count))
    return summary
