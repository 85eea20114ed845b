"""Trains NanoDiT with flow matching on the lens images of DATA_DIR.

    python train/train_diffusion.py      # the published network, for a GPU; the README has the settings for a CPU

Writes to OUTPUT_DIR: dit_conditional_ckpts/ with the checkpoints, dit_conditional_images/ and dit_conditional_npy/ with
samples from the EMA weights, training_metrics.png and training_metrics.csv. A run that was stopped goes on from its
newest checkpoint.
"""

import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from ema_pytorch import EMA
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plots
import settings
from dataset import CLASSES, NpyDataset, diffusion_transforms
from models import flow
from models.checkpoint import load_checkpoint, load_weights, save_checkpoint
from models.model import SIZES, NanoDiT
from settings import InputError

DATA_DIR = "data"  # Folder with axion/, cdm/ and no_sub/; yours, or made by simulate/simulate_lenses.py
OUTPUT_DIR = "diffusion_training"  # Change it to start another run beside this one
ON_BAD_FILE: Literal["raise", "skip"] = "raise"  # "skip" trains without the files that cannot be read

MODEL_SIZE: Literal[(None, *SIZES)] = None  # A named size instead of the five settings below: "NanoDiT-S/8" on a CPU
IMG_SIZE = 64  # Pixels; the data has 64
PATCH_SIZE = 2  # Pixels a token; larger is faster, and from 8 on needs PREDICTION = "image"
LATENT_DIM = 512  # Width of the network
MODEL_DEPTH = 6  # Transformer blocks
MODEL_HEADS = 8  # Attention heads
PREDICTION: Literal["velocity", "image"] = "velocity"  # "image" predicts the clean image: for patches of 8 or more

BATCH_SIZE = 160  # Reduce when the GPU runs out of memory
LEARNING_RATE = 1e-4  # 2e-3 for NanoDiT-S/16 in batches of 16; reduce when the loss is NaN
MIN_LEARNING_RATE = 1e-6  # Where the cosine decay ends
WARMUP_EPOCHS = 10.0  # Epochs of linear warm-up; a fraction of one for short runs
EPOCHS = 600  # More is better; the published run took 8 hours on an A100
WEIGHT_DECAY = 0.01  # Of AdamW
ADAM_BETA2 = 0.999  # Of AdamW; 0.99 for runs of a few thousand steps
MAX_GRAD_NORM = 1.0  # Gradients are clipped to this norm
LABEL_DROPOUT = 0.1  # Share of labels hidden in training; guidance needs it
TIME_SAMPLING: Literal["uniform", "logit_normal"] = "uniform"  # "logit_normal" for short runs with PREDICTION = "image"
EMA_BETA = 0.9999  # 0.999 for runs of under 50000 steps
EMA_UPDATE_EVERY = 10  # Steps between updates of the EMA; 1 for short runs
SEED = 42  # Of weights, order of data, times and noise

CFG_SCALE = 5.0  # Guidance scale of the samples; 1 is no guidance
NUM_ODE_STEPS = 50  # Euler steps of the samples
NUM_SAMPLES_PER_CLASS = 4  # Samples of each class in a grid
SAMPLE_INTERVAL = 10  # Epochs between sample grids
CHECKPOINT_SAVE_INTERVAL = 10  # Epochs between checkpoints
CHECKPOINT_SAVE_STEPS = 1000  # Steps between checkpoints within an epoch, of which the newest is kept; 0 for none
RESUME: Literal["auto", "never"] = "auto"  # "auto" goes on from the newest whole checkpoint, "never" starts anew

AMP_DTYPE: Literal[None, "float16", "bfloat16"] = None  # "bfloat16" on a recent GPU, "float16" on an older one
COMPILE = False  # True compiles the network first: for long runs on a GPU
DEVICE: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto" takes the GPU when there is one

WORTH_STARTING_HOURS = 168.0  # A run estimated to take longer is announced with the size that would not


