"""Trains ResNet18 to tell the classes of DATA_DIR apart; evaluation judges generated images with it.

    python train/train_classifier.py                       # 224 pixels and ImageNet weights, for a GPU
    python train/train_classifier.py --recipe first_look   # in ten minutes on two cores

Writes to OUTPUT_DIR: classifier_ckpts/resnet18_best.pt, the best epoch by validation accuracy, training_metrics.png and
training_metrics.csv, and confusion_matrix.png with its accuracy on the test images. A run that was stopped goes on from
the newest checkpoint; on a CPU it ends with the same bits as a run that was never stopped.
"""

import math
import socket
import sys
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plots
import settings
from dataset import NpyDataset, epoch_batches, load_parts, some_of_each_class
from models.checkpoint import check_numbers, load_checkpoint, plain_names, save_checkpoint
from models.classifier import (
    LensClassifier,
    build_classifier,
    calibrate,
    calibration_error,
    classifier_transforms,
    classify,
    load_classifier,
)
from models.flow import generator_of
from settings import Count, Epochs, Fraction, InputError, Interval, NotNegative, Positive, Whole
from simulate.instrument import INSTRUMENTS, observers_of
from train.orientations import SYMMETRIES
from train.recipes import RECIPES
from train.run import Run
from train.views import KINDS, Views

DATA_DIR: str = "data"  # Folder with a folder of images for each class
OUTPUT_DIR: str = "classifier_training_resnet18"  # Change it to keep an earlier classifier
ON_BAD_FILE: Literal["raise", "skip"] = "raise"  # "skip" trains without the files that cannot be read
ON_MISSING_CLASS: Literal["raise", "go_on"] = "raise"  # "go_on" trains although a class has no images
CACHE_DIR: str | None = None  # Where packed images are kept; None means DATA_DIR itself, if it can be written to
AUGMENT: Literal[(*SYMMETRIES,)] = "none"  # Orientations that images are shown in, as in train_diffusion.py
MAX_SHIFT: Whole = 0  # Largest random shift of an image in pixels, drawn anew each time
INSTRUMENT: Literal[(None, *INSTRUMENTS)] = None  # Shows noise-free images as this telescope sees them
PEAK: Positive | None = None  # Counts per second of the brightest pixel, for INSTRUMENT; None takes it from the files
LEAST_DEPTH: Positive = 0.25  # Shortest exposure, relative to INSTRUMENT's; drawn anew for each image
MOST_DEPTH: Positive = 1e4  # Longest exposure; with 1e4 the noise is a hundredth of INSTRUMENT's
CLEAN_SHARE: Fraction = 0.2  # Share of images that INSTRUMENT puts no noise on
UNLIKE_SHARE: Fraction = 0.0  # Share of extra images, altered to be unlike all others, that it learns to recognize
IMAGE_SIZE: Annotated[int, Interval(8, 1024)] = 224  # Pixels on a side to resize to; 64 on a CPU: a 12th of the work
PRETRAINED: bool = True  # Start from ImageNet weights; false trains every layer from scratch
WEIGHTS_PATH: str | None = None  # File with torchvision's ResNet18 weights, for a machine without internet
BATCH_SIZE: Count = 180  # Reduce when the GPU runs out of memory
LEARNING_RATE: Positive = 1e-4  # Of the last layer with ImageNet weights; layer3 and layer4 take a tenth of it
SCRATCH_LEARNING_RATE: Positive = 1e-3  # Of every layer, when there are no ImageNet weights
EPOCHS: Epochs = 40  # Fewer are enough with pretrained weights
SEED: Whole = 42  # Of the first weights and the order of images
CHECKPOINT_SAVE_MINUTES: NotNegative = 3.0  # Most minutes between checkpoints; every epoch ends with one
RESUME: str = "auto"  # Goes on where the run was stopped; "never" starts anew, a path goes on from the checkpoint there
AMP_DTYPE: Literal[None, "bfloat16"] = None  # "bfloat16" on a recent GPU
DEVICE: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto" takes the GPU when there is one

_KNOWN_IMAGES = 6000  # training images, at most, from which the distance of other images is measured


