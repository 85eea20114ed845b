"""Trains NanoDiT with flow matching on the lens images of DATA_DIR.

    python train/train_diffusion.py      # the published network, for a GPU; the README has the settings for a CPU
    torchrun --nproc_per_node=8 train/train_diffusion.py      # on the eight GPUs of a machine, with the same result

Writes to OUTPUT_DIR: dit_conditional_ckpts/ with the checkpoints, dit_conditional_images/ and dit_conditional_npy/ with
samples from the EMA weights, training_metrics.png and training_metrics.csv. A run that was stopped goes on from its
newest checkpoint, on a CPU to the last bit as if it had not been.
"""

import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from ema_pytorch import EMA
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distributed
import plots
import settings
from dataset import CLASSES, NpyDataset, diffusion_transforms, epoch_batches, load_parts
from models import flow
from models.checkpoint import build_generator, load_checkpoint, save_checkpoint
from models.model import SIZES, NanoDiT
from settings import Count, Epochs, Fraction, Guidance, InnerFraction, InputError, NotNegative, Positive, Steps, Whole
from train.previews import write_samples
from train.safety import Checkpoints, advance, announce, restore

DATA_DIR: str = "data"  # Folder with axion/, cdm/ and no_sub/; yours, or made by simulate/simulate_lenses.py
OUTPUT_DIR: str = "diffusion_training"  # Change it to start another run beside this one
ON_BAD_FILE: Literal["raise", "skip"] = "raise"  # "skip" trains without the files that cannot be read
ON_MISSING_CLASS: Literal["raise", "go_on"] = "raise"  # "go_on" trains although a class has no images
CACHE_DIR: str | None = None  # Where packed images are kept; None is in DATA_DIR itself, if it can be written to

START_PATH: str | None = None  # A checkpoint whose network and weights to start from
MODEL_SIZE: Literal[(None, *SIZES)] = None  # None is "NanoDiT-B/2", or that of START_PATH; "NanoDiT-S/8" on a CPU
PATCH_SIZE: Count | None = None  # Pixels a token; here and below, None is that of MODEL_SIZE. Larger is faster
PATCH_BASIS: Whole | None = None  # Principal components that stand for a patch; 0 takes its pixels
LATENT_DIM: Count | None = None  # Width of the network
MODEL_DEPTH: Count | None = None  # Transformer blocks
MODEL_HEADS: Count | None = None  # Attention heads
PREDICTION: Literal[None, "velocity", "image"] = None  # "image" predicts the clean image: for patches of 8 or more
IMG_SIZE: Literal[64] = 64  # Pixels of the images

BATCH_SIZE: Count = 160  # Images a step, of all processes together; raise it with the learning rate for many GPUs
ACCUMULATE_STEPS: Count = 1  # Parts a batch is taken in; raise it when the GPU runs out of memory
LEARNING_RATE: Positive = 1e-4  # 2e-3 for NanoDiT-S/16 in batches of 16; reduce when the loss is NaN
MIN_LEARNING_RATE: NotNegative = 1e-6  # Where the cosine decay ends
WARMUP_EPOCHS: NotNegative = 10.0  # Epochs of linear warm-up; a fraction of one for short runs
EPOCHS: Epochs = 600  # More is better; the published run took 8 hours on an A100
WEIGHT_DECAY: NotNegative = 0.01  # Of AdamW
ADAM_BETA2: Fraction = 0.999  # Of AdamW; 0.99 for runs of a few thousand steps
MAX_GRAD_NORM: Positive = 1.0  # Gradients are clipped to this norm
LABEL_DROPOUT: Fraction = 0.1  # Share of labels hidden in training; guidance needs it
TIME_SAMPLING: Literal["uniform", "logit_normal"] = "uniform"  # "logit_normal" for short runs with PREDICTION = "image"
TIME_MEDIAN: InnerFraction = 0.69  # Of "logit_normal"; 0.3 for a patch basis, whose images are made by the last steps
TIME_WIDTH: Positive = 0.8  # Likewise; 2 for a patch basis
EMA_BETA: Fraction = 0.9999  # 0.999 for runs of under 50000 steps
EMA_UPDATE_EVERY: Count = 10  # Steps between updates of the EMA; 1 for short runs
SEED: Whole = 42  # Of weights, order of data, times and noise

