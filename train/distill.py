"""Teaches a generator to take few steps: a student learns the long steps of the path that its teacher takes in many.

    python train/distill.py --checkpoint_path C      # of train_diffusion.py, without guidance or with CFG_SCALE

From noise, the teacher walks to an image in TEACHER_STEPS small steps, and passes the times at which the student has
its NUM_ODE_STEPS. Between two of those the student learns the average velocity, so that one step of its own arrives
where the teacher did: progressive distillation (Salimans & Ho 2022, arXiv:2202.00512) in one go, or the average
velocity of MeanFlow (arXiv:2505.13447) at a few times. It needs no data but the noise it draws.

Writes to OUTPUT_DIR checkpoints, samples and curves as train_diffusion.py does; the generator of the checkpoints takes
NUM_ODE_STEPS passes and no guidance. A run that was stopped goes on from its newest checkpoint.
"""

import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from ema_pytorch import EMA
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plots
import settings
from dataset import epoch_batches
from models import flow
from models.checkpoint import build_generator, checksum, load_checkpoint, save_checkpoint
from models.model import NanoDiT
from settings import Count, Epochs, Fraction, Guidance, InputError, NotNegative, Positive, Steps, Whole
from train.previews import write_samples
from train.safety import Checkpoints, advance, announce, restore

CHECKPOINT_PATH: str = "diffusion_training/dit_conditional_ckpts/dit_conditional_final.pt"  # The teacher
OUTPUT_DIR: str = "distillation"  # Change it for another student

NUM_ODE_STEPS: Steps = 4  # Passes the student takes for an image
TEACHER_STEPS: Steps = 16  # Passes the teacher takes, a multiple of the student's; more cost time and bring little
CFG_SCALE: Guidance = 1.0  # Guidance scale of the teacher; the student learns it and needs no guidance of its own

NOISES_PER_EPOCH: Count = 16384  # Paths of the teacher; every epoch has new ones
BATCH_SIZE: Count = 256  # Long steps in one step of the training
LEARNING_RATE: Positive = 5e-4  # Half of what the teacher was trained with, or less
EPOCHS: Epochs = 10  # More are better
MAX_GRAD_NORM: Positive = 1.0  # Gradients are clipped to this norm
EMA_BETA: Fraction = 0.999  # 0.99 for runs of a few hundred steps
SEED: Whole = 42  # Of noise, labels and order

NUM_SAMPLES_PER_CLASS: Count = 4  # Samples of each class in a grid
CHECKPOINT_SAVE_MINUTES: NotNegative = 3.0  # At most between checkpoints; every epoch ends with one
RESUME: str = "auto"  # Goes on where the run was stopped; "never" starts anew, a path goes on from the checkpoint there
AMP_DTYPE: Literal[None, "bfloat16"] = None  # "bfloat16" for the student on a machine with bfloat16 products
DEVICE: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto" takes the GPU when there is one

_GRID = "square"  # of the student's times
_LAST_TIME = 1 / 64  # of the teacher: from where its clean image is the end of the path; from nearer it is worse
_USES = 4  # of each path: a path costs as much as training on it several times
_PART = 512  # paths at once
_HELD_OUT = 1536  # paths whose loss is reported


