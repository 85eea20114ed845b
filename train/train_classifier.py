"""Trains ResNet18 to tell the three classes of DATA_DIR apart; evaluation judges generated images with it.

    python train/train_classifier.py                       # 224 pixels and ImageNet weights, for a GPU
    python train/train_classifier.py --image_size 64       # for a CPU

Writes to OUTPUT_DIR: classifier_ckpts/resnet18_best.pt, the best epoch by validation accuracy, training_metrics.png and
training_metrics.csv, and confusion_matrix.png with its accuracy on the test images. A run that was stopped goes on from
classifier_ckpts/resnet18_step_{n}.pt, on a CPU to the last bit as if it had not been.
"""

import math
import socket
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plots
import settings
from dataset import CLASSES, NpyDataset, classifier_transforms, epoch_batches, load_parts
from models.checkpoint import check_numbers, load_weights, plain_names, save_checkpoint
from models.classifier import build_classifier, classify, load_classifier
from settings import Count, Epochs, InputError, Interval, NotNegative, Positive, Whole
from train.safety import Checkpoints, advance, announce, load_optimizer_state

DATA_DIR: str = "data"  # Folder with axion/, cdm/ and no_sub/
OUTPUT_DIR: str = "classifier_training_resnet18"  # Change it to keep an earlier classifier
ON_BAD_FILE: Literal["raise", "skip"] = "raise"  # "skip" trains without the files that cannot be read
ON_MISSING_CLASS: Literal["raise", "go_on"] = "raise"  # "go_on" trains although a class has no images
CACHE_DIR: str | None = None  # Where packed images are kept; None is in DATA_DIR itself, if it can be written to
IMAGE_SIZE: Annotated[int, Interval(8, 1024)] = 224  # Pixels to resize images to; 64, a twelfth of the work, for a CPU
PRETRAINED: bool = True  # Start from ImageNet weights; false trains every layer from scratch
WEIGHTS_PATH: str | None = None  # File with torchvision's ResNet18 weights, for a machine without network
BATCH_SIZE: Count = 180  # Reduce when the GPU runs out of memory
LEARNING_RATE: Positive = 1e-4  # Of the last layer with ImageNet weights; layer3 and layer4 take a tenth of it
SCRATCH_LEARNING_RATE: Positive = 1e-3  # Of every layer, when there are no ImageNet weights
EPOCHS: Epochs = 40  # Fewer are enough with pretrained weights
SEED: Whole = 42  # Of weights and order
CHECKPOINT_SAVE_MINUTES: NotNegative = 3.0  # At most between checkpoints; every epoch ends with one
RESUME: str = "auto"  # Goes on where the run was stopped; "never" starts anew, a path goes on from the checkpoint there
AMP_DTYPE: Literal[None, "bfloat16"] = None  # "bfloat16" on a recent GPU
DEVICE: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto" takes the GPU when there is one


