"""NanoDiT is DiT: its parameters have DiT's names, its output is what DiT's formulas give."""

import math

import numpy as np
import pytest
import torch

from dataset import normalize
from models import flow
from models.model import SIZES, Attention, NanoDiT, equal_light, waves

SMALL = {"input_size": 8, "patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 4, "num_classes": 3}


def random_model(**changes) -> NanoDiT:
    """A small network with no weight at its initial value: AdaLN-Zero makes an untrained one return zeros."""
    model = NanoDiT(**SMALL | changes).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def reference_forward(w: dict[str, np.ndarray], z: np.ndarray, t: np.ndarray, y: np.ndarray, heads=4, patch=2):
    """DiT with AdaLN-Zero from the formulas of arXiv:2212.09748, in float64 NumPy, one image at a time."""

    def silu(x):
        return x / (1 + np.exp(-x))

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    out = np.empty_like(z)
    grid = z.shape[-1] // patch
    for n in range(len(z)):
        cells = [(i, j) for i in range(grid) for j in range(grid)]
        patches = [z[n, 0, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].ravel() for i, j in cells]
        kernel = w["x_embedder.proj.weight"]
        x = np.array(patches) @ kernel.reshape(len(kernel), -1).T + w["x_embedder.proj.bias"]
        width = x.shape[1]
        for token, (i, j) in enumerate(cells):  # positions: sines and cosines of the column, then of the row
            for k in range(width // 4):
                for offset, place in ((0, j), (width // 2, i)):
                    angle = place / 10000 ** (k / (width // 4))
                    x[token, offset + k] += math.sin(angle)
                    x[token, offset + width // 4 + k] += math.cos(angle)
        angles = 1000 * t[n] * np.exp(-math.log(10000) * np.arange(128) / 128)
        time = linear("t_embedder.mlp.0", np.concatenate([np.cos(angles), np.sin(angles)]))
        c = linear("t_embedder.mlp.2", silu(time)) + w["y_embedder.embedding_table.weight"][y[n]]
        for b in range(2):
            m = linear(f"blocks.{b}.adaLN_modulation.1", silu(c)).reshape(6, width)
            qkv = linear(f"blocks.{b}.attn.qkv", norm(x) * (1 + m[1]) + m[0])
            q, k, v = (part.reshape(len(x), heads, -1) for part in np.split(qkv, 3, axis=1))
            mixed = np.empty_like(q)
            for h in range(heads):
                scores = q[:, h] @ k[:, h].T / math.sqrt(width // heads)
                weights = np.exp(scores - scores.max(1, keepdims=True))
                mixed[:, h] = weights / weights.sum(1, keepdims=True) @ v[:, h]
            x = x + m[2] * linear(f"blocks.{b}.attn.proj", mixed.reshape(len(x), width))
            hidden = gelu(linear(f"blocks.{b}.mlp.fc1", norm(x) * (1 + m[4]) + m[3]))
            x = x + m[5] * linear(f"blocks.{b}.mlp.fc2", hidden)
        m = linear("final_layer.adaLN_modulation.1", silu(c)).reshape(2, width)
        pixels = linear("final_layer.linear", norm(x) * (1 + m[1]) + m[0])
        for token, (i, j) in enumerate(cells):
            block = pixels[token].reshape(patch, patch)
            out[n, 0, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] = block
    return out


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return rng.standard_normal((5, 1, 8, 8)), np.array([0.0, 0.013, 0.4, 0.77, 1.0]), np.array([0, 1, 2, 3, 1])


@pytest.mark.parametrize("training", [True, False])
def test_forward_pass_equals_dits_formulas(batch, training):
    model = random_model().double()
    expected = reference_forward({name: value.numpy() for name, value in model.state_dict().items()}, *batch)
    with torch.set_grad_enabled(training):
        output = model(*map(torch.from_numpy, batch)).detach().numpy()
    assert expected.std() > 0.5
    np.testing.assert_allclose(output, expected, rtol=0, atol=3e-4)  # its frequencies, up to 1000, are float32


def test_clean_image_prediction_is_returned_as_a_velocity(batch):
    z, t, y = map(torch.from_numpy, batch)
    velocity = random_model(prediction="image").double()(z, t, y)
    image = random_model().double()(z, t, y)
    expected = (z - image) / t.clamp_min(1e-3).view(-1, 1, 1, 1)
    torch.testing.assert_close(velocity, expected.float().double(), rtol=1e-5, atol=1e-3)


def test_parameters_are_named_and_shaped_as_dits():
    expected = {
        "pos_embed": (1, 1024, 512),
        "x_embedder.proj.weight": (512, 1, 2, 2),
        "x_embedder.proj.bias": (512,),
        "t_embedder.mlp.0.weight": (512, 256),
        "t_embedder.mlp.0.bias": (512,),
        "t_embedder.mlp.2.weight": (512, 512),
        "t_embedder.mlp.2.bias": (512,),
        "y_embedder.embedding_table.weight": (4, 512),
        "final_layer.linear.weight": (4, 512),
        "final_layer.linear.bias": (4,),
        "final_layer.adaLN_modulation.1.weight": (1024, 512),
        "final_layer.adaLN_modulation.1.bias": (1024,),
    }
    for block in range(6):
        layers = {"attn.qkv": 1536, "attn.proj": 512, "mlp.fc1": 2048, "mlp.fc2": 512, "adaLN_modulation.1": 3072}
        for layer, size in layers.items():
            inputs = 2048 if layer == "mlp.fc2" else 512
            expected[f"blocks.{block}.{layer}.weight"] = (size, inputs)
            expected[f"blocks.{block}.{layer}.bias"] = (size,)
    model = NanoDiT(**SIZES["NanoDiT-B/2"])
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 29_283_844
    assert sum(p.numel() for p in model.parameters()) == 29_808_132


def test_the_published_constants_are_the_reference_size():
    torch.manual_seed(0)
    assert NanoDiT().config == NanoDiT(**SIZES["NanoDiT-B/2"]).config


def test_small_sizes_are_under_5_million_parameters_and_predict_the_clean_image():
    for name in ("NanoDiT-S/8", "NanoDiT-S/16", "NanoDiT-S/64"):
        model = NanoDiT(**SIZES[name])
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) <= 5_000_000
        assert model.prediction == "image"


def test_an_untrained_network_returns_zeros(batch):
    z, t, y = (torch.from_numpy(a) for a in batch)
    assert NanoDiT(**SMALL)(z.float(), t.float(), y).eq(0).all()


def test_a_patch_that_does_not_tile_the_image_is_refused():
    with pytest.raises(ValueError, match="must tile"):
        NanoDiT(**SMALL | {"patch_size": 3})


def test_every_class_and_no_class_give_different_velocities():
    model = random_model()
    z, t = torch.randn(1, 1, 8, 8).expand(4, -1, -1, -1), torch.full((4,), 0.5)
    out = model(z, t, torch.arange(4))
    assert all(not torch.allclose(out[i], out[j]) for i in range(4) for j in range(i))


# Patches as coefficients of principal components


def basis_model() -> tuple[NanoDiT, torch.Tensor]:
    """A random network whose basis is fitted to images of few directions, and such images."""
    model = random_model(prediction="image", patch_size=4, patch_basis=5)
    generator = torch.Generator().manual_seed(2)
    few = torch.rand(200 * 4, 5, generator=generator) * torch.tensor([3.0, 1, 0.3, 0.1, 0.03])
    images = model._unpatchify((few @ torch.rand(5, 16, generator=generator)).view(200, 4, 16)) - 1
    model.fit_basis(images)
    return model, images


def test_a_patch_basis_is_orthonormal_and_loses_nothing_of_images_within_it():
    model, images = basis_model()
    vectors = model.patch_basis.vectors
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(5), atol=1e-5, rtol=0)
    coefficients = model.encode(images)
    assert coefficients.shape == (200, *model.sample_shape) == (200, 4, 5)
    torch.testing.assert_close(model.decode(coefficients), normalize(images), atol=1e-3, rtol=0)
    patches = model._patchify(equal_light(images)).flatten(0, 1)
    expected = np.linalg.svd(np.cov(patches.numpy().T))[1][:5] ** 0.5
    np.testing.assert_allclose(model.patch_basis.spread, expected, rtol=0.01)


def test_a_patch_basis_takes_all_images_with_the_same_light_however_bright():
    model, images = basis_model()
    light = equal_light(images)
    torch.testing.assert_close(light.square().mean((1, 2, 3)), torch.full((200,), 0.2153**2))
    brightness = torch.rand(200, 1, 1, 1) + 0.5
    torch.testing.assert_close(model.encode((images + 1) * brightness - 1), model.encode(images))
    assert torch.equal(equal_light(torch.full((1, 1, 8, 8), -1.0)), torch.zeros(1, 1, 8, 8))


def test_noisy_coefficients_come_to_the_network_with_unit_variance_at_every_time():
    model, images = basis_model()
    x = model.encode(images)
    for time in (0.01, 0.3, 0.9, 1.0):
        t = torch.full((200,), time)
        z = flow.interpolate(x, torch.randn(x.shape), t)
        seen = z / flow.deviation(model.patch_basis.spread[None], t)
        torch.testing.assert_close(seen.std((0, 1)), torch.ones(5), atol=0.12, rtol=0)


def one_token_model() -> tuple[NanoDiT, torch.Tensor]:
    images = basis_model()[1]
    model = random_model(prediction="image", patch_size=8, patch_basis=5)
    model.fit_basis(images)
    return model, images


def test_the_spread_is_known_where_whole_images_have_components():
    model, images = one_token_model()
    assert model.spread.shape == model.sample_shape == (1, 5)
    coefficients = model.encode(images)
    torch.testing.assert_close(coefficients.mean(0), torch.zeros(1, 5), atol=1e-4, rtol=0)
    torch.testing.assert_close(coefficients.std(0), model.spread)
    assert basis_model()[0].spread is None
    assert random_model().spread is None


def test_a_lone_token_takes_the_attention_that_any_number_of_tokens_takes():
    attention = Attention(12, 3)
    alone = torch.randn(4, 1, 12)
    several = alone.expand(4, 5, 12)  # each sees five times itself
    torch.testing.assert_close(attention(alone), attention(several)[:, :1])


@pytest.mark.parametrize("times", [[0.9, 0.2], [0.9], [0.5]], ids=["known", "one known", "new"])
def test_along_times_of_a_solver_every_image_gets_the_velocity_of_its_time_and_class(times):
    model, _ = one_token_model()
    z, labels = torch.randn(5, 1, 5), torch.tensor([2, 1, 0, 2, 3])
    with torch.inference_mode():
        along = model.along(times)
        for time in (0.9, 0.2, 0.9):
            t = torch.full((5,), time)
            torch.testing.assert_close(along(z, t, labels), model(z, t, labels))
            assert not torch.allclose(along(z, t, labels.flip(0)), model(z, t, labels), atol=1e-3)
            assert not torch.allclose(along(z, 1.05 * t, labels), model(z, t, labels), atol=1e-3)


def test_a_compiled_model_generates_the_same_images_by_what_the_compiler_made():
    model, _ = one_token_model()
    labels = torch.tensor([2, 1, 0, 2, 1])
    plain = model.generate(labels)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model.compile(backend=backend)
    assert not compiled
    torch.testing.assert_close(model.generate(labels), plain)
    assert len(compiled) == 1  # one pass, for all times
    model.generate(labels)
    assert len(compiled) == 1
    model(torch.randn(5, 1, 5), torch.full((5,), 0.4), labels)
    assert len(compiled) == 2


def test_the_first_coefficients_come_with_sines_and_cosines_of_four_octaves():
    coefficients = torch.randn(2, 3, 7)
    seen = waves(coefficients)
    assert seen.shape == (2, 3, 7 + 2 * 5 * 4)
    assert torch.equal(seen[..., :7], coefficients)
    angles = [c * 2**octave for c in coefficients[1, 2, :5].tolist() for octave in range(4)]
    np.testing.assert_allclose(seen[1, 2, 7:27], np.sin(angles), atol=1e-5)
    np.testing.assert_allclose(seen[1, 2, 27:], np.cos(angles), atol=1e-5)
    assert waves(torch.randn(2, 3, 2)).shape == (2, 3, 2 + 2 * 2 * 4)


def test_the_loss_counts_errors_in_units_of_their_spread_but_for_the_faintest():
    model, _ = basis_model()
    spread = model.patch_basis.spread
    error = torch.diag(spread)[:, None]
    expected = spread / (spread**2 + (0.2 * spread[0]) ** 2).sqrt()
    torch.testing.assert_close(model.weigh(error)[:, 0].diagonal(), expected)
    assert expected[0] > 0.98
    assert expected[-1] < 0.1
    pixels = torch.randn(2, 1, 8, 8)
    assert torch.equal(random_model().weigh(pixels), pixels)


def test_the_flow_of_coefficients_is_that_of_pixels():
    """Euler steps from the same noise, in pixels and in coefficients, end in the same image."""
    model, _ = basis_model()
    basis = model.patch_basis
    noise, labels, times = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2]), flow.time_grid(5)

    def to_pixels(coefficients):
        return model._unpatchify(basis.decode(coefficients))

    def in_pixels(z, t, labels):
        coefficients = (model._patchify(z) - (1 - t).view(-1, 1, 1) * basis.mean) @ basis.vectors
        image = to_pixels(coefficients - t.view(-1, 1, 1) * model(coefficients, t, labels))
        return flow.velocity_from_image(image, z, t)

    with torch.inference_mode():
        pixels = flow.euler(in_pixels, noise, labels, times)
        coefficients = flow.euler(model, model._patchify(noise) @ basis.vectors, labels, times)
        assert pixels.std() > 0.1
        torch.testing.assert_close(to_pixels(coefficients), pixels, atol=1e-3, rtol=1e-3)


def test_a_patch_basis_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match='needs prediction="image"'):
        NanoDiT(**SMALL, patch_basis=3)
    with pytest.raises(ValueError, match="too few"):
        random_model(prediction="image", patch_size=8, patch_basis=20).fit_basis(torch.randn(7, 1, 8, 8))
