"""A classifier knows its limits: its probabilities are right on average, and it finds images unlike its training's."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script

from dataset import NpyDataset
from models.checkpoint import load_checkpoint
from models.classifier import (
    Calibration,
    build_classifier,
    calibrate,
    calibration_error,
    classify,
    load_classifier,
    unlikeness,
)
from train.views import KINDS


def test_the_calibration_error_is_that_of_its_definition():
    probabilities = torch.tensor([[0.9, 0.1]] * 10 + [[0.3, 0.7]] * 10)
    labels = torch.tensor([0] * 8 + [1] * 2 + [1] * 6 + [0] * 4)
    assert calibration_error(probabilities, labels) == pytest.approx((0.1 * 10 + 0.1 * 10) / 20, abs=1e-6)
    sure = torch.tensor([[1.0, 0.0]] * 4)
    assert calibration_error(sure, torch.tensor([0, 0, 0, 1])) == pytest.approx(0.25)


@pytest.fixture(scope="module")
def network():
    """An untrained network whose features depend on its images; an untrained residual network's hardly do."""
    torch.manual_seed(0)
    model = build_classifier(32, ("a", "b")).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def blobs(n, seed, width=4.0):
    random = torch.Generator().manual_seed(seed)
    axis = torch.arange(32.0) - 16
    place = torch.rand(2, n, 1, 1, generator=random) * 6 - 3
    return torch.exp(-((axis - place[0]) ** 2 + (axis[:, None] - place[1]) ** 2) / (2 * width**2))[:, None]


def test_the_temperature_is_that_of_labels_drawn_at_another_one(network):
    """Labels are drawn with three times the network's logits: the network is underconfident by that factor."""
    images = blobs(3000, 0)
    with torch.no_grad():
        network.fc.weight.mul_(4)
    probabilities, _ = classify(network, images, show_progress=False)
    sharper = (3 * probabilities.log()).softmax(1)
    labels = torch.multinomial(sharper, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    calibrate(network, images[:500], images, labels)
    assert network.calibration.temperature.item() == pytest.approx(1 / 3, rel=0.15)
    again, _ = classify(network, images, show_progress=False)
    assert calibration_error(again, labels) < calibration_error(probabilities, labels)
    torch.testing.assert_close(again, sharper, atol=0.06, rtol=0)


def test_images_like_those_of_training_are_near_and_others_far(network):
    train, val, test = blobs(1000, 1), blobs(1000, 2), blobs(1000, 3)
    calibrate(network, train, val, torch.randint(2, (1000,), generator=torch.Generator().manual_seed(0)))
    wide, noise = blobs(200, 4, 8.0), torch.rand(200, 1, 32, 32)
    distance = {
        name: network.calibration.distance(classify(network, images, show_progress=False)[1])
        for name, images in {"val": val, "test": test, "wide": wide, "noise": noise}.items()
    }
    assert (distance["val"] > 1).double().mean().item() == pytest.approx(0.01, abs=0.002)
    assert (distance["test"] > 1).double().mean() < 0.03
    assert (distance["wide"] > 1).all()
    assert (distance["noise"] > 1).all()


def test_the_faintest_images_are_like_those_of_training_too(network):
    train, val = blobs(1000, 1), blobs(1000, 2)
    faint = blobs(1000, 3, 6.0)
    labels = torch.randint(2, (1000,), generator=torch.Generator().manual_seed(0))

    def share_far() -> float:
        features = classify(network, faint, show_progress=False)[1]
        return (network.calibration.distance(features) > 1).double().mean().item()

    calibrate(network, train, val, labels)
    assert share_far() > 0.1
    calibrate(network, train, val, labels, faint)
    assert share_far() == pytest.approx(0.01, abs=0.002)


def test_distances_are_those_of_mahalanobis():
    random = np.random.default_rng(0)
    mixing = random.normal(size=(3, 3))
    found = Calibration(3)
    covariance = mixing @ mixing.T
    variance, directions = np.linalg.eigh(covariance)
    found.whitening.copy_(torch.from_numpy(directions / np.sqrt(variance)))
    found.centre.copy_(torch.tensor([1.0, 2, 3]))
    found.limit.fill_(2)
    x = random.normal(size=(5, 3))
    away = x - [1, 2, 3]
    expected = np.sqrt(np.einsum("ni,ij,nj->n", away, np.linalg.inv(covariance), away) / 3) / 2
    np.testing.assert_allclose(found.distance(torch.from_numpy(x).float()), expected, rtol=1e-4)


def test_an_unlike_image_is_called_by_its_kind():
    model = build_classifier(32, ("a", "b"), 1, KINDS).eval()
    features = torch.eye(512)[:3]
    assert unlikeness(model, features, 64) == ["", "", ""]  # it is not calibrated yet
    model.calibration = Calibration()
    model.calibration.pixels.fill_(64)
    model.calibration.limit.fill_(1)  # distances are 1 / sqrt(512)
    with torch.no_grad():
        model.kind.weight.zero_()
        model.kind.bias.zero_()
        model.kind.weight[0, 0] = 5
        model.kind.weight[2, 1] = 5
        model.kind.weight[0, 2] = 5
    assert unlikeness(model, features, 64) == ["", "another scale", ""]
    features[2] *= 100
    assert unlikeness(model, features, 64) == ["", "another scale", "unlike"]
    assert unlikeness(model, features, 150) == ["another size"] * 3
    plain = build_classifier(32, ("a", "b")).eval()
    plain.calibration = model.calibration
    assert unlikeness(plain, features, 64) == ["", "", "unlike"]


# The scripts


@pytest.fixture(scope="module")
def observed(lens_data, shared):
    """OUTPUT_DIR of a short training through a telescope, with altered images beside the others."""
    flags = ["--image_size", 32, "--batch_size", 16, "--epochs", 2, "--pretrained", "false", "--data_dir", lens_data]
    flags += ["--instrument", "euclid", "--augment", "half_turn", "--max_shift", 2, "--unlike_share", 0.25]
    return shared("observed", "train/train_classifier.py", *flags, "--output_dir")


def test_what_it_knows_travels_in_the_checkpoint_and_in_weights(observed, tmp_path):
    best = observed / "classifier_ckpts" / "resnet18_best.pt"
    model = load_classifier(best)
    assert model.kinds == KINDS
    assert model.calibration.limit > 0
    assert load_checkpoint(best)["settings"]["INSTRUMENT"] == "euclid"
    output = tmp_path / "w.safetensors"
    run_script("train/export_weights.py", "--checkpoint_path", best, "--output_path", output)
    exported = load_classifier(output)
    assert exported.kinds == KINDS
    for name, value in model.state_dict().items():
        assert torch.equal(exported.state_dict()[name], value), name


def test_it_says_what_it_knows_of_an_image(observed, lens_data, tmp_path, capsys):
    model = observed / "classifier_ckpts" / "resnet18_best.pt"
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).normal(size=(64, 64)))
    run_script("evaluate/evaluate_classify.py", "--model_path", model, "--npy_path", tmp_path / "noise.npy")
    first, second, third = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("Predicted Class: '")
    assert second.startswith("Confidence: ")
    assert third.startswith("Unlike the images that this classifier was trained on (")
    run_script("evaluate/evaluate_classify.py", "--model_path", model, "--npy_path", lens_data / "cdm")
    table = capsys.readouterr().out.splitlines()
    assert table[0].endswith("confidence  unlike its training")
    assert sum(len(line.split()) > 3 for line in table[1:49]) <= 5


