"""Measures the speed of this machine, and computes from it what many images cost on many such devices.

    python evaluate/estimate_cost.py --model_size NanoDiT-S/16 --num_ode_steps 20 --cfg_scale 1
    torchrun --nproc_per_node=8 evaluate/estimate_cost.py       # also measures the all-reduce between the processes

Prints the measured speeds and, computed from them alone, two tables: generating, with what limits it, and a training
step.
"""

import math
import sys
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distributed
import settings
from files import save_array
from metrics.timing import seconds
from models import flow
from models.generator import SIZES, Generator, build_untrained
from settings import Count, Guidance, InputError, Positive, Steps
from simulate.recipes import MODEL_II
from train.run import duration, seconds_an_image

MODEL_SIZE: Literal[tuple(SIZES)] = "NanoDiT-B/2"  # The network; weights do not matter for its speed
NUM_ODE_STEPS: Steps = 50  # Euler steps from noise to image
CFG_SCALE: Guidance = 5.0  # Guidance scale; 1 is no guidance, half of the work
BATCH_SIZE: Count = 128  # Images at once, on each device
IMAGE_SIZE: Count = MODEL_II.image_shape[-1]  # Pixels on a side
CHANNELS: Count = MODEL_II.image_shape[0]  # Of an image
OUTPUT_DIR: str = "."  # Any folder on the file system that images would be written to
NETWORK_GB_PER_S: Positive = 10.0  # Between devices; measured instead when torchrun starts several processes
DEVICE: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto" takes the GPU when there is one

_IMAGES = (10**6, 10**9)
_DEVICES = (1, 8, 320)


def main() -> None:
    device = distributed.join(settings.pick_device(DEVICE))
    print(f"measuring {MODEL_SIZE} on {device.type}: minutes on a GPU, hours on a CPU where the network is large")
    torch.manual_seed(0)
    shape = (CHANNELS, IMAGE_SIZE, IMAGE_SIZE)
    model = build(shape).to(device)
    labels = torch.arange(BATCH_SIZE) % len(model.classes)
    sampler = flow.Sampler(NUM_ODE_STEPS, CFG_SCALE)
    images = np.zeros((max(BATCH_SIZE, 2**24 // math.prod(shape)), *shape), np.float32)  # 64 MB, or a batch
    held, order = torch.from_numpy(images), torch.randperm(len(images))[:BATCH_SIZE]
    gradient = torch.zeros(sum(p.numel() for p in model.parameters() if p.requires_grad), device=device)
    rates = {
        "generating": BATCH_SIZE / seconds(lambda: model.generate(labels, sampler)),
        "training": 1 / seconds_an_image(model, BATCH_SIZE),
        "reading": BATCH_SIZE / seconds(lambda: held[order].to(device)),
    }
    with tempfile.TemporaryDirectory(dir=OUTPUT_DIR) as folder:
        path = Path(folder)
        paths = [path / f"{i}.npy" for i in range(min(500, len(images)))]
        rates["one file an image"] = len(paths) / seconds(lambda: list(map(save_array, paths, images)))
        rates["one file for all"] = len(images) / seconds(lambda: save_array(path / "all.npy", images))
    sums = distributed.total(*rates.values())
    rates = {name: rate / distributed.size() for name, rate in zip(rates, sums, strict=True)}
    processes, traffic, network = distributed.size(), 4 * len(gradient), NETWORK_GB_PER_S * 1e9
    if processes > 1:
        network = 2 * (processes - 1) / processes * traffic / seconds(lambda: torch.distributed.all_reduce(gradient))
    threads = torch.get_num_threads()
    print(f"{MODEL_SIZE}, {NUM_ODE_STEPS} steps, guidance {CFG_SCALE:g}, on {device.type}, {threads} threads")
    for name, rate in rates.items():
        print(f"{name}: {rate:.3g} images/s")
    source = "measured" if processes > 1 else "assumed"
    print(f"network: {network / 1e9:.3g} GB/s, {source}; gradients of {traffic / 1e6:.0f} MB a step\n")
    print_generating(rates, images[0].nbytes)
    print_training(rates, traffic, network)


def build(shape: tuple[int, int, int]) -> Generator:
    """An untrained generator of MODEL_SIZE.

    Raises:
        InputError: for a network that cannot take such images.
    """
    try:
        return build_untrained(MODEL_SIZE, MODEL_II.classes, shape)
    except ValueError as error:
        raise InputError(f"no such network: {error}", 2) from None


def print_generating(rates: dict[str, float], size: int) -> None:
    """Prints the cost of many images of ``size`` bytes; devices divide the work, but write to one file system."""
    print("| images | devices | generating | writing a file each | writing one file | bytes | the slower |")
    print("|---|---|---|---|---|---|---|")
    for images in _IMAGES:
        for devices in _DEVICES:
            compute = images / rates["generating"] / devices
            each, packed = (images / rates[f"one file {kind}"] for kind in ("an image", "for all"))
            slower = "generating" if compute > each else "files" if compute > packed else "the disk"
            times = " | ".join(map(duration, (compute, each, packed)))
            print(f"| {images:.0e} | {devices} | {times} | {images * size / 1e9:,.0f} GB | {slower} |")


def print_training(rates: dict[str, float], traffic: float, network: float) -> None:
    """Prints the cost of a step, BATCH_SIZE images a device; a ring sends gradients nearly twice (arXiv:2006.15704)."""
    print(f"\n| devices | batch | computing | all-reduce | reading | images/s | efficiency |\n{'|---' * 7}|")
    for devices in _DEVICES:
        compute, read = BATCH_SIZE / rates["training"], BATCH_SIZE / rates["reading"]
        reduce = 2 * (devices - 1) / devices * traffic / network
        step = max(compute, reduce) + read  # some gradients are sent while others are computed
        row = [f"{1e3 * value:.3g} ms" for value in (compute, reduce, read)]
        rate, ideal = devices * BATCH_SIZE / step, devices * rates["training"]
        print(f"| {devices} | {devices * BATCH_SIZE} | {' | '.join(row)} | {rate:,.0f} | {rate / ideal:.0%} |")


if __name__ == "__main__":
    settings.run(main, globals(), torchrun=True)
