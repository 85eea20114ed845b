"""Quality against passes: solvers, grids of times and guidance on one network, and students that learned few steps.

    python evaluate/compare_samplers.py --checkpoint_path C --data_dir D
    python evaluate/compare_samplers.py ... --students_dir S      # with the checkpoints S/*.pt of train/distill.py

Prints a table and writes OUTPUT_DIR/samplers.json and OUTPUT_DIR/samplers.png. The measure is the Fréchet distance in
the features of the lens classifier over its floor; a pass with guidance counts as two.
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
from dataset import CLASSES, load_parts
from evaluate.evaluate_fld import load_model
from evaluate.lens_distance import LensDistance
from files import hold, whole
from models import flow
from models.classifier import load_classifier
from models.model import NanoDiT
from settings import Count, InputError, Whole

DATA_DIR: str = "data"  # Folder with axion/, cdm/ and no_sub/: its test images are the reference
CHECKPOINT_PATH: str = "diffusion_training/dit_conditional_ckpts/dit_conditional_final.pt"  # Of train_diffusion.py
STUDENTS_DIR: str | None = None  # Folder of checkpoints of train/distill.py: each is measured with its own sampler
CLASSIFIER_PATH: str = settings.first_there(  # Gives the lens features: the one trained here, or else the shipped one
    "classifier_training_resnet18/classifier_ckpts/resnet18_best.pt", "weights/resnet18_lens.safetensors"
)
CACHE_DIR: str | None = None  # Where packed images are kept; None is in their own folder, if it can be written to
OUTPUT_DIR: str = "samplers"  # Where the table and the plot go
IMAGES_PER_CLASS: Count = 1000  # In a distance; as many as half of the test images of a class if these are fewer
SEED: Whole = 0  # Of the noise
DEVICE: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto" takes the GPU when there is one

_STEPS = (1, 2, 4, 8, 16, 32)
_GUIDANCE_STEPS = (8, 16)
_GUIDANCE = ((1.5, (0.0, 1.0)), (1.5, (0.2, 0.8)), (3.0, (0.0, 1.0)), (3.0, (0.2, 0.8)))  # scale, interval of times

_Found = dict[str, dict[int, dict[str, float]]]  # sampler -> passes -> part -> ratio


def main() -> None:
    model = load_model(CHECKPOINT_PATH, DEVICE)
    (test,) = load_parts(DATA_DIR, "test", cache_dir=CACHE_DIR)
    distance = LensDistance(test, load_classifier(CLASSIFIER_PATH, model.pos_embed.device), IMAGES_PER_CLASS)
    paths = sorted(Path(STUDENTS_DIR).glob("*.pt")) if STUDENTS_DIR else []
    if STUDENTS_DIR and not paths:
        raise InputError(f"{STUDENTS_DIR}: no .pt files in it")
    students = [load_model(path, DEVICE) for path in paths]
    hold(OUTPUT_DIR)
    plain = [(solver, grid, steps) for solver in flow.SOLVERS for grid in flow.TIME_GRIDS for steps in _STEPS]
    guided = [(steps, *of_guidance) for of_guidance in _GUIDANCE for steps in _GUIDANCE_STEPS]
    found: _Found = {}

    with tqdm(total=len(plain) + len(guided) + len(students), desc="samplers", leave=False) as bar:

        def measure(name: str, passes: int, images: Tensor) -> None:
            found.setdefault(name, {})[passes] = distance.over_floor(images)
            bar.update()

        for solver, grid, steps in plain:
            images = model.generate(distance.labels, flow.Sampler(steps, 1.0, solver, grid), SEED)
            measure(f"{solver}, {grid}", 2 * steps - 1 if solver == "heun" else steps, images)
        for steps, scale, interval in guided:
            images, passes = with_guidance(model, distance.labels, steps, scale, interval)
            measure(f"multistep, logit, guidance {scale:g}, t from {interval[0]:g} to {interval[1]:g}", passes, images)
        for student in students:
            measure("distilled", student.sampler.steps, student.generate(distance.labels, seed=SEED))

    with whole(Path(OUTPUT_DIR) / "samplers.json") as file:
        file.write(json.dumps({"settings": settings.constants(globals()), "over_floor": found}, indent=1).encode())
    plots.save(picture(found), Path(OUTPUT_DIR) / "samplers.png")
    print_table(found)
    print(f"\nWritten: {OUTPUT_DIR}/samplers.json and {OUTPUT_DIR}/samplers.png")


def with_guidance(
    model: NanoDiT, labels: Tensor, steps: int, scale: float, interval: tuple[float, float]
) -> tuple[Tensor, int]:
    """Images of the multistep solver with guidance at times in an interval, and how many passes each takes."""
    sampler = flow.Sampler(steps, 1.0, "multistep", "logit")
    times = flow.pass_times(sampler, model.spread is not None)[:-1]
    velocity = flow.guided(model.along(times), model.num_classes, scale, interval)
    images = flow.sample(velocity, labels, model.sample_shape, model.num_classes, sampler, SEED, spread=model.spread)
    doubled = sum(interval[0] <= t <= interval[1] for t in times)
    return model.decode(images).cpu(), steps + doubled


def print_table(found: _Found) -> None:
    print("\n| sampler | passes | overall | axion | cdm | no_sub |\n|---|---|---|---|---|---|")
    for name, of_name in found.items():
        for passes, ratio in sorted(of_name.items()):
            print(f"| {name} | {passes} | {' | '.join(f'{value:.1f}' for value in ratio.values())} |")


@plots.own_style
def picture(found: _Found) -> Figure:
    """A panel for all images and one for each class."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    colors = dict(zip(flow.TIME_GRIDS, ("C0", "C1", "C2", "C4"), strict=True))
    lines = dict(zip(flow.SOLVERS, (":", "--", "-"), strict=True))
    for axes, part in zip(figure.subplots(2, 2, sharex=True).flat, ("overall", *CLASSES), strict=True):
        for name, of_name in found.items():
            passes = sorted(of_name)
            solver, grid, *guidance = [*name.split(", "), ""][:3]
            style = {"color": "C3", "linewidth": 2.5, "marker": "o"} if solver == "distilled" else {"marker": "."}
            if guidance and guidance[0]:
                style |= {"linestyle": "", "marker": "x", "color": "grey"}
            elif solver in lines:
                style |= {"linestyle": lines[solver], "color": colors[grid]}
            axes.plot(passes, [of_name[n][part] for n in passes], label=name, **style)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", title=part, ylim=(0.5, None))
        axes.set_xticks(ticks := (1, 2, 4, 8, 16, 32, 64), map(str, ticks))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.supxlabel("passes an image")
    figure.supylabel("Fréchet distance over its floor")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


if __name__ == "__main__":
    settings.run(main, globals())
