"""Measurements of images, one by one: all that the metrics need, so that the images themselves are not kept."""

import functools
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import distributed
from dataset import NpyDataset
from files import whole
from metrics import physics
from models.classifier import classify
from simulate.recipes import recipe_behind, scale_of

if TYPE_CHECKING:
    from metrics.score import Reference

Measured = dict[str, Tensor]  # name -> (n, ...), row i of each belonging to image i


@dataclass
class Sample:
    """Images of a dataset, class by class, with their measurements and scores."""

    name: str
    dataset: NpyDataset
    index: Tensor  # into the dataset
    measured: Measured
    reference: "Reference"  # the real images they are compared with, whose folder knows the recipe
    source: dict[str, Any] = field(default_factory=dict)  # how they were made
    metrics: dict[str, Any] = field(default_factory=dict)  # their scores, see ``Reference.score``

    @property
    def real(self) -> NpyDataset:
        return self.reference.sample.dataset

    def read(self, index: Tensor, random: torch.Generator | None = None) -> Tensor:
        """Images (n, c, s, s) at indices of the sample; with ``random``, observed images get fresh noise."""
        return self.dataset.read(self.index[index], random)


_THUMBNAIL = 32  # pixels on a side
_VERSION = 3  # of the cache; change it when what is measured changes


@torch.no_grad()
def measure(
    dataset: NpyDataset,
    index: Tensor,
    classifier: nn.Module,
    inception: nn.Module | None = None,
    batch_size: int = 128,
    real: NpyDataset | None = None,
) -> Measured:
    """Measures the images at ``index`` (n,) of a dataset; recipe and pixel scale are those of ``real``, if it is given.

    Returns:
        label (n,); features (n, 512) and probabilities (n, classes) of the lens classifier; inception (n, 2048), if
        that network is given; profile and spectrum (n, s // 2); every number of ``physics.describe``; thumbnail, see
        ``thumbnails_of``; and, if the recipe's smooth lens can be fitted, of the best fit source_xy (n, 2), explained,
        lens_residual (RMS over peak) and residual_* (RMS in a band).
    """
    recipe, (pixel_scale, _) = recipe_behind(real or dataset), scale_of(real or dataset)
    batches = -(-len(index) // batch_size)
    bar = tqdm(total=batches // distributed.size(), desc="measuring", unit="batch", leave=False)

    def measure_part(part: Tensor) -> Measured:
        images, low, high = dataset.look(index[part])
        probabilities, features = classify(classifier, images, batch_size, show_progress=False)
        row = {
            "label": dataset.labels[index[part]],
            "features": features,
            **({"probabilities": probabilities} if len(dataset.classes) > 1 else {}),
            "profile": physics.radial_profile(images),
            "spectrum": physics.power_spectrum(images),
            "thumbnail": thumbnails_of(images),
            **physics.describe(images, pixel_scale),
        }
        if (real or dataset).keeps_flux:
            row |= physics.describe_flux(images, low, high)
        if recipe and recipe.lens_equation and not dataset.observer:
            row |= _lens_equation(images)
        if inception is not None:
            device = next(inception.parameters()).device
            rgb = images if images.shape[1] == 3 else images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
            row["inception"] = inception((255 * rgb).byte().to(device)).cpu()
        bar.update()
        return row

    with bar:
        return _in_parts(measure_part, len(index), batch_size)


def _lens_equation(images: Tensor) -> Measured:
    from metrics.lens_equation import fit_smooth_lens, fits  # here: lenstronomy is slow to import

    xy, residual = fit_smooth_lens(images)
    power = physics.band_power(physics.power_spectrum(residual))
    return {
        "source_xy": xy,
        "explained": fits(images, residual),
        "lens_residual": residual.square().mean((1, 2, 3)).sqrt(),
        **{f"residual_{band}": of_band.sqrt() for band, of_band in power.items()},
    }


def _in_parts(work: Callable[[Tensor], Measured], n: int, batch_size: int) -> Measured:
    """Results of ``work`` on batches of 0, 1, ... n - 1, as rows 0 to n - 1; processes share the work and get all."""
    found: Measured = {}

    def fill(part: Tensor) -> None:
        for name, values in work(part).items():
            if name not in found:  # one tensor for all batches: many small ones would keep the memory around them
                found[name] = values.new_zeros(n, *values.shape[1:])
            found[name][part] = values

    distributed.spread(fill, torch.arange(n).split(batch_size))
    shares = [share for share in distributed.gather(found) if share]  # each is zero where the others have worked
    return {name: functools.reduce(torch.add, [share[name] for share in shares]) for name in shares[0]}


def measure_cached(
    name: str, dataset: NpyDataset, index: Tensor, classifier: nn.Module, inception: nn.Module | None, batch_size: int
) -> Measured:
    """``measure``, kept in the dataset's cache under a name until its files, ``index`` or a network change."""
    how = dataset.keeps_flux, scale_of(dataset), recipe_behind(dataset), dataset.observer
    state = hashlib.sha256(repr((_VERSION, dataset.fingerprint, dataset.classes, how, index.tolist())).encode())
    for network in filter(None, (classifier, inception)):
        for weights in network.state_dict().values():
            state.update(weights.cpu().numpy().tobytes())
    name = f"observed_{name}" if dataset.observer else name  # those with and without a telescope are both kept
    path = dataset.cache_dir / f".lens_measured_{name}_{state.hexdigest()[:16]}.pt"
    try:
        measured = torch.load(path, weights_only=True)
    except Exception:  # absent, or cut short by a full disk: measure
        measured = None
    if all(distributed.gather(measured is not None)):
        return measured
    measured = measure(dataset, index, classifier, inception, batch_size)
    if not distributed.is_main():
        return measured
    packed = io.BytesIO()
    torch.save(measured, packed)
    try:
        with whole(path) as file:
            file.write(packed.getbuffer())
        for old in path.parent.glob(f".lens_measured_{name}_*.pt"):
            if old != path:
                old.unlink(missing_ok=True)
    except OSError as error:
        print(f"{path} cannot be written ({error}): the images will be measured again next time")
    return measured


def thumbnails_of(images: Tensor) -> Tensor:
    """Images (n, c, s, s) averaged down to 32 to 63 pixels on a side, (n, numbers); those of fewer stay as they are."""
    return F.avg_pool2d(images, max(1, images.shape[-1] // _THUMBNAIL)).flatten(1)


def thumbnails(dataset: NpyDataset, batch_size: int = 1024) -> Tensor:
    """Thumbnails of every image of a dataset."""
    return torch.cat([thumbnails_of(dataset.read(part)) for part in torch.arange(len(dataset)).split(batch_size)])


def find_nearest(measured: Measured, training: Tensor) -> None:
    """Adds to a measurement the distance (RMS over peak) to the nearest training thumbnail, and the index of it."""
    thumbnail = measured["thumbnail"]

    def nearest(part: Tensor) -> Measured:
        distance, neighbour = torch.cdist(thumbnail[part], training).min(1)
        return {"train_distance": distance / training.shape[1] ** 0.5, "train_neighbour": neighbour}

    measured |= _in_parts(nearest, len(thumbnail), 256)


def select(measured: Measured, index: Tensor) -> Measured:
    """Some images of a measurement."""
    return {name: values[index] for name, values in measured.items()}


def masks(labels: Tensor, classes: Sequence[str]) -> dict[str, Tensor]:
    """Membership of the images in each subset, (n,) bool."""
    return {"overall": labels >= 0} | {name: labels == label for label, name in enumerate(classes)}


def fewest(dataset: NpyDataset) -> int:
    """Number of images of the class that has the fewest."""
    return min(dataset.counts().values())
