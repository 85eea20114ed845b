"""The benchmark counts and divides rightly, and its tables and files are there."""

import json
import signal
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from conftest import run_script

from evaluate import benchmark
from models import flow
from models.model import NanoDiT


def test_operations_are_those_of_the_products():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert benchmark.operations(lambda: (a @ b).relu()) == 2 * 3 * 5 * 7
    network = torch.nn.Linear(10, 20)
    assert benchmark.operations(lambda: network(torch.randn(4, 10))) == 2 * 4 * 10 * 20


def test_images_are_decoded_once_whatever_the_number_of_passes():
    model = NanoDiT(8, 8, hidden_size=32, depth=1, num_heads=2, prediction="image", patch_basis=5)
    model.fit_basis(torch.randn(20, 1, 8, 8))
    sampler = flow.Sampler(7, 1.0, "multistep", "logit")
    counted = benchmark.operations(lambda: benchmark.draw(model, 6, sampler)) / 6
    assert benchmark.operations_of_image(model, 6, sampler) == pytest.approx(counted, rel=1e-9)
    a_pass = benchmark.operations_of_image(model, 6, flow.Sampler(8, 1.0, "multistep", "logit")) - counted
    assert counted - 7 * a_pass == pytest.approx(2 * 5 * 8 * 8)


def test_the_benchmark_writes_its_tables(lens_data, checkpoint, classifier, tmp_path, monkeypatch, capsys):
    reference = {"patch_size": 32, "hidden_size": 32, "depth": 1, "num_heads": 2, "prediction": "velocity"}
    monkeypatch.setattr("models.model.SIZES", {"NanoDiT-B/2": reference})
    flags = ["--checkpoint_path", checkpoint, "--classifier_path", classifier, "--data_dir", lens_data]
    flags += ["--output_dir", tmp_path, "--batch_size", 6, "--rounds", 1, "--device", "cpu"]
    run_script("evaluate/benchmark.py", *flags)
    out = capsys.readouterr().out
    for name in ("lenstronomy, all cores", "vectorized simulator", "reference sampler", "NanoDiT, 8 passes"):
        assert f"| {name} |" in out
    for name in ("images at once", "pixels", "steps", "memory in MB"):
        assert f"| {name} |" in out
    found = json.loads((tmp_path / "benchmark.json").read_text())
    contenders = found["contenders"]
    for contender in contenders.values():
        assert 1e-7 < contender["seconds"] < 60
    one_pass = contenders["NanoDiT, 1 pass"]["operations"]
    assert one_pass > 2 * 66_016  # as many multiplications and additions as weights, for each of the tokens
    assert contenders["NanoDiT, 8 passes"]["operations"] == 8 * one_pass  # pixels need no decoding
    compiled = contenders["NanoDiT, 2 passes, compiled"]  # as many as the checkpoint says
    assert compiled["operations"] == 2 * one_pass
    assert found["quality"]["8"]["overall"] > 0
    assert np.isfinite(found["matmul_rate"])
    assert 1e6 < found["memory"]["512"] < 4e9
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000


@pytest.mark.parametrize("flags", [["--data_dir", "/nowhere"], ["--images_per_class", 2]])
def test_what_is_wrong_with_the_data_is_said_before_anything_is_timed(
    flags, lens_data, checkpoint, classifier, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("evaluate.estimate_cost.seconds", lambda *_, **__: pytest.fail("it is timed"))
    given = ["--checkpoint_path", checkpoint, "--classifier_path", classifier, "--data_dir", lens_data]
    with pytest.raises(SystemExit):
        run_script("evaluate/benchmark.py", *given, "--output_dir", tmp_path, *flags)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_worker_for_each_core_of_the_job_that_leaves_ctrl_c_to_the_main_process(monkeypatch):
    pools = []

    class Watched(ProcessPoolExecutor):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            pools.append(self)

    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", Watched)
    monkeypatch.setattr(benchmark, "compiles", lambda work: False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {5}, raising=False)
    with benchmark.simulators(torch.device("cpu")):
        assert pools[0]._max_workers == 1  # of a SLURM job with one core
        assert pools[0].submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
