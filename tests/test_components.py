"""Principal components keep what there is in images, and the network sees coefficients of one size at every time."""

import numpy as np
import pytest
import torch
from test_model import LENSES

from dataset import normalize
from models import flow
from models.components import ComponentMLP, PrincipalComponents, _light, fourier_features, without_attention
from models.generator import Generator, build_untrained
from models.model import Attention


def component_generator() -> tuple[Generator, torch.Tensor]:
    """A random network on five principal components, and images with only these five components."""
    generator = torch.Generator().manual_seed(2)
    few = torch.rand(200, 5, generator=generator) * torch.tensor([3.0, 1, 0.3, 0.1, 0.02])
    images = (few @ torch.rand(5, 64, generator=generator)).view(200, 1, 8, 8) - 1
    codec = PrincipalComponents.fitted(images, 5)
    network = ComponentMLP(5, hidden_size=16).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        network.standard_deviation.copy_(codec.standard_deviation)
    return Generator(network, LENSES, (1, 8, 8), "image", codec).eval(), images


def test_components_are_orthonormal_and_lose_nothing_of_images_within_them():
    model, images = component_generator()
    vectors = model.codec.vectors
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(5), atol=1e-5, rtol=0)
    coefficients = model.encode(images)
    assert coefficients.shape == (200, *model.sample_shape) == (200, 5)
    torch.testing.assert_close(model.decode(coefficients), normalize(images), atol=1e-3, rtol=0)
    light = _light(images)
    expected = np.linalg.svd(np.cov(light.numpy().T))[1][:5] ** 0.5
    np.testing.assert_allclose(model.codec.standard_deviation, expected, rtol=0.01)


def test_components_take_all_images_with_the_same_light_however_bright():
    model, images = component_generator()
    light = _light(images)
    torch.testing.assert_close(light.square().sum(1), torch.full((200,), (0.2153 * 64) ** 2))  # of any size
    brightness = torch.rand(200, 1, 1, 1) + 0.5
    torch.testing.assert_close(model.encode((images + 1) * brightness - 1), model.encode(images))
    assert torch.equal(_light(torch.full((1, 1, 8, 8), -1.0)), torch.zeros(1, 64))


def test_components_are_of_all_channels_together():
    images = torch.rand(50, 9) @ torch.rand(9, 3 * 64)
    images = images.view(50, 3, 8, 8) / 5 - 1
    codec = PrincipalComponents.fitted(images, 40)
    assert codec.encode(images).shape == (50, 25)  # no more than half of the images
    assert codec.decode(codec.encode(images)).shape == (50, 3, 8, 8)
    torch.testing.assert_close(codec.decode(codec.encode(images)), normalize(images), atol=1e-3, rtol=0)


def test_noisy_coefficients_come_to_the_network_with_unit_variance_at_every_time(monkeypatch):
    model, images = component_generator()
    x, seen = model.encode(images).repeat(4, 1), []
    monkeypatch.setattr("models.components.fourier_features", lambda z: seen.append(z) or fourier_features(z))
    for time in (0.01, 0.3, 0.9, 1.0):
        t = torch.full((800,), time)
        model(flow.interpolate(x, torch.randn(x.shape), t), t, torch.zeros(800, dtype=torch.long))
        torch.testing.assert_close(seen[-1].std(0), torch.ones(5), atol=0.12, rtol=0)


