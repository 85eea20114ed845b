"""Layers that the networks share: embeddings of time and class, MLP, AdaLN (Peebles & Xie 2022, arXiv:2212.09748)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ModulatedNetwork(nn.Module):
    """Network conditioned on time, class and, if it was trained with any, physical parameters.

    Time and class, through ``t_embedder`` and ``y_embedder``, shift, scale and gate its ``blocks`` and ``final_layer``
    (AdaLN-Zero, arXiv:2212.09748, Sec. 3.2). The parameters, through ``p_embedder``, are added to the tokens. They are
    the same at every time, so this costs an evaluation nothing; a modulation would have to be computed for every image.
    """

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """x (n, *sample_shape), t (n,) in [0, 1], condition -> prediction (n, *sample_shape).

        Args:
            condition: labels (n,) in 0..num_classes; or (n, 1 + parameters), each label followed by the phases of its
                parameters, NaN where unknown.
        """
        labels, known = self.split(condition)
        return self.apply_modulated(x, t, self.modulations(t, labels), known)

    def split(self, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """The labels (n,) of a condition, and vectors (n, width) of its parameters, or None if the network has none."""
        labels = condition if condition.dim() == 1 else condition[:, 0].long()
        if self.p_embedder is None:
            return labels, None
        if condition.dim() > 1:
            return labels, self.told(condition[:, 1:])
        unknown = torch.full((1, self.p_embedder.count), math.nan, device=labels.device)
        return labels, self.told(unknown).expand(len(labels), -1)

    def told(self, phases: Tensor) -> Tensor:
        """Vectors (n, width) that stand for phases of the parameters (n, parameters), NaN where unknown."""
        return self.p_embedder(phases)

    def modulations(self, t: Tensor, labels: Tensor) -> list[Tensor]:
        """AdaLN shift, scale and gate of every block, (m, 6 * width), and of the final layer, (m, 2 * width)."""
        condition = self.t_embedder(t) + self.y_embedder(labels)
        return [part.adaLN_modulation(condition) for part in (*self.blocks, self.final_layer)]

    def apply_modulated(
        self, x: Tensor, t: Tensor, modulations: Sequence[Tensor], known: Tensor | None = None
    ) -> Tensor:
        """``forward`` with given modulations, times t (n,) or (1,) for all, and ``known``, the parameters' vectors."""
        raise NotImplementedError

    def through_blocks(self, tokens: Tensor, modulations: Sequence[Tensor], known: Tensor | None = None) -> Tensor:
        """Tokens (n, tokens, width) through all blocks and the final layer."""
        if known is not None:
            tokens = tokens + known[:, None]
        for block, modulation in zip(self.blocks, modulations, strict=False):
            tokens = block(tokens, modulation)
        return self.final_layer(tokens, modulations[-1])

    def initialize(self) -> None:
        """Xavier for linear layers, N(0, 0.02) for embeddings, zero for AdaLN, parameters and the output."""
        for kind in (nn.Linear, nn.Conv2d):
            for module in self.modules():
                if isinstance(module, kind):
                    nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                    nn.init.zeros_(module.bias)
        for embedding in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(embedding.weight, std=0.02)
        modulated = [*self.blocks, self.final_layer]
        last = [] if self.p_embedder is None else self.p_embedder.outputs
        for layer in (*(part.adaLN_modulation[1] for part in modulated), self.final_layer.linear, *last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


class TimestepEmbedder(nn.Module):
    """Times (n,) to vectors (n, width): 256 cosines and sines, then a small network."""

    def __init__(self, hidden_size: int, freq_scale: float, num_frequencies: int = 128):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * num_frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        # On the CPU: on "meta", where only shapes count, torch.arange makes torch import its compiler for a second
        frequencies = torch.exp(-math.log(10000) * torch.arange(num_frequencies, device="cpu") / num_frequencies)
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


class ParameterEmbedder(nn.Module):
    """Phases of parameters (n, parameters), NaN where unknown, to vectors (n, width).

    Each object, the lens or a subhalo beside it, goes through the hidden layer of its kind. The results of all objects
    are added up, as their effects on an image are (Zaheer et al. 2017, arXiv:1703.06114). The layer sees sines and
    cosines of phases in some octaves (Fourier features, arXiv:2006.10739), or a learned vector for an unknown phase.

    Args:
        objects: indices of the parameters of each object, a list for each kind of object, see ``parameters.objects``.
        num_octaves: of the Fourier features.
    """

    def __init__(self, objects: Sequence[Sequence[Sequence[int]]], hidden_size: int, num_octaves: int = 5):
        super().__init__()
        self.objects, self.num_octaves = objects, num_octaves
        self.count = 1 + max(number for kind in objects for of_object in kind for number in of_object)
        features = 2 * num_octaves + 1
        self.hidden = nn.ModuleList(nn.Linear(features * len(kind[0]), 2 * hidden_size) for kind in objects)
        self.outputs = nn.ModuleList(nn.Linear(2 * hidden_size, hidden_size) for _ in objects)

    def forward(self, phases: Tensor) -> Tensor:
        features = phase_features(phases, self.num_octaves)
        kinds = zip(self.objects, self.hidden, self.outputs, strict=True)
        return sum(output(F.gelu(hidden(features[:, kind].flatten(2))).sum(1)) for kind, hidden, output in kinds)


def phase_features(phases: Tensor, num_octaves: int = 5) -> Tensor:
    """Sines and cosines of phases (...), then 1 for an unknown phase or 0 for others, (..., 2 * num_octaves + 1)."""
    unknown = phases.isnan()[..., None]
    angles = phases.nan_to_num()[..., None] * 2.0 ** torch.arange(num_octaves, device=phases.device)
    return torch.cat([torch.cat([angles.sin(), angles.cos()], -1).masked_fill(unknown, 0), unknown], -1)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, hidden_size: int, mlp_size: int, gelu: str):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.approximate = gelu
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x), self.approximate))


class FinalLayer(nn.Module):
    """Tokens (n, tokens, width) to (n, tokens, outputs), such as the pixels of a patch."""

    def __init__(self, hidden_size: int, outputs: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation[:, None].chunk(2, dim=2)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


def gelu(x: Tensor, approximate: str = "tanh") -> Tensor:
    """GELU. Without gradients, a CPU takes half the time if tanh is a sigmoid: 1 + tanh(u) = 2 sigmoid(2 u)."""
    if approximate == "tanh" and x.is_cpu and not x.requires_grad:
        return torch.addcmul(x, x * x, x, value=0.044715).mul_(math.sqrt(8 / math.pi)).sigmoid_().mul_(x)
    return F.gelu(x, approximate=approximate)
