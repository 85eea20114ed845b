"""What a lens image costs on this machine, simulated and generated, side by side in one run.

    python evaluate/benchmark.py                    # on a CPU, mostly waits for the reference sampler
    python evaluate/benchmark.py --data_dir D       # with the quality of each number of steps beside its cost

Contenders: lenstronomy as simulate/simulate_lenses.py uses it, on all cores; the same recipe for many images at once
(simulate/vectorized.py), compiled; the reference sampler, 50 Euler steps with guidance of NanoDiT-B/2, untrained since
its speed is the same; the generator of CHECKPOINT_PATH with 1 to 16 network evaluations (NFE) an image, and compiled.
For images without a recipe, no simulator is timed. Writes OUTPUT_DIR/benchmark.json and OUTPUT_DIR/benchmark.png and
prints the tables.
"""

import copy
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plots
import settings
from dataset import load_parts
from files import hold, whole
from metrics.lens_distance import LensDistance
from metrics.score import check_match
from metrics.timing import least_seconds, peak_memory
from models import flow
from models.classifier import default_classifier, load_classifier
from models.generator import SIZES, Generator, build_untrained, default_generator, load_model
from settings import Count
from simulate.recipes import recipe_of
from simulate.renderer import parameter_table, render_row
from simulate.vectorized import shoot_rays, to_tensors
from simulate.workers import render_pool

DATA_DIR: str | None = None  # Folder of images: adds the Fréchet distance to its test images
CHECKPOINT_PATH: str = default_generator()  # The one trained here, or else the one of the repository
CLASSIFIER_PATH: str | None = None  # Gives the lens features; None takes the one trained here, or else the repository's
CACHE_DIR: str | None = None  # Where packed images are kept; None means their own folder, if it can be written to
OUTPUT_DIR: str = "benchmark"  # Where the table and the plot go
BATCH_SIZE: Count = 64  # Images at once
ROUNDS: Count = 3  # Every contender is timed in each round; the least time counts: other programs add to it
IMAGES_PER_CLASS: Count = 500  # In a Fréchet distance; at most half of the test images of a class
DEVICE: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto" takes the GPU when there is one

_NFE = (1, 2, 4, 8, 16)
_BATCHES = (1, 8, 64, 512)
_LENSTRONOMY, _VECTORIZED, _REFERENCE = "lenstronomy, all cores", "vectorized simulator", "reference sampler"
_Timed = dict[str, tuple[int, Callable[[], object]]]  # contender -> number of images, function that makes them


def main() -> None:
    device = settings.pick_device(DEVICE)
    hold(OUTPUT_DIR)
    model = load_model(CHECKPOINT_PATH, DEVICE)
    quality = {} if DATA_DIR is None else quality_of(model, device)  # first, so that wrong data show at once
    generators = networks(model, device)
    with simulators(model, device) as contenders:
        contenders |= {name: (drawn[1], partial(draw, *drawn)) for name, drawn in generators.items()}
        times, rates = {name: [] for name in contenders}, []
        for _ in tqdm(range(ROUNDS), "timing", leave=False):
            for name, (images, work) in contenders.items():
                times[name].append(least_seconds(work, warm_up=not times[name]) / images)
            rates.append(matmul_rate(device))
    rate = max(rates)
    print(f"{device.type}, {torch.get_num_threads()} threads: {rate / 1e9:.0f} GFLOP/s in products of matrices")
    found = {name: {"seconds": min(of_name)} for name, of_name in times.items()}
    for name, drawn in generators.items():
        found[name] |= {"operations": operations_of_image(*drawn)}
    strict = replace(model.sampler, tolerance=None)
    growth = {
        "images at once": {n: cost(model, n, model.sampler) for n in _BATCHES},
        "pixels": {n: cost(other, BATCH_SIZE, strict) for n, other in other_sizes(model)},
        "NFE": {n: found[_named(n)]["seconds"] for n in _NFE},
    }
    memory = peak_memory(CHECKPOINT_PATH, _BATCHES) if device.type == "cpu" else {}
    print_contenders(found, rate, quality, model.classes)
    print_growth(growth, memory)
    report = {"settings": settings.constants(globals()), "matmul_rate": rate, "contenders": found, "growth": growth}
    with whole(Path(OUTPUT_DIR) / "benchmark.json") as file:
        file.write(json.dumps(report | {"memory": memory, "quality": quality}, indent=1).encode())
    plots.save(picture(found, quality), Path(OUTPUT_DIR) / "benchmark.png")
    print(f"\nWritten: {OUTPUT_DIR}/benchmark.json and {OUTPUT_DIR}/benchmark.png")


