"""Trains NanoDiT with flow matching on the lens images of DATA_DIR.

    python train/train_diffusion.py                           # the published network, for a GPU
    python train/train_diffusion.py --recipe first_look       # a small one, in ten minutes on two cores
    torchrun --nproc_per_node=8 train/train_diffusion.py      # on the eight GPUs of a machine, with the same result

Writes to OUTPUT_DIR: dit_conditional_ckpts/ with the checkpoints, dit_conditional_images/ and dit_conditional_npy/ with
samples from the EMA weights, training_metrics.png and training_metrics.csv. A run that was stopped goes on from its
newest checkpoint; on a CPU it ends with the same bits as a run that was never stopped.
"""

import math
import sys
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from ema_pytorch import EMA
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distributed
import plots
import scaling
import settings
from dataset import NpyDataset, epoch_batches, load_parts, some_of_each_class
from models import flow
from models.checkpoint import load_checkpoint
from models.components import PrincipalComponents
from models.generator import SIZES, Generator, build_generator, build_untrained, of_today
from models.population import Population
from parameters import Parameter, are_of, fit, name_of
from settings import (
    Count,
    Epochs,
    FirstTime,
    Fraction,
    Guidance,
    InnerFraction,
    InputError,
    LastTime,
    Names,
    NotNegative,
    Positive,
    Steps,
    Whole,
)
from train.orientations import SYMMETRIES, draw_orientations, oriented, some_of_all, turned
from train.recipes import RECIPES
from train.run import Run, duration, seconds_an_image

DATA_DIR: str = "data"  # Folder with a folder of images for each class; yours, or made by simulate/simulate_lenses.py
OUTPUT_DIR: str = "diffusion_training"  # Change it to start another run beside this one
ON_BAD_FILE: Literal["raise", "skip"] = "raise"  # "skip" trains without the files that cannot be read
ON_MISSING_CLASS: Literal["raise", "go_on"] = "raise"  # "go_on" trains although a class has no images
SCALING: Literal[scaling.KINDS] = "image"  # "set" keeps flux; so does "asinh", for observed images of high contrast
AUGMENT: Literal[(*SYMMETRIES,)] = "none"  # Symmetry of the images: "square" for observed lenses; see docs/your_data.md
CACHE_DIR: str | None = None  # Where packed images are kept; None means DATA_DIR itself, if it can be written to
PARAMETERS: Names = ()  # Physical parameters to ask for, as "source_x,axion_mass:log10"; see docs/parameters.md

START_PATH: str | None = None  # A checkpoint whose network and weights to start from
MODEL_SIZE: Literal[(None, *SIZES)] = None  # None is "NanoDiT-B/2", or that of START_PATH; "NanoDiT-S/8" on a CPU
PATCH_SIZE: Count | None = None  # Pixels on a side of a patch; larger is faster. None, here and below: MODEL_SIZE's
LATENT_DIM: Count | None = None  # Width of the network
MODEL_DEPTH: Count | None = None  # Transformer blocks, or blocks of the MLP
MODEL_HEADS: Count | None = None  # Attention heads
PREDICTION: Literal[None, "velocity", "image"] = None  # "image" predicts the clean image: for patches of 8 or more

BATCH_SIZE: Count = 160  # Images a step, of all processes together; raise it with the learning rate for many GPUs
ACCUMULATE_STEPS: Count = 1  # Parts that a batch is split into; raise it when the GPU runs out of memory
LEARNING_RATE: Positive = 1e-4  # 2e-3 for NanoDiT-S/16 in batches of 16; reduce when the loss is NaN
MIN_LEARNING_RATE: NotNegative = 1e-6  # Where the cosine decay ends
WARMUP_EPOCHS: NotNegative = 10.0  # Epochs of linear warm-up; a fraction of one for short runs
EPOCHS: Epochs = 600  # More is better; the published run took 8 hours on an A100
WEIGHT_DECAY: NotNegative = 0.01  # Of AdamW
ADAM_BETA2: Fraction = 0.999  # Of AdamW; 0.99 for runs of a few thousand steps
MAX_GRAD_NORM: Positive = 1.0  # Gradients are clipped to this norm
LABEL_DROPOUT: Fraction = 0.1  # Share of images whose label and parameters training hides; guidance needs it
PARAMETER_DROPOUT: Fraction = 0.1  # Share of images that lose some or all of their parameters in training
TIME_SAMPLING: Literal["uniform", "logit_normal"] = "uniform"  # "logit_normal" for short runs with PREDICTION = "image"
TIME_MEDIAN: InnerFraction = 0.69  # Of "logit_normal"; 0.3 for ComponentMLP, whose images take shape in the last steps
TIME_WIDTH: Positive = 0.8  # Of "logit_normal", the standard deviation of the logit; 2 for ComponentMLP
EMA_BETA: Fraction = 0.9999  # 0.999 for runs of under 50000 steps
EMA_UPDATE_EVERY: Count = 10  # Steps between updates of the EMA; 1 for short runs
SEED: Whole = 42  # Of weights, order of data, times and noise

