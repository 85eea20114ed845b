"""Flow matching on straight paths (rectified flow), for any network that predicts a velocity.

Images x live at t = 0 and Gaussian noise at t = 1; between them z_t = (1 - t) x + t noise, and dz/dt = noise - x is the
velocity that a network learns (Lipman et al. 2022, arXiv:2210.02747, Eq. 22-23; Liu et al. 2022, arXiv:2209.03003,
Eq. 1). New images come from integrating the learned velocity from noise at t = 1 down to t = 0.

Nothing here depends on a network: ``velocity`` is any function of z (n, ...), t (n,) and a condition (n, ...), which
says what each image should show: its label, say.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]

_FIRST, _LAST = 0.9, 0.03  # first and last time between 1 and 0 of the grid "logit"
_T_FLOOR = 0.05  # times below it weigh less in the loss of a clean-image prediction


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The point z_t = (1 - t) x + t noise of each path; x and noise (n, ...), t (n,) in [0, 1]."""
    t = _per_image(t, x)
    return (1 - t) * x + t * noise


def velocity_from_image(image: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """The velocity (z - x) / t of the straight path that ends in the clean image x (Li & He 2025, arXiv:2511.13720)."""
    return (z - image) / _per_image(t, z).clamp_min(1e-3)


def to_velocity(output: Tensor, z: Tensor, t: Tensor, prediction: str) -> Tensor:
    """Velocity from the output of a network: the output itself, or that of the path to the clean image it predicts."""
    return velocity_from_image(output, z, t) if prediction == "image" else output


def objective(
    network: Velocity,
    x: Tensor,
    noise: Tensor,
    t: Tensor,
    condition: Tensor,
    prediction: str = "velocity",
    weigh: Callable[[Tensor], Tensor] = lambda error: error,
) -> Tensor:
    """Flow-matching loss: mean squared error of the velocity at z_t against noise - x (arXiv:2210.02747, Eq. 23).

    Args:
        network: takes z_t, t and condition; its output is a velocity or a clean image, as ``prediction`` says.
        x, noise: ends of the paths, (n, ...).
        t: time in [0, 1] of each, (n,).
        condition: of each, (n, ...).
        weigh: linear map of the errors (n, ...) that gives them their weights.
    """
    z = interpolate(x, noise, t)
    velocity = to_velocity(network(z, t, condition).float(), z, t, prediction)
    error = weigh(velocity - (noise - x)).square().flatten(1).mean(1)
    if prediction == "image":  # this is the error of the image over t: its weight must stay finite (arXiv:2511.13720)
        error = error * (t / _T_FLOOR).clamp_max(1).square()
    return error.mean()


def generator_of(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random stream of a training step: the same one wherever a run was stopped and on however many processes."""
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0] >> 1))


def draw_times(n: int, distribution: str, random: torch.Generator, median: float, width: float) -> Tensor:
    """Times (n,) in (0, 1): "uniform", or "logit_normal", where log(t / (1 - t)) is normal with deviation ``width``.

    Esser et al. 2024 (arXiv:2403.03206, Sec. 3.1). Median 0.69 and width 0.8 are those of arXiv:2511.13720, t reversed.
    """
    if distribution == "uniform":
        return torch.rand(n, generator=random, device=random.device)
    return torch.sigmoid(
        math.log(median / (1 - median)) + width * torch.randn(n, generator=random, device=random.device)
    )


def drop_labels(labels: Tensor, null_label: int, probability: float, random: torch.Generator) -> Tensor:
    """Replaces a share of the labels by the null label, so that the network also learns the velocity without a class.

    Ho & Salimans 2022 (arXiv:2207.12598, Algorithm 1).
    """
    dropped = torch.rand(len(labels), generator=random, device=random.device) < probability
    return labels.masked_fill(dropped, null_label)


def hide(phases: Tensor, share: float, random: torch.Generator) -> Tensor:
    """Hides parameters (n, parameters) of a share of the images: sets some or all of them to NaN, unknown.

    The probability that a parameter is hidden is drawn for each image, uniformly from 0 to 1.
    """

    def draw(*shape: int) -> Tensor:
        return torch.rand(len(phases), *shape, generator=random, device=random.device)

    return phases.masked_fill((draw(1) < share) & (draw(phases.shape[1]) < draw(1)), math.nan)


def guided(
    velocity: Velocity, null: Tensor | float, scale: float, interval: tuple[float, float] = (0.0, 1.0)
) -> Velocity:
    """Classifier-free guidance: uncond + scale * (cond - uncond), both in one batch (arXiv:2207.12598, Eq. 6).

    ``null`` is the condition that asks for nothing. A scale of 1 needs no unconditional evaluation and makes none, nor
    do times outside ``interval`` (arXiv:2404.07724).
    """
    if scale == 1:
        return velocity

    def velocity_with_guidance(z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        if not interval[0] <= t[0] <= interval[1]:  # a solver has all images at the same time
            return velocity(z, t, condition)
        both = torch.cat([condition, torch.as_tensor(null).to(condition).expand_as(condition)])
        cond, uncond = velocity(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
        return uncond + scale * (cond - uncond)

    return velocity_with_guidance


def time_grid(steps: int, name: str = "uniform", last: float = _LAST, first: float = _FIRST) -> list[float]:
    """Times from 1 to 0.

    "uniform"; "cosine", (1 + cos(pi i / steps)) / 2, which is denser towards both ends; or "logit", where after the
    first step the signal-to-noise ratio (1 - t) / t grows by the same factor each time (arXiv:2206.00927).
    """
    if name == "logit":
        begin, end = _log_snr(first), _log_snr(last)
        inner = (begin + (end - begin) * i / max(1, steps - 2) for i in range(steps - 1))
        return [1.0, *(1 / (1 + math.exp(log_snr)) for log_snr in inner), 0.0]
    if name == "cosine":
        return [math.sin(math.pi / 2 * i / steps) ** 2 for i in range(steps, -1, -1)]
    return [i / steps for i in range(steps, -1, -1)]


def evaluation_times(sampler: "Sampler", first_is_free: bool) -> list[float]:
    """Time grid of a sampler. A first step that takes no evaluation is an extra one, and the grid begins at its end."""
    grid = time_grid(sampler.steps + first_is_free, sampler.grid, sampler.last, sampler.first)
    return grid[first_is_free:]


def deviation(standard_deviation: Tensor, t: Tensor) -> Tensor:
    """Standard deviation (n, ...) of z_t at times t (n,), given ``standard_deviation`` (...), that of the images."""
    t = t.view(-1, *[1] * standard_deviation.dim())
    return (((1 - t) * standard_deviation).square() + t.square()).sqrt()


def start(noise: Tensor, standard_deviation: Tensor | None, t: float) -> Tensor:
    """Start at t, the first of ``evaluation_times``: noise (n, ...), or noise moved along the flow of Gaussian images.

    While noise hides the images, the flow depends only on their mean, 0, and standard deviation (arXiv:2412.09726).
    """
    return noise if standard_deviation is None else noise * deviation(standard_deviation, _times(t, noise))


def euler(velocity: Velocity, z: Tensor, condition: Tensor, times: list[float]) -> Tensor:
    """Integrates dz/dt = velocity along ``times``, from 1 to 0; one evaluation a step, error of order 1 / steps."""
    for t, after in pairwise(times):
        z = z + (after - t) * velocity(z, _times(t, z), condition)
    return z


def heun(velocity: Velocity, z: Tensor, condition: Tensor, times: list[float]) -> Tensor:
    """As ``euler``, with the mean of the velocities at both ends of a step (arXiv:2206.00364, Algorithm 1).

    Two evaluations a step, one in the last step; the error falls as 1 / steps^2.
    """
    for t, after in pairwise(times):
        slope = velocity(z, _times(t, z), condition)
        ahead = z + (after - t) * slope
        if after > 0:
            slope = (slope + velocity(ahead, _times(after, z), condition)) / 2
            ahead = z + (after - t) * slope
        z = ahead
    return z


def multistep(velocity: Velocity, z: Tensor, condition: Tensor, times: list[float]) -> Tensor:
    """UniPC-2 (Zhao et al. 2023, arXiv:2302.04867, Algorithms 1 and 2, B(h) = e^h - 1), with DPM-Solver++(2M) as its
    predictor. Each step extrapolates the clean image from the last two predictions, in the logarithm of the
    signal-to-noise ratio. Once the clean image at the end of a step is predicted, the step is corrected with it.

    One evaluation a step, and the error falls as 1 / steps^3 where the grid is dense towards 0. The last step is
    Euler's: it ends in the predicted clean image.
    """
    images, steps = [], []  # the last two predicted clean images, and the steps from each to the next
    straight, share = z, 0.0  # the end of the last step without extrapolation, and the clean image's weight in it
    for t, after in pairwise(times):
        image = z - t * velocity(z, _times(t, z), condition)
        if images and steps[-1] < math.inf:  # a step from pure noise is not corrected
            z = straight + share * _correction(image, images, steps)
        images, steps = [*images[-1:], image], [*steps[-1:], _log_snr(after) - _log_snr(t)]
        share = 1 - after / t
        z = straight = after / t * z + share * image
        if len(images) == 2 and after > 0:  # extrapolates, except after a step from pure noise, which is infinite
            z = straight + share * steps[1] / (2 * steps[0]) * (images[1] - images[0])
    return z


def _correction(image: Tensor, images: list[Tensor], steps: list[float]) -> Tensor:
    """Correction to the clean image of a step, ``images[-1]``, once ``image``, that at the step's end, is known."""
    if len(images) == 1:
        return (image - images[0]) / 2
    h, ratio = steps[1], -steps[0] / steps[1]
    first = -1 / math.expm1(-h) - 1 / h  # and ``second``: the right side of UniC's linear system
    second = -1 / math.expm1(-h) - 2 * first / h
    of_before = (second - first) / (ratio - 1)
    return of_before / ratio * (images[0] - images[1]) + (first - of_before) * (image - images[1])


def _log_snr(t: float) -> float:
    """Logarithm of the signal-to-noise ratio (1 - t) / t, that of amplitudes and not of powers."""
    if t in (0, 1):
        return math.inf if t == 0 else -math.inf
    return math.log((1 - t) / t)


SOLVERS = {"euler": euler, "heun": heun, "multistep": multistep}
TIME_GRIDS = ("uniform", "cosine", "logit")


@dataclass(frozen=True)
class Sampler:
    """How noise becomes images; the defaults are those of the published network.

    Attributes:
        steps: from noise to image.
        cfg_scale: guidance scale; 1 is no guidance.
        solver: name of one of ``SOLVERS``.
        grid: name of the grid of times, see ``time_grid``.
        tolerance: None, or the largest change, relative to its norm, of the predicted clean image between the last two
            evaluations. An image that changes more is made again, from the same noise, in twice as many steps (error
            control as in arXiv:2105.14080).
        last: last time before 0 of the grid "logit". What is fainter than noise at this time is lost: noise of the
            images, too.
        first: first time after 1 of that grid. From 1 to it, images of a codec are taken for Gaussian: a time too far
            from 1 makes them too much alike.

    Raises:
        ValueError: for settings that no sampler can have.
    """

    steps: int = 50
    cfg_scale: float = 5.0
    solver: str = "euler"
    grid: str = "uniform"
    tolerance: float | None = None
    last: float = _LAST
    first: float = _FIRST

    def __post_init__(self):
        known = self.solver in SOLVERS and self.grid in TIME_GRIDS
        known &= 0 < self.last < self.first < 1
        known &= self.tolerance is None or 0 <= self.tolerance < math.inf
        if not (known and isinstance(self.steps, int) and 0 < self.steps <= 10_000 and 0 <= self.cfg_scale < math.inf):
            raise ValueError(f"no such sampler: {self}")


def _times(t: float, like: Tensor) -> Tensor:
    return torch.full((len(like),), t, device=like.device)


def noise_images(shape: tuple[int, ...], seed: int, numbers: Iterable[int], stream: int = 0) -> Tensor:
    """Gaussian noise (n, *shape) for images of these numbers; that of image k depends on seed, k and stream alone."""
    more = [stream] if stream else []
    noise = [np.random.default_rng([seed, k, *more]).standard_normal(shape, np.float32) for k in numbers]
    return torch.from_numpy(np.stack(noise))


@torch.inference_mode()
def sample(
    velocity: Velocity,
    condition: Tensor,
    shape: tuple[int, ...],
    null: Tensor | float,
    sampler: Sampler,
    seed: int = 0,
    batch_size: int = 128,
    first: int = 0,
    standard_deviation: Tensor | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """New images, one for each condition.

    Args:
        condition: what each image should show, (n, ...), on the device to compute on.
        shape: of one image, or of its coefficients.
        null: the condition that asks for nothing.
        seed: image k of a seed is the same whatever the batch size, the device or the number of images.
        first: number k of the first image.
        standard_deviation: of the training images around 0, (*shape), or None. If it is known, the first step is that
            of Gaussian images and takes no evaluation.
        interval: first and last of the times at which there is guidance.

    Returns:
        (n, *shape) float32, in the range the network was trained on, not clipped.
    """
    velocity = guided(velocity, null, sampler.cfg_scale, interval)

    def solve(numbers: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Images of these numbers, and which of them the last evaluation has changed by more than the tolerance."""
        noise = noise_images(shape, seed, (first + numbers).tolist()).to(condition.device)
        times = evaluation_times(replace(sampler, steps=steps), standard_deviation is not None)
        predicted: deque[Tensor] = deque(maxlen=2)  # clean images, by the last two evaluations

        def watched(z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            slope = velocity(z, t, condition)
            predicted.append((z - _per_image(t, z) * slope).flatten(1))
            return slope

        used = velocity if sampler.tolerance is None else watched
        made = SOLVERS[sampler.solver](used, start(noise, standard_deviation, times[0]), condition[numbers], times)
        if sampler.tolerance is None:
            return made, torch.zeros(len(numbers), dtype=torch.bool)
        change = (predicted[-1] - predicted[0]).norm(dim=1) / predicted[-1].norm(dim=1)
        return made, (change > sampler.tolerance).cpu()

    images, again = [], []
    with tqdm(total=len(condition), unit="image", desc="generating", leave=False, delay=1) as bar:
        for numbers in torch.arange(len(condition)).split(batch_size):
            made, unsettled = solve(numbers, sampler.steps)
            images.append(made)
            again.append(numbers[unsettled])
            bar.update(len(numbers))
    images, again = torch.cat(images), torch.cat(again)
    for done in range(0, len(again), batch_size):
        numbers = again[done : done + batch_size]
        images[numbers] = solve(numbers, 2 * sampler.steps)[0]
    return images


def to_network_range(images: Tensor) -> Tensor:
    """Images in [0, 1] to the range of the network, [-1, 1]."""
    return 2 * images - 1


def to_unit_range(images: Tensor) -> Tensor:
    """Images in the range of the network, [-1, 1], to [0, 1]; what lies outside is clipped."""
    return ((images + 1) / 2).clamp(0, 1)


def _per_image(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.dim() - 1))
