"""Constants of a script are flags of the same name; a mistake is one line and exit status 2."""

import ast
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import nanodit_path
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
        "from typing import Literal\nfrom settings import Count, Fraction, Positive, Whole\nLIMIT = 3\n"
        "BATCH_SIZE: Count = 160  # Reduce when memory runs out\n"
        "LEARNING_RATE: Positive = 1e-4  # Reduce for 100% of NaN losses\n"
        "DROPOUT: Fraction = 0.1  # A share\n"
        "COMPILE: bool = False  # Faster\nSEED: Whole = 1  # Any\nWEIGHTS_PATH: str | None = None  # A file\n"
        "DATA_DIR: str = 'data'  # A folder\nMODE: Literal[None, 'a', 'b'] = None  # One of these\n"
    )
    script = {"__file__": str(source), "__doc__": "A script."}
    exec(source.read_text(), script)
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
    script["__annotations__"] |= {"STEPS": settings.Count | None, "SCALE": settings.NotNegative | None}
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
        ("--batch_size 0", "0 is not a number from 1 to 1,000,000,000"),
        ("--batch_size -3", "-3 is not a number from 1"),
        ("--learning_rate nan", "nan is not a finite number"),
        ("--learning_rate 0", "0.0 is not a number above 0"),
        ("--learning_rate fast", "'fast' is not a number"),
        ("--dropout 1", "1.0 is not a number from 0 and below 1"),
        ("--compile yes", "'yes' is not true or false"),
        ("--mode c", "'c' is not one of None, a, b"),
        ("--batch_size", "expected one argument"),
        ("--data_dir=", "a path is empty"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(script, capsys, flags, complaint):
    with pytest.raises(SystemExit) as stopped:
        settings.from_flags(script, flags.split())
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert complaint in lines[0]


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("BATCH_SIZE", 0, "0 is not a number from 1 to"),
        ("BATCH_SIZE", 16.0, "16.0 is not a whole number"),
        ("BATCH_SIZE", True, "True is not a whole number"),
        ("BATCH_SIZE", [16], r"\[16\] is not a whole number"),
        ("LEARNING_RATE", 0, "0 is not a number above 0"),
        ("LEARNING_RATE", "1e-4", "'1e-4' is not a number"),
        ("LEARNING_RATE", float("inf"), "inf is not a finite number"),
        ("DROPOUT", 2, "2 is not a number from 0 and below 1"),
        ("COMPILE", "yes", "'yes' is not true or false"),
        ("COMPILE", 1, "1 is not true or false"),
        ("SEED", -1, "-1 is not a number from 0"),
        ("DATA_DIR", None, "None is not a text"),
        ("MODE", "A", "'A' is not one of None, a, b"),
        ("MODE", int, "is not one of None, a, b"),
    ],
)
def test_a_constant_edited_in_the_script_is_checked_as_a_flag_is(script, capsys, name, value, complaint):
    script[name] = value
    with pytest.raises(SystemExit) as stopped:
        settings.from_flags(script, [])
    assert stopped.value.code == 2
    assert re.fullmatch(rf"script.py: {name} = .*: .*{complaint}.*\n", capsys.readouterr().err)


def test_a_whole_number_may_stand_for_another_one(script):
    script |= {"LEARNING_RATE": 1, "SEED": 0}
    settings.from_flags(script, [])
    assert (script["LEARNING_RATE"], script["SEED"]) == (1, 0)