def test_a_classifier_of_before_says_two_lines(lens_data, capsys):
    weights = ROOT / "weights" / "resnet18_lens.safetensors"
    run_script("evaluate/evaluate_classify.py", "--model_path", weights, "--npy_path", lens_data / "cdm" / "0.npy")
    assert len(capsys.readouterr().out.strip().splitlines()) == 2
    run_script("evaluate/evaluate_classify.py", "--model_path", weights, "--npy_path", lens_data / "cdm")
    assert "unlike" not in capsys.readouterr().out.lower()


def test_images_are_scored_as_observed_beside_those_without_noise(lens_data, checkpoint, classifier, tmp_path, capsys):
    flags = ["--data_dir", lens_data, "--checkpoint_path", checkpoint, "--classifier_path", classifier]
    flags += ["--output_dir", tmp_path / "generated", "--figure_path", tmp_path / "l.png", "--num_splits", 2]
    flags += ["--report_dir", tmp_path / "report", "--num_ode_steps", 2, "--device", "cpu", "--instrument", "hst"]
    run_script("evaluate/evaluate_fld.py", *flags, "--beside", "true")
    out = capsys.readouterr().out
    assert "As hst sees them: " in out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    (clean,) = report["compared"]
    assert clean["name"] == "generated, noise-free"
    assert report["metrics"]["lens_residual"]["overall"]["value"] is None
    assert clean["metrics"]["lens_residual"]["overall"]["value"] > 0
    seen, unseen = (of["ring_width"]["overall"]["value"] for of in (report["metrics"], clean["metrics"]))
    assert seen != unseen
    assert math.isfinite(seen)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "generated, as hst sees it" in page
    assert "real, noise-free" in page
    # The files are as they were: images without noise
    images = NpyDataset(tmp_path / "generated", classes=("axion", "cdm", "no_sub"))
    assert images.observer is None
