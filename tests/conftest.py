"""What several tests share: a small simulated data set, a small trained generator and a small trained classifier."""

import csv
import gc
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / "data"
sys.path.insert(0, str(ROOT))


def run_script(script: str, *flags: str) -> dict:
    """Runs a script of the repository in this process, as ``python script *flags`` would; returns its globals."""
    old = sys.argv
    sys.argv = [str(ROOT / script), *map(str, flags)]
    try:
        return runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = old


def save_nothing(figure: object, path: Path) -> None:
    """Stands for ``plots.save`` where no test looks at the picture."""
    from files import whole

    with whole(path):
        pass


def learn_little() -> int:
    """From now on, networks that only score images learn next to nothing; returns the previous steps of a C2ST."""
    from metrics import two_sample, usefulness

    as_shipped, two_sample._STEPS = two_sample._STEPS, 5
    usefulness._STEPS, usefulness.SEEDS = 2, 2
    return as_shipped


@pytest.fixture(scope="session", autouse=True)
def steps_as_shipped():
    """Steps of a C2ST outside these tests, which use fewer. They also never wait until a file is on the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield learn_little()


@pytest.fixture
def heard():
    """Tests that send signals receive them, although nohup or a shell in the background makes processes ignore some."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def full_c2st(steps_as_shipped, monkeypatch):
    """Restores the usual steps, for tests of what a C2ST finds."""
    monkeypatch.setattr("metrics.two_sample._STEPS", steps_as_shipped)


def pytest_collection_finish():
    """What is imported by now stays, so the garbage collector, which ``plots.save`` calls, no longer looks at it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Runs a script that fills the folder with a given name, once for all pytest processes; returns the folder."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def fill(name, script, *flags) -> Path:
        with FileLock(base / f"{name}.lock"):
            if not (base / f"{name}.done").exists():
                run_script(script, *flags, base / name)
                (base / f"{name}.done").touch()
        return base / name

    return fill


@pytest.fixture(scope="session")
def lens_data(shared) -> Path:
    """48 simulated images of each class."""
    flags = ["--num_per_class", 48, "--num_workers", 1, "--data_dir"]
    return shared("lenses", "simulate/simulate_lenses.py", *flags)


@pytest.fixture(scope="session")
def generator_run(lens_data, shared) -> Path:
    """OUTPUT_DIR of a short training run of a tiny network."""
    flags = [*TINY_TRAINING, "--data_dir", lens_data, "--output_dir"]
    return shared("diffusion_training", "train/train_diffusion.py", *flags)


@pytest.fixture(scope="session")
def checkpoint(generator_run) -> Path:
    return generator_run / "dit_conditional_ckpts" / "dit_conditional_final.pt"


@pytest.fixture(scope="session")
def classifier_run(lens_data, shared) -> Path:
    """OUTPUT_DIR of a short training run of the classifier."""
    flags = ["--image_size", 32, "--batch_size", 16, "--epochs", 2, "--pretrained", "false", "--data_dir", lens_data]
    return shared("classifier_training_resnet18", "train/train_classifier.py", *flags, "--output_dir")


@pytest.fixture(scope="session")
def classifier(classifier_run) -> Path:
    return classifier_run / "classifier_ckpts" / "resnet18_best.pt"


@pytest.fixture
def data_copy(lens_data, tmp_path) -> Path:
    """A copy of the simulated images that a test may change."""
    return Path(shutil.copytree(lens_data, tmp_path / "data", ignore=shutil.ignore_patterns(".*")))


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures become empty files, because drawing them would take most of the time of a tiny training."""
    monkeypatch.setattr("plots.save", save_nothing)


@pytest.fixture
def train(monkeypatch, lens_data, tmp_path, undrawn):
    """Runs main() of train_diffusion with the tiny settings, in this process, and returns its OUTPUT_DIR.

    Its pictures are not drawn; those of ``generator_run`` are.
    """
    import files
    import settings
    from train import train_diffusion

    as_written = vars(train_diffusion).copy()

    def run(output=tmp_path / "run", **constants):
        script = as_written.copy()
        flags = [*map(str, TINY_TRAINING), "--data_dir", str(lens_data), "--output_dir", str(output)]
        settings.from_flags(script, flags)
        for name, value in (settings.constants(script) | constants).items():
            monkeypatch.setattr(train_diffusion, name, value)
        try:
            train_diffusion.main()
        finally:
            files.release()
        return output

    return run


def history_of(run: Path) -> list[dict[str, float]]:
    """The rows of a run's training_metrics.csv."""
    with open(run / "training_metrics.csv") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


TINY_TRAINING = [
    *("--patch_size", 16, "--latent_dim", 32, "--model_depth", 2, "--model_heads", 2, "--prediction", "image"),
    *("--batch_size", 16, "--epochs", 4, "--warmup_epochs", 0.5, "--learning_rate", 2e-3, "--num_ode_steps", 2),
    *("--ema_beta", 0.9, "--ema_update_every", 1, "--sample_interval", 2, "--checkpoint_save_interval", 2),
    *("--num_samples_per_class", 2, "--cfg_scale", 1.5),
]
