"""Generates lenses, or takes those of a folder, and scores them against the test images of DATA_DIR.

    python evaluate/evaluate_fld.py
    python evaluate/evaluate_fld.py --generated_dir D      # images {axion,cdm,no_sub}/*.npy of any other generator

Every figure stands beside its floor, the same figure of real images against real images. Writes
GENERATED_DIR/{axion,cdm,no_sub}/{i}.npy, a picture of real above generated lenses, REPORT_DIR/report.json and
REPORT_DIR/report.html, and prints a table. In a notebook:
``from evaluate.evaluate_fld import load_model, generate_image``.
"""

import json
import re
import socket
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as _URL_INCEPTION
from torchmetrics.image.fid import NoTrainInceptionV3
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distributed
import settings
from dataset import CLASSES, NpyDataset
from evaluate import report
from evaluate.figures import Reference, fewest, half_size
from files import save_array, whole
from models import flow
from models.checkpoint import build_generator, load_checkpoint
from models.classifier import load_classifier
from models.model import NanoDiT
from settings import InputError

DATA_DIR = "data"  # Folder with axion/, cdm/ and no_sub/: its test images are the reference
REAL_DIR = None  # Another such folder of real images, in its place
GENERATED_DIR = "generated_npy"  # Where generated images go; a folder of images made by something else is only scored
REPORT_DIR = "evaluation"  # Where report.html and report.json go
FIGURE_PATH = "evaluation/lenses.png"  # Picture of real and generated lenses
CHECKPOINT_PATH = settings.first_there(  # The generator: the one trained here, or else the one of the repository
    "diffusion_training/dit_conditional_ckpts/dit_conditional_final.pt", "weights/nanodit_s64.safetensors"
)
COMPARE_PATH = None  # A second checkpoint, or folder of images, to be scored in columns beside the first
CLASSIFIER_PATH = settings.first_there(  # Gives the lens features, likewise
    "classifier_training_resnet18/classifier_ckpts/resnet18_best.pt", "weights/resnet18_lens.safetensors"
)
INCEPTION_WEIGHTS_PATH = None  # File of its weights, for a machine without network
ON_BAD_FILE: Literal["raise", "skip"] = "raise"  # "skip" goes on without the files that cannot be read
IMAGES_PER_CLASS = 1000  # As many as half of the test images of a class if these are fewer
NUM_SPLITS = 10  # Random halves of the real images, for floors and their spread; more for a steadier spread
NUM_ODE_STEPS: int | None = None  # From noise to image; None takes as many as the checkpoint says
CFG_SCALE: float | None = None  # Guidance scale, 1 is no guidance; None takes that of the checkpoint
BATCH_SIZE = 128  # Images at once; reduce when memory runs out
SEED = 0  # Image k of a seed is always the same
DEVICE: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto" takes the GPU when there is one

_CLASS_STRIDE = 10**9  # images of a class are numbered from here, so that each starts from noise of its own
_MARKER = "generated_by.json"  # in a folder of images made here


def main() -> None:
    device = distributed.join(settings.pick_device(DEVICE))
    data = REAL_DIR or DATA_DIR
    with distributed.main_first():
        real, train = (NpyDataset(data, None, part, ON_BAD_FILE) for part in ("test", "train"))
    classifier = load_classifier(CLASSIFIER_PATH, device)
    print(f"Lens features of {CLASSIFIER_PATH}")
    count = half_size(real, IMAGES_PER_CLASS)
    if NUM_SPLITS < 2:
        raise InputError("--num_splits must be 2 or more: one split has no spread")
    for folder in (Path(REPORT_DIR), Path(FIGURE_PATH).parent):  # now, not after minutes of work
        folder.mkdir(parents=True, exist_ok=True)
    samples = [images_to_score(GENERATED_DIR, CHECKPOINT_PATH, count)]
    if COMPARE_PATH is not None:
        of_checkpoint = f"{GENERATED_DIR.rstrip('/')}_compared"
        other = (COMPARE_PATH, None) if Path(COMPARE_PATH).is_dir() else (of_checkpoint, COMPARE_PATH)
        samples.append(images_to_score(*other, count))
    count = min(count, *(fewest(dataset) for dataset, _ in samples))
    if count < 3:
        raise InputError("fewer than 3 images of a class to score; add images")
    with distributed.main_first():
        inception = load_inception(device)
    for space, features in {"lens": classifier.fc.in_features, "Inception": 2048 if inception else 0}.items():
        if count <= features:
            print(
                f"{count} images of a class are too few for the covariance of {features} features: Fréchet distances "
                f"in {space} features are too high, and mean something only beside their floor"
            )
    reference = Reference(real, train, count, classifier, inception, BATCH_SIZE)
    names = [dataset.root_dir.name for dataset, _ in samples]
    if len(set(names)) < len(names):
        names = [str(dataset.root_dir) for dataset, _ in samples]
    scored = []
    for name, (dataset, source) in zip(names, samples, strict=True):
        sample = reference.score(name, dataset, NUM_SPLITS, SEED)
        sample.source = source
        scored.append(sample)
        report.print_table(sample, count)
    if not distributed.is_main():
        return
    report.write_lenses(FIGURE_PATH, reference.sample, scored[0])
    report.write_json(Path(REPORT_DIR) / "report.json", settings.constants(globals()), scored, reference)
    report.write_html(Path(REPORT_DIR) / "report.html", settings.constants(globals()), scored, reference)
    print(f"Pictures: {FIGURE_PATH} and {Path(REPORT_DIR) / 'report.html'}, images: {samples[0][0].root_dir}/")


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
    ode_steps: int | None = None,
    cfg_scale: float | None = None,
    num_samples: int = 1,
    seed: int = 0,
) -> Tensor:
    """Generates lenses of one class.

    Args:
        target_class: 0 axion, 1 cdm, 2 no_sub.
        ode_steps: steps from noise to image, None for as many as the checkpoint says (50 for published ones).
        cfg_scale: guidance scale, None for that of the checkpoint (5 for published ones); higher is truer to the class
            and less diverse, 1 is no guidance.
        num_samples: number of images.
        seed: another seed gives other images; image k of a seed is always the same.

    Returns:
        (num_samples, 1, 64, 64) float32 in [0, 1], on the CPU.
    """
    if target_class not in range(model.num_classes):
        raise InputError(
            f"target_class {target_class!r} is not one of 0 to {model.num_classes - 1}: {', '.join(CLASSES)}"
        )
    return model.generate(torch.full((num_samples,), target_class), sampler_of(model, ode_steps, cfg_scale), seed)


