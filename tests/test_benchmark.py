"""The benchmark counts and divides rightly, and its tables and files are there."""

import functools
import json
import signal
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from conftest import run_script

from evaluate import benchmark
from metrics import timing
from models import flow
from models.generator import SIZES, build_untrained, load_model


def test_operations_are_those_of_the_products():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert benchmark.operations(lambda: (a @ b).relu()) == 2 * 3 * 5 * 7
    network = torch.nn.Linear(10, 20)
    assert benchmark.operations(lambda: network(torch.randn(4, 10))) == 2 * 4 * 10 * 20


def test_images_are_decoded_once_whatever_the_number_of_evaluations():
    model = build_untrained("ComponentMLP-512", ("a", "b", "c"), (1, 8, 8), components=5, hidden_size=32, depth=1)
    torch.nn.init.normal_(model.codec.vectors)
    sampler = flow.Sampler(7, 1.0, "multistep", "logit")
    counted = benchmark.operations(lambda: benchmark.draw(model, 6, sampler)) / 6
    assert benchmark.operations_of_image(model, 6, sampler) == pytest.approx(counted, rel=1e-9)
    one = benchmark.operations_of_image(model, 6, flow.Sampler(8, 1.0, "multistep", "logit")) - counted
    assert counted - 7 * one == pytest.approx(2 * 5 * 8 * 8)


def test_the_benchmark_writes_its_tables(lens_data, checkpoint, classifier, tmp_path, monkeypatch, capsys):
    # Everything is timed once, and traced for the compiler but not compiled, which takes half a minute
    monkeypatch.setattr("metrics.timing.least_seconds", lambda work, warm_up=True: timing.seconds(work, 1, warm_up))
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setitem(SIZES, "NanoDiT-B/2", SIZES["NanoDiT-B/2"] | {"patch_size": 32, "hidden_size": 32, "depth": 1})
    flags = ["--checkpoint_path", checkpoint, "--classifier_path", classifier, "--data_dir", lens_data]
    flags += ["--output_dir", tmp_path, "--batch_size", 6, "--rounds", 1, "--device", "cpu"]
    run_script("evaluate/benchmark.py", *flags)
    out = capsys.readouterr().out
    for name in ("lenstronomy, all cores", "vectorized simulator", "reference sampler", "generator, 8 NFE"):
        assert f"| {name} |" in out
    for name in ("images at once", "pixels", "NFE", "memory in MB"):
        assert f"| {name} |" in out
    found = json.loads((tmp_path / "benchmark.json").read_text())
    contenders = found["contenders"]
    for contender in contenders.values():
        assert 1e-7 < contender["seconds"] < 60
    one_pass = contenders["generator, 1 NFE"]["operations"]
    assert one_pass > 2 * 66_016  # a multiplication and an addition for each weight, for each of the tokens
    assert contenders["generator, 8 NFE"]["operations"] == 8 * one_pass  # pixels need no decoding
    compiled = contenders["generator, 2 NFE, compiled"]  # as many as the checkpoint says
    assert compiled["operations"] == 2 * one_pass
    assert found["quality"]["8"]["overall"] > 0
    assert np.isfinite(found["matmul_rate"])
    assert 1e6 < found["memory"]["512"] < 4e9
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000


@pytest.mark.parametrize("flags", [["--data_dir", "/nowhere"], ["--images_per_class", 2]])
def test_what_is_wrong_with_the_data_is_said_before_anything_is_timed(
    flags, lens_data, checkpoint, classifier, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("metrics.timing.seconds", lambda *_, **__: pytest.fail("it is timed"))
    given = ["--checkpoint_path", checkpoint, "--classifier_path", classifier, "--data_dir", lens_data]
    with pytest.raises(SystemExit):
        run_script("evaluate/benchmark.py", *given, "--output_dir", tmp_path, *flags)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_worker_for_each_core_of_the_job_that_leaves_ctrl_c_to_the_main_process(checkpoint, monkeypatch):
    pools = []

    class Watched(ProcessPoolExecutor):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            pools.append(self)

    monkeypatch.setattr("simulate.workers.ProcessPoolExecutor", Watched)
    monkeypatch.setattr(benchmark, "compiles", lambda work: False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {5}, raising=False)
    with benchmark.simulators(load_model(checkpoint, "cpu"), torch.device("cpu")):
        assert pools[0]._max_workers == 1  # of a SLURM job with one core
        assert pools[0].submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN


def test_images_without_a_recipe_have_no_simulators():
    model = build_untrained("NanoDiT-S/16", ("a", "b"), (3, 48, 48), hidden_size=16, depth=1, num_heads=2)
    with benchmark.simulators(model, torch.device("cpu")) as contenders:
        assert contenders == {}
    found = {"generator, 8 NFE": {"seconds": 0.5, "operations": 10}}
    benchmark.print_contenders(found, 20.0, {}, model.classes)
    benchmark.picture(found, {})


@pytest.mark.parametrize(
    ("size", "pixels"), [("NanoDiT-S/16", [16, 32, 64, 128]), ("ComponentMLP-512", [16, 32, 64, 128])]
)
def test_the_generator_is_timed_for_other_sizes_too(size, pixels):
    small = {"hidden_size": 16, "depth": 1} | ({"num_heads": 2} if "Nano" in size else {"components": 20})
    model = build_untrained(size, ("a", "b"), (2, 32, 32), **small)
    others = dict(benchmark.other_sizes(model))
    assert list(others) == pixels
    for n, other in others.items():
        assert other.image_shape == (2, n, n)
        assert other.network.config["hidden_size"] == 16
        assert other.classes == model.classes


def test_sizes_that_no_image_has_are_not_timed():
    small = {"hidden_size": 16, "depth": 1, "components": 100}
    for size, pixels in ((150, [75, 150]), (16, [16, 32, 64])):
        model = build_untrained("ComponentMLP-512", ("a",), (1, size, size), **small)
        assert [n for n, _ in benchmark.other_sizes(model)] == pixels


def test_the_batch_size_reaches_both_rates(monkeypatch, tmp_path, capsys):
    """A batch of training, too, has as many images as --batch_size says."""
    asked = []
    monkeypatch.setattr("train.run.seconds_an_image", lambda model, n: asked.append((model.image_shape, n)) or 0.5)
    monkeypatch.setattr("metrics.timing.seconds", lambda work, *_, **__: 0.25 if work() is not None else 0.5)
    flags = ["--model_size", "NanoDiT-S/16", "--num_ode_steps", 1, "--cfg_scale", 1, "--output_dir", tmp_path]
    run_script("evaluate/estimate_cost.py", *flags, "--batch_size", 5, "--image_size", 32, "--channels", 3)
    out = capsys.readouterr().out
    assert asked == [((3, 32, 32), 5)]
    assert "generating: 20 images/s" in out
    assert "training: 2 images/s" in out
    with pytest.raises(SystemExit):
        run_script("evaluate/estimate_cost.py", "--model_size", "NanoDiT-S/16", "--image_size", 300)
    assert "no such network" in capsys.readouterr().err
