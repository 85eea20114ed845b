"""Parameters that nobody asks for are those of a training lens, and fit those that are asked for."""

import math

import numpy as np
import pytest
import torch
from conftest import run_script
from test_condition import KNOWN, MODELS, NAMES
from test_parameters import parameter

from models.checkpoint import save_checkpoint
from models.generator import load_model
from models.population import Population
from settings import InputError

NAN = math.nan
LINEAR = parameter(name="a"), parameter(name="b"), parameter(name="c")


def normal(n, *columns, seed=0):
    """Columns of independent normal numbers, with these standard deviations."""
    return torch.randn(n, len(columns), generator=torch.Generator().manual_seed(seed)) * torch.tensor(columns)


def test_all_that_is_free_is_of_one_training_lens_of_the_class():
    phases = torch.arange(60.0).view(20, 3) * 10
    phases[:, 2] = NAN
    labels = torch.arange(20) % 2
    population = Population.of(labels, phases, LINEAR)
    wanted = torch.tensor([0, 1, 1, 0] * 500)
    found = population.fill(wanted, None, seed=3)
    assert found[:, 2].isnan().all()  # no lens has it
    lens = (found[:, 0] / 30).round().long()
    assert torch.equal(lens % 2, wanted)
    assert torch.bincount(lens).min() > 60  # of 100
    moved = found[:, :2] - phases[lens, :2]
    assert moved.std(0).tolist() == pytest.approx([0.025, 0.025], rel=0.1)
    assert abs(np.corrcoef(moved.T)[0, 1]) < 0.1


def test_an_image_takes_the_same_lens_whatever_is_asked_for_and_wherever_it_is_made():
    population = Population.of(torch.zeros(3000, dtype=torch.long), normal(3000, 0.5, 0.5, 0.5), LINEAR)
    labels = torch.zeros(20, dtype=torch.long)
    free = population.fill(labels, None, 5)
    assert torch.equal(population.fill(labels[:7], None, 5, first=13), free[13:])
    assert not torch.equal(population.fill(labels, None, 6), free)
    asked = torch.full((20, 3), NAN)
    asked[::2, 1] = 0.3  # which says nothing of the others
    found = population.fill(labels, asked, 5)
    assert (found[::2, 1] == 0.3).all()
    free[::2, 1] = 0.3
    assert torch.equal(found, free)
    assert torch.equal(population.fill(labels, free, 5), free)


def filled(population, asked):
    return population.fill(torch.zeros(len(asked), dtype=torch.long), asked, 0)


@pytest.mark.parametrize("hole", [0.0, 0.2, 0.5, 0.8], ids=lambda share: f"{share:.0%} missing")
@pytest.mark.parametrize("gone", [(0, 1, 2), (0,), (1,)], ids=["whole rows", "what is given", "what is not"])
def test_normal_parameters_have_the_law_that_they_have_where_others_are_known(hole, gone):
    """Against the closed form: mean rho * x and variance 1 - rho^2."""
    z = normal(10_000, 0.5, 0.5, 0.5)
    phases = torch.stack([z[:, 0], 0.8 * z[:, 0] + 0.6 * z[:, 1], z[:, 2]], 1)
    missing = torch.nonzero(torch.arange(10_000) % 10 < 10 * hole)
    phases[missing, torch.tensor(gone)] = NAN
    population = Population.of(torch.zeros(10_000, dtype=torch.long), phases, LINEAR)
    asked = torch.full((6_000, 3), NAN)
    asked[:, 0] = normal(6_000, 0.4, seed=1)[:, 0]
    found = filled(population, asked)
    assert (found[:, 0] == asked[:, 0]).all()
    known = found[:, 1].isfinite()
    assert known.double().mean() == pytest.approx(1 - hole if gone == (1,) else 1, abs=0.05)
    slope, mean = np.polyfit(asked[known, 0], found[known, 1], 1)
    np.testing.assert_allclose([slope, mean], [0.8, 0], atol=0.04)
    left = found[known, 1] - 0.8 * asked[known, 0]
    np.testing.assert_allclose(left.std(), 0.6 * 0.5, atol=0.03)
    there = found[:, 2].isfinite()
    np.testing.assert_allclose(found[there, 2].std(), 0.5, atol=0.03)