CFG_SCALE: Guidance = 5.0  # Guidance scale, 1 is no guidance; the checkpoint keeps it and all down to TOLERANCE
NUM_ODE_STEPS: Steps = 50  # Steps from noise to image
SOLVER: Literal[(*flow.SOLVERS,)] = "euler"  # "multistep" needs fewer steps; "heun" takes two NFE a step
TIME_GRID: Literal[flow.TIME_GRIDS] = "uniform"  # Spacing of the times of the steps; "logit" for SOLVER = "multistep"
FIRST_TIME: FirstTime = 0.9  # First time below 1 of TIME_GRID = "logit"; nearer to 1, with more steps, for more variety
LAST_TIME: LastTime = 0.03  # Last time above 0 of TIME_GRID = "logit"; less, with more steps, for images with noise
TOLERANCE: NotNegative | None = None  # 0.04: images that the last step changes by over 4% get twice the steps
NUM_SAMPLES_PER_CLASS: Count = 4  # Samples of each class in a grid
SAMPLE_INTERVAL: Count = 10  # Epochs between sample grids
CHECKPOINT_SAVE_INTERVAL: Count = 10  # Epochs between checkpoints
CHECKPOINT_SAVE_MINUTES: NotNegative = 3.0  # Most minutes between checkpoints; within an epoch, only the newest is kept
KEEP_CHECKPOINTS: Count = 3  # Newest checkpoints of whole epochs to keep, beside the best one by validation loss
RESUME: str = "auto"  # Goes on from the newest whole checkpoint; "never" starts anew, a path goes on from that file

AMP_DTYPE: Literal[None, "float16", "bfloat16"] = None  # "bfloat16" on a recent GPU, "float16" on an older one
COMPILE: bool = False  # True compiles the network first: for long runs on a GPU
DEVICE: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto" takes the GPU when there is one

WORTH_STARTING_HOURS: Positive = 168.0  # Where a run is estimated to take longer, a size that takes less is named

_VALIDATION_IMAGES = 512  # enough to tell the best checkpoint
_FITTED_BYTES = 2**30  # of the images, at most, that principal components are fitted to


