"""Generation is reproducible and in range; distances are right where they are known; nothing missing is a crash."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from torch_fidelity import feature_extractor_inceptionv3
from torchmetrics.image.fid import NoTrainInceptionV3

from dataset import CLASSES
from evaluate import evaluate_fld
from evaluate.evaluate_fld import frechet_distance, generate_image, load_model
from settings import InputError


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint, "cpu")


def test_generate_image_is_the_published_interface(model):
    images = generate_image(model, target_class=1, ode_steps=3, cfg_scale=5.0, num_samples=4)
    assert images.shape == (4, 1, 64, 64)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.01
    assert generate_image(model, 0, ode_steps=1).shape == (1, 1, 64, 64)


def test_images_depend_on_seed_class_and_guidance_and_on_nothing_else(model):
    image = generate_image(model, 1, 3, 5.0, 2)
    torch.testing.assert_close(generate_image(model, 1, 3, 5.0, 5)[:2], image)
    for other in (generate_image(model, 1, 3, 5.0, 2, seed=1), generate_image(model, 0, 3, 5.0, 2)):
        assert not torch.allclose(other, image)
    assert not torch.allclose(generate_image(model, 1, 3, 1.0, 2), image)


def test_a_class_that_is_none_is_named(model):
    with pytest.raises(InputError, match="target_class 3 is not one of 0 to 2: axion, cdm, no_sub"):
        generate_image(model, 3)


def test_evaluate_is_ours_where_another_package_has_the_name(tmp_path):
    package = tmp_path / "site" / "evaluate"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the other evaluate')")
    code = "from evaluate.evaluate_fld import load_model, generate_image; print('ours')"
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "ours\n", done.stderr


# Distances


def gaussian_features(n, mean, variance, seed):
    """Features (n, d) whose sample mean and covariance are exactly mean and diag(variance)."""
    x = np.random.default_rng(seed).standard_normal((n, len(mean)))
    x = x - x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return torch.from_numpy(x * np.sqrt(variance) + mean)


def test_frechet_distance_of_known_gaussians():
    a = gaussian_features(60, [0.0, 1, 2], [1.0, 4, 9], seed=0)
    b = gaussian_features(80, [1.0, 1, 0], [4.0, 4, 1], seed=1)
    expected = (1 + 0 + 4) + (1 - 2) ** 2 + (2 - 2) ** 2 + (3 - 1) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_a_rotated_covariance_is_not_taken_for_a_diagonal_one():
    a = gaussian_features(60, [0.0, 0], [1.0, 25], seed=0)
    angle = np.pi / 4
    turn = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    covariance = np.diag([1.0, 25])
    turned = turn.numpy() @ covariance @ turn.numpy().T
    eigenvalues = np.linalg.eigvals(covariance @ turned)
    expected = 52 - 2 * np.sqrt(eigenvalues).sum()
    assert frechet_distance(a, a @ turn.T) == pytest.approx(expected, rel=1e-6)


def test_rows_give_distance_floor_and_ratio_overall_and_by_class():
    labels = torch.arange(3).repeat_interleave(50)
    sets = [gaussian_features(150, [0.0, 0], [1.0, 1], seed) for seed in range(3)]
    rows = evaluate_fld.frechet_rows("Fréchet distance, x features", sets, labels)
    distance, floor, ratio = rows.values()
    assert [len(row) for row in rows.values()] == [4, 4, 4]
    assert floor[2] == pytest.approx(frechet_distance(sets[0][50:100], sets[1][50:100]))
    both = [frechet_distance(half[100:], sets[2][100:]) for half in sets[:2]]
    assert distance[3] == pytest.approx(np.mean(both))
    assert ratio[1] == pytest.approx(distance[1] / floor[1])


def test_halves_are_disjoint_and_balanced():
    labels = torch.tensor([0] * 9 + [1] * 12 + [2] * 30)
    first, second = evaluate_fld.split_in_halves(labels, 1000)
    assert not set(first.tolist()) & set(second.tolist())
    for half in (first, second):
        assert labels[half].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(evaluate_fld.split_in_halves(labels, 2)[0]) == 6
    with pytest.raises(InputError, match="fewer than 4"):
        evaluate_fld.split_in_halves(torch.tensor([0, 1, 2]), 1000)


# The scripts


@pytest.fixture
def flags(lens_data, checkpoint, classifier, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    return [
        *("--data_dir", lens_data, "--checkpoint_path", checkpoint, "--classifier_path", classifier),
        *("--generated_dir", tmp_path / "generated_npy", "--figure_path", tmp_path / "lenses.png"),
        *("--num_ode_steps", 2, "--cfg_scale", 1, "--device", "cpu"),
    ]


def no_network(*args, **kwargs):
    raise OSError("no route to host")


def test_without_inception_weights_and_network_the_rest_is_computed(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    stale = tmp_path / "generated_npy" / "axion" / "1234.npy"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier run")
    run_script("evaluate/evaluate_fld.py", *flags)
    out = capsys.readouterr().out
    assert "FID with Inception is left out: its weights cannot be fetched; --inception_weights_path" in out
    table = out[out.index("images a class") :]
    assert table.split()[2:7] == ["class", "overall", "axion", "cdm", "no_sub"] or "overall" in table.splitlines()[0]
    for row in ("Fréchet distance, lens features", "floor: real against real", "ratio to the floor"):
        numbers = re.search(rf"{row}.*?((?:\s+[\d.e+-]+|\s+inf){{4}})$", table, re.M).group(1).split()
        assert all(float(number) >= 0 for number in numbers)
    assert len(re.search(r"accuracy, generated((?:\s+[\d.]+%){4})", table).group(1).split()) == 4
    assert (tmp_path / "lenses.png").stat().st_size > 10_000
    assert not stale.exists()
    files = sorted((tmp_path / "generated_npy").glob("*/*.npy"))
    assert {file.parent.name for file in files} == set(CLASSES)
    image = np.load(files[0])
    assert image.shape == (64, 64)
    assert image.dtype == np.float32


@pytest.fixture
def inception_weights(tmp_path, monkeypatch):
    """A file with (random) weights of torch-fidelity's Inception network."""
    with monkeypatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, state: None)
        weights = NoTrainInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    torch.save(weights, tmp_path / "inception.pth")
    return tmp_path / "inception.pth"


