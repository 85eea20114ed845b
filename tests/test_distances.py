"""Distances between samples of features, against closed forms and the published definitions."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import kstest, multivariate_normal, wasserstein_distance
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from metrics import distances


def gaussian_features(n, mean, variance, seed):
    """Features (n, d) whose sample mean and covariance are exactly mean and diag(variance)."""
    x = np.random.default_rng(seed).standard_normal((n, len(mean)))
    x = x - x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return torch.from_numpy(x * np.sqrt(variance) + mean)


def test_frechet_distance_of_known_gaussians():
    a = gaussian_features(60, [0.0, 1, 2], [1.0, 4, 9], seed=0)
    b = gaussian_features(80, [1.0, 1, 0], [4.0, 4, 1], seed=1)
    expected = (1 + 0 + 4) + (1 - 2) ** 2 + (2 - 2) ** 2 + (3 - 1) ** 2
    assert distances.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert distances.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("count", [15, 80])
def test_frechet_distance_is_that_of_torchmetrics(count):
    """An independent reference, with fewer and with more images than features."""
    a, b = torch.from_numpy(np.random.default_rng(0).normal(size=(2, count, 30)) ** 3)
    identity = nn.Identity()
    identity.num_features = 30
    reference = FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
    reference.update(a, real=True)
    reference.update(b + 0.3, real=False)
    assert distances.frechet_distance(a, b + 0.3) == pytest.approx(reference.compute().item(), rel=1e-6)


def test_a_rotated_covariance_is_not_taken_for_a_diagonal_one():
    a = gaussian_features(60, [0.0, 0], [1.0, 25], seed=0)
    angle = np.pi / 4
    turn = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    covariance = np.diag([1.0, 25])
    turned = turn.numpy() @ covariance @ turn.numpy().T
    eigenvalues = np.linalg.eigvals(covariance @ turned)
    expected = 52 - 2 * np.sqrt(eigenvalues).sum()
    assert distances.frechet_distance(a, a @ turn.T) == pytest.approx(expected, rel=1e-6)


@pytest.fixture(params=[2, 1024])
def rows_at_once(request, monkeypatch):
    """A few rows of a matrix at a time must give what all at once give."""
    monkeypatch.setattr(distances, "_ROWS", request.param)


def kernel(x, y):
    return (sum(p * q for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3


def test_kernel_distance_is_the_unbiased_estimate_written_out(rows_at_once):
    a, b = np.random.default_rng(0).normal(size=(2, 7, 4))

    def estimate(keep):
        n = len(keep)
        within = sum(kernel(x[i], x[j]) for x in (a, b) for i in keep for j in keep if i != j)
        return within / (n * (n - 1)) - 2 * sum(kernel(a[i], b[j]) for i in keep for j in keep) / n**2

    value, error = distances.kernel_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert value == pytest.approx(estimate(range(7)))
    without_one = [estimate(set(range(7)) - {i}) for i in range(7)]
    assert error == pytest.approx(math.sqrt(6 / 7 * sum((x - np.mean(without_one)) ** 2 for x in without_one)))


def test_kernel_distance_is_unbiased_and_its_error_honest():
    """For equal distributions the estimate is zero on average; for distant ones it scatters as its error says."""
    rng = np.random.default_rng(1)
    draw = lambda shift=0.0: torch.from_numpy(rng.normal(shift, 1, (60, 3)))  # noqa: E731
    same = [distances.kernel_distance(draw(), draw())[0] for _ in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / math.sqrt(len(same))
    distant = np.array([distances.kernel_distance(draw(), draw(1.0)) for _ in range(200)])
    assert np.mean(distant[:, 1]) == pytest.approx(np.std(distant[:, 0]), rel=0.25)


def by_hand(real, other, k):
    """Precision, recall, density and coverage from their definitions, in one dimension."""
    reach = lambda points, x: sorted(abs(x - p) for p in points)[k]  # noqa: E731  the nearest is x itself
    inside = [[abs(x - y) <= reach(real, x) for x in real] for y in other]
    return {
        "precision": sum(map(any, inside)) / len(other),
        "recall": sum(any(abs(x - y) <= reach(other, y) for y in other) for x in real) / len(real),
        "density": sum(map(sum, inside)) / (k * len(other)),
        "coverage": sum(any(row[i] for row in inside) for i in range(len(real))) / len(real),
    }


@pytest.mark.parametrize("k", [1, 2])
def test_precision_recall_density_coverage_of_points_on_a_line(k, rows_at_once):
    real, other = [0.0, 1.0, 2.1, 3.3, 10.0], [0.4, 0.6, 5.0, 40.0]
    column = lambda points: torch.tensor(points, dtype=torch.float64)[:, None]  # noqa: E731
    found = distances.precision_recall_density_coverage(column(real), column(other), k)
    assert found == pytest.approx(by_hand(real, other, k))
    if k == 1:  # reaches of real: 1, 1, 1.1, 1.2, 6.7; of other: 0.2, 0.2, 4.4, 35
        assert found == pytest.approx({"precision": 3 / 4, "recall": 4 / 5, "density": 5 / 4, "coverage": 3 / 5})


def test_the_likelihood_is_that_of_a_mixture_of_gaussians_at_its_most_likely_widths():
    rng = np.random.default_rng(2)
    centres, spreads = np.array([[0.0, 0], [3, 0], [0, 4]]), np.array([0.5, 1.0, 0.8])
    train, test = (
        np.concatenate([c + s * rng.normal(size=(n, 2)) for c, s in zip(centres, spreads, strict=True)])
        for n in (40, 9)
    )

    def nll(log_variances, points):
        widths = zip(centres, np.exp(log_variances), strict=True)
        return -np.log(sum(multivariate_normal(c, v).pdf(points) for c, v in widths) / 3).mean() / 2

    best = minimize(nll, np.zeros(3), train, method="Nelder-Mead", options={"xatol": 1e-4, "fatol": 1e-7}).x
    of_train, of_test = distances._negative_log_likelihood(
        torch.from_numpy(centres), torch.from_numpy(train), [torch.from_numpy(x) for x in (train, test)]
    )
    assert of_train == pytest.approx(nll(best, train), abs=1e-4)
    assert of_test == pytest.approx(nll(best, test), abs=1e-3)


def test_fld_grows_with_the_error_and_its_gap_shows_copies():
    rng = np.random.default_rng(3)
    train, test, other = (torch.from_numpy(rng.normal(size=(300, 6))).float() for _ in range(3))
    good, gap = distances.feature_likelihood_divergence(train, test, other)
    bad, _ = distances.feature_likelihood_divergence(train, test, other + 2)
    copied, gap_of_copies = distances.feature_likelihood_divergence(train, test, train)
    assert abs(good) < 15
    assert bad > good + 30
    assert copied > good + 30
    assert gap_of_copies < gap - 100


def test_wasserstein_distances_of_numbers_and_angles():
    a, b = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([5.0, 6.0, 8.0])
    assert distances.wasserstein(a, b) == pytest.approx(5)
    turn = 2 * math.pi
    angles = torch.linspace(0, 1, 50, dtype=torch.float64) ** 2
    for shift in (0.3, 1.0, turn - 0.2, turn + 0.1):  # the way round that is shorter
        expected = min(shift % turn, turn - shift % turn)
        assert distances.wasserstein(angles, (angles + shift) % turn, turn) == pytest.approx(expected, abs=1e-6)
    assert distances.wasserstein(angles, angles % turn, turn) == pytest.approx(0, abs=1e-12)


def test_the_circular_distance_is_the_best_assignment_around_the_circle():
    rng = np.random.default_rng(4)
    for _ in range(20):
        a, b = np.sort(rng.uniform(0, 1, (2, 8)))
        shifted = (np.roll(b, k) for k in range(8))
        cost = lambda x, y: np.mean(np.minimum((x - y) % 1, (y - x) % 1))  # noqa: E731
        expected = min(cost(a, order) for order in shifted)
        assert distances.wasserstein(torch.from_numpy(a), torch.from_numpy(b), 1.0) == pytest.approx(expected)
        assert expected <= wasserstein_distance(a, b) + 1e-12


def test_wilson_interval_is_the_published_one():
    assert distances.wilson_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert distances.wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert distances.wilson_interval(1.0, 20)[1] == 1


def test_fld_does_not_depend_on_the_order_of_the_training_images():
    """They come class by class, and each half of them must have all classes."""
    random = torch.Generator().manual_seed(0)
    classes = torch.arange(2).repeat_interleave(100)[:, None] * 20.0
    train, test, other = (torch.randn(200, 4, generator=random) + classes for _ in range(3))
    mixed = train[torch.randperm(200, generator=random)]
    by_class, in_any_order = (distances.feature_likelihood_divergence(x, test, other)[0] for x in (train, mixed))
    assert by_class == pytest.approx(in_any_order, abs=10)


def test_the_p_values_of_pqmass_are_uniform_for_one_distribution_alone():
    """With one p-value for each of 60 independent pairs of samples; and near 0 after a shift too small to see."""
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 60, 1200, 6, generator=random)
    same = [distances.pqmass(x, y, 1, seed)[0] for seed, (x, y) in enumerate(zip(a, b, strict=True))]
    assert kstest(same, "uniform").pvalue > 0.01
    apart = [distances.pqmass(x, y + 0.6, 1, seed)[0] for seed, (x, y) in enumerate(zip(a, b, strict=True))]
    assert np.median(apart) < 1e-3
    # Also for many p-values of one pair of samples in few dimensions, where cells resemble each other
    again = [distances.pqmass(x[:, :2], y[:, :2], 100, 0) for x, y in zip(a[:5], b[:5], strict=True)]
    assert np.median([kstest(p_values, "uniform").pvalue for p_values in again]) > 0.05


def test_pqmass_is_reproducible_and_leaves_the_numbers_of_others_alone():
    a, b = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(0))
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    expected = np.random.random(), torch.rand(())  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    first = distances.pqmass(a, b)
    assert len(first) == 10
    assert (np.random.random(), torch.rand(())) == expected  # noqa: NPY002
    assert distances.pqmass(a, b) == first
    assert distances.pqmass(a[:45], b[:45]) == []
