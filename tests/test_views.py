"""A classifier is shown images in all their views, and others that are altered as their kind says."""

import math

import pytest
import torch

from models.flow import generator_of
from simulate.instrument import INSTRUMENTS, Observation, Observer
from train.views import KINDS, Views, shifted


def rings(n=64, size=32, radius=7.0, width=1.5):
    """Rings with a bright knot on the right, the same in each image."""
    axis = torch.arange(float(size)) - (size - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    r, angle = torch.hypot(x, y), torch.atan2(y, x)
    ring = torch.exp(-((r - radius) ** 2) / (2 * width**2)) * (0.4 + 0.6 * torch.exp(-(angle**2)))
    return (ring / ring.max()).expand(n, 1, size, size).clone()


def views(**changes):
    plain = {"observer": None, "depths": (1.0, 1.0), "clean": 0.0, "symmetry": "none", "shift": 0, "unlike": 0.0}
    return Views(**plain | changes)


OBSERVER = Observer(Observation(INSTRUMENTS["euclid"], 0.101, 0.16), 2.0)


def test_without_any_view_images_are_left_as_they_are():
    images = rings()
    shown, kinds = views().shown(images, generator_of(0, 0))
    assert torch.equal(shown, images)
    assert not kinds.any()
    assert torch.equal(views().of_all(images, 0), images)


def test_images_are_moved_by_whole_pixels_to_every_place():
    images = torch.zeros(400, 2, 9, 9)
    images[:, :, 4, 4] = 1
    moved = shifted(images, 1, generator_of(0, 0))
    places = moved[:, 1].flatten(1).argmax(1)
    assert set(places.tolist()) == {9 * y + x for y in (3, 4, 5) for x in (3, 4, 5)}
    assert torch.equal(moved[:, 0], moved[:, 1])
    assert moved.sum((1, 2, 3)).eq(2).all()
    edge = torch.zeros(50, 1, 5, 5)
    edge[..., 0] = 1  # is repeated
    assert shifted(edge, 2, generator_of(0, 0))[..., 0].sum((1, 2)).unique().tolist() == [0, 5]


def noise_of(shown, images):
    return (shown - images)[:, 0, :5, :5].flatten(1).std(1)


def test_depths_are_spread_over_their_range_and_some_images_are_clean():
    images = rings(600)
    seen = views(observer=OBSERVER, depths=(1.0, 1e4), clean=0.25).of_all(images, 0)
    noise = noise_of(seen, images)
    clean = noise < 1e-7
    assert clean.double().mean().item() == pytest.approx(0.25, abs=0.06)
    depth = (0.00587 / 2 / noise[~clean]).square().log10()
    assert depth.min() > -0.5
    assert depth.max() < 4.5
    assert depth.median().item() == pytest.approx(2, abs=0.3)
    seen = views(observer=OBSERVER, depths=(1.0, 1e4), clean=0.25).of_all(images, 0, depth=4.0)
    depth = (0.00587 / 2 / noise_of(seen, images)).square()
    assert depth.median().item() == pytest.approx(4, rel=0.1)
    assert depth.quantile(0.05) > 1


def test_each_kind_is_made_as_it_is_called():
    images = rings(800)
    made, kinds = views(observer=OBSERVER, depths=(100.0, 100.0), symmetry="half_turn").made_unlike(
        images, generator_of(0, 0)
    )
    assert set(kinds.tolist()) == set(range(1, len(KINDS)))
    of = {name: made[kinds == number] for number, name in enumerate(KINDS)}
    as_usual = 0.00587 / 2 / 10
    assert noise_of(of["noisier"], images[:1]).min() > 1.2 * as_usual
    assert noise_of(of["turned or mirrored"], images[:1]).median() < 1.1 * as_usual

    axis = torch.arange(32.0) - 15.5
    r = torch.hypot(axis[:, None], axis)

    def mean_radius(x):
        light = x[:, 0].clamp_min(0.05) - 0.05
        return (light * r).sum((1, 2)) / light.sum((1, 2))

    scale = mean_radius(of["another scale"]) / mean_radius(images[:1])
    assert ((scale < 0.9) | (scale > 1.1)).all()
    assert (scale < 0.9).any()
    assert (scale > 1.1).any()

    def steepness(x):
        x = x / x.amax((1, 2, 3), keepdim=True)
        return x.diff(dim=-1).abs().amax((1, 2, 3))

    ratio = steepness(of["another sharpness"]) / steepness(images[:1])
    assert (ratio < 0.97).any()
    assert (ratio > 1.03).any()
    knot = of["turned or mirrored"][:, 0].flatten(1).argmax(1)
    left_or_right = (knot % 32 - 15.5).abs() > (knot // 32 - 15.5).abs()
    assert left_or_right.any()  # mirrored; the knot alone cannot tell this from half a turn
    assert (~left_or_right).any()  # a quarter turn
    torn = of["no such lens"]
    assert (torn.flatten(1).sort().values - images[0].flatten().sort().values).abs().max() < 0.02  # the same pixels
    assert ((torn - images[:1]).abs().amax((1, 2, 3)) > 0.2).all()


def test_what_cannot_be_unlike_is_not_said_to_be():
    _, kinds = views(symmetry="square").made_unlike(rings(300), generator_of(0, 0))
    named = {KINDS[kind] for kind in kinds.tolist()}
    assert named == {"another scale", "another sharpness", "no such lens"}


def test_a_share_is_shown_behind_the_others():
    images = rings(40)
    shown, kinds = views(unlike=0.25).shown(images, generator_of(0, 0))
    assert shown.shape == (50, 1, 32, 32)
    assert torch.equal(shown[:40], images)
    assert not kinds[:40].any()
    assert (kinds[40:] > 0).all()


def test_views_follow_from_the_random_stream_alone():
    look = views(observer=OBSERVER, depths=(0.25, 1e4), clean=0.2, symmetry="square", shift=2, unlike=0.25)
    images = rings(16)
    first, again, other = (look.shown(images, generator_of(0, step))[0] for step in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert math.isfinite(first.sum())
