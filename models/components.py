"""The small generator's own parts: principal components of images, and a residual MLP that works on them.

Noise varies along all directions of pixel space, but clean lens images along few, and most of these hold little light.
A network that works on pixels learns such faint directions last. So the codec keeps the first principal components (the
bottleneck of arXiv:2511.13720, Sec. 4.3, with fixed weights), and flow and network work on their coefficients.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import normalize
from models import flow
from models.layers import (
    FinalLayer,
    LabelEmbedder,
    Mlp,
    ModulatedNetwork,
    ParameterEmbedder,
    TimestepEmbedder,
    modulate,
    phase_features,
)
from models.noise import NoiseLaw

_LIGHT = 0.2153  # root mean square of light for 64 pixels on a side: the average of simulated lenses in [-1, 1]
_FAINTEST = 0.2  # floor in ``weigh``, over the largest deviation; with a lower one, bright components learn too late
# The residual (what components leave over) is noise, not faint structure, if one of two shares is over ``_WHITE``: its
# mean square in the sky, where there is no light, or its power at the highest frequencies (from ``_HIGHEST`` of the
# largest on), each divided by its mean square. Its RMS over that of the light must also exceed ``_IN_SKY`` or, for the
# second share, ``_NOISY``: high frequencies do not tell a fainter residual from structure
_WHITE, _HIGHEST, _IN_SKY, _NOISY = 0.1, 0.8, 0.001, 0.02
_OVERFITTED = 2.0  # components are left out if their variance in the fitted images is this many times that in others
_NOISE_OF = 4  # pixels for each component of noisy images; with fewer, too little is left to learn the noise law from
NOISINESS = 3  # additional coefficients of a noisy image: noise levels of sky and light, and its brightest pixel
_FARTHEST = 5.0  # limit of these, in standard deviations: one generated image in a thousand had 9, and was spoiled
_QUARTER = 4  # noise levels are measured in 1 of 4 pixels: the faintest on average for the sky, the brightest for light
_WIDTHS = tuple(0.03 * 2**i for i in range(8))  # of the bells of a deflection before training, in phases of a position
_NOT_KEPT = ("self", "__class__", "image_shape")  # names in a network's ``__init__`` that its ``config`` leaves out
_LEADING, _OCTAVES = 5, 4  # leading coefficients that the network also sees as Fourier features, and octaves of each


class PrincipalComponents(nn.Module):
    """Codec between images and the coefficients of their first principal components.

    The vectors are orthonormal, so Gaussian noise in pixels is Gaussian noise in coefficients, and the flow is the same
    in both. Components cannot hold the noise of the images themselves: a ``NoiseLaw`` draws it anew. Three additional
    coefficients describe it: the noise levels of sky and light, and the brightest pixel, by which an image is scaled.

    Args:
        image_shape: (c, h, w).
        size: number of components.
        noisy: whether the images have noise.
        keeps_flux: whether images keep their brightness; if not, each decoded image fills [0, 1].

    Attributes:
        config: the arguments that do not follow from the network, ``noisy`` and ``keeps_flux``, where they are true.
        standard_deviation: of each coefficient over the training images, (size,), or (size + NOISINESS,) if noisy.
    """

    def __init__(self, image_shape: tuple[int, ...], size: int, noisy: bool = False, keeps_flux: bool = False):
        super().__init__()
        self.config = {name: True for name, value in (("noisy", noisy), ("keeps_flux", keeps_flux)) if value}
        self.image_shape = tuple(image_shape)
        pixels = torch.Size(image_shape).numel()
        if size > pixels:
            raise ValueError(f"{pixels} numbers of an image have fewer than {size} principal components")
        self.mean = nn.Parameter(torch.zeros(pixels), requires_grad=False)
        self.vectors = nn.Parameter(torch.zeros(pixels, size), requires_grad=False)
        self.standard_deviation = nn.Parameter(torch.ones(size + NOISINESS * noisy), requires_grad=False)
        # Root mean square of the light over all images, if they are not scaled one by one
        self.brightness = nn.Parameter(torch.tensor(1.0), requires_grad=False) if keeps_flux else None
        # Mean and standard deviation of each of the logarithms that ``_noisiness`` returns
        noisiness = torch.tensor([[0.0] * NOISINESS, [1.0] * NOISINESS])
        self.noisiness = nn.Parameter(noisiness, requires_grad=False) if noisy else None
        self.noise = NoiseLaw(image_shape) if noisy else None

    @classmethod
    def fitted(cls, images: Tensor, size: int, keeps_flux: bool = False) -> "PrincipalComponents":
        """Fits a codec with at most ``size`` components (Halko et al. 2009, arXiv:0909.4061) to images (n, c, h, w) in
        [-1, 1], which must be in random order."""
        brightness = _brightness(images).square().mean().sqrt() if keeps_flux else None
        light = _light(images, brightness)
        mean, power_of_light = light.mean(0), light.square().mean()
        light -= mean  # in place: it may be a gigabyte
        size, pixels = min(size, len(light) // 2, light.shape[1]), light.shape[1]
        fewer = min(size, pixels // 2)  # as many components as pixels would leave no residual to find noise in
        vectors = _principal(light, fewer)
        left = light - light @ vectors @ vectors.T
        white = _white_noise(left.view(images.shape)) * len(light) / (len(light) - fewer)
        noisy = _is_noise(left.square().mean(0), white, mean, power_of_light)
        others = -(-len(light) // 4)
        if noisy:
            # Components also fit the noise of the images that they are fitted to. Other images, the first ``others``,
            # show which components are mostly such noise; the noise law is learned from those other images, too
            quiet = _without_noise(light[others:].view(-1, *images.shape[1:]), white).flatten(1)
            vectors = _principal(quiet, max(1, min(size, pixels // _NOISE_OF)))
            here, there = ((part @ vectors).square().mean(0) for part in (light[others:], light[:others]))
            lasting = here < _OVERFITTED * there
            lasting[0] = True
            vectors = vectors[:, lasting]
        elif fewer < size:
            vectors = _principal(light, size)
        codec = cls(images.shape[1:], len(vectors.T), noisy, keeps_flux)
        if keeps_flux:
            codec.brightness.copy_(brightness)
        codec.mean.copy_(mean)
        codec.vectors.copy_(vectors)
        coefficients = light @ vectors
        codec.standard_deviation[: len(vectors.T)] = coefficients.std(0).clamp_min(1e-4)
        if codec.noise is not None:
            codec._fit_noise(light + mean, light - coefficients @ vectors.T, others)
        return codec

    def _fit_noise(self, light: Tensor, left: Tensor, others: int) -> None:
        """Sets ``noisiness`` from light (n, pixels) and its residual ``left`` (n, pixels). Fits the noise law to the
        first ``others`` images, to which the components are not fitted."""
        noisiness = self._noisiness(light, left)
        self.noisiness.copy_(torch.stack([noisiness.mean(0), noisiness.std(0).clamp_min(1e-3)]))
        self.standard_deviation[-NOISINESS:] = self.standard_deviation[0]  # as important as the brightest component
        light, left, noisiness = light[:others], left[:others], noisiness[:others]
        # ``decode`` draws noise around a smooth part, from which it has subtracted the share of that noise within the
        # components. The law is learned around such a smooth part: the residual with random signs, scaled up to all of
        # the noise, stands for the noise that ``decode`` will draw
        share = self.vectors.square().sum(1).clamp_max(0.95)
        sign = torch.randint(2, left.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        smooth = light - left - (sign * left / (1 - share).sqrt()) @ self.vectors @ self.vectors.T
        self.noise.fit(self._as_images(light), self._as_images(smooth), (noisiness[:, :2] + noisiness[:, 2:]).exp())

    def encode(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) in [-1, 1] to coefficients (n, size), or (n, size + NOISINESS) for noisy images."""
        light = _light(images, self.brightness)
        coefficients = (light - self.mean) @ self.vectors
        if self.noise is None:
            return coefficients
        mean, deviation = self.noisiness
        noisiness = self._noisiness(light, light - self.mean - coefficients @ self.vectors.T)
        return torch.cat([coefficients, (noisiness - mean) / deviation * self.standard_deviation[-NOISINESS:]], 1)

    def decode(self, coefficients: Tensor, white: Tensor | None = None) -> Tensor:
        """Coefficients to images (n, c, h, w), each of which fills [0, 1] unless flux is kept.

        Args:
            white: Gaussian noise (n, c, h, w), which becomes the noise of the images; needed for noisy images only.
        """
        smooth = F.linear(coefficients[:, : self.vectors.shape[1]], self.vectors, self.mean)
        if self.noise is None:
            light = self._as_images(smooth)
            light = light.clamp_min(0) if self.brightness is None else light
        else:
            mean, deviation = self.noisiness
            noisiness = coefficients[:, -NOISINESS:] / self.standard_deviation[-NOISINESS:]
            noisiness = noisiness.clamp(-_FARTHEST, _FARTHEST) * deviation + mean
            level, peak = noisiness.exp().split([2, 1], 1)
            level = level * peak
            noise = self.noise.draw(self._as_images(smooth), level, white).flatten(1) - smooth
            # The coefficients already contain the noise within the components. Without this line, it would come twice
            smooth = smooth - noise @ self.vectors @ self.vectors.T
            light = _between(self.noise.draw(self._as_images(smooth), level, white), self.brightness is None, peak)
        return normalize(light) if self.brightness is None else light * (self.brightness / _light_of(light.shape) / 2)

    def _noisiness(self, light: Tensor, left: Tensor) -> Tensor:
        """Logarithms (n, NOISINESS) of two noise levels, each divided by the brightest pixel, and of that pixel, from
        light (n, pixels) and its residual ``left`` (n, pixels).

        The level of the sky is measured in the pixels that are faintest on average, that of light in the brightest.
        Structure in the residual adds to the level of light, not to that of the sky. Images are scaled by their
        brightest pixel, so the ratio of level and pixel varies little. Generated apart, their errors would add up.
        """
        order, part = self.mean.argsort(), len(self.mean) // _QUARTER
        peak = light.amax(1).clamp_min(1e-6)
        levels = [left[:, pixels].square().mean(1).sqrt() / peak for pixels in (order[:part], order[-part:])]
        return torch.stack([*levels, peak], 1).clamp_min(1e-6).log()

    def _as_images(self, light: Tensor) -> Tensor:
        return light.view(-1, *self.image_shape)

    def weigh(self, errors: Tensor) -> Tensor:
        """Errors of coefficients over their standard deviation, with ``_FAINTEST`` of the largest one as a floor."""
        deviation = self.standard_deviation
        return errors / (deviation.square() + (_FAINTEST * deviation[0]).square()).sqrt()


