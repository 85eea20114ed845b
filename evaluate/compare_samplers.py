"""Quality against the number of network evaluations (NFE): solvers, grids of times and guidance on one network.

    python evaluate/compare_samplers.py --data_dir D

Prints a table and writes OUTPUT_DIR/samplers.json and OUTPUT_DIR/samplers.png. The measure is the Fréchet distance in
the features of the lens classifier over its floor; an evaluation with guidance counts as two.
"""

import json
import sys
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plots
import settings
from dataset import load_parts
from files import hold, whole
from metrics.lens_distance import LensDistance
from metrics.score import check_match, subsets_of
from models import flow
from models.classifier import default_classifier, load_classifier
from models.generator import Generator, default_generator, load_model
from settings import Count, Whole

DATA_DIR: str = "data"  # Folder with a folder of images for each class: its test images are the reference
CHECKPOINT_PATH: str = default_generator()  # The one trained here, or else the one of the repository
CLASSIFIER_PATH: str | None = None  # Gives the lens features; None takes the one trained here, or else the repository's
CACHE_DIR: str | None = None  # Where packed images are kept; None means their own folder, if it can be written to
OUTPUT_DIR: str = "samplers"  # Where the table and the plot go
IMAGES_PER_CLASS: Count = 1000  # In a distance; at most half of the test images of a class
SEED: Whole = 0  # Of the noise
DEVICE: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto" takes the GPU when there is one

_STEPS = (1, 2, 4, 8, 16, 32)
_GUIDANCE_STEPS = (8, 16)
_GUIDANCE = ((1.5, (0.0, 1.0)), (1.5, (0.2, 0.8)), (3.0, (0.0, 1.0)), (3.0, (0.2, 0.8)))  # scale, interval of times

_Found = dict[str, dict[int, dict[str, float]]]  # sampler -> NFE -> subset -> ratio


def main() -> None:
    model = load_model(CHECKPOINT_PATH, DEVICE)
    (test,) = load_parts(DATA_DIR, "test", cache_dir=CACHE_DIR)
    path = CLASSIFIER_PATH or default_classifier()
    classifier = load_classifier(path, model.device)
    check_match(test, {CHECKPOINT_PATH: model, path: classifier})
    distance = LensDistance(test, classifier, IMAGES_PER_CLASS)
    hold(OUTPUT_DIR)
    plain = [(solver, grid, steps) for solver in flow.SOLVERS for grid in flow.TIME_GRIDS for steps in _STEPS]
    guided = [(steps, *of_guidance) for of_guidance in _GUIDANCE for steps in _GUIDANCE_STEPS]
    found: _Found = {}

    with tqdm(total=len(plain) + len(guided), desc="samplers", leave=False) as bar:

        def measure(name: str, nfe: int, images: Tensor) -> None:
            found.setdefault(name, {})[nfe] = distance.over_floor(images)
            bar.update()

        for solver, grid, steps in plain:
            images = model.generate(distance.labels, flow.Sampler(steps, 1.0, solver, grid), SEED)
            measure(f"{solver}, {grid}", 2 * steps - 1 if solver == "heun" else steps, images)
        for steps, scale, interval in guided:
            images, nfe = with_guidance(model, distance.labels, steps, scale, interval)
            measure(f"multistep, logit, guidance {scale:g}, t from {interval[0]:g} to {interval[1]:g}", nfe, images)

    with whole(Path(OUTPUT_DIR) / "samplers.json") as file:
        file.write(json.dumps({"settings": settings.constants(globals()), "over_floor": found}, indent=1).encode())
    subsets = subsets_of(test)
    plots.save(picture(found, subsets), Path(OUTPUT_DIR) / "samplers.png")
    print(f"\n| sampler | NFE | {' | '.join(subsets)} |\n|---|---|{'---|' * len(subsets)}")
    for name, of_name in found.items():
        for nfe, ratio in sorted(of_name.items()):
            print(f"| {name} | {nfe} | {' | '.join(f'{value:.1f}' for value in ratio.values())} |")
    print(f"\nWritten: {OUTPUT_DIR}/samplers.json and {OUTPUT_DIR}/samplers.png")


def with_guidance(
    model: Generator, labels: Tensor, steps: int, scale: float, interval: tuple[float, float]
) -> tuple[Tensor, int]:
    """Images of the multistep solver with guidance inside an interval of times, and the NFE that each takes."""
    sampler = flow.Sampler(steps, scale, "multistep", "logit")
    times = flow.evaluation_times(sampler, model.standard_deviation is not None)[:-1]
    doubled = sum(interval[0] <= t <= interval[1] for t in times)
    return model.generate(labels, sampler, SEED, interval=interval), steps + doubled


@plots.own_style
def picture(found: _Found, subsets: tuple[str, ...]) -> Figure:
    """A panel for all images and one for each class."""
    rows = -(-len(subsets) // 2)
    figure = Figure(figsize=(11, 3.75 * rows), layout="constrained")
    colors = dict(zip(flow.TIME_GRIDS, ("C0", "C1", "C2"), strict=True))
    lines = dict(zip(flow.SOLVERS, (":", "--", "-"), strict=True))
    panels = figure.subplots(rows, 2, sharex=True, squeeze=False).flatten()
    for unused in panels[len(subsets) :]:
        unused.set_axis_off()
    for axes, subset in zip(panels, subsets, strict=False):
        for name, of_name in found.items():
            nfe = sorted(of_name)
            solver, grid, *guidance = name.split(", ")
            style = {"marker": ".", "linestyle": lines[solver], "color": colors[grid]}
            if guidance:
                style = {"marker": "x", "linestyle": "", "color": "grey"}
            axes.plot(nfe, [of_name[n][subset] for n in nfe], label=name, **style)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", title=subset, ylim=(0.5, None))
        axes.set_xticks(ticks := (1, 2, 4, 8, 16, 32, 64), map(str, ticks))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.supxlabel("network evaluations (NFE) an image")
    figure.supylabel("Fréchet distance over its floor")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


if __name__ == "__main__":
    settings.run(main, globals())
