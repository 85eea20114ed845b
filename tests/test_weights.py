"""The networks of weights/ still do what their cards say, as far as 144 images can tell."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.nn.functional import avg_pool2d, interpolate

from dataset import NpyDataset, normalize
from models.checkpoint import load_checkpoint, save_checkpoint
from models.classifier import classify, load_classifier, unlikeness
from models.generator import load_model
from models.regressor import Recovery, load_regressor
from simulate.instrument import observer_of

FILES = sorted((ROOT / "weights").glob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_small_and_has_a_card(path: Path):
    assert path.stat().st_size <= 25e6
    assert path.name in path.with_suffix(".md").read_text()


CLASSIFIERS = [("resnet18_lens", 0.90), ("resnet18_sharp", 0.95), ("resnet18_observed", 0.90)]


@pytest.mark.parametrize(("name", "accuracy"), CLASSIFIERS)
def test_a_classifier_knows_simulated_lenses(name, accuracy, lens_data):
    images = NpyDataset(lens_data)
    probabilities, features = classify(load_classifier(ROOT / "weights" / f"{name}.safetensors"), images.images)
    assert (probabilities.argmax(1) == images.labels).float().mean() > accuracy
    assert features.shape == (144, 512)


def test_the_generator_makes_lenses_of_the_class_it_is_asked_for():
    labels, model = torch.arange(96) % 3, load_model(ROOT / "weights" / "component_mlp.safetensors", "cpu")
    images = model.generate(labels)
    assert images.amin((1, 2, 3)).eq(0).all()
    assert images.amax((1, 2, 3)).eq(1).all()
    for name in ("resnet18_lens", "resnet18_sharp"):
        classifier = load_classifier(ROOT / "weights" / f"{name}.safetensors")
        assert classifier.classes == model.classes
        called = classify(classifier, images)[0].argmax(1)
        assert (called == labels).float().mean() > 0.88, name


def test_a_calibration_from_before_it_knew_its_pixels_still_loads(tmp_path):
    content = load_checkpoint(ROOT / "weights" / "resnet18_observed.safetensors")
    del content["model_state_dict"]["calibration.pixels"]
    save_checkpoint(tmp_path / "old.pt", **content)
    assert load_classifier(tmp_path / "old.pt").calibration.pixels == 64


def test_the_classifier_of_observed_lenses_reads_them_and_knows_what_is_unlike_them(lens_data):
    images = NpyDataset(lens_data)
    model = load_classifier(ROOT / "weights" / "resnet18_observed.safetensors")
    observed = images.observed(observer_of(images, "euclid")).images

    def flagged(shown) -> float:
        return np.mean([kind != "" for kind in unlikeness(model, classify(model, shown)[1], shown.shape[-1])])

    assert (classify(model, observed)[0].argmax(1) == images.labels).float().mean() > 0.87
    assert flagged(images.images) < 0.04
    assert flagged(observed) < 0.04
    assert flagged(observed.flip(2)) > 0.95  # upside down
    assert flagged(torch.rand(64, 1, 64, 64)) == 1
    assert flagged(interpolate(images.images, scale_factor=2.0)) == 1
    assert flagged(normalize(avg_pool2d(observed, 3, 1, 1))) > 0.95  # another PSF


def test_the_conditional_generator_draws_the_very_lenses_of_the_simulator(lens_data):
    images = NpyDataset(lens_data)
    model = load_model(ROOT / "weights" / "conditional_mlp.safetensors", "cpu")
    drawn = model.generate(images.labels, phases=model.phases_of(images))
    errors = (drawn - images.images).square().mean((1, 2, 3)).sqrt()
    for name, most in (("axion", 0.004), ("cdm", 0.011), ("no_sub", 0.0025)):
        assert errors[images.labels == images.classes.index(name)].square().mean().sqrt() < most, name
    assert (model.generate(images.labels) - images.images).square().mean().sqrt() > 0.05  # only the class is given


def test_what_is_not_asked_of_it_is_as_in_the_training_set():
    """The recipe draws uniformly: sources from -0.35 to 0.35, log10 axion masses from -24 to -22."""
    model = load_model(ROOT / "weights" / "conditional_mlp.safetensors", "cpu")
    filled = model.population.fill(torch.zeros(3000, dtype=torch.long), None, seed=0)
    values = {of.name: of.value(filled[:, i].numpy()) for i, of in enumerate(model.lens_parameters)}
    for found, low, high in ((values["source_x"], -0.35, 0.35), (np.log10(values["axion_mass"]), -24, -22)):
        assert found.mean() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
        assert found.std() == pytest.approx((high - low) / 12**0.5, rel=0.04)
    assert np.isnan(values["subhalo_mass_total"]).all()


def test_the_regressor_reads_what_the_simulator_was_told(lens_data):
    model = load_regressor(ROOT / "weights" / "resnet18_regressor.safetensors")
    found = Recovery.of(model, NpyDataset(lens_data)).table()
    assert all(found[f"source_{axis}"]["r2"] > 0.95 for axis in "xy")
    assert found["axion_mass"]["r2"] > 0.5
