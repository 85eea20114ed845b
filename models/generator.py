"""The generator of lens images: a network, its codec, its sampler, and what the training data was.

from models.generator import load_model, generate_image
image = generate_image(load_model("weights/conditional_mlp.safetensors"), "axion")
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import settings
from dataset import NpyDataset
from image_files import is_image_shape
from layouts import are_classes
from models import flow
from models.checkpoint import generator_weights, load_checkpoint, load_weights
from models.components import NOISINESS, ComponentMLP, PrincipalComponents, without_attention
from models.model import NanoDiT
from models.population import Population
from parameters import Parameter, as_plain, asked, from_plain, objects, phases, placed
from scaling import Scaling
from settings import Count, Guidance, InputError, Interval, Steps, Whole, checked, first_there


def _nanodit(image_shape: tuple[int, ...], placed: object = None, **config: Any) -> tuple[nn.Module, None]:
    # NanoDiT treats objects that have a position like all others
    return NanoDiT(**{"in_channels": image_shape[0], "input_size": image_shape[-1]} | config), None


def _component_mlp(
    image_shape: tuple[int, ...], noisy: bool = False, keeps_flux: bool = False, **config: Any
) -> tuple[nn.Module, nn.Module]:
    network = ComponentMLP(image_shape=image_shape, **config)
    return network, PrincipalComponents(image_shape, network.sample_shape[0] - NOISINESS * noisy, noisy, keeps_flux)


NETWORKS = {"NanoDiT": _nanodit, "ComponentMLP": _component_mlp}  # each gives the network and its codec, or None
# B/2 is the published network, for a GPU; S, under 5 M parameters and with few tokens, trains on a CPU. Largest first
_B = {"network": "NanoDiT", "hidden_size": 512, "depth": 6, "num_heads": 8, "prediction": "velocity"}
_S = {"network": "NanoDiT", "hidden_size": 192, "depth": 6, "num_heads": 3, "prediction": "image"}
_MLP = {"network": "ComponentMLP", "hidden_size": 336, "depth": 2, "prediction": "image"}
SIZES = {
    "NanoDiT-B/2": _B | {"patch_size": 2},
    "NanoDiT-B/4": _B | {"patch_size": 4},
    "NanoDiT-S/8": _S | {"patch_size": 8},
    "NanoDiT-S/16": _S | {"patch_size": 16},
    "ComponentMLP-1024": _MLP | {"components": 1024, "hidden_size": 512},
    "ComponentMLP-512": _MLP | {"components": 512},
}
_ASSEMBLED = ("network", "model_config", "prediction", "classes", "image_shape")  # entries that ``_assemble`` takes
_BY_IMAGE = Scaling()  # as the published code has it
# The published code trained one network on one kind of data without writing down either; it used the exact GELU
_PUBLISHED_CONFIG = {"patch_size": 2, "hidden_size": 512, "depth": 6, "num_heads": 8, "gelu": "none"}
_PUBLISHED_CLASSES = ["axion", "cdm", "no_sub"]


class Generator(nn.Module):
    """Makes images of a class from noise, by a network and what belongs to it.

    Args:
        network: predicts a velocity or a clean image; see ``NanoDiT`` for its interface.
        classes: names of the labels 0, 1, ...
        image_shape: of its images, (c, h, w).
        prediction: what the network predicts, the "velocity" or the clean "image" (arXiv:2511.13720).
        codec: turns images into what the network works on, and back; None for a network that works on images.
        sampler: how images are made unless told otherwise.
        scaling: of the images it was trained on.
        lens_parameters: physical parameters that the network takes, in order; most networks take none.

    Attributes:
        population: training lenses that provide the parameters which nobody asks for; None leaves these to the network.
    """

    _compiler: Callable[[Callable], Callable] = staticmethod(lambda function: function)

    def __init__(
        self,
        network: nn.Module,
        classes: tuple[str, ...],
        image_shape: tuple[int, int, int],
        prediction: str = "velocity",
        codec: PrincipalComponents | None = None,
        sampler: flow.Sampler | None = None,
        scaling: Scaling = _BY_IMAGE,
        lens_parameters: Sequence[Parameter] = (),
    ):
        super().__init__()
        self.network, self.codec, self.prediction = network, codec, prediction
        self.classes, self.image_shape = tuple(classes), tuple(image_shape)
        self.sampler, self.scaling, self.lens_parameters = sampler or flow.Sampler(), scaling, tuple(lens_parameters)
        self.population: Population | None = None
        self.sample_shape = network.sample_shape

    def description(self) -> dict[str, Any]:
        """Everything but weights and sampler, as plain values; ``build_generator`` reads it back from a checkpoint."""
        return {
            "network": type(self.network).__name__,
            "model_config": self.network.config | (self.codec.config if self.codec else {}),
            "prediction": self.prediction,
            "classes": list(self.classes),
            "image_shape": list(self.image_shape),
            "scaling": asdict(self.scaling),
            "parameters": as_plain(self.lens_parameters),
        }

    def with_network(self, network: nn.Module, parameters: Sequence[Parameter] | None = None) -> "Generator":
        """The same generator with another network, such as its own moving average or one that takes parameters."""
        told = self.lens_parameters if parameters is None else parameters
        kept = self.classes, self.image_shape, self.prediction, self.codec, self.sampler, self.scaling
        other = Generator(network, *kept, told).eval()
        other.population = self.population
        return other

    def with_parameters(self, parameters: Sequence[Parameter]) -> "Generator":
        """The same generator with a network that takes these parameters, which have no effect before it is trained.
        Returns itself if no parameters are given or its network takes some already."""
        if not parameters or self.lens_parameters:
            return self
        description = self.description()
        other = _assemble(*(description[name] for name in _ASSEMBLED), parameters)
        other.network.load_state_dict(self.network.state_dict(), strict=False)
        if self.codec is not None:
            other.network.adapt_to(self.codec)
        return self.with_network(other.network, parameters)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def standard_deviation(self) -> Tensor | None:
        """Standard deviation of the coefficients around their mean, 0, (size,); None without a codec."""
        return None if self.codec is None else self.codec.standard_deviation

    def compile(self, *args: Any, **options: Any) -> None:
        """``torch.compile`` for the evaluations of ``generate`` and ``along``.

        On a CPU, it saves up to a tenth of their time; it needs a C++ compiler, and up to a minute at the first call.
        """
        self._compiler = partial(torch.compile, *args, **options)

    def forward(self, z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """z (n, *sample_shape), t (n,) in [0, 1], condition from ``condition`` -> velocity (n, *sample_shape)."""
        return flow.to_velocity(self.network(z, t, condition).float(), z, t, self.prediction)

    def condition(self, labels: Tensor, phases: Tensor | None = None) -> Tensor:
        """The condition that networks take: labels (n,) in 0..len(classes), where the last one means no class; or, with
        ``phases`` (n, parameters), each label followed by the phases of its parameters, NaN where unknown.
        """
        return (
            labels if phases is None or not self.lens_parameters else torch.cat([labels[:, None].to(phases), phases], 1)
        )

    def phases_of(self, images: NpyDataset) -> Tensor | None:
        """Phases (n, parameters) of the images of a data set, from its tables; None without parameters."""
        return images.phases(self.lens_parameters) if self.lens_parameters else None

    def along(self, times: list[float]) -> flow.Velocity:
        """``forward`` for a solver, which has all images at the same time, and for weights that do not change.

        It takes conditions from ``embedded``, since the vectors of parameters are the same at every time.
        AdaLN modulations are computed once for all ``times`` and classes, and for any other time at its first use.
        Computed in every evaluation, they would take a third of the time of a network of one token.
        """
        classes = torch.arange(len(self.classes) + 1, device=self.device)
        known: dict[float, tuple[Tensor, ...]] = {}

        def add(times: list[float]) -> None:
            t = torch.tensor(times, device=self.device)
            of_all = self.network.modulations(t.repeat_interleave(len(classes)), classes.repeat(len(t)))
            known.update(zip(t.tolist(), zip(*(part.split(len(classes)) for part in of_all), strict=True), strict=True))

        def evaluate(z: Tensor, t: Tensor, of_classes: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
            labels, *known = (embedded,) if embedded.dim() == 1 else (embedded[:, 0].long(), embedded[:, 1:])
            modulations = [F.embedding(labels, of_class) for of_class in of_classes]
            output = self.network.apply_modulated(z, t, modulations, *known)
            return flow.to_velocity(output.float(), z, t, self.prediction)

        evaluate = self._compiler(evaluate)

        def velocity(z: Tensor, t: Tensor, embedded: Tensor) -> Tensor:
            time = t[0].item()
            if time not in known:
                add([time])
            return evaluate(z, t[:1], known[time], embedded)

        add(times)
        return velocity

    @torch.inference_mode()
    def embedded(self, condition: Tensor) -> Tensor:
        """A condition in which the network's vector for the parameters replaces their phases, (n, 1 + width); the
        labels (n,) alone if the network takes no parameters."""
        if not self.lens_parameters:
            return condition
        labels, vectors = self.network.split(condition)
        return torch.cat([labels[:, None].to(vectors), vectors], 1)

    @torch.inference_mode()
    def generate(
        self,
        labels: Tensor,
        sampler: flow.Sampler | None = None,
        seed: int = 0,
        batch_size: int = 128,
        first: int = 0,
        phases: Tensor | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> Tensor:
        """Images (n, c, h, w) in [0, 1] on the CPU, one for each label (n,): number first, first + 1, ... of a seed.

        They are made by ``self.sampler`` unless another one is given; see ``flow.sample``. ``self.scaling.undo`` takes
        them to the unit of the data. ``phases`` (n, parameters) are what is asked for, NaN where nothing is; a
        ``population`` fills these in. Guidance is used from the first to the last time of ``interval``.
        """
        sampler = sampler or self.sampler
        if self.population:
            phases = self.population.fill(labels, phases, seed, first)
        condition = self.condition(labels, phases).to(self.device)
        condition = torch.cat([self.embedded(part) for part in condition.split(batch_size)])
        known = self.standard_deviation
        velocity = self.along(flow.evaluation_times(sampler, known is not None)[:-1])
        order = sampler, seed, batch_size, first
        samples = flow.sample(velocity, condition, self.sample_shape, self.nothing, *order, known, interval)
        if self.codec is None or self.codec.noise is None:
            return self.decode(samples).cpu()
        images = []
        for part in torch.arange(len(samples)).split(batch_size):
            white = flow.noise_images(self.image_shape, seed, (first + part).tolist(), stream=1)
            images.append(self.codec.decode(samples[part], white.to(self.device)).cpu())
        return torch.cat(images)

    @property
    def nothing(self) -> Tensor:
        """The ``embedded`` condition that asks for nothing, for guidance."""
        return self.embedded(torch.tensor([len(self.classes)], device=self.device))[0]

    def sampler_for(self, ode_steps: int | None = None, cfg_scale: float | None = None) -> flow.Sampler:
        """The generator's sampler, with exactly ``ode_steps`` steps and another guidance scale, where given."""
        sampler = self.sampler if cfg_scale is None else replace(self.sampler, cfg_scale=cfg_scale)
        return sampler if ode_steps is None else replace(sampler, steps=ode_steps, tolerance=None)

    def encode(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) in [-1, 1] to (n, *sample_shape)."""
        return images if self.codec is None else self.codec.encode(images)

    def decode(self, z: Tensor) -> Tensor:
        """(n, *sample_shape) to images (n, c, h, w) in [0, 1], or about that where flux is kept."""
        if self.codec is not None:
            return self.codec.decode(z)
        return (z + 1) / 2 if self.scaling.keeps_flux else flow.to_unit_range(z)

    def objective(self, network: flow.Velocity, x: Tensor, noise: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """``flow.objective`` of a network in place of the generator's own; x and noise are (n, *sample_shape)."""
        weigh = {} if self.codec is None else {"weigh": self.codec.weigh}
        return flow.objective(network, x, noise, t, condition, self.prediction, **weigh)