def main() -> None:
    device = settings.pick_device(DEVICE)
    output = Path(OUTPUT_DIR)
    dataset = NpyDataset(DATA_DIR, None, "train", ON_BAD_FILE)
    dataset.images = diffusion_transforms(dataset.images)  # once and for all epochs
    dataset.to(device)
    steps_per_epoch = len(dataset) // BATCH_SIZE
    if not steps_per_epoch:
        raise InputError(f"--batch_size {BATCH_SIZE} is more than the {len(dataset)} training images of {DATA_DIR}")
    network = SIZES[MODEL_SIZE] if MODEL_SIZE else _size_of_constants()
    print(f"{len(dataset)} training images in {DATA_DIR}, training on {device}")
    warn_if_endless(network, EPOCHS * steps_per_epoch * BATCH_SIZE, device)

    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    model = NanoDiT(input_size=IMG_SIZE, num_classes=len(CLASSES), **network).to(device)
    print(f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} trainable parameters")
    ema = EMA(model, beta=EMA_BETA, update_every=EMA_UPDATE_EVERY, include_online_model=False)
    if COMPILE:
        model.compile()
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=(0.9, ADAM_BETA2), weight_decay=WEIGHT_DECAY, fused=True
    )
    warmup, total = WARMUP_EPOCHS * steps_per_epoch, EPOCHS * steps_per_epoch
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, total))
    scaler = torch.amp.GradScaler(device.type, enabled=AMP_DTYPE == "float16")
    amp = torch.autocast(device.type, getattr(torch, AMP_DTYPE)) if AMP_DTYPE else nullcontext()
    t_floor = flow.T_FLOOR if model.prediction == "image" else 0.0
    history, done, total_loss = resume(output, model, ema, optimizer, scheduler, scaler, device)
    stop_asked = settings.stop_on_signal()

    def save(name: str, epoch: int, step: int) -> None:
        """After a number of whole epochs and steps of the next one."""
        path = output / "dit_conditional_ckpts" / f"dit_conditional_{name}.pt"
        save_checkpoint(
            path,
            model_state_dict=model.state_dict(),
            ema_state_dict=ema.state_dict(),
            optimizer_state_dict=optimizer.state_dict(),
            scheduler_state_dict=scheduler.state_dict(),
            scaler_state_dict=scaler.state_dict(),
            random_states={"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
            model_config=model.config,
            epoch=epoch,
            step_in_epoch=step,
            loss_in_epoch=total_loss,
            global_step=epoch * steps_per_epoch + step,
            history=history,
        )
        for old in path.parent.glob("dit_conditional_step_*.pt"):  # this one is newer
            if old != path:
                old.unlink()
        tqdm.write(f"saved {path}")

    for epoch in range(len(history) + 1, EPOCHS + 1):
        model.train()
        started, first = time.monotonic(), done
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(SEED + epoch))
        batches = dataset.batches(BATCH_SIZE, order[done * BATCH_SIZE :], drop_last=True)
        title = f"epoch {epoch}/{EPOCHS}"
        bar = tqdm(batches, title, steps_per_epoch, initial=done, unit="step", leave=False, mininterval=1)
        for step, (x, labels) in enumerate(bar, done + 1):
            x, labels = x.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            noise = torch.randn_like(x)
            t = flow.draw_times(len(x), TIME_SAMPLING, device)
            z = flow.interpolate(x, noise, t)
            with amp:
                velocity = model(z, t, flow.drop_labels(labels, len(CLASSES), LABEL_DROPOUT))
            loss = flow.velocity_loss(velocity.float(), x, noise, t, t_floor)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            ema.update()
            total_loss += loss.detach()
            if step % 20 == 0:  # reading the loss makes a GPU wait: seldom
                rate = (step - first) * BATCH_SIZE / (time.monotonic() - started)
                left = ((EPOCHS - epoch + 1) * steps_per_epoch - step) * BATCH_SIZE / rate
                bar.set_postfix(loss=f"{total_loss.item() / step:.4f}", images_s=f"{rate:.0f}", left=_duration(left))
            if stop_asked():
                save(f"step_{(epoch - 1) * steps_per_epoch + step}", epoch - 1, step)
                print("stopped; run the script again to go on")
                return
            if CHECKPOINT_SAVE_STEPS and step % CHECKPOINT_SAVE_STEPS == 0 and step < steps_per_epoch:
                save(f"step_{(epoch - 1) * steps_per_epoch + step}", epoch - 1, step)

        history.append(
            {
                "epoch": epoch,
                "step": epoch * steps_per_epoch,
                "loss": total_loss.item() / steps_per_epoch,
                "learning_rate": scheduler.get_last_lr()[0],
                "images_per_second": (steps_per_epoch - first) * BATCH_SIZE / (time.monotonic() - started),
            }
        )
        done, total_loss = 0, torch.zeros((), device=device)
        if not math.isfinite(history[-1]["loss"]):
            raise InputError(f"the loss of epoch {epoch} is not finite: reduce LEARNING_RATE or MAX_GRAD_NORM")
        plots.training_curves(output, history, [["loss"], ["learning_rate"]])
        tqdm.write(f"epoch {epoch}: loss {history[-1]['loss']:.5f}, {history[-1]['images_per_second']:.0f} images/s")
        if epoch % SAMPLE_INTERVAL == 0 or epoch == EPOCHS:
            write_samples(output, epoch, ema.ema_model, device)
        if epoch == EPOCHS:  # before the other one, so that no run that was killed here lacks it
            save("final", epoch, 0)
        if epoch % CHECKPOINT_SAVE_INTERVAL == 0:
            save(f"epoch_{epoch}", epoch, 0)