def main() -> None:
    device = settings.pick_device(DEVICE)
    if WEIGHTS_PATH and not PRETRAINED:
        raise InputError("WEIGHTS_PATH is for PRETRAINED = True: leave one of them out", 2)
    reading = {"on_bad_file": ON_BAD_FILE, "on_missing_class": ON_MISSING_CLASS, "cache_dir": CACHE_DIR}
    parts = load_parts(DATA_DIR, "train", "val", "test", **reading)
    train, val, test = (part.to(device) for part in parts)
    check_data(train)
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    channels, classes = train.image_shape[0], train.classes
    views = make_views(train)
    seen, labels_seen = views.of_all(val.images.cpu(), SEED), val.labels.cpu()
    model = build_classifier(IMAGE_SIZE, classes, channels, KINDS if UNLIKE_SHARE else ())
    told = model.description()
    run = Run(globals(), "classifier_ckpts/resnet18", device, lambda content: told | content)
    run.begin(train, dict(told))
    print(f"Training on {device}")
    pretrained = run.state["pretrained"] if run.state else PRETRAINED and load_imagenet_weights(model)
    run.content |= {"pretrained": pretrained}
    run.rate = "LEARNING_RATE" if pretrained else "SCRATCH_LEARNING_RATE"
    groups = trained_layers(model.to(device), pretrained)
    print(f"{sum(p.numel() for group in groups for p in group['params']):,} trainable parameters")
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    run.restore(model=model, optimizer=optimizer)
    scheduler = run.schedule(
        optimizer,
        torch.optim.lr_scheduler.OneCycleLR,
        [group["lr"] for group in groups],
        EPOCHS * run.steps_per_epoch,
        pct_start=0.101,  # with 0.1, runs of ten steps divide by zero
    )
    run.untrained = math.log(len(classes)) + (math.log(len(KINDS)) if UNLIKE_SHARE else 0)
    best_path = run.folder / "resnet18_best.pt"

    for epoch in run.remaining_epochs():
        model.train()
        batches = epoch_batches(len(train), BATCH_SIZE, SEED, epoch)
        for batch in run.steps(batches):
            images, labels = (part.to(device) for part in train[batch.to(train.labels.device)])
            shown, kinds = views.shown(images, generator_of(SEED, run.step, device))
            with torch.autocast(device.type, torch.bfloat16, enabled=AMP_DTYPE is not None):
                features = model.features(classifier_transforms(shown, IMAGE_SIZE)).float()
            logits = model.fc(features[: len(labels)])  # the altered images have no class
            loss = F.cross_entropy(logits, labels)
            if model.kinds:
                loss = loss + F.cross_entropy(model.kind(features), kinds)
            optimizer.zero_grad()
            loss.backward()
            loss, stop = run.check(loss.detach())
            if stop:
                return
            optimizer.step()
            scheduler.step()
            run.add(len(labels), loss, correct=(logits.argmax(1) == labels).sum().item())

        # The running averages of batch normalization lag behind weights that change fast: compute them anew
        some, random = batches[: math.ceil(2048 / BATCH_SIZE)], generator_of(SEED, run.step, device)
        shown = (views.shown(train.images[part.to(train.labels.device)].to(device), random)[0] for part in some)
        update_bn((classifier_transforms(images, IMAGE_SIZE) for images in shown), model)
        val_loss, val_accuracy, _ = evaluate(classify(model.eval(), seen)[0], labels_seen)
        # resnet18_best.pt is not there yet when the run began in another folder
        earlier = [row["val_accuracy"] for row in run.history] if best_path.exists() else []
        row = {"train_loss": run.mean("loss"), "val_loss": val_loss}
        row |= {"train_accuracy": run.mean("correct"), "val_accuracy": val_accuracy}
        best = val_accuracy > max(earlier, default=-1)
        tqdm.write(
            f"epoch {epoch}: train loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.2%}; "
            f"validation loss {val_loss:.4f}, accuracy {val_accuracy:.2%}"
            + (", the best so far, saved" if best else "")
        )
        run.end_epoch(row, [["train_loss", "val_loss"], ["train_accuracy", "val_accuracy"]])
        if best:
            found = {"epoch": epoch, "val_accuracy": val_accuracy}
            save_checkpoint(best_path, model_state_dict=model.state_dict(), **told, **found, settings=run.settings)
        run.save_epoch(loss)  # of the last batch: the mean over the epoch is of earlier weights

    model = load_classifier(best_path, device)
    find_calibration(model, train, val, views)
    save_checkpoint(best_path, **load_checkpoint(best_path) | {"model_state_dict": model.state_dict()})
    report(model, test, views)


def check_data(train: NpyDataset) -> None:
    """Raises InputError for images of one class, or fewer than a batch."""
    if len(train.classes) == 1:
        advice = "evaluation takes the features of a classifier of other images then, such as those of weights/"
        raise InputError(f"{DATA_DIR} has one class, {train.classes[0]}: there is nothing to tell apart; {advice}", 2)
    if len(train) < BATCH_SIZE:
        what = f"--batch_size {BATCH_SIZE} is more than the {len(train)} training images of {DATA_DIR}"
        raise InputError(f"{what}: take --batch_size {max(1, len(train) // 4)}, or add images", 2)


def make_views(train: NpyDataset) -> Views:
    """The random views that the settings ask for."""
    (observer,) = observers_of(train, INSTRUMENT, PEAK, seed=0, count=1)
    return Views(observer, (LEAST_DEPTH, MOST_DEPTH), CLEAN_SHARE, AUGMENT, MAX_SHIFT, UNLIKE_SHARE)