def build_untrained(
    size: str,
    classes: tuple[str, ...],
    image_shape: tuple[int, ...],
    parameters: Sequence[Parameter] = (),
    **changes: Any,
) -> Generator:
    """An untrained generator of one of SIZES, with ``changes`` to its settings.

    If patches of that size do not tile the images, it takes the next larger ones that do, up to twice as large.

    Raises:
        ValueError: for settings that do not fit together.
    """
    config = SIZES[size] | changes
    if "patch_size" in config and "patch_size" not in changes:
        patch = min(config["patch_size"], image_shape[-1])
        config["patch_size"] = next((p for p in range(patch, 2 * patch + 1) if image_shape[-1] % p == 0), patch)
    return _assemble(config.pop("network"), config, config.pop("prediction"), classes, image_shape, parameters)


def _assemble(
    network: str,
    config: dict[str, Any],
    prediction: str,
    classes: tuple[str, ...],
    image_shape: tuple[int, ...],
    parameters: Sequence[Parameter],
) -> Generator:
    if not are_classes(classes) or not is_image_shape(image_shape):  # a name is also that of a folder to write to
        raise ValueError(f"no classes, or no images: {classes}, {image_shape}")
    told = {} if "objects" in config else {"objects": objects(parameters), "placed": placed(parameters)}
    told = {name: value for name, value in told.items() if value}
    built, codec = NETWORKS[network](image_shape, **{"num_classes": len(classes)} | told | config)
    if built.config["num_classes"] != len(classes):
        raise ValueError(f"a network of {built.config['num_classes']} classes, not of {', '.join(classes)}")
    if prediction not in ("velocity", "image"):
        raise ValueError(f"no such prediction: {prediction}")
    if codec is not None and prediction != "image":
        raise ValueError('components need prediction="image": noise has no principal components')
    if codec is None and built.sample_shape != tuple(image_shape):
        raise ValueError(f"a network of images {built.sample_shape}, not {image_shape}")
    return Generator(built, classes, image_shape, prediction, codec, lens_parameters=parameters)


