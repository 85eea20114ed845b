"""Says which dark matter a lens image shows, by the trained classifier.

    python evaluate/evaluate_classify.py --npy_path generated_npy/axion/0.npy
    python evaluate/evaluate_classify.py --npy_path generated_npy          # a folder: a table and the accuracy

The images may be of any range; each is scaled to [0, 1] first, as in training.
"""

import sys
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import settings
from dataset import is_image_file, read_image
from models.classifier import classify, load_classifier
from settings import InputError

NPY_PATH: str | None = None  # An image, or a folder of images; those in folders with the names of classes are scored
MODEL_PATH: str = settings.first_there(  # The classifier: the one trained here, or else the one of the repository
    "classifier_training_resnet18/classifier_ckpts/resnet18_best.pt", "weights/resnet18_sharp.safetensors"
)
ON_BAD_FILE: Literal["raise", "skip"] = "raise"  # "skip" goes on without the files that cannot be read
DEVICE: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto" takes the GPU when there is one


def main() -> None:
    model = load_classifier(MODEL_PATH, settings.pick_device(DEVICE))
    path = Path(NPY_PATH)
    if not path.is_dir():
        probabilities, _ = classify(model, read(path, model)[None])
        confidence, index = probabilities[0].max(0)
        print(f"Predicted Class: '{model.classes[index]}' (Index: {index})")
        print(f"Confidence: {confidence:.4f}")
        return
    found = (file for file in path.rglob("*.npy") if is_image_file(file.name))
    files = sorted(found, key=lambda file: (file.parent, len(file.name), file.name))
    if not files:
        raise InputError(f"{path}: no .npy files in it")
    images, problems = {}, []
    for file in files:
        try:
            images[str(file.relative_to(path))] = read(file, model)
        except InputError as error:
            problems.append(str(error))
    if problems and (ON_BAD_FILE == "raise" or not images):
        raise InputError("\n".join(problems))
    for problem in problems:
        print(f"{problem}: skipped")
    found = {}
    for shape in {image.shape for image in images.values()}:  # the classifier resizes all of one size at once
        names = [name for name, image in images.items() if image.shape == shape]
        found |= dict(zip(names, classify(model, torch.stack([images[name] for name in names]))[0], strict=True))
    confidences, indices = torch.stack([found[name] for name in images]).max(1)
    called = [model.classes[index] for index in indices]
    print_table(path.resolve().name, list(images), called, confidences.tolist(), model.classes)


def read(path: Path, model: nn.Module) -> Tensor:
    """One image, (c, s, s), of the classifier's channels; InputError for any other."""
    image = torch.from_numpy(read_image(path)[0])
    if len(image) != model.channels:
        raise InputError(f"{path}: has {len(image)} channels, but {MODEL_PATH} takes {model.channels}")
    return image


def print_table(
    top: str, files: list[str], called: list[str], confidences: list[float], classes: tuple[str, ...]
) -> None:
    """A line for each file, then the accuracy of each class: that of the folder, ``top`` at most, that has its name."""
    width, column = max(map(len, files)), max(map(len, ("predicted", *classes)))
    print(f"{'file':{width}}  {'predicted':{column}}  confidence")
    for file, name, confidence in zip(files, called, confidences, strict=True):
        print(f"{file:{width}}  {name:{column}}  {confidence:.4f}")
    true = [next((part for part in reversed((top, *Path(file).parts[:-1])) if part in classes), None) for file in files]
    for of in classes:
        right = [name == of for name, of_file in zip(called, true, strict=True) if of_file == of]
        if right:
            print(f"Accuracy on {of}: {sum(right) / len(right):.2%} of {len(right)}")


if __name__ == "__main__":
    settings.run(main, globals(), required=("NPY_PATH",))
