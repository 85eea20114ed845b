"""A generator has a network, a codec, a sampler and a description of its data, and all travel in its checkpoint."""

import numpy as np
import pytest
import torch
from conftest import DATA, ROOT
from test_components import component_generator
from test_model import LENSES, batch, random_model

from models import flow
from models.checkpoint import load_checkpoint, save_checkpoint
from models.classifier import build_classifier, classify
from models.components import ComponentMLP
from models.generator import SIZES, Generator, build_generator, build_untrained, generate_image, load_model
from models.model import NanoDiT
from settings import InputError


def pixel_generator(prediction="velocity", classes=LENSES, **changes) -> Generator:
    """A random NanoDiT of images of 8 pixels."""
    network = random_model(**changes)
    return Generator(network, classes, network.sample_shape, prediction).eval()


def test_clean_image_prediction_is_returned_as_a_velocity():
    z, t, y = map(torch.from_numpy, batch())
    velocity = pixel_generator("image").double()(z, t, y)
    image = random_model().double()(z, t, y)
    expected = (z - image) / t.clamp_min(1e-3).view(-1, 1, 1, 1)
    torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(pixel_generator().double()(z, t, y), image.float())


GENERATORS = pytest.mark.parametrize(
    "model",
    [
        lambda: component_generator()[0],
        pixel_generator,
        lambda: pixel_generator("image", ("a", "b", "c"), in_channels=2),
    ],
    ids=["components", "pixels", "two channels"],
)


@GENERATORS
@pytest.mark.parametrize("times", [[0.9, 0.2], [0.9], [0.5]], ids=["known", "one known", "new"])
def test_along_times_of_a_solver_every_image_gets_the_velocity_of_its_time_and_class(model, times):
    model = model()
    z, labels = torch.randn(5, *model.sample_shape), torch.tensor([2, 1, 0, 2, 3])
    with torch.inference_mode():
        along = model.along(times)
        for time in (0.9, 0.2, 0.9):
            t = torch.full((5,), time)
            torch.testing.assert_close(along(z, t, labels), model(z, t, labels))
            assert not torch.allclose(along(z, t, labels.flip(0)), model(z, t, labels), atol=1e-3)
            assert not torch.allclose(along(z, 1.05 * t, labels), model(z, t, labels), atol=1e-3)


def test_a_compiled_generator_makes_the_same_images_by_what_the_compiler_made():
    model, labels = component_generator()[0], torch.tensor([2, 1, 0, 2, 1])
    plain = model.generate(labels)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model.compile(backend=backend)
    assert not compiled
    torch.testing.assert_close(model.generate(labels), plain)
    assert len(compiled) == 1  # one function, for all times
    model.generate(labels)
    assert len(compiled) == 1


def test_without_a_codec_images_are_what_flows():
    model, images = pixel_generator(), torch.rand(4, 1, 8, 8) * 2 - 1
    assert model.standard_deviation is None
    assert torch.equal(model.encode(images), images)
    assert torch.equal(model.decode(2 * images), (images + 0.5).clamp(0, 1))
    given = images, torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([0, 3, 1, 2])
    for prediction in ("velocity", "image"):
        model.prediction = prediction
        assert torch.equal(
            model.objective(model.network, *given), flow.objective(model.network, *given, prediction=prediction)
        )


@GENERATORS
def test_a_description_is_plain_and_builds_the_same_generator(model, tmp_path):
    model = model()
    sampler = {"steps": 3, "cfg_scale": 2.0, "solver": "heun", "grid": "cosine", "tolerance": None}
    codec = {} if model.codec is None else {"codec_state_dict": model.codec.state_dict()}
    content = {"model_state_dict": model.network.state_dict(), **codec, **model.description(), "sampler": sampler}
    save_checkpoint(tmp_path / "c.pt", **content)
    loaded = load_model(tmp_path / "c.pt", "cpu")
    assert loaded.description() == model.description()
    assert loaded.sampler == flow.Sampler(**sampler)
    assert (loaded.classes, loaded.image_shape) == (model.classes, model.image_shape)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    labels = torch.tensor([0, 2, 1])
    assert torch.equal(loaded.generate(labels), model.generate(labels, loaded.sampler))


@pytest.mark.parametrize(
    "wrong",
    [
        {"classes": ["a", "b"]},
        {"classes": None},
        {"image_shape": [1, 16, 16]},
        {"image_shape": [8, 8]},
        {"network": "Transformer"},
        {"prediction": "noise"},
        {"model_config": {"depth": 10**9}},
        {"sampler": {"steps": 0}},
    ],
    ids=str,
)
def test_a_description_that_does_not_fit_together_is_one_line(wrong):
    model = pixel_generator()
    content = {"model_state_dict": model.network.state_dict(), **model.description(), "sampler": {}}
    assert build_generator(content, "good")
    with pytest.raises(InputError, match=r"^c\.pt: its (configuration is not that of a generator|weights are of an)"):
        build_generator(content | wrong, "c.pt")


