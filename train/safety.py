"""What trainings need to come back after a kill, and to stop before harm is done."""

import math
import os
import secrets
import time
import warnings
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from ema_pytorch import EMA

import distributed
from files import hold, set_aside, whole
from models.checkpoint import check_numbers, generator_weights, load_checkpoint, load_weights, plain_names, progress
from models.model import NanoDiT
from settings import ROOT, InputError

# Settings that may differ between two runs of one training without anything to be said
_FREE = {"DATA_DIR", "OUTPUT_DIR", "WEIGHTS_PATH", "CACHE_DIR", "RESUME", "DEVICE", "EPOCHS", "WORTH_STARTING_HOURS"}
_OF_A_RUN = ("*_ckpts", "dit_conditional_images", "dit_conditional_npy", "training_metrics.*", "confusion_matrix.png")
_NEEDED = {"optimizer_state_dict", "history", "settings", "step_in_epoch"}  # in a checkpoint, to go on from it
_SOUND, _RUNAWAY = 3, 1000  # times the loss of an untrained network: a loss is sound up to the one, lost from the other


class Checkpoints:
    """The checkpoints of one run in a folder of OUTPUT_DIR, which belongs to this process from then on.

    Args:
        script: path of the training script, which is in its checkpoints.
        output: OUTPUT_DIR.
        folder: of the checkpoints, in ``output``.
        pattern: of their names.
        resume: "auto" finds the newest whole one, "never" none, and a path a copy of the one there. Unless the run goes
            on from the newest one, an earlier run's files are moved to ``output``/earlier_{n} first.
        minutes: how often there must be a new one.
        expected: what a checkpoint to go on from must hold, such as its ``model_config``.

    Attributes:
        state: the content of the checkpoint to go on from, or None.
        run: name of the run, the same in all its checkpoints.
        newest, origin: paths of the newest checkpoint, and of that to go on from, or None.
    """

    def __init__(
        self,
        script: str,
        output: Path,
        folder: str,
        pattern: str,
        resume: str,
        minutes: float,
        device: torch.device | str,
        **expected: Any,
    ):
        self.folder, self.pattern, self.seconds = output / folder, pattern, 60 * minutes
        self.saved, self.resume = time.monotonic(), resume
        with distributed.main_first():
            if distributed.is_main():
                hold(output)
        self.newest, self.state = None, None
        if any(int(os.environ.get(count) or 0) for count in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")):
            resume = "auto"  # torchrun or SLURM has started the same run again
        if resume == "auto":
            self.newest, self.state = self._newest_whole(device)
        elif resume != "never":
            resume = resume if Path(resume).exists() else str(ROOT / resume)  # as written in a script
            if not Path(resume).exists():
                raise InputError(
                    f'RESUME {self.resume!r} is neither "auto" nor "never" nor the path of a checkpoint', 2
                )
            self.state = load_checkpoint(resume, device)
            name = Path(resume).name
            self.newest = self.folder / (name if fnmatch(name, pattern) else pattern.replace("*", "step_0"))
        self._check_origin(script, resume if resume not in ("auto", "never") else self.newest, expected)
        if resume != "auto" or self.state is None:
            distributed.gather(None)  # all have read it
            if distributed.is_main():
                _begin_anew(output, resume, self.newest)
        self.origin = self.newest
        self.run = (self.state or {}).get("run") or distributed.from_main(secrets.token_hex(4))

    def _check_origin(self, script: str, path: Path | str | None, expected: dict[str, Any]) -> None:
        """Raises InputError for a checkpoint that this script did not write, or of another network."""
        self.script = Path(script).stem
        if self.state is None:
            return
        if not self.state.keys() >= _NEEDED:
            raise InputError(f"{path} holds no state to go on from: --start_path begins with its weights elsewhere")
        writer = self.state.get("script", self.script)  # older versions did not say
        if writer != self.script:
            raise InputError(f"{path} is of train/{writer}.py: choose another --output_dir, or checkpoint")
        for name, value in expected.items():
            if self.state.get(name) != value:
                what = {"model_config": "network"}.get(name, name.replace("_", " "))
                raise InputError(f"{path} is of another {what}: choose another --output_dir for this one")

    def _newest_whole(self, device: torch.device | str) -> tuple[Path | None, dict[str, Any] | None]:
        """The whole checkpoint with most steps, the same for all processes; names those that are broken.

        Removes what a process that was killed while it wrote has left.
        """
        if distributed.is_main():
            for part in self.folder.glob("*.part"):
                part.unlink()
        newest_first, problems = distributed.from_main(self._newest_first(self.pattern)), []
        runs = {found[1] for path in newest_first if (found := progress(path)) and found[1]}
        if len(runs) > 1:
            raise InputError(f"{self.folder} holds checkpoints of {len(runs)} runs: --resume takes the path of one")
        for path in newest_first:
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
        return None, None

    def _newest_first(self, pattern: str) -> list[Path]:
        """By how far they are, whatever the time of the file; those that cannot be read come first, to be named."""

        def epochs_and_name(path: Path) -> tuple[float, str]:
            found = progress(path)
            return (found[0] if found else math.inf), path.name

        return sorted(self.folder.glob(pattern), key=epochs_and_name, reverse=True)

    def due(self) -> bool:
        """Whether it is time for a new one."""
        return time.monotonic() - self.saved >= self.seconds

    def keep(self, newest: Path, pattern: str, count: int, but: Path | None = None) -> None:
        """After ``newest`` was written, removes others of a pattern, all but ``count`` and all ``but`` one."""
        self.newest, self.saved = newest, time.monotonic()
        if len(list(self.folder.glob(pattern))) > count:
            whole_ones = [path for path in self._newest_first(pattern) if progress(path)]
            for path in whole_ones[count:]:
                if path not in (newest, but):
                    path.unlink()

    def is_sound(
        self,
        step: int,
        loss: float,
        untrained: float,
        rate: tuple[str, float],
        norm: float = 0.0,
        last: bool = False,
    ) -> bool:
        """Whether a loss is hardly worse than that of an untrained network, so that the weights are worth keeping.

        Args:
            step: number of the step, for the message.
            rate: name and value of the constant to reduce when it is not.
            norm: of the gradient.
            last: whether the run ends here, so that the loss must be sound.

        Raises:
            InputError: for a loss or gradient that is no number, or a loss that has run away, with what to do.
        """
        limit = _SOUND if last else _RUNAWAY
        if math.isfinite(loss) and math.isfinite(norm) and loss <= limit * untrained:
            return loss <= _SOUND * untrained
        self._doubt_origin(*rate)
        newest = distributed.from_main(self.newest)
        norm_text = "" if math.isfinite(norm) else f" and gradient norm {norm:g}"
        origin = f"goes on from {newest}, whose loss was sound" if newest else "starts anew"
        again = "run again" if self.resume == "auto" else "run again with --resume auto"
        raise InputError(
            f"step {step}: loss {loss:g}{norm_text}, where an untrained network has a loss of {untrained:.3g}. Halve "
            f"{rate[0]} {rate[1]:g} and {again}, which {origin}; if it happens again, halve it again"
        )

    def _doubt_origin(self, rate_name: str, rate: float) -> None:
        """Renames the checkpoint that this run went on from if all goes wrong from there, at an eighth of its rate too:
        weights can be ruined before the loss shows it."""
        if self.state and self.newest == self.origin and rate <= self.state["settings"].get(rate_name, 0) / 8:
            ruined = self.newest.with_suffix(".ruined")
            if distributed.is_main():
                self.newest.rename(ruined)
            print(f"{self.newest} is called {ruined.name} now: from there, the loss runs away at any rate")
            older = [path for path in self._newest_first(self.pattern) if path != self.newest]
            self.newest = older[0] if older else None


def _begin_anew(output: Path, resume: str, first: Path | None) -> None:
    """Moves what an earlier run has left in a folder to a new one in it, and copies ``resume`` to ``first``, if any."""
    content = Path(resume).read_bytes() if first else b""
    set_aside(output, [path for pattern in _OF_A_RUN for path in output.glob(pattern)])
    if first:
        with whole(first, sync=True) as file:
            file.write(content)


def restore(checkpoints: Checkpoints, model: NanoDiT, ema: EMA, optimizer: torch.optim.Optimizer) -> None:
    """Loads the state of a run of train_diffusion.py or distill.py, if there is one, into all that is given."""
    content, path = checkpoints.state, checkpoints.newest
    if content is None:
        return
    averaged, prefix = plain_names(generator_weights(content)), "ema_model."
    check_numbers(averaged, path)
    load_weights(model, content["model_state_dict"], path)
    counts = {name: value for name, value in content["ema_state_dict"].items() if not name.startswith(prefix)}
    ema.load_state_dict(counts | {f"{prefix}{name}": value for name, value in averaged.items()})
    load_optimizer_state(optimizer, content["optimizer_state_dict"], path)


def announce(
    checkpoints: Checkpoints, epochs: int, now: dict[str, Any], data: str, what: str = "the training images"
) -> None:
    """Says from where a run goes on, and which settings and data are no longer those it began with.

    Args:
        now: the settings.
        data: ``identity`` of the training images, or a checksum of what else is learned from.
        what: they are.
    """
    content, path = checkpoints.state, checkpoints.newest
    if content is None:
        return
    step = f", step {content['step_in_epoch']}" if content["step_in_epoch"] else ""
    todo = f": nothing to do for {epochs} epochs" if content["epoch"] >= epochs else ", going on"
    print(f"{path} is at epoch {content['epoch']}{step}{todo}")
    before = content["settings"]
    changed = [name for name in now if name not in _FREE and before.get(name, now[name]) != now[name]]
    changes = [f"{name} {before[name]} -> {now[name]}" for name in changed]
    if content.get("data", data) != data:
        changes.append(f"{what}: not those that the run began with")
    if changes:
        print("changed since then: " + ", ".join(changes))


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> None:
    """Moments and step counts of a checkpoint; learning rates and weight decay stay those of the constants."""
    for number, of_parameter in state["state"].items():
        check_numbers({f"{name} {number} of the optimizer": value for name, value in of_parameter.items()}, path)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def advance(scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> None:
    """Puts a new schedule of learning rates where it is after a number of steps."""
    if steps:
        scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": steps - 1, "_step_count": steps})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the optimizer has made its first step in an earlier process
            scheduler.step()
