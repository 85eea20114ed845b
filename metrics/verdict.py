"""The verdict: how far generated images are from real ones by the five metrics that decide, in words and sentences."""

from collections import Counter
from typing import Any

from metrics.measure import Sample
from metrics.score import ROUNDING, SHARES, apart, number, titles_of

WORDS = ("at the floor", "near", "off")
FAR_RATIO, FAR_DIFFERENCE = 3, 0.05
_FEW = 100  # images a class
_NUMBERS = {4: "four", 5: "five"}
_SPLITS = 10  # that "apart" assumes, however many there are: with few, nothing would ever be apart
RULE = (
    "The floor is the same metric of real images against other real images, in the same numbers. A metric is apart "
    "from its floor when it is over 4.8 standard deviations of the splits from it: with ten splits, it is so far by "
    f"chance in one of 1,000 cases. It is far from its floor when a distance is over {FAR_RATIO} times the floor, or a "
    f"share over {100 * FAR_DIFFERENCE:.0f} percentage points from it and the 95% intervals do not overlap. At the "
    "floor: neither, or better than the floor, except for the accuracy. Near: one of the two. Off: both."
)


def words(sample: Sample) -> dict[str, dict[str, str]]:
    """Each metric that decides, with a word for each subset."""
    return {
        name: {subset: word(name, metric) for subset, metric in sample.metrics[name].items()}
        for name in _deciding(sample)
    }


def word(name: str, metric: dict[str, Any]) -> str:
    """One of WORDS: the first if the metric is neither ``apart`` nor far from its floor, or is better than the floor;
    the second if it is one of the two; the last if it is both. RULE explains this to readers of the report."""
    if name != "class_accuracy" and metric["value"] <= metric["floor"]:  # images can be too easy to classify
        return "at the floor"
    is_apart, is_far = apart(metric, _SPLITS), _excess(name, metric) > 1
    if is_apart and is_far:
        return "off"
    return "near" if is_apart or is_far else "at the floor"


def sentences(sample: Sample) -> list[str]:
    """A sentence each on: the words of the metrics that decide, in their worst subset; the metric farthest from its
    floor; copies; and a classifier that is right only by chance."""
    found = words(sample)
    count = len(sample.index) // len(sample.dataset.classes)
    worst = Counter(max(of_subsets.values(), key=WORDS.index) for of_subsets in found.values())
    counted = (f"{worst[w]} {'is' if worst[w] == 1 else 'are'} {w}" for w in WORDS if worst[w])
    few = ", too few to rely on" if count < _FEW else ""
    farther = [
        (_excess(name, sample.metrics[name][subset]), name, subset)
        for name, of_subsets in found.items()
        for subset, of_subset in of_subsets.items()
        if of_subset != "at the floor"
    ]
    farthest = "None of them tells these images from real ones, neither overall nor in any class."
    if farther:
        _, name, subset = max(farther)
        metric, where = sample.metrics[name][subset], "overall" if subset == "overall" else f"for {subset}"
        farthest = (
            f'Farthest from its floor is "{titles_of(sample.real)[name]}" {where}: {number(name, metric["value"])}, '
            f"where real images have {number(name, metric['floor'])}."
        )
    share = sample.metrics["copy_share"]["overall"]
    seen = "No sign of copies" if found["copy_share"]["overall"] == "at the floor" else "Signs of copies"
    said = [
        f"Of the {_NUMBERS[len(found)]} metrics that decide, {', '.join(counted)}, overall or in the class that is "
        f"worst ({count} images a class{few}).",
        farthest,
        f"{seen}: {share['value']:.1%} of the images, and {share['floor']:.1%} of real test images, are as near to a "
        "training image as a copy would be.",
    ]
    real = sample.metrics["class_accuracy"]["overall"]
    if "class_accuracy" in found and real["floor_interval"][0] <= 1 / len(sample.dataset.classes):
        said.append(
            f"The classifier is right on {real['floor']:.1%} of the real images, as by chance: what it and its "
            "features say means little here. train/train_classifier.py makes one of these images."
        )
    return said


def _deciding(sample: Sample) -> list[str]:
    """Distance in lens features, C2ST, classifier, copies, and the lens equation or else the smallest scales."""
    physical = "lens_residual"
    if sample.metrics[physical]["overall"]["value"] is None:
        physical = [name for name in sample.metrics if name.startswith("power_")][-1]
    decide = ["frechet_lens", "two_sample_accuracy", "class_accuracy", "copy_share", physical]
    return [name for name in decide if sample.metrics[name]["overall"]["value"] is not None]


def _excess(name: str, metric: dict[str, Any]) -> float:
    """How far a metric is from its floor: above 1 is far, 0 means that the 95% intervals of two shares overlap."""
    value, floor = metric["value"], metric["floor"]
    if name not in SHARES:
        return value / max(floor, ROUNDING) / FAR_RATIO
    low, high = metric.get("interval", (value, value))
    floor_low, floor_high = metric.get("floor_interval", (floor, floor))
    return 0.0 if low <= floor_high and floor_low <= high else abs(value - floor) / FAR_DIFFERENCE
