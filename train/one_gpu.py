"""Training as fast as one GPU allows: each step as a single launch (a CUDA graph), an average of the weights that suits
short runs, and a count of the arithmetic operations."""

import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.model import NanoDiT

ATTENTIONS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")
Step = Callable[[torch.Generator, Callable[..., Tensor]], Tensor]  # (random numbers, loss function) -> loss

_PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 operations a second
_WARMUP, _LOWEST = 1 / 60, 1e-6  # share of the time in which the learning rate rises; its last value


def learning_rate(progress: float, highest: float) -> float:
    """Linear warm-up, then cosine decay until the time is over; ``progress`` is the share of the time that is over."""
    if progress < _WARMUP:
        return highest * max(progress / _WARMUP, 1e-3)
    decay = 0.5 * (1 + math.cos(math.pi * min(1, (progress - _WARMUP) / (1 - _WARMUP))))
    return _LOWEST + (highest - _LOWEST) * decay


def endless_batches(n: int, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Batches of random indices below n, each index once an epoch; what is left over from whole batches is dropped."""
    while True:
        yield from torch.randperm(n, device=device)[: n - n % batch_size].view(-1, batch_size)


class PowerEMA:
    """Moving average of weights in which step i of t counts as (i / t)^power (Karras et al. 2024, arXiv:2312.02696).

    ``width`` is the standard deviation of those steps divided by t; it is the same after any number of steps. A fixed
    decay suits one length of run: the published one, 0.9999 every ten steps, puts half of the weight on the last 70,000
    steps. ema-pytorch begins with a smaller decay, but a run of 3,000 still ends with an average over its last 2,000.
    """

    def __init__(self, averaged: torch.nn.Module, network: torch.nn.Module, width: float):
        pairs = zip(averaged.parameters(), network.parameters(), strict=True)
        self.averages, self.weights = map(list, zip(*((a, w) for a, w in pairs if w.requires_grad), strict=True))
        self.power = float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())
        self.steps = torch.zeros((), device=self.weights[0].device)

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        share = -torch.expm1((self.power + 1) * torch.log1p(-1 / self.steps))
        torch._foreach_mul_(self.averages, 1 - share)
        torch._foreach_add_(self.averages, torch._foreach_mul(self.weights, share))


def attention_times(network: NanoDiT, batch_size: int) -> dict[str, float]:
    """Milliseconds of a block's attention and its gradient, with each kernel of ATTENTIONS that works on this GPU."""
    shape = batch_size, network.pos_embed.shape[1], 3, network.config["num_heads"], -1
    qkv = torch.randn(*shape[:2], 3 * network.config["hidden_size"], device="cuda", dtype=torch.bfloat16)
    q, k, v = qkv.requires_grad_().view(shape).permute(2, 0, 3, 1, 4)
    gradient, times = torch.randn_like(q), {}
    for name, backend in ATTENTIONS.items():
        try:
            with sdpa_kernel(backend):
                for repeat in range(13):
                    if repeat == 3:
                        torch.cuda.synchronize()
                        started = time.monotonic()
                    F.scaled_dot_product_attention(q, k, v).backward(gradient, retain_graph=True)
            torch.cuda.synchronize()
            times[name] = 100 * (time.monotonic() - started)
        except RuntimeError as error:
            print(f"  no {name} attention here: {error}", flush=True)
    return times


def fastest(
    step: Step, loss: Callable[..., Tensor], device: torch.device, seed: int, kernel: str | None, compile_mode: str
) -> tuple[Callable[[], Tensor], str]:
    """A function that makes a step in the fastest way that works on this machine, and a name for that way.

    Args:
        step: must not wait for a result of the GPU, nor depend on Python numbers that change.
        kernel: attention kernel to try first, a name of ATTENTIONS; None lets torch choose.
    """
    ways = [(kernel, True, True), (None, True, True), (None, True, False), (None, False, False)]
    for attention, compiled, graphed in ways if device.type == "cuda" else ways[-1:]:
        started, random = time.monotonic(), torch.Generator(device).manual_seed(seed)
        way = f"{'compiled' if compiled else 'as it is'}, {'one launch' if graphed else 'launches'}"
        way += f", {attention} attention" if attention else ""
        torch._dynamo.reset()
        called = torch.compile(loss, dynamic=False, mode=compile_mode) if compiled else loss
        once = partial(step, random, called)
        try:
            with sdpa_kernel(ATTENTIONS[attention]) if attention else nullcontext():
                launch = captured(once, random) if graphed else once
                launch().item()
        except Exception:
            traceback.print_exc()
            print(f"  not possible here: {way}", flush=True)
            continue
        print(f"  {way}: ready in {time.monotonic() - started:.0f} s", flush=True)
        return launch, way
    raise RuntimeError("no step can be made on this machine")


def captured(once: Callable[[], Tensor], random: torch.Generator) -> Callable[[], Tensor]:
    """A step as one CUDA graph, one launch for all kernels; a small network spends most of its time in launches."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and creates what is created only once
            once()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph.register_generator_state(random)
    with torch.cuda.graph(graph, stream=stream):
        loss = once()

    def launch() -> Tensor:
        graph.replay()
        return loss

    return launch


def forward_operations(network: NanoDiT) -> int:
    """Multiplications and additions that a transformer of several tokens makes for one image.

    Each weight of a linear layer takes two for each token it sees; the two products of attention take four for each
    pair of tokens, channel and block. A training step takes three times as many: the gradients of inputs and those of
    weights each cost as much as the forward pass.
    """
    config, tokens, width = network.config, network.pos_embed.shape[1], network.config["hidden_size"]
    of_block = (4 + 2 * config["mlp_ratio"]) * width**2  # qkv, output, MLP
    of_ends = 2 * config["in_channels"] * config["patch_size"] ** 2 * width
    once = (6 * config["depth"] + 2) * width**2 + (256 + width) * width  # AdaLN, and the embedding of the time
    return int(2 * ((config["depth"] * of_block + of_ends) * tokens + once) + config["depth"] * 4 * tokens**2 * width)


@cache
def peak_operations() -> float | None:
    """Peak bfloat16 operations a second of the matrix units of this machine's GPU; None for an unknown GPU."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for name, peak in _PEAKS.items() if name in card), None)
