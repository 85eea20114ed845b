"""Fréchet distance of many sets of generated images to the test images of a folder, over its floor."""

import numpy as np
from torch import Tensor, nn

from dataset import NpyDataset, normalize, some_of_each_class
from metrics.distances import frechet_distance
from metrics.score import half_size, halves, masks, ratio
from models.classifier import classify


class LensDistance:
    """Distances in the features of a lens classifier, as evaluate_fld.py computes them.

    Args:
        test: the real images.
        classifier: gives the features.
        images_per_class: images in a distance; at most half of the test images of a class.
        splits: number of random splits of the test images into halves.

    Attributes:
        labels: of the images that ``over_floor`` takes, class by class, (n,).

    Raises:
        InputError: for fewer than 3 images of a class in a half.
    """

    def __init__(self, test: NpyDataset, classifier: nn.Module, images_per_class: int, splits: int = 4):
        count = half_size(test, images_per_class)
        index = some_of_each_class(test.labels, 2 * count)
        features, labels = classify(classifier, test.read(index))[1], test.labels[index]
        pairs = [halves(labels, count, seed) for seed in range(splits)]
        self.labels = labels[pairs[0][0]]  # the same in every half
        self.classifier = classifier
        self.masks = masks(self.labels, test.classes)
        self.real = [features[a] for a, _ in pairs]
        self.floor = self._distances([features[b] for _, b in pairs])

    def over_floor(self, images: Tensor) -> dict[str, float]:
        """Ratios for images (n, c, h, w) of ``labels``: "overall" and each class."""
        features = classify(self.classifier, normalize(images), show_progress=False)[1]
        found = self._distances([features] * len(self.real))
        return {subset: ratio(found[subset], self.floor[subset]) for subset in found}

    def _distances(self, others: list[Tensor]) -> dict[str, float]:
        """Mean over the splits of the distances to the features of ``others``, one set for each split."""
        found = {}
        for subset, here in self.masks.items():
            pairs = zip(self.real, others, strict=True)
            found[subset] = float(np.mean([frechet_distance(a[here], b[here]) for a, b in pairs]))
        return found
