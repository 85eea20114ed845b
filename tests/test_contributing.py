"""The examples of CONTRIBUTING.md do what they say, and the code is laid out as it says."""

import ast
import re
import runpy

import pytest
import torch
from conftest import ROOT, run_script
from test_flow import gaussian_velocity
from test_generator import pixel_generator

import settings
from dataset import NpyDataset
from metrics import report, score, two_sample
from models import flow
from models.classifier import load_classifier
from models.generator import NETWORKS, SIZES, generate_image, load_model
from train.recipes import RECIPES

EXAMPLES = dict(re.findall(r"```python\n# (\w+): [^\n]*\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S))


@pytest.fixture
def add():
    """Runs the example of a given title; what it adds is taken away after the test."""
    registries = (flow.SOLVERS, NETWORKS, SIZES, RECIPES, score.TITLES)
    before = [dict(registry) for registry in registries]
    comparisons = list(score._COMPARISONS)
    yield lambda what: exec(EXAMPLES[what], {"__name__": what})
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)
    score._COMPARISONS[:] = comparisons


def script(path: str) -> dict:
    """The globals of a script that is not run."""
    return runpy.run_path(str(ROOT / path), run_name="not the main one")


def test_the_examples_are_those_of_what_is_added_most():
    assert list(EXAMPLES) == ["metric", "solver", "network", "recipe"]


def test_the_metric_is_in_the_table_beside_its_floor(add, lens_data, monkeypatch, capsys):
    add("metric")
    monkeypatch.setattr(two_sample, "_STEPS", 1)
    test, train = (NpyDataset(lens_data, None, split) for split in ("test", "train"))
    reference = score.Reference(test, train, 3, load_classifier(ROOT / "weights" / "resnet18_lens.safetensors"))
    sample = reference.score("train", train, 2, seed=0)
    metric = sample.metrics["mean_flux"]
    assert metric.keys() == {"overall", *train.classes}
    assert metric["overall"]["value"] > 0
    assert metric["overall"]["floor"] > 0
    report.print_table(sample, 3)
    assert "Mean flux over peak, difference in pixels" in capsys.readouterr().out


def test_the_solver_is_of_second_order_at_least_and_a_flag(add):
    add("solver")
    noise, labels = torch.randn(50, 1, 2, 2, dtype=torch.float64), torch.zeros(50)

    def error(steps):
        found = flow.SOLVERS["midpoint"](gaussian_velocity(0.7, 0.3), noise, labels, flow.time_grid(steps))
        return (found - (0.7 + 0.3 * noise)).abs().max().item()

    assert error(10) / error(20) > 3.8
    images = pixel_generator().generate(torch.arange(3), flow.Sampler(4, 1.0, "midpoint"))
    assert images.shape == (3, 1, 8, 8)
    training = script("train/train_diffusion.py")
    settings.from_flags(training, ["--solver", "midpoint"])
    assert training["SOLVER"] == "midpoint"


def test_the_network_trains_and_generates(add, lens_data, tmp_path):
    add("network")
    flags = ["--model_size", "Tiny-32", "--data_dir", lens_data, "--output_dir", tmp_path, "--batch_size", 36]
    flags += ["--epochs", 2, "--warmup_epochs", 0, "--num_ode_steps", 2, "--ema_update_every", 1]
    run_script("train/train_diffusion.py", *flags)
    model = load_model(tmp_path / "dit_conditional_ckpts" / "dit_conditional_final.pt", "cpu")
    assert type(model.network).__name__ == "Tiny"
    assert generate_image(model, "cdm", num_samples=2).shape == (2, 1, 64, 64)


def test_the_recipe_is_taken_by_the_script(add):
    add("recipe")
    training = script("train/train_diffusion.py")
    origins = settings.from_flags(training, ["--recipe", "mine", "--epochs", "7"], recipes=RECIPES)
    assert (training["MODEL_SIZE"], training["BATCH_SIZE"], training["EPOCHS"]) == ("NanoDiT-S/8", 256, 7)
    assert origins == {"MODEL_SIZE": "recipe mine", "BATCH_SIZE": "recipe mine", "EPOCHS": "flag"}


# The house

_BELOW = {"files", "settings", "distributed", "dataset"}
ROOMS = {  # modules by folder or name -> what they may import from, beside themselves
    "nanodit_path": set(),
    "settings": {"files"},  # inside a function: --help starts fast
    "files": {"settings"},
    "distributed": {"files", "settings"},
    "image_files": {"settings"},
    "scaling": set(),
    "parameters": {"settings"},
    "parameter_tables": {"settings", "image_files", "parameters"},
    "layouts": {"files", "settings", "image_files", "parameter_tables"},
    "dataset": _BELOW - {"dataset"} | {"image_files", "scaling", "parameters", "parameter_tables", "layouts"},
    "plots": {"files", "settings"},
    "simulate": _BELOW | {"plots"},
    "models": _BELOW | {"parameters", "scaling", "image_files", "layouts"},
    "metrics": _BELOW | {"parameters", "scaling", "plots", "simulate", "models"},
    "train": _BELOW | {"parameters", "scaling", "plots", "simulate", "models"},
    "evaluate": _BELOW
    | {"parameters", "scaling", "image_files", "layouts", "plots", "simulate", "models", "metrics", "train"},
}
MODULES = sorted(path for path in (*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")) if "tests" not in path.parts)


def name_of(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def is_script(path) -> bool:
    return '\nif __name__ == "__main__":\n' in path.read_text()


def imports_of(path) -> set[str]:
    """Everything that a module imports, wherever in it, as names with dots."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, path
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_imports_go_one_way_and_never_from_a_script():
    scripts = {name_of(path) for path in MODULES if is_script(path)}
    assert {"train.train_diffusion", "evaluate.evaluate_fld", "simulate.simulate_lenses"} <= scripts
    for path in MODULES:
        name, imports = name_of(path), imports_of(path)
        assert not imports & scripts, name
        room = name.split(".")[0]
        assert room in ROOMS, f"{name} is in no room"
        foreign = {imported.split(".")[0] for imported in imports} & ROOMS.keys()
        assert foreign <= ROOMS[room] | {room, "nanodit_path"}, name


@pytest.mark.parametrize("path", [path for path in MODULES if is_script(path)], ids=name_of)
def test_the_main_of_a_script_can_be_read_at_once(path):
    (main,) = (node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) == "main")
    assert main.end_lineno - main.lineno + 1 <= 90


def test_what_generates_an_image_imports_nothing_that_scores_it():
    """By the imports at the top of modules, followed from ``models.generator`` on."""
    seen, todo = set(), ["models.generator"]
    while todo:
        name = todo.pop()
        path = ROOT / f"{name.replace('.', '/')}.py"
        if name in seen or not path.exists():
            seen.add(name)
            continue
        seen.add(name)
        top = ast.Module([node for node in ast.parse(path.read_text()).body if not isinstance(node, ast.If)], [])
        for node in top.body:
            if isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    packages = {name.split(".")[0] for name in seen}
    assert "torch" in packages
    assert not packages & {
        "lenstronomy",
        "torchmetrics",
        "torchvision",
        "scipy",
        "matplotlib",
        "ema_pytorch",
        "astropy",
    }
