"""Is a generator of use? Small classifiers learn from its images, and are tested on real ones.

Accuracy after learning from generated images alone is the classification accuracy score of Ravuri & Vinyals 2019
(arXiv:1905.10887).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import distributed
from dataset import NpyDataset, some_of_each_class
from metrics.measure import Sample, fewest, masks
from metrics.two_sample import Read, SmallNetwork, learned

FEW = (30, 100, 300)  # real images of a class that generated ones are added to
TITLES = {"learned": "Accuracy on real images, learned from generated"}
TITLES |= {f"gain_{few}": f"Gain by generated images beside {few} real a class" for few in FEW}
SEEDS = 3  # trainings of each kind
_STEPS, _BATCH_SIZE, _LEARNING_RATE = 300, 64, 4e-3


class Usefulness:
    """Accuracies of classifiers that learn from real images, from generated ones or from both.

    Args:
        train: real images to learn from.
        test: real images to be tested on.
        count: images of a class, at most, that a classifier learns from.
    """

    def __init__(self, train: NpyDataset, test: Sample, count: int):
        self.train, self.test = train, test
        self.most = min(count, fewest(train))
        few = [few for few in FEW if few < self.most]
        several = len(train.classes) > 1
        self.trainings = [(seed, n) for seed in range(SEEDS) for n in (self.most, *few)] if several else []
        self.real: dict[tuple[int, int], dict[str, float]] = {}  # accuracies without generated images, by training

    def score(self, sample: Sample) -> tuple[list[dict], list[dict]]:
        """The metrics of TITLES of a sample, and their floors, which are those of real images in its place.

        Returns:
            For each seed, subset -> metric -> value; and floors likewise. Both are empty for a single class.
        """
        with tqdm(total=len(self.trainings), desc=f"learning from {sample.name}", leave=False) as bar:

            def accuracies(training: tuple[int, int]) -> tuple[dict[str, float], dict[str, float]]:
                if training not in self.real:
                    self.real[training] = self._accuracy(*training)
                bar.update()
                return self._accuracy(*training, sample), self.real[training]

            found = dict(zip(self.trainings, distributed.spread(accuracies, self.trainings), strict=True))
        values, floors = [], []
        for seed in range(SEEDS if found else 0):
            generated, real = found[seed, self.most]
            values.append({subset: {"learned": generated[subset]} for subset in generated})
            floors.append({subset: {"learned": real[subset]} for subset in real})
            for few in (n for of_seed, n in found if of_seed == seed and n < self.most):
                both, alone = found[seed, few]
                for subset in both:
                    values[-1][subset][f"gain_{few}"] = both[subset] - alone[subset]
                    floors[-1][subset][f"gain_{few}"] = real[subset] - alone[subset]
        return values, floors

    def _accuracy(self, seed: int, n: int, sample: Sample | None = None) -> dict[str, float]:
        """Accuracy on the test images, overall and of each class, after learning from n real images of a class. A
        sample is added to these, or replaces them if n is ``self.most``."""
        index = some_of_each_class(self.train.labels, n, seed)
        labels = self.train.labels[index].cpu()

        def read(i: Tensor, random: torch.Generator | None) -> Tensor:
            return self.train.read(index[i], random)

        if sample is not None:
            read = sample.read if n == self.most else _joined(read, len(labels), sample.read)
            generated = sample.measured["label"]
            labels = generated if n == self.most else torch.cat([labels, generated])
        network = _learn(read, labels, seed)
        true = self.test.measured["label"]
        with torch.inference_mode():
            parts = torch.arange(len(true)).split(256)
            right = torch.cat([network(self.test.read(part)).argmax(1) == true[part] for part in parts])
        return {subset: right[mask].double().mean().item() for subset, mask in masks(true, self.train.classes).items()}


def _joined(first: Read, count: int, second: Read) -> Read:
    """Two sets of images as one, for sorted indices: ``count`` images, and behind them those of the second set."""

    def read(index: Tensor, random: torch.Generator | None) -> Tensor:
        of_first = index < count
        return torch.cat([first(index[of_first], random), second(index[~of_first] - count, random)])

    return read


def _learn(read: Read, labels: Tensor, seed: int) -> SmallNetwork:
    """A small classifier that has learned from images; observed ones have fresh noise each time."""
    random = torch.Generator().manual_seed(seed)
    epochs = math.ceil(_STEPS * _BATCH_SIZE / len(labels))
    order = torch.cat([torch.randperm(len(labels), generator=random) for _ in range(epochs)])
    batches = [batch.sort().values for batch in order.split(_BATCH_SIZE)[:_STEPS]]
    examples = torch.cat([read(batch, None) for batch in batches[:4]])

    def loss(network: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(network(read(batch, random)), labels[batch])

    return learned(int(labels.max()) + 1, examples, batches, loss, _LEARNING_RATE, seed)
