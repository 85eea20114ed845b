"""Generates lenses, or takes those of a folder, and scores them against the test images of DATA_DIR.

    python evaluate/evaluate_fld.py
    python evaluate/evaluate_fld.py --generated_dir D      # images {axion,cdm,no_sub}/*.npy of any other generator

Every figure stands beside its floor, the same figure of real images against real images. Writes
OUTPUT_DIR/{axion,cdm,no_sub}/{i}.npy, unless it is given a folder to score, a picture of real above generated lenses,
REPORT_DIR/report.json and REPORT_DIR/report.html, and prints a table. In a notebook:
``from evaluate.evaluate_fld import load_model, generate_image``.
"""

import socket
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as _URL_INCEPTION
from torchmetrics.image.fid import NoTrainInceptionV3
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distributed
import plots
import settings
from dataset import CLASSES, NpyDataset, is_image_file, load_parts, print_counts
from evaluate import generated_folder, report
from evaluate.figures import Reference, fewest, half_size
from files import contents, hold, holder_of
from models import flow
from models.checkpoint import build_generator, load_checkpoint
from models.classifier import load_classifier
from models.model import NanoDiT
from settings import Count, Guidance, InputError, Interval, Splits, Steps, Whole, checked

DATA_DIR: str = "data"  # Folder with axion/, cdm/ and no_sub/: its test images are the reference
REAL_DIR: str | None = None  # Another such folder of real images, in its place
GENERATED_DIR: str | None = None  # A folder of images to score; None generates them. Nothing is ever written to it
OUTPUT_DIR: str = "generated_npy"  # Where generated images go, and _compared behind it those of a second checkpoint
REPORT_DIR: str = "evaluation"  # Where report.html and report.json go
FIGURE_PATH: str = "evaluation/lenses.png"  # Picture of real and generated lenses
CHECKPOINT_PATH: str = settings.first_there(  # The generator: the one trained here, or else the one of the repository
    "diffusion_training/dit_conditional_ckpts/dit_conditional_final.pt", "weights/nanodit_s64.safetensors"
)
COMPARE_PATH: str | None = None  # A second checkpoint, or folder of images, to be scored in columns beside the first
CLASSIFIER_PATH: str = settings.first_there(  # Gives the lens features, likewise
    "classifier_training_resnet18/classifier_ckpts/resnet18_best.pt", "weights/resnet18_lens.safetensors"
)
INCEPTION_WEIGHTS_PATH: str | None = None  # File of its weights, for a machine without network
ON_BAD_FILE: Literal["raise", "skip"] = "raise"  # "skip" goes on without the files that cannot be read
CACHE_DIR: str | None = None  # Where packed images are kept; None is in their own folder, if it can be written to
IMAGES_PER_CLASS: Count = 1000  # As many as half of the test images of a class if these are fewer
NUM_SPLITS: Splits = 10  # Random halves of the real images, for floors and their spread; more for a steadier spread
NUM_ODE_STEPS: Steps | None = None  # From noise to image; None takes as many as the checkpoint says
CFG_SCALE: Guidance | None = None  # Guidance scale, 1 is no guidance; None takes that of the checkpoint
BATCH_SIZE: Count = 128  # Images at once; reduce when memory runs out
SEED: Whole = 0  # Image k of a seed is always the same
DEVICE: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto" takes the GPU when there is one

_CLASS_STRIDE = 10**9  # images of a class are numbered from here, so that each starts from noise of its own


