"""One training run: goes on where it was stopped, saves regularly, ends when the loss runs away, keeps its history.

The loops stay in the scripts; ``Run`` is what they share.
"""

import math
import os
import re
import secrets
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from ema_pytorch import EMA
from torch import Tensor, nn
from tqdm import tqdm

import distributed
import plots
import settings
from dataset import NpyDataset
from files import hold, set_aside, whole
from models.checkpoint import check_numbers, generator_weights, load_checkpoint, load_weights, progress, save_checkpoint
from models.generator import Generator
from settings import ROOT, InputError

# Settings that may change when a run goes on, without a message
_FREE = {
    "DATA_DIR",
    "OUTPUT_DIR",
    "WEIGHTS_PATH",
    "CACHE_DIR",
    "RESUME",
    "DEVICE",
    "EPOCHS",
    "PARAMETERS",
    "WORTH_STARTING_HOURS",
}
_OF_A_RUN = ("*_ckpts", "dit_conditional_images", "dit_conditional_npy", "training_metrics.*", "confusion_matrix.png")
_SHOWN = {"classes", "image_size", "channels"}  # short enough for a message that says how they differ
_NEEDED = {"optimizer_state_dict", "history", "settings", "step_in_epoch"}  # in a checkpoint that a run can go on from
_DRAWN_EVERY = 10  # seconds
_SOUND, _RUNAWAY = 3, 1000  # times an untrained network's loss: a loss above is unsound, or has run away


