"""What trainings need to come back after a kill, and to stop before harm is done."""

import math
from pathlib import Path
from typing import Any

import torch
from ema_pytorch import EMA

import distributed
from models.checkpoint import load_checkpoint, load_weights
from models.model import NanoDiT
from settings import InputError

# Settings that may differ between two runs of one training without anything to be said
_FREE = {"DATA_DIR", "OUTPUT_DIR", "WEIGHTS_PATH", "RESUME", "DEVICE", "EPOCHS", "WORTH_STARTING_HOURS"}


def newest_checkpoint(folder: Path, pattern: str, device: torch.device) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a folder, the same for all processes; names the broken ones that are newer.

    Removes what a process that was killed while it wrote has left.

    Raises:
        InputError: when there are files, but none is whole.
    """
    problems, newest_first = [], []
    if distributed.is_main():
        for part in folder.glob("*.part"):
            part.unlink()
        newest_first = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in distributed.from_main(newest_first):
        try:
            content = load_checkpoint(path, device)
        except InputError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            print(f"{problem}: going on from an older one")
        return path, content
    if problems:
        raise InputError("\n".join(problems) + "\nno whole checkpoint: remove them, or --resume never starts anew")
    return None


def resume(
    folder: Path, model: NanoDiT, ema: EMA, optimizer: torch.optim.Optimizer, epochs: int, now: dict[str, Any]
) -> dict[str, Any] | None:
    """Loads the newest whole checkpoint of a folder, if there is one, into all that is given; returns its content."""
    found = newest_checkpoint(folder, "*.pt", model.pos_embed.device)
    if found is None:
        return None
    path, content = found
    if content.get("model_config") != model.config:
        raise InputError(f"{path} is of another network: choose another --output_dir for this one")
    load_weights(model, content["model_state_dict"], path)
    ema.load_state_dict(content["ema_state_dict"])
    load_optimizer_state(optimizer, content["optimizer_state_dict"])
    announce(path, content, epochs, now)
    return content


def announce(path: Path, content: dict[str, Any], epochs: int, now: dict[str, Any]) -> None:
    """Says where a checkpoint is, and which settings are no longer those it was made with."""
    step = f", step {content['step_in_epoch']}" if content["step_in_epoch"] else ""
    if content["epoch"] >= epochs:
        print(f"{path} is at epoch {content['epoch']}: nothing to do for {epochs} epochs")
        return
    print(f"{path} is at epoch {content['epoch']}{step}, going on")
    before = content["settings"]
    changed = [name for name in now if name not in _FREE and before.get(name, now[name]) != now[name]]
    if changed:
        print("changed since then: " + ", ".join(f"{name} {before[name]} -> {now[name]}" for name in changed))


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Moments and step counts of a checkpoint; learning rates and weight decay stay those of the constants."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def advance(scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> None:
    """Puts a new schedule of learning rates where it is after a number of steps."""
    if steps:
        scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": steps - 1, "_step_count": steps})
        scheduler.step()


def keep_newest(folder: Path, pattern: str, count: int, but: Path | None = None) -> None:
    """Removes older checkpoints, all ``but`` one."""
    newest_last = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)
    for path in newest_last[: max(0, len(newest_last) - count)]:
        if path != but:
            path.unlink()


def check_finite(step: int, learning_rate: float, **values: float) -> None:
    """Stops a training whose loss or gradient is no longer a number.

    Raises:
        InputError: with the step, the learning rate and the remedies.
    """
    if not all(map(math.isfinite, values.values())):
        found = " and ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in values.items())
        raise InputError(
            f"step {step}: {found} at a learning rate of {learning_rate:g}. Reduce LEARNING_RATE or MAX_GRAD_NORM, or "
            "look at the images; the newest checkpoint is from before this step"
        )
