"""Objects beside the lens displace light where they are: by a closed-form deflection, times gradients of the image."""

import math

import numpy as np
import pytest
import torch
from test_parameters import parameter

from models.checkpoint import load_checkpoint, save_checkpoint
from models.components import Displacement
from models.generator import build_generator, build_untrained, load_model
from parameters import objects, placed

NAN = math.nan
NAMES = ("x", "halo_mass_1", "halo_x_1", "halo_y_1", "halo_mass_2", "halo_x_2", "halo_y_2")
KNOWN = tuple(parameter(name=name, low=0.0, high=1.0, classes=("a", "b")) for name in NAMES)
SHAPE = (2, 8, 10)


def displacement(shape=SHAPE):
    """A displacement by two objects, with random weights."""
    torch.manual_seed(0)
    module = Displacement([[1, 2, 3], [4, 5, 6]], 7, shape, 6)
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(torch.rand_like(value))
        module.scale.copy_(torch.tensor([0.2, 0.3]))
        module.centre.copy_(torch.tensor([0.05, -0.1]))
        module.log_widths.copy_(torch.linspace(-2, 0, len(module.log_widths)))
    return module


def test_those_with_a_place_and_something_more_are_placed_and_the_others_are_not():
    def of(*names):
        return [[names[i] for i in one] for one in placed([parameter(name=name) for name in names])]

    found = of("source_x", "halo_y_1", "halo_mass_1", "halo_x_1", "halo_z_1", "mass_total")
    assert found == [["halo_mass_1", "halo_z_1", "halo_x_1", "halo_y_1"]]
    both = ("a_mass_1", "a_x_1", "a_y_1", "b_mass_1", "b_x_1", "b_y_1", "b_mass_2", "b_x_2", "b_y_2")
    assert of(*both) == [list(both[3:6]), list(both[6:])]  # the kind of which there are most
    assert of("x", "y", "mass", "halo_x_1", "halo_y_1", "clump_mass_1", "clump_x_1") == []


def test_the_change_is_that_of_a_series_to_second_order():
    """Against NumPy, with one component for each pixel."""
    module = displacement()
    given = torch.tensor([[0.4, 0.2, -0.3, 0.5, -0.1, 0.6, -0.7]])

    def features(phase):
        angles = phase * 2.0 ** torch.arange(5)
        return torch.cat([angles.sin(), angles.cos(), torch.zeros(1)])

    with torch.no_grad():
        found = module(given, torch.eye(math.prod(SHAPE)))[0].view(SHAPE)
        along_x, along_y = module.gradients(features(0.4)).view(2, *SHAPE).numpy()
        xx, xy, yy = module.curvatures(features(0.4)).view(3, *SHAPE).numpy()
        weights = [module.weights(features(mass)).numpy() for mass in (0.2, -0.1)]
    widths = module.log_widths.detach().exp().numpy()
    x = 0.2 * (np.arange(10) - 4.5) + 0.05
    y = 0.3 * (np.arange(8) - 3.5) - 0.1
    along = np.zeros((2, 8, 10))
    for of_object, (at_x, at_y) in zip(weights, ((-0.3, 0.5), (0.6, -0.7)), strict=True):
        for weight, width in zip(of_object, widths, strict=True):
            dx, dy = (x[None, :] - at_x) / width, (y[:, None] - at_y) / width
            pull = weight / width * np.exp(-(dx**2 + dy**2) / 2)
            along += pull * dx, pull * dy
    expected = along[0] * along_x + along[1] * along_y + along[0] ** 2 * xx + along[0] * along[1] * xy
    expected += along[1] ** 2 * yy
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_deflections_begin_as_those_of_point_masses_and_change_nothing():
    module = Displacement([[1, 2, 3]], 4, (1, 65, 65), 6)
    module.initialize()
    place = torch.tensor([[[0.3, 0.0, 0.0]]])
    with torch.no_grad():
        x, y = (of[0].numpy() for of in module.deflections(place, torch.ones(1, 1, dtype=torch.bool)))
        assert torch.equal(module(torch.rand(2, 4), torch.ones(65 * 65, 3)), torch.zeros(2, 3))
    row = x[32]
    np.testing.assert_allclose(row, -row[::-1], atol=1e-6)
    np.testing.assert_allclose(row, y[:, 32], atol=1e-6)
    inverse = row[34:60] * np.arange(2, 28)  # constant where it falls as 1/r
    assert inverse.max() / inverse.min() < 1.2
    assert row[40] > 0


