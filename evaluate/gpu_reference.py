"""Trains the published network and the small transformer on one GPU for minutes, and measures how good they are.

    python3 evaluate/gpu_reference.py      # or: make gpu-reference

Needs torch and torchvision for the GPU, NumPy, the packages of requirements-gpu.txt, and no internet. Simulates images
on the GPU and keeps them there. The learning rate follows a cosine that ends with the training time. Images are
generated with the exponential moving average (EMA) of the weights, as it is after half of that time and at its end;
other processes score them on the CPU meanwhile. Writes each result to OUTPUT_DIR as soon as it is known: reference.json
with speeds, losses and every metric beside its floor; {network}/training_metrics.png and .csv; samples.png; and the EMA
weights in half precision, in pieces that ``cat b2.safetensors.part* > b2.safetensors`` joins.
"""

import copy
import json
import math
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))


def packages() -> dict[str, str | None]:
    """Each line of requirements-gpu.txt, and torchvision, with the version that is installed, or None."""

    def installed(line: str) -> str | None:
        try:
            return version(line.split("==")[0])
        except PackageNotFoundError:
            return None

    lines = (_ROOT / "requirements-gpu.txt").read_text(encoding="utf-8").splitlines()
    return {line: installed(line) for line in [*lines, "torchvision"] if re.match(r"\w", line)}


if missing := [line for line, there in packages().items() if there is None]:  # now: some are imported below
    sys.exit(f"missing, of requirements-gpu.txt: {' '.join(missing)}")

import numpy as np
import torch
from torch import Tensor

import plots
import settings
from dataset import diffusion_transforms, normalize, split_of
from files import hold, whole
from metrics.background import Lenses, scoring_processes
from models import flow
from models.checkpoint import save_weights
from models.generator import Generator, build_untrained
from settings import Count, InputError, NotNegative, Positive, Splits, Whole
from simulate.recipes import MODEL_II
from simulate.renderer import parameter_table
from simulate.vectorized import render_many
from simulate.workers import usable_cores
from train import one_gpu

MINUTES: NotNegative = 8.0  # Of training NanoDiT-B/2, once its step is compiled; 0 leaves it out
SMALL_MINUTES: NotNegative = 4.0  # Of training NanoDiT-S/8, likewise
BUDGET_MINUTES: Positive = 25.0  # For everything; scores that are not ready by then are left out
OUTPUT_DIR: str = "gpu_reference"  # Where all results go
CLASSIFIER_PATH: str = "weights/resnet18_lens.safetensors"  # Gives the lens features of the metrics
NUM_PER_CLASS: Count = 30000  # Images of each class, 70% of them to train on
IMAGES_PER_CLASS: Count = 1000  # To generate and score, or as many as half of the test images of a class
NUM_SPLITS: Splits = 4  # Random halves of the real images, for floors and their standard deviation
SCORE: bool = True  # False keeps the generated images, in float16, to be scored elsewhere
SMALL_BATCH_SIZE: Count = 256  # Of NanoDiT-S/8; that of NanoDiT-B/2 is 160, as published
SMALL_LEARNING_RATE: Positive = 2e-3  # Of NanoDiT-S/8; that of NanoDiT-B/2 is 1e-4
EMA_WIDTH: Positive = 0.05  # Standard deviation of the steps that the EMA averages over, as a share of all
ATTENTION: Literal[(None, *one_gpu.ATTENTIONS)] = None  # Attention kernel in training; None measures which is fastest
COMPILE_MODE: Literal[one_gpu.COMPILE_MODES] = "default"  # The other one takes minutes to compile
SEED: Whole = 1  # Of images, weights, times and noise
DEVICE: Literal["auto", "cpu", "cuda"] = "auto"  # "auto" takes the GPU when there is one

_PIECE = 15_000_000  # bytes of a file of weights
_AT_ONCE = 500  # images that a network sees at once in generating; with guidance it sees each twice
_SHOWN = 6  # images of each class in samples.png
_ROWS = 50  # in the history of a training at least, or one a second if that is more


@dataclass(frozen=True)
class Training:
    """A network, how it is trained, and how its images are made."""

    size: str
    changes: dict[str, Any]  # to the network of that size
    batch_size: int
    learning_rate: float
    adam_beta2: float
    time_sampling: str
    samplers: dict[str, flow.Sampler]


def runs() -> dict[str, tuple[float, Training]]:
    """Name -> minutes and training of each network, the quick one first."""
    fast = {"multistep20": flow.Sampler(20, 1.0, "multistep", "logit")}
    published = {"euler50_guidance5": flow.Sampler(50, 5.0), **fast}
    small = Training("NanoDiT-S/8", {}, SMALL_BATCH_SIZE, SMALL_LEARNING_RATE, 0.99, "logit_normal", fast)
    large = Training("NanoDiT-B/2", {}, 160, 1e-4, 0.999, "uniform", published)
    return {"s8": (SMALL_MINUTES, small), "b2": (MINUTES, large)}


