"""What several tests share: a small simulated data set, a small trained generator and a small trained classifier."""

import csv
import runpy
import shutil
import sys
from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def lens_data(tmp_path_factory) -> Path:
    """48 simulated images of each class."""
    folder = tmp_path_factory.mktemp("lenses")
    run_script("simulate/simulate_lenses.py", "--data_dir", folder, "--num_per_class", "48", "--num_workers", "1")
    return folder


@pytest.fixture(scope="session")
def generator_run(lens_data, tmp_path_factory) -> Path:
    """OUTPUT_DIR of a short training run of a tiny network."""
    folder = tmp_path_factory.mktemp("run") / "diffusion_training"
    run_script("train/train_diffusion.py", *TINY_TRAINING, "--data_dir", lens_data, "--output_dir", folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(generator_run) -> Path:
    return generator_run / "dit_conditional_ckpts" / "dit_conditional_final.pt"


@pytest.fixture(scope="session")
def classifier_run(lens_data, tmp_path_factory) -> Path:
    """OUTPUT_DIR of a short training run of the classifier."""
    folder = tmp_path_factory.mktemp("run") / "classifier_training_resnet18"
    flags = ["--image_size", 32, "--batch_size", 16, "--epochs", 2, "--pretrained", "false"]
    run_script("train/train_classifier.py", *flags, "--data_dir", lens_data, "--output_dir", folder)
    return folder


@pytest.fixture(scope="session")
def classifier(classifier_run) -> Path:
    return classifier_run / "classifier_ckpts" / "resnet18_best.pt"


@pytest.fixture
def data_copy(lens_data, tmp_path) -> Path:
    """A copy of the simulated images that a test may change."""
    return Path(shutil.copytree(lens_data, tmp_path / "data", ignore=shutil.ignore_patterns(".lens_cache*")))


@pytest.fixture
def train(monkeypatch, lens_data, tmp_path):
    """Runs main() of train_diffusion with the tiny settings, in this process, and returns its OUTPUT_DIR."""
    import files
    import settings
    from train import train_diffusion

    def run(output=tmp_path / "run", **constants):
        script = vars(train_diffusion).copy()
        flags = [*map(str, TINY_TRAINING), "--data_dir", str(lens_data), "--output_dir", str(output)]
        settings.from_flags(script, flags)
        for name, value in ({k: v for k, v in script.items() if k.isupper()} | constants).items():
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
