"""NanoDiT is DiT: its parameters have DiT's names, its output is what DiT's formulas give."""

import math

import numpy as np
import pytest
import torch

from models.generator import build_untrained
from models.model import NanoDiT

LENSES = ("axion", "cdm", "no_sub")
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


def reference_forward(
    w: dict[str, np.ndarray], frequencies: np.ndarray, z: np.ndarray, t: np.ndarray, y: np.ndarray, heads=4, patch=2
):
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
        patches = [z[n, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].ravel() for i, j in cells]
        kernel = w["x_embedder.proj.weight"]
        x = np.array(patches) @ kernel.reshape(len(kernel), -1).T + w["x_embedder.proj.bias"]
        width = x.shape[1]
        for token, (i, j) in enumerate(cells):  # positions: sines and cosines of the column, then of the row
            for k in range(width // 4):
                for offset, place in ((0, j), (width // 2, i)):
                    angle = place / 10000 ** (k / (width // 4))
                    x[token, offset + k] += math.sin(angle)
                    x[token, offset + width // 4 + k] += math.cos(angle)
        angles = t[n] * frequencies
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
            block = pixels[token].reshape(patch, patch, -1)  # the channels of a pixel lie side by side
            out[n, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] = block.transpose(2, 0, 1)
    return out


def batch(channels: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    z = np.random.default_rng(0).standard_normal((5, channels, 8, 8))
    return z, np.array([0.0, 0.013, 0.4, 0.77, 1.0]), np.array([0, 1, 2, 3, 1])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_forward_pass_equals_dits_formulas(training, channels):
    model, inputs = random_model(in_channels=channels).double(), batch(channels)
    frequencies = model.t_embedder.frequencies.numpy()  # float32, whose last digits differ between versions of torch
    np.testing.assert_allclose(frequencies, 1000 * np.exp(-math.log(10000) * np.arange(128) / 128), rtol=1e-6)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    expected = reference_forward(weights, frequencies, *inputs)
    with torch.set_grad_enabled(training):
        output = model(*map(torch.from_numpy, inputs)).detach().numpy()
    assert expected.std() > 0.5
    np.testing.assert_allclose(output, expected, rtol=0, atol=2e-6)  # positions are float32


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
    with torch.device("meta"):
        model = build_untrained("NanoDiT-B/2", LENSES, (1, 64, 64)).network
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 29_283_844
    assert sum(p.numel() for p in model.parameters()) == 29_808_132


def test_the_published_constants_are_the_reference_size():
    with torch.device("meta"):
        assert NanoDiT().config == build_untrained("NanoDiT-B/2", LENSES, (1, 64, 64)).network.config


def test_small_sizes_are_under_5_million_parameters_and_predict_the_clean_image():
    for name in ("NanoDiT-S/8", "NanoDiT-S/16", "ComponentMLP-512"):
        model = build_untrained(name, LENSES, (1, 64, 64))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) <= 5_000_000
        assert model.prediction == "image"


def test_an_untrained_network_returns_zeros():
    z, t, y = map(torch.from_numpy, batch())
    assert NanoDiT(**SMALL)(z.float(), t.float(), y).eq(0).all()


def test_a_patch_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match="a patch of 9 must lie within 8 pixels"):
        NanoDiT(**SMALL | {"patch_size": 9})


def test_patches_that_do_not_tile_an_image_see_nothing_beyond_it():
    """A network with patches of 3 sees an image of 8 pixels as one of 9 whose last row and column are empty."""
    torch.manual_seed(0)
    narrow, wide = (NanoDiT(**SMALL | {"patch_size": 3, "input_size": size}).eval() for size in (8, 9))
    for parameter in wide.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    narrow.load_state_dict(wide.state_dict())
    z, t, labels = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 1])
    expected = wide(torch.nn.functional.pad(z, (0, 1, 0, 1)), t, labels)[..., :8, :8]
    assert expected.std() > 0.1
    torch.testing.assert_close(narrow(z, t, labels), expected)


@pytest.mark.parametrize(
    ("size", "pixels", "patch"),
    [
        ("NanoDiT-S/8", 64, 8),
        ("NanoDiT-S/8", 150, 10),
        ("NanoDiT-S/8", 128, 8),
        ("NanoDiT-S/8", 101, 8),
        ("NanoDiT-S/16", 150, 25),
        ("NanoDiT-S/16", 12, 12),
        ("NanoDiT-B/2", 64, 2),
        ("NanoDiT-B/2", 75, 3),
    ],
)
def test_patches_follow_from_the_image(size, pixels, patch):
    assert build_untrained(size, LENSES, (1, pixels, pixels)).network.patch_size == patch


def test_every_class_and_no_class_give_different_velocities():
    model = random_model()
    z, t = torch.randn(1, 1, 8, 8).expand(4, -1, -1, -1), torch.full((4,), 0.5)
    out = model(z, t, torch.arange(4))
    assert all(not torch.allclose(out[i], out[j]) for i in range(4) for j in range(i))
