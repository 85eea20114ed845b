"""Every UPPER_CASE constant at the top of a script is also a command-line flag of the same name in lower case.

    BATCH_SIZE = 160          # Reduce when the GPU runs out of memory
    ...
    if __name__ == "__main__":
        settings.run(main, globals())   # --batch_size 32 sets BATCH_SIZE, then main() runs

The annotation of a constant says what it may be (``Count``, ``Fraction``, ``Literal["a", "b"]``, ``float | None``). Its
value is checked in the same way whether it was written into the script or given as a flag. The comment behind a
constant is its help. Relative paths written in a script mean "inside this repository", relative paths given as a flag
mean "from the current folder". A recipe is a named set of constants: a flag overrides it, and it overrides the script.
"""

import argparse
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TextIO, get_args, get_origin

from tqdm import tqdm

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent
PATH_ENDINGS = ("_DIR", "_PATH")
Recipes = dict[str, dict[str, dict[str, Any]]]  # name -> stem of a script -> constants
LOG_INTERVAL = 60.0  # seconds between the lines of a progress bar in a log file


@dataclass(frozen=True)
class Interval:
    """The numbers from ``low`` to ``high``, without the ends that are open."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.low_open else number >= self.low
        below = number < self.high if self.high_open else number <= self.high
        return above and below and math.isfinite(number)

    def __str__(self) -> str:
        low, high = f"{self.low:,}", f"{self.high:,}"
        if self.high == math.inf:
            return f"above {low}" if self.low_open else f"of {low} or more"
        return f"{'above' if self.low_open else 'from'} {low} {'and below' if self.high_open else 'to'} {high}"


# What a number may be
Count = Annotated[int, Interval(1, 10**9)]
Whole = Annotated[int, Interval(0, 10**9)]
Steps = Annotated[int, Interval(1, 10**4)]  # more would never end, likewise for epochs
Epochs = Annotated[int, Interval(1, 10**6)]
Splits = Annotated[int, Interval(2, 10**4)]  # one would have no standard deviation
Positive = Annotated[float, Interval(0, low_open=True)]
NotNegative = Annotated[float, Interval(0)]
Guidance = Annotated[float, Interval(0, 1000)]  # more has no meaning, and ends in NaN or Inf
Fraction = Annotated[float, Interval(0, 1, high_open=True)]
FirstTime = Annotated[float, Interval(0.9, 1, high_open=True)]
LastTime = Annotated[float, Interval(0, 0.9, low_open=True, high_open=True)]
InnerFraction = Annotated[float, Interval(0, 1, low_open=True, high_open=True)]
Names = tuple[str, ...]  # as a flag, with commas between


class InputError(Exception):
    """A mistake in what the user gave: a file, a folder or a setting. Its text is one line that says what to do.

    ``status`` is the exit status of the script that it ends: 2 if the script could not begin, 1 otherwise.
    """

    def __init__(self, text: str, status: int = 1):
        super().__init__(text)
        self.status = status


class Stopped(KeyboardInterrupt):
    """A signal that asks this process to end, raised as an exception."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