def matmul_rate(device: torch.device, size: int = 2048) -> float:
    """Operations a second of a product of float32 matrices."""
    a = torch.randn(size, size, device=device)
    return 2 * size**3 / least_seconds(lambda: a @ a, warm_up=True)


def operations(work: Callable[[], object]) -> int:
    """Multiplications and additions of all products of matrices, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def operations_of_image(model: Generator, images: int, sampler: flow.Sampler) -> float:
    """Operations an image, in a batch of ``images``: those of all network evaluations, extrapolated from runs of one
    and two steps, and those of decoding."""
    one, two = (
        operations(partial(draw, model, images, replace(sampler, steps=steps, tolerance=None))) for steps in (1, 2)
    )
    return (one + (sampler.steps - 1) * (two - one)) / images


@contextmanager
def simulators(model: Generator, device: torch.device) -> Iterator[_Timed]:
    """Both simulators of images like the generator's, equally many of each class; empty if no recipe makes them."""
    if recipe_of(model.classes, model.image_shape) is None:
        yield {}
        return
    table = parameter_table(-(-BATCH_SIZE // len(model.classes)), 0)
    rows = [dict(zip(row.colnames, row, strict=True)) for row in table]
    of_class = [[row for row in rows if row["class"] == name] for name in model.classes]
    fast = torch.compile(shoot_rays, dynamic=False)
    shoot = fast if compiles(lambda: [fast(*to_tensors(of_name, device)) for of_name in of_class]) else shoot_rays

    def vectorized() -> None:
        for of_name in of_class:
            shoot(*to_tensors(of_name, device)).cpu()

    with render_pool() as pool:
        yield {
            _LENSTRONOMY: (len(rows), lambda: list(pool.map(render_row, rows, chunksize=4))),
            _VECTORIZED: (len(rows), vectorized),
        }


def compiles(work: Callable[[], object]) -> bool:
    """Whether the compiled functions in ``work`` run here: on a CPU, torch needs a C++ compiler for them."""
    try:
        work()
    except Exception:  # whatever the compiler's problem is
        print("torch cannot compile here: both the vectorized simulator and the generator could be faster")
        return False
    return True


def networks(model: Generator, device: torch.device) -> dict[str, tuple[Generator, int, flow.Sampler]]:
    """Arguments of ``draw`` for the reference sampler, and for the generator with few evaluations."""
    reference = build_untrained("NanoDiT-B/2", model.classes, model.image_shape).to(device).eval()
    alone = 1 if device.type == "cpu" else BATCH_SIZE  # an image takes a CPU a minute
    found = {_REFERENCE: (reference, alone, flow.Sampler())}
    found |= {_named(steps): (model, BATCH_SIZE, of_steps(model, steps)) for steps in _NFE}
    fast = copy.deepcopy(model)
    fast.compile()
    if compiles(lambda: draw(fast, BATCH_SIZE, model.sampler)):
        found[f"{_named(model.sampler.steps)}, compiled"] = (fast, BATCH_SIZE, model.sampler)
    return found


def of_steps(model: Generator, steps: int) -> flow.Sampler:
    """The generator's sampler with exactly ``steps`` steps; for its own number of steps, the sampler as it is."""
    return model.sampler if steps == model.sampler.steps else model.sampler_for(steps)


def _named(nfe: int) -> str:
    return f"generator, {nfe} NFE"


def draw(model: Generator, images: int, sampler: flow.Sampler) -> Tensor:
    """Images of all classes, from noise to pixels."""
    return model.generate(torch.arange(images) % len(model.classes), sampler, batch_size=images)


def other_sizes(model: Generator) -> Iterator[tuple[int, Generator]]:
    """Untrained generators like ``model`` for images of half, once, twice and four times its pixels on a side; sizes
    that the network cannot take are left out."""
    channels, size, _ = model.image_shape
    config = {"prediction": model.prediction} | model.network.config
    config.pop("input_size", None)
    like = next(name for name, of_size in SIZES.items() if of_size["network"] == type(model.network).__name__)
    for n in (size // 2, size, 2 * size, 4 * size):
        patch = {"patch_size": min(config["patch_size"], n)} if "patch_size" in config else {}
        try:
            other = build_untrained(like, model.classes, (channels, n, n), **config | patch)
        except ValueError:  # no image or no such network has this size
            continue
        yield n, other.to(model.device).eval()


def cost(model: Generator, images: int, sampler: flow.Sampler) -> float:
    """Seconds an image."""
    return least_seconds(lambda: draw(model, images, sampler), warm_up=True) / images


def quality_of(model: Generator, device: torch.device) -> dict[int, dict[str, float]]:
    """Fréchet distance in lens features over its floor: NFE -> subset -> ratio."""
    (test,) = load_parts(DATA_DIR, "test", cache_dir=CACHE_DIR)
    path = CLASSIFIER_PATH or default_classifier()
    classifier = load_classifier(path, device)
    check_match(test, {CHECKPOINT_PATH: model, path: classifier})
    distance = LensDistance(test, classifier, IMAGES_PER_CLASS)
    found = {}
    for steps in tqdm(_NFE, "quality", leave=False):
        images = model.generate(distance.labels, of_steps(model, steps))
        found[steps] = distance.over_floor(images)
    return found


def print_contenders(
    found: dict[str, dict[str, float]], rate: float, quality: dict[int, dict[str, float]], classes: tuple[str, ...]
) -> None:
    """Prints the time of each contender, and its ratios to lenstronomy and to the time its operations alone take."""
    print(
        "\n| | ms an image | images/s | times lenstronomy | over the arithmetic floor | Fréchet distance over floor |"
    )
    print("|---|---|---|---|---|---|")
    ratios = {_named(nfe): ratio for nfe, ratio in quality.items()}
    for name, of_name in found.items():
        taken = of_name["seconds"]
        speed = _count(found[_LENSTRONOMY]["seconds"] / taken) if _LENSTRONOMY in found else "-"
        floor = f"{taken * rate / of_name['operations']:.2f}" if "operations" in of_name else "-"
        distance = "-"
        if name in ratios:
            of_classes = ", ".join(_count(ratios[name][of]) for of in classes)
            distance = f"{_count(ratios[name]['overall'])} ({of_classes})"
        print(f"| {name} | {1e3 * taken:.3g} | {_count(1 / taken)} | {speed} | {floor} | {distance} |")


def print_growth(growth: dict[str, dict[int, float]], memory: dict[int, float]) -> None:
    """Prints how the generator's cost grows with each of three quantities."""
    for name, costs in growth.items():
        print(f"\n| {name} | {' | '.join(map(str, costs))} |\n|---|{'---|' * len(costs)}")
        print(f"| ms an image | {' | '.join(f'{1e3 * value:.3g}' for value in costs.values())} |")
        if name == "images at once" and memory:
            print(f"| memory in MB | {' | '.join(f'{value / 1e6:.0f}' for value in memory.values())} |")


@plots.own_style
def picture(found: dict[str, dict[str, float]], quality: dict[int, dict[str, float]]) -> Figure:
    """Bars of speeds; where quality was measured, its Fréchet distance stands beside the bar."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    speeds = [1 / of_name["seconds"] for of_name in found.values()]
    distances = {_named(nfe): f", Fréchet ratio {_count(ratio['overall'])}" for nfe, ratio in quality.items()}
    bars = axes.barh(list(found), speeds, color=["C1" if "generator" in name else "C0" for name in found])
    labels = [f" {_count(speed)}{distances.get(name, '')}" for name, speed in zip(found, speeds, strict=True)]
    axes.bar_label(bars, labels)
    axes.set(xscale="log", xlabel="images/s", xlim=(min(speeds) / 2, 2000 * max(speeds)))
    axes.invert_yaxis()
    return figure


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


if __name__ == "__main__":
    settings.run(main, globals())