def main() -> None:
    device, output = settings.pick_device(DEVICE), Path(OUTPUT_DIR)
    torch.manual_seed(SEED)
    content = load_checkpoint(CHECKPOINT_PATH)
    teacher, student = (build_generator(content, CHECKPOINT_PATH).to(device) for _ in range(2))
    if CFG_SCALE != 1 and content.get("settings", {}).get("LABEL_DROPOUT") == 0:
        raise InputError(f"CFG_SCALE {CFG_SCALE:g} needs a teacher that was trained with hidden labels", 2)
    checkpoints = Checkpoints(
        __file__,
        output,
        "dit_conditional_ckpts",
        "dit_conditional_*.pt",
        RESUME,
        CHECKPOINT_SAVE_MINUTES,
        device,
        model_config=student.config,
    )
    student.requires_grad_().sampler = flow.Sampler(NUM_ODE_STEPS, 1.0, "euler", _GRID)
    for fixed in (student.pos_embed, *(student.patch_basis.parameters() if student.patch_basis else ())):
        fixed.requires_grad_(False)
    student_times = flow.pass_times(student.sampler, student.spread is not None)
    times, stops = teacher_times(student_times, TEACHER_STEPS)
    print(f"{TEACHER_STEPS} passes of {CHECKPOINT_PATH} become {NUM_ODE_STEPS}, on {device.type}")

    ema = EMA(student, beta=EMA_BETA, update_every=1, update_after_step=0, include_online_model=False)
    optimizer = torch.optim.AdamW(student.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0, fused=True)
    identity = checksum(teacher.state_dict())
    announce(checkpoints, EPOCHS, settings.constants(globals()), identity, "the weights of the teacher")
    restore(checkpoints, student, ema, optimizer)
    state = checkpoints.state or {"step_in_epoch": 0, "history": []}
    history, (total, seen) = state["history"], state.get("sums_in_epoch", (0.0, 0))
    steps_per_epoch = _USES * math.ceil(NOISES_PER_EPOCH * NUM_ODE_STEPS / BATCH_SIZE)
    # After another batch size, the part of the epoch that is done stays done
    done = state["step_in_epoch"] * steps_per_epoch // state.get("steps_per_epoch", steps_per_epoch)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(1, step / (EPOCHS * steps_per_epoch))))
    )
    advance(scheduler, len(history) * steps_per_epoch + done)
    amp = torch.autocast(device.type, torch.bfloat16) if AMP_DTYPE else nullcontext()
    t_floor = flow.T_FLOOR if student.prediction == "image" else 0.0
    stop_asked = settings.stop_on_signal()
    held_out = long_steps(teacher, times, stops, _HELD_OUT, 0)
    untrained = flow.velocity_loss(torch.zeros_like(held_out[1]), *held_out[1:3], t_floor, student.weigh).item()

    rate = ("LEARNING_RATE", LEARNING_RATE)

    def save(name: str, epoch: int, step: int) -> None:
        """After a number of whole epochs and steps of the next one."""
        path = checkpoints.folder / f"dit_conditional_{name}.pt"
        save_checkpoint(
            path,
            model_state_dict=student.state_dict(),
            ema_state_dict=ema.state_dict(),
            optimizer_state_dict=optimizer.state_dict(),
            model_config=student.config,
            sampler=asdict(student.sampler),
            epoch=epoch,
            step_in_epoch=step,
            steps_per_epoch=steps_per_epoch,
            sums_in_epoch=(total, seen),
            history=history,
            settings=settings.constants(globals()),
            data=identity,
            run=checkpoints.run,
            script=checkpoints.script,
        )
        checkpoints.keep(path, "dit_conditional_epoch_*.pt", 1)
        checkpoints.keep(path, "dit_conditional_step_*.pt", 1 if "_step_" in name else 0)
        tqdm.write(f"saved {path}")

    for epoch in range(len(history) + 1, EPOCHS + 1):
        started = time.monotonic()
        start, target, t, labels = long_steps(teacher, times, stops, NOISES_PER_EPOCH, epoch, stop_asked)
        student.train()
        batches = [b for use in range(_USES) for b in epoch_batches(len(t), BATCH_SIZE, SEED, _USES * epoch + use)]
        bar = tqdm(batches[done:], f"epoch {epoch}/{EPOCHS}", len(batches), initial=done, unit="step", leave=False)
        for step, batch in enumerate(bar, done + 1):
            optimizer.zero_grad()
            with amp:
                velocity = student(start[batch], t[batch], labels[batch])
            loss = flow.velocity_loss(velocity.float(), target[batch], t[batch], t_floor, student.weigh)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), MAX_GRAD_NORM)
            global_step = (epoch - 1) * steps_per_epoch + step
            sound = checkpoints.is_sound(global_step, loss.item(), untrained, rate, norm.item())
            stop = stop_asked()
            if sound and (stop or (checkpoints.due())):  # the weights as the loss has just found them
                save(f"step_{global_step - 1}", epoch - 1, step - 1)
            if stop:
                print("stopped; run the script again to go on")
                return
            optimizer.step()
            scheduler.step()
            ema.update()
            total += loss.item() * len(batch)
            seen += len(batch)
        history.append(
            {
                "epoch": epoch,
                "step": epoch * steps_per_epoch,
                "loss": total / seen,
                "val_loss": loss_of(ema.ema_model, held_out, t_floor),
                "learning_rate": scheduler.get_last_lr()[0],
            }
        )
        done, total, seen = 0, 0.0, 0
        plots.training_curves(output, history, [["loss", "val_loss"], ["learning_rate"]])
        write_samples(output, epoch, ema.ema_model, NUM_SAMPLES_PER_CLASS)
        last, loss = epoch == EPOCHS, history[-1]["val_loss"]
        if checkpoints.is_sound(epoch * steps_per_epoch, loss, untrained, rate, last=last):
            save("final" if last else f"epoch_{epoch}", epoch, 0)
        else:
            tqdm.write(f"epoch {epoch} is not saved: loss {loss:.3g}, that of an output of zeros is {untrained:.3g}")
        tqdm.write(
            f"epoch {epoch}: loss {history[-1]['loss']:.5f}, on new paths {history[-1]['val_loss']:.5f}, "
            f"{time.monotonic() - started:.0f} s"
        )