def run(
    main: Callable[[], None],
    script: dict[str, Any],
    required: tuple[str, ...] = (),
    torchrun: bool = False,
    recipes: Recipes | None = None,
) -> None:
    """Sets the constants of a script from the command line and runs it; a mistake of the user ends it with one line.

    Args:
        main: what the script does.
        script: its ``globals()``.
        required: names of constants that have no usable default.
        torchrun: whether the script can be spread over many processes; only the first of them prints.
        recipes: sets of constants that --recipe can name; name -> script -> constants.
    """
    from files import release  # here, so that --help starts fast

    # A log file gets each line at once; a console that has no é for Fréchet shows a question mark
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    origins = from_flags(script, required=required, recipes=recipes)
    process, processes = "", 1
    try:
        rank, processes = place()
        if processes > 1 and not torchrun:
            name = Path(script["__file__"]).name
            raise InputError(f"{name} runs as one process: start it with python, not with torchrun", 2)
        process = f"process {rank}: " if processes > 1 else ""
        if rank > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        _adapt_progress_bars(rank)
        if recipes and origins:
            print("settings: " + ", ".join(f"{name} {script[name]} ({by})" for name, by in origins.items()))
        # Many processes wait for each other in code that no handler interrupts: there, signals end them as usual
        with _ending_signals() if processes == 1 else nullcontext():
            main()
    except InputError as error:
        stop(f"{process}{error}", error.status)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as error:  # a full disk, a folder that must not be written to
        stop(f"{process}{error.filename or 'a file'}: {error.strerror or error}")
    except KeyboardInterrupt as signal_or_key:
        stop("stopped", getattr(signal_or_key, "status", 130))
    except (RuntimeError, MemoryError) as error:
        if _is_out_of_memory(error):
            stop(process + _memory_advice(script))
        if isinstance(error, BrokenExecutor):
            stop("a worker process was killed, perhaps because memory ran out: try fewer --num_workers")
        if processes > 1 and re.search("gloo|NCCL|ncclRemoteError|onnection (closed|reset)", str(error)):
            stop(f"{process}lost the other processes: the one that ended first says why")
        raise
    finally:
        release()


def from_flags(
    script: dict[str, Any],
    argv: list[str] | None = None,
    required: tuple[str, ...] = (),
    recipes: Recipes | None = None,
) -> dict[str, str]:
    """Replaces the constants of a script by those of a recipe, and then by the values given on the command line.

    Args:
        script: the script's ``globals()``; changed in place.
        argv: the arguments, ``sys.argv[1:]`` when None.
        required, recipes: see ``run``.

    Returns:
        What set each constant that is not as in the script: "recipe NAME" or "flag".

    Raises:
        SystemExit: with status 2 and one line on stderr for an unknown flag, or a value that the annotation of its
            constant does not allow, wherever it comes from.
    """
    path = Path(script["__file__"])
    notes = dict(re.findall(r"^([A-Z][A-Z0-9_]*)\b[^#\n]*=[^#\n]*#\s*(.*)$", path.read_text("utf-8"), re.M))
    known = {name: of_scripts[path.stem] for name, of_scripts in (recipes or {}).items() if path.stem in of_scripts}
    values, kinds = constants(script), _annotations(script)
    parser = _Parser(description=script["__doc__"], formatter_class=argparse.RawDescriptionHelpFormatter)
    if known:
        about = f"a named set of constants: {', '.join(known)}; other flags override it [{next(iter(known))}]"
        parser.add_argument("--recipe", choices=known, default=next(iter(known)), metavar="NAME", help=about)
    for name, value in values.items():
        about = notes.get(name, "") + ("" if name in required else f" [{value}]")
        parser.add_argument(
            f"--{name.lower()}",
            dest=name,
            type=_reader(kinds[name], name),
            default=argparse.SUPPRESS,
            required=name in required,
            metavar="VALUE",
            help=about.strip().replace("%", "%%"),
        )
    flags = vars(parser.parse_args(argv))
    recipe = flags.pop("recipe", None)
    of_recipe = known.get(recipe, {})
    for source, given in ((path.name, values), (f"recipe {recipe}", of_recipe)):
        for name, value in given.items():
            fault = _fault(value, kinds[name], name) if name in kinds else f"{path.name} has no such constant"
            if fault and name not in required:
                stop(f"{source}: {name} = {value!r}: {fault}", 2)
            script[name] = str(ROOT / value) if value and name.endswith(PATH_ENDINGS) else value
    script.update(flags)
    return dict.fromkeys(of_recipe, f"recipe {recipe}") | dict.fromkeys(flags, "flag")


def checked(name: str, value: Any, kind: Any) -> Any:
    """An argument, checked as a constant of this kind would be; a number of NumPy or torch becomes one of Python.

    Raises:
        InputError: with its name, if it is not of this kind.
    """
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if fault := _fault(value, kind):
        raise InputError(f"{name}: {fault}")
    return value


