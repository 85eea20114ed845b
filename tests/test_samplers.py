"""Sets of images are compared by their distance to real ones, sampler by sampler."""

import json

import pytest
import torch
from conftest import ROOT, run_script

from dataset import NpyDataset, normalize
from evaluate.compare_samplers import with_guidance
from metrics.lens_distance import LensDistance
from models import flow
from models.classifier import load_classifier
from models.components import ComponentMLP, PrincipalComponents
from models.generator import Generator, load_model


def test_real_images_are_at_the_floor_and_noise_is_far_from_it(lens_data, classifier):
    distance = LensDistance(NpyDataset(lens_data, None, "test"), load_classifier(classifier), images_per_class=500)
    val = NpyDataset(lens_data, None, "val")
    real = torch.stack([val.images[val.labels == label][i % 5] for i, label in enumerate(distance.labels)])
    of_real, of_noise = distance.over_floor(real), distance.over_floor(torch.rand(real.shape))
    assert set(of_real) == {"overall", *val.classes}
    for part, ratio in of_real.items():
        assert 0.2 < ratio < 5
        assert of_noise[part] > 20 * ratio


def test_guidance_on_the_whole_interval_is_that_of_the_sampler(checkpoint):
    model = load_model(checkpoint, "cpu")
    labels = torch.tensor([0, 1, 2])
    for scale, interval, nfe in [(1.5, (0.0, 1.0), 8), (1.0, (0.0, 1.0), 8), (1.5, (0.3, 0.6), 5)]:
        images, counted = with_guidance(model, labels, 4, scale, interval)
        assert counted == nfe
        sampler = flow.Sampler(4, scale, "multistep", "logit")
        usual = model.generate(labels, sampler)
        if interval == (0.0, 1.0):
            torch.testing.assert_close(images, usual)
        else:
            assert (images - usual).abs().max() > 1e-3
    assert torch.isfinite(normalize(images)).all()


@pytest.mark.parametrize("kind", ["noisy", "told"])
def test_with_guidance_or_without_the_images_are_those_of_the_generator(kind):
    """This includes their noise, and the parameters that are not asked for."""
    if kind == "told":
        model = load_model(ROOT / "weights" / "conditional_mlp.safetensors", "cpu")
    else:
        codec = PrincipalComponents((1, 16, 16), 8, noisy=True)
        network = ComponentMLP(codec.standard_deviation.numel(), hidden_size=16).eval()
        torch.nn.init.normal_(network.final_layer.linear.weight)
        model = Generator(network, ("a", "b", "c"), (1, 16, 16), "image", codec).eval()
    labels = torch.tensor([0, 1, 2])
    images, _ = with_guidance(model, labels, 4, 1.0, (0.0, 1.0))
    torch.testing.assert_close(images, model.generate(labels, flow.Sampler(4, 1.0, "multistep", "logit")))


def test_identical_real_images_have_no_floor_to_be_over(lens_data, classifier):
    test = NpyDataset(lens_data, None, "test")
    test.images = test.images[:1].expand(len(test), -1, -1, -1)
    distance = LensDistance(test, load_classifier(classifier), images_per_class=500)
    assert distance.over_floor(torch.rand(len(distance.labels), 1, 64, 64))["overall"] > 1000


def test_the_table_has_every_sampler(lens_data, checkpoint, classifier, tmp_path, capsys):
    flags = ["--checkpoint_path", checkpoint, "--classifier_path", classifier, "--data_dir", lens_data]
    run_script("evaluate/compare_samplers.py", *flags, "--output_dir", tmp_path / "out", "--device", "cpu")
    found = json.loads((tmp_path / "out" / "samplers.json").read_text())["over_floor"]
    assert {"euler, logit", "heun, cosine", "multistep, uniform"} <= set(found)
    assert "7" in found["heun, cosine"]  # four steps
    assert all(ratio["overall"] > 0 for of_name in found.values() for ratio in of_name.values())
    out = capsys.readouterr().out
    assert "| sampler | NFE | overall | axion | cdm | no_sub |" in out
    assert "| heun, cosine | 7 |" in out
    assert (tmp_path / "out" / "samplers.png").stat().st_size > 10_000
