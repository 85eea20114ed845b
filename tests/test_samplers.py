"""Sets of images are compared by their distance to real ones, sampler by sampler."""

import json

import torch
from conftest import run_script

from dataset import NpyDataset, normalize
from evaluate.compare_samplers import with_guidance
from metrics.lens_distance import LensDistance
from models import flow
from models.classifier import load_classifier
from models.generator import load_model


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