def teacher_times(grid: list[float], steps: int) -> tuple[list[float], list[int]]:
    """The times of the teacher's path, and where in it those of the student are, ``grid``.

    Equal numbers of steps between any two times of the student, as the square of equal distances; the last of all goes
    from ``_LAST_TIME`` to 0 at once.
    """
    each, too_many = divmod(steps, len(grid) - 1)
    if each < 2 or too_many:
        raise InputError(f"--teacher_steps {steps} must be twice --num_ode_steps, or three times, or ...")
    times = grid[:1]
    for t, after in pairwise(grid):
        parts = each if after else each - 1
        first, last = math.sqrt(t), math.sqrt(after or min(_LAST_TIME, t / 2))
        times += [(first + (last - first) * i / parts) ** 2 for i in range(1, parts + 1)] + [0.0] * (not after)
    return times, list(range(0, steps + 1, each))


@torch.no_grad()
def long_steps(
    teacher: NanoDiT,
    times: list[float],
    stops: list[int],
    count: int,
    epoch: int,
    stop_asked: Callable[[], bool] = lambda: False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the student learns in an epoch, from new noise and labels.

    Returns:
        Where each long step starts (n, *sample_shape), its average velocity, its time (n,) and class (n,), with as many
        long steps for each of ``count`` paths as the student has.

    Raises:
        KeyboardInterrupt: when ``stop_asked`` says so; nothing is lost by that.
    """
    device = teacher.pos_embed.device
    random = flow.generator_of(SEED, epoch, device)
    velocity = flow.guided(teacher.along(times), teacher.num_classes, CFG_SCALE)
    starts, targets, all_times, all_labels = [], [], [], []
    bar = tqdm(total=count, desc="paths of the teacher", unit="path", leave=False)
    for part in torch.arange(count).split(_PART):
        labels = torch.randint(teacher.num_classes, (len(part),), generator=random, device=device)
        noise = torch.randn(len(part), *teacher.sample_shape, generator=random, device=device)
        z = flow.start(noise, teacher.spread, times[0])
        path = [z, *flow.multistep_path(velocity, z, labels, times)]
        for first, last in pairwise(stops):
            starts.append(path[first])
            targets.append((path[first] - path[last]) / (times[first] - times[last]))
            all_times.append(torch.full((len(part),), times[first], device=device))
            all_labels.append(labels)
        bar.update(len(part))
        if stop_asked():
            raise KeyboardInterrupt
    bar.close()
    return torch.cat(starts), torch.cat(targets), torch.cat(all_times), torch.cat(all_labels)


@torch.no_grad()
def loss_of(student: NanoDiT, steps: tuple[Tensor, ...], t_floor: float) -> float:
    """Of long steps, as the training counts it."""
    parts = zip(*(of_steps.split(_PART) for of_steps in steps), strict=True)
    student.eval()
    total = sum(
        len(t) * flow.velocity_loss(student(z, t, labels), target, t, t_floor, student.weigh).item()
        for z, target, t, labels in parts
    )
    return total / len(steps[2])


if __name__ == "__main__":
    settings.run(main, globals())
