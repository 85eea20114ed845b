"""Many processes do what one does: the same losses, every image once, the same generated images, one set of files."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_TRAINING, history_of, learn_little, run_script, save_nothing
from kill_training import forkserver

import distributed
import settings
from dataset import epoch_batches
from models.checkpoint import load_checkpoint

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")


def in_processes(size: int, work: Callable, *arguments) -> list:
    """What ``work`` returns in each of several processes that torchrun could have started."""
    context = forkserver()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    receiver, sender = context.Pipe(duplex=False)
    started = [
        context.Process(target=_process, args=(rank, size, port, sender, work, arguments)) for rank in range(size)
    ]
    for process in started:
        process.start()
    sender.close()
    found = {}
    while len(found) < size and receiver.poll(400):  # a process that waits for ever must not hold up the tests
        try:
            rank, found_there = receiver.recv()
        except EOFError:
            break
        found[rank] = found_there
    for process in started:
        process.join(20)
        process.kill()
    return [found[rank] for rank in range(size)]


def _process(rank, size, port, sender, work, arguments):
    torch.set_num_threads(1)
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    value = work(*arguments)
    sender.send((rank, value))


def run_and_listen(script: str, flags: list) -> tuple[list[float], str, set[str]]:
    """Losses of all steps of this process's part, what the script printed, and the files of OUTPUT_DIR it wrote to."""
    losses, written, output = [], set(), str(flags[-1])

    def watch(event, arguments):
        if event == "open" and str(arguments[0]).startswith(output) and "w" in (arguments[1] or ""):
            written.add(arguments[0])

    sys.addaudithook(watch)

    def listen(*values, original=distributed.total):
        sums = original(*values)
        losses.append(sums[0])
        return sums

    distributed.total = listen
    return losses, run_quietly(script, flags), written


def run_quietly(script: str, flags: list) -> str:
    """Runs a script without its pictures and its long trainings, and returns what it printed."""
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")) as out:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("plots.save", save_nothing)
            if "evaluate" in script:
                patch.setattr("metrics.report.write_html", lambda *args: None)
                learn_little()
            run_script(script, *flags)
        out.flush()
    return out.buffer.getvalue().decode()


def share_of(n, each):
    distributed.join(torch.device("cpu"))
    everything = distributed.spread(lambda i: (i, distributed.rank()), range(7))
    sums = distributed.total(1.5, torch.tensor(2.0))
    return [(part.start, part.stop) for part in distributed.parts(n, each)], everything, sums


def test_shares_are_disjoint_complete_and_equal_and_results_come_in_order():
    assert distributed.parts(10) == [slice(0, 10)]
    assert distributed.parts(10, 3) == [slice(0, 3), slice(3, 6), slice(6, 10)]
    assert distributed.spread(str, [3, 4]) == ["3", "4"]
    found = in_processes(3, share_of, 16, 2)
    edges = [edge for parts, _, _ in found for edge in parts]
    assert [start for start, _ in edges] == [0, *(stop for _, stop in edges[:-1])]
    assert edges[-1][1] == 16
    assert {stop - start for start, stop in edges} <= {2, 3}
    for _, everything, sums in found:
        assert everything == [(i, i % 3) for i in range(7)]
        assert sums == [4.5, 6.0]


@pytest.fixture(scope="module")
def flags(lens_data):
    """Flags of a training of 56 steps."""
    return [*TINY_TRAINING, "--data_dir", lens_data, "--epochs", 8, "--sample_interval", 8]


@pytest.fixture(scope="module")
def one(flags, tmp_path_factory):
    """Losses and folder of one process."""
    folder = tmp_path_factory.mktemp("one")
    original = distributed.total
    try:
        losses, *_ = run_and_listen("train/train_diffusion.py", [*flags, "--output_dir", folder])
    finally:
        distributed.total = original
    return losses, folder


def test_two_processes_give_the_losses_of_one_and_one_of_them_writes(flags, one, tmp_path):
    found = in_processes(2, run_and_listen, "train/train_diffusion.py", [*flags, "--output_dir", tmp_path])
    straight, folder = one
    assert len(straight) == 56
    for losses, *_ in found:
        np.testing.assert_allclose(losses, straight, rtol=1e-5)
    assert "2 processes" in found[0][1]
    assert found[0][2]
    assert found[1][1:] == ("", set())
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == names
    assert [row["epoch"] for row in history_of(tmp_path)] == list(range(1, 9))


