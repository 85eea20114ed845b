"""NanoDiT, a small diffusion transformer with AdaLN-Zero conditioning (Peebles & Xie 2022, arXiv:2212.09748, Sec. 3).

Names and shapes of the parameters are those of facebookresearch/DiT, so equal weights give equal outputs.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import (
    FinalLayer,
    LabelEmbedder,
    Mlp,
    ModulatedNetwork,
    ParameterEmbedder,
    TimestepEmbedder,
    modulate,
)


class NanoDiT(ModulatedNetwork):
    """Transformer on the patches of noisy images, given time and class.

    Args:
        input_size: height and width of the images in pixels.
        patch_size: height and width of a token in pixels; if they do not tile the images, the last ones reach beyond.
        in_channels: channels of the images.
        hidden_size: width of the network, a multiple of 4 and of ``num_heads``.
        depth: number of transformer blocks.
        num_classes: number of classes; label ``num_classes`` means no class.
        objects: physical parameters that it takes, see ``ParameterEmbedder``; none unless given.
        timestep_freq_scale: t in [0, 1] is multiplied by this before its sinusoidal embedding.
        gelu: "tanh" as DiT has it, or "none", the exact function that the published NanoDiT had.

    Attributes:
        config: the arguments, by name.
        sample_shape: shape of an image, (c, h, w).

    Raises:
        ValueError: for sizes that do not fit together.
    """

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
        gelu: str = "tanh",
        objects: Sequence[Sequence[Sequence[int]]] = (),
    ):
        super().__init__()
        self.config: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("self", "__class__") and v != ()}
        if patch_size > input_size or hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                f"a patch of {patch_size} must lie within {input_size} pixels, and a width of {hidden_size} must be a "
                f"multiple of 4 and of its {num_heads} heads"
            )
        self.sample_shape = (in_channels, input_size, input_size)
        self.patch_size = patch_size
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, timestep_freq_scale)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.p_embedder = ParameterEmbedder(objects, hidden_size) if objects else None
        self.grid_size = math.ceil(input_size / patch_size)
        self.pos_embed = nn.Parameter(sincos_positions(hidden_size, self.grid_size)[None], requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio, gelu) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size * patch_size * in_channels)
        self.initialize()

    def apply_modulated(
        self, x: Tensor, t: Tensor, modulations: Sequence[Tensor], known: Tensor | None = None
    ) -> Tensor:
        beyond = self.grid_size * self.patch_size - x.shape[-1]
        x = F.pad(x, (0, beyond, 0, beyond))
        return self.unpatchify(self.through_blocks(self.x_embedder(x) + self.pos_embed, modulations, known))

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(n, tokens, patch * patch * c) -> (n, c, h, w)."""
        c, h, w = self.sample_shape
        p, grid = self.patch_size, self.grid_size
        patches = tokens.view(len(tokens), grid, grid, p, p, c)
        return torch.einsum("nhwpqc->nchpwq", patches).reshape(len(tokens), c, grid * p, grid * p)[..., :h, :w]


class PatchEmbed(nn.Module):
    """Images (n, c, h, w) to tokens (n, tokens, width), one a patch, row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (n, tokens, width)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width))


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
        """Tokens (n, tokens, width) and the output of ``adaLN_modulation`` for each image, (n, 6 * width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, None].chunk(6, dim=2)
        x = torch.addcmul(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1)))
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


def sincos_positions(hidden_size: int, grid_size: int) -> Tensor:
    """Fixed 2-D positions (grid_size ** 2, hidden_size), row by row.

    Sines and cosines of the column, then of the row, each a quarter of the width, at geometric frequencies from 1 down
    (Vaswani et al. 2017, arXiv:1706.03762, Sec. 3.5, in the two-dimensional layout of MAE, arXiv:2111.06377).
    """
    quarter = hidden_size // 4
    frequencies = 10000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = axis.repeat(grid_size, 1), axis.repeat_interleave(grid_size, 0)
    return torch.cat([columns, rows], dim=1).float()
