"""Trains ResNet18 to tell the three classes of DATA_DIR apart; evaluation judges generated images with it.

    python train/train_classifier.py                       # 224 pixels and ImageNet weights, for a GPU
    python train/train_classifier.py --image_size 64       # for a CPU

Writes to OUTPUT_DIR: classifier_ckpts/resnet18_best.pt, the best epoch by validation accuracy, training_metrics.png and
training_metrics.csv, and confusion_matrix.png with its accuracy on the test images.
"""

import socket
import sys
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plots
import settings
from dataset import CLASSES, NpyDataset, classifier_transforms
from models.checkpoint import save_checkpoint
from models.classifier import build_classifier, classify, load_classifier
from settings import InputError

DATA_DIR = "data"  # Folder with axion/, cdm/ and no_sub/
OUTPUT_DIR = "classifier_training_resnet18"  # Change it to keep an earlier classifier
ON_BAD_FILE: Literal["raise", "skip"] = "raise"  # "skip" trains without the files that cannot be read
IMAGE_SIZE = 224  # Pixels the images are resized to; 64, a twelfth of the work, for a CPU
PRETRAINED = True  # Start from ImageNet weights; false trains every layer from scratch
WEIGHTS_PATH = None  # File with torchvision's ResNet18 weights, for a machine without network
BATCH_SIZE = 180  # Reduce when the GPU runs out of memory
LEARNING_RATE = 1e-4  # Of the last layer with ImageNet weights; layer3 and layer4 take a tenth of it
SCRATCH_LEARNING_RATE = 1e-3  # Of every layer, when there are no ImageNet weights
EPOCHS = 40  # Fewer are enough with pretrained weights
SEED = 42  # Of weights and order
AMP_DTYPE: Literal[None, "bfloat16"] = None  # "bfloat16" on a recent GPU
DEVICE: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto" takes the GPU when there is one


def main() -> None:
    device = settings.pick_device(DEVICE)
    output = Path(OUTPUT_DIR)
    path = output / "classifier_ckpts" / "resnet18_best.pt"
    train, val, test = (NpyDataset(DATA_DIR, None, part, ON_BAD_FILE).to(device) for part in ("train", "val", "test"))
    print(
        f"{len(train)} training, {len(val)} validation and {len(test)} test images in {DATA_DIR}, training on {device}"
    )
    if len(train) < BATCH_SIZE:
        raise InputError(f"--batch_size {BATCH_SIZE} is more than the {len(train)} training images of {DATA_DIR}")

    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    model = build_classifier(IMAGE_SIZE)
    pretrained = load_imagenet_weights(model) if PRETRAINED else False
    model.to(device)
    groups = trained_layers(model, pretrained)
    print(f"{sum(p.numel() for group in groups for p in group['params']):,} trainable parameters")
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    steps = EPOCHS * (len(train) // BATCH_SIZE)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in groups], steps, pct_start=0.1)
    history = []

    for epoch in range(1, EPOCHS + 1):
        model.train()
        total_loss, correct, seen = 0.0, 0, 0
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SEED + epoch))
        batches = train.batches(BATCH_SIZE, order, drop_last=True)
        bar = tqdm(
            batches, f"epoch {epoch}/{EPOCHS}", len(train) // BATCH_SIZE, unit="step", leave=False, mininterval=1
        )
        for images, labels in bar:
            with torch.autocast(device.type, torch.bfloat16, enabled=AMP_DTYPE is not None):
                logits = model(classifier_transforms(images.to(device), IMAGE_SIZE))
            loss = F.cross_entropy(logits.float(), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            total_loss += loss.item() * len(labels)
            correct += (logits.argmax(1) == labels.to(device)).sum().item()
            seen += len(labels)
            bar.set_postfix(loss=f"{total_loss / seen:.4f}", accuracy=f"{correct / seen:.3f}")

        # The running averages of batch normalization lag behind weights that change fast: take them anew
        some = train.batches(BATCH_SIZE, order[:2048])
        update_bn((classifier_transforms(images.to(device), IMAGE_SIZE) for images, _ in some), model)
        val_loss, val_accuracy, _ = evaluate(model, val)
        row = {"epoch": epoch, "train_loss": total_loss / seen, "val_loss": val_loss}
        history.append(row | {"train_accuracy": correct / seen, "val_accuracy": val_accuracy})
        plots.training_curves(output, history, [["train_loss", "val_loss"], ["train_accuracy", "val_accuracy"]])
        best = val_accuracy > max((row["val_accuracy"] for row in history[:-1]), default=-1)
        if best:
            save_checkpoint(
                path, model_state_dict=model.state_dict(), image_size=IMAGE_SIZE, epoch=epoch, val_accuracy=val_accuracy
            )
        tqdm.write(
            f"epoch {epoch}: train loss {row['train_loss']:.4f}, accuracy {correct / seen:.2%}; "
            f"validation loss {val_loss:.4f}, accuracy {val_accuracy:.2%}"
            + (", the best so far, saved" if best else "")
        )

    _, accuracy, counts = evaluate(load_classifier(path, device), test)
    title = f"test accuracy {accuracy:.2%}"
    plots.save(plots.confusion_matrix(counts.numpy(), CLASSES, title), output / "confusion_matrix.png")
    print(f"{title} of {path}; rows are the true classes {', '.join(CLASSES)}:\n{counts.numpy()}")


def load_imagenet_weights(model: nn.Module) -> bool:
    """Puts ImageNet weights, from WEIGHTS_PATH or the network, into all layers but the last; False without any."""
    timeout = socket.getdefaulttimeout()
    try:
        if WEIGHTS_PATH:
            weights = torch.load(WEIGHTS_PATH, map_location="cpu", weights_only=True)
        else:
            socket.setdefaulttimeout(20)
            weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True)
        weights = {name: value for name, value in weights.items() if not name.startswith("fc.")}
        missing = model.load_state_dict(weights, strict=False).missing_keys
        if missing != ["fc.weight", "fc.bias"]:
            raise ValueError(f"it lacks {missing[0]}")
        return True
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
