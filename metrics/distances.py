"""Distances between samples, from their features; each is checked against a closed form or its published definition."""

import math

import numpy as np
import torch
from pqm import pqm_pvalue
from scipy.stats import wasserstein_distance
from torch import Tensor

_ROWS = 256  # of a matrix of distances, held in memory at once
NEIGHBOURS = 5  # k of precision, recall, density and coverage
_FEWEST = 50  # images at least, for PQMass
_FLD_IMAGES = 3000  # of each sample at most
_FLD_STEPS = 20  # of expectation maximization
_FLD_LEAST_VARIANCE = 1e-4  # of unit-variance features: a Gaussian on a copied image stays this wide


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to features (n, d) and (m, d) (Heusel et al. 2017, arXiv:1706.08500).

    With covariances A^T A and B^T B, the trace of the root of their product is the sum of the singular values of A B^T:
    as exact as an eigenvalue solver on the product, and in far less time.
    """
    (mean_a, root_a), (mean_b, root_b) = _mean_and_root(a.double()), _mean_and_root(b.double())
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(distance.item(), 0.0)  # rounding can leave equal sets a little below zero


def _mean_and_root(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) of features (n, d), and R with R^T R their covariance."""
    mean = x.mean(0)
    return mean, torch.linalg.qr((x - mean) / (len(x) - 1) ** 0.5, mode="r").R


def kernel_distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """KID (Bińkowski et al. 2018, arXiv:1801.01401) of features (n, d) each, and its standard error.

    The unbiased squared maximum mean discrepancy (Gretton et al. 2012, Eq. 3) of the kernel (x.y / d + 1)^3; its
    standard error by leaving out one image of each sample at a time.
    """
    n, d = a.shape
    if len(b) != n:
        raise ValueError("kernel_distance takes two samples of one size")
    a, b = a.double(), b.double()

    def kernel_sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # over all y, and with the y of the same index
        rows = torch.cat([((part @ y.T / d + 1) ** 3).sum(1) for part in x.split(_ROWS)])
        return rows, ((x * y).sum(1) / d + 1) ** 3

    (of_a, self_a), (of_b, self_b) = kernel_sums(a, a), kernel_sums(b, b)
    (of_ab, pair), (of_ba, _) = kernel_sums(a, b), kernel_sums(b, a)
    within, across = of_a - self_a + of_b - self_b, of_ab + of_ba
    distance = within.sum() / (n * (n - 1)) - 2 * of_ab.sum() / n**2
    without_one = (within.sum() - 2 * within) / ((n - 1) * (n - 2)) - 2 * (of_ab.sum() - across + pair) / (n - 1) ** 2
    error = ((n - 1) / n * (without_one - without_one.mean()).square().sum()).sqrt()
    return distance.item(), error.item()


def precision_recall_density_coverage(real: Tensor, other: Tensor, k: int = NEIGHBOURS) -> dict[str, float]:
    """Precision, recall, density and coverage of features ``other`` (m, d) with respect to features ``real`` (n, d).

    Precision and recall: Kynkäänniemi et al. 2019 (arXiv:1904.06991, Eq. 1-2); density and coverage: Naeem et al. 2020
    (arXiv:2002.09797, Eq. 4-5). A neighbourhood reaches to the k-th nearest image of the same sample.
    """
    k = min(k, len(real) - 1, len(other) - 1)
    real_reach, other_reach = _reach(real, k), _reach(other, k)
    near, recalled = torch.full_like(real_reach, math.inf), torch.zeros(len(real), dtype=torch.bool)
    counts = []  # for each image of ``other``, the number of real neighbourhoods it lies in
    for part, reach in zip(other.split(_ROWS), other_reach.split(_ROWS), strict=True):
        distance = torch.cdist(real, part)
        counts.append((distance <= real_reach[:, None]).sum(0))
        recalled |= (distance <= reach).any(1)
        near = torch.minimum(near, distance.amin(1))
    count = torch.cat(counts).double()
    return {
        "precision": (count > 0).double().mean().item(),
        "recall": recalled.double().mean().item(),
        "density": count.mean().item() / k,
        "coverage": (near <= real_reach).double().mean().item(),
    }


def _reach(x: Tensor, k: int) -> Tensor:
    """Distance of each row of ``x`` (n, d) to the k-th nearest other row, (n,)."""
    return torch.cat([torch.cdist(part, x).kthvalue(k + 1, dim=1).values for part in x.split(_ROWS)])  # 1 is itself