def test_inception_weights_from_a_file_give_the_usual_fid(flags, inception_weights, capsys):
    run_script(
        "evaluate/evaluate_fld.py", *flags, "--inception_weights_path", inception_weights, "--images_per_class", 2
    )
    out = capsys.readouterr().out
    assert re.search(r"^FID, Inception\s+[\d.]+", out, re.M)
    assert "(Inception)" in out


class Bomb:
    def __reduce__(self):
        return (open, ("bombed", "w"))


@pytest.mark.parametrize("content", ["bomb", "text", None])
def test_a_bad_inception_file_is_one_line_and_runs_nothing(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "inception.pth"
    if content:
        torch.save(Bomb() if content == "bomb" else "text", path)
    monkeypatch.setattr(evaluate_fld, "INCEPTION_WEIGHTS_PATH", str(path))
    with pytest.raises(InputError, match="no file with weights of that network"):
        evaluate_fld.load_inception(torch.device("cpu"))
    assert not (tmp_path / "bombed").exists()


def test_a_missing_checkpoint_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_script("evaluate/evaluate_fld.py", *flags, "--checkpoint_path", "nowhere.pt")
    assert stopped.value.code == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("nowhere.pt: cannot be read")


def test_a_file_is_classified_with_the_published_lines(lens_data, classifier, capsys):
    run_script("evaluate/evaluate_classify.py", "--npy_path", lens_data / "axion" / "0.npy", "--model_path", classifier)
    assert re.fullmatch(
        r"Predicted Class: '(axion' \(Index: 0|cdm' \(Index: 1|no_sub' \(Index: 2)\)\nConfidence: [01]\.\d{4}\n",
        capsys.readouterr().out,
    )


def test_a_folder_is_classified_with_a_table_and_the_accuracy_of_each_class(lens_data, classifier, tmp_path, capsys):
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for i in range(3):
            shutil.copy(lens_data / name / f"{i}.npy", tmp_path / name)
    run_script("evaluate/evaluate_classify.py", "--npy_path", tmp_path, "--model_path", classifier)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 9 + 3
    for name, line in zip(CLASSES, lines[10:], strict=True):
        right = sum(row.split()[1] == name for row in lines[1:10] if row.startswith(name))
        assert line == f"Accuracy on {name}: {right / 3:.2%} of 3"


def test_bad_files_to_classify_are_named(tmp_path, classifier, capsys):
    (tmp_path / "a.npy").write_bytes(b"")
    for path, complaint in [(tmp_path, "a.npy: is empty"), (tmp_path / "b.npy", "b.npy: cannot be read")]:
        with pytest.raises(SystemExit) as stopped:
            run_script("evaluate/evaluate_classify.py", "--npy_path", path, "--model_path", classifier)
        assert stopped.value.code == 1
        assert complaint in capsys.readouterr().err


def test_a_floor_of_zero_is_no_crash_and_wide_numbers_stay_apart(capsys):
    labels = torch.arange(3).repeat_interleave(4)
    same = gaussian_features(12, [0.0, 0], [1.0, 1], seed=0)
    rows = evaluate_fld.frechet_rows("Fréchet distance, x features", [same, same, same + 1], labels)
    assert all(value > 1e6 or value == float("inf") for value in list(rows.values())[2])
    evaluate_fld.print_table({"a": [1234567890.0, -1.5e-12, float("inf"), 0.0]}, 4)
    assert capsys.readouterr().out.splitlines()[-2].split()[1:] == ["1.235e+09", "-1.5e-12", "inf", "0"]