def main() -> None:
    device = distributed.join(settings.pick_device(DEVICE))
    with distributed.main_first():
        reading = {"on_bad_file": ON_BAD_FILE, "on_missing_class": ON_MISSING_CLASS, "cache_dir": CACHE_DIR}
        images, validation = load_parts(DATA_DIR, "train", "val", **reading)
    check_settings(len(images))
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    run = Run(globals(), "dit_conditional_ckpts/dit_conditional", device, of_today)
    before = generator_before(run, images)
    images.scaling = validation.scaling = choose_scaling(images, before)
    images.images = flow.to_network_range(images.images)  # once for all epochs
    generator = prepare_generator(images, before, run.found or START_PATH)
    run.begin(images, generator.description())
    network = generator.to(device).network
    guidance = CFG_SCALE if len(images.classes) > 1 else 1.0  # guidance needs several classes
    generator.sampler = flow.Sampler(NUM_ODE_STEPS, guidance, SOLVER, TIME_GRID, TOLERANCE, LAST_TIME, FIRST_TIME)
    run.content |= {"sampler": asdict(generator.sampler)}
    phases = take_population(generator, images, run)
    announce(generator, EPOCHS * len(images))

    ema = EMA(network, beta=EMA_BETA, update_every=EMA_UPDATE_EVERY, include_online_model=False)
    optimizer = torch.optim.AdamW(
        network.parameters(), LEARNING_RATE, betas=(0.9, ADAM_BETA2), weight_decay=WEIGHT_DECAY, fused=True
    )
    scaler = torch.amp.GradScaler(device.type, enabled=AMP_DTYPE == "float16")
    amp = torch.autocast(device.type, getattr(torch, AMP_DTYPE)) if AMP_DTYPE else nullcontext()
    codec = {} if generator.codec is None else {"codec": generator.codec}
    run.restore(model=network, ema=ema, optimizer=optimizer, scaler=scaler, **codec)
    rate = partial(warmup_cosine, WARMUP_EPOCHS * run.steps_per_epoch, EPOCHS * run.steps_per_epoch)
    scheduler = run.schedule(optimizer, torch.optim.lr_scheduler.LambdaLR, rate)
    if COMPILE:
        network.compile(dynamic=False)  # batches have two sizes at most
    trained = distributed.data_parallel(network)
    if codec:  # once for all epochs, in every orientation
        parts = (turned(part, *way) for way in SYMMETRIES[AUGMENT] for part in images.images.split(4096))
        images.images = torch.cat([generator.encode(part.to(device)).cpu() for part in parts])
    images.to(device)
    averaged = generator.with_network(ema.ema_model)
    run.untrained = validation_loss(generator, lambda z, t, labels: torch.zeros_like(z), validation)

    for epoch in run.remaining_epochs():
        network.train()
        for batch in run.steps(epoch_batches(len(images), BATCH_SIZE, SEED, epoch)):
            # What is drawn for a batch depends on the seed and the step alone, not on the number of processes
            random = flow.generator_of(SEED, run.step, device)
            noise = torch.randn(len(batch), *generator.sample_shape, generator=random, device=device)
            t = flow.draw_times(len(batch), TIME_SAMPLING, random, TIME_MEDIAN, TIME_WIDTH)
            batch = batch.to(images.labels.device)
            condition = draw_condition(generator, images.labels[batch].to(device), phases, batch, random)
            ways = draw_orientations(AUGMENT, len(batch), random)

            optimizer.zero_grad()
            loss = torch.zeros((), device=device)
            parts = distributed.parts(len(batch), ACCUMULATE_STEPS)
            for part in parts:
                if codec:
                    x = images.images[batch[part] + len(images) * ways[part].to(batch.device)].to(device)
                else:
                    x = oriented(images.images[batch[part]].to(device, non_blocking=True), ways[part], AUGMENT)
                trained.require_backward_grad_sync = part is parts[-1]  # processes exchange gradients once a step
                with amp:
                    loss_of_part = generator.objective(trained, x, noise[part], t[part], condition[part])
                share = loss_of_part * len(x) / len(batch)
                scaler.scale(share * distributed.size()).backward()  # gradients are averaged over processes
                loss += share.detach()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), MAX_GRAD_NORM)
            # The scaler skips steps that overflow and goes on with a smaller scale
            overflow = scaler.is_enabled() and not norm.isfinite() and scaler.get_scale() > 1
            loss, stop = run.check(loss, 0.0 if overflow else norm.item())
            if stop:
                return
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            ema.update()
            run.add(len(batch), loss, skipped=overflow)

        val_loss = validation_loss(generator, averaged.network, validation) if distributed.is_main() else math.nan
        row = {"step": run.step, "loss": run.mean("loss"), "val_loss": val_loss}
        row |= {"learning_rate": scheduler.get_last_lr()[0], "skipped_steps": run.sums["skipped"]}
        row |= {"images_per_second": run.images_per_second()}
        run.end_epoch(row, [["loss", "val_loss"], ["learning_rate"]])
        if distributed.is_main():
            report(run.history)
            if epoch % SAMPLE_INTERVAL == 0 or epoch == EPOCHS:
                write_samples(Path(OUTPUT_DIR), epoch, averaged)
        loss = validation_loss(generator, network.forward, validation, BATCH_SIZE)  # of the weights to be saved
        run.save_epoch(loss, CHECKPOINT_SAVE_INTERVAL, KEEP_CHECKPOINTS, best="val_loss")