class Run:
    """A run of a training script. Its OUTPUT_DIR belongs to this process until the script ends.

    The run goes on from the checkpoint that the constant RESUME names: "auto" finds the newest undamaged one, "never"
    takes none, and a path takes a copy of the checkpoint there. Unless it goes on from the newest one, it first moves
    the files of an earlier run to OUTPUT_DIR/earlier_{n}.

    Args:
        script: ``globals()`` of the script, with OUTPUT_DIR, EPOCHS, BATCH_SIZE, RESUME and CHECKPOINT_SAVE_MINUTES.
        checkpoints: folder of the checkpoints in OUTPUT_DIR, and the beginning of their names. These end in step_{n}.pt
            within an epoch, and in epoch_{n}.pt or final.pt after one.
        device: where checkpoints are loaded to.
        today: brings the content of older checkpoints into today's form.

    Attributes:
        state: content of the checkpoint to go on from, or None.
        history: a row for every epoch that is done.
        sums: sums over the images of the current, unfinished epoch, by name.
        step: steps done since the beginning.
        content: goes into every checkpoint; scripts may add to it.
        untrained: loss of an untrained network; to be set before the first step.
        rate: name of the constant with the learning rate.
        steps_per_epoch: number of batches.

    Raises:
        InputError: for a folder with another network's run, checkpoints of several runs, or only damaged checkpoints.
    """

    def __init__(
        self,
        script: dict[str, Any],
        checkpoints: str,
        device: torch.device | str,
        today: Callable[[dict[str, Any]], dict[str, Any]] = lambda content: content,
    ):
        self.settings, self.script = settings.constants(script), Path(script["__file__"]).stem
        self.output, self.device = Path(script["OUTPUT_DIR"]), device
        self.folder, self.prefix = self.output / Path(checkpoints).parent, Path(checkpoints).name
        self.batch_size, self.epochs = script["BATCH_SIZE"], script["EPOCHS"]
        self.resume, self.seconds = script["RESUME"], 60 * script["CHECKPOINT_SAVE_MINUTES"]
        self.saved, self.untrained, self.rate = time.monotonic(), math.inf, "LEARNING_RATE"
        self._drawn = -math.inf
        self.today = today
        self.newest, self.state = None, None
        if distributed.from_main(self.output.exists()):  # otherwise ``begin`` creates it
            self._hold()
        for other in self.output.glob("*_ckpts"):
            if other != self.folder and any(other.iterdir()):
                raise InputError(
                    f"{self.output} holds a run of another network, in {other.name}: choose another --output_dir"
                )
        self._find()

    def _hold(self) -> None:
        with distributed.main_first():
            if distributed.is_main():
                hold(self.output)

    def begin(self, images: NpyDataset, content: dict[str, Any]) -> None:
        """Makes OUTPUT_DIR ready for a run on these images.

        Args:
            content: description of the network for every checkpoint; a checkpoint to go on from must hold the same.

        Raises:
            InputError: when it does not.
        """
        self._hold()
        self.content, self.data = content, images.identity
        self.steps_per_epoch = math.ceil(len(images) / self.batch_size)
        if others := [name for name, value in content.items() if self.state and self.state.get(name) != value]:
            name = min(others, key="model_config".__eq__)  # another difference changes the network too: name that one
            what = "network" if name == "model_config" else name.replace("_", " ")
            told = f"is of another {what}"
            if name in _SHOWN:
                told = f"has {what} {self.state.get(name)}, not {content[name]}"
            raise InputError(f"{self.found} {told}: choose another --output_dir for this one")
        if self.found != self.newest or self.state is None:
            distributed.gather(None)  # wait until all processes have read it
            if distributed.is_main():
                self._begin_anew()
        self.origin = self.newest
        state = self.state or {"history": [], "epoch": 0, "step_in_epoch": 0}
        self.run = state.get("run") or distributed.from_main(secrets.token_hex(4))
        self.history, sums = state["history"], state.get("sums")
        self.sums = Counter(sums if isinstance(sums, dict) else {})  # older versions kept something else
        # After a change of the batch size, the same share of the epoch counts as done
        before = state.get("steps_per_epoch", self.steps_per_epoch)
        self.done = state["step_in_epoch"] * self.steps_per_epoch // before
        self.step = state["epoch"] * self.steps_per_epoch + self.done
        self.parts: dict[str, Any] = {}
        self._announce()

    def restore(self, **parts: Any) -> None:
        """Registers the parts to be saved, by name, and loads the state of the checkpoint into them, if there is one.

        "model" is a network, "ema" its EMA and "optimizer" its optimizer; any other part has a ``state_dict``, too.
        """
        self.parts |= parts
        if self.state is None:
            return
        content, path = self.state, self.newest
        for name, part in parts.items():
            found = content.get(f"{name}_state_dict", {})
            if isinstance(part, EMA):
                _load_ema(part, content, path)
            elif isinstance(part, torch.optim.Optimizer):
                _load_optimizer(part, found, path)
            elif isinstance(part, nn.Module):
                load_weights(part, found, path)
            elif found:  # a scaler that was not needed has saved no state
                part.load_state_dict(found)

    def schedule(self, optimizer: torch.optim.Optimizer, kind: type, *args: Any, **options: Any) -> Any:
        """Learning-rate scheduler, brought to the step at which the run is."""
        scheduler = kind(optimizer, *args, **options)
        steps = min(self.step, getattr(scheduler, "total_steps", self.step + 1) - 1)
        if steps:
            scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": steps - 1, "_step_count": steps})
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the optimizer has made its first step in another process
                scheduler.step()
        return scheduler

    def remaining_epochs(self) -> Iterator[int]:
        """Numbers of the epochs that are still to be done; the first epoch of a run is number 1."""
        self._stop_asked = settings.stop_on_signal()
        yield from range(len(self.history) + 1, self.epochs + 1)

    def steps(self, batches: tuple[Tensor, ...]) -> Iterator[Tensor]:
        """Batches of the epoch that are still to be done, with a progress bar; ``step`` counts them."""
        epoch = len(self.history) + 1
        self._started, self._seen_before = time.monotonic(), self.sums["seen"]
        title = f"epoch {epoch}/{self.epochs}"
        with tqdm(batches[self.done :], title, len(batches), initial=self.done, unit="step", leave=False) as self._bar:
            for number, batch in enumerate(self._bar, self.done + 1):
                self.step = (epoch - 1) * self.steps_per_epoch + number
                yield batch

    def check(self, loss: Tensor, norm: float = 0.0) -> tuple[float, bool]:
        """Checks a loss before the optimizer takes its step; saves a checkpoint if one is due and the loss is sound.

        Args:
            loss: of this process; the loss of the step is the sum over all processes.
            norm: of the gradient.

        Returns:
            The loss of the step, and whether to stop here.

        Raises:
            InputError: for a loss or gradient that is NaN or infinite, or a loss that has run away; it says what to do.
        """
        loss, stop = distributed.total(loss, self._stop_asked())
        due = time.monotonic() - self.saved >= self.seconds
        if self._is_sound(loss, norm) and (stop or due):  # the weights that this loss was computed with
            self._save(f"step_{self.step - 1}", *divmod(self.step - 1, self.steps_per_epoch))
        if stop:
            print("stopped; run the script again to go on")
        return loss, bool(stop)

    def add(self, seen: int, loss: float, **others: float) -> None:
        """Adds the images, the loss and other sums of a step; shows the mean loss and the images a second."""
        self.sums.update(seen=seen, loss=loss * seen, **others)
        left = (self.epochs * self.steps_per_epoch - self.step) * seen / self.images_per_second()
        shown = {"loss": f"{self.mean('loss'):.4f}", "images_s": f"{self.images_per_second():.0f}"}
        self._bar.set_postfix(shown, left=duration(left), refresh=False)

    def mean(self, name: str) -> float:
        """Mean over the images of this epoch."""
        return self.sums[name] / self.sums["seen"]

    def images_per_second(self) -> float:
        return (self.sums["seen"] - self._seen_before) / (time.monotonic() - self._started)

    def end_epoch(self, row: dict[str, float], panels: list[list[str]]) -> None:
        """Adds a row to the history and draws it, a panel for each list of columns; ``save_epoch`` comes next.

        Between the first and the last epoch, curves are drawn every ten seconds at most: drawing takes half a second.
        """
        self.history.append({"epoch": len(self.history) + 1} | row)
        self.done, self.sums = 0, Counter()
        due = time.monotonic() - self._drawn > _DRAWN_EVERY or len(self.history) == self.epochs
        if due and distributed.is_main():
            plots.training_curves(self.output, self.history, panels)
            self._drawn = time.monotonic()

    def save_epoch(self, loss: float, every: int = 1, keep: int = 1, best: str | None = None) -> None:
        """Saves an epoch that is done, unless the loss of its weights is unsound.

        Args:
            loss: of the weights to be saved.
            every: epochs between checkpoints; the last one is always saved, as final.pt.
            keep: number of the newest checkpoints to keep.
            best: column of the history; the checkpoint with the least value in it is kept, too.
        """
        epoch = len(self.history)
        last = epoch == self.epochs
        if not self._is_sound(loss, last=last):
            untrained = f"that of an untrained network is {self.untrained:.3g}"
            tqdm.write(f"epoch {epoch} is not saved: loss {loss:.3g}, {untrained}")
            return
        if last:  # before epoch_{n}.pt, so that a run killed between the two has it
            self._save("final", epoch, 0)
        if epoch % every == 0:
            self._save(f"epoch_{epoch}", epoch, 0)
        if not distributed.is_main():
            return
        there = [row for row in self.history if self._path(f"epoch_{row['epoch']}").exists()]
        spared = min(there, key=lambda row: row[best]) if best and there else None
        for row in there[:-keep]:
            if row is not spared:
                self._path(f"epoch_{row['epoch']}").unlink()

    def _save(self, name: str, epoch: int, step: int) -> None:
        """Saves after ``epoch`` whole epochs and ``step`` steps of the next one; removes older step_{n}.pt."""
        self.newest, self.saved = self._path(name), time.monotonic()
        if not distributed.is_main():
            return
        save_checkpoint(
            self.newest,
            **{f"{part}_state_dict": value.state_dict() for part, value in self.parts.items()},
            **self.content,
            epoch=epoch,
            step_in_epoch=step,
            steps_per_epoch=self.steps_per_epoch,
            sums=dict(self.sums),
            history=self.history,
            settings=self.settings,
            data=self.data,
            run=self.run,
            script=self.script,
        )
        for path in self.folder.glob(f"{self.prefix}_step_*.pt"):
            if path != self.newest and self._is_of_a_run(path.name) and progress(path):
                path.unlink()
        tqdm.write(f"saved {self.newest}")

    def _find(self) -> None:
        """Finds ``found``, the checkpoint to go on from, and ``newest``, its path in the folder of this run."""
        self.found, resume = None, self.resume
        if any(int(os.environ.get(count) or 0) for count in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")):
            resume = "auto"  # torchrun or SLURM has started the same run again
        if resume == "auto":
            self._find_newest()
            self.found = self.newest
        elif resume != "never":
            resume = resume if Path(resume).exists() else str(ROOT / resume)  # relative, as written in a script
            if not Path(resume).exists():
                raise InputError(
                    f'RESUME {self.resume!r} is neither "auto" nor "never" nor the path of a checkpoint', 2
                )
            self.found, self.state = resume, load_checkpoint(resume, self.device)
            name = Path(resume).name
            self.newest = self.folder / name if self._is_of_a_run(name) else self._path("step_0")
        if self.state is None:
            return
        if not self.state.keys() >= _NEEDED:
            raise InputError(
                f"{self.found} holds no state to go on from: --start_path begins with its weights elsewhere"
            )
        writer = self.state.get("script", self.script)  # older versions did not say
        if writer != self.script:
            raise InputError(f"{self.found} is of train/{writer}.py: choose another --output_dir, or checkpoint")
        self.state = self.today(self.state)

    def _begin_anew(self) -> None:
        """Moves an earlier run's files to a folder of their own, and copies the checkpoint to go on from, if any."""
        content = Path(self.found).read_bytes() if self.newest else b""
        set_aside(self.output, [path for pattern in _OF_A_RUN for path in self.output.glob(pattern)])
        if self.newest:
            with whole(self.newest, sync=True) as file:
                file.write(content)

    def _find_newest(self) -> None:
        """Finds the undamaged checkpoint with the most steps, the same for all processes; prints which are damaged.

        Removes the unfinished files of a process that was killed while it wrote them.
        """
        if distributed.is_main():
            for part in self.folder.glob("*.part"):
                part.unlink()
        newest_first, problems = distributed.from_main(self._newest_first()), []
        runs = {found[1] for path in newest_first if (found := progress(path)) and found[1]}
        if len(runs) > 1:
            raise InputError(f"{self.folder} holds checkpoints of {len(runs)} runs: --resume takes the path of one")
        for path in newest_first:
            try:
                self.newest, self.state = path, load_checkpoint(path, self.device)
                break
            except InputError as error:
                problems.append(str(error))
        if problems and self.state is None:
            raise InputError("\n".join(problems) + "\nno whole checkpoint: remove them, or --resume never starts anew")
        if self.state is None:
            self.newest = None
        for problem in problems:
            print(f"{problem}: going on from an older one")

    def _path(self, name: str) -> Path:
        return self.folder / f"{self.prefix}_{name}.pt"

    def _is_of_a_run(self, name: str) -> bool:
        return bool(re.fullmatch(rf"{self.prefix}_(step_\d+|epoch_\d+|final)\.pt", name))

    def _newest_first(self) -> list[Path]:
        """Checkpoints sorted by progress, not by file time; unreadable ones come first, so that they are reported."""

        def epochs_and_name(path: Path) -> tuple[float, str]:
            found = progress(path)
            return (found[0] if found else math.inf), path.name

        there = [path for path in self.folder.glob("*.pt") if self._is_of_a_run(path.name)]
        return sorted(there, key=epochs_and_name, reverse=True)

    def _announce(self) -> None:
        """Prints from where the run goes on, and which settings and data have changed since it began."""
        if self.state is None:
            return
        content, now = self.state, self.settings
        step = f", step {content['step_in_epoch']}" if content["step_in_epoch"] else ""
        finished = content["epoch"] >= self.epochs
        todo = f": nothing to do for {self.epochs} epochs" if finished else ", going on"
        print(f"{self.newest} is at epoch {content['epoch']}{step}{todo}")
        before = content["settings"]
        changed = [name for name in now if name not in _FREE and before.get(name, now[name]) != now[name]]
        changes = [f"{name} {before[name]} -> {now[name]}" for name in changed]
        if content.get("data", self.data) != self.data:
            changes.append("the training images: not those that the run began with")
        if changes:
            print("changed since then: " + ", ".join(changes))

    def _is_sound(self, loss: float, norm: float = 0.0, last: bool = False) -> bool:
        """Whether a loss is at most three times that of an untrained network, so that the weights are worth keeping.

        Raises:
            InputError: for a loss or gradient that is NaN or infinite, for a loss that has run away, and for the last
                loss of a run if it is not sound; it says what to do.
        """
        limit = _SOUND if last else _RUNAWAY
        if math.isfinite(loss) and math.isfinite(norm) and loss <= limit * self.untrained:
            return loss <= _SOUND * self.untrained
        self._doubt_origin()
        newest = distributed.from_main(self.newest)
        norm_text = "" if math.isfinite(norm) else f" and gradient norm {norm:g}"
        origin = f"goes on from {newest}, whose loss was sound" if newest else "starts anew"
        again = "run again" if self.resume == "auto" else "run again with --resume auto"
        raise InputError(
            f"step {self.step}: loss {loss:g}{norm_text}, where an untrained network has a loss of "
            f"{self.untrained:.3g}. Halve {self.rate} {self.settings[self.rate]:g} and {again}, which {origin}; if it "
            "happens again, halve it again"
        )

    def _doubt_origin(self) -> None:
        """Renames the checkpoint that this run went on from if the loss runs away from there even at an eighth of its
        learning rate: weights can be ruined before the loss shows it."""
        if self.state is None or self.newest != self.origin:
            return
        if self.settings[self.rate] <= self.state["settings"].get(self.rate, 0) / 8:
            ruined = self.newest.with_suffix(".ruined")
            if distributed.is_main():
                self.newest.rename(ruined)
            print(f"{self.newest} is called {ruined.name} now: from there, the loss runs away at any learning rate")
            older = [path for path in self._newest_first() if path != self.newest]
            self.newest = older[0] if older else None


def _load_ema(ema: EMA, content: dict[str, Any], path: Path) -> None:
    averaged, prefix = generator_weights(content), "ema_model."
    check_numbers(averaged, path)
    counts = {name: value for name, value in content["ema_state_dict"].items() if not name.startswith(prefix)}
    ema.load_state_dict(counts | {f"{prefix}{name}": value for name, value in averaged.items()})


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> None:
    """Loads moments and step counts from a checkpoint; learning rates and weight decay stay as the constants say."""
    for number, of_parameter in state["state"].items():
        check_numbers({f"{name} {number} of the optimizer": value for name, value in of_parameter.items()}, path)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def seconds_an_image(generator: Generator, batch_size: int) -> float:
    """Measured time of a training step, divided by its images: a batch, or on a CPU as many images as take a second."""
    device, classes = generator.device, len(generator.classes)

    def step(n: int) -> float:
        z, t, labels = torch.randn(n, *generator.sample_shape), torch.rand(n), torch.randint(classes, (n,))
        started = time.perf_counter()
        generator.network(z.to(device), t.to(device), labels.to(device)).square().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    step(1)  # warms up
    once = step(1)
    n = batch_size if device.type == "cuda" else max(1, min(batch_size, int(1 / once)))
    taken = once if n == 1 else min(step(n), step(n))
    generator.zero_grad(set_to_none=True)
    return taken / n


def duration(seconds: float) -> str:
    """A time as text for people, in the unit that suits it."""
    for unit, length in (("years", 31557600), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