@pytest.mark.parametrize("script_path", SCRIPTS)
def test_the_annotation_of_every_constant_says_what_it_may_be(script_path):
    tree = ast.parse((ROOT / script_path).read_text(encoding="utf-8"))
    plain = [
        node.targets[0].id for node in tree.body if isinstance(node, ast.Assign) and hasattr(node.targets[0], "id")
    ]
    assert not [name for name in plain if re.fullmatch(r"[A-Z][A-Z0-9_]*", name)]
    annotations = [node for node in tree.body if isinstance(node, ast.AnnAssign)]
    numbers = [
        node.target.id for node in annotations if ast.unparse(node.annotation).split(" |")[0] in ("int", "float")
    ]
    assert not numbers, "say from where to where"


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (np.int64(2), settings.Count, 2),
        (torch.tensor(3), settings.Count, 3),
        (np.float32(1.5), settings.NotNegative, 1.5),
    ],
)
def test_numbers_of_numpy_and_torch_are_numbers(value, kind, expected):
    found = settings.checked("steps", value, kind)
    assert found == expected
    assert type(found) is type(expected)
    with pytest.raises(settings.InputError, match="steps: "):
        settings.checked("steps", np.array([2]), kind)


VALUES = {
    "BATCH_SIZE": st.integers(-3, 10**9 + 3),
    "LEARNING_RATE": st.floats() | st.integers(-3, 3),
    "DROPOUT": st.floats(-1, 2),
    "COMPILE": st.booleans(),
    "SEED": st.integers(-3, 3),
    "DATA_DIR": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    "MODE": st.sampled_from([None, "a", "b", "c"]),
}


@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.sampled_from(sorted(VALUES)).flatmap(lambda name: st.tuples(st.just(name), VALUES[name])))
def test_a_value_means_the_same_in_a_script_in_a_recipe_and_as_a_flag(script, named):
    name, value = named
    found = []
    for where in ("script", "recipe", "flag"):
        copy, recipes = script.copy(), {"r": {"script": {name: value} if where == "recipe" else {}}}
        if where == "script":
            copy[name] = value
        try:
            settings.from_flags(copy, [f"--{name.lower()}={value}"] if where == "flag" else [], recipes=recipes)
        except SystemExit as stopped:
            found.append(stopped.code)
        else:
            found.append(copy[name])
    if name == "DATA_DIR" and value:
        assert found == [str(ROOT / value), str(ROOT / value), value]
    else:
        assert found[0] == found[1] == found[2]
        assert found[0] in (2, value)


# Recipes


SETS = {
    "published": {"script": {}, "other": {}},
    "small": {"script": {"BATCH_SIZE": 16, "LEARNING_RATE": 2e-3, "DATA_DIR": "mine", "WEIGHTS_PATH": None}},
    "elsewhere": {"other": {"BATCH_SIZE": 32}},
}


def test_a_flag_overrides_a_recipe_and_a_recipe_a_constant(script):
    before = settings.constants(script)
    origins = settings.from_flags(script, ["--recipe", "small", "--batch_size", "8", "--seed", "3"], recipes=SETS)
    by_recipe = {"LEARNING_RATE": 2e-3, "DATA_DIR": str(ROOT / "mine"), "WEIGHTS_PATH": None}
    assert settings.constants(script) == before | by_recipe | {"BATCH_SIZE": 8, "SEED": 3}
    assert origins == dict.fromkeys(by_recipe, "recipe small") | {"BATCH_SIZE": "flag", "SEED": "flag"}


@pytest.mark.parametrize("flags", [[], ["--recipe", "published"]])
def test_the_first_recipe_is_the_default(script, flags):
    before = settings.constants(script)
    assert settings.from_flags(script, flags, recipes=SETS) == {}
    assert settings.constants(script) == before | {"DATA_DIR": str(ROOT / "data")}


