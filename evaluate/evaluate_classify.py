"""Says which dark matter a lens image shows, by the trained classifier.

    python evaluate/evaluate_classify.py --npy_path generated_npy/axion/0.npy
    python evaluate/evaluate_classify.py --npy_path generated_npy          # a folder: a table and the accuracy

The images may be of any range; each is scaled to [0, 1] first, as in training.
"""

import sys
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import settings
from dataset import CLASSES, is_image_file, read_image
from models.classifier import classify, load_classifier
from settings import InputError

NPY_PATH: str | None = None  # An image, or a folder of images; those in folders named axion, cdm and no_sub are scored
MODEL_PATH: str = settings.first_there(  # The classifier: the one trained here, or else the one of the repository
    "classifier_training_resnet18/classifier_ckpts/resnet18_best.pt", "weights/resnet18_sharp.safetensors"
)
ON_BAD_FILE: Literal["raise", "skip"] = "raise"  # "skip" goes on without the files that cannot be read
DEVICE: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto" takes the GPU when there is one


def main() -> None:
    model = load_classifier(MODEL_PATH, settings.pick_device(DEVICE))
    path = Path(NPY_PATH)
    if not path.is_dir():
        probabilities, _ = classify(model, torch.from_numpy(read_image(path)[0])[None])
        confidence, index = probabilities[0].max(0)
        print(f"Predicted Class: '{CLASSES[index]}' (Index: {index})")
        print(f"Confidence: {confidence:.4f}")
        return
    found = (file for file in path.rglob("*.npy") if is_image_file(file.name))
    files = sorted(found, key=lambda file: (file.parent, len(file.name), file.name))
    if not files:
        raise InputError(f"{path}: no .npy files in it")
    images, problems = {}, []
    for file in files:
        try:
            images[str(file.relative_to(path))] = torch.from_numpy(read_image(file)[0])
        except InputError as error:
            problems.append(str(error))
    if problems and (ON_BAD_FILE == "raise" or not images):
        raise InputError("\n".join(problems))
    for problem in problems:
        print(f"{problem}: skipped")
    confidences, indices = classify(model, torch.stack(list(images.values())))[0].max(1)
    print_table(path.resolve().name, list(images), indices.tolist(), confidences.tolist())


def print_table(top: str, files: list[str], indices: list[int], confidences: list[float]) -> None:
    """A line for each file, then the accuracy of each class: that of the folder, ``top`` at most, that has its name."""
    width = max(map(len, files))
    print(f"{'file':{width}}  {'predicted':9}  confidence")
    for file, index, confidence in zip(files, indices, confidences, strict=True):
        print(f"{file:{width}}  {CLASSES[index]:9}  {confidence:.4f}")
    true = [next((part for part in reversed((top, *Path(file).parts[:-1])) if part in CLASSES), None) for file in files]
    for name in CLASSES:
        of_class = [CLASSES[index] == name for index, of_file in zip(indices, true, strict=True) if of_file == name]
        if of_class:
            print(f"Accuracy on {name}: {sum(of_class) / len(of_class):.2%} of {len(of_class)}")


if __name__ == "__main__":
    settings.run(main, globals(), required=("NPY_PATH",))
