"""Only the orientations of a symmetry are drawn, each equally often; without a symmetry, nothing is drawn."""

import numpy as np
import pytest
import torch

from models import flow
from train.orientations import SYMMETRIES, draw_orientations, oriented, some_of_all, turned

IMAGE = torch.arange(9.0).view(1, 1, 3, 3)
EXPECTED = {  # computed by NumPy, for an image whose pixels all differ
    "none": [lambda x: x],
    "half_turn": [lambda x: x, lambda x: x[::-1, ::-1]],
    "flips": [lambda x: x, lambda x: x[::-1, ::-1], np.fliplr, np.flipud],
    "square": [lambda x, k=k: np.rot90(x, k) for k in range(4)] + [lambda x, k=k: np.rot90(x.T, k) for k in range(4)],
}


def as_tuples(images) -> set:
    return {tuple(np.asarray(image).ravel().tolist()) for image in images}


@pytest.mark.parametrize("symmetry", EXPECTED)
def test_the_orientations_are_those_of_the_symmetry(symmetry):
    expected = as_tuples(way(IMAGE[0, 0].numpy()) for way in EXPECTED[symmetry])
    assert as_tuples(turned(IMAGE, *way) for way in SYMMETRIES[symmetry]) == expected
    assert len(expected) == len(SYMMETRIES[symmetry])
    random = flow.generator_of(0, 0)
    ways = draw_orientations(symmetry, 4000, random)
    images = oriented(IMAGE.expand(4000, 2, 3, 3), ways, symmetry)
    assert images.shape == (4000, 2, 3, 3)
    assert as_tuples(images[:, 0]) == expected
    assert torch.equal(images[:, 0], images[:, 1])  # all channels are turned together
    counts = torch.bincount(ways)
    assert counts.min() > 0.8 * 4000 / len(expected)


def test_without_a_symmetry_the_random_stream_is_left_alone():
    random, other = flow.generator_of(0, 1), flow.generator_of(0, 1)
    assert draw_orientations("none", 5, random).eq(0).all()
    assert torch.equal(torch.rand(3, generator=random), torch.rand(3, generator=other))


def test_a_subset_is_of_all_images_in_all_orientations():
    images = torch.stack([IMAGE[0] + 10 * i for i in range(50)])
    some = some_of_all(images, "square", 10**6)
    assert len(as_tuples(some)) == len(some) == 400
    few = some_of_all(images, "square", 100)
    assert len(as_tuples(few)) == len(few) == 100
    assert as_tuples(few) <= as_tuples(some)
    pairs = [{int(image.min()) // 10 for image in pair} for pair in few.split(2)]  # neighbours show the same image
    assert sorted(next(iter(numbers)) for numbers in pairs) == list(range(50))
    assert all(len(numbers) == 1 for numbers in pairs)
    assert torch.equal(
        some_of_all(images, "none", 20), images[torch.randperm(50, generator=torch.Generator().manual_seed(0))[:20]]
    )
