"""Telescopes: the blur and the noise that they add to the light of a lens.

The noise is that of lenstronomy (Birrer & Amara 2018, arXiv:1803.09746), which gives its two standard deviations, of
the sky and of shot noise. Images keep their pixels: the noise is computed for their area, not for the instrument's own.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dataset import NpyDataset, normalize
from settings import InputError
from simulate.recipes import recipe_behind, scale_of

_DEVIATION = 1 / math.sqrt(8 * math.log(2))  # standard deviation of a Gaussian over its full width at half maximum


@dataclass(frozen=True)
class Instrument:
    """A telescope, its camera and how long it looks."""

    exposures: int
    seconds: float  # of an exposure
    sky: float  # magnitudes per square arcsec
    zero_point: float  # magnitude of 1 electron per second
    read_noise: float  # electrons, in each exposure
    psf_fwhm: float  # arcsec; the point spread function is a Gaussian
    pixel_scale: float  # arcsec
    gain: float = 1.0  # electrons a count


INSTRUMENTS = {
    # Euclid VIS over 6 years as in lenstronomy 1.9.2, with which the images of DeepLense were made
    "euclid": Instrument(4, 565, 22.35, 24.0, 4.2, 0.16, 0.101),
    # The same as measured in flight, in lenstronomy 1.14.2: more light, half of the noise
    "euclid_in_flight": Instrument(4, 566, 22.3, 25.72, 4.2, 0.16, 0.101),
    # Hubble's WFC3 with the filter F160W, two orbits
    "hst": Instrument(1, 5400, 22.3, 25.96, 4.0, 0.08, 0.08),
}


@dataclass(frozen=True)
class Observation:
    """What an instrument makes of noise-free images.

    Args:
        instrument: which one.
        pixel_scale: of the images, in arcsec.
        image_fwhm: full width at half maximum of the point spread function that the images have already, in arcsec.
    """

    instrument: Instrument
    pixel_scale: float
    image_fwhm: float = 0.0

    @cached_property
    def sky_noise(self) -> float:
        """Standard deviation of sky and read noise, in counts per second a pixel."""
        return float(self._band.background_noise)

    @cached_property
    def shot_noise(self) -> float:
        """Standard deviation of the shot noise of 1 count per second; it grows as the square root of the light."""
        return float(self._band.flux_noise(1.0))

    @cached_property
    def blur(self) -> float:
        """Standard deviation, in pixels, of the Gaussian blur that images still lack; 0 if they are blurred enough."""
        missing = self.instrument.psf_fwhm**2 - self.image_fwhm**2
        return math.sqrt(max(0.0, missing)) * _DEVIATION / self.pixel_scale

    @property
    def _band(self):
        from lenstronomy.SimulationAPI.observation_api import SingleBand  # here: lenstronomy is slow to import

        telescope = self.instrument
        return SingleBand(
            pixel_scale=self.pixel_scale,
            exposure_time=telescope.seconds,
            num_exposures=telescope.exposures,
            magnitude_zero_point=telescope.zero_point,
            sky_brightness=telescope.sky,
            read_noise=telescope.read_noise,
            ccd_gain=telescope.gain,
            data_count_unit="ADU",
        )

    def __call__(self, light: Tensor, noise: Tensor, depth: Tensor | float = 1.0) -> Tensor:
        """Observed images.

        Args:
            light: noise-free images (n, c, h, w), in counts per second.
            noise: standard normal numbers of the same shape, see ``seeded_noise``.
            depth: exposure time over that of the instrument, (n,) or one for all.
        """
        if self.blur > 0.1:  # a smaller blur shows in no pixel
            from torchvision.transforms.v2.functional import gaussian_blur  # here: slow to import, too

            width = 2 * math.ceil(4 * self.blur) + 1
            light = gaussian_blur(light, [width, width], [self.blur, self.blur])
        variance = self.sky_noise**2 + self.shot_noise**2 * light.clamp_min(0)
        depth = torch.as_tensor(depth, dtype=light.dtype, device=light.device).view(-1, 1, 1, 1)
        return light + (variance / depth).sqrt() * noise


def seeded_noise(seed: int, numbers: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise (n, *shape), which depends on the seed and the numbers of the images, (n,) int64, alone."""
    streams = (np.random.default_rng([seed, number]) for number in numbers.tolist())
    return torch.from_numpy(np.stack([stream.standard_normal(shape, np.float32) for stream in streams]))