def test_what_follows_from_others_follows_and_angles_count_by_their_waves():
    z = normal(3000, 0.5, 0.5)
    angle = torch.rand(3000, generator=torch.Generator().manual_seed(1)) * 6.283 - 10
    phases = torch.stack([z[:, 0], angle, z[:, 0] + angle.cos()], 1)
    known = (LINEAR[0], parameter("angle", name="angle", mean=0.0, deviation=1.0, period=6.283), LINEAR[2])
    population = Population.of(torch.zeros(3000, dtype=torch.long), phases, known)
    asked = torch.tensor([[0.2, 0.5, NAN], [0.2, 0.5 + 2 * math.pi, NAN], [0.2, 3.0, NAN], [NAN, NAN, 1.2]] * 100)
    found = filled(population, asked).view(100, 4, 3)
    np.testing.assert_allclose(found[:, :3, 2].mean(0), [0.2 + math.cos(0.5)] * 2 + [0.2 + math.cos(3)], atol=0.05)
    assert found[:, :3, 2].std(0).max() < 0.1
    assert found[:, 3, 1].cos().mean() > 0.4  # a free angle follows, too


def test_a_lens_that_is_filled_in_is_possible_wherever_it_is_asked_for_within_the_range():
    """Masses with heavy tails and their sum: a straight line fitted to them would give negative masses."""
    masses = (10 ** normal(5000, 0.4, 0.4, 0.4)).sort(1, descending=True).values
    columns = torch.cat([masses, masses.sum(1, keepdim=True)], 1)
    known = [
        parameter(name=f"m{i}", mean=float(of.mean()), deviation=float(of.std())) for i, of in enumerate(columns.T)
    ]
    phases = torch.stack(
        [torch.from_numpy(of.phase(column.numpy())) for of, column in zip(known, columns.T, strict=True)], 1
    )
    population = Population.of(torch.zeros(5000, dtype=torch.long), phases, known)
    for i in range(4):
        for end in (phases[:, i].min(), phases[:, i].quantile(0.999), phases[:, i].max()):
            asked = torch.full((500, 4), NAN)
            asked[:, i] = end
            found = filled(population, asked)
            assert (found >= phases.amin(0) - 0.15).all()
            assert (found <= phases.amax(0) + 0.15).all()
            assert (population._classes[0].phases[:, i] - end).abs().min() < 0.01


def test_parameters_that_say_the_same_are_no_trouble():
    z = normal(2000, 0.5)[:, 0]
    population = Population.of(torch.zeros(2000, dtype=torch.long), torch.stack([z, z, 2 * z], 1), LINEAR)
    asked = torch.tensor([[0.3, 0.3, NAN], [0.3, NAN, NAN], [NAN, NAN, 0.6]] * 50)
    np.testing.assert_allclose(filled(population, asked).view(50, 3, 3).mean(0), [[0.3, 0.3, 0.6]] * 3, atol=0.04)


def test_lenses_that_lack_what_is_given_are_not_taken_however_few_have_it():
    z = normal(150, 0.5)[:, 0]
    phases = torch.stack([z, 2 * z, torch.arange(150.0)[torch.randperm(150)]], 1)
    number = phases[:20, 2].clone()
    phases[20:, 0] = NAN
    asked = torch.full((400, 3), NAN)
    asked[:, 0] = 0.2
    found = filled(Population.of(torch.zeros(150, dtype=torch.long), phases, LINEAR), asked)
    taken = found[:, 2].round()
    assert torch.isin(taken, number).all()
    assert len(taken.unique()) == 20