CFG_SCALE: Guidance = 5.0  # Guidance scale of samples, wherever the checkpoint is used; 1 is no guidance
NUM_ODE_STEPS: Steps = 50  # From noise to image, likewise
SOLVER: Literal[(*flow.SOLVERS,)] = "euler"  # Likewise; "multistep" needs fewer steps, and "heun", of two passes each
TIME_GRID: Literal[flow.TIME_GRIDS] = "uniform"  # Of the steps; "logit" for SOLVER = "multistep"
TOLERANCE: NotNegative | None = None  # 0.04: images that the last step changes by over 4% get twice the steps
NUM_SAMPLES_PER_CLASS: Count = 4  # Samples of each class in a grid
SAMPLE_INTERVAL: Count = 10  # Epochs between sample grids
CHECKPOINT_SAVE_INTERVAL: Count = 10  # Epochs between checkpoints
CHECKPOINT_SAVE_MINUTES: NotNegative = 3.0  # At most between checkpoints, within an epoch too, where the newest is kept
KEEP_CHECKPOINTS: Count = 3  # Newest checkpoints of whole epochs to keep, beside the best one by validation loss
RESUME: str = "auto"  # Goes on from the newest whole checkpoint; "never" starts anew, a path goes on from that file

AMP_DTYPE: Literal[None, "float16", "bfloat16"] = None  # "bfloat16" on a recent GPU, "float16" on an older one
COMPILE: bool = False  # True compiles the network first: for long runs on a GPU
DEVICE: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto" takes the GPU when there is one

WORTH_STARTING_HOURS: Positive = 168.0  # A run estimated to take longer is announced with the size that would not

_VALIDATION_IMAGES = 512  # enough to tell the best checkpoint


