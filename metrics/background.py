"""Scores generated images on the CPU, in processes that run beside the work on the GPU."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partialmethod
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import settings
from metrics.score import Reference
from models.classifier import load_classifier
from simulate.recipes import MODEL_II
from simulate.workers import usable_cores

Score = Callable[[str, Tensor], AsyncResult]  # (title, generated images class by class) -> their metrics, later


@dataclass
class Lenses:
    """Images of Model II in memory, (n, 1, 64, 64) in [0, 1], with those attributes of a dataset that scoring needs."""

    images: Tensor
    labels: Tensor
    fingerprint: str = ""
    cache_dir: Path = Path()
    root_dir: Path = Path("simulated")
    pixel_scale: float | None = None
    keeps_flux: bool = False
    observer: None = None
    classes: tuple[str, ...] = MODEL_II.classes
    image_shape: tuple[int, int, int] = MODEL_II.image_shape

    def __len__(self) -> int:
        return len(self.labels)

    def counts(self) -> dict[str, int]:
        return dict(zip(self.classes, torch.bincount(self.labels).tolist(), strict=True))

    def read(self, index: Tensor, random: torch.Generator | None = None) -> Tensor:
        return self.images[index]

    def look(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.images[index], torch.zeros(len(index)), torch.ones(len(index))


@contextmanager
def scoring_processes(test: Lenses, train: Lenses, count: int, splits: int, classifier_path: str) -> Iterator[Score]:
    """Processes that measure the real images; the function that is yielded has them score other images. For arguments,
    see ``Reference`` and its ``score``."""
    processes = max(1, usable_cores() // 4)
    threads = max(1, usable_cores() // processes - 1)  # leaves some cores for other work
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("spawn").Pool(processes, _begin, [threads]) as pool,
    ):
        scratch = Path(folder)
        for name, lenses in {"test": test, "train": train}.items():
            np.savez(scratch / f"{name}.npz", images=lenses.images.cpu(), labels=lenses.labels.cpu())
        for _ in range(processes):
            pool.apply_async(_reference, (scratch, count, classifier_path))

        def score(title: str, images: Tensor) -> AsyncResult:
            labels = torch.arange(len(MODEL_II.classes)).repeat_interleave(len(images) // len(MODEL_II.classes))
            np.savez(scratch / f"{title}.npz", images=images, labels=labels)
            return pool.apply_async(_metrics_of, (title, splits, scratch, count, classifier_path))

        yield score


def _begin(threads: int) -> None:
    settings.as_worker()
    os.nice(5)
    torch.set_num_threads(threads)
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)


@cache
def _reference(scratch: Path, count: int, classifier_path: str) -> Reference:
    """The real images, measured once in each process."""
    test, train = (_read(scratch, name) for name in ("test", "train"))
    return Reference(test, train, count, load_classifier(classifier_path))


def _metrics_of(title: str, splits: int, scratch: Path, count: int, classifier_path: str) -> dict[str, Any]:
    """Every metric of the generated images of a title, with its floor."""
    return _reference(scratch, count, classifier_path).score(title, _read(scratch, title), splits, 0).metrics


def _read(scratch: Path, name: str) -> Lenses:
    arrays = np.load(scratch / f"{name}.npz")
    return Lenses(torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"]), name, scratch)