def warmup_cosine(step: int, warmup: float, total: int) -> float:
    """Learning rate over LEARNING_RATE: linear warm-up, then cosine decay to MIN_LEARNING_RATE."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    lowest = MIN_LEARNING_RATE / LEARNING_RATE
    progress = (step - warmup) / max(1, total - warmup)
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))


def resume(
    output: Path,
    model: NanoDiT,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    device: torch.device,
) -> tuple[list[dict[str, float]], int, torch.Tensor]:
    """Loads the newest whole checkpoint of the run, if there is one, into everything given.

    Returns:
        The history of the epochs that are done, the steps done of the next one, and the sum of their losses.
    """
    start = [], 0, torch.zeros((), device=device)
    found = (output / "dit_conditional_ckpts").glob("dit_conditional_*.pt")
    content, problems = None, []
    for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True) if RESUME == "auto" else []:
        try:
            content = load_checkpoint(path, device)
            break
        except InputError as error:
            problems.append(str(error))
    if content is None and problems:
        raise InputError("\n".join(problems) + "\nno whole checkpoint: remove them, or --resume never starts anew")
    if content is None:
        return start
    for problem in problems:
        print(f"{problem}: going on from an older one")
    if content.get("model_config") != model.config:
        raise InputError(f"{path} is of another network: choose another --output_dir for this one")
    load_weights(model, content["model_state_dict"], path)
    ema.load_state_dict(content["ema_state_dict"])
    optimizer.load_state_dict(content["optimizer_state_dict"])
    scheduler.load_state_dict(content["scheduler_state_dict"])
    scaler.load_state_dict(content["scaler_state_dict"])
    torch.set_rng_state(content["random_states"]["cpu"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state_all([state.cpu() for state in content["random_states"]["cuda"]])
    done = content["epoch"] >= EPOCHS
    position = f"epoch {content['epoch']}" + (f", step {content['step_in_epoch']}" if content["step_in_epoch"] else "")
    print(f"{path} is at {position}" + (f": nothing to do for {EPOCHS} epochs" if done else ", going on"))
    return content["history"], content["step_in_epoch"], content["loss_in_epoch"]


def write_samples(output: Path, epoch: int, model: NanoDiT, device: torch.device) -> None:
    """A grid of samples, a row a class, and their arrays. The noise is the same every time, to show progress."""
    labels = torch.arange(len(CLASSES), device=device).repeat_interleave(NUM_SAMPLES_PER_CLASS)
    samples = flow.sample(model.eval(), labels, model.image_shape, len(CLASSES), NUM_ODE_STEPS, CFG_SCALE)
    images = flow.to_unit_range(samples).cpu().numpy()
    by_class = dict(zip(CLASSES, images.reshape(len(CLASSES), -1, IMG_SIZE, IMG_SIZE), strict=True))
    grid = plots.image_grid(by_class, f"epoch {epoch}")
    plots.save(grid, output / "dit_conditional_images" / f"sample_epoch_{epoch}.png")
    folder = output / "dit_conditional_npy" / f"sample_epoch_{epoch}"
    folder.mkdir(parents=True, exist_ok=True)
    for label, name in enumerate(CLASSES):
        for i, image in enumerate(by_class[name]):
            np.save(folder / f"class_{label}_sample_{i}.npy", image)


def warn_if_endless(network: dict, num_images: int, device: torch.device) -> None:
    """Times one step; a run of over WORTH_STARTING_HOURS is announced, with a size that takes less."""
    hours = num_images * seconds_an_image(network, device) / 3600
    if hours <= WORTH_STARTING_HOURS:
        return
    print(f"This run would take about {_duration(3600 * hours)} on this machine ({device}).")
    for name, smaller in SIZES.items():
        if smaller == network:
            continue
        hours = num_images * seconds_an_image(smaller, device) / 3600
        if hours <= WORTH_STARTING_HOURS:
            print(
                f"--model_size {name} would take {_duration(3600 * hours)}; its settings are at the top of this script."
            )
            return
    epochs = max(1, int(EPOCHS * WORTH_STARTING_HOURS / hours))
    print(f"--model_size {name} --epochs {epochs} would take {_duration(3600 * WORTH_STARTING_HOURS)}.")


def seconds_an_image(network: dict, device: torch.device) -> float:
    """Measured time of a training step, divided by its images."""
    model = NanoDiT(input_size=IMG_SIZE, num_classes=len(CLASSES), **network).to(device)
    n = BATCH_SIZE if device.type == "cuda" else min(BATCH_SIZE, max(1, 512 // model.num_tokens))
    for _ in range(2):  # the first one warms up
        started = time.monotonic()
        z, t, labels = torch.randn(n, *model.image_shape), torch.rand(n), torch.zeros(n, dtype=torch.long)
        model(z.to(device), t.to(device), labels.to(device)).square().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return (time.monotonic() - started) / n


def _size_of_constants() -> dict:
    return {
        "patch_size": PATCH_SIZE,
        "hidden_size": LATENT_DIM,
        "depth": MODEL_DEPTH,
        "num_heads": MODEL_HEADS,
        "prediction": PREDICTION,
    }


def _duration(seconds: float) -> str:
    for unit, length in (("years", 31557600), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    settings.run(main, globals())