def main() -> None:
    deadline, device = time.monotonic() + 60 * BUDGET_MINUTES, settings.pick_device(DEVICE)
    if MINUTES + SMALL_MINUTES >= BUDGET_MINUTES:
        raise InputError("--budget_minutes must be more than the minutes of training", 2)
    torch.set_float32_matmul_precision("high")
    hold(OUTPUT_DIR)
    report = Report(Path(OUTPUT_DIR), device)
    with report.phase("simulating", needed=True):
        data = simulate(device)
    with (
        scoring_processes(data["test"], data["train"], count_of(data["test"]), NUM_SPLITS, CLASSIFIER_PATH)
        if SCORE
        else nullcontext()
    ) as report.score:
        for name, (minutes, run) in runs().items():
            if minutes:
                with report.phase(f"{name}, all of it"):
                    measure_network(name, run, 60 * minutes, data, report)
        with report.phase("waiting for scores"):
            report.await_scores(deadline)
    report.print()


def measure_network(name: str, run: Training, seconds: float, data: dict[str, Lenses], report: "Report") -> None:
    """Trains a network, writes its EMA weights, and has images that they generate scored; those of the end first."""
    found = report.content["networks"][name] = {"settings": asdict(run), "samples": {}}
    with report.phase(f"{name}, training", needed=True):
        generator, weights, history = train(run, data["train"], seconds, found)
    with report.phase(f"{name}, writing"):
        plots.training_curves(report.folder / name, history, [["loss"], ["ms_per_step"], ["learning_rate"]])
        found["weights"] = write_weights(report.folder / f"{name}.safetensors", generator, run)
        for moment in weights:
            generator.load_state_dict(weights[moment])
            found[f"validation_loss_{moment}"] = validation_loss(generator, run, data["val"])
    if generator.device.type == "cuda":
        generator.compile(dynamic=False)
    for moment in weights:
        generator.load_state_dict(weights[moment])
        for sampler_name, sampler in run.samplers.items():
            title = f"{name}_{moment}_{sampler_name}"
            with report.phase(f"{title}, generating"):
                sample = found["samples"][title] = {"sampler": asdict(sampler)}
                report.add(title, sample, generate(generator, sampler, count_of(data["test"]), sample))
    with report.phase(f"{name}, drawing"):
        report.draw_samples(data["test"])


# Images


def simulate(device: torch.device) -> dict[str, Lenses]:
    """NUM_PER_CLASS images of each class, split as the files 0.npy, 1.npy, ... of simulate_lenses.py are."""
    table = parameter_table(NUM_PER_CLASS, SEED)
    rows = [dict(zip(table.colnames, row, strict=True)) for row in zip(*table.columns.values(), strict=True)]
    images, at_once = [], 250 if device.type == "cuda" else 16
    for name in MODEL_II.classes:
        of_class = [row for row in rows if row["class"] == name]
        parts = (of_class[first : first + at_once] for first in range(0, NUM_PER_CLASS, at_once))
        images += [normalize(render_many(part, device)[:, None]) for part in parts]
    images = torch.cat(images)
    labels = torch.arange(len(MODEL_II.classes), device=device).repeat_interleave(NUM_PER_CLASS)
    splits = np.array([split_of(f"{i}.npy") for i in range(NUM_PER_CLASS)] * len(MODEL_II.classes))
    index = {name: torch.from_numpy(np.flatnonzero(splits == name)).to(device) for name in ("train", "val", "test")}
    return {name: Lenses(images[of_split], labels[of_split]) for name, of_split in index.items()}