class _WithoutRandom(TorchFunctionMode):
    """Skips drawing random weights: on the device "meta", torch would spend a second importing its compiler for it."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__name__", "") in ("normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs or {})


def build_generator(content: dict[str, Any], path: str | Path) -> Generator:
    """The generator of a checkpoint, with its EMA weights, or the plain ones when it has no EMA.

    Raises:
        InputError: when the configuration, the weights and the classes do not fit together.
    """
    if "image_size" in content:
        raise InputError(f"{path}: its weights are of another network: a classifier's, where a generator is wanted")
    try:
        content = of_today(content)
        weights = generator_weights(content)
        config = content["model_config"]
        if not 0 < config.get("depth", 1) <= len(weights):
            raise ValueError(f"{config['depth']} blocks")
        parameters = from_plain(content["parameters"])
        told, now = (config.get("objects", []), config.get("placed", [])), objects(parameters)
        if told not in ((now, placed(parameters)), (now, []), (objects(parameters, beside_lens=False), [])):
            raise ValueError("a network of other parameters")
        given = (*(content[name] for name in _ASSEMBLED), parameters)
        with torch.device("meta"), _WithoutRandom():  # costs nothing, whatever sizes a file asks for
            planned = _assemble(*given)
        parts = {"network": weights} | ({"codec": content["codec_state_dict"]} if planned.codec else {})
        for name, of_part in parts.items():
            shapes = {key: value.shape for key, value in planned.get_submodule(name).state_dict().items()}
            if shapes != {key: value.shape for key, value in of_part.items()}:
                raise InputError(f"{path}: its weights are of another network")
        generator = _assemble(*given)
        generator.sampler, generator.scaling = flow.Sampler(**content["sampler"]), Scaling(**content["scaling"])
        if "population_state_dict" in content:
            generator.population = Population(**content["population_state_dict"], parameters=parameters)
    except (TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, KeyError, IndexError):
        raise InputError(f"{path}: its configuration is not that of a generator") from None
    for name, of_part in parts.items():
        load_weights(generator.get_submodule(name), of_part, path)
    if generator.codec is not None:
        generator.network.adapt_to(generator.codec)
    return generator


def of_today(content: dict[str, Any]) -> dict[str, Any]:
    """Content of a checkpoint in today's form; fills in what older versions and the published code leave out."""
    content = {"scaling": asdict(_BY_IMAGE), "parameters": []} | content
    if "network" in content:
        return content
    config = dict(content.get("model_config", _PUBLISHED_CONFIG))
    prediction, components = config.pop("prediction", "velocity"), config.pop("patch_basis", 0)
    size, channels = config.get("input_size", 64), config.get("in_channels", 1)
    told = {"prediction": prediction, "classes": _PUBLISHED_CLASSES, "image_shape": [channels, size, size]}
    told |= {"sampler": content.get("sampler", {})}
    if not components:
        return content | told | {"network": "NanoDiT", "model_config": config}
    codec, weights = without_attention(generator_weights(content))
    kept = ("hidden_size", "depth", "mlp_ratio", "num_classes", "timestep_freq_scale")
    config = {"components": components} | {name: config[name] for name in kept if name in config}
    told |= {"network": "ComponentMLP", "model_config": config, "model_state_dict": weights, "codec_state_dict": codec}
    return {name: value for name, value in content.items() if name != "ema_state_dict"} | told