def main() -> None:
    device = settings.pick_device(DEVICE)
    output = Path(OUTPUT_DIR)
    if WEIGHTS_PATH and not PRETRAINED:
        raise InputError("WEIGHTS_PATH is for PRETRAINED = True: leave one of them out", 2)
    parts = load_parts(
        DATA_DIR,
        *("train", "val", "test"),
        on_bad_file=ON_BAD_FILE,
        on_missing_class=ON_MISSING_CLASS,
        cache_dir=CACHE_DIR,
    )
    train, val, test = (part.to(device) for part in parts)
    if len(train) < BATCH_SIZE:
        raise InputError(f"--batch_size {BATCH_SIZE} is more than the {len(train)} training images of {DATA_DIR}", 2)
    checkpoints = Checkpoints(
        __file__,
        output,
        "classifier_ckpts",
        "resnet18_step_*.pt",
        RESUME,
        CHECKPOINT_SAVE_MINUTES,
        device,
        image_size=IMAGE_SIZE,
    )
    announce(checkpoints, EPOCHS, settings.constants(globals()), train.identity)
    print(f"Training on {device}")

    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    model = build_classifier(IMAGE_SIZE)
    state = restore(checkpoints, model)
    pretrained = state.get("pretrained", PRETRAINED and not state and load_imagenet_weights(model))
    model.to(device)
    groups = trained_layers(model, pretrained)
    print(f"{sum(p.numel() for group in groups for p in group['params']):,} trainable parameters")
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    steps_per_epoch = len(epoch_batches(len(train), BATCH_SIZE, SEED, 1))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in groups],
        EPOCHS * steps_per_epoch,
        pct_start=0.101,  # with 0.1, runs of ten steps divide by zero
    )
    history, total_loss, correct, seen, done = [], 0.0, 0, 0, 0
    if state:
        load_optimizer_state(optimizer, state["optimizer_state_dict"], checkpoints.newest)
        history, (total_loss, correct, seen) = state["history"], state["sums"]
        done = state["step_in_epoch"] * steps_per_epoch // state["steps_per_epoch"]  # after another batch size too
        global_step = state["epoch"] * steps_per_epoch + done
        advance(scheduler, min(global_step, scheduler.total_steps - 1))
    untrained = math.log(len(CLASSES))
    rate = ("LEARNING_RATE", LEARNING_RATE) if pretrained else ("SCRATCH_LEARNING_RATE", SCRATCH_LEARNING_RATE)
    stop_asked = settings.stop_on_signal()

    def save(epoch: int, step: int) -> None:
        """After a number of whole epochs and steps of the next one."""
        path = checkpoints.folder / f"resnet18_step_{epoch * steps_per_epoch + step}.pt"
        save_checkpoint(
            path,
            model_state_dict=model.state_dict(),
            optimizer_state_dict=optimizer.state_dict(),
            image_size=IMAGE_SIZE,
            pretrained=pretrained,
            epoch=epoch,
            step_in_epoch=step,
            steps_per_epoch=steps_per_epoch,
            sums=(total_loss, correct, seen),
            history=history,
            settings=settings.constants(globals()),
            data=train.identity,
            run=checkpoints.run,
            script=checkpoints.script,
        )
        checkpoints.keep(path, "resnet18_step_*.pt", 2)

    for epoch in range(len(history) + 1, EPOCHS + 1):
        model.train()
        batches = epoch_batches(len(train), BATCH_SIZE, SEED, epoch)
        bar = tqdm(batches[done:], f"epoch {epoch}/{EPOCHS}", steps_per_epoch, initial=done, unit="step", leave=False)
        for step, batch in enumerate(bar, done + 1):
            images, labels = (part.to(device) for part in train[batch.to(train.labels.device)])
            with torch.autocast(device.type, torch.bfloat16, enabled=AMP_DTYPE is not None):
                logits = model(classifier_transforms(images, IMAGE_SIZE))
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            value, stop = loss.item(), stop_asked()
            sound = checkpoints.is_sound((epoch - 1) * steps_per_epoch + step, value, untrained, rate)
            if sound and (stop or (checkpoints.due())):  # the weights as the loss has just found them
                save(epoch - 1, step - 1)
            if stop:
                print("stopped; run the script again to go on")
                return
            optimizer.step()
            scheduler.step()
            total_loss += value * len(labels)
            correct += (logits.argmax(1) == labels).sum().item()
            seen += len(labels)
            bar.set_postfix(loss=f"{total_loss / seen:.4f}", accuracy=f"{correct / seen:.3f}", refresh=False)

        # The running averages of batch normalization lag behind weights that change fast: take them anew
        some = (train.images[part] for part in torch.cat(batches)[:2048].to(train.labels.device).split(BATCH_SIZE))
        update_bn((classifier_transforms(images.to(device), IMAGE_SIZE) for images in some), model)
        val_loss, val_accuracy, _ = evaluate(model, val)
        row = {"epoch": epoch, "train_loss": total_loss / seen, "val_loss": val_loss}
        history.append(row | {"train_accuracy": correct / seen, "val_accuracy": val_accuracy})
        best_path = checkpoints.folder / "resnet18_best.pt"  # not there yet when the run began in another folder
        best = not best_path.exists() or val_accuracy > max((row["val_accuracy"] for row in history[:-1]), default=-1)
        tqdm.write(
            f"epoch {epoch}: train loss {row['train_loss']:.4f}, accuracy {correct / seen:.2%}; "
            f"validation loss {val_loss:.4f}, accuracy {val_accuracy:.2%}"
            + (", the best so far, saved" if best else "")
        )
        done, total_loss, correct, seen = 0, 0.0, 0, 0
        plots.training_curves(output, history, [["train_loss", "val_loss"], ["train_accuracy", "val_accuracy"]])
        if best:
            save_checkpoint(
                best_path,
                model_state_dict=model.state_dict(),
                image_size=IMAGE_SIZE,
                epoch=epoch,
                val_accuracy=val_accuracy,
            )
        if epoch == EPOCHS or checkpoints.is_sound(epoch * steps_per_epoch, val_loss, untrained, rate):
            save(epoch, 0)

    path = checkpoints.folder / "resnet18_best.pt"
    _, accuracy, counts = evaluate(load_classifier(path, device), test)
    title = f"test accuracy {accuracy:.2%}"
    plots.save(plots.confusion_matrix(counts.numpy(), CLASSES, title), output / "confusion_matrix.png")
    print(f"{title} of {path}; rows are the true classes {', '.join(CLASSES)}:\n{counts.numpy()}")