def test_what_no_lens_of_the_class_has_says_nothing_of_what_follows_from_the_rest():
    z = normal(2000, 0.5)[:, 0]
    population = Population.of(torch.zeros(2000, dtype=torch.long), torch.stack([z, 2 * z, NAN * z], 1), LINEAR)
    asked = torch.tensor([[0.3, NAN, NAN], [NAN, 0.4, NAN]] * 200)
    found = filled(population, asked)
    asked[:, 2] = 0.1
    also = filled(population, asked)
    assert torch.equal(also[:, :2], found[:, :2])
    assert (also[:, 2] == asked[:, 2]).all()
    assert found[::2, 1].std() < 0.1


def test_any_lens_is_taken_where_none_has_all_that_is_given():
    z = normal(2000, 0.5)[:, 0]
    phases = torch.stack([z, 2 * z, 3 * z], 1)
    phases[::2, 0], phases[1::2, 1] = NAN, NAN
    found = filled(
        Population.of(torch.zeros(2000, dtype=torch.long), phases, LINEAR), torch.tensor([[0.1, 0.2, NAN]] * 500)
    )
    assert found.isfinite().all()
    assert found[:, 2].std() == pytest.approx(1.5, rel=0.15)


def test_values_that_are_missing_stay_so_and_a_class_without_lenses_has_none():
    phases = normal(1000, 0.5, 0.5, 0.5)
    phases[torch.arange(1000) % 4 == 0, 1] = NAN
    population = Population.of(torch.zeros(1000, dtype=torch.long), phases, LINEAR)
    labels = torch.tensor([0] * 2000 + [1] * 10)
    asked = torch.full((2010, 3), NAN)
    asked[:1000, 0] = 0.1
    asked[-1, 0] = 0.1
    found = population.fill(labels, asked, 0)
    assert found[:2000, [0, 2]].isfinite().all()
    assert found[:2000, 1].isnan().double().mean() == pytest.approx(0.25, abs=0.04)
    assert torch.equal(found[2000:].nan_to_num(9), asked[2000:].nan_to_num(9))


@MODELS
def test_a_generator_draws_what_its_population_says(build, tmp_path):
    model = build()
    labels = torch.tensor([0, 2, 1, 1])
    asked = torch.full((4, len(NAMES)), NAN)
    asked[0, 0], asked[2, 3] = 0.4, -0.2
    without = model.generate(labels, seed=1, phases=asked)
    model.population = Population.of(torch.arange(300) % 3, normal(300, *[0.5] * 5), KNOWN)
    full = model.population.fill(labels, asked, 1, 10)
    found = model.generate(labels, seed=1, first=10, phases=asked)
    assert torch.equal(model.with_network(model.network).generate(labels, seed=1, first=10, phases=asked), found)
    torch.testing.assert_close(model.generate(labels, seed=1, first=10, phases=full), found)
    assert not torch.allclose(model.generate(labels, seed=1, phases=asked), without, atol=1e-2)

    codec = {} if model.codec is None else {"codec_state_dict": model.codec.state_dict()}
    content = {"model_state_dict": model.network.state_dict(), **codec, **model.description(), "sampler": {}}
    kept = model.population.state_dict()
    save_checkpoint(tmp_path / "c.pt", **content, population_state_dict=kept)
    run_script(
        "train/export_weights.py",
        *("--checkpoint_path", tmp_path / "c.pt", "--output_path", tmp_path / "c.safetensors", "--halved", "*"),
    )
    for name in ("c.pt", "c.safetensors"):
        loaded = load_model(tmp_path / name, "cpu").population
        assert torch.equal(loaded.fill(labels, asked, 1, 10), full)
    far = kept["phases"].float().masked_fill(torch.arange(5) == 2, math.inf)
    broken = (
        {"phases": far},
        {"phases": far.half()},
        {"phases": far.clamp_max(1e38)},
        {"labels": kept["labels"].cfloat()},
    )
    for damaged in ({"phases": kept["phases"][:, :3]}, {"labels": kept["labels"].float()}, {"phases": 3}, *broken):
        save_checkpoint(tmp_path / "d.pt", **content, population_state_dict=kept | damaged)
        with pytest.raises(InputError, match="configuration is not that of a generator"):
            load_model(tmp_path / "d.pt", "cpu")
