"""NanoDiT, a small diffusion transformer with AdaLN-Zero conditioning (Peebles & Xie 2022, arXiv:2212.09748, Sec. 3).

Names and shapes of the parameters are those of facebookresearch/DiT, so equal weights give equal outputs.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import normalize
from models import flow

# NanoDiT-<width>/<patch>, largest first. B/2 is the published network, for a GPU; S, under 5 M parameters and with few
# tokens, trains on a CPU
SIZES = {
    "NanoDiT-B/2": {"patch_size": 2, "hidden_size": 512, "depth": 6, "num_heads": 8, "prediction": "velocity"},
    "NanoDiT-B/4": {"patch_size": 4, "hidden_size": 512, "depth": 6, "num_heads": 8, "prediction": "velocity"},
    "NanoDiT-S/8": {"patch_size": 8, "hidden_size": 192, "depth": 6, "num_heads": 3, "prediction": "image"},
    "NanoDiT-S/16": {"patch_size": 16, "hidden_size": 192, "depth": 6, "num_heads": 3, "prediction": "image"},
    "NanoDiT-S/64": {
        **{"patch_size": 64, "patch_basis": 512, "hidden_size": 336, "depth": 2, "num_heads": 4, "prediction": "image"}
    },
}

_LIGHT = 0.2153  # root mean square that a patch basis scales images to; simulated lenses in [-1, 1] have it on average
_FAINTEST = 0.2  # of the brightest principal component: with less, the bright ones are learned too late
_LEADING, _OCTAVES = 5, 4  # components that a network also sees as waves, and how many wavelengths of each


class NanoDiT(nn.Module):
    """Velocity of the flow at noisy images, given time and class.

    Args:
        input_size: height and width of the images in pixels, a multiple of ``patch_size``.
        patch_size: height and width of a token in pixels.
        hidden_size: width of the network, a multiple of 4 and of ``num_heads``.
        depth: number of transformer blocks.
        num_classes: number of classes; label ``num_classes`` means no class.
        timestep_freq_scale: t in [0, 1] is multiplied by this before its sinusoidal embedding.
        prediction: what the last layer predicts, the "velocity" or the clean "image" (arXiv:2511.13720); ``forward``
            returns a velocity in either case.
        gelu: "tanh" as DiT has it, or "none", the exact function that the published NanoDiT had.
        patch_basis: 0, or the number of principal components that stand for a patch; see ``PatchBasis``.

    Attributes:
        sample_shape: of what the flow is of: an image (c, h, w), or with a patch basis (tokens, patch_basis).
        sampler: how its images are made unless told otherwise; a checkpoint says what its training was for.
    """

    _compiler: Callable[[Callable], Callable] = staticmethod(lambda function: function)

    def __init__(
        self,
        input_size: int = 64,
        patch_size: int = 2,
        in_channels: int = 1,
        hidden_size: int = 512,
        depth: int = 6,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        num_classes: int = 3,
        timestep_freq_scale: float = 1000.0,
        prediction: str = "velocity",
        gelu: str = "tanh",
        patch_basis: int = 0,
    ):
        super().__init__()
        self.config: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if input_size % patch_size or hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                f"patches of {patch_size} must tile {input_size} pixels, and a width of {hidden_size} must be a "
                f"multiple of 4 and of its {num_heads} heads"
            )
        if patch_basis > patch_size * patch_size * in_channels:
            raise ValueError(
                f"a patch of {patch_size}x{patch_size} pixels has fewer principal components: {patch_basis}"
            )
        if patch_basis and prediction != "image":
            raise ValueError('a patch_basis needs prediction="image": noise has no principal components')
        self.image_shape = (in_channels, input_size, input_size)
        self.patch_size = patch_size
        self.num_tokens = (input_size // patch_size) ** 2
        self.sample_shape = (self.num_tokens, patch_basis) if patch_basis else self.image_shape
        self.sampler = flow.Sampler()
        self.num_classes = num_classes
        self.prediction = prediction
        numbers = patch_size * patch_size * in_channels
        self.patch_basis = PatchBasis(numbers, patch_basis) if patch_basis else None
        self.x_embedder = (
            nn.Linear(patch_basis + 2 * min(_LEADING, patch_basis) * _OCTAVES, hidden_size)
            if patch_basis
            else PatchEmbed(patch_size, in_channels, hidden_size)
        )
        self.t_embedder = TimestepEmbedder(hidden_size, timestep_freq_scale)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.pos_embed = nn.Parameter(
            sincos_positions(hidden_size, input_size // patch_size)[None], requires_grad=False
        )
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio, gelu) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_basis or numbers)
        self._initialize()

    def compile(self, *args: Any, **options: Any) -> None:
        """``torch.compile`` for ``forward``, as in every module, and for the passes of ``generate`` and ``along``.

        On a CPU a pass takes up to a tenth less time; it takes a C++ compiler, and up to a minute at first.
        """
        super().compile(*args, **options)
        self._compiler = partial(torch.compile, *args, **options)

    def forward(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """z (n, *sample_shape), t (n,) in [0, 1], labels (n,) in 0..num_classes -> velocity (n, *sample_shape)."""
        return self._velocity(z, t, self._modulations(t, labels))

    def along(self, times: list[float]) -> flow.Velocity:
        """``forward`` for a solver, which has all images at one time, and for weights that stay as they are.

        What times and classes say is computed once, for all of ``times`` together and for others as they come: anew in
        every pass, it would take a network of one token a third of its time.
        """
        classes = torch.arange(self.num_classes + 1, device=self.pos_embed.device)
        known: dict[float, tuple[Tensor, ...]] = {}
        of_pass = self._compiler(self._velocity)

        def add(times: list[float]) -> None:
            t = torch.tensor(times, device=classes.device)
            of_all = self._modulations(t.repeat_interleave(len(classes)), classes.repeat(len(t)))
            known.update(zip(t.tolist(), zip(*(part.split(len(classes)) for part in of_all), strict=True), strict=True))

        def velocity(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            time = t[0].item()
            if time not in known:
                add([time])
            return of_pass(z, t[:1], known[time], labels)

        add(times)
        return velocity

    @torch.inference_mode()
    def generate(
        self, labels: Tensor, sampler: flow.Sampler | None = None, seed: int = 0, batch_size: int = 128, first: int = 0
    ) -> Tensor:
        """One image for each label (n,), images first, first + 1, ... of a seed: (n, c, h, w) in [0, 1], on the CPU.

        By ``self.sampler`` unless another one is given; see ``flow.sample``.
        """
        sampler = sampler or self.sampler
        velocity = self.along(flow.pass_times(sampler, self.spread is not None)[:-1])
        labels = labels.to(self.pos_embed.device)
        samples = flow.sample(
            velocity, labels, self.sample_shape, self.num_classes, sampler, seed, batch_size, first, spread=self.spread
        )
        return self.decode(samples).cpu()

    def _modulations(self, t: Tensor, labels: Tensor) -> list[Tensor]:
        """What times and labels (m,) say to each block and to the final layer, (m, 6 or 2 times the width)."""
        condition = self.t_embedder(t) + self.y_embedder(labels)
        return [part.adaLN_modulation(condition) for part in (*self.blocks, self.final_layer)]

    def _velocity(self, z: Tensor, t: Tensor, modulations: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """At times t (n,), or (1,) for all; modulations are of the images, or of the classes if there are labels."""
        if labels is not None:
            modulations = [F.embedding(labels, of_class) for of_class in modulations]
        seen = z if self.patch_basis is None else waves(z / flow.deviation(self.patch_basis.spread[None], t))
        tokens = self.x_embedder(seen) + self.pos_embed
        for block, modulation in zip(self.blocks, modulations, strict=False):
            tokens = block(tokens, modulation)
        out = self.final_layer(tokens, modulations[-1])
        out = self._unpatchify(out) if self.patch_basis is None else out * self.patch_basis.spread
        return flow.velocity_from_image(out.float(), z, t) if self.prediction == "image" else out

    @property
    def spread(self) -> Tensor | None:
        """Standard deviation of what the flow is of, (*sample_shape), where it is known and the mean is 0: of principal
        components of whole images."""
        return self.patch_basis.spread[None] if self.patch_basis is not None and self.num_tokens == 1 else None

    def fit_basis(self, images: Tensor) -> None:
        """Sets the patch basis, if there is one, to the principal components of training images (n, c, h, w)."""
        if self.patch_basis is not None:
            if len(images) * self.num_tokens < len(self.patch_basis.spread):
                raise ValueError(f"{len(images)} images are too few for a patch basis")
            self.patch_basis.fit(self._patchify(equal_light(images)).flatten(0, 1))

    def encode(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) in [-1, 1] to what the flow is of, (n, *sample_shape)."""
        return images if self.patch_basis is None else self.patch_basis.encode(self._patchify(equal_light(images)))

    def decode(self, z: Tensor) -> Tensor:
        """What the flow is of to images (n, c, h, w) in [0, 1]; with a patch basis, each fills that range."""
        if self.patch_basis is None:
            return flow.to_unit_range(z)
        return normalize(self._unpatchify(self.patch_basis.decode(z)).clamp_min(0))

    def weigh(self, error: Tensor) -> Tensor:
        """Errors of a velocity as the loss counts them."""
        return error if self.patch_basis is None else self.patch_basis.weigh(error)

    def _patchify(self, images: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, tokens, patch * patch * c)."""
        n, c, h, w = images.shape
        p = self.patch_size
        patches = torch.einsum("nchpwq->nhwpqc", images.view(n, c, h // p, p, w // p, p))
        return patches.reshape(n, self.num_tokens, p * p * c)

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        """(n, tokens, patch * patch * c) -> (n, c, h, w)."""
        c, h, w = self.image_shape
        p = self.patch_size
        patches = tokens.view(len(tokens), h // p, w // p, p, p, c)
        return torch.einsum("nhwpqc->nchpwq", patches).reshape(len(tokens), c, h, w)

    def _initialize(self) -> None:
        """Xavier for linear layers, N(0, 0.02) for embeddings, zero for AdaLN and the output (arXiv:2212.09748)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if self.patch_basis is None:
            nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(len(self.x_embedder.proj.weight), -1))
            nn.init.zeros_(self.x_embedder.proj.bias)
        for embedding in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(embedding.weight, std=0.02)
        for layer in [block.adaLN_modulation[1] for block in self.blocks] + [
            self.final_layer.adaLN_modulation[1],
            self.final_layer.linear,
        ]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