def main() -> None:
    device = distributed.join(settings.pick_device(DEVICE))
    data = REAL_DIR or DATA_DIR
    plots.check_format(FIGURE_PATH)  # now, not after minutes of work
    check_places()
    with distributed.main_first():
        if distributed.is_main():
            hold(REPORT_DIR)
        Path(FIGURE_PATH).parent.mkdir(parents=True, exist_ok=True)
        real, train = load_parts(data, "test", "train", on_bad_file=ON_BAD_FILE, cache_dir=CACHE_DIR)
    classifier = load_classifier(CLASSIFIER_PATH, device)
    print(f"Lens features of {CLASSIFIER_PATH}")
    to_score = [read_folder(GENERATED_DIR) if GENERATED_DIR else prepare(CHECKPOINT_PATH, OUTPUT_DIR)]
    if COMPARE_PATH is not None:
        is_folder, beside = Path(COMPARE_PATH).is_dir(), f"{OUTPUT_DIR.rstrip('/')}_compared"
        to_score.append(read_folder(COMPARE_PATH) if is_folder else prepare(COMPARE_PATH, beside))
    given = [fewest(folder) for folder in to_score if isinstance(folder, NpyDataset)]
    count = min([half_size(real, IMAGES_PER_CLASS), *given])
    if count < 3:
        raise InputError("fewer than 3 images of a class to score; add images")
    samples = [
        take_numbered(folder, count) if isinstance(folder, NpyDataset) else generate(*folder, count)
        for folder in to_score
    ]
    count = min(count, *(fewest(dataset) for dataset, _ in samples))  # what is bad may have been skipped
    if count < 3:
        raise InputError("fewer than 3 sound images of a class to score")
    with distributed.main_first():
        inception = load_inception(device)
    for space, features in {"lens": classifier.fc.in_features, "Inception": 2048 if inception else 0}.items():
        if count <= features:
            print(
                f"{count} images of a class are too few for the covariance of {features} features: Fréchet distances "
                f"in {space} features are too high, and mean something only beside their floor"
            )
    reference = Reference(real, train, count, classifier, inception, BATCH_SIZE, SEED)
    names = [dataset.root_dir.name for dataset, _ in samples]
    if len({"real", *names}) <= len(names):
        names = [str(dataset.root_dir) for dataset, _ in samples]
    names = [name.encode("utf-8", "replace").decode() for name in names]  # to draw; a folder's name may be any bytes
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
    target_class: int | str,
    ode_steps: int | None = None,
    cfg_scale: float | None = None,
    num_samples: int = 1,
    seed: int = 0,
) -> Tensor:
    """Generates lenses of one class.

    Args:
        target_class: 0 axion, 1 cdm, 2 no_sub, or the name.
        ode_steps: steps from noise to image, None for as many as the checkpoint says (50 for published ones).
        cfg_scale: guidance scale, None for that of the checkpoint (5 for published ones); higher is truer to the class
            and less diverse, 1 is no guidance.
        num_samples: number of images.
        seed: another seed gives other images; image k of a seed is always the same.

    Returns:
        (num_samples, 1, 64, 64) float32 in [0, 1], on the CPU.

    Raises:
        InputError: with the name of the argument that cannot be.
    """
    if not isinstance(model, NanoDiT):
        raise InputError(f"model {model!r} is none: load_model gives one")
    try:
        label = CLASSES.index(target_class) if isinstance(target_class, str) else target_class
        label = checked("target_class", label, Annotated[int, Interval(0, model.num_classes - 1)])
    except (ValueError, InputError):
        known = f"one of 0 to {model.num_classes - 1}: {', '.join(CLASSES)}"
        raise InputError(f"target_class {target_class!r} is not {known}") from None
    sampler = sampler_of(
        model, checked("ode_steps", ode_steps, Steps | None), checked("cfg_scale", cfg_scale, Guidance | None)
    )
    labels = torch.full((checked("num_samples", num_samples, Count),), label)
    return model.generate(labels, sampler, checked("seed", seed, Whole))


def sampler_of(model: NanoDiT, ode_steps: int | None, cfg_scale: float | None) -> flow.Sampler:
    """The sampler of a network, with another guidance scale, or so many steps and no more, where they are given."""
    sampler = model.sampler if cfg_scale is None else replace(model.sampler, cfg_scale=cfg_scale)
    return sampler if ode_steps is None else replace(sampler, steps=ode_steps, tolerance=None)


def check_places() -> None:
    """Raises InputError when the report would be written into a folder that is only to be scored."""
    for scored in [Path(path) for path in (GENERATED_DIR, COMPARE_PATH) if path and Path(path).is_dir()]:
        for written in (REPORT_DIR, FIGURE_PATH):
            if scored.resolve() in (Path(written).resolve(), *Path(written).resolve().parents):
                raise InputError(f"{scored} is only to be scored: nothing may be written to {written}", 2)


