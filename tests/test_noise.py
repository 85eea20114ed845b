"""Noise is told from light, and the noise of generated images has the distribution that it was learned from."""

import pytest
import torch
import torch.nn.functional as F
from test_model import LENSES

from dataset import diffusion_transforms, normalize
from models.components import ComponentMLP, PrincipalComponents, _light
from models.generator import Generator

SIZE, SKY = 24, 0.05


def smooth_images(n: int, seed: int = 0, channels: int = 1) -> torch.Tensor:
    """Blobs of light, one an image, at random places, with a peak of 1: (n, c, s, s)."""
    generator = torch.Generator().manual_seed(seed)
    place = (torch.rand(2, n, 1, 1, generator=generator) - 0.5) * 6
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.exp(-((x - place[0]).square() + (y - place[1]).square()) / 30)[:, None].repeat(1, channels, 1, 1)


def noise_of(kind: str, light: torch.Tensor, seed: int) -> torch.Tensor:
    """Light as a detector sees it; the noise levels of the images differ by a factor of two."""
    generator = torch.Generator().manual_seed(seed)
    level = SKY * (0.7 + 0.7 * torch.rand(len(light), 1, 1, 1, generator=generator))
    white = torch.randn(light.shape, generator=generator)
    if kind == "clipped":
        return (light + level * white).clamp_min(0)
    if kind == "shot":
        return torch.poisson(light / level**2 / 10 + 2, generator=generator)
    blurred = F.conv2d(white, torch.ones(1, 1, 2, 2) / 2, padding=1)[..., :SIZE, :SIZE]
    return light + level * blurred


def autocorrelation(images: torch.Tensor) -> float:
    """Correlation of neighbours in a row, in the sky far from the light."""
    sky = images[:, 0, :4] - images[:, 0, :4].mean(2, keepdim=True)
    return ((sky[..., 1:] * sky[..., :-1]).mean() / sky.square().mean()).item()


@pytest.fixture(scope="module", params=["clipped", "shot", "correlated"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def codec_and_images(kind):
    images = normalize(noise_of(kind, smooth_images(3000), seed=1))
    torch.manual_seed(1)  # components of little light depend on what torch.pca_lowrank draws
    codec = PrincipalComponents.fitted(2 * images[:2000] - 1, 16)
    return codec, images[2000:]


def test_noise_of_generated_images_is_that_of_others_of_the_same_kind(codec_and_images, kind):
    codec, images = codec_and_images
    assert codec.config == {"noisy": True}
    again = codec.decode(codec.encode(2 * images - 1), torch.randn(images.shape))
    assert not torch.allclose(again, images, atol=0.05)
    assert again.mean() == pytest.approx(images.mean().item(), abs=0.01)
    sky, sky_again = images[:, :, :4], again[:, :, :4]
    assert sky_again.std() == pytest.approx(sky.std().item(), rel=0.06)
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95, 0.999])
    expected = sky.flatten().quantile(quantiles)
    torch.testing.assert_close(sky_again.flatten().quantile(quantiles), expected, atol=0.012, rtol=0.05)
    assert autocorrelation(again) == pytest.approx(autocorrelation(images), abs=0.06)
    if kind == "clipped":
        assert (sky_again == 0).float().mean() == pytest.approx((sky == 0).float().mean().item(), abs=0.06)
    bright = images > 0.7
    assert (again[bright] - images[bright]).std() < 2.5 * (images[bright]).std()


@pytest.mark.parametrize(("deviation", "noisy"), [(0.0, False), (0.0006, True), (0.003, True)])
def test_the_faint_noise_of_a_telescope_is_found_and_clean_light_has_none(deviation, noisy):
    """Noise is found from the level of Hubble on, 0.06% of the peak; components hold some of it, but not the sky's."""
    light = smooth_images(1500)
    light = light + deviation * torch.randn(light.shape, generator=torch.Generator().manual_seed(0))
    assert PrincipalComponents.fitted(2 * normalize(light) - 1, 48).config == ({"noisy": True} if noisy else {})


@pytest.mark.parametrize("kind", ["clipped", "correlated"])
def test_the_noise_level_of_an_image_is_a_coefficient(kind):
    light = smooth_images(2000)
    images = normalize(noise_of(kind, light, seed=1))
    codec = PrincipalComponents.fitted(2 * images - 1, 16)
    coefficients = codec.encode(2 * images - 1)
    size = codec.vectors.shape[1]
    assert coefficients.shape[1] == len(codec.standard_deviation) == size + 3
    torch.testing.assert_close(coefficients[:, size:].std(0), codec.standard_deviation[size:], rtol=0.01, atol=0)
    quiet, loud = (
        coefficients[:64].index_fill(1, torch.tensor(size), at * codec.standard_deviation[-1]) for at in (-1, 1)
    )
    white = torch.randn(64, 1, SIZE, SIZE)
    ratio = codec.decode(loud, white)[:, :, :4].std() / codec.decode(quiet, white)[:, :, :4].std()
    assert ratio == pytest.approx((2 * codec.noisiness[1, 0]).exp().item(), rel=0.25)


def test_noise_within_the_components_does_not_come_twice(codec_and_images):
    codec, images = codec_and_images
    coefficients = codec.encode(2 * images - 1)
    white = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    again = codec.encode(2 * codec.decode(coefficients, white) - 1)
    error = (again - coefficients)[:, :-3].std(0) / coefficients[:, :-3].std(0)
    assert error[:2].max() < 0.1
    assert error.max() < 0.5  # twice the noise would be about 1 in the last ones


