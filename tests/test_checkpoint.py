"""Checkpoints give back what was saved, the published ones load, and none runs code."""

import pickle
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT
from ema_pytorch import EMA

from models import flow
from models.checkpoint import load_checkpoint, progress, save_checkpoint
from models.classifier import build_classifier, load_classifier
from models.generator import Generator, build_generator, build_untrained, load_model
from settings import InputError

LENSES = ("axion", "cdm", "no_sub")
TINY = {"patch_size": 16, "hidden_size": 16, "depth": 1, "num_heads": 2}


def tiny(**changes) -> Generator:
    """A generator of lenses with random weights."""
    model = build_untrained("NanoDiT-S/16", LENSES, (1, 64, 64), **TINY | changes)
    randomized(model.network)
    return model.eval()


def randomized(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def velocity_of(model):
    torch.manual_seed(0)
    return model(torch.randn(2, 1, 64, 64), torch.tensor([0.3, 0.9]), torch.tensor([0, 3]))


def test_a_generator_is_its_ema_weights(tmp_path):
    torch.manual_seed(0)
    model = tiny()
    ema = EMA(model.network, include_online_model=False)
    expected = velocity_of(model.with_network(ema.ema_model))
    randomized(model.network)
    path = tmp_path / "new" / "c.pt"
    weights = {"model_state_dict": model.network.state_dict(), "ema_state_dict": ema.state_dict()}
    save_checkpoint(path, **weights, **model.description(), sampler={})
    loaded = build_generator(load_checkpoint(path), path)
    torch.testing.assert_close(velocity_of(loaded), expected)
    assert not torch.allclose(velocity_of(loaded), velocity_of(model))
    assert not load_model(path, "cpu").training
    assert [file.name for file in path.parent.iterdir()] == ["c.pt"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint as the published code writes it: no configuration, NumPy scalars among the numbers."""
    torch.manual_seed(0)
    model = build_untrained("NanoDiT-B/2", LENSES, (1, 64, 64), gelu="none")
    ema = EMA(randomized(model.network), include_online_model=False)
    content = {
        "model_state_dict": {name: torch.zeros_like(value) for name, value in model.network.state_dict().items()},
        "ema_state_dict": ema.state_dict(),
        "scheduler_state_dict": {"_last_lr": [np.float64(1e-4)], "last_epoch": 3},
        "epoch": 69,
        "loss": np.float64(0.01),
        "global_step": 1000,
    }
    path = tmp_path_factory.mktemp("published") / "dit_conditional_epoch_69.pt"
    torch.save(content, path)
    return path, model


def test_published_checkpoints_load(published):
    path, model = published
    content = load_checkpoint(path)
    assert content["epoch"] == 69
    assert content["loss"] == 0.01
    loaded = build_generator(content, path)
    assert (loaded.classes, loaded.image_shape, loaded.prediction) == (LENSES, (1, 64, 64), "velocity")
    assert loaded.sampler == flow.Sampler(50, 5.0, "euler", "uniform")
    assert sum(p.numel() for p in loaded.parameters()) == 29_808_132
    z, t, y = torch.randn(1, 1, 64, 64), torch.tensor([0.5]), torch.tensor([1])
    with torch.no_grad():
        torch.testing.assert_close(loaded(z, t, y), model(z, t, y))


def test_numpy_scalars_load_under_their_old_and_new_names(published, tmp_path):
    """NumPy 1, with which the published code ran, calls the module numpy.core."""
    path, _ = published
    old = tmp_path / "old.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in content
                content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            target.writestr(name, content)
    assert load_checkpoint(old)["loss"] == 0.01


class Bomb:
    def __reduce__(self):
        return (open, ("bombed", "w"))


@pytest.mark.parametrize("inside", [False, True])
def test_no_checkpoint_runs_code(tmp_path, monkeypatch, inside):
    monkeypatch.chdir(tmp_path)
    content = {"model_state_dict": {}, "epoch": Bomb()} if inside else Bomb()
    torch.save(content, "zip.pt")
    with open("plain.pt", "wb") as file:
        pickle.dump(content, file)
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(InputError, match=name) as raised:
            load_checkpoint(name)
        assert "\n" not in str(raised.value)
        assert "weights_only" not in str(raised.value)  # torch's own message advises turning weights_only off
    assert not (tmp_path / "bombed").exists()


def test_what_is_no_checkpoint_is_named(tmp_path, checkpoint, classifier):
    (tmp_path / "text.pt").write_text("not a checkpoint\n")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "cut.pt").write_bytes(checkpoint.read_bytes()[:5000])
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("text.pt", "empty.pt", "cut.pt", "list.pt", "absent.pt", "."):
        with pytest.raises(InputError) as raised:
            load_checkpoint(tmp_path / name)
        assert str(raised.value).startswith(str(tmp_path / name))
        assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="another network"):
        build_generator(load_checkpoint(classifier), classifier)
    with pytest.raises(InputError, match="another network"):
        load_classifier(checkpoint)


@pytest.fixture(scope="module")
def resnet():
    """An untrained classifier of images of 32 pixels."""
    return build_classifier(32, LENSES)


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_weights_saved_by_a_compiled_or_data_parallel_module_load(tmp_path, prefix, resnet):
    torch.manual_seed(0)
    model = tiny()
    named = {f"{prefix}{name}": value for name, value in model.network.state_dict().items()}
    blocks = {name.replace("blocks.0.", "blocks.0._orig_mod."): value for name, value in named.items()}
    for weights in (named, blocks, {f"ema_model.{name}": value for name, value in named.items()}):
        is_ema = next(iter(weights)).startswith("ema_model")
        content = {"model_state_dict": weights, **model.description(), "sampler": {}}
        loaded = build_generator(content | ({"ema_state_dict": weights} if is_ema else {}), "x")
        torch.testing.assert_close(velocity_of(loaded), velocity_of(model))
    weights = {f"{prefix}{name}": value for name, value in resnet.state_dict().items()}
    save_checkpoint(tmp_path / "c.pt", model_state_dict=weights, image_size=32)
    assert torch.equal(load_classifier(tmp_path / "c.pt").conv1.weight, resnet.conv1.weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["weights", "EMA", "classifier", "batch normalization"])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, value, where, resnet):
    is_generator = where in ("weights", "EMA")
    model = tiny() if is_generator else resnet
    names = {"classifier": "fc.bias", "batch normalization": "bn1.running_var"}
    name = names.get(where, "blocks.0.mlp.fc1.weight")
    weights = (model.network if is_generator else model).state_dict()
    bad = weights | {name: torch.full_like(weights[name], value)}
    content = {"model_state_dict": bad, "image_size": 32}
    if is_generator:
        ema = {
            "ema_state_dict": {f"ema_model.{key}": tensor for key, tensor in bad.items()},
            "model_state_dict": weights,
        }
        content = (ema if where == "EMA" else {"model_state_dict": bad}) | model.description() | {"sampler": {}}
    save_checkpoint(tmp_path / "c.pt", **content)
    load = load_model if is_generator else load_classifier
    with pytest.raises(InputError, match=rf"c\.pt: its weights {name} hold NaN or Inf"):
        load(tmp_path / "c.pt", "cpu")


def test_how_far_a_training_was_is_read_without_its_tensors(tmp_path, checkpoint, published):
    path = tmp_path / "c.pt"
    save_checkpoint(path, model_state_dict={"w": torch.ones(9)}, epoch=3, step_in_epoch=5, steps_per_epoch=10, run="ab")
    assert progress(path) == (3.5, "ab")
    assert progress(published[0]) == (69, None)
    assert progress(checkpoint)[0] == 4
    path.write_bytes(path.read_bytes()[:200])
    assert progress(path) is None
    assert progress(tmp_path / "absent.pt") is None


def test_no_script_loads_a_file_that_could_run_code():
    for path in ROOT.glob("*/*.py"):
        if "tests" not in path.parts:
            source = path.read_text()
            assert "weights_only=False" not in source
            assert "allow_pickle=True" not in source
