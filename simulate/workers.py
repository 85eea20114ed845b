"""Processes that render images side by side."""

import os
from concurrent.futures import ProcessPoolExecutor

import settings


def usable_cores() -> int:
    """Cores that this process may use; a SLURM job may use fewer than its node has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def render_pool(processes: int = 0) -> ProcessPoolExecutor:
    """A pool of processes, one for each usable core when ``processes`` is 0."""
    return ProcessPoolExecutor(processes or usable_cores(), initializer=settings.as_worker)