@pytest.mark.parametrize(("size", "most"), [(16, 1.3), (100, 1.4)])
def test_components_are_not_fitted_to_the_noise_of_their_images(size, most):
    """Components have about the same variance over other images as over those they were fitted to."""
    images = 2 * normalize(noise_of("clipped", smooth_images(500), seed=1)) - 1
    codec = PrincipalComponents.fitted(images[:250], size)
    fitted, other = (codec.encode(part)[:, :-3].var(0) for part in images.split(250))
    assert (fitted / other).median() < most
    assert (fitted / other).max() < 3
    plain = torch.pca_lowrank(_light(images[:250]) - codec.mean, 16, center=False)[2]
    fitted, other = (((_light(part) - codec.mean) @ plain).var(0) for part in images.split(250))
    assert (fitted / other).median() > 1.6


@pytest.mark.parametrize("channels", [1, 3])
def test_clean_images_are_not_taken_for_noisy_ones(channels):
    images = 2 * smooth_images(600, channels=channels) - 1
    assert PrincipalComponents.fitted(images, 32).config == {}
    assert PrincipalComponents.fitted(images, 4).config == {}  # what so few components leave over is not noise


def test_every_channel_has_noise_of_its_own():
    light = smooth_images(1500, channels=3)
    images = light + torch.tensor([0.02, 0.05, 0.1])[:, None, None] * torch.randn(light.shape)
    images = normalize(images)
    codec = PrincipalComponents.fitted(2 * images - 1, 16)
    again = codec.decode(codec.encode(2 * images - 1), torch.randn(images.shape))
    of_channel = again[:, :, :4].std((0, 2, 3))
    torch.testing.assert_close(of_channel, images[:, :, :4].std((0, 2, 3)), rtol=0.08, atol=0)


def test_a_noisy_image_depends_on_seed_and_number_alone():
    images = diffusion_transforms(noise_of("clipped", smooth_images(300), seed=1))
    codec = PrincipalComponents.fitted(images, 8)
    network = ComponentMLP(len(codec.standard_deviation), hidden_size=16).eval()
    network.standard_deviation.copy_(codec.standard_deviation)
    model = Generator(network, LENSES, (1, SIZE, SIZE), "image", codec).eval()
    labels = torch.tensor([0, 1, 2, 0, 1])
    images = model.generate(labels, seed=3, batch_size=5)
    torch.testing.assert_close(model.generate(labels, seed=3, batch_size=2), images)
    torch.testing.assert_close(model.generate(labels[2:], seed=3, first=2), images[2:])
    assert not torch.allclose(model.generate(labels, seed=4), images, atol=0.1)
    assert (images[0] - images[3]).std() > 0.02


def test_the_brightest_pixel_is_a_coefficient_too(codec_and_images):
    """Without it, an image could be brighter than real ones because its noise is scaled by another peak."""
    codec, images = codec_and_images
    coefficients = codec.encode(2 * images - 1)
    light = _light(2 * images - 1)
    deviation = codec.standard_deviation[-1]
    expected = (light.amax(1).log() - codec.noisiness[0, 2]) / codec.noisiness[1, 2] * deviation
    torch.testing.assert_close(coefficients[:, -1], expected)
    again = codec.decode(coefficients, torch.randn(images.shape))
    ratio = _light(2 * again - 1).amax(1) / light.amax(1)
    assert (ratio - 1).abs().mean() < 0.01
    assert again.mean() == pytest.approx(images.mean().item(), rel=0.01)


@pytest.mark.parametrize("count", [2, 60])
def test_few_small_images_have_noise_too(count):
    images = normalize(torch.rand(count, 1, 8, 8))
    codec = PrincipalComponents.fitted(2 * images - 1, 512)
    white = [torch.randn(images.shape)] if codec.noise else []
    assert codec.decode(codec.encode(2 * images - 1), *white).isfinite().all()


def test_noise_levels_and_peaks_that_no_image_has_spoil_none(codec_and_images):
    codec, images = codec_and_images
    coefficients = codec.encode(2 * images[:4] - 1)
    white = torch.randn(images[:4].shape, generator=torch.Generator().manual_seed(0))
    unit = codec.standard_deviation[-3:]
    for far in ([-8.4, -4.8, 9.1], [9.0, 9.0, 30.0]):
        coefficients[:, -3:] = torch.tensor(far) * unit
        spoiled = codec.decode(coefficients, white)
        coefficients[:, -3:] = torch.tensor(far).clamp(-5.0001, 5.0001) * unit  # 5 is not reached after rounding
        assert torch.equal(spoiled, codec.decode(coefficients, white))


@pytest.mark.parametrize("size", [100, 300, 1000])
def test_as_many_components_as_pixels_leave_noise_to_be_learned(size, kind):
    """Noisy images get at most one component for four pixels, to leave noise; clean ones may get one for each pixel."""
    light = smooth_images(1200)
    codec = PrincipalComponents.fitted(2 * normalize(noise_of(kind, light, seed=1)) - 1, size)
    assert codec.config == {"noisy": True}
    assert 8 <= codec.vectors.shape[1] <= min(size, SIZE**2 // 4)
    clean = PrincipalComponents.fitted(2 * normalize(light) - 1, size)
    assert clean.config == {}
    assert clean.vectors.shape == (SIZE**2, min(size, SIZE**2))
