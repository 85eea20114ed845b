"""The two-sample test finds what differs, and is at chance, with an honest interval, where nothing does."""

import torch

from evaluate.metrics import wilson_interval
from evaluate.two_sample import told_apart


def blobs(n, seed, noise=0.05):
    """Images of a round blob at a random place, with noise."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(n, 2, 1, 1, generator=generator) * 40 + 12
    axis = torch.arange(64.0)
    images = torch.exp(-((axis[:, None] - centre[:, :1]) ** 2 + (axis - centre[:, 1:]) ** 2) / 50)
    return (images + noise * torch.rand(n, 1, 64, 64, generator=generator)).clamp(0, 1)


def test_identical_distributions_are_told_apart_by_chance_alone():
    """Over 20 seeds: 0.5 on average, and within the 95% interval as often as it says."""
    labels = torch.arange(2).repeat_interleave(20)
    shares, covered = [], 0
    for seed in range(20):
        right, _ = told_apart(blobs(40, 2 * seed).__getitem__, blobs(40, 2 * seed + 1).__getitem__, labels, seed)
        shares.append(right.double().mean().item())
        low, high = wilson_interval(shares[-1], len(right))
        covered += low <= 0.5 <= high
    assert abs(sum(shares) / 20 - 0.5) < 3 * 0.5 / (20 * 40) ** 0.5
    assert covered >= 17  # of 20 with 95% each, fewer come one time in a hundred


def test_a_little_noise_is_found_at_once():
    labels = torch.zeros(80, dtype=torch.long)
    right, _ = told_apart(blobs(80, 0, 0.0).__getitem__, blobs(80, 1, 0.01).__getitem__, labels)
    assert right.double().mean() > 0.95


def test_the_answer_is_by_class_and_reproducible():
    labels = torch.arange(2).repeat_interleave(60)
    a, b = blobs(120, 0), blobs(120, 1)
    b[60:] = b[60:] * 0.5  # only the second class differs
    right, of_class = told_apart(a.__getitem__, b.__getitem__, labels, seed=1)
    assert len(right) == 120
    assert right[of_class == 1].double().mean() > 0.95
    assert right[of_class == 0].double().mean() < 0.75
    again, _ = told_apart(a.__getitem__, b.__getitem__, labels, seed=1)
    assert torch.equal(right, again)
