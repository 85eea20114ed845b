"""The reference run, as far as it can be tried without a GPU: its arithmetic, its average, a run of a tiny network."""

import json
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, learn_little
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import files
import settings
from dataset import NpyDataset
from evaluate import gpu_reference
from metrics import background
from models import flow
from models.generator import build_untrained, load_model
from simulate.recipes import MODEL_II
from train import one_gpu

TINY = {"patch_size": 16, "hidden_size": 32, "depth": 2, "num_heads": 2}


def untrained(size, **changes):
    return build_untrained(size, MODEL_II.classes, MODEL_II.image_shape, **changes)


def tiny_runs(minutes):
    fast = {"multistep20": flow.Sampler(2, 1.0, "multistep", "logit")}
    small = gpu_reference.Training("NanoDiT-S/8", TINY, 32, 2e-3, 0.99, "logit_normal", fast)
    published = {"euler50_guidance5": flow.Sampler(2, 5.0)}
    large = gpu_reference.Training("NanoDiT-B/2", TINY, 16, 1e-3, 0.999, "uniform", published)
    return {"s8": (minutes, small), "b2": (minutes, large)}


def begin_soon(threads, begin=background._begin):
    """What a scoring process does first: here, its networks also learn little."""
    learn_little()
    begin(threads)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Sets the constants of the script for seconds of a tiny network on a CPU, and any others that are given."""

    def prepare(**constants):
        minutes = constants.pop("minutes", 0.05)
        constants = {"NUM_PER_CLASS": 60, "NUM_SPLITS": 2, "DEVICE": "cpu", "OUTPUT_DIR": str(tmp_path)} | constants
        constants |= {"MINUTES": minutes, "SMALL_MINUTES": minutes, "runs": lambda: tiny_runs(minutes)}
        constants["CLASSIFIER_PATH"] = str(ROOT / "weights/resnet18_lens.safetensors")
        for name, value in constants.items():
            monkeypatch.setattr(gpu_reference, name, value)
        monkeypatch.setattr(background, "_begin", begin_soon)
        return tmp_path

    yield prepare
    files.release()


@pytest.mark.parametrize("size", ["NanoDiT-B/2", "NanoDiT-B/4", "NanoDiT-S/8"])
def test_the_arithmetic_is_that_which_torch_counts(size):
    with torch.device("meta"):
        network = untrained(size).network.to("meta")
        drawn = torch.randn(2, 1, 64, 64), torch.rand(2), torch.zeros(2, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = network(*drawn)
    assert one_gpu.forward_operations(network) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out.sum().backward()
    assert 2 * one_gpu.forward_operations(network) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


def test_a_training_step_of_the_published_network_takes_155_billion_operations_an_image():
    network = untrained("NanoDiT-B/2").network
    assert 3 * one_gpu.forward_operations(network) == pytest.approx(155e9, rel=0.01)


@pytest.mark.parametrize("steps", [200, 2000])
def test_the_average_is_over_the_same_share_of_a_run_of_any_length(steps):
    network, averaged, squared = (nn.Linear(1, 1, bias=False) for _ in range(3))
    first, second = (one_gpu.PowerEMA(average, network, 0.1) for average in (averaged, squared))
    for step in range(1, steps + 1):
        for ema, value in ((first, step), (second, step**2 / steps)):
            nn.init.constant_(network.weight, value)
            ema.update()
    mean = averaged.weight.item() / steps
    width = (squared.weight.item() / steps - mean**2) ** 0.5
    assert width == pytest.approx(0.1, rel=0.03)
    assert mean == pytest.approx((first.power + 1) / (first.power + 2), rel=0.01)


def test_the_learning_rate_rises_falls_and_ends_with_the_time():
    rates = [one_gpu.learning_rate(progress, 1e-3) for progress in np.linspace(0, 1, 601)]
    assert np.argmax(rates) == 10
    assert max(rates) == pytest.approx(1e-3)
    assert rates[0] < 1e-5
    assert (np.diff(rates[10:]) < 0).all()
    assert rates[-1] == one_gpu.learning_rate(1.2, 1e-3) == pytest.approx(1e-6)


def test_a_batch_has_no_image_twice_and_an_epoch_each_once():
    batches = one_gpu.endless_batches(10, 3, torch.device("cpu"))
    for _ in range(3):
        epoch = torch.cat([next(batches) for _ in range(3)]).tolist()
        assert len(set(epoch)) == 9
        assert set(epoch) <= set(range(10))


def test_images_and_splits_are_those_of_the_simulated_files(tiny, lens_data):
    tiny(NUM_PER_CLASS=48, SEED=0)
    data = gpu_reference.simulate(torch.device("cpu"))
    for name in ("train", "val", "test"):
        files_of_split = NpyDataset(lens_data, None, name)
        order = sorted(range(len(files_of_split)), key=lambda i: numbered(files_of_split.files[i]))
        assert torch.equal(data[name].labels, files_of_split.labels[order])
        torch.testing.assert_close(data[name].images, files_of_split.images[order], atol=2e-3, rtol=0)


def numbered(file):
    name, number = file.removesuffix(".npy").split("/")
    return MODEL_II.classes.index(name), int(number)


def test_a_run_of_seconds_ends_in_its_budget_and_leaves_every_file(tiny):
    output = tiny(minutes=0.05, BUDGET_MINUTES=5.0)
    started = time.monotonic()
    gpu_reference.main()
    assert time.monotonic() - started < 300
    content = json.loads((output / "reference.json").read_text())
    assert content["errors"] == {}
    assert content["versions"]["torch"] == torch.__version__
    assert set(content["networks"]) == {"s8", "b2"}
    assert (output / "samples.png").stat().st_size > 10_000
    for name, found in content["networks"].items():
        for file in (*found["weights"], f"{name}/training_metrics.png", f"{name}/training_metrics.csv"):
            assert (output / file).stat().st_size > 0
        assert 3 <= content["seconds"][f"{name}, training"] < 30
        assert found["images_per_second"] > 0
        assert 0 < found["loss"] < 5
        assert found["validation_loss_end"] > 0
        assert len(found["samples"]) == 2
        for sample in found["samples"].values():
            assert sample["images_per_second"] > 0
            for metric in ("frechet_lens", "class_accuracy", "lens_residual", "two_sample_accuracy"):
                assert sample["metrics"][metric]["overall"]["value"] >= 0
                assert sample["metrics"][metric]["overall"]["floor"] >= 0
        model = load_model(output / found["weights"][0], "cpu")
        assert model.generate(torch.tensor([0, 1])).shape == (2, 1, 64, 64)


def test_without_scores_or_with_a_failing_network_the_rest_goes_on(tiny, monkeypatch):
    output = tiny(minutes=0.01, SCORE=False)
    train = gpu_reference.train

    def fails_first(run, *others):
        if run.batch_size == 32:
            raise RuntimeError("no memory, say")
        return train(run, *others)

    monkeypatch.setattr(gpu_reference, "train", fails_first)
    gpu_reference.main()
    content = json.loads((output / "reference.json").read_text())
    assert content["errors"] == {"s8, all of it": "RuntimeError('no memory, say')"}
    images = np.load(output / "b2_end_euler50_guidance5_cdm.npy")
    assert images.dtype == np.float16
    assert images.shape[1:] == (64, 64)


def test_scores_that_come_too_late_are_left_out_and_their_images_kept(tiny):
    output = tiny(minutes=0.01, BUDGET_MINUTES=0.021)
    gpu_reference.main()
    content = json.loads((output / "reference.json").read_text())
    assert "b2_end_euler50_guidance5, scoring" in content["errors"]
    assert (output / "b2_end_euler50_guidance5_axion.npy").exists()
    assert (output / "b2.safetensors").exists()


def test_more_training_than_there_is_time_for_is_one_line(tiny):
    tiny(BUDGET_MINUTES=0.1)
    with pytest.raises(settings.InputError, match="--budget_minutes must be more"):
        gpu_reference.main()


def test_large_weights_are_in_pieces_that_join(tiny, monkeypatch):
    output = tiny()
    monkeypatch.setattr(gpu_reference, "_PIECE", 30_000)
    _, run = tiny_runs(1)["b2"]
    network = untrained(run.size, **run.changes)
    names = gpu_reference.write_weights(output / "b2.safetensors", network, run)
    assert len(names) > 2
    assert all((output / name).stat().st_size <= 30_000 for name in names)
    (output / "joined.safetensors").write_bytes(b"".join((output / name).read_bytes() for name in sorted(names)))
    joined = load_model(output / "joined.safetensors", "cpu")
    assert joined.sampler == flow.Sampler(2, 5.0)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(joined.state_dict()[name], value, atol=1e-3, rtol=1e-3)


def test_the_published_network_is_in_four_files_under_15_megabytes():
    weights = sum(value.numel() for value in untrained("NanoDiT-B/2").network.state_dict().values())
    assert 3 < 2 * weights / gpu_reference._PIECE < 4 - 0.01


def test_a_step_can_be_compiled():
    run = tiny_runs(1)["s8"][1]
    network = untrained(run.size, **run.changes)
    drawn = gpu_reference.draw(torch.rand(4, 1, 64, 64), torch.zeros(4, dtype=torch.long), run, torch.Generator())
    whole_graph = torch.compile(lambda *given: gpu_reference.loss_at(network, *given), backend="eager", fullgraph=True)
    assert whole_graph(*drawn).item() == pytest.approx(gpu_reference.loss_at(network, *drawn).item(), rel=1e-5)


def test_what_is_missing_is_said_before_anything_else(tmp_path, monkeypatch):
    listed = tmp_path / "requirements-gpu.txt"
    listed.write_text("# not here\nnumpy==1.0\nno-such-package==2.0\n")
    monkeypatch.setattr(gpu_reference, "_ROOT", tmp_path)
    assert gpu_reference.packages()["no-such-package==2.0"] is None
    assert gpu_reference.packages()["numpy==1.0"] == np.__version__
    assert "torchvision" in gpu_reference.packages()