def default_generator() -> str:
    """The path, inside the repository, of the generator that was trained here, or else of one in weights/."""
    here = "diffusion_training/dit_conditional_ckpts/dit_conditional_final.pt"
    return first_there(here, "weights/conditional_mlp.safetensors")


def load_model(path: str | Path, device: str = "auto") -> Generator:
    """The generator of a checkpoint with its EMA weights, ready to generate.

    Args:
        path: a checkpoint of train/train_diffusion.py or of the published code.
        device: "auto", "cpu", "cuda" or "mps".

    Raises:
        InputError: for a file that is not a checkpoint of a generator.
    """
    content = load_checkpoint(path)
    model = build_generator(content, path).to(settings.pick_device(device)).eval().requires_grad_(False)
    print(f"Model loaded from {path}, epoch {content.get('epoch', 'unknown')}")
    return model


def generate_image(
    model: Generator,
    target_class: int | str,
    ode_steps: int | None = None,
    cfg_scale: float | None = None,
    num_samples: int = 1,
    seed: int = 0,
    scaled: bool = False,
    parameters: Mapping[str, Any] | None = None,
) -> Tensor:
    """Generates lenses of one class, and of some physical parameters where the model knows any.

    Args:
        target_class: name of a class, or its number in ``model.classes``.
        ode_steps: steps from noise to image, None for as many as the checkpoint says (50 for published ones).
        cfg_scale: guidance scale, None for that of the checkpoint (5 for published ones); higher is truer to the class
            and less diverse, 1 is no guidance.
        num_samples: number of images.
        seed: another seed gives other images; image k of a seed is always the same.
        scaled: True leaves images as the network has them, in about [0, 1], to be shown, say.
        parameters: values of some of ``model.lens_parameters`` by name, in their units: a number, or an array of
            ``num_samples``. The others vary as in the training images. Values outside their range give a warning.

    Returns:
        (num_samples, c, h, w) float32 on the CPU, in the unit of the data, or in [0, 1] where each image was scaled by
        itself.

    Raises:
        InputError: with the name of the argument that is not valid.
    """
    if not isinstance(model, Generator):
        raise InputError(f"model {model!r} is none: load_model gives one")
    try:
        label = model.classes.index(target_class) if isinstance(target_class, str) else target_class
        label = checked("target_class", label, Annotated[int, Interval(0, len(model.classes) - 1)])
    except (ValueError, InputError):
        known = f"one of 0 to {len(model.classes) - 1}: {', '.join(model.classes)}"
        raise InputError(f"target_class {target_class!r} is not {known}") from None
    sampler = model.sampler_for(
        checked("ode_steps", ode_steps, Steps | None), checked("cfg_scale", cfg_scale, Guidance | None)
    )
    labels = torch.full((checked("num_samples", num_samples, Count),), label)
    columns = asked(model.lens_parameters, parameters, num_samples, model.classes[label])
    known = phases(model.lens_parameters, columns) if columns else None
    images = model.generate(labels, sampler, checked("seed", seed, Whole), phases=known)
    return images if checked("scaled", scaled, bool) else model.scaling.undo(images)
