"""Generated images teach as much as real ones if they are good, and the contrary if their classes are swapped."""

from types import SimpleNamespace

import pytest
import torch

from metrics import usefulness
from metrics.measure import Sample
from metrics.usefulness import Usefulness, _joined


class Bars:
    """Noisy images of a bar, horizontal in class "a" and vertical in class "b"."""

    classes, root_dir = ("a", "b"), "bars"

    def __init__(self, n, seed, swapped=False):
        random = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(2).repeat_interleave(n)
        self.images = 0.3 * torch.rand(2 * n, 1, 16, 16, generator=random)
        for k, place in enumerate(torch.randint(2, 14, (2 * n,), generator=random).tolist()):
            across = bool(self.labels[k]) == swapped
            self.images[k, 0][(place, slice(None)) if across else (slice(None), place)] += 0.7
        self.images /= self.images.amax((1, 2, 3), keepdim=True)

    def counts(self):
        return dict(zip(self.classes, torch.bincount(self.labels).tolist(), strict=True))

    def read(self, index, random=None):
        return self.images[index]


def sample(data):
    index = torch.arange(len(data.labels))
    return Sample("bars", data, index, {"label": data.labels}, SimpleNamespace())


@pytest.fixture(scope="module")
def scores():
    """Values and floors of good and of swapped images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(usefulness, "_STEPS", 120)
        patch.setattr(usefulness, "FEW", (5, 20, 300))
        patch.setattr(usefulness, "SEEDS", 3)
        useful = Usefulness(Bars(300, 0), sample(Bars(100, 1)), 200)
        return {swapped: useful.score(sample(Bars(150, 2, swapped))) for swapped in (False, True)}


def test_good_images_teach_as_much_as_real_ones(scores):
    values, floors = scores[False]
    assert len(values) == len(floors) == 3
    for value, floor in zip(values, floors, strict=True):
        assert value.keys() == {"overall", "a", "b"}
        assert value["overall"]["learned"] > 0.9
        assert value["overall"]["learned"] == pytest.approx(floor["overall"]["learned"], abs=0.06)
        of_classes = [value[name]["learned"] for name in ("a", "b")]
        assert value["overall"]["learned"] == pytest.approx(sum(of_classes) / 2)


def test_they_add_most_to_the_fewest(scores):
    values, floors = scores[False]
    assert values[0]["overall"].keys() == {"learned", "gain_5", "gain_20"}  # there are no 300 beside 200
    mean = {few: sum(v["overall"][f"gain_{few}"] for v in values) / 3 for few in (5, 20)}
    assert mean[5] > 0.1
    assert mean[5] > mean[20] - 0.02
    for value, floor in zip(values, floors, strict=True):  # both are over the same accuracy without them
        difference = floor["overall"]["learned"] - floor["overall"]["gain_5"]
        assert 0.3 < difference < 0.95
        assert value["overall"]["gain_5"] + difference <= 1


def test_swapped_classes_teach_the_contrary(scores):
    values, _ = scores[True]
    assert all(value["overall"]["learned"] < 0.1 for value in values)
    assert all(value["overall"]["gain_20"] < -0.2 for value in values)


def test_one_class_has_nothing_to_learn():
    one = Bars(20, 0)
    one.classes, one.labels = ("a",), torch.zeros(40, dtype=torch.long)
    assert Usefulness(one, sample(one), 20).score(sample(one)) == ([], [])


def test_two_sets_are_one():
    first, second = torch.arange(5.0), torch.arange(10.0, 14)
    read = _joined(lambda i, _: first[i], 5, lambda i, _: second[i])
    assert read(torch.tensor([1, 4, 5, 8]), None).tolist() == [1, 4, 10, 13]
    assert read(torch.tensor([0]), None).tolist() == [0]