# Checkpoints of older versions


def test_a_transformer_of_one_token_loads_as_the_mlp_that_it_is():
    """It gives the same images and velocities as it did with attention and position."""
    path = DATA / "one_token_transformer.pt"
    expected, model = load_checkpoint(path), load_model(path, "cpu")
    assert type(model.network) is ComponentMLP
    assert model.description()["image_shape"] == [1, 64, 64]
    assert (model.classes, model.prediction) == (LENSES, "image")
    assert model.sampler == flow.Sampler(3, 1.5, "multistep", "logit", 0.04)
    velocity = model(expected["z"].flatten(1), expected["t"], expected["labels"])
    torch.testing.assert_close(velocity, expected["velocity"].flatten(1), atol=1e-5, rtol=1e-5)
    images = model.double().generate(torch.arange(6) % 3, seed=5)  # float32's last digits depend on torch's version
    images = torch.nn.functional.avg_pool2d(images, 8).float()
    torch.testing.assert_close(images, expected["expected_images"], atol=1e-5, rtol=0)


def test_the_shipped_generator_loads_under_its_old_name():
    old, new = (
        load_model(ROOT / "weights" / f"{name}.safetensors", "cpu") for name in ("nanodit_s64", "component_mlp")
    )
    for name, value in new.state_dict().items():
        assert torch.equal(old.state_dict()[name], value), name
    assert old.description() == new.description()


# What people call


def test_an_image_is_of_the_class_that_is_named_or_numbered():
    model = pixel_generator()
    for label, name in enumerate(LENSES):
        by_name = generate_image(model, name, 3, num_samples=2, seed=4)
        assert by_name.shape == (2, 1, 8, 8)
        assert torch.equal(by_name, generate_image(model, label, 3, num_samples=2, seed=4))
        assert torch.equal(by_name, generate_image(model, np.int64(label), 3, num_samples=2, seed=4))
        assert torch.equal(by_name, model.generate(torch.tensor([label] * 2), flow.Sampler(3), seed=4))
        assert not torch.equal(by_name, generate_image(model, LENSES[label - 1], 3, num_samples=2, seed=4))
    for wrong in ("CDM", "", 3, -1, 1.5, None, True):
        with pytest.raises(InputError, match=r"target_class .* is not one of 0 to 2: axion, cdm, no_sub"):
            generate_image(model, wrong)


def test_steps_and_guidance_are_those_of_the_checkpoint_unless_they_are_given():
    model = pixel_generator()
    model.sampler = flow.Sampler(4, 1.5, "heun", "cosine", 0.1)
    assert model.sampler_for() == model.sampler
    assert model.sampler_for(cfg_scale=3.0) == flow.Sampler(4, 3.0, "heun", "cosine", 0.1)
    assert model.sampler_for(7) == flow.Sampler(7, 1.5, "heun", "cosine", None)  # exactly so many
    image = generate_image(model, 1, 7, 3.0)
    assert torch.equal(image, model.generate(torch.tensor([1]), flow.Sampler(7, 3.0, "heun", "cosine")))
    assert not torch.allclose(image, generate_image(model, 1), atol=1e-3)


@pytest.mark.parametrize("name", SIZES)
def test_every_size_is_built_for_any_classes_channels_and_pixels(name):
    with torch.device("meta"):
        model = build_untrained(name, ("a", "b"), (3, 128, 128))
    assert (model.classes, model.image_shape) == (("a", "b"), (3, 128, 128))
    assert model.network.config["num_classes"] == 2
    shape = (3, 128, 128) if type(model.network) is NanoDiT else (SIZES[name]["components"],)
    assert model.sample_shape == shape
    assert type(model.network).__name__ == SIZES[name]["network"]


def test_a_classifier_takes_any_number_of_channels():
    """For one and three channels it has ImageNet's first layer; for other numbers, one of its own."""
    for channels in (1, 3, 5):
        model = build_classifier(32, ("a", "b"), channels).eval()
        probabilities, features = classify(model, torch.rand(4, channels, 16, 16), show_progress=False)
        assert probabilities.shape == (4, 2)
        assert features.shape == (4, 512)
        assert model.conv1.in_channels == (channels if channels == 5 else 3)


def test_a_network_without_a_setting_says_so(train):
    with pytest.raises(InputError, match="ComponentMLP-512 has not all of patch_size"):
        train(
            MODEL_SIZE="ComponentMLP-512",
            PATCH_SIZE=8,
            LATENT_DIM=None,
            MODEL_DEPTH=None,
            MODEL_HEADS=None,
            PREDICTION=None,
        )