def find_calibration(model: LensClassifier, train: NpyDataset, val: NpyDataset, views: Views) -> None:
    """Calibrates a trained classifier on views of the validation images."""
    known = train.images[some_of_each_class(train.labels.cpu(), _KNOWN_IMAGES // len(train.classes))].cpu()
    images, labels = val.images.cpu(), val.labels.cpu()
    faintest = views.of_all(images[:_KNOWN_IMAGES], SEED, LEAST_DEPTH) if views.observer else None
    calibrate(model, views.of_all(known, SEED), views.of_all(images, SEED), labels, faintest)


def report(model: LensClassifier, test: NpyDataset, views: Views) -> None:
    """Prints the accuracy and the calibration error on test images, and how many of them seem unlike those of training;
    draws the confusion matrix."""
    images, labels, classes = test.images.cpu(), test.labels.cpu(), test.classes
    looks = {"": views.of_all(images, SEED)}
    if views.observer:
        seen = views.observer(images, torch.zeros(len(images)), torch.ones(len(images)), torch.arange(len(images)))
        looks = {f"as {INSTRUMENT} sees them": seen[0], "without noise": images}
    for name, shown in looks.items():
        probabilities, features = classify(model, shown)
        _, accuracy, counts = evaluate(probabilities, labels)
        unlike = (model.calibration.distance(features) > 1).double().mean()
        print(
            f"test accuracy {accuracy:.2%} {name}, calibration error {calibration_error(probabilities, labels):.3f}, "
            f"{unlike:.1%} seem unlike those of training; rows are the true classes {', '.join(classes)}:\n"
            f"{counts.numpy()}"
        )
        if name == next(iter(looks)):
            picture = plots.confusion_matrix(counts.numpy(), classes, f"test accuracy {accuracy:.2%}")
            plots.save(picture, Path(OUTPUT_DIR) / "confusion_matrix.png")


def load_imagenet_weights(model: nn.Module) -> bool:
    """Loads ImageNet weights, from WEIGHTS_PATH or the internet, into all layers they fit; False if there are none."""
    timeout = socket.getdefaulttimeout()
    try:
        if WEIGHTS_PATH:
            weights = plain_names(torch.load(WEIGHTS_PATH, map_location="cpu", weights_only=True))
            check_numbers(weights, WEIGHTS_PATH)
        else:
            socket.setdefaulttimeout(20)
            weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True)
        own = without_imagenet(model)
        weights = {name: value for name, value in weights.items() if name not in own}
        missing = set(model.load_state_dict(weights, strict=False).missing_keys)
        if missing != own:
            raise ValueError(f"it lacks {min(missing - own)}")
        return True
    except InputError:
        raise
    except Exception:
        if WEIGHTS_PATH:
            raise InputError(f"--weights_path {WEIGHTS_PATH}: no file with weights of a ResNet18") from None
        print("ImageNet weights cannot be fetched (--weights_path takes a file): training from scratch")
        return False
    finally:
        socket.setdefaulttimeout(timeout)


def without_imagenet(model: nn.Module) -> set[str]:
    """Names of the weights that have no counterpart in a network trained on photographs."""
    own = ("fc.", "kind.") if model.channels in (1, 3) else ("fc.", "kind.", "conv1.")
    return {name for name in model.state_dict() if name.startswith(own)}


def trained_layers(model: nn.Module, pretrained: bool) -> list[dict]:
    """Parameter groups for the optimizer: all layers of a network from scratch; of a pretrained one, layer3, layer4 and
    the layers without pretrained weights."""
    if not pretrained:
        return [{"params": list(model.parameters()), "lr": SCRATCH_LEARNING_RATE}]
    model.requires_grad_(False)
    groups = [(model.layer3, LEARNING_RATE / 10), (model.layer4, LEARNING_RATE / 10), (model.fc, LEARNING_RATE)]
    groups += [(model.kind, LEARNING_RATE)] if model.kinds else []
    groups += [(model.conv1, LEARNING_RATE)] if "conv1.weight" in without_imagenet(model) else []
    return [{"params": list(layer.requires_grad_().parameters()), "lr": rate} for layer, rate in groups]


def evaluate(probabilities: Tensor, labels: Tensor) -> tuple[float, float, Tensor]:
    """Mean loss, accuracy and confusion matrix (rows are the true classes) of probabilities (n, classes)."""
    called, classes = probabilities.argmax(1), probabilities.shape[1]
    counts = torch.bincount(labels * classes + called, minlength=classes**2).view(classes, -1)
    loss = F.nll_loss(probabilities.clamp_min(1e-12).log(), labels).item()
    return loss, (called == labels).float().mean().item(), counts


if __name__ == "__main__":
    settings.run(main, globals(), recipes=RECIPES)