class PatchEmbed(nn.Module):
    """Images (n, c, h, w) to tokens (n, tokens, width), one a patch, row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class PatchBasis(nn.Module):
    """Patches as coefficients of the first principal components of clean ones.

    The bottleneck of arXiv:2511.13720 (Sec. 4.3), with fixed weights. Clean images span few directions of the many that
    noise fills, and most of those with little light: in pixels, training learns the faint ones last. The vectors are
    orthonormal, so that Gaussian noise in pixels is Gaussian noise in coefficients, and the flow is the same in both.

    Args:
        numbers: in a patch.
        size: number of components.
    """

    def __init__(self, numbers: int, size: int):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(numbers), requires_grad=False)
        self.vectors = nn.Parameter(torch.zeros(numbers, size), requires_grad=False)
        self.spread = nn.Parameter(torch.ones(size), requires_grad=False)

    def fit(self, patches: Tensor, most: int = 8192) -> None:
        """Principal components (Halko et al. 2009, arXiv:0909.4061) of at most ``most`` of the patches (n, numbers)."""
        some = patches[torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))[:most]]
        self.mean.copy_(some.mean(0))
        self.vectors.copy_(torch.pca_lowrank(some - self.mean, self.spread.numel(), center=False)[2])
        self.spread.copy_(self.encode(some).std(0).clamp_min(1e-4))

    def encode(self, patches: Tensor) -> Tensor:
        """(..., numbers) -> (..., size)."""
        return (patches - self.mean) @ self.vectors

    def decode(self, coefficients: Tensor) -> Tensor:
        """(..., size) -> (..., numbers)."""
        return F.linear(coefficients, self.vectors, self.mean)

    def weigh(self, errors: Tensor) -> Tensor:
        """Errors of coefficients in units of their spread, or of ``_FAINTEST`` of the largest one if that is more."""
        return errors / (self.spread.square() + (_FAINTEST * self.spread[0]).square()).sqrt()


class TimestepEmbedder(nn.Module):
    """Times (n,) to vectors (n, width): 256 cosines and sines, then a small network."""

    def __init__(self, hidden_size: int, freq_scale: float, num_frequencies: int = 128):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * num_frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        frequencies = torch.exp(-math.log(10000) * torch.arange(num_frequencies) / num_frequencies)
        self.register_buffer("frequencies", freq_scale * frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None].to(self.frequencies.dtype) * self.frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class LabelEmbedder(nn.Module):
    """Labels (n,) to vectors (n, width); the last row of the table stands for no class."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (n, tokens, width)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        if tokens == 1:  # sees itself alone
            return self.proj(F.linear(x, self.qkv.weight[2 * width :], self.qkv.bias[2 * width :]))
        q, k, v = self.qkv(x).view(n, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, hidden_size: int, mlp_size: int, gelu: str):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.gelu = gelu
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(_gelu(self.fc1(x), self.gelu))


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (arXiv:2212.09748, Fig. 3)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, gelu: str):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), gelu)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Tokens (n, tokens, width), and what ``adaLN_modulation`` has for each image, (n, 6 * width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, None].chunk(6, dim=2)
        x = torch.addcmul(x, gate1, self.attn(_modulate(self.norm1(x), shift1, scale1)))
        return torch.addcmul(x, gate2, self.mlp(_modulate(self.norm2(x), shift2, scale2)))


