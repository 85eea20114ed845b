"""Shows that every metric catches the failure it exists for: scores generators that are broken in known ways.

    python evaluate/check_metrics.py

Makes the broken images in OUTPUT_DIR from those of DATA_DIR, scores them like generated ones and prints a table.
Unchanged real images must stay at the floor everywhere.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import settings
from dataset import NpyDataset, load_parts, some_of_each_class
from files import claim
from metrics.report import with_deviation
from metrics.score import Reference, apart, check_match, fewest, subsets_of, titles_of
from models.classifier import default_classifier, load_classifier
from settings import Count, InputError, Positive, Splits, Whole
from simulate.instrument import INSTRUMENTS, observers_of

DATA_DIR: str = "data"  # Folder with a folder of images for each class
OUTPUT_DIR: str = "metric_check"  # Where the broken images go
CLASSIFIER_PATH: str | None = None  # Gives the lens features; None takes the one trained here, or else the repository's
INSTRUMENT: Literal[(None, *INSTRUMENTS)] = None  # Looks at noise-free images, real and broken, with this telescope
PEAK: Positive | None = None  # Counts per second of the brightest pixel, for INSTRUMENT; None takes it from the files
CACHE_DIR: str | None = None  # Where packed images are kept; None means their own folder, if it can be written to
IMAGES_PER_CLASS: Count = 1000  # To be scored; at most half of the test images and all validation images of a class
NUM_SPLITS: Splits = 10  # Random halves of the real images, for floors and their standard deviation
SEED: Whole = 0  # Of the splits and of what is done to the images
DEVICE: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto" takes the GPU when there is one

# Broken generator -> how it changes the validation images (n, c, s, s) of a class
_BROKEN: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "real": lambda images, rng: images,
    "one_image": lambda images, rng: np.repeat(images[:1], len(images), axis=0),
    "blurred": lambda images, rng: gaussian_filter(images, (0, 0, 1, 1)),
    "rotated": lambda images, rng: np.rot90(images, axes=(2, 3)),
    "garbage": lambda images, rng: np.where(
        (np.arange(len(images)) % 20 == 0)[:, None, None, None], rng.random(images.shape), images
    ),
}
# Two more, not made by such a function: copies of training images, and images that are given to another class
_COPIES, _SWAPPED = "copies", "swapped"
_MARKER = "made_here.txt"  # marks OUTPUT_DIR, so that a folder that was not made here is never written to


def main() -> None:
    claim(OUTPUT_DIR, _MARKER)
    train, val, test = load_parts(DATA_DIR, "train", "val", "test", cache_dir=CACHE_DIR)
    count = min(IMAGES_PER_CLASS, fewest(test) // 2, fewest(val), fewest(train))
    if count < 3:
        raise InputError(f"{DATA_DIR}: too few images of a class; add images")
    path = CLASSIFIER_PATH or default_classifier(INSTRUMENT)
    classifier = load_classifier(path, settings.pick_device(DEVICE))
    check_match(test, {path: classifier})
    of_test, of_train, of_broken = observers_of(test, INSTRUMENT, PEAK, SEED, 3)
    reference = Reference(test.observed(of_test), train.observed(of_train), count, classifier, seed=SEED)
    folders = write_broken(Path(OUTPUT_DIR), train, val, count, SEED)
    found = {
        name: reference.score(name, NpyDataset(folder).observed(of_broken), NUM_SPLITS, SEED).metrics
        for name, folder in tqdm(folders.items(), "broken generators", leave=False)
    }
    print(f"\n{count} images a class, {NUM_SPLITS} splits; bold: chance puts one in a thousand so far from the floor\n")
    for subset in subsets_of(test):
        print(f"| {subset} | floor | {' | '.join(found)} |\n|---|---|{'---|' * len(found)}")
        for name, title in titles_of(test).items():
            cells = [metrics[name][subset] for metrics in found.values()]
            if cells[0]["value"] is not None:
                row = [with_deviation(name, cell, "value") for cell in cells]
                row = [f"**{text}**" if apart(c, NUM_SPLITS) else text for text, c in zip(row, cells, strict=True)]
                print(f"| {title} | {with_deviation(name, cells[0], 'floor')} | {' | '.join(row)} |")
        print()


def write_broken(output: Path, train: NpyDataset, val: NpyDataset, count: int, seed: int) -> dict[str, Path]:
    """Writes a folder of images for each broken generator; returns the folders."""
    rng = np.random.default_rng(seed)
    real, of_train = (
        dataset.read(some_of_each_class(dataset.labels, n, seed)).unflatten(0, (len(dataset.classes), -1)).numpy()
        for dataset, n in ((val, count), (train, fewest(train)))
    )
    sets = {name: np.stack([change(images, rng) for images in real]) for name, change in _BROKEN.items()}
    sets[_COPIES] = np.stack([rng.choice(images, count, replace=False) for images in of_train])
    sets[_SWAPPED] = np.roll(real, 1, axis=0)
    for name, images in sets.items():
        shutil.rmtree(output / name, ignore_errors=True)
        for label, of_class in zip(val.classes, images, strict=True):
            (output / name / label).mkdir(parents=True)
            for i, image in enumerate(of_class):
                np.save(output / name / label / f"{i}.npy", image.astype(np.float32))
    return {name: output / name for name in sets}


if __name__ == "__main__":
    settings.run(main, globals())