def restore(checkpoints: Checkpoints, model: nn.Module) -> dict[str, Any]:
    """The checkpoint to go on from, its weights put into the model; {} when there is none."""
    content = checkpoints.state or {}
    if content:
        load_weights(model, content["model_state_dict"], checkpoints.newest)
    return content


def load_imagenet_weights(model: nn.Module) -> bool:
    """Puts ImageNet weights, from WEIGHTS_PATH or the network, into all layers but the last; False without any."""
    timeout = socket.getdefaulttimeout()
    try:
        if WEIGHTS_PATH:
            weights = plain_names(torch.load(WEIGHTS_PATH, map_location="cpu", weights_only=True))
            check_numbers(weights, WEIGHTS_PATH)
        else:
            socket.setdefaulttimeout(20)
            weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True)
        weights = {name: value for name, value in weights.items() if not name.startswith("fc.")}
        missing = model.load_state_dict(weights, strict=False).missing_keys
        if missing != ["fc.weight", "fc.bias"]:
            raise ValueError(f"it lacks {missing[0]}")
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


def trained_layers(model: nn.Module, pretrained: bool) -> list[dict]:
    """Parameter groups for the optimizer: layer3, layer4 and fc of a pretrained network, all of one from scratch."""
    if not pretrained:
        return [{"params": list(model.parameters()), "lr": SCRATCH_LEARNING_RATE}]
    model.requires_grad_(False)
    groups = [(model.layer3, LEARNING_RATE / 10), (model.layer4, LEARNING_RATE / 10), (model.fc, LEARNING_RATE)]
    return [{"params": list(layer.requires_grad_().parameters()), "lr": rate} for layer, rate in groups]


def evaluate(model: nn.Module, dataset: NpyDataset) -> tuple[float, float, Tensor]:
    """Mean loss, accuracy and confusion matrix (3, 3), rows the true classes, of a network in evaluation mode."""
    probabilities, _ = classify(model.eval(), dataset.images)
    labels = dataset.labels.cpu()
    called = probabilities.argmax(1)
    counts = torch.bincount(labels * len(CLASSES) + called, minlength=len(CLASSES) ** 2).view(len(CLASSES), -1)
    loss = F.nll_loss(probabilities.clamp_min(1e-12).log(), labels).item()
    return loss, (called == labels).float().mean().item(), counts


if __name__ == "__main__":
    settings.run(main, globals())