def count_of(test: Lenses) -> int:
    """Images of a class to score."""
    return min(IMAGES_PER_CLASS, int(torch.bincount(test.labels).min()) // 2)


def generate(generator: Generator, sampler: flow.Sampler, count: int, found: dict[str, Any]) -> Tensor:
    """``count`` images of each class, class by class, scaled as those of files are; ``found`` gets their speed."""
    labels = torch.arange(len(MODEL_II.classes)).repeat_interleave(count)
    batch_size = _AT_ONCE if sampler.cfg_scale == 1 else _AT_ONCE // 2
    generator.generate(labels[:batch_size], flow.Sampler(1, sampler.cfg_scale), 0, batch_size)  # compiles
    started = time.monotonic()
    images = generator.generate(labels, sampler, 0, batch_size)  # in float32: bfloat16 is too coarse
    found["images_per_second"] = len(images) / (time.monotonic() - started)
    return normalize(images)


# Training


def train(run: Training, lenses: Lenses, seconds: float, found: dict[str, Any]) -> tuple[Generator, dict, list[dict]]:
    """Trains a network for ``seconds`` seconds, counted from when its step is compiled.

    Returns:
        A generator with the EMA weights; its weights at the "end" and after "half" of the time; rows of the history.
    """
    device, on_gpu = lenses.images.device, lenses.images.is_cuda
    torch.manual_seed(SEED)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    generator = build_untrained(run.size, MODEL_II.classes, MODEL_II.image_shape, **run.changes).to(device)
    averaged = copy.deepcopy(generator).eval().requires_grad_(False)
    ema = one_gpu.PowerEMA(averaged, generator, EMA_WIDTH)
    rate, betas = torch.zeros((), device=device), (0.9, run.adam_beta2)
    optimizer = torch.optim.AdamW(ema.weights, rate, betas, weight_decay=0.01, fused=True, capturable=on_gpu)
    images, index = diffusion_transforms(lenses.images), torch.arange(run.batch_size, device=device)

    def step(random: torch.Generator, loss_of: Callable[..., Tensor]) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(*draw(images[index], lenses.labels[index], run, random))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ema.weights, 1.0)
        optimizer.step()
        ema.update()
        return loss.detach()

    found["attention_ms"] = one_gpu.attention_times(generator.network, run.batch_size) if on_gpu else {}
    kernel = ATTENTION or min(found["attention_ms"], key=found["attention_ms"].get, default=None)
    launch, found["step"] = one_gpu.fastest(
        step, lambda *drawn: loss_at(generator, *drawn), device, SEED, kernel, COMPILE_MODE
    )
    batches, losses = one_gpu.endless_batches(len(lenses), run.batch_size, device), torch.zeros(1000, device=device)
    weights, history = {}, []
    done, block, pace, started = 0, 1, 0.0, time.monotonic()
    while (before := time.monotonic() - started) < seconds:
        for i in range(block):
            rate.fill_(one_gpu.learning_rate((before + i * pace) / seconds, run.learning_rate))
            index.copy_(next(batches))
            losses[i] = launch()
        loss, done = losses[:block].mean().item(), done + block  # the one line that waits for the GPU
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss is {loss} after {done} steps")
        now = time.monotonic() - started
        pace = (now - before) / block
        row = {"epoch": done * run.batch_size / len(lenses), "step": done, "seconds": now, "loss": loss}
        history.append(row | {"ms_per_step": 1e3 * pace, "learning_rate": rate.item()})
        if len(history) % 30 == 1:
            print(f"  {now:.0f} s, step {done}: loss {loss:.4f}, {run.batch_size / pace:,.0f} images/s", flush=True)
        if now > seconds / 2 and not weights:
            weights["half"] = copy.deepcopy(averaged.state_dict())
        block = max(1, min(len(losses), int(min(1, seconds / _ROWS) / pace)))
    found |= speeds(generator, run, history)
    return averaged, {"end": copy.deepcopy(averaged.state_dict()), **weights}, history


def draw(x: Tensor, labels: Tensor, run: Training, random: torch.Generator) -> tuple[Tensor, ...]:
    """Images in [-1, 1], noise, times, and labels of which a tenth is hidden."""
    noise = torch.randn(x.shape, generator=random, device=x.device)
    t = flow.draw_times(len(x), run.time_sampling, random, 0.69, 0.8)
    return x, noise, t, flow.drop_labels(labels, len(MODEL_II.classes), 0.1, random)


