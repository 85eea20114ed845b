"""Generates lenses and compares them with the test images of DATA_DIR, beside what real images reach.

    python evaluate/evaluate_fld.py

Writes GENERATED_DIR/{axion,cdm,no_sub}/{i}.npy and a picture of real above generated lenses, and prints a table. In a
notebook: ``from evaluate.evaluate_fld import load_model, generate_image``.
"""

import re
import socket
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plots
import settings
from dataset import CLASSES, NpyDataset, normalize
from models import flow
from models.checkpoint import build_generator, load_checkpoint
from models.classifier import classify, load_classifier
from models.model import NanoDiT
from settings import InputError

DATA_DIR = "data"  # Folder with axion/, cdm/ and no_sub/; only its test images are used
GENERATED_DIR = "generated_npy"  # Where the generated images go; those of an earlier run there are replaced
FIGURE_PATH = "generated_npy/lenses.png"  # Picture of real and generated lenses
CHECKPOINT_PATH = "diffusion_training/dit_conditional_ckpts/dit_conditional_final.pt"  # The generator
CLASSIFIER_PATH = "classifier_training_resnet18/classifier_ckpts/resnet18_best.pt"  # Gives the lens features
INCEPTION_WEIGHTS_PATH = None  # File of its weights, for a machine without network
ON_BAD_FILE: Literal["raise", "skip"] = "raise"  # "skip" goes on without the files that cannot be read
IMAGES_PER_CLASS = 1000  # As many as half of the test images of a class if these are fewer
NUM_ODE_STEPS = 50  # Euler steps from noise to image
CFG_SCALE = 5.0  # Guidance scale; 1 is no guidance
BATCH_SIZE = 128  # Images at once; reduce when memory runs out
SEED = 0  # Image k of a seed is always the same
DEVICE: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto" takes the GPU when there is one


def main() -> None:
    device = settings.pick_device(DEVICE)
    real = NpyDataset(DATA_DIR, None, "test", ON_BAD_FILE)
    model = load_model(CHECKPOINT_PATH, DEVICE)
    classifier = load_classifier(CLASSIFIER_PATH, device)
    halves = split_in_halves(real.labels, IMAGES_PER_CLASS)
    count = len(halves[0]) // len(CLASSES)
    labels = torch.arange(len(CLASSES)).repeat_interleave(count)
    print(f"Generating {count} images of each class in {NUM_ODE_STEPS} steps, guidance {CFG_SCALE:g}, on {device}")
    generated = generate(model, labels, NUM_ODE_STEPS, CFG_SCALE, SEED, BATCH_SIZE)
    write_images(Path(GENERATED_DIR), generated, labels)

    sets = [real.images[halves[0]], real.images[halves[1]], normalize(generated)]  # all with their classes in one order
    judged = [classify(classifier, images) for images in sets]
    table = frechet_rows("Fréchet distance, lens features", [features for _, features in judged], labels)
    inception = load_inception(device)
    if inception is not None:
        table |= frechet_rows("FID, Inception", [inception_features(inception, images) for images in sets], labels)
    called = [probabilities.argmax(1) for probabilities, _ in judged]
    table["Classifier accuracy, real"] = by_class(torch.cat(called[:2]) == labels.repeat(2), labels.repeat(2))
    table["Classifier accuracy, generated"] = by_class(called[2] == labels, labels)
    print_table(table, count)
    write_figure(FIGURE_PATH, sets[0], sets[2], labels, table)
    print(f"Pictures: {FIGURE_PATH}, images: {GENERATED_DIR}/")


def load_model(path: str | Path, device: str = "auto") -> NanoDiT:
    """The generator of a checkpoint with its EMA weights, ready to generate.

    Args:
        path: a checkpoint of train/train_diffusion.py or of the published code.
        device: "auto", "cpu", "cuda" or "mps".

    Raises:
        InputError: for a file that is not a checkpoint of this network.
    """
    content = load_checkpoint(path)
    model = build_generator(content, path).to(settings.pick_device(device))
    print(f"Model loaded from {path}, epoch {content.get('epoch', 'unknown')}")
    return model


def generate_image(
    model: NanoDiT,
    target_class: int,
    ode_steps: int = 100,
    cfg_scale: float | None = 5.0,
    num_samples: int = 1,
    seed: int = 0,
) -> Tensor:
    """Generates lenses of one class.

    Args:
        target_class: 0 axion, 1 cdm, 2 no_sub.
        ode_steps: Euler steps; more are better and slower.
        cfg_scale: guidance scale; higher is truer to the class and less diverse, 1 or None is no guidance.
        num_samples: number of images.
        seed: another seed gives other images; image k of a seed is always the same.

    Returns:
        (num_samples, 1, 64, 64) float32 in [0, 1], on the CPU.
    """
    if target_class not in range(model.num_classes):
        raise InputError(
            f"target_class {target_class!r} is not one of 0 to {model.num_classes - 1}: {', '.join(CLASSES)}"
        )
    return generate(model, torch.full((num_samples,), target_class), ode_steps, cfg_scale, seed)


def generate(
    model: NanoDiT, labels: Tensor, ode_steps: int, cfg_scale: float | None, seed: int, batch_size: int = 128
) -> Tensor:
    """One lens for each label, (n, 1, 64, 64) float32 in [0, 1], on the CPU."""
    labels = labels.to(model.pos_embed.device)
    images = flow.sample(model, labels, model.image_shape, model.num_classes, ode_steps, cfg_scale, seed, batch_size)
    return flow.to_unit_range(images).cpu()