def sampler_of(model: NanoDiT, ode_steps: int | None, cfg_scale: float | None) -> flow.Sampler:
    """The sampler of a network, with another guidance scale, or so many steps and no more, where they are given."""
    sampler = model.sampler if cfg_scale is None else replace(model.sampler, cfg_scale=cfg_scale)
    return sampler if ode_steps is None else replace(sampler, steps=ode_steps, tolerance=None)


def images_to_score(folder: str, checkpoint: str | None, count: int) -> tuple[NpyDataset, dict[str, Any]]:
    """The images of a folder, and where they come from; generates them unless something else made them."""
    folder, marker = Path(folder), Path(folder) / _MARKER
    if not marker.exists() and any(folder.glob("*/*.npy")):
        print(f"Scoring the images of {folder}, which were not made here: nothing is generated")
        with distributed.main_first():
            return NpyDataset(folder, None, "all", ON_BAD_FILE), {"folder": str(folder)}
    model = load_model(checkpoint, DEVICE)
    sampler = sampler_of(model, NUM_ODE_STEPS, CFG_SCALE)
    source = {
        "checkpoint": str(checkpoint),
        "sha256": report.sha256(checkpoint),
        "sampler": asdict(sampler),
        "seed": SEED,
    }
    generate_to_folder(model, folder, count, source)
    with distributed.main_first():
        return NpyDataset(folder, None, "all", ON_BAD_FILE), source


def generate_to_folder(model: NanoDiT, folder: Path, count: int, source: dict[str, Any]) -> None:
    """Writes {class}/{i}.npy, (64, 64) float32 in [0, 1], and how they were made; goes on where it was stopped.

    No two images start from the same noise, and image i of a class and seed is always the same. Images of another
    checkpoint or other settings in the folder are replaced.
    """
    marker = folder / _MARKER
    with distributed.main_first():
        if not marker.exists() or json.loads(marker.read_text()) != source:
            for old in folder.glob("*/*.npy"):
                if re.fullmatch(r"\d+", old.stem):
                    old.unlink()
            with whole(marker) as file:
                file.write(json.dumps(source, indent=1).encode())
    sampler = flow.Sampler(**source["sampler"])
    print(
        f"Generating {count} images of each class in {sampler.steps} {sampler.solver} steps, guidance "
        f"{sampler.cfg_scale:g}, on {model.pos_embed.device}"
    )
    batches = [(label, first) for label in range(len(CLASSES)) for first in range(0, count, BATCH_SIZE)]
    bar = tqdm(total=count * len(CLASSES) // distributed.size(), unit="image", desc="generating", leave=False)

    def generate_batch(batch: tuple[int, int]) -> None:
        label, first = batch
        paths = [folder / CLASSES[label] / f"{i}.npy" for i in range(first, min(first + BATCH_SIZE, count))]
        if not all(path.exists() for path in paths):
            labels = torch.full((len(paths),), label)
            number = label * _CLASS_STRIDE + first
            images = model.generate(labels, sampler, source["seed"], BATCH_SIZE, number)
            for path, image in zip(paths, images, strict=True):
                save_array(path, image[0].numpy())
        bar.update(len(paths))

    with bar:
        distributed.spread(generate_batch, batches)


def load_inception(device: torch.device) -> NoTrainInceptionV3 | None:
    """The network of the usual FID; None, with a line on how to get it, when its weights are not to be had."""
    path = INCEPTION_WEIGHTS_PATH
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        if path:
            torch.load(path, weights_only=True)  # first: torch-fidelity would run whatever code is in the file
        else:
            torch.hub.load_state_dict_from_url(_URL_INCEPTION, check_hash=True, weights_only=True)
        return NoTrainInceptionV3("inception-v3-compat", ["2048"], path).to(device)
    except Exception:
        if path:
            raise InputError(f"--inception_weights_path {path}: no file with weights of that network") from None
        print(
            "FID with Inception is left out: its weights cannot be fetched; --inception_weights_path takes the file "
            f"{_URL_INCEPTION}"
        )
        return None
    finally:
        socket.setdefaulttimeout(timeout)


if __name__ == "__main__":
    settings.run(main, globals(), torchrun=True)