def test_three_processes_that_accumulate_give_the_losses_of_one_too(flags, tmp_path):
    flags = [*flags, "--epochs", 2]
    run_quietly("train/train_diffusion.py", [*flags, "--output_dir", tmp_path / "one"])
    flags = [*flags, "--accumulate_steps", 2, "--output_dir", tmp_path / "three"]
    in_processes(3, run_and_listen, "train/train_diffusion.py", flags)
    losses = ([row["loss"] for row in history_of(tmp_path / name)] for name in ("one", "three"))
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_no_image_is_dropped_or_repeated_within_an_epoch():
    """Whatever the numbers of images, of processes and of parts."""
    random = np.random.default_rng(0)
    for n, size, each in [(108, 2, 1), (108, 3, 2), (1001, 8, 1), (997, 5, 3)]:
        seen = []
        for batch in epoch_batches(n, 160, int(random.integers(100)), 1):
            for rank in range(size):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(distributed, "rank", lambda rank=rank: rank)
                    patch.setattr(distributed, "size", lambda size=size: size)
                    seen += [batch[part] for part in distributed.parts(len(batch), each)]
        assert torch.equal(torch.cat(seen).sort().values, torch.arange(n))


def torchrun(*arguments, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=ROOT, **options)


def test_a_process_that_dies_is_named_and_torchrun_goes_on_from_the_checkpoint(flags, one, tmp_path):
    script = [ROOT / "train" / "train_diffusion.py", *flags, "--output_dir", tmp_path, "--checkpoint_save_interval", 1]
    job = torchrun("--standalone", "--max-restarts=1", *script)
    while job.poll() is None and not list(tmp_path.glob("*ckpts/*epoch_2.pt")):
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    out, error = job.communicate(timeout=200)
    assert job.returncode == 0, error
    assert re.search(r"exitcode: -9\) local_rank: [01]", error)
    assert "going on" in out
    straight = load_checkpoint(one[1] / "dit_conditional_ckpts" / "dit_conditional_final.pt")
    resumed = load_checkpoint(tmp_path / "dit_conditional_ckpts" / "dit_conditional_final.pt")
    for name, value in straight["model_state_dict"].items():
        torch.testing.assert_close(resumed["model_state_dict"][name], value, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        [row["loss"] for row in history_of(tmp_path)], [row["loss"] for row in history_of(one[1])], rtol=1e-4
    )


def ends_with(script: str, flags: list) -> tuple[int, str]:
    """Exit status of a script that does not get far, and what it said on stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as error, pytest.raises(SystemExit) as ended:
        run_quietly(script, flags)
    return ended.value.code, error.getvalue()


def test_a_mistake_is_said_once_by_the_first_process(tmp_path):
    flags = ["--data_dir", tmp_path / "absent", "--output_dir", tmp_path / "run"]
    (status, error), (status_of_other, error_of_other) = in_processes(2, ends_with, "train/train_diffusion.py", flags)
    assert error.startswith(f"process 0: {tmp_path}/absent: no class folders with .npy, .npz or FITS files")
    assert error_of_other == "process 1: lost the other processes: the one that ended first says why\n"
    assert (status, status_of_other) == (2, 1)


def test_generation_and_scores_of_two_processes_are_those_of_one(lens_data, checkpoint, classifier, tmp_path):
    reports = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        flags = ["--data_dir", lens_data, "--checkpoint_path", checkpoint, "--classifier_path", classifier]
        flags += ["--output_dir", folder / "generated", "--report_dir", folder, "--figure_path", folder / "l.png"]
        flags += ["--batch_size", 3, "--num_splits", 2, "--num_ode_steps", 2, "--device", "cpu"]
        flags += ["--cache_dir", folder / "cache"]
        out, *others = in_processes(size, run_quietly, "evaluate/evaluate_fld.py", flags)
        assert "Fréchet" in out
        assert not any(others)
        reports.append(json.loads((folder / "report.json").read_text())["metrics"])
    assert reports[0] == reports[1]
    files = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1" / "generated").glob("*/*.npy"))
    assert files
    for file in files:
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


@pytest.mark.parametrize("script", ["train/train_classifier.py", "simulate/simulate_lenses.py"])
def test_a_script_for_one_process_says_so(script, monkeypatch, capsys):
    place = {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit):
        run_script(script)
    assert (
        f"{Path(script).name} runs as one process: start it with python, not with torchrun" in capsys.readouterr().err
    )


def test_more_processes_than_images_in_a_batch_is_one_line(flags, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_script("train/train_diffusion.py", *flags, "--output_dir", tmp_path, "--accumulate_steps", 17)
    assert "--batch_size 16 leaves no image for some of the 1 processes x 17" in capsys.readouterr().err


def test_a_process_without_a_gpu_of_its_own_is_named(monkeypatch):
    place = {"WORLD_SIZE": 8, "RANK": 3, "LOCAL_RANK": 3, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(settings.InputError, match="more processes than the 2 GPUs"):
        distributed.join(torch.device("cuda"))
