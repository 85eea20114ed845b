"""The networks of weights/ still do what their cards say, as far as 144 images can tell."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT

from dataset import NpyDataset
from models.classifier import classify, load_classifier
from models.generator import load_model

FILES = sorted((ROOT / "weights").glob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_small_and_has_a_card(path: Path):
    assert path.stat().st_size <= 25e6
    assert path.name in path.with_suffix(".md").read_text()


@pytest.mark.parametrize(("name", "accuracy"), [("resnet18_lens", 0.90), ("resnet18_sharp", 0.95)])
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
