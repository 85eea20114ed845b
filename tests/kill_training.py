"""Kills trainings with SIGKILL at random moments, lets them go on, and compares what they wrote with one never killed.

    python tests/kill_training.py --kills 500
    python tests/kill_training.py --training classifier --kills 20

The test suite does the same with fewer kills. Every fourth one strikes while a checkpoint is being written.
"""

import csv
import ctypes
import gc
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
import settings
from models import flow
from models.checkpoint import load_checkpoint

KILLS = 20  # Runs, each killed once and resumed
TRAINING: Literal["diffusion", "classifier"] = "diffusion"  # The training to kill
DATA_DIR = None  # Folder with lens images; 48 of each class are simulated when None
SEED = 0  # Of the moments

_FLAGS = {
    "diffusion": "--patch_size 16 --latent_dim 32 --model_depth 2 --model_heads 2 --prediction image --batch_size 16 "
    "--epochs 2 --warmup_epochs 0.5 --learning_rate 2e-3 --num_ode_steps 2 --ema_beta 0.9 --ema_update_every 1 "
    "--sample_interval 2 --num_samples_per_class 2 --checkpoint_save_interval 1 --checkpoint_save_minutes 0.0005",
    "classifier": "--image_size 8 --batch_size 54 --epochs 2 --pretrained false --checkpoint_save_minutes 0.0005",
}
_FINAL = {
    "diffusion": "dit_conditional_ckpts/dit_conditional_final.pt",
    "classifier": "classifier_ckpts/resnet18_best.pt",
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(DATA_DIR or simulated(Path(folder) / "data"))
        moments = kill_and_compare(TRAINING, data, Path(folder), KILLS, SEED)
    print(f"{KILLS} of {KILLS} killed runs ended like the one that was not, to the last bit; {sum(moments)} of them")
    print("were killed while a checkpoint was being written")


def kill_and_compare(training: str, data: Path, folder: Path, kills: int, seed: int) -> list[bool]:
    """Whether each kill struck while a checkpoint was being written; fails at the first run whose result differs."""
    context = forkserver()

    def start(output: Path, slow_disk: bool = False) -> multiprocessing.Process:
        flags = [*_FLAGS[training].split(), "--data_dir", str(data), "--output_dir", str(output)]
        process = context.Process(target=train, args=(f"train.train_{training}", flags, slow_disk))
        process.start()
        return process

    def finish(output: Path) -> None:
        process = start(output)
        process.join()
        assert process.exitcode == 0, f"{output}: ended with {process.exitcode}"

    server = context.Process(target=train, args=(f"train.train_{training}", ["--help"]))
    server.start()  # starts the server, which imports everything once
    server.join()
    started = time.monotonic()
    finish(folder / "straight")
    duration = time.monotonic() - started
    expected = end_of(training, folder / "straight")
    random, writing = np.random.default_rng(seed), []
    for i in tqdm(range(kills), "killing", leave=False):
        output = folder / f"killed {i}"
        at_a_write = i % 4 == 3
        process = start(output, slow_disk=at_a_write)
        time.sleep(random.uniform(0.05, 0.5 if at_a_write else 0.95) * duration)
        while at_a_write and process.is_alive() and not list(output.glob("*/*.pt.*.part")):
            pass
        process.kill()
        process.join()
        writing.append(bool(list(output.glob("*/*.pt.*.part"))))
        finish(output)
        assert same(end_of(training, output), expected), f"{output}: ended in another way, seed {seed}, kill {i}"
        assert not list(output.rglob("*ckpts/*.part")), f"{output}: what was half written is still there"
        shutil.rmtree(output)
    return writing


def forkserver() -> multiprocessing.context.BaseContext:
    """Starts processes that have imported nearly all they need, so that a start takes no time."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "train.train_diffusion", "train.train_classifier"])
    return context


def train(module: str, flags: list[str], slow_disk: bool = False) -> None:
    """What the killed process does."""
    gc.freeze()  # so that the collector, which ``plots.save`` calls, skips what is imported
    if slow_disk:
        fsync = os.fsync
        os.fsync = lambda descriptor: (time.sleep(0.05), fsync(descriptor))
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # the usual lock is shared, and a killed process would keep it
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    script = importlib.import_module(module)
    settings.from_flags(vars(script), flags)
    script.main()


def train_and_watch(module: str, flags: list[str], sender: Connection) -> None:
    """Trains, and sends memory and open files after 1000 steps and at the end."""
    watched = []
    original = flow.objective

    def count(*args, **options):
        watched.append(None)
        if len(watched) == 1000:
            sender.send(usage(1000))
        return original(*args, **options)

    flow.objective = count
    train(module, flags)
    sender.send(usage(len(watched)))


def usage(steps: int) -> dict[str, int]:
    """Memory in bytes and number of open files of this process. The memory leaves out pages of files, which the system
    drops and fetches as it likes, and what the allocator keeps for later."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(AttributeError):  # C libraries other than glibc have none
            ctypes.CDLL(None).malloc_trim(0)
    resident, of_files = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    memory = (resident - of_files) * os.sysconf("SC_PAGE_SIZE")
    return {"steps": steps, "memory": memory, "files": len(os.listdir("/proc/self/fd"))}


def end_of(training: str, output: Path) -> dict[str, Any]:
    """Everything that a run has made, without its settings and its name."""
    final = load_checkpoint(output / _FINAL[training])
    final.pop("settings", None)
    final.pop("run", None)  # its name
    with open(output / "training_metrics.csv") as file:
        rows = list(csv.DictReader(file))
    samples = {str(path.relative_to(output)): path.read_bytes() for path in output.glob("*npy/*/*.npy")}
    pictures = {
        path.name: path.read_bytes() for pattern in ("*.png", "*_images/*.png") for path in output.glob(pattern)
    }
    return {"final": final, "rows": rows, "samples": samples, "pictures": pictures}


def same(a: Any, b: Any) -> bool:
    """Whether two results are equal to the last bit; only the images a second may differ."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != "images_per_second")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def simulated(folder: Path) -> Path:
    """A small set of lens images."""
    from simulate import simulate_lenses

    settings.from_flags(vars(simulate_lenses), ["--data_dir", str(folder), "--num_per_class", "48"])
    simulate_lenses.main()
    return folder


if __name__ == "__main__":
    settings.run(main, globals())
