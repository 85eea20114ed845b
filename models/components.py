"""The small generator's own parts: principal components of images, and a residual MLP that works on them.

Clean lens images span few of the many directions that noise fills, and most of those hold little light. In pixels, a
network learns the faint directions last. The codec keeps the first principal components (the bottleneck of
arXiv:2511.13720, Sec. 4.3, with fixed weights), and flow and network live in their coefficients.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import normalize
from models import flow
from models.layers import FinalLayer, LabelEmbedder, Mlp, ModulatedNetwork, TimestepEmbedder, modulate

_LIGHT = 0.2153  # root mean square that images are scaled to; simulated lenses in [-1, 1] have it on average
_FAINTEST = 0.2  # of the brightest component: with less, the bright ones are learned too late
_LEADING, _OCTAVES = 5, 4  # components that the network also sees as Fourier features, and wavelengths of each


class PrincipalComponents(nn.Module):
    """Codec between images and coefficients of their first principal components.

    The vectors are orthonormal, so Gaussian noise in pixels is Gaussian noise in coefficients, and the flow is the same
    in both.

    Args:
        image_shape: (c, h, w).
        size: number of components.
    """

    def __init__(self, image_shape: tuple[int, ...], size: int):
        super().__init__()
        self.image_shape = tuple(image_shape)
        pixels = torch.Size(image_shape).numel()
        if size > pixels:
            raise ValueError(f"{pixels} numbers of an image have fewer than {size} principal components")
        self.mean = nn.Parameter(torch.zeros(pixels), requires_grad=False)
        self.vectors = nn.Parameter(torch.zeros(pixels, size), requires_grad=False)
        self.standard_deviation = nn.Parameter(torch.ones(size), requires_grad=False)

    def fit(self, images: Tensor, most: int = 8192) -> None:
        """Sets mean and components by at most ``most`` of the images (n, c, h, w) in [-1, 1] (Halko et al. 2009,
        arXiv:0909.4061)."""
        if len(images) < len(self.standard_deviation):
            raise ValueError(f"{len(images)} images are too few for {len(self.standard_deviation)} components")
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:most]
        light = self._light(images[chosen])
        self.mean.copy_(light.mean(0))
        self.vectors.copy_(torch.pca_lowrank(light - self.mean, len(self.standard_deviation), center=False)[2])
        self.standard_deviation.copy_(((light - self.mean) @ self.vectors).std(0).clamp_min(1e-4))

    def encode(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) in [-1, 1] to coefficients (n, size)."""
        return (self._light(images) - self.mean) @ self.vectors

    def decode(self, coefficients: Tensor) -> Tensor:
        """Coefficients (n, size) to images (n, c, h, w), each of which fills [0, 1]."""
        light = F.linear(coefficients, self.vectors, self.mean)
        return normalize(light.view(-1, *self.image_shape).clamp_min(0))

    def weigh(self, errors: Tensor) -> Tensor:
        """Errors of coefficients over their standard deviation, with ``_FAINTEST`` of the largest one as a floor."""
        deviation = self.standard_deviation
        return errors / (deviation.square() + (_FAINTEST * deviation[0]).square()).sqrt()

    @staticmethod
    def _light(images: Tensor) -> Tensor:
        """Images in [-1, 1] as light (n, c * h * w), 0 where there is none, with the same root mean square.

        Scaled to the same peak, as files are, the brightness of a lens jumps by 3% as the peak moves from pixel to
        pixel, which no small network can learn; scaled to the same power it is a smooth function of the source
        position.
        """
        light = images + 1
        power = light.square().mean((-3, -2, -1), keepdim=True)
        return (light * (_LIGHT / power.sqrt().clamp_min(1e-6))).flatten(1)


class ComponentMLP(ModulatedNetwork):
    """AdaLN-Zero residual MLP that predicts the clean coefficients of noisy ones, given time and class.

    The conditioning is that of DiT (arXiv:2212.09748, Fig. 3); instead of attention it has a linear layer.

    Args:
        components: number of coefficients of an image.
        hidden_size: width of the network.
        depth: number of residual blocks.
        num_classes: number of classes; label ``num_classes`` means no class.

    Attributes:
        config: the arguments, by name.
        sample_shape: (components,).
        standard_deviation: of each coefficient over the training images; fixed, set from the codec.
    """

    def __init__(
        self,
        components: int = 512,
        hidden_size: int = 336,
        depth: int = 2,
        mlp_ratio: float = 4.0,
        num_classes: int = 3,
        timestep_freq_scale: float = 1000.0,
    ):
        super().__init__()
        self.config: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.sample_shape = (components,)
        self.standard_deviation = nn.Parameter(torch.ones(components), requires_grad=False)
        features = 2 * min(_LEADING, components) * _OCTAVES
        self.x_embedder = nn.Linear(components + features, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, timestep_freq_scale)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.blocks = nn.ModuleList(_Block(hidden_size, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, components)
        self.initialize()

    def apply_modulated(self, z: Tensor, t: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        x = self.x_embedder(fourier_features(z / flow.deviation(self.standard_deviation, t)))[:, None]
        return self.through_blocks(x, modulations)[:, 0] * self.standard_deviation


class _Block(nn.Module):
    """A linear layer and an MLP, each shifted, scaled and gated by the condition; on (n, 1, width)."""

    def __init__(self, hidden_size: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), "tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, None].chunk(6, dim=2)
        x = torch.addcmul(x, gate1, self.linear(modulate(self.norm1(x), shift1, scale1)))
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


def fourier_features(coefficients: Tensor) -> Tensor:
    """Coefficients (n, size) of unit variance, followed by sines and cosines of the first ones.

    Lenses are rough functions of the source position, which a few components tell; a network learns such functions
    faster from Fourier features (Tancik et al. 2020, arXiv:2006.10739).

    Returns:
        (n, size + 2 * _LEADING * _OCTAVES), or fewer when there are not as many coefficients.
    """
    octaves = 2.0 ** torch.arange(_OCTAVES, device=coefficients.device)
    angles = (coefficients[:, :_LEADING, None] * octaves).flatten(-2)
    return torch.cat([coefficients, angles.sin(), angles.cos()], dim=-1)


def without_attention(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of codec and network in a checkpoint from when this network was a transformer of one token.

    Attention over one token is a linear map, and its position a constant: both are folded into what is there.
    """
    prefix = "patch_basis."
    codec = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    codec["standard_deviation"] = codec.pop("spread")
    kept = {name: value for name, value in weights.items() if not name.startswith(prefix) and ".attn." not in name}
    kept["x_embedder.bias"] = kept["x_embedder.bias"] + kept.pop("pos_embed")[0, 0]
    for name in [name for name in weights if name.endswith("attn.qkv.weight")]:
        block = name.removesuffix("attn.qkv.weight")
        value, bias = weights[name].double().chunk(3)[2], weights[f"{block}attn.qkv.bias"].double().chunk(3)[2]
        proj, proj_bias = (weights[f"{block}attn.proj.{part}"].double() for part in ("weight", "bias"))
        kept[f"{block}linear.weight"] = (proj @ value).float()
        kept[f"{block}linear.bias"] = (proj @ bias + proj_bias).float()
    return codec, kept | {"standard_deviation": codec["standard_deviation"]}
