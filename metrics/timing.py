"""Time and memory of some work, in a module that a fresh process imports fast."""

import multiprocessing
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import settings
from models.generator import load_model


def seconds(work: Callable[[], object], repeats: int = 3, warm_up: bool = True) -> float:
    """The least time of ``repeats`` runs of some work, after a first run that does not count; other programs only add
    to the time."""
    found = []
    for _ in range(repeats + 1 if warm_up else repeats):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return min(found[1:] if warm_up else found)


def least_seconds(work: Callable[[], object], warm_up: bool = True) -> float:
    """The least time of as many runs as fit into a second, 15 at most."""
    once = seconds(work, 1, warm_up)
    return min(once, seconds(work, min(14, int(1 / once)), warm_up=False)) if once < 1 else once


def peak_memory(checkpoint: str, batches: Sequence[int]) -> dict[int, float]:
    """Number of images at once -> bytes that generating them needs beyond the loaded network, in its own process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, settings.as_worker) as pool:
        return pool.submit(_peak_memory, checkpoint, batches).result()


def _peak_memory(checkpoint: str, batches: Sequence[int]) -> dict[int, float]:
    model, found = load_model(checkpoint, "cpu"), {}
    before = _highest()
    for images in sorted(batches):  # from small to large: the system only knows the highest peak so far
        model.generate(torch.arange(images) % len(model.classes), batch_size=images)
        found[images] = _highest() - before
    return found


def _highest() -> float:
    """Most bytes that this process has held; on Linux ``getrusage`` would count its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * float(re.search(r"VmHWM:\s*(\d+)", status.read_text(encoding="utf-8"))[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)