def check_settings(num_images: int) -> None:
    """Refuses settings that contradict each other or do not fit the images.

    Raises:
        InputError: with the names of those settings.
    """
    if num_images < BATCH_SIZE:
        fewer = f"take --batch_size {max(1, num_images // 4)}"
        what = f"--batch_size {BATCH_SIZE} is more than the {num_images} training images of {DATA_DIR}"
        raise InputError(f"{what}: {fewer}, or add images", 2)
    steps_per_epoch = math.ceil(num_images / BATCH_SIZE)
    if num_images // steps_per_epoch < distributed.size() * ACCUMULATE_STEPS:
        raise InputError(
            f"--batch_size {BATCH_SIZE} leaves no image for some of the {distributed.size()} processes x "
            f"{ACCUMULATE_STEPS} accumulation steps: raise it",
            2,
        )
    if EPOCHS * steps_per_epoch < EMA_UPDATE_EVERY:
        raise InputError(f"EMA_UPDATE_EVERY {EMA_UPDATE_EVERY} is more than all steps: take fewer, or more EPOCHS", 2)
    if CFG_SCALE != 1 and LABEL_DROPOUT == 0:
        raise InputError(f"CFG_SCALE {CFG_SCALE:g} needs hidden labels: raise LABEL_DROPOUT, or take CFG_SCALE 1", 2)
    if WARMUP_EPOCHS >= EPOCHS:
        raise InputError(
            f"WARMUP_EPOCHS {WARMUP_EPOCHS:g} must be less than EPOCHS {EPOCHS}: the warm-up never ends", 2
        )
    if MIN_LEARNING_RATE > LEARNING_RATE:
        raise InputError(f"MIN_LEARNING_RATE {MIN_LEARNING_RATE:g} is more than LEARNING_RATE {LEARNING_RATE:g}", 2)


def generator_before(run: Run, images: NpyDataset) -> Generator | None:
    """The generator of the checkpoint that a run goes on from, or the one at START_PATH, or None.

    Raises:
        InputError: when it has other classes, or is for other images.
    """
    path = run.found or START_PATH
    if not path:
        return None
    before = build_generator(run.state or load_checkpoint(path), path)
    advice = "choose another --output_dir for this one" if run.found else "choose another --start_path"
    images.check_match(path, before.classes, before.image_shape, advice)
    return before


def choose_scaling(images: NpyDataset, before: Generator | None) -> scaling.Scaling:
    """SCALING fitted to these images, or the scaling of the generator to go on with.

    Raises:
        InputError: when that generator has another kind of scaling, or these images are not brighter than their sky.
    """
    if before:
        if before.scaling.kind != SCALING:
            raise InputError(f"the generator to go on with takes images with --scaling {before.scaling.kind}", 2)
        return before.scaling
    some = some_of_each_class(images.labels, 200)
    low, high = (torch.from_numpy(values[some]) for values in (images.low, images.high))
    try:
        return scaling.Scaling.of(SCALING, images.read(some), low, high)
    except ValueError as error:
        raise InputError(f"--scaling {SCALING}: {error}; --scaling image takes such images") from None


def choose_parameters(images: NpyDataset, before: Generator | None) -> tuple[Parameter, ...]:
    """PARAMETERS fitted to these images, or those of the generator to go on with, if it has any.

    Raises:
        InputError: when these two differ, or when AUGMENT turns images, whose parameters would no longer be true.
    """
    names = [name_of(specification) for specification in PARAMETERS]
    if AUGMENT != "none" and (names or (before and before.lens_parameters)):
        raise InputError(f"--augment {AUGMENT} turns images, but not their parameters: leave out one of the two", 2)
    if before and before.lens_parameters:
        if names and not are_of(PARAMETERS, before.lens_parameters):
            told = ",".join(of.specification for of in before.lens_parameters)
            raise InputError(f"the generator to go on with has other parameters, order or scales: {told}", 2)
        images.phases(before.lens_parameters)  # raises an error that says what is missing
        return before.lens_parameters
    if not names:
        return ()
    found = fit(PARAMETERS, columns := images.columns(names), [images.classes[label] for label in images.labels])
    shares = (
        f"{of}, {of.scale}, known of {np.isfinite(columns[of.name].values).mean():.0%} of the images" for of in found
    )
    print("parameters:", *shares, sep="\n  ")
    return tuple(found)


