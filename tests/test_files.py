"""A file is whole or not there, and a folder belongs to one run at a time."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY_TRAINING, run_script

import files
from settings import InputError

# Holds a folder, says so, and waits until it is told to end
HOLDER = "import files, sys; files.hold(sys.argv[1]); print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def other_process(tmp_path):
    """A process that holds tmp_path."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture(autouse=True)
def released():
    yield
    files.release()


def test_the_second_run_is_told_who_has_the_folder(other_process, tmp_path):
    with pytest.raises(InputError, match=rf"{tmp_path} is in use.*process {other_process.pid} on \S+, since 20\d\d-"):
        files.hold(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_process_holds_nothing(other_process, tmp_path, number):
    other_process.send_signal(number)
    other_process.wait()
    files.hold(tmp_path)
    files.hold(tmp_path)  # it may hold its own folder again


def test_a_folder_is_free_again_after_its_run(tmp_path):
    files.hold(tmp_path / "new")
    files.release()
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "new")]
    done = subprocess.run(command, cwd=ROOT, input="", capture_output=True, text=True)
    assert done.stdout == "held\n"


@pytest.mark.parametrize("script", ["train_diffusion", "train_classifier", "evaluate_fld", "simulate_lenses"])
def test_no_script_writes_where_another_one_does(script, lens_data, other_process, tmp_path, capsys):
    with_data = ["--data_dir", lens_data, "--output_dir", tmp_path]
    other = tmp_path.with_name(f"{tmp_path.name}_report")
    flags = {
        "train_diffusion": ["train/train_diffusion.py", *TINY_TRAINING, *with_data],
        "train_classifier": ["train/train_classifier.py", "--batch_size", 16, "--pretrained", "false", *with_data],
        "evaluate_fld": [
            *("evaluate/evaluate_fld.py", *with_data, "--report_dir", other, "--figure_path", other / "lenses.png"),
            *("--checkpoint_path", ROOT / "weights" / "component_mlp.safetensors"),
            *("--classifier_path", ROOT / "weights" / "resnet18_lens.safetensors"),
        ],
        "simulate_lenses": ["simulate/simulate_lenses.py", "--data_dir", tmp_path],
    }
    with pytest.raises(SystemExit):
        run_script(*flags[script])
    assert f"process {other_process.pid}" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not [path for path in tmp_path.rglob("*") if not path.name.startswith(".")]


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def no_locks(self, timeout):
        raise NotImplementedError

    monkeypatch.setattr(files.FileLock, "acquire", no_locks)
    files.hold(tmp_path)
    assert "cannot be locked" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_workers_end_with_the_process_that_started_them(tmp_path, number, status):
    """A killed process cannot stop its workers; one that is asked to end stops them."""
    # A copy of this process, which has imported all that it needs
    process = multiprocessing.get_context("fork").Process(
        target=simulate, args=(tmp_path / "data", tmp_path / "errors")
    )
    process.start()
    deadline = time.monotonic() + 30
    try:
        while len(list(tmp_path.glob("data/*/*.npy"))) < 5 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(members(process.pid)) > 1
        os.kill(process.pid, number)
        process.join(30)
        assert process.exitcode == status
        errors = (tmp_path / "errors").read_text()
        assert "Traceback" not in errors
        assert number == signal.SIGKILL or errors.strip().splitlines()[-1].endswith("stopped")
        while members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not members(process.pid)
    finally:
        for left in members(process.pid):
            os.kill(left, signal.SIGKILL)


def simulate(folder, errors) -> None:
    """Simulates images in a session of its own."""
    os.setsid()
    sys.stderr = errors.open("w", buffering=1)
    run_script("simulate/simulate_lenses.py", "--data_dir", folder, "--num_per_class", 300, "--num_workers", 2)


def members(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{entry}/stat") as file:
                state, _, _, of_session = re.sub(r".*\) ", "", file.read()).split()[:4]
        except (OSError, ValueError):
            continue
        if int(of_session) == session and state != "Z":
            found.append(int(entry))
    return found
