"""Every UPPER_CASE constant at the top of a script is also a command-line flag of the same name in lower case.

    BATCH_SIZE = 160          # Reduce when the GPU runs out of memory
    ...
    if __name__ == "__main__":
        settings.run(main, globals())   # --batch_size 32 sets BATCH_SIZE, then main() runs

The type of a flag is the type of its constant; ``X: int | None = None`` also takes None, ``X: Literal["a", "b"] = "a"``
limits its values, and the comment behind a constant is its help. Relative paths written in a script mean "inside this
repository", relative paths given as a flag mean "from the current folder".
"""

import argparse
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from tqdm import tqdm

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent
# Other whole numbers count something there must be one of
MAY_BE_ZERO = {"SEED", "NUM_WORKERS", "WARMUP_EPOCHS", "CHECKPOINT_SAVE_STEPS", "PATCH_BASIS"}
# More would never end
AT_MOST = {"NUM_ODE_STEPS": 10_000, "EPOCHS": 1_000_000, "NUM_SPLITS": 10_000, "NUM_PER_CLASS": 10**9}
PATH_ENDINGS = ("_DIR", "_PATH")


class InputError(Exception):
    """A mistake in what the user gave: a file, a folder or a setting. Its text is one line that says what to do."""


def run(
    main: Callable[[], None], script: dict[str, Any], required: tuple[str, ...] = (), torchrun: bool = False
) -> None:
    """Sets the constants of a script from the command line and runs it; a mistake of the user ends it with one line.

    ``torchrun`` says that the script can be spread over many processes; only the first of them speaks.
    """
    from_flags(script, required=required)
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line at once
    many = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if many and not torchrun:
        stop(f"{Path(script['__file__']).name} runs as one process: start it with python, not with torchrun", 2)
    if many and os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    process = f"process {os.environ['RANK']}: " if many else ""
    try:
        main()
    except InputError as error:
        stop(f"{process}{error}")
    except OSError as error:  # a full disk, a folder that must not be written to
        stop(f"{process}{error.filename or 'a file'}: {error.strerror or error}")
    except KeyboardInterrupt:
        stop("stopped", 130)
    except (RuntimeError, MemoryError) as error:
        if _is_out_of_memory(error):
            stop(process + _memory_advice(script))
        if many and re.search("gloo|NCCL|ncclRemoteError|onnection (closed|reset)", str(error)):
            stop(f"{process}lost the other processes: the one that ended first says why")
        raise


def from_flags(script: dict[str, Any], argv: list[str] | None = None, required: tuple[str, ...] = ()) -> None:
    """Replaces the constants of a script by the values given on the command line.

    Args:
        script: the script's ``globals()``; changed in place.
        argv: the arguments, ``sys.argv[1:]`` when None.
        required: names of constants that have no usable default.

    Raises:
        SystemExit: with status 2 and one line on stderr for an unknown flag or a bad value.
    """
    notes = dict(
        re.findall(r"^([A-Z][A-Z0-9_]*)\b[^#\n]*=[^#\n]*#\s*(.*)$", Path(script["__file__"]).read_text(), re.M)
    )
    parser = _Parser(description=script["__doc__"], formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in constants(script).items():
        if name.endswith(PATH_ENDINGS) and default is not None:
            script[name] = str(ROOT / default)
        help_text = notes.get(name, "") + ("" if name in required else f" [{default}]")
        parser.add_argument(
            f"--{name.lower()}",
            dest=name,
            type=_reader(name, default, get_args(script.get("__annotations__", {}).get(name))),
            default=argparse.SUPPRESS,
            required=name in required,
            metavar="VALUE",
            help=help_text.strip().replace("%", "%%"),
        )
    script.update(vars(parser.parse_args(argv)))


def constants(script: dict[str, Any]) -> dict[str, Any]:
    """The constants of a script that are flags, by name."""
    plain = bool | int | float | str | None
    return {k: v for k, v in script.items() if re.fullmatch(r"[A-Z][A-Z0-9_]*", k) and isinstance(v, plain)}


def first_there(*paths: str) -> str:
    """The first of some paths inside the repository that there is, or the last one: what was trained here, say, or else
    what the repository holds."""
    return next((path for path in paths if (ROOT / path).exists()), paths[-1])


def stop_on_signal() -> Callable[[], bool]:
    """Lets a loop finish its step on Ctrl-C or SIGTERM, which is how SLURM ends a job; a second Ctrl-C ends at once.

    Not under torchrun, which passes on the signals that its processes have had already.

    Returns:
        A function that says whether a signal has come.
    """
    received = []

    def receive(number: int, frame: object) -> None:
        received.append(number)
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, receive)
    signal.signal(signal.SIGTERM, receive)
    return lambda: bool(received)


def ignore_ctrl_c() -> None:
    """For the workers of a pool, which the main process stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def pick_device(name: str) -> "torch.device":
    """The torch device of a DEVICE constant; "auto" is the GPU when there is one.

    Raises:
        InputError: for a device that is not there.
    """
    import torch  # here, so that scripts that need no torch start fast

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, is_there in there.items() if is_there)
    if not there[name]:
        raise InputError(f"no {name} device on this machine: --device auto takes what is there")
    return torch.device(name)


def stop(message: str, status: int = 1) -> NoReturn:
    """Ends the script with one line on stderr and no traceback."""
    print(message, file=sys.stderr)
    raise SystemExit(status)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        stop(f"{Path(self.prog).name}: {message} (--help lists the flags)", 2)


def _reader(name: str, default: Any, choices: tuple):
    """The function that turns the text of a flag into a value; argparse prints its errors as one line."""

    def read(text: str) -> Any:
        if type(None) in choices:  # of int | None
            return None if text == "None" else _number(name, text, choices[0])
        if choices:
            if text not in map(str, choices):
                raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(map(str, choices))}")
            return next(choice for choice in choices if str(choice) == text)
        if isinstance(default, bool):
            if text.lower() not in ("true", "false"):
                raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
            return text.lower() == "true"
        if isinstance(default, int | float):
            return _number(name, text, type(default))
        return None if text == "None" else text

    return read


def _number(name: str, text: str, kind: type) -> int | float:
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of 0 or more")
    if kind is int and value == 0 and name not in MAY_BE_ZERO:
        raise argparse.ArgumentTypeError("it must be 1 or more")
    if name == "LEARNING_RATE" and value == 0:
        raise argparse.ArgumentTypeError("it must be more than 0")
    if value > AT_MOST.get(name, value):
        raise argparse.ArgumentTypeError(f"it must be {AT_MOST[name]} or less: more would never end")
    return value


def _is_out_of_memory(error: Exception) -> bool:
    """Of a GPU, or of the machine as torch and NumPy report it."""
    text = f"{type(error).__name__} {error}"
    return isinstance(error, MemoryError) or bool(re.search("OutOfMemory|out of memory|allocate memory", text))


def _memory_advice(script: dict[str, Any]) -> str:
    """What to try next."""
    batch = script.get("BATCH_SIZE")
    if batch is None:
        return "out of memory: other programs may hold it"
    if "ACCUMULATE_STEPS" in script:
        steps = script["ACCUMULATE_STEPS"]
        return (
            f"out of memory with --batch_size {batch} in {steps} part{'s' if steps > 1 else ''}: try "
            f"--accumulate_steps {2 * steps}, which keeps the batch and takes half as much"
        )
    return f"out of memory with --batch_size {batch}: try --batch_size {max(1, batch // 2)}"