class FinalLayer(nn.Module):
    """Tokens (n, tokens, width) to what a patch has (n, tokens, outputs): pixels, or coefficients of the basis."""

    def __init__(self, hidden_size: int, outputs: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation[:, None].chunk(2, dim=2)
        return self.linear(_modulate(self.norm_final(x), shift, scale))


def equal_light(images: Tensor) -> Tensor:
    """Images (n, c, h, w) in [-1, 1] to light, 0 where there is none, of the same root mean square.

    Scaled to the same peak, as files are, the brightness of a lens jumps up and down by 3% as the peak moves from pixel
    to pixel, which no small network can learn; scaled to the same power it is a smooth function of the source position.
    """
    light = images + 1
    power = light.square().mean((-3, -2, -1), keepdim=True)
    return light * (_LIGHT / power.sqrt().clamp_min(1e-6))


def waves(coefficients: Tensor) -> Tensor:
    """Coefficients (..., size) of unit variance, followed by sines and cosines of the first ones.

    Lenses are rough functions of the source position, which a few components tell; a network learns such functions
    faster from waves (Tancik et al. 2020, arXiv:2006.10739).

    Returns:
        (..., size + 2 * _LEADING * _OCTAVES), or fewer when there are not as many coefficients.
    """
    octaves = 2.0 ** torch.arange(_OCTAVES, device=coefficients.device)
    angles = (coefficients[..., :_LEADING, None] * octaves).flatten(-2)
    return torch.cat([coefficients, angles.sin(), angles.cos()], dim=-1)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


def _gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU, "tanh" or "none". To generate, a CPU takes half the time for the sigmoid: 1 + tanh(u) = 2 sigmoid(2 u)."""
    if approximate == "tanh" and x.is_cpu and not x.requires_grad:
        return torch.addcmul(x, x * x, x, value=0.044715).mul_(math.sqrt(8 / math.pi)).sigmoid_().mul_(x)
    return F.gelu(x, approximate=approximate)


def sincos_positions(hidden_size: int, grid_size: int) -> Tensor:
    """Fixed 2-D positions (grid_size ** 2, hidden_size), row by row.

    A quarter each of the sines and cosines of the column, then of the row, over geometric frequencies from 1 down
    (Vaswani et al. 2017, arXiv:1706.03762, Sec. 3.5, in the two-dimensional layout of MAE, arXiv:2111.06377).
    """
    quarter = hidden_size // 4
    frequencies = 10000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = axis.repeat(grid_size, 1), axis.repeat_interleave(grid_size, 0)
    return torch.cat([columns, rows], dim=1).float()