def prepare_generator(images: NpyDataset, before: Generator | None, path: str | Path | None) -> Generator:
    """The generator of MODEL_SIZE, changed by the constants set beside it, or that of START_PATH with its weights.

    Args:
        before: the generator to go on with, from the checkpoint at ``path``; its principal components are kept.

    Raises:
        InputError: for a network that is impossible, or differs from that of START_PATH.
    """
    parameters = choose_parameters(images, before)
    sizes = {"patch_size": PATCH_SIZE, "hidden_size": LATENT_DIM, "depth": MODEL_DEPTH, "num_heads": MODEL_HEADS}
    given = {name: value for name, value in (sizes | {"prediction": PREDICTION}).items() if value is not None}
    if START_PATH:
        size = dict(SIZES.get(MODEL_SIZE, {}))
        size.pop("components", None)  # it keeps its own
        return start_from(before, path, size | given, parameters)
    size = MODEL_SIZE or "NanoDiT-B/2"
    changes, codec = dict(given), None
    if components := SIZES[size].get("components"):
        codec = before.codec if before else None
        if codec is None:
            some = some_of_all(images.images, AUGMENT, min(8192, _FITTED_BYTES // images.images[0].nbytes))
            codec = distributed.from_main(PrincipalComponents.fitted(some, components, images.scaling.keeps_flux))
        changes |= {"components": len(codec.standard_deviation)} | codec.config
    try:
        generator = build_untrained(size, images.classes, images.image_shape, parameters, **changes)
        generator.scaling = images.scaling
        if codec is not None:
            generator.codec.load_state_dict(codec.state_dict())
            generator.network.adapt_to(codec)
    except ValueError as error:
        raise InputError(f"no such network: {error}", 2) from None
    except TypeError:  # an argument that its class does not have
        raise InputError(f"no such network: {size} has not all of {', '.join(given)}", 2) from None
    changed = "".join(f", but {name} {value}" for name, value in given.items())
    print(f"network: {size}{changed}: {in_words(generator)}")
    if getattr(generator.network, "patch_size", 0) >= 8 and generator.prediction == "velocity":
        print('a network of such large patches learns the velocity badly: PREDICTION = "image" is made for them')
    return generator


def in_words(generator: Generator) -> str:
    """How the network sees an image."""
    if generator.codec is not None:
        noise = ", and the noise that they leave over" if generator.codec.noise else ""
        return f"{generator.codec.vectors.shape[1]} principal components of the images{noise}"
    if patch := getattr(generator.network, "patch_size", None):
        grid = generator.network.grid_size
        return f"{grid}x{grid} patches of {patch} pixels"
    return f"images of {generator.image_shape}"


def start_from(
    generator: Generator, path: str | Path, wanted: dict[str, Any], parameters: tuple[Parameter, ...]
) -> Generator:
    """The generator at START_PATH, or of a run that began with it, to be trained further. If it had no parameters, it
    gets ``parameters``.

    Args:
        path: of its checkpoint.
        wanted: the size and prediction that the constants ask for.

    Raises:
        InputError: when the generator differs from ``wanted``.
    """
    known = generator.description()
    known |= known["model_config"]
    if other := [f"{name} {value}" for name, value in wanted.items() if known.get(name) != value]:
        advice = "leave that to it" if path == START_PATH else "choose another --output_dir for this one"
        raise InputError(f"{path} is of another network, not of {', '.join(other)}: {advice}", 2)
    print(f"network: that of {path}")
    return generator.with_parameters(parameters)


def take_population(generator: Generator, images: NpyDataset, run: Run) -> Tensor | None:
    """Phases (n, parameters) of the images, or None without parameters; the generator and its checkpoints keep some."""
    phases = generator.phases_of(images)
    if phases is not None:
        generator.population = Population.of(images.labels, phases, generator.lens_parameters)
        run.content |= {"population_state_dict": generator.population.state_dict()}
    return phases


def draw_condition(
    generator: Generator, labels: Tensor, phases: Tensor | None, batch: Tensor, random: torch.Generator
) -> Tensor:
    """What the network is told about the images of a batch: their labels and parameters, some of them hidden."""
    null_label = len(generator.classes)
    labels = flow.drop_labels(labels, null_label, LABEL_DROPOUT, random)
    if phases is None:
        return labels
    phases = phases[batch.cpu()].to(labels.device)
    known = flow.hide(phases, PARAMETER_DROPOUT, random)
    return generator.condition(labels, known.masked_fill((labels == null_label)[:, None], math.nan))


def warmup_cosine(warmup: float, total: int, step: int) -> float:
    """Learning rate over LEARNING_RATE: linear warm-up, then cosine decay to MIN_LEARNING_RATE."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    lowest = MIN_LEARNING_RATE / LEARNING_RATE
    progress = (step - warmup) / max(1, total - warmup)
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))


@torch.no_grad()
def validation_loss(
    generator: Generator, network: flow.Velocity | nn.Module, dataset: NpyDataset, most: int = _VALIDATION_IMAGES
) -> float:
    """Loss of a network on at most ``most`` validation images; images, times and noise are the same every time."""
    random = flow.generator_of(SEED, 0, generator.device)
    index = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:most]
    phases = generator.phases_of(dataset)
    total = 0.0
    for some in index.split(BATCH_SIZE):
        x = generator.encode(flow.to_network_range(dataset.read(some)).to(generator.device))
        noise = torch.randn(x.shape, generator=random, device=generator.device)
        t = flow.draw_times(len(x), TIME_SAMPLING, random, TIME_MEDIAN, TIME_WIDTH)
        known = None if phases is None else phases[some]
        condition = generator.condition(dataset.labels[some], known).to(generator.device)
        total += generator.objective(network, x, noise, t, condition).item() * len(x)
    return total / len(index)


def report(history: list[dict[str, float]]) -> None:
    """Prints the last epoch in a line."""
    row = history[-1]
    best = row["val_loss"] == min(row["val_loss"] for row in history)
    skipped = f", {row['skipped_steps']} steps skipped in float16" if row["skipped_steps"] else ""
    tqdm.write(
        f"epoch {row['epoch']}: loss {row['loss']:.5f}, validation {row['val_loss']:.5f}{' (best)' if best else ''}, "
        f"{row['images_per_second']:.0f} images/s{skipped}"
    )


def write_samples(output: Path, epoch: int, generator: Generator) -> None:
    """Writes a grid of samples, a row a class, and their arrays. The noise is the same every time, to show progress."""
    labels = torch.arange(len(generator.classes)).repeat_interleave(NUM_SAMPLES_PER_CLASS)
    images = generator.generate(labels).numpy()
    by_class = {name: images[labels == label] for label, name in enumerate(generator.classes)}
    plots.save(
        plots.image_grid(by_class, f"epoch {epoch}"), output / "dit_conditional_images" / f"sample_epoch_{epoch}.png"
    )
    folder = output / "dit_conditional_npy" / f"sample_epoch_{epoch}"
    folder.mkdir(parents=True, exist_ok=True)
    for label, of_class in enumerate(by_class.values()):
        for i, image in enumerate(generator.scaling.undo(torch.from_numpy(of_class)).numpy()):
            np.save(folder / f"class_{label}_sample_{i}.npy", image[0] if len(image) == 1 else image)


def announce(generator: Generator, num_images: int) -> None:
    """Prints what is trained; if that would take over WORTH_STARTING_HOURS, also a size that takes less."""
    processes = f", {distributed.size()} processes" if distributed.size() > 1 else ""
    parameters = sum(p.numel() for p in generator.parameters() if p.requires_grad)
    print(f"{parameters:,} trainable parameters, training on {generator.device.type}{processes}")
    if not distributed.is_main():
        return

    def hours(of: Generator) -> float:
        return num_images / distributed.size() * seconds_an_image(of, BATCH_SIZE) / 3600

    taken = hours(generator)
    if taken <= WORTH_STARTING_HOURS:
        return
    print(f"This run would take about {duration(3600 * taken)} on this machine ({generator.device}).")
    for name in SIZES:
        try:
            smaller = build_untrained(name, generator.classes, generator.image_shape)
        except ValueError:  # fewer pixels than components
            continue
        taken, possible = hours(smaller.to(generator.device)), name
        if taken <= WORTH_STARTING_HOURS:
            print(f"--model_size {name} would take {duration(3600 * taken)}; see --recipe for its settings.")
            return
    epochs = max(1, int(EPOCHS * WORTH_STARTING_HOURS / taken))
    print(f"--model_size {possible} --epochs {epochs} would take {duration(3600 * WORTH_STARTING_HOURS)}.")


if __name__ == "__main__":
    settings.run(main, globals(), torchrun=True, recipes=RECIPES)