def test_the_standard_deviation_is_that_of_coefficients_around_0():
    model, images = component_generator()
    assert model.standard_deviation.shape == model.sample_shape == (5,)
    coefficients = model.encode(images)
    torch.testing.assert_close(coefficients.mean(0), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(coefficients.std(0), model.standard_deviation)


def test_the_attention_of_a_lone_token_is_a_linear_layer():
    """``without_attention`` replaces it by that layer, and adds the token's position to the bias of the embedding."""
    attention, first = Attention(12, 3), torch.nn.Linear(7, 12)
    coefficients, position = torch.randn(4, 1, 7), torch.randn(1, 1, 12)
    old = {"x_embedder.weight": first.weight, "x_embedder.bias": first.bias, "pos_embed": position}
    old |= {f"blocks.0.attn.{name}": value for name, value in attention.state_dict().items()}
    old |= {f"patch_basis.{name}": torch.rand(7) for name in ("mean", "vectors", "spread")}
    codec, network = without_attention(old)
    alone = first(coefficients) + position
    torch.testing.assert_close(attention(alone), attention(alone.expand(4, 5, 12))[:, :1])  # it sees itself five times
    embedded = torch.nn.functional.linear(coefficients, network["x_embedder.weight"], network["x_embedder.bias"])
    linear = (network[f"blocks.0.linear.{name}"] for name in ("weight", "bias"))
    torch.testing.assert_close(torch.nn.functional.linear(embedded, *linear), attention(alone))
    assert codec.keys() == {"mean", "vectors", "standard_deviation"}
    assert torch.equal(network["standard_deviation"], old["patch_basis.spread"])


def test_the_first_coefficients_come_with_sines_and_cosines_of_four_octaves():
    coefficients = torch.randn(6, 7)
    seen = fourier_features(coefficients)
    assert seen.shape == (6, 7 + 2 * 5 * 4)
    assert torch.equal(seen[:, :7], coefficients)
    angles = [c * 2**octave for c in coefficients[4, :5].tolist() for octave in range(4)]
    np.testing.assert_allclose(seen[4, 7:27], np.sin(angles), atol=1e-5)
    np.testing.assert_allclose(seen[4, 27:], np.cos(angles), atol=1e-5)
    assert fourier_features(torch.randn(6, 2)).shape == (6, 2 + 2 * 2 * 4)


def test_the_loss_counts_errors_over_their_standard_deviation_but_for_the_faintest():
    model, _ = component_generator()
    deviation = model.standard_deviation
    expected = deviation / (deviation**2 + (0.2 * deviation[0]) ** 2).sqrt()
    torch.testing.assert_close(model.codec.weigh(torch.diag(deviation)).diagonal(), expected)
    assert expected[0] > 0.98
    assert expected[-1] < 0.1
    x, t, labels = torch.zeros(5, 5), torch.full((5,), 0.5), torch.zeros(5, dtype=torch.long)
    loss = model.objective(lambda z, t, labels: torch.diag(deviation), x, torch.zeros(5, 5), t, labels)
    torch.testing.assert_close(loss, 4 * expected.square().sum() / 25)  # the error of the image over t, squared


def test_the_flow_of_coefficients_is_that_of_pixels():
    """Euler steps from the same noise, in pixels and in coefficients, end in the same image."""
    model, _ = component_generator()
    mean, vectors = model.codec.mean, model.codec.vectors
    noise, labels, times = torch.randn(3, 64), torch.tensor([0, 1, 2]), flow.time_grid(5)

    def to_pixels(coefficients):
        return coefficients @ vectors.T + mean

    def in_pixels(z, t, labels):
        coefficients = (z - (1 - t).view(-1, 1) * mean) @ vectors
        image = to_pixels(coefficients - t.view(-1, 1) * model(coefficients, t, labels))
        return flow.velocity_from_image(image, z, t)

    with torch.inference_mode():
        pixels = flow.euler(in_pixels, noise, labels, times)
        coefficients = flow.euler(model, noise @ vectors, labels, times)
        assert pixels.std() > 0.05
        torch.testing.assert_close(to_pixels(coefficients), pixels, atol=1e-3, rtol=1e-3)
        image = normalize(pixels.clamp_min(0).view(3, 1, 8, 8))
        torch.testing.assert_close(model.decode(coefficients), image, atol=1e-3, rtol=1e-3)


def test_an_untrained_network_returns_zeros():
    z, t, labels = torch.randn(5, 7), torch.rand(5), torch.arange(5) % 4
    assert ComponentMLP(7, hidden_size=16)(z, t, labels).eq(0).all()


def test_components_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match='need prediction="image"'):
        build_untrained("ComponentMLP-512", LENSES, (1, 64, 64), prediction="velocity")
    with pytest.raises(ValueError, match="64 numbers of an image have fewer than 65 principal components"):
        PrincipalComponents((1, 8, 8), 65)
