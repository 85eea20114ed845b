"""The C2ST finds what differs, and is at chance, with an honest interval, where nothing does."""

import pytest
import torch

from metrics.distances import wilson_interval
from metrics.two_sample import c2st

pytestmark = pytest.mark.usefixtures("full_c2st")


def blobs(n, seed, noise=0.05, size=64, channels=1):
    """Images of a round blob at a random place, with noise."""
    generator = torch.Generator().manual_seed(seed)
    centre = (torch.rand(n, 2, 1, 1, generator=generator) * 40 + 12) * size / 64
    axis = torch.arange(float(size))
    images = torch.exp(-((axis[:, None] - centre[:, :1]) ** 2 + (axis - centre[:, 1:]) ** 2) / (50 * (size / 64) ** 2))
    return (images + noise * torch.rand(n, channels, size, size, generator=generator)).clamp(0, 1)


def read(images):
    return lambda index, random: images[index]


def test_identical_distributions_are_told_apart_by_chance_alone():
    """Over 20 seeds: 0.5 on average, and within the 95% interval as often as it says."""
    labels = torch.arange(2).repeat_interleave(20)
    shares, covered = [], 0
    for seed in range(20):
        a, b = (blobs(40, 2 * seed + i, size=32) for i in range(2))  # small, so that twenty networks train fast
        right, _ = c2st(read(a), read(b), labels, seed)
        shares.append(right.double().mean().item())
        low, high = wilson_interval(shares[-1], len(right))
        covered += low <= 0.5 <= high
    assert abs(sum(shares) / 20 - 0.5) < 3 * 0.5 / (20 * 40) ** 0.5
    assert covered >= 17  # with 95% each, chance gives fewer one time in a hundred


def test_a_little_noise_is_found_at_once():
    labels = torch.zeros(80, dtype=torch.long)
    right, _ = c2st(read(blobs(80, 0, 0.0)), read(blobs(80, 1, 0.01)), labels)
    assert right.double().mean() > 0.95


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (32, 3), (24, 16), (75, 2), (128, 1)])
def test_images_of_any_size_and_channels_are_compared(size, channels):
    labels = torch.zeros(24, dtype=torch.long)
    a, b = (blobs(24, i, 0.2 * i, size, channels) for i in range(2))
    right, _ = c2st(read(a), read(b), labels)
    assert right.double().mean() > 0.9


def test_a_channel_without_light_is_no_error():
    dark = torch.cat([blobs(20, 0, size=16), torch.zeros(20, 1, 16, 16)], 1)
    assert c2st(read(dark), read(dark.flip(0)), torch.zeros(20, dtype=torch.long))[0].shape == (20,)


def test_the_answer_is_by_class_and_reproducible():
    labels = torch.arange(2).repeat_interleave(60)
    a, b = blobs(120, 0), blobs(120, 1)
    b[60:] = b[60:] * 0.5  # only the second class differs
    right, of_class = c2st(read(a), read(b), labels, seed=1)
    assert len(right) == 120
    assert right[of_class == 1].double().mean() > 0.95
    assert right[of_class == 0].double().mean() < 0.75
    again, _ = c2st(read(a), read(b), labels, seed=1)
    assert torch.equal(right, again)


def test_it_learns_from_fresh_noise_and_is_tested_on_the_noise_of_each_image():
    images, asked = blobs(40, 0, size=16), []

    def read_noisy(index, random):
        asked.append((len(index), random is not None))
        return images[index]

    c2st(read_noisy, read(blobs(40, 1, size=16)), torch.zeros(40, dtype=torch.long))
    assert asked[0] == (256, False)  # examples
    assert all(fresh for _, fresh in asked[1:-1])
    assert asked[-1] == (20, False)  # the held-out half