@pytest.mark.parametrize(
    ("flags", "recipes", "complaint"),
    [
        ("--recipe none", SETS, "argument --recipe: invalid choice: 'none' (choose from"),
        ("--recipe elsewhere", SETS, "argument --recipe: invalid choice: 'elsewhere' (choose from"),
        ("--recipe", SETS, "expected one argument"),
        ("--recipe small", None, "unrecognized arguments: --recipe small"),
        ("--recipe elsewhere", {"elsewhere": SETS["elsewhere"]}, "unrecognized arguments: --recipe elsewhere"),
    ],
)
def test_a_recipe_that_is_not_there_is_one_line(script, capsys, flags, recipes, complaint):
    with pytest.raises(SystemExit) as stopped:
        settings.from_flags(script, flags.split(), recipes=recipes)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line
    assert "choose" not in line or all(name in line for name in ("published", "small"))


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("BATCH_SIZE", 0, "0 is not a number from 1 to"),
        ("BATCH_SIZE", 16.0, "16.0 is not a whole number"),
        ("LEARNING_RATE", "fast", "'fast' is not a number"),
        ("COMPILE", 1, "1 is not true or false"),
        ("MODE", "c", "'c' is not one of None, a, b"),
        ("DATA_DIR", "", "a path is empty"),
        ("WEIGHTS_PATH", 3, "3 is not a text"),
        ("EPOCHS", 3, r"script\.py has no such constant"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--batch_size", "3"]])
def test_a_recipe_is_checked_as_a_script_is(script, capsys, name, value, complaint, flags):
    """Also where a flag overrides the constant of the recipe."""
    with pytest.raises(SystemExit) as stopped:
        settings.from_flags(script, ["--recipe", "bad", *flags], recipes={"bad": {"script": {name: value}}})
    assert stopped.value.code == 2
    assert re.fullmatch(rf"recipe bad: {name} = .*: .*{complaint}.*\n", capsys.readouterr().err)


def test_the_settings_that_are_printed_say_who_set_them(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--recipe", "small", "--batch_size", "8"])
    settings.run(lambda: None, script, recipes=SETS)
    line = capsys.readouterr().out
    assert line.startswith("settings: BATCH_SIZE 8 (flag), LEARNING_RATE 0.002 (recipe small), DATA_DIR ")
    monkeypatch.setattr(sys, "argv", ["script.py"])
    settings.run(lambda: None, script, recipes=SETS)
    assert not capsys.readouterr().out


def test_help_names_the_recipes(script, capsys):
    with pytest.raises(SystemExit):
        settings.from_flags(script, ["--help"], recipes=SETS)
    text = " ".join(capsys.readouterr().out.split())
    assert "a named set of constants: published, small; other flags override it [published]" in text


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
    assert "--limit" not in text, "has no annotation, as what a script imports"


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


# Where scripts run


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"},
        {"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1251"},
        {"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp932"},
        {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
    ],
)
def test_any_console_shows_what_a_script_says(tmp_path, environment):
    (tmp_path / "script.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport settings\n"
        "DATA_DIR: str = 'data'  # Fréchet’s folder\n"
        "def main():\n    print('Fréchet ± 1', DATA_DIR)\n    raise settings.InputError('é – ' + DATA_DIR)\n"
        "settings.run(main, globals())\n",
        encoding="utf-8",
    )
    bytes_of_a_name = os.fsencode(tmp_path) + b"/\xff\xe9"
    command = [sys.executable, str(tmp_path / "script.py"), "--data_dir", bytes_of_a_name]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True)
    assert done.returncode == 1
    assert b"chet" in done.stdout
    assert b"Traceback" not in done.stderr
    helped = subprocess.run([*command[:2], "--help"], env=os.environ | environment, capture_output=True)
    assert helped.returncode == 0
    assert b"chet" in helped.stdout


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": ""}, {"WORLD_SIZE": "1"}, {"RANK": "3"}, {"MASTER_PORT": "1"}])
def test_what_is_left_of_torchrun_does_not_matter_to_one_process(monkeypatch, environment):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert settings.place() == (0, 1)