def split_in_halves(labels: Tensor, at_most: int) -> tuple[Tensor, Tensor]:
    """Indices of two disjoint sets of real images, each with equally many of every class, class by class."""
    of_class = [torch.nonzero(labels == label).flatten() for label in range(len(CLASSES))]
    count = min(at_most, min(map(len, of_class)) // 2)
    if count < 2:
        raise InputError(f"{DATA_DIR}: the test part has fewer than 4 images of a class; add images")
    return torch.cat([i[:count] for i in of_class]), torch.cat([i[count : 2 * count] for i in of_class])


def write_images(folder: Path, images: Tensor, labels: Tensor) -> None:
    """Writes {class}/{i}.npy, (64, 64) float32 in [0, 1]; removes the numbered files of an earlier run."""
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for old in (folder / name).glob("*.npy"):
            if re.fullmatch(r"\d+", old.stem):
                old.unlink()
        for i, image in enumerate(images[labels == label]):
            np.save(folder / name / f"{i}.npy", image[0].numpy())


def frechet_rows(name: str, features: list[Tensor], labels: Tensor) -> dict[str, list[float]]:
    """Rows of the table: generated against real, the floor of one half of the real images against the other, the ratio.

    Args:
        features: (n, d) of the first half of the real images, of the second and of the generated ones.
    """
    first, second, generated = features
    rows = {name: [], "  floor: real against real": [], "  ratio to the floor": []}
    for label in (None, *range(len(CLASSES))):
        keep = slice(None) if label is None else labels == label
        distance = (
            frechet_distance(first[keep], generated[keep]) + frechet_distance(second[keep], generated[keep])
        ) / 2
        floor = frechet_distance(first[keep], second[keep])
        ratio = distance / floor if floor else float("inf")
        for row, value in zip(rows.values(), (distance, floor, ratio), strict=True):
            row.append(value)
    return {row if row == name else f"{row} ({name.split(', ')[1]})": values for row, values in rows.items()}


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to features (n, d) and (m, d) (Heusel et al. 2017, arXiv:1706.08500)."""
    identity = nn.Identity()
    identity.num_features = a.shape[1]
    metric = FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
    metric.update(a.double(), real=True)
    metric.update(b.double(), real=False)
    return max(metric.compute().item(), 0.0)  # rounding can leave equal sets a little below zero


def load_inception(device: torch.device) -> NoTrainInceptionV3 | None:
    """The network of the usual FID; None, with a line on how to get it, when its weights are not to be had."""
    path = INCEPTION_WEIGHTS_PATH
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        if path:
            torch.load(path, weights_only=True)  # first: torch-fidelity would run whatever code is in the file
        else:
            torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, check_hash=True, weights_only=True)
        return NoTrainInceptionV3("inception-v3-compat", ["2048"], path).to(device)
    except Exception:
        if path:
            raise InputError(f"--inception_weights_path {path}: no file with weights of that network") from None
        print(
            "FID with Inception is left out: its weights cannot be fetched; --inception_weights_path takes the file "
            f"{URL_INCEPTION_V3}"
        )
        return None
    finally:
        socket.setdefaulttimeout(timeout)


@torch.inference_mode()
def inception_features(inception: NoTrainInceptionV3, images: Tensor) -> Tensor:
    """Features (n, 2048) of images (n, 1, 64, 64) in [0, 1], which the network sees in 256 levels of grey."""
    device = next(inception.parameters()).device
    batches = tqdm(images.split(BATCH_SIZE), "Inception features", unit="batch", leave=False)
    return torch.cat([inception((255 * x).byte().expand(-1, 3, -1, -1).to(device)).cpu() for x in batches])


def by_class(correct: Tensor, labels: Tensor) -> list[float]:
    """Share of True, overall and for each class."""
    parts = [correct] + [correct[labels == label] for label in range(len(CLASSES))]
    return [part.double().mean().item() for part in parts]


def print_table(table: dict[str, list[float]], count: int) -> None:
    width = max(map(len, table))
    print(f"\n{f'{count} images a class':{width}}" + "".join(f"{name:>11}" for name in ("overall", *CLASSES)))
    for row, values in table.items():
        form = "{:>11.1%}" if "accuracy" in row else "{:>11.4g}"
        print(f"{row:{width}}" + "".join(form.format(value) for value in values))
    print()


def write_figure(path: str, real: Tensor, generated: Tensor, labels: Tensor, table: dict[str, list[float]]) -> None:
    """A row of real and a row of generated lenses for each class, with the class's scores beside them."""
    rows = {}
    for label, name in enumerate(CLASSES):
        ratio = table["  ratio to the floor (lens features)"][label + 1]
        accuracy = table["Classifier accuracy, generated"][label + 1]
        rows[f"{name}\nreal"] = real[labels == label][:8].numpy()
        scores = f"Fréchet {ratio:.1f} x floor\nclassifier {accuracy:.0%}"
        rows[f"{name}\ngenerated\n{scores}"] = generated[labels == label][:8].numpy()
    plots.save(plots.image_grid(rows), path)


if __name__ == "__main__":
    settings.run(main, globals())
