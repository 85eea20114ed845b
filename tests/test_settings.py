"""Constants of a script are flags of the same name; a mistake is one line and exit status 2."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from conftest import ROOT

import settings

SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("evaluate", "simulate", "train")
    for path in (ROOT / folder).glob("*.py")
    if "\n    settings.run(" in path.read_text()
)


@pytest.fixture
def script(tmp_path):
    """The globals of a small script with one constant of each kind."""
    source = tmp_path / "script.py"
    source.write_text(
        "BATCH_SIZE = 160  # Reduce when memory runs out\n"
        "LEARNING_RATE = 1e-4  # Reduce for 100% of NaN losses\n"
        "COMPILE = False  # Faster\nSEED = 1  # Any\nWEIGHTS_PATH = None  # A file\nDATA_DIR = 'data'  # A folder\n"
    )
    script = {"__file__": str(source), "__doc__": "A script.", "__annotations__": {"MODE": Literal[None, "a", "b"]}}
    exec(source.read_text(), script)
    script["MODE"] = None
    return script


def test_flags_replace_constants_and_keep_their_type(script):
    flags = [
        "--batch_size",
        "32",
        "--learning_rate",
        "5e-5",
        "--compile",
        "True",
        "--mode",
        "b",
        "--weights_path",
        "w.pt",
        "--seed",
        "0",
    ]
    settings.from_flags(script, flags)
    assert (script["BATCH_SIZE"], script["LEARNING_RATE"], script["COMPILE"]) == (32, 5e-5, True)
    assert (script["MODE"], script["WEIGHTS_PATH"], script["SEED"]) == ("b", "w.pt", 0)


@pytest.mark.parametrize(("text", "value"), [("7", 7), ("None", None)])
def test_a_number_that_may_be_none_is_read_as_either(script, text, value):
    script |= {"STEPS": None, "SCALE": 2.0}
    script["__annotations__"] |= {"STEPS": int | None, "SCALE": float | None}
    settings.from_flags(script, ["--steps", text, "--scale", text])
    assert (script["STEPS"], script["SCALE"]) == (value, value)
    with pytest.raises(SystemExit):
        settings.from_flags(script, ["--steps", "0"])


def test_without_flags_constants_stay(script):
    settings.from_flags(script, [])
    assert (script["BATCH_SIZE"], script["COMPILE"], script["MODE"]) == (160, False, None)


def test_paths_in_a_script_are_inside_the_repository_and_paths_in_a_flag_are_not(script):
    settings.from_flags(script, [])
    assert script["DATA_DIR"] == str(ROOT / "data")
    assert script["WEIGHTS_PATH"] is None
    settings.from_flags(script, ["--data_dir", "mine"])
    assert script["DATA_DIR"] == "mine"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--batchsize 32", "unrecognized arguments: --batchsize"),
        ("--batch 32", "unrecognized arguments: --batch"),
        ("--batch_size many", "'many' is not a whole number"),
        ("--batch_size 1.5", "'1.5' is not a whole number"),
        ("--batch_size 0", "must be 1 or more"),
        ("--batch_size -3", "'-3' is not a finite number of 0 or more"),
        ("--learning_rate nan", "'nan' is not a finite number"),
        ("--learning_rate 0", "must be more than 0"),
        ("--learning_rate fast", "'fast' is not a number"),
        ("--compile yes", "'yes' is neither true nor false"),
        ("--mode c", "'c' is not one of None, a, b"),
        ("--batch_size", "expected one argument"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(script, capsys, flags, complaint):
    with pytest.raises(SystemExit) as stopped:
        settings.from_flags(script, flags.split())
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert complaint in lines[0]


@pytest.mark.parametrize("name", ["SEED", "PATCH_BASIS", "CHECKPOINT_SAVE_STEPS"])
def test_zero_is_taken_where_it_means_something(script, name):
    script[name] = 3
    settings.from_flags(script, [f"--{name.lower()}", "0"])
    assert script[name] == 0


def test_a_required_constant_must_be_given(script, capsys):
    with pytest.raises(SystemExit):
        settings.from_flags(script, [], required=("WEIGHTS_PATH",))
    assert "--weights_path" in capsys.readouterr().err


def test_help_lists_every_constant_with_its_comment_and_default(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        settings.from_flags(script, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert "Reduce when memory runs out [160]" in text
    assert "Reduce for 100% of NaN losses [0.0001]" in text


def test_a_mistake_in_the_data_ends_a_script_with_one_line(script, capsys, monkeypatch):
    def main():
        raise settings.InputError("data/axion/0.npy: is empty")

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as stopped:
        settings.run(main, script)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "data/axion/0.npy: is empty\n"


def test_a_place_that_cannot_be_written_to_ends_a_script_with_one_line(script, capsys, monkeypatch, tmp_path):
    def main():
        (tmp_path / "script.py" / "report").mkdir()

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as stopped:
        settings.run(main, script)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == f"{tmp_path / 'script.py' / 'report'}: Not a directory\n"


def test_ctrl_c_ends_a_script_with_one_line(script, capsys, monkeypatch):
    def main():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as stopped:
        settings.run(main, script)
    assert stopped.value.code == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert settings.pick_device("cpu").type == "cpu"
    with pytest.raises(settings.InputError, match="no cuda device"):
        settings.pick_device("cuda")


def test_the_scripts_are_those_that_the_readme_names():
    readme = (ROOT / "README.md").read_text()
    assert all(script in readme for script in SCRIPTS)
    assert SCRIPTS == [
        "evaluate/benchmark.py",
        "evaluate/check_metrics.py",
        "evaluate/compare_samplers.py",
        "evaluate/estimate_cost.py",
        "evaluate/evaluate_classify.py",
        "evaluate/evaluate_fld.py",
        "simulate/simulate_lenses.py",
        "train/distill.py",
        "train/export_weights.py",
        "train/train_classifier.py",
        "train/train_diffusion.py",
    ]


def test_what_was_trained_here_comes_before_what_the_repository_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "ROOT", tmp_path)
    assert settings.first_there("trained.pt", "weights.safetensors") == "weights.safetensors"
    (tmp_path / "trained.pt").touch()
    assert settings.first_there("trained.pt", "weights.safetensors") == "trained.pt"


@pytest.mark.parametrize("script_path", SCRIPTS)
def test_every_constant_of_every_script_has_a_comment(script_path):
    source = (ROOT / script_path).read_text()
    constants = re.findall(r"^([A-Z][A-Z0-9_]*)(?::[^=\n]*)? = .*$", source, re.M)
    assert constants
    for name in constants:
        assert re.search(rf"^{name}\b.*#", source, re.M), f"{script_path}: {name} has no comment"


@pytest.mark.parametrize("script_path", SCRIPTS)
def test_scripts_run_from_any_folder(script_path, tmp_path):
    command = [sys.executable, str(ROOT / script_path)]
    helped = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    for name in re.findall(r"^([A-Z][A-Z0-9_]*)(?::[^=\n]*)? = ", (ROOT / script_path).read_text(), re.M):
        assert f"--{name.lower()} " in helped.stdout
    assert Path(tmp_path).exists()
    assert not list(tmp_path.iterdir())
