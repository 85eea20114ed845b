"""Trains ResNet18 to read PARAMETERS off the lens images of DATA_DIR. Evaluation checks with it whether generated
lenses have the parameters that they were asked for.

    python train/train_regressor.py --parameters source_x,source_y,axion_mass

Writes to OUTPUT_DIR: regressor_ckpts/resnet18_best.pt, the best epoch by validation loss, training_metrics.png and
training_metrics.csv, and recovery.png, what it reads off test images. A run that was stopped goes on from the newest
checkpoint; on a CPU it ends with the same bits as a run that was never stopped.
"""

import math
import sys
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plots
import settings
from dataset import NpyDataset, epoch_batches, load_parts
from models.checkpoint import save_checkpoint
from models.classifier import classifier_transforms
from models.regressor import LensRegressor, Recovery, build_regressor, load_regressor, regressor_in
from parameters import are_of, fit, name_of
from settings import Count, Epochs, InputError, Interval, Names, NotNegative, Positive, Whole
from train.recipes import RECIPES
from train.run import Run

DATA_DIR: str = "data"  # Folder of images with their parameters, see docs/parameters.md
OUTPUT_DIR: str = "regressor_training_resnet18"  # Change it to keep an earlier regressor
PARAMETERS: Names = ()  # Parameters to read, written as in train_diffusion.py: "source_x,axion_mass:log10"
ON_BAD_FILE: Literal["raise", "skip"] = "raise"  # "skip" trains without the files that cannot be read
ON_MISSING_CLASS: Literal["raise", "go_on"] = "raise"  # "go_on" trains although a class has no images
CACHE_DIR: str | None = None  # Where packed images are kept; None means DATA_DIR itself, if it can be written to
IMAGE_SIZE: Annotated[int, Interval(8, 1024)] = 64  # Pixels on a side to resize images to
BATCH_SIZE: Count = 64  # Raise it for a GPU, with the learning rate
LEARNING_RATE: Positive = 1e-3  # Reduce when the loss is NaN
EPOCHS: Epochs = 20  # More is better
SEED: Whole = 42  # Of the first weights and the order of images
CHECKPOINT_SAVE_MINUTES: NotNegative = 3.0  # Most minutes between checkpoints; every epoch ends with one
RESUME: str = "auto"  # Goes on where the run was stopped; "never" starts anew, a path goes on from the checkpoint there
AMP_DTYPE: Literal[None, "bfloat16"] = None  # "bfloat16" on a recent GPU
DEVICE: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto" takes the GPU when there is one


def main() -> None:
    device = settings.pick_device(DEVICE)
    if not PARAMETERS:
        raise InputError("--parameters is empty: name those to be read, as source_x,source_y", 2)
    reading = {"on_bad_file": ON_BAD_FILE, "on_missing_class": ON_MISSING_CLASS, "cache_dir": CACHE_DIR}
    train, val, test = load_parts(DATA_DIR, "train", "val", "test", **reading)
    if len(train) < BATCH_SIZE:
        raise InputError(f"--batch_size {BATCH_SIZE} is more than the {len(train)} training images of {DATA_DIR}", 2)
    run = Run(globals(), "regressor_ckpts/resnet18", device)
    parameters = regressor_in(run.state, run.found).lens_parameters if run.state else ()  # of an earlier checkpoint
    if not are_of(PARAMETERS, parameters):
        columns = train.columns(map(name_of, PARAMETERS))
        parameters = fit(PARAMETERS, columns, [train.classes[label] for label in train.labels.tolist()])
    for name, column in val.columns(map(name_of, PARAMETERS)).items():
        if not np.isfinite(column.values).any():
            raise InputError(
                f"parameter {name}: no validation image has it, so nobody could say how well it is read", 2
            )
    torch.manual_seed(SEED)
    model = build_regressor(IMAGE_SIZE, train.image_shape[0], parameters)
    targets = model.targets(train.phases(parameters))
    run.begin(train, model.description())
    optimizer = torch.optim.AdamW(model.to(device).parameters(), LEARNING_RATE, weight_decay=0.01, fused=True)
    run.restore(model=model, optimizer=optimizer)
    steps = EPOCHS * run.steps_per_epoch
    scheduler = run.schedule(optimizer, torch.optim.lr_scheduler.OneCycleLR, LEARNING_RATE, steps, pct_start=0.101)
    run.untrained = mean_error(torch.zeros_like(targets), targets).item()
    best_path = run.folder / "resnet18_best.pt"

    for epoch in run.remaining_epochs():
        model.train()
        batches = epoch_batches(len(train), BATCH_SIZE, SEED, epoch)
        for batch in run.steps(batches):
            images = classifier_transforms(train.images[batch].to(device), IMAGE_SIZE)
            with torch.autocast(device.type, torch.bfloat16, enabled=AMP_DTYPE is not None):
                outputs = model(images)
            loss = mean_error(outputs.float(), targets[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            loss, stop = run.check(loss.detach())
            if stop:
                return
            optimizer.step()
            scheduler.step()
            run.add(len(batch), loss)

        # The running averages of batch normalization lag behind weights that change fast: compute them anew
        some = batches[: math.ceil(2048 / BATCH_SIZE)]
        update_bn((classifier_transforms(train.images[part].to(device), IMAGE_SIZE) for part in some), model)
        val_loss = Recovery.of(model.eval(), val).loss()
        earlier = [row["val_loss"] for row in run.history] if best_path.exists() else []
        best = val_loss < min(earlier, default=float("inf"))
        row = {"train_loss": run.mean("loss"), "val_loss": val_loss}
        tqdm.write(
            f"epoch {epoch}: train loss {row['train_loss']:.5f}, validation loss {val_loss:.5f}"
            + (", the best so far, saved" if best else "")
        )
        run.end_epoch(row, [["train_loss", "val_loss"]])
        if best:
            found = {"epoch": epoch, "settings": run.settings}
            save_checkpoint(best_path, model_state_dict=model.state_dict(), **model.description(), **found)
        run.save_epoch(loss)

    report(load_regressor(best_path, device), test)


def mean_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of outputs (n, outputs) where the targets are known."""
    known = ~targets.isnan()
    return ((outputs - targets.nan_to_num()) * known).square().sum() / known.sum().clamp_min(1)


def report(model: LensRegressor, test: NpyDataset) -> None:
    """Prints and draws how well the regressor reads each parameter off test images."""
    found = Recovery.of(model, test)
    for name, row in found.table().items():
        print(f"{name}: R^2 {row['r2']:.4f}, bias {row['bias']:.3g}, scatter {row['scatter']:.3g} {row['unit']}")
    if panels := found.panels():
        plots.save(plots.recovery({"test images": panels}, "true"), Path(OUTPUT_DIR) / "recovery.png")
    else:
        print("Nobody can say how well it reads: hardly any test image has a known parameter")


if __name__ == "__main__":
    settings.run(main, globals(), recipes=RECIPES)
