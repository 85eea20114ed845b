"""One process or many: the rank of this one, its share of the work, the results of the others.

torchrun starts the processes of a job and tells each its place (https://docs.pytorch.org/docs/stable/elastic/run.html).
Without it, there is one process, and nothing here does anything.
"""

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import nanodit_path  # noqa: F401
from settings import InputError, place


def join(device: torch.device) -> torch.device:
    """Meets the other processes of the job, if there are any; returns the device of this one.

    Raises:
        InputError: when a machine has more processes than GPUs, or only half of torchrun's variables are set.
    """
    if place()[1] == 1:
        return device
    if device.type == "cuda":
        index, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if index >= gpus:
            raise InputError(f"--nproc_per_node asks for more processes than the {gpus} GPUs of this machine")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    store, rank, size = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # After a restart on one machine, the store still has the addresses of dead processes (pytorch/pytorch#135712)
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    atexit.register(dist.destroy_process_group)
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


@contextmanager
def main_first() -> Iterator[None]:
    """Runs a ``with`` block in the main process first, then in the others, which find the files that it made."""
    if not is_main():
        dist.barrier()
    yield
    if is_main() and size() > 1:
        dist.barrier()


def parts(n: int, each: int = 1) -> list[slice]:
    """This process's share of n items, as ``each`` consecutive slices; over the job, lengths differ by at most one."""
    edges = [i * n // (size() * each) for i in range(size() * each + 1)]
    return [slice(*edge) for edge in pairwise(edges)][rank() * each :][:each]


def data_parallel(model: nn.Module) -> nn.Module:
    """The model with gradients averaged over all processes (Li et al. 2020, arXiv:2006.15704)."""
    return DistributedDataParallel(model) if size() > 1 else model


def total(*values: torch.Tensor | float) -> list[float]:
    """The sums of numbers over all processes."""
    if size() > 1:
        device = next((value.device for value in values if isinstance(value, torch.Tensor)), "cpu")
        sums = torch.tensor([float(value) for value in values], device=device, dtype=torch.float64)
        dist.all_reduce(sums)
        values = sums.tolist()
    return [float(value) for value in values]


def gather(value: Any) -> list[Any]:
    """The ``value`` of every process, in the order of ranks: anything that can be pickled, with tensors on the CPU."""
    found = [value] * size()
    if size() > 1:
        dist.all_gather_object(found, value)
    return found


def spread(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Results of ``work`` for all items, in their order; the processes share the work, and each gets all results."""
    found = gather([work(item) for item in items[rank() :: size()]])
    return [found[i % size()][i // size()] for i in range(len(items))]


def from_main(value: Any) -> Any:
    """The value of the main process."""
    return gather(value)[0]