def feature_likelihood_divergence(train: Tensor, test: Tensor, other: Tensor) -> tuple[float, float]:
    """FLD and its generalization gap (Jiralerspong et al. 2023, arXiv:2302.04440, Eq. 3-5) of features (n, d).

    Every image of ``other`` gets a Gaussian; the widths maximize the likelihood of the training images. FLD is 100
    times the negative log-likelihood a dimension (NLL) of the test images, minus the same with half of the training
    images in place of ``other``. The gap is 100 times the NLL of the training images minus that of the test images: far
    below zero when ``other`` holds copies of training images, onto which their Gaussians shrink.
    """
    random = torch.Generator().manual_seed(0)  # samples come class by class; each half needs all classes
    train, test, other = (x[torch.randperm(len(x), generator=random)[:_FLD_IMAGES]] for x in (train, test, other))
    mean, deviation = test.mean(0), test.std(0)
    deviation = deviation.clamp_min(0.01 * deviation.mean())  # of a feature that is nearly constant, or dead
    train, test, other = ((x - mean) / deviation for x in (train, test, other))
    of_train, of_test = _negative_log_likelihood(other, train, [train, test])
    half = len(train) // 2
    (baseline,) = _negative_log_likelihood(train[:half][: len(other)], train[half:], [test])
    return 100 * (of_test - baseline), 100 * (of_train - of_test)


def _negative_log_likelihood(centres: Tensor, fitted_to: Tensor, of: list[Tensor]) -> list[float]:
    """Negative log-likelihood a dimension of each sample in ``of``, under Gaussians of equal weight on ``centres``.

    The widths of the Gaussians are the most likely ones for ``fitted_to``.
    """
    dimension, wide = centres.shape[1], centres.double()

    def log_likelihoods(squares: Tensor, variance: Tensor) -> Tensor:
        return -0.5 * (squares / variance + dimension * torch.log(2 * math.pi * variance)) - math.log(len(centres))

    def squared_distances(x: Tensor) -> Tensor:  # in float64: between copies, equal numbers cancel
        return torch.cdist(x.double(), wide).square().float()

    squares = torch.cat([squared_distances(part) for part in fitted_to.split(_ROWS)])
    # Widths start at the distance to the nearest image, as published: wider ones end in far less likely widths
    variance = (squares.amin(0) / dimension).clamp_min(_FLD_LEAST_VARIANCE)
    for _ in range(_FLD_STEPS):  # expectation maximization in closed form, the centres being fixed
        mass, squared = torch.zeros_like(variance), torch.zeros_like(variance)
        for part in squares.split(_ROWS):
            share = log_likelihoods(part, variance).softmax(1)
            mass += share.sum(0)
            squared += (share * part).sum(0)
        fitted = squared / (dimension * mass).clamp_min(1e-30)
        variance = torch.where(mass > 1e-6, fitted, variance).clamp_min(_FLD_LEAST_VARIANCE)
    found = ([log_likelihoods(squared_distances(part), variance).logsumexp(1) for part in x.split(_ROWS)] for x in of)
    return [-torch.cat(parts).mean().item() / dimension for parts in found]


def wasserstein(a: Tensor | np.ndarray, b: Tensor | np.ndarray, period: float | None = None) -> float:
    """Wasserstein-1 distance of two samples of a number, or, with a period, of an angle.

    On a circle it is the least integral of \\|F_a - F_b - c\\| over constants c (Rabin et al. 2011, arXiv:0906.5499).
    """
    a, b = np.asarray(a), np.asarray(b)
    if period is None:
        return float(wasserstein_distance(a, b))
    at = np.sort(np.concatenate([a, b]) % period)
    width = np.diff(at, append=at[0] + period)
    gap = np.searchsorted(np.sort(a % period), at, "right") / len(a)
    gap = gap - np.searchsorted(np.sort(b % period), at, "right") / len(b)
    order = np.argsort(gap)
    median = gap[order][np.searchsorted(np.cumsum(width[order]), period / 2)]
    return float((np.abs(gap - median) * width).sum())


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share of ``count`` independent trials (Wilson 1927)."""
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def pqmass(real: Tensor, other: Tensor, repetitions: int = 10, seed: int = 0) -> list[float]:
    """p-values of PQMass (Lemos et al. 2024, arXiv:2402.04355), which needs no features: uniform if two samples (n, d)
    have the same distribution, near 0 if not. The list is empty for fewer than 50 images.

    Each p-value takes another random quarter of both samples, at least 50 images: if all took the same images, they
    would resemble each other and not be uniform together. Up to 100 images divide the space into cells, each of the
    points nearest to one of them; a chi-squared test compares how many images of both samples are in each cell.
    """
    count = max(min(len(real), len(other)) // 4, _FEWEST)
    if min(len(real), len(other)) < count:
        return []
    cells = min(100, count // 10)
    state = np.random.get_state()  # noqa: NPY002, pqm uses the global random numbers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        found = []
        for _ in range(repetitions):
            some = (sample[torch.randperm(len(sample))[:count]] for sample in (real, other))
            found.append(pqm_pvalue(*some, num_refs=cells))
    np.random.set_state(state)  # noqa: NPY002
    return found