FOUR = {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def test_half_of_what_torchrun_sets_is_one_line(script, monkeypatch, capsys):
    for name, value in FOUR.items():
        monkeypatch.setenv(name, value)
    assert settings.place() == (2, 4)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    for name, value in [
        (name, value) for name in FOUR for value in ("", None, "x") if name != "MASTER_ADDR" or not value
    ]:
        with monkeypatch.context() as patch:
            patch.setenv(name, value or "")
            if value is None:
                patch.delenv(name)
            if name == "WORLD_SIZE" and not value:
                continue
            with pytest.raises(SystemExit) as stopped:
                settings.run(lambda: None, script, torchrun=True)
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert name in error
    for name, value in (("WORLD_SIZE", "0"), ("MASTER_PORT", "0"), ("MASTER_PORT", "99999"), ("RANK", "4")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(settings.InputError, match="does not fit: RANK or MASTER_PORT"):
                settings.place()
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(settings.InputError, match="does not fit: RANK or MASTER_PORT"):
        settings.place()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_script_that_is_asked_to_end_tidies_up(script, heard, monkeypatch, capsys, number):
    tidied = []

    def main():
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            tidied.append(True)

    monkeypatch.setattr(sys, "argv", ["script.py"])
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        settings.run(main, script)
    assert (stopped.value.code, tidied) == (128 + number, [True])
    assert capsys.readouterr().err == "stopped\n"
    assert signal.getsignal(number) is before


def test_nohup_is_obeyed(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop_asked = settings.stop_on_signal()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop_asked()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_progress_bar_in_a_log_file_is_a_line_a_minute(monkeypatch, terminal):
    """The bar has a simulated clock: 300 steps of one second each."""
    clock, log = [0.0], io.StringIO()
    log.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", log)
    settings._adapt_progress_bars(0)
    bar = settings.tqdm(total=300, file=log, desc="training", leave=False)
    bar._time = lambda: clock[0]
    bar.start_t = bar.last_print_t = 0.0
    for _ in range(300):
        clock[0] += 1
        bar.update()
    bar.close()
    written = log.getvalue()
    if terminal:
        assert written.count("\r") > 100
    else:
        assert "\r" not in written
        lines = written.splitlines()
        assert 4 <= len(lines) <= 6
        assert all(line.startswith("training: ") for line in lines)


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
        "evaluate/gpu_reference.py",
        "simulate/simulate_lenses.py",
        "train/export_weights.py",
        "train/train_classifier.py",
        "train/train_diffusion.py",
        "train/train_regressor.py",
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


def lists_every_constant(script_path, text):
    for name in re.findall(r"^([A-Z][A-Z0-9_]*)(?::[^=\n]*)? = ", (ROOT / script_path).read_text(), re.M):
        assert f"--{name.lower()} " in text


def of_this_repository():
    return [name for name in sys.modules if name.split(".")[0] in nanodit_path._NAMES]


@pytest.mark.parametrize("script_path", SCRIPTS)
def test_scripts_run_from_any_folder(script_path, tmp_path, monkeypatch, capsys):
    """No module of this repository is imported and its root is not on the path, as when Python starts."""
    path = [str((ROOT / script_path).parent), *(place for place in sys.path if Path(place).resolve() != ROOT)]
    monkeypatch.setattr(sys, "path", path)
    monkeypatch.chdir(tmp_path)
    imported = {name: sys.modules.pop(name) for name in of_this_repository()}
    try:
        with pytest.raises(SystemExit) as stopped:
            run_script(script_path, "--help")
    finally:
        for name in of_this_repository():
            del sys.modules[name]
        sys.modules.update(imported)
    assert stopped.value.code == 0
    lists_every_constant(script_path, capsys.readouterr().out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "script_path",
    [path if path.startswith("simulate") else pytest.param(path, marks=pytest.mark.long) for path in SCRIPTS],
)
def test_scripts_start_in_any_folder(script_path, tmp_path):
    """The same as the test above, with a new process for each script."""
    command = [sys.executable, str(ROOT / script_path), "--help"]
    helped = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    lists_every_constant(script_path, helped.stdout)
    assert not list(tmp_path.iterdir())
