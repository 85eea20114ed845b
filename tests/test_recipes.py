"""A recipe is a complete set of constants that scripts allow. A flag overrides a recipe, a recipe the script."""

import importlib
import sys
from fnmatch import fnmatch

import pytest
import torch
from conftest import ROOT

import settings
from models import flow
from models.checkpoint import load_checkpoint
from models.generator import build_untrained, of_today
from parameters import from_plain, name_of
from simulate.recipes import MODEL_II
from train.recipes import RECIPES

FILES = sorted((ROOT / "weights").glob("*.safetensors"))
SCRIPTS = ("train_diffusion", "train_classifier", "train_regressor", "export_weights")


def globals_of(stem: str) -> dict:
    """A copy of the globals of a training script."""
    return vars(importlib.import_module(f"train.{stem}")).copy()


@pytest.mark.parametrize(("name", "stem"), [(name, stem) for name in RECIPES for stem in RECIPES[name]])
def test_the_constants_of_a_recipe_are_those_of_its_script_and_allowed(name, stem):
    assert stem in SCRIPTS
    script, recipe = globals_of(stem), RECIPES[name][stem]
    before = settings.constants(script)
    assert recipe.keys() <= before.keys()
    origins = settings.from_flags(script, ["--recipe", name], recipes=RECIPES)
    assert origins == dict.fromkeys(recipe, f"recipe {name}")
    for constant, value in settings.constants(script).items():
        expected = recipe.get(constant, before[constant])
        if expected and constant.endswith(("_DIR", "_PATH")):
            expected = str(ROOT / expected)
        assert value == expected, constant


@pytest.mark.parametrize(
    ("constants", "fault"), [({"EPOCHS": 0}, "EPOCHS = 0: 0 is not"), ({"SOLVER": "Euler"}, "of euler")]
)
def test_a_recipe_that_a_script_does_not_allow_is_one_line(constants, fault, capsys):
    with pytest.raises(SystemExit) as stopped:
        settings.from_flags(globals_of("train_diffusion"), [], recipes={"mine": {"train_diffusion": constants}})
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("recipe mine: ")
    assert fault in error


def test_the_published_recipe_is_the_default_and_changes_nothing():
    for stem in SCRIPTS:
        script = globals_of(stem)
        before = settings.constants(script)
        assert settings.from_flags(script, [], recipes=RECIPES) == {}
        paths = {
            name: str(ROOT / value) for name, value in before.items() if name.endswith(("_DIR", "_PATH")) and value
        }
        assert settings.constants(script) == before | paths


def test_a_recipe_that_is_none_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        settings.from_flags(globals_of("train_diffusion"), ["--recipe", "quick"], recipes=RECIPES)
    assert stopped.value.code == 2
    assert "'quick' (choose from" in capsys.readouterr().err


def test_a_flag_overrides_a_recipe_which_overrides_the_constants_and_the_settings_say_so(monkeypatch, capsys):
    script = globals_of("train_diffusion")
    seen = {}
    flags = ["--recipe", "first_look", "--batch_size", "8", "--seed", "42"]
    monkeypatch.setattr(sys, "argv", ["train_diffusion.py", *flags])
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **options: None, raising=False)
    settings.run(lambda: seen.update(settings.constants(script)), script, recipes=RECIPES)
    recipe = RECIPES["first_look"]["train_diffusion"]
    assert recipe["BATCH_SIZE"] != 8
    assert seen["BATCH_SIZE"] == 8
    assert seen["LEARNING_RATE"] == recipe["LEARNING_RATE"] != globals_of("train_diffusion")["LEARNING_RATE"]
    assert seen["WEIGHT_DECAY"] == globals_of("train_diffusion")["WEIGHT_DECAY"]
    (line,) = capsys.readouterr().out.splitlines()
    said = line.removeprefix("settings: ").split(", ")
    assert "BATCH_SIZE 8 (flag)" in said
    assert "SEED 42 (flag)" in said
    assert f"LEARNING_RATE {recipe['LEARNING_RATE']} (recipe first_look)" in said
    assert {entry.split()[0] for entry in said} == recipe.keys() | {"BATCH_SIZE", "SEED"}


# The networks of weights/


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_of_weights_has_the_recipe_that_makes_it(path):
    recipe, content = RECIPES[path.stem], load_checkpoint(path)
    exported = settings.constants(globals_of("export_weights")) | recipe["export_weights"]
    assert ROOT / exported["OUTPUT_PATH"] == path
    card = path.with_suffix(".md").read_text()
    trained = "train_classifier" if "image_size" in content else "train_diffusion"
    trained = "train_regressor" if "regressor_parameters" in content else trained
    for stem in (trained, "export_weights"):
        assert f"python train/{stem}.py --recipe {path.stem}" in card
    codec = {f"codec.{name}": value for name, value in content.get("codec_state_dict", {}).items()}
    for name, value in (content["model_state_dict"] | codec).items():
        if "running_" not in name and "num_batches" not in name:
            assert (value.dtype == torch.float16) == fnmatch(name, exported["HALVED"]), name
    script = settings.constants(globals_of(trained)) | recipe[trained]
    assert exported["CHECKPOINT_PATH"].startswith(f"{script['OUTPUT_DIR']}/")
    today = of_today(content)
    if trained != "train_classifier":
        told = today.get("regressor_parameters", today["parameters"])
        assert [of["name"] for of in told] == [name_of(specification) for specification in script["PARAMETERS"]]
    if trained != "train_diffusion":
        assert content["image_size"] == script["IMAGE_SIZE"]
        return
    model = build_untrained(script["MODEL_SIZE"], MODEL_II.classes, MODEL_II.image_shape, from_plain(told))
    assert {name: today[name] for name in model.description()} == model.description()
    names = ("NUM_ODE_STEPS", "CFG_SCALE", "SOLVER", "TIME_GRID", "TOLERANCE", "LAST_TIME", "FIRST_TIME")
    assert flow.Sampler(**content["sampler"]) == flow.Sampler(*(script[name] for name in names))
    assert content["epoch"] == script["EPOCHS"]
    for name in ("BATCH_SIZE", "LEARNING_RATE", "ADAM_BETA2", "TIME_MEDIAN", "TIME_WIDTH", "EMA_BETA", "SEED"):
        assert content["settings"][name] == script[name], name
