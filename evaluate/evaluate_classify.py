"""Names the class of a lens image, that is, which dark matter it shows, by the trained classifier.

    python evaluate/evaluate_classify.py --npy_path generated_npy/axion/0.npy
    python evaluate/evaluate_classify.py --npy_path generated_npy          # a folder: a table and the accuracy

A third line, or for a folder a column, says which images are unlike those that the classifier was trained on, and how.
Images may have any range; each is scaled to [0, 1] first, as in training. A file may be of any kind that training
takes; the images of a stack are called name.npy#0, name.npy#1, ...
"""

import os
import sys
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import settings
from dataset import read_entries
from image_files import KINDS, LensImage, is_image_file, is_table, stem_of
from layouts import read_labels
from models.classifier import classify, load_classifier, unlikeness
from settings import InputError

NPY_PATH: str | None = None  # An image, or a folder of images; accuracy is over those in folders named after classes
MODEL_PATH: str = settings.first_there(  # The classifier: the one trained here, or else the one of the repository
    "classifier_training_resnet18/classifier_ckpts/resnet18_best.pt", "weights/resnet18_observed.safetensors"
)
ON_BAD_FILE: Literal["raise", "skip"] = "raise"  # "skip" goes on without the files that cannot be read
DEVICE: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto" takes the GPU when there is one


def main() -> None:
    model = load_classifier(MODEL_PATH, settings.pick_device(DEVICE))
    path = Path(NPY_PATH)
    files = find_files(path) if path.is_dir() else [path]
    images, true, problems = {}, {}, []
    for file in files:
        for end, of, image in read_entries(file):
            try:
                name = f"{file.relative_to(path) if path.is_dir() else file.name}{end}"
                images[name] = checked(image, f"{file}{end}", model)
                true[name] = of or true_class(path, file, bool(end), model.classes)
            except InputError as error:
                problems.append(str(error))
    if problems and (ON_BAD_FILE == "raise" or not images):
        raise InputError("\n".join(problems) + ("\n--on_bad_file skip goes on without them" if images else ""))
    for problem in problems:
        print(f"{problem}: skipped")
    found = {}
    for shape in {image.shape for image in images.values()}:  # the classifier resizes all of one size at once
        names = [name for name, image in images.items() if image.shape == shape]
        probabilities, features = classify(model, torch.stack([images[name] for name in names]))
        kinds = unlikeness(model, features, shape[-1])
        found |= dict(zip(names, zip(probabilities, kinds, strict=True), strict=True))
    if list(images) == [path.name] and not path.is_dir():
        probabilities, kind = found[path.name]
        confidence, index = probabilities.max(0)
        print(f"Predicted Class: '{model.classes[index]}' (Index: {index})")
        print(f"Confidence: {confidence:.4f}")
        if kind:
            print(f"Unlike the images that this classifier was trained on ({kind}): do not trust it here")
        return
    confidences, indices = torch.stack([found[name][0] for name in images]).max(1)
    called = [model.classes[index] for index in indices]
    kinds = [found[name][1] for name in images] if model.calibration else None
    print_table(true, called, confidences.tolist(), model.classes, kinds)


def find_files(folder: Path) -> list[Path]:
    """Image files in a folder and its subfolders; InputError when there are none."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: {error.strerror}")

    there = (Path(top, name) for top, *inside in os.walk(folder, onerror=refuse) for name in chain(*inside))
    found = (path for path in there if is_image_file(path.name) and not is_table(path))
    files = sorted(found, key=lambda file: (file.parent, len(file.name), file.name))
    labels = {file.with_name("labels.npy") for file in files if read_labels(file) is not None}
    if not files:
        raise InputError(f"{folder}: no {KINDS} in it")
    return [file for file in files if file not in labels]


def checked(image: LensImage | InputError, name: str, model: nn.Module) -> Tensor:
    """An image (c, s, s) with as many channels as the classifier takes; InputError for any other."""
    if isinstance(image, InputError):
        raise image
    if len(image[0]) != model.channels:
        raise InputError(f"{name}: has {len(image[0])} channels, but {MODEL_PATH} takes {model.channels}")
    return torch.from_numpy(image[0])


def true_class(top: Path, file: Path, is_stack: bool, classes: tuple[str, ...]) -> str | None:
    """The class that names the nearest folder around a file, up to ``top``, or else the file of a stack; or None."""
    names = [*reversed(file.relative_to(top).parts[:-1]), top.resolve().name] if top.is_dir() else []
    if is_stack:
        names.append(stem_of(file.name))
    return next((name for name in names if name in classes), None)


def print_table(
    true: dict[str, str | None],
    called: list[str],
    confidences: list[float],
    classes: tuple[str, ...],
    kinds: list[str] | None,
) -> None:
    """Prints a line for each image, then the accuracy for each class, over the images whose true class is known.

    ``true`` has the class of each file, by name; ``kinds`` says how each image is unlike those of training, and is None
    if the classifier cannot tell.
    """
    width, column = max(map(len, true)), max(map(len, ("predicted", *classes)))
    print(f"{'file':{width}}  {'predicted':{column}}  confidence" + ("  unlike its training" if kinds else ""))
    for file, name, confidence, kind in zip(true, called, confidences, kinds or [""] * len(called), strict=True):
        print(f"{file:{width}}  {name:{column}}  {confidence:.4f}      {kind}".rstrip())
    for of in classes:
        right = [name == of for name, of_file in zip(called, true.values(), strict=True) if of_file == of]
        if right:
            print(f"Accuracy on {of}: {sum(right) / len(right):.2%} of {len(right)}")


if __name__ == "__main__":
    settings.run(main, globals(), required=("NPY_PATH",))