@dataclass(frozen=True)
class Observer:
    """An observation of the images of a dataset, see ``NpyDataset.observed``.

    Args:
        observation: what is done to light.
        peak: counts per second of the brightest pixel, the same in all images; None for images that keep their flux.
        unit: counts per second of one unit of the files.
        seed: of the noise; sets of images that are compared with each other need different ones.
    """

    observation: Observation
    peak: float | None
    unit: float = 1.0
    seed: int = 0

    def __call__(
        self,
        images: Tensor,
        low: Tensor,
        high: Tensor,
        numbers: Tensor | None = None,
        random: torch.Generator | None = None,
        depth: Tensor | float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Observes images (n, c, h, w), each of which fills [0, 1], of minima and maxima (n,) in the unit of the files.

        The noise depends on the ``numbers`` of the images, (n,), and ``seed``, or is drawn from ``random``.

        Returns:
            Images that fill [0, 1] again, and their minima and maxima in counts per second.
        """
        brightness = self.unit * (high - low) if self.peak is None else torch.full_like(high, self.peak)
        light = images * brightness.to(images).view(-1, 1, 1, 1)
        if random is None:
            noise = seeded_noise(self.seed, numbers, images.shape[1:])
        else:
            noise = torch.randn(images.shape, generator=random, device=random.device)
        seen = self.observation(light, noise.to(images.device), depth)
        low, high = seen.amin((1, 2, 3)), seen.amax((1, 2, 3))
        return normalize(seen), low.double(), high.double()


def observer_of(dataset: NpyDataset, name: str, peak: float | None = None, seed: int = 0) -> Observer:
    """The observer that sees images like those of a dataset through the instrument of a name.

    Args:
        peak: counts per second of the brightest pixel of each image. None takes the brightness of each image in its
            file, or, if images keep no flux, the median brightness for all.

    Raises:
        InputError: for images that have the noise of a telescope already, or are too small for its blur.
    """
    instrument, recipe = INSTRUMENTS[name], recipe_behind(dataset)
    if recipe and recipe.noise:
        raise InputError(f"{dataset.root_dir}: its images have the noise of a telescope already", 2)
    unit = 10 ** (0.4 * (instrument.zero_point - recipe.zero_point)) / recipe.times if recipe else 1.0
    if peak is None and not dataset.keeps_flux:
        peak = unit * float(np.median(dataset.high - dataset.low))
    scale, length = scale_of(dataset)
    pixel_scale = scale if length == "arcsec" else instrument.pixel_scale
    observation = Observation(instrument, pixel_scale, recipe.psf_fwhm if recipe else 0.0)
    if 4 * observation.blur >= dataset.image_shape[-1]:
        raise InputError(f"{name} would blur these images by {observation.blur:.0f} pixels, as wide as they are", 2)
    return Observer(observation, peak, unit, seed)


def observers_of(
    dataset: NpyDataset, name: str | None, peak: float | None, seed: int, count: int
) -> list[Observer | None]:
    """``observer_of`` for several sets of images, each with noise of its own; prints what the instrument does to them.

    Without the name of an instrument, each observer is None.
    """
    if name is None:
        return [None] * count
    observers = [observer_of(dataset, name, peak, count * seed + number) for number in range(count)]
    print(description(name, dataset, observers[0]))
    return observers


def description(name: str, dataset: NpyDataset, observer: Observer) -> str:
    """What an instrument does to images, in a sentence."""
    seen, bright = observer.observation, observer.peak or observer.unit * float(np.median(dataset.high - dataset.low))
    noise = math.hypot(seen.sky_noise, seen.shot_noise * math.sqrt(bright)) / bright
    taken = f"; taken for sharp light in counts per second, {seen.pixel_scale:g} arcsec a pixel: no recipe is known"
    return (
        f"As {name} sees them: {bright:.3g} counts per second in the brightest pixel, noise of "
        f"{seen.sky_noise / bright:.2%} of that in the sky and {noise:.2%} there, blurred by {seen.blur:.2g} pixels"
        f"{'' if recipe_behind(dataset) else taken}"
    )