def read_folder(path: str) -> NpyDataset:
    """The images of a folder that is to be scored as it is.

    Raises:
        InputError: with what the folder holds, when a class has no images in it, or when it is still being written to.
    """
    folder = Path(path)
    if distributed.is_main() and (holder := holder_of(folder)):
        raise InputError(f"{folder} is in use; it belongs to {holder}: score it when that has ended")
    there = {name: any(is_image_file(path.name) for path in (folder / name).glob("*")) for name in CLASSES}
    if missing := [f"{name}/" for name in CLASSES if not there[name]]:
        found = contents(folder)
        deeper = {path.parent for path in folder.rglob("*.npy") if is_image_file(path.name)} - {folder}
        found += f", with images in {min(deeper)}" if deeper else ""
        raise InputError(f"{folder}: nothing to score: no .npy images in {', '.join(missing)}; it {found}", status=2)
    print(f"Scoring the images of {folder}: nothing is generated")
    with distributed.main_first():
        dataset = NpyDataset(folder, None, "all", ON_BAD_FILE, cache_dir=CACHE_DIR or Path(REPORT_DIR) / "cache")
    print_counts({"images": dataset}, str(folder))
    return dataset


def take_numbered(dataset: NpyDataset, count: int) -> tuple[NpyDataset, dict[str, Any]]:
    """Of a folder made here, images 0 to count - 1 of each class; of any other, all; and where they come from."""
    folder = dataset.root_dir
    source = generated_folder.source_of(folder)
    if source is None:
        return dataset, {"folder": str(folder)}
    if changed := generated_folder.altered(folder):
        print(f"{len(changed)} images of {folder} are not as they were written here, {changed[0]} for one")
    first = dataset.only(generated_folder.numbered(count))
    return (first if len(first) == count * len(CLASSES) else dataset), source | {"folder": str(folder)}


def prepare(checkpoint: str, output: str) -> tuple[NanoDiT, Path, dict[str, Any]]:
    """A generator, the folder for its images, which is this process's own then, and how it makes them."""
    model = load_model(checkpoint, DEVICE)
    source = {
        "checkpoint": str(checkpoint),
        "sha256": report.sha256(checkpoint),
        "sampler": asdict(sampler_of(model, NUM_ODE_STEPS, CFG_SCALE)),
        "seed": SEED,
    }
    with distributed.main_first():
        if distributed.is_main():
            generated_folder.begin(Path(output), source)
    return model, Path(output), source


def generate(model: NanoDiT, folder: Path, source: dict[str, Any], count: int) -> tuple[NpyDataset, dict[str, Any]]:
    """Images 0 to count - 1 of each class, and how they were made."""
    generate_to_folder(model, folder, count, source)
    with distributed.main_first():
        dataset = NpyDataset(folder, None, "all", ON_BAD_FILE)
    return dataset.only(generated_folder.numbered(count)), source


def generate_to_folder(model: NanoDiT, folder: Path, count: int, source: dict[str, Any]) -> None:
    """Writes {class}/{i}.npy, (64, 64) float32 in [0, 1], to a folder that was begun; goes on where it was stopped.

    No two images start from the same noise, and image i of a class and seed is always the same.
    """
    sampler = flow.Sampler(**source["sampler"])
    print(
        f"Generating {count} images of each class in {sampler.steps} {sampler.solver} steps, guidance "
        f"{sampler.cfg_scale:g}, on {model.pos_embed.device}"
    )
    batches = [(label, first) for label in range(len(CLASSES)) for first in range(0, count, BATCH_SIZE)]
    bar = tqdm(total=count * len(CLASSES) // distributed.size(), unit="image", desc="generating", leave=False)

    def generate_batch(batch: tuple[int, int]) -> None:
        label, first = batch
        names = [f"{CLASSES[label]}/{i}.npy" for i in range(first, min(first + BATCH_SIZE, count))]
        if not all((folder / name).exists() for name in names):
            labels = torch.full((len(names),), label)
            number = label * _CLASS_STRIDE + first
            images = model.generate(labels, sampler, source["seed"], BATCH_SIZE, number)
            for name, image in zip(names, images, strict=True):
                if not (folder / name).exists():
                    generated_folder.write(folder, name, image[0].numpy())
        bar.update(len(names))

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