def loss_at(generator: Generator, x: Tensor, noise: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """The loss of train_diffusion.py, in bfloat16 on a GPU."""
    with torch.autocast(x.device.type, torch.bfloat16, x.is_cuda, cache_enabled=False):
        return generator.objective(generator.network, x, noise, t, labels)


@torch.no_grad()
def validation_loss(generator: Generator, run: Training, lenses: Lenses) -> float:
    """Loss on at most 2,048 images, always with the same times and noise."""
    device = lenses.images.device
    random, order = torch.Generator(device).manual_seed(0), torch.Generator().manual_seed(0)
    total, index = 0.0, torch.randperm(len(lenses), generator=order)[:2048].to(device)
    for some in index.split(256):
        drawn = draw(diffusion_transforms(lenses.images[some]), lenses.labels[some], run, random)
        total += loss_at(generator, *drawn).item() * len(some)
    return total / len(index)


def speeds(generator: Generator, run: Training, history: list[dict[str, float]]) -> dict[str, Any]:
    """Speed, arithmetic, memory and last loss of a training."""
    last, rows = history[-1], history[-max(1, len(history) // 20) :]
    per_second = last["step"] * run.batch_size / last["seconds"]
    operations, peak = 3 * one_gpu.forward_operations(generator.network), one_gpu.peak_operations()
    return {
        "steps": last["step"],
        "epochs": last["epoch"],
        "images_per_second": per_second,
        "ms_per_step": float(np.median([row["ms_per_step"] for row in history])),
        "operations_per_image": operations,
        "utilization": per_second * operations / peak if peak and generator.device.type == "cuda" else None,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if generator.device.type == "cuda" else None,
        "loss": float(np.mean([row["loss"] for row in rows])),
    }


def write_weights(path: Path, generator: Generator, run: Training) -> list[str]:
    """Writes weights as load_model reads them, in pieces where they are large; returns the names of the files."""
    weights = {name: value.half() for name, value in generator.network.state_dict().items()}
    save_weights(path, weights, **generator.description(), sampler=asdict(next(iter(run.samplers.values()))))
    content = path.read_bytes()
    if len(content) <= _PIECE:
        return [path.name]
    path.unlink()
    pieces = [path.with_name(f"{path.name}.part{number}") for number in range(-(-len(content) // _PIECE))]
    for number, piece in enumerate(pieces):
        piece.write_bytes(content[number * _PIECE :][:_PIECE])
    return [piece.name for piece in pieces]


# What is known so far


class Report:
    """reference.json and samples.png, written anew whenever there are new results.

    Attributes:
        score: function of a title and its generated images that starts to score them and returns a result to wait for;
            None keeps the images instead.
    """

    def __init__(self, folder: Path, device: torch.device):
        self.folder, self.score, self.waiting, self.shown = folder, None, {}, {}
        card = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {usable_cores()} cores"
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        self.content: dict[str, Any] = {"card": card, "versions": versions | packages()}
        self.content |= {"settings": settings.constants(globals()), "seconds": {}, "errors": {}, "networks": {}}

    @contextmanager
    def phase(self, name: str, needed: bool = False) -> Iterator[None]:
        """Times a part of the work. If it fails, the rest of the work goes on, unless the part is ``needed``."""
        started = time.monotonic()
        print(f"{name} ...", flush=True)
        try:
            yield
        except Exception as error:
            if needed:
                raise
            traceback.print_exc()
            self.content["errors"][name] = repr(error)
        finally:
            self.content["seconds"][name] = time.monotonic() - started
            print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
            self.write()

    def add(self, title: str, found: dict[str, Any], images: Tensor) -> None:
        """Has generated images scored, class by class, or keeps them."""
        self.shown[title] = [of_class[:_SHOWN] for of_class in images.chunk(len(MODEL_II.classes))]
        if self.score is None:
            self.keep(title, images)
        else:
            self.waiting[title] = found, images, self.score(title, images)

    def draw_samples(self, real: Lenses) -> None:
        """Draws real images and those of the end of each training; to draw more would take many seconds."""
        rows = {}
        for label, name in enumerate(MODEL_II.classes):
            rows[f"{name}\nreal"] = real.images[real.labels == label][:_SHOWN].cpu()
            rows |= {f"{name}\n{title}": shown[label] for title, shown in self.shown.items() if "_end_" in title}
        plots.save(plots.image_grid(rows), self.folder / "samples.png")

    def keep(self, title: str, images: Tensor) -> None:
        for name, of_class in zip(MODEL_II.classes, images.chunk(len(MODEL_II.classes)), strict=True):
            np.save(self.folder / f"{title}_{name}.npy", of_class[:, 0].half().numpy())

    def await_scores(self, deadline: float) -> None:
        """Takes the scores that are ready by ``deadline``; keeps the images of the others."""
        for title, (found, images, result) in self.waiting.items():
            try:
                found["metrics"] = result.get(max(0.1, deadline - time.monotonic()))
            except Exception as error:
                self.content["errors"][f"{title}, scoring"] = repr(error)
                self.keep(title, images)
            self.write()

    def write(self) -> None:
        for found, _, result in self.waiting.values():
            if result.ready() and result.successful():
                found["metrics"] = result.get()
        with whole(self.folder / "reference.json") as file:
            file.write(json.dumps(self.content, indent=1).encode())

    def print(self) -> None:
        """Prints the most telling numbers."""
        for name, found in self.content["networks"].items():
            print(name, {key: value for key, value in found.items() if key not in ("settings", "samples")})
            for title, sample in found["samples"].items():
                overall = {key: of_parts["overall"] for key, of_parts in sample.get("metrics", {}).items()}
                told = ("class_accuracy", "frechet_lens", "lens_residual", "two_sample_accuracy")
                print(title, {key: (overall[key]["value"], overall[key]["floor"]) for key in told if key in overall})
        print("errors:", self.content["errors"])


if __name__ == "__main__":
    settings.run(main, globals())