@pytest.mark.parametrize("missing", [[1], [2], [3], [1, 2, 3]])
def test_an_object_of_which_anything_is_unknown_displaces_nothing(missing):
    module = displacement()
    vectors = torch.rand(math.prod(SHAPE), 4)
    given = torch.rand(3, 7)
    alone = given.clone()
    alone[:, [1, 2, 3]] = NAN
    given[1:, missing] = NAN
    with torch.no_grad():
        found, of_other = module(given, vectors), module(alone, vectors)
        nothing = module(torch.full((2, 7), NAN), vectors)
    assert torch.equal(nothing, torch.zeros(2, 4))
    torch.testing.assert_close(found[1:], of_other[1:])
    assert (found[0] - of_other[0]).abs().max() > 0.1


def told(size="ComponentMLP-512", parameters=KNOWN, **changes):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "depth": 1} | ({"components": 12} if "MLP" in size else {"num_heads": 2})
    model = build_untrained(size, ("a", "b"), (1, 16, 16), parameters, **small, **changes)
    with torch.no_grad():
        if model.codec is not None:
            torch.nn.init.normal_(model.codec.vectors, std=0.1)
            model.network.adapt_to(model.codec)
        for value in (value for value in model.network.parameters() if value.requires_grad):
            value.add_(0.1 * torch.randn_like(value))
    return model.eval()


def test_what_is_displaced_is_added_to_what_the_blocks_predict_of_the_rest():
    model = told()
    z, t, labels, phases = torch.randn(5, 12), torch.rand(5), torch.zeros(5, dtype=torch.long), torch.rand(5, 7)
    network = model.network
    with torch.no_grad():
        together = network(z, t, model.condition(labels, phases))
        displaced = network.displacement(phases, network.vectors)
        assert displaced.abs().max() > 1e-3
        network.vectors.zero_()  # nothing is displaced, but the blocks are told the same
        rest = network(z - (1 - t)[:, None] * displaced, t, model.condition(labels, phases))
    torch.testing.assert_close(together, rest + displaced)


def test_objects_that_change_places_draw_the_same_and_images_without_any_are_as_before():
    model = told()
    phases = torch.rand(4, 7)
    exchanged = phases[:, [0, 4, 5, 6, 1, 2, 3]]
    labels = torch.zeros(4, dtype=torch.long)
    images = model.generate(labels, phases=phases)
    torch.testing.assert_close(model.generate(labels, phases=exchanged), images, atol=1e-4, rtol=0)
    without = phases.clone()
    without[1::2, 1:] = NAN
    mixed = model.generate(labels, phases=without)
    torch.testing.assert_close(mixed[::2], images[::2], atol=1e-4, rtol=0)
    assert (mixed[1::2] - images[1::2]).abs().max() > 1e-2


def test_vectors_are_those_of_the_codec_and_travel(tmp_path):
    model = told()
    assert torch.equal(model.network.vectors, model.codec.vectors)
    assert "vectors" not in model.network.state_dict()  # a file holds them only once
    path = tmp_path / "model.pt"
    state = {"model_state_dict": model.network.state_dict(), "codec_state_dict": model.codec.state_dict()}
    save_checkpoint(path, **state, **model.description(), sampler={})
    again = load_model(path, "cpu")
    labels, phases = torch.tensor([0, 1]), torch.rand(2, 7)
    assert torch.equal(again.generate(labels, model.sampler, phases=phases), model.generate(labels, phases=phases))
    noisy = told(noisy=True)  # three coefficients more, which nothing displaces
    assert torch.equal(noisy.network.vectors[:, :9], noisy.codec.vectors)
    assert not noisy.network.vectors[:, 9:].any()


def test_generators_from_before_displace_nothing(tmp_path):
    old = told(objects=objects(KNOWN))
    assert old.network.displacement is None
    path = tmp_path / "old.pt"
    state = {"model_state_dict": old.network.state_dict(), "codec_state_dict": old.codec.state_dict()}
    save_checkpoint(path, **state, **old.description(), sampler={})
    assert build_generator(load_checkpoint(path), path).network.displacement is None
    assert not hasattr(told("NanoDiT-S/8").network, "displacement")


def test_a_network_that_learns_parameters_draws_as_before_at_first():
    plain = told(parameters=())
    taught = plain.with_parameters(KNOWN)
    assert torch.equal(taught.network.vectors, plain.codec.vectors)
    labels = torch.tensor([0, 1])
    torch.testing.assert_close(taught.generate(labels, phases=torch.rand(2, 7)), plain.generate(labels))