def constants(script: dict[str, Any]) -> dict[str, Any]:
    """The constants of a script that are flags, by name: those with an annotation, which imported ones don't have."""
    return {name: script[name] for name in _annotations(script) if re.fullmatch(r"[A-Z][A-Z0-9_]*", name)}


def first_there(*paths: str) -> str:
    """The first of some paths inside the repository that exists, or else the last one: a file that was trained here,
    say, or else the one that comes with the repository."""
    return next((path for path in paths if (ROOT / path).exists()), paths[-1])


def place() -> tuple[int, int]:
    """Rank of this process and number of processes, as torchrun sets them; 0 and 1 without it.

    Raises:
        InputError: when only some of torchrun's variables are set, as by other launchers and batch scripts.
    """
    told = {name: os.environ.get(name, "").strip() for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")}
    if told["WORLD_SIZE"] in ("", "1"):
        return 0, 1
    bad = [name for name, value in told.items() if not value.isdecimal()]
    bad += [] if os.environ.get("MASTER_ADDR") else ["MASTER_ADDR"]
    if bad or int(told["RANK"]) >= int(told["WORLD_SIZE"]) or not 0 < int(told["MASTER_PORT"]) < 2**16:
        raise InputError(
            f"WORLD_SIZE is {told['WORLD_SIZE']!r}, but what torchrun sets with it is missing or does not fit: "
            f"{', '.join(bad) or 'RANK or MASTER_PORT'}; start with torchrun, or unset WORLD_SIZE for one process",
            2,
        )
    return int(told["RANK"]), int(told["WORLD_SIZE"])


def stop_on_signal() -> Callable[[], bool]:
    """Lets a loop finish its step on Ctrl-C, on SIGTERM, which is how SLURM ends a job, and on SIGHUP, which comes when
    the terminal is gone. A second Ctrl-C ends the process at once.

    Under torchrun it does not: torchrun passes on signals that its processes have received already.

    Returns:
        A function that says whether a signal has come.
    """
    received = []

    def receive(number: int, frame: object) -> None:
        received.append(number)
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGINT, *_ending()):
        signal.signal(number, receive)
    return lambda: bool(received)