def main() -> None:
    device = distributed.join(settings.pick_device(DEVICE))
    check_settings()
    output = Path(OUTPUT_DIR)
    with distributed.main_first():
        dataset, validation = load_parts(
            DATA_DIR,
            *("train", "val"),
            on_bad_file=ON_BAD_FILE,
            on_missing_class=ON_MISSING_CLASS,
            cache_dir=CACHE_DIR,
        )
    if len(dataset) < BATCH_SIZE:
        raise InputError(f"--batch_size {BATCH_SIZE} is more than the {len(dataset)} training images of {DATA_DIR}", 2)
    steps_per_epoch = math.ceil(len(dataset) / BATCH_SIZE)
    if len(dataset) // steps_per_epoch < distributed.size() * ACCUMULATE_STEPS:
        raise InputError(
            f"--batch_size {BATCH_SIZE} leaves no image for some of the {distributed.size()} processes x "
            f"{ACCUMULATE_STEPS} accumulation steps: raise it",
            2,
        )
    if EPOCHS * steps_per_epoch < EMA_UPDATE_EVERY:
        raise InputError(f"EMA_UPDATE_EVERY {EMA_UPDATE_EVERY} is more than all steps: the EMA would stay untrained", 2)
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    dataset.images = diffusion_transforms(dataset.images)  # once and for all epochs
    model = build_network(dataset)
    checkpoints = Checkpoints(
        __file__,
        output,
        "dit_conditional_ckpts",
        "dit_conditional_*.pt",
        RESUME,
        CHECKPOINT_SAVE_MINUTES,
        device,
        model_config=model.config,
    )
    announce(checkpoints, EPOCHS, settings.constants(globals()), dataset.identity)
    model.sampler = flow.Sampler(NUM_ODE_STEPS, CFG_SCALE, SOLVER, TIME_GRID, TOLERANCE)
    model.to(device)
    processes = f", {distributed.size()} processes" if distributed.size() > 1 else ""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{parameters:,} trainable parameters, training on {device.type}{processes}")
    if distributed.is_main():
        warn_if_endless(model.config, EPOCHS * len(dataset) // distributed.size(), device)

    ema = EMA(model, beta=EMA_BETA, update_every=EMA_UPDATE_EVERY, include_online_model=False)
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=(0.9, ADAM_BETA2), weight_decay=WEIGHT_DECAY, fused=True
    )
    scaler = torch.amp.GradScaler(device.type, enabled=AMP_DTYPE == "float16")
    amp = torch.autocast(device.type, getattr(torch, AMP_DTYPE)) if AMP_DTYPE else nullcontext()
    t_floor = flow.T_FLOOR if model.prediction == "image" else 0.0
    restore(checkpoints, model, ema, optimizer)
    state = checkpoints.state
    if state:
        scaler.load_state_dict(state["scaler_state_dict"])
        torch.set_rng_state(state["random_states"]["cpu"].cpu())
        if device.type == "cuda" and len(state["random_states"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([state.cpu() for state in state["random_states"]["cuda"]])
    else:
        state = {"epoch": 0, "step_in_epoch": 0, "steps_per_epoch": 1, "sums_in_epoch": (0.0, 0, 0), "history": []}
    history = state["history"]
    total_loss, seen, skipped = state.get("sums_in_epoch", (0.0, 0, 0))  # those of older versions counted steps
    # After another batch size, the part of the epoch that is done stays done
    done = state["step_in_epoch"] * steps_per_epoch // state["steps_per_epoch"]
    global_step = state["epoch"] * steps_per_epoch + done
    warmup, all_steps = WARMUP_EPOCHS * steps_per_epoch, EPOCHS * steps_per_epoch
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, all_steps))
    advance(scheduler, global_step)
    if COMPILE:
        model.compile(dynamic=False)  # batches have two sizes at most
    trained = distributed.data_parallel(model)
    if model.patch_basis is not None:  # now that all processes have that of the first one
        dataset.images = torch.cat([model.encode(part.to(device)).cpu() for part in dataset.images.split(4096)])
    dataset.to(device)
    untrained = validation_loss(model, validation, t_floor, output_of_zeros(model))
    rate = ("LEARNING_RATE", LEARNING_RATE)
    stop_asked = settings.stop_on_signal()

    def save(name: str, epoch: int, step: int) -> None:
        """After a number of whole epochs and steps of the next one."""
        if not distributed.is_main():
            return
        path = checkpoints.folder / f"dit_conditional_{name}.pt"
        save_checkpoint(
            path,
            model_state_dict=model.state_dict(),
            ema_state_dict=ema.state_dict(),
            optimizer_state_dict=optimizer.state_dict(),
            scheduler_state_dict=scheduler.state_dict(),
            scaler_state_dict=scaler.state_dict(),
            random_states={"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
            model_config=model.config,
            sampler=asdict(model.sampler),
            epoch=epoch,
            step_in_epoch=step,
            steps_per_epoch=steps_per_epoch,
            sums_in_epoch=(total_loss, seen, skipped),
            global_step=epoch * steps_per_epoch + step,
            history=history,
            settings=settings.constants(globals()),
            data=dataset.identity,
            run=checkpoints.run,
            script=checkpoints.script,
        )
        remove_others(checkpoints, path, history)
        tqdm.write(f"saved {path}")

    for epoch in range(len(history) + 1, EPOCHS + 1):
        model.train()
        started, seen_before = time.monotonic(), seen
        batches = epoch_batches(len(dataset), BATCH_SIZE, SEED, epoch)[done:]
        bar = tqdm(batches, f"epoch {epoch}/{EPOCHS}", steps_per_epoch, initial=done, unit="step", leave=False)
        for step, batch in enumerate(bar, done + 1):
            global_step = (epoch - 1) * steps_per_epoch + step
            # What is drawn for a batch depends on the seed and the step alone, not on the number of processes
            random = flow.generator_of(SEED, global_step, device)
            noise = torch.randn(len(batch), *model.sample_shape, generator=random, device=device)
            t = flow.draw_times(len(batch), TIME_SAMPLING, random, TIME_MEDIAN, TIME_WIDTH)
            batch = batch.to(dataset.labels.device)
            labels = flow.drop_labels(dataset.labels[batch].to(device), len(CLASSES), LABEL_DROPOUT, random)

            optimizer.zero_grad()
            loss = torch.zeros((), device=device)
            parts = distributed.parts(len(batch), ACCUMULATE_STEPS)
            for part in parts:
                x = dataset.images[batch[part]].to(device, non_blocking=True)
                z = flow.interpolate(x, noise[part], t[part])
                trained.require_backward_grad_sync = part is parts[-1]  # processes exchange gradients once a step
                with amp:
                    velocity = trained(z, t[part], labels[part])
                loss_of_part = flow.velocity_loss(velocity.float(), noise[part] - x, t[part], t_floor, model.weigh)
                share = loss_of_part * len(x) / len(batch)
                scaler.scale(share * distributed.size()).backward()  # gradients are averaged over processes
                loss += share.detach()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            loss, stop = distributed.total(loss, stop_asked())
            # The scaler leaves out steps that overflow and goes on with smaller numbers
            overflow = scaler.is_enabled() and not norm.isfinite() and scaler.get_scale() > 1
            sound = checkpoints.is_sound(global_step, loss, untrained, rate, 0.0 if overflow else norm.item())
            if sound and (stop or (checkpoints.due())):  # the weights as the loss has just found them
                save(f"step_{global_step - 1}", epoch - 1, step - 1)
            if stop:
                print("stopped; run the script again to go on")
                return
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            ema.update()
            total_loss += loss * len(batch)
            seen += len(batch)
            skipped += overflow
            speed = (seen - seen_before) / (time.monotonic() - started)
            left = ((EPOCHS - epoch + 1) * steps_per_epoch - step) * BATCH_SIZE / speed
            shown = {"skipped": skipped} if scaler.is_enabled() else {}
            bar.set_postfix(
                loss=f"{total_loss / seen:.4f}", images_s=f"{speed:.0f}", left=duration(left), **shown, refresh=False
            )

        history.append(
            {
                "epoch": epoch,
                "step": global_step,
                "loss": total_loss / seen,
                "val_loss": (
                    validation_loss(ema.ema_model, validation, t_floor) if distributed.is_main() else math.nan
                ),
                "learning_rate": scheduler.get_last_lr()[0],
                "skipped_steps": skipped,
                "images_per_second": (seen - seen_before) / (time.monotonic() - started),
            }
        )
        done, total_loss, seen, skipped = 0, 0.0, 0, 0
        if distributed.is_main():
            report(output, history)
            if epoch % SAMPLE_INTERVAL == 0 or epoch == EPOCHS:
                write_samples(output, epoch, ema.ema_model, NUM_SAMPLES_PER_CLASS)
        loss = validation_loss(model, validation, t_floor, model.forward, BATCH_SIZE)  # of the weights to be saved
        if not checkpoints.is_sound(global_step, loss, untrained, rate, last=epoch == EPOCHS):
            tqdm.write(f"epoch {epoch} is not saved: loss {loss:.3g}, that of an untrained network is {untrained:.3g}")
            continue
        if epoch == EPOCHS:  # before the other one, so that no run that was killed here lacks it
            save("final", epoch, 0)
        if epoch % CHECKPOINT_SAVE_INTERVAL == 0:
            save(f"epoch_{epoch}", epoch, 0)


def check_settings() -> None:
    """Refuses settings of which one defeats another.

    Raises:
        InputError: that names them.
    """
    if CFG_SCALE != 1 and LABEL_DROPOUT == 0:
        raise InputError(f"CFG_SCALE {CFG_SCALE:g} needs hidden labels: raise LABEL_DROPOUT, or take CFG_SCALE 1", 2)
    if WARMUP_EPOCHS >= EPOCHS:
        raise InputError(
            f"WARMUP_EPOCHS {WARMUP_EPOCHS:g} must be less than EPOCHS {EPOCHS}: the rate never gets there", 2
        )
    if MIN_LEARNING_RATE > LEARNING_RATE:
        raise InputError(f"MIN_LEARNING_RATE {MIN_LEARNING_RATE:g} is more than LEARNING_RATE {LEARNING_RATE:g}", 2)


def build_network(dataset: NpyDataset) -> NanoDiT:
    """The network of MODEL_SIZE and of the constants that are set beside it, or that of START_PATH with its weights.

    Raises:
        InputError: for a network that cannot be, or is not that of START_PATH.
    """
    sizes = {"patch_size": PATCH_SIZE, "patch_basis": PATCH_BASIS, "hidden_size": LATENT_DIM, "depth": MODEL_DEPTH}
    sizes |= {"num_heads": MODEL_HEADS, "prediction": PREDICTION}
    given = {name: value for name, value in sizes.items() if value is not None}
    if START_PATH:
        start = build_generator(load_checkpoint(START_PATH), START_PATH)
        wanted = (SIZES[MODEL_SIZE] if MODEL_SIZE else {}) | given
        if other := [f"{name} {value}" for name, value in wanted.items() if start.config[name] != value]:
            raise InputError(f"{START_PATH} is of another network, not of {', '.join(other)}: leave that to it", 2)
        model = NanoDiT(**start.config)
        model.load_state_dict(start.state_dict())
        print(f"network: that of {START_PATH}")
        return model
    base = MODEL_SIZE or "NanoDiT-B/2"
    try:
        model = NanoDiT(input_size=IMG_SIZE, num_classes=len(CLASSES), **(SIZES[base] | given))
        model.fit_basis(dataset.images)
    except ValueError as error:
        raise InputError(f"no such network: {error}", 2) from None
    print(f"network: {base}" + "".join(f", but {name} {value}" for name, value in given.items()))
    if model.patch_size >= 8 and model.prediction == "velocity":
        print(f'patches of {model.patch_size} pixels learn the velocity badly: PREDICTION = "image" is made for them')
    return model


def output_of_zeros(model: NanoDiT) -> flow.Velocity:
    """The velocity of an untrained network: AdaLN-Zero begins with an output of zeros."""
    if model.prediction == "image":
        return lambda z, t, labels: flow.velocity_from_image(torch.zeros_like(z), z, t)
    return lambda z, t, labels: torch.zeros_like(z)


def warmup_cosine(step: int, warmup: float, total: int) -> float:
    """Learning rate over LEARNING_RATE: linear warm-up, then cosine decay to MIN_LEARNING_RATE."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    lowest = MIN_LEARNING_RATE / LEARNING_RATE
    progress = (step - warmup) / max(1, total - warmup)
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))


def remove_others(checkpoints: Checkpoints, newest: Path, history: list[dict[str, float]]) -> None:
    """Removes older checkpoints within an epoch, and those of whole epochs but the newest and the best."""
    epoch_of = {newest.with_name(f"dit_conditional_epoch_{row['epoch']}.pt"): row["val_loss"] for row in history}
    there = [path for path in epoch_of if path.exists()]
    best = min(there, key=epoch_of.get, default=newest)
    checkpoints.keep(newest, "dit_conditional_epoch_*.pt", KEEP_CHECKPOINTS, but=best)
    checkpoints.keep(newest, "dit_conditional_step_*.pt", 1 if "_step_" in newest.name else 0)


@torch.no_grad()
def validation_loss(
    model: NanoDiT,
    dataset: NpyDataset,
    t_floor: float,
    velocity: flow.Velocity | None = None,
    most: int = _VALIDATION_IMAGES,
) -> float:
    """Loss on at most so many validation images; they, their times and noise are the same every time.

    Of ``velocity``, where it is given, instead of the model's.
    """
    device = model.pos_embed.device
    random = flow.generator_of(SEED, 0, device)
    index = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:most]
    velocity_of = velocity or model.eval()
    total = 0.0
    for some in index.split(BATCH_SIZE):
        x = model.encode(diffusion_transforms(dataset.read(some)).to(device))
        noise = torch.randn(x.shape, generator=random, device=device)
        t = flow.draw_times(len(x), TIME_SAMPLING, random, TIME_MEDIAN, TIME_WIDTH)
        predicted = velocity_of(flow.interpolate(x, noise, t), t, dataset.labels[some].to(device))
        total += flow.velocity_loss(predicted, noise - x, t, t_floor, model.weigh).item() * len(x)
    return total / len(index)


def report(output: Path, history: list[dict[str, float]]) -> None:
    """The last epoch in a line, and the curves of all."""
    row = history[-1]
    plots.training_curves(output, history, [["loss", "val_loss"], ["learning_rate"]])
    best = row["val_loss"] == min(row["val_loss"] for row in history)
    skipped = f", {row['skipped_steps']} steps skipped in float16" if row["skipped_steps"] else ""
    tqdm.write(
        f"epoch {row['epoch']}: loss {row['loss']:.5f}, validation {row['val_loss']:.5f}{' (best)' if best else ''}, "
        f"{row['images_per_second']:.0f} images/s{skipped}"
    )


def warn_if_endless(network: dict, num_images: int, device: torch.device) -> None:
    """Times one step; a run of over WORTH_STARTING_HOURS is announced, with a size that takes less."""
    hours = num_images * seconds_an_image(network, device) / 3600
    if hours <= WORTH_STARTING_HOURS:
        return
    print(f"This run would take about {duration(3600 * hours)} on this machine ({device}).")
    for name, smaller in SIZES.items():
        if smaller.items() <= network.items():
            continue
        hours = num_images * seconds_an_image(smaller, device) / 3600
        if hours <= WORTH_STARTING_HOURS:
            print(
                f"--model_size {name} would take {duration(3600 * hours)}; its settings are at the top of this script."
            )
            return
    epochs = max(1, int(EPOCHS * WORTH_STARTING_HOURS / hours))
    print(f"--model_size {name} --epochs {epochs} would take {duration(3600 * WORTH_STARTING_HOURS)}.")


def seconds_an_image(network: dict, device: torch.device) -> float:
    """Measured time of a training step, divided by its images."""
    model = NanoDiT(**network).to(device)
    n = BATCH_SIZE if device.type == "cuda" else min(BATCH_SIZE, max(1, 512 // model.num_tokens))
    for _ in range(2):  # the first one warms up
        started = time.monotonic()
        z, t, labels = torch.randn(n, *model.sample_shape), torch.rand(n), torch.zeros(n, dtype=torch.long)
        model(z.to(device), t.to(device), labels.to(device)).square().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return (time.monotonic() - started) / n


def duration(seconds: float) -> str:
    """A time for people."""
    for unit, length in (("years", 31557600), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    settings.run(main, globals(), torchrun=True)