def _principal(light: Tensor, size: int) -> Tensor:
    """The first ``size`` principal components (pixels, size) of light (n, pixels) of mean 0."""
    return torch.pca_lowrank(light, size, center=False)[2]


def _is_noise(left: Tensor, white: Tensor, mean: Tensor, power_of_light: Tensor) -> bool:
    """Whether the residual is noise, see ``_WHITE``, from its mean square ``left`` (pixels,), its power ``white`` (c,)
    at the highest frequencies, and the mean (pixels,) and mean square of the light."""
    sky = left[mean.argsort()[: len(mean) // 10]].mean()  # where there is no light, structure leaves no residual
    share, least = left.mean() / power_of_light, _WHITE * left.mean()
    return bool((sky > least and share > _IN_SKY**2) or (white.mean() > least and share > _NOISY**2))


def _between(light: Tensor, from_zero: bool, peak: Tensor) -> Tensor:
    """Light (n, c, h, w) with its brightest pixel set to ``peak`` (n, 1) and all others at most ``peak``. ``from_zero``
    also sets its faintest pixel to 0, for images that are scaled by their minimum and maximum."""
    flat = light.flatten(1)
    found = flat.minimum(peak).scatter(1, flat.argmax(1, keepdim=True), peak)
    return (found.scatter(1, flat.argmin(1, keepdim=True), 0.0) if from_zero else found).view_as(light)


def _brightness(images: Tensor) -> Tensor:
    """Root mean square of the light of images in [-1, 1], (n, 1, 1, 1)."""
    return (images + 1).square().mean((-3, -2, -1), keepdim=True).sqrt()


def _light(images: Tensor, brightness: Tensor | None = None) -> Tensor:
    """Images in [-1, 1] as light (n, c * h * w), where 0 is no light. Each image is scaled to the same root mean square
    or, if the ``brightness`` of all images is given, by the same factor.

    Scaled to the same peak, as in files, the brightness of a lens jumps by 3% when the peak moves to the next pixel. No
    small network can learn this. Scaled to the same power, brightness is a smooth function of the source position.
    """
    brightness = _brightness(images).clamp_min(1e-6) if brightness is None else brightness
    return ((images + 1) * (_light_of(images.shape) / brightness)).flatten(1)


def _light_of(shape: Sequence[int]) -> float:
    """Root mean square of light for a shape (..., h, w), such that the size of coefficients does not depend on it."""
    return _LIGHT * 64 / shape[-1]


def _spectrum(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean power (c, wave numbers) of images (n, c, h, w), and the wave number (h, w // 2 + 1) of each frequency of
    ``torch.fft.rfft2``. The power of white noise is its variance, at each wave number."""
    size = images.shape[-1]
    frequency = torch.fft.fftfreq(size, 1 / size)
    wave_number = (frequency[:, None].square() + frequency[: size // 2 + 1].square()).sqrt().round().long()
    power = sum(torch.fft.rfft2(part).abs().square().sum(0) for part in images.split(256)) / len(images) / size**2
    count = torch.bincount(wave_number.flatten())
    spectrum = torch.zeros(len(power), len(count)).index_add_(1, wave_number.flatten(), power.flatten(1)) / count
    return spectrum, wave_number


def _white_noise(images: Tensor) -> Tensor:
    """Variance (c,) of the white noise in images (n, c, h, w): the median power at their smallest scales."""
    return _spectrum(images)[0][:, int(_HIGHEST * images.shape[-1] / 2) :].median(1).values


def _without_noise(images: Tensor, variance: Tensor) -> Tensor:
    """Images (n, c, h, w) of mean 0 behind a Wiener filter, which keeps the power that they have above white noise with
    the given variance (c,).

    Without the filter, all components after the first few tens fit the noise of the images that they are fitted to.
    """
    spectrum, wave_number = _spectrum(images)
    passed = (1 - variance[:, None] / spectrum.clamp_min(1e-30)).clamp_min(0)[:, wave_number]
    filtered = [torch.fft.irfft2(torch.fft.rfft2(part) * passed, s=images.shape[-2:]) for part in images.split(256)]
    return torch.cat(filtered)


class ComponentMLP(ModulatedNetwork):
    """AdaLN-Zero residual MLP that predicts clean coefficients from noisy ones, given time and class.

    Time and class enter as in DiT (arXiv:2212.09748, Fig. 3). A linear layer takes the place of attention.

    Args:
        components: number of coefficients of an image.
        hidden_size: width of the network.
        depth: number of residual blocks.
        num_classes: number of classes; label ``num_classes`` means no class.
        objects: indices of the physical parameters that it takes, see ``ParameterEmbedder``; none by default.
        placed: indices of the parameters of objects that displace light, see ``Displacement``; none by default.
        image_shape: (c, h, w); needed only with ``placed``.

    Attributes:
        config: the arguments by name, without ``image_shape`` and empty ones.
        sample_shape: (components,).
        standard_deviation: of each coefficient over the training images; fixed, set by ``adapt_to``.
        vectors: principal components (pixels, components), set by ``adapt_to``, too; only the codec saves its own.
    """

    def __init__(
        self,
        components: int = 512,
        hidden_size: int = 336,
        depth: int = 2,
        mlp_ratio: float = 4.0,
        num_classes: int = 3,
        timestep_freq_scale: float = 1000.0,
        objects: Sequence[Sequence[Sequence[int]]] = (),
        placed: Sequence[Sequence[int]] = (),
        image_shape: Sequence[int] = (),
    ):
        super().__init__()
        self.config: dict[str, Any] = {k: v for k, v in locals().items() if k not in _NOT_KEPT and v != ()}
        self.sample_shape = (components,)
        self.standard_deviation = nn.Parameter(torch.ones(components), requires_grad=False)
        features = 2 * min(_LEADING, components) * _OCTAVES
        self.x_embedder = nn.Linear(components + features, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, timestep_freq_scale)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.p_embedder = ParameterEmbedder(objects, hidden_size) if objects else None
        self.displacement = None
        if placed:
            self.displacement = Displacement(placed, self.p_embedder.count, image_shape, hidden_size)
            self.register_buffer("vectors", torch.zeros(math.prod(image_shape), components), persistent=False)
        self.blocks = nn.ModuleList(_Block(hidden_size, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, components)
        self.initialize()
        if placed:
            self.displacement.initialize()

    def adapt_to(self, codec: PrincipalComponents) -> None:
        """Copies the fixed standard deviations and, with ``placed``, the principal components of a codec."""
        self.standard_deviation.copy_(codec.standard_deviation)
        if self.displacement is not None:
            self.vectors[:, : codec.vectors.shape[1]] = codec.vectors

    def told(self, phases: Tensor) -> Tensor:
        """Phases (n, parameters) to vectors (n, width), followed by the ``Displacement`` (n, components), if any."""
        vectors = self.p_embedder(phases)
        if self.displacement is None:
            return vectors
        return torch.cat([vectors, self.displacement(phases, self.vectors)], 1)

    def apply_modulated(
        self, z: Tensor, t: Tensor, modulations: Sequence[Tensor], known: Tensor | None = None
    ) -> Tensor:
        displaced = 0.0
        if self.displacement is not None:  # this change bypasses the blocks, which see and predict the rest
            known, displaced = known.split([self.x_embedder.out_features, z.shape[1]], 1)
            z = z - (1 - t)[:, None] * displaced
        x = self.x_embedder(fourier_features(z / flow.deviation(self.standard_deviation, t)))[:, None]
        return self.through_blocks(x, modulations, known)[:, 0] * self.standard_deviation + displaced


class Displacement(nn.Module):
    """Change of an image by objects beside the lens, which displace its light: phases (n, parameters) to the change of
    coefficients (n, components).

    To first order, masses change an image by the deflection of its rays times the gradient of its light (Koopmans 2005,
    arXiv:astro-ph/0501324). The second order, included here, adds products of deflections times the curvature of the
    light. The deflection by an object is a sum of Gaussian bells around its position, each times the offset from it.
    The weights of the bells depend on the other parameters of the object, gradients and curvatures on the parameters of
    the lens. An object with any unknown parameter displaces nothing.

    Args:
        placed: indices of the parameters of each object; the last two are those of x and y. x runs along the rows of an
            image, and y from its first row to its last.
        count: number of all parameters; those that belong to no object belong to the lens.
        image_shape: (c, h, w).
        hidden_size: width of the hidden layer for the gradients; the one for the curvatures has a third of it.

    Attributes:
        scale: phases of x and of y per pixel; before training, an image is 8 standard deviations of positions wide.
        centre: phases of x and of y in the middle of an image.
    """

    def __init__(self, placed: Sequence[Sequence[int]], count: int, image_shape: Sequence[int], hidden_size: int):
        super().__init__()
        self.placed, self.image_shape = placed, tuple(image_shape)
        self.lens = sorted({*range(count)} - {number for of_object in placed for number in of_object})
        features = phase_features(torch.zeros(1)).shape[-1]
        self.weights = _two_layers(features * (len(placed[0]) - 2), 32, len(_WIDTHS))
        self.gradients = _two_layers(features * len(self.lens), hidden_size, 2 * math.prod(image_shape))
        self.curvatures = _two_layers(features * len(self.lens), hidden_size // 3, 3 * math.prod(image_shape))
        self.log_widths = nn.Parameter(torch.tensor(_WIDTHS).log())
        self.scale = nn.Parameter(torch.full((2,), 4 / image_shape[-1]))
        self.centre = nn.Parameter(torch.zeros(2))

    def initialize(self) -> None:
        """Starts with deflections that fall as 1/r, like those of a point mass, and zero gradients and curvatures."""
        for layers in (self.weights, self.gradients, self.curvatures):
            nn.init.zeros_(layers[2].weight)
            nn.init.zeros_(layers[2].bias)
        nn.init.constant_(self.weights[2].bias, _WIDTHS[0])

    @torch.compiler.disable  # the number of images with objects differs from batch to batch
    def forward(self, phases: Tensor, vectors: Tensor) -> Tensor:
        """Phases (n, parameters), NaN if unknown, and ``vectors`` (pixels, components) to changes (n, components)."""
        objects = phases[:, self.placed]
        there = objects.isfinite().all(2)
        some = torch.nonzero(there.any(1))[:, 0]  # images of most classes have no such objects
        of_lens = phase_features(phases[some][:, self.lens]).flatten(1)
        along_x, along_y = self.gradients(of_lens).unflatten(1, (2, *self.image_shape)).unbind(1)
        xx, xy, yy = self.curvatures(of_lens).unflatten(1, (3, *self.image_shape)).unbind(1)
        x, y = (of[:, None] for of in self.deflections(objects[some].nan_to_num(), there[some]))
        change = (x * (along_x + x * xx + y * xy) + y * (along_y + y * yy)).flatten(1)
        unchanged = phases.new_zeros(len(phases), vectors.shape[1])
        return unchanged.index_copy(0, some, (change @ vectors.to(change.dtype)).float())

    def deflections(self, objects: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Deflections along x and along y, each (n, h, w), from the phases of objects (n, objects, parameters); only
        objects that are ``there`` (n, objects) deflect."""
        widths = self.log_widths.exp()
        weights = self.weights(phase_features(objects[..., :-2]).flatten(2)) * there[..., None] / widths
        places = zip(self.scale, self.centre, self.image_shape[:0:-1], objects[..., -2:].unbind(2), strict=True)
        dx, dy = (
            (scale * _centred(size, objects.device) + centre - place[..., None])[:, :, None] / widths[:, None]
            for scale, centre, size, place in places
        )
        bell_x, bell_y = (-dx.square() / 2).exp(), (-dy.square() / 2).exp()  # (n, objects, widths, w or h)
        weights = weights[..., None]
        return (
            torch.einsum("nowr,nowc->nrc", bell_y, weights * dx * bell_x),
            torch.einsum("nowr,nowc->nrc", weights * dy * bell_y, bell_x),
        )


def _two_layers(features: int, hidden_size: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, hidden_size), nn.GELU(), nn.Linear(hidden_size, outputs))


def _centred(size: int, device: torch.device) -> Tensor:
    """Positions (size,) of the pixels in a row, counted from its middle."""
    return torch.arange(size, device=device) - (size - 1) / 2


class _Block(nn.Module):
    """A linear layer and an MLP, each shifted, scaled and gated by the condition. It acts on (n, 1, width)."""

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
    """Coefficients (n, size) of unit variance, followed by sines and cosines of the leading ones.

    Lenses change rapidly with the source position, which the leading coefficients give. A network learns such functions
    faster from Fourier features (Tancik et al. 2020, arXiv:2006.10739).

    Returns:
        (n, size + 2 * _LEADING * _OCTAVES), or fewer columns if there are fewer than ``_LEADING`` coefficients.
    """
    octaves = 2.0 ** torch.arange(_OCTAVES, device=coefficients.device)
    angles = (coefficients[:, :_LEADING, None] * octaves).flatten(-2)
    return torch.cat([coefficients, angles.sin(), angles.cos()], dim=-1)


def without_attention(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of codec and network from a checkpoint of the time when the network was a transformer with one token.

    Attention over one token is a linear map, which becomes the linear layer of a block. The position embedding of one
    token is a constant, which is added to a bias.
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