def as_worker() -> None:
    """Prepares a process of a pool: only the main process stops it, and it ends when the main process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    main = multiprocessing.parent_process()
    threading.Thread(target=lambda: (main.join(), os._exit(1)), daemon=True).start()


def pick_device(name: str) -> "torch.device":
    """The torch device of a DEVICE constant; "auto" is the GPU when there is one.

    Raises:
        InputError: for a device that is not there.
    """
    import torch  # here, so that scripts that need no torch start fast

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, is_there in there.items() if is_there)
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise InputError(f"device {name!r} is none: auto, cpu, cuda or mps") from None
    if not there.get(device.type):
        raise InputError(f"no {name} device on this machine: --device auto takes what is there")
    return device


def stop(message: str, status: int = 1) -> NoReturn:
    """Ends the script with one line on stderr and no traceback."""
    print(message, file=sys.stderr)
    raise SystemExit(status)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        stop(f"{Path(self.prog).name}: {message} (--help lists the flags)", 2)


def _annotations(script: dict[str, Any]) -> dict[str, Any]:
    """Annotations of the constants of a script, by name."""
    if "__annotate__" in script:  # from Python 3.14 on, annotations are computed when they are used (PEP 649)
        return script["__annotate__"](1)
    return script.get("__annotations__", {})


def _fault(value: Any, kind: Any, name: str = "") -> str | None:
    """The complaint about a value that is not of the kind of its constant; None for one that is."""
    if name.endswith(PATH_ENDINGS) and value == "":
        return "a path is empty: perhaps a shell variable is not set"
    choices = get_args(kind)
    if get_origin(kind) is Literal:
        fits = any(value == choice and type(value) is type(choice) for choice in choices)
        return None if fits else f"{value!r} is not one of {', '.join(map(str, choices))}"
    if type(None) in choices:  # of X | None
        return None if value is None else _fault(value, choices[0])
    if get_origin(kind) is Annotated:
        number, interval = choices
        return _fault(value, number) or (None if value in interval else f"{value!r} is not a number {interval}")
    if kind is Names:
        fits = isinstance(value, tuple) and all(isinstance(name, str) and name for name in value)
        return None if fits and len({*value}) == len(value) else f"{value!r} is not a list of different names"
    if kind is float and type(value) in (int, float):
        return None if math.isfinite(value) else f"{value!r} is not a finite number"
    return None if type(value) is kind else f"{value!r} is not {_KINDS[kind]}"


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "None"}


def _reader(kind: Any, name: str) -> Callable[[str], Any]:
    """The function that turns the text of a flag into a value of a kind; argparse prints its errors as one line."""

    def read(text: str) -> Any:
        value = _value(text, kind)
        if fault := _fault(value, kind, name):
            raise argparse.ArgumentTypeError(fault)
        return value

    return read


def _value(text: str, kind: Any) -> Any:
    """The value of a kind that a text stands for; the text itself if there is none."""
    choices = get_args(kind)
    if get_origin(kind) is Literal:
        return next((choice for choice in choices if str(choice) == text), text)
    if type(None) in choices:
        return None if text == "None" else _value(text, choices[0])
    if get_origin(kind) is Annotated:
        return _value(text, choices[0])
    if kind is Names:
        return tuple(name.strip() for name in text.split(",")) if text.strip() else ()
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return text
    return text


def _ending() -> list[signal.Signals]:
    """Signals that ask a process to end, except those ignored on purpose, as SIGHUP under nohup."""
    names = ("SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    there = [signal.Signals[name] for name in names if hasattr(signal, name)]
    return [number for number in there if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def _ending_signals() -> Iterator[None]:
    """Raises signals that ask to end as ``Stopped``, so that clean-up code runs; afterwards restores the handlers."""

    def receive(number: int, frame: object) -> NoReturn:
        raise Stopped(number)

    before = {signal.SIGINT: signal.getsignal(signal.SIGINT)}
    before |= {number: signal.signal(number, receive) for number in _ending()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _adapt_progress_bars(rank: int) -> None:
    """Shows progress bars of the first process only, and writes them as one line a minute if they go to a log file."""
    given: dict[str, Any] = {"disable": True} if rank > 0 else {}
    if not sys.stderr.isatty():
        given |= {"mininterval": LOG_INTERVAL, "maxinterval": LOG_INTERVAL, "delay": LOG_INTERVAL}
        given["file"] = _Lines(sys.stderr)

    def start(self: tqdm, *args: Any, **kwargs: Any) -> None:
        _START(self, *args, **kwargs | given)

    tqdm.__init__ = start


_START = tqdm.__init__


class _Lines:
    """A file in which each state of a progress bar is a line of its own."""

    def __init__(self, file: TextIO):
        self.file, self.encoding = file, file.encoding

    def write(self, text: str) -> None:
        if text.strip():
            self.file.write(f"{text.strip()}\n")

    def flush(self) -> None:
        self.file.flush()


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an error of torch or NumPy says that the GPU or the machine has no memory left."""
    text = f"{type(error).__name__} {error}"
    return isinstance(error, MemoryError) or bool(re.search("OutOfMemory|out of memory|allocate memory", text))


def _memory_advice(script: dict[str, Any]) -> str:
    """Advice on what to try next."""
    batch, steps = script.get("BATCH_SIZE"), script.get("ACCUMULATE_STEPS")
    if batch is None:
        return "out of memory: other programs may hold it"
    if steps is None:
        return f"out of memory with --batch_size {batch}: try --batch_size {max(1, batch // 2)}"
    return (
        f"out of memory with --batch_size {batch} in {steps} part{'s' if steps > 1 else ''}: try "
        f"--accumulate_steps {2 * steps}, which keeps the batch and takes half as much"
    )
