"""The flow, tested where the answer is known: paths, loss, guidance, and integration of an exact velocity field."""

import math

import numpy as np
import pytest
import torch

from models import flow


def test_paths_begin_at_the_image_and_end_at_the_noise():
    x, noise = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    z = flow.interpolate(x, noise, torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(z[0], x[0])
    torch.testing.assert_close(z[1], 0.75 * x[1] + 0.25 * noise[1])
    torch.testing.assert_close(z[2], noise[2])


def test_velocity_of_the_true_image_is_noise_minus_image():
    x, noise, t = torch.randn(6, 1, 4, 4), torch.randn(6, 1, 4, 4), torch.rand(6).clamp_min(0.01)
    velocity = flow.velocity_from_image(x, flow.interpolate(x, noise, t), t)
    torch.testing.assert_close(velocity, noise - x, rtol=1e-3, atol=1e-3)


def test_loss_is_the_mean_squared_error_of_the_velocity():
    x, noise = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    velocity = torch.stack([torch.full((1, 2, 2), 1.0), torch.full((1, 2, 2), 4.0)])
    t, seen = torch.tensor([0.5, 0.25]), []
    loss = flow.objective(lambda *given: seen.append(given) or velocity, x, noise, t, torch.tensor([2, 1]))
    assert loss == pytest.approx((0 + 9) / 2)
    ((z, times, labels),) = seen
    assert torch.equal(z, flow.interpolate(x, noise, t))
    assert torch.equal(times, t)
    assert labels.tolist() == [2, 1]


def test_loss_of_an_image_prediction_is_its_error_over_t_but_no_more_than_20_times():
    x, noise = torch.zeros(1, 1, 2, 2), torch.randn(1, 1, 2, 2)
    for t, weight in [(1.0, 1), (0.5, 4), (0.05, 400), (0.01, 400), (0.002, 400)]:
        times = torch.tensor([t])
        loss = flow.objective(lambda z, t, labels: x + 0.1, x, noise, times, None, "image")
        assert loss.item() == pytest.approx(0.01 * weight, rel=1e-2)


def test_a_loss_can_weigh_errors():
    """A weight that sees only the mean of an image takes no notice of the rest."""
    x, noise, t = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2), torch.tensor([0.5, 0.5])
    velocity = torch.tensor([[1.0, -1, 1, -1], [2, 2, 2, 2]]).view(2, 1, 2, 2)

    def mean(error):
        return error.flatten(1).mean(1, keepdim=True)

    loss = flow.objective(lambda z, t, labels: velocity, x, noise, t, None, weigh=mean)
    assert loss.item() == (0 + 4) / 2


def test_times_are_distributed_as_their_name_says():
    random = flow.generator_of(0, 1)
    uniform, logit_normal = (flow.draw_times(40000, name, random, 0.69, 0.8) for name in ("uniform", "logit_normal"))
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert uniform.var().item() == pytest.approx(1 / 12, abs=0.005)
    logits = torch.logit(logit_normal.double())
    assert logits.mean().item() == pytest.approx(0.8, abs=0.02)
    assert logits.std().item() == pytest.approx(0.8, abs=0.02)
    assert (logit_normal > 0).all()
    assert (logit_normal < 1).all()
    logits = torch.logit(flow.draw_times(40000, "logit_normal", random, 0.25, 1.5).double())
    assert logits.mean().item() == pytest.approx(math.log(1 / 3), abs=0.04)
    assert logits.std().item() == pytest.approx(1.5, abs=0.04)


def test_labels_are_dropped_as_often_as_asked_and_otherwise_kept():
    labels = torch.arange(3).repeat(10000)
    dropped = flow.drop_labels(labels, 3, 0.1, flow.generator_of(0, 1))
    assert (dropped == 3).double().mean().item() == pytest.approx(0.1, abs=0.006)
    assert torch.equal(dropped[dropped != 3], labels[dropped != 3])
    assert torch.equal(flow.drop_labels(labels, 3, 0.0, flow.generator_of(0, 1)), labels)


def test_the_random_stream_of_a_step_depends_on_seed_and_step_alone():
    torch.manual_seed(1)
    first = torch.rand(1000, generator=flow.generator_of(42, 7))
    torch.manual_seed(2)
    assert torch.equal(first, torch.rand(1000, generator=flow.generator_of(42, 7)))
    for other in (flow.generator_of(42, 8), flow.generator_of(43, 7), flow.generator_of(7, 42)):
        assert abs(torch.corrcoef(torch.stack([first, torch.rand(1000, generator=other)]))[0, 1]) < 0.1


def gaussian_velocity(mean: float, std: float):
    """The exact velocity when images are N(mean, std^2): the mean of noise - x given z_t, both being Gaussian."""

    def velocity(z, t, labels):
        t = t.view(-1, 1, 1, 1)
        a, b = (1 - t) * std, t  # z_t = (1 - t) mean + a e1 + b e2
        centred = (z - (1 - t) * mean) / (a**2 + b**2)
        return b * centred - (mean + std * a * centred)

    return velocity


@pytest.mark.parametrize(  # the first step of "logit" stays as it is
    ("solver", "order", "grid"),
    [
        *(("euler", 1, "uniform"), ("euler", 1, "cosine"), ("heun", 2, "uniform"), ("heun", 2, "cosine")),
        ("multistep", 3, "cosine"),  # it steps in the logarithm of the noise, which "uniform" does not refine at 0
    ],
)
def test_a_solver_follows_the_exact_solution_with_the_error_of_its_order(solver, order, grid):
    velocity = gaussian_velocity(mean=0.7, std=0.3)
    noise = torch.randn(200, 1, 2, 2, dtype=torch.float64)
    exact = 0.7 + 0.3 * noise  # the flow of a Gaussian to a Gaussian only shifts and scales
    labels = torch.zeros(200, dtype=torch.long)

    def error(steps):
        return (flow.SOLVERS[solver](velocity, noise, labels, flow.time_grid(steps, grid)) - exact).abs().max().item()

    errors = [error(n) for n in (200, 400, 800)]
    np.testing.assert_allclose(np.array(errors[:-1]) / errors[1:], 2**order, rtol=0.06)
    assert errors[-1] < 0.01


def test_the_multistep_solver_is_unipc():
    """Algorithms 1 and 2 of arXiv:2302.04867 for order 2 and data prediction, its linear systems solved as such."""
    velocity, times = gaussian_velocity(mean=0.7, std=0.3), [0.9, 0.6, 0.35, 0.1]
    start = torch.randn(50, 1, 2, 2, dtype=torch.float64)
    alpha, sigma = 1 - np.array(times), np.array(times)
    lam = np.log(alpha / sigma)

    def clean(i, x):
        return x - sigma[i] * velocity(x, torch.full((50,), times[i], dtype=torch.float64), None)

    def step(i, x, buffer, nodes):
        """From time i - 1 to i with the clean images at ``nodes`` beside that at i - 1."""
        h = lam[i] - lam[i - 1]
        b_h = math.expm1(-h)
        ratios = np.array([(lam[node] - lam[i - 1]) / h for node in nodes])
        phi = [b_h / -h - 1]  # h phi_2, h^2 phi_3 of -h
        phi.append(phi[0] / -h - 1 / 2)
        system = np.vander(ratios, increasing=True).T
        of_nodes = np.linalg.solve(system, [math.factorial(k + 1) * phi[k] / b_h for k in range(len(nodes))])
        if len(nodes) == 1:
            of_nodes = [0.5]  # as the paper takes it for order 2
        differences = [(buffer[node] - buffer[i - 1]) / r for node, r in zip(nodes, ratios, strict=True)]
        added = sum(rho * d for rho, d in zip(of_nodes, differences, strict=True))
        return sigma[i] / sigma[i - 1] * x - alpha[i] * b_h * (buffer[i - 1] + added)

    x, buffer = start, {0: clean(0, start)}
    for i in range(1, 4):
        predicted = step(i, x, buffer, [i - 2] if i > 1 else [])
        if i == 3:  # the solver does not correct its end
            break
        buffer[i] = clean(i, predicted)
        x = step(i, x, buffer, [i - 2, i] if i > 1 else [i])
    torch.testing.assert_close(flow.multistep(velocity, start, torch.zeros(50), times), predicted)


def test_the_multistep_solver_takes_no_slope_from_pure_noise():
    """There the logarithm of the signal-to-noise ratio has no bound, so the first step is not corrected and the second
    does not extrapolate. The second step is corrected, however."""
    exact, seen = gaussian_velocity(mean=0.7, std=0.3), []

    def velocity(z, t, labels):
        seen.append(z)
        return exact(z, t, labels)

    noise, labels = torch.randn(50, 1, 2, 2, dtype=torch.float64), torch.zeros(50)
    flow.multistep(velocity, noise, labels, [1.0, 0.6, 0.3, 0.1, 0.0])
    torch.testing.assert_close(seen[1], flow.euler(exact, noise, labels, [1.0, 0.6]))
    torch.testing.assert_close(seen[2], flow.euler(exact, noise, labels, [1.0, 0.6, 0.3]))
    before, image = (z - t * exact(z, torch.full((50,), t), labels) for z, t in zip(seen[1:3], (0.6, 0.3), strict=True))
    ahead = math.log(0.9 / 0.1 * 0.3 / 0.7) / math.log(0.7 / 0.3 * 0.6 / 0.4)  # this step over the one before
    not_corrected = seen[2] / 3 + 2 / 3 * (image + ahead / 2 * (image - before))
    torch.testing.assert_close(seen[3], not_corrected, atol=0.1, rtol=0)
    assert not torch.allclose(seen[3], not_corrected, atol=1e-4)


@pytest.mark.parametrize(
    ("solver", "expected"),
    [
        ("euler", [1.0, 0.75, 0.5, 0.25]),
        ("multistep", [1.0, 0.75, 0.5, 0.25]),
        ("heun", [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]),
    ],
)
def test_no_solver_takes_the_velocity_at_the_clean_image(solver, expected):
    times = []
    z, labels = torch.zeros(2, 1, 2, 2), torch.zeros(2)
    flow.SOLVERS[solver](lambda z, t, labels: times.append(t.tolist()) or z, z, labels, flow.time_grid(4))
    assert times == [[t, t] for t in expected]


@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_a_perfect_clean_image_prediction_needs_one_step(solver):
    image = torch.randn(3, 1, 2, 2)
    noise = torch.randn(3, 1, 2, 2)
    for steps, grid in [(1, "uniform"), (2, "uniform"), (5, "cosine")]:
        found = flow.SOLVERS[solver](
            lambda z, t, labels: flow.velocity_from_image(image, z, t), noise, None, flow.time_grid(steps, grid)
        )
        torch.testing.assert_close(found, image)


def test_grids_run_from_1_to_0():
    assert flow.time_grid(4) == [1, 0.75, 0.5, 0.25, 0]
    half = math.sqrt(0.5) / 2
    assert flow.time_grid(4, "cosine") == pytest.approx([1, 0.5 + half, 0.5, 0.5 - half, 0])
    times = flow.time_grid(8, "logit")
    assert [times[0], times[1], times[-2], times[-1]] == pytest.approx([1, 0.9, 0.03, 0])
    ratios = [(1 - t) / t for t in times[1:-1]]  # signal to noise
    np.testing.assert_allclose(np.divide(ratios[1:], ratios[:-1]), (0.97 / 0.03 * 0.9 / 0.1) ** (1 / 6))
    for name in flow.TIME_GRIDS:
        assert flow.time_grid(1, name) == [1, 0]


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"steps": 2.5}, {"cfg_scale": math.inf}, {"solver": "?"}, {"grid": ""}, {"tolerance": -0.1}]
)
def test_a_sampler_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="no such sampler"):
        flow.Sampler(**wrong)


def by_label(z, t, labels):
    return labels.view(-1, 1, 1, 1) * torch.ones_like(z)


def test_guidance_is_uncond_plus_scale_times_the_difference_in_one_batch():
    sizes = []

    def velocity(z, t, labels):
        sizes.append(len(z))
        return by_label(z, t, labels)

    z, t, labels = torch.zeros(2, 1, 2, 2), torch.ones(2), torch.tensor([0, 1])
    out = flow.guided(velocity, 3, scale=5.0)(z, t, labels)
    assert out[:, 0, 0, 0].tolist() == [3 + 5 * (0 - 3), 3 + 5 * (1 - 3)]
    assert sizes == [4]


def test_guidance_on_an_interval_makes_no_second_evaluation_outside_it():
    sizes = []

    def velocity(z, t, labels):
        sizes.append(len(z))
        return by_label(z, t, labels)

    inside = flow.guided(velocity, 3, 5.0, interval=(0.25, 0.5))
    z, labels = torch.zeros(1, 1, 2, 2), torch.tensor([1])
    out = [inside(z, torch.tensor([t]), labels)[0, 0, 0, 0].item() for t in (0.75, 0.5, 0.25, 0.2)]
    assert out == [1, 3 + 5 * (1 - 3), 3 + 5 * (1 - 3), 1]
    assert sizes == [1, 2, 2, 1]


@pytest.mark.parametrize("scale", [1, 1.0])
def test_no_second_evaluation_without_guidance(scale):
    sizes = []

    def velocity(z, t, labels):
        sizes.append(len(z))
        return by_label(z, t, labels)

    images = flow.sample(velocity, torch.tensor([0, 1, 2]), (1, 2, 2), 3, flow.Sampler(4, scale))
    assert sizes == [3] * 4
    noise = flow.noise_images((1, 2, 2), 0, range(3))
    torch.testing.assert_close(images, noise - torch.arange(3.0).view(3, 1, 1, 1))


def test_guided_sampling_of_a_known_field():
    """Two classes with constant velocities: sampling moves the noise by the guided velocity, whatever the steps."""
    images = flow.sample(by_label, torch.tensor([1, 2]), (1, 2, 2), 3, flow.Sampler(7, 2.0), seed=4)
    noise = flow.noise_images((1, 2, 2), 4, range(2))
    moved = torch.tensor([3 + 2 * (1 - 3), 3 + 2 * (2 - 3)]).view(2, 1, 1, 1)
    torch.testing.assert_close(images, noise - moved)


def test_a_known_standard_deviation_spares_the_first_evaluation():
    """The first step goes where exact velocities of Gaussians lead, and the number of evaluations stays the same."""
    seen = []

    def velocity(z, t, labels):
        seen.append(t[0].item())
        return torch.zeros_like(z)

    sampler = flow.Sampler(3, 1.0, "euler", "uniform")
    deviation = torch.tensor([0.01, 0.5, 1.0, 3.0]).view(1, 2, 2)
    images = flow.sample(velocity, torch.tensor([0, 1, 2]), (1, 2, 2), 3, sampler, standard_deviation=deviation)
    noise, fine = flow.noise_images((1, 2, 2), 0, range(3)), [1 - i / 400 for i in range(101)]
    exact = flow.heun(gaussian_velocity(0.0, deviation), noise, torch.zeros(3), fine)
    torch.testing.assert_close(images, exact, rtol=1e-4, atol=1e-4)
    assert seen == [0.75, 0.5, 0.25]
    assert flow.evaluation_times(sampler, True) == [0.75, 0.5, 0.25, 0]
    assert flow.evaluation_times(sampler, False) == flow.time_grid(3)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_images_that_the_last_step_changes_are_made_again_in_twice_as_many(batch_size):
    """Class 1 changes until the end, class 0 does not; each image keeps its place and its noise."""
    taken = []

    def velocity(z, t, labels):
        taken.append(labels.tolist())
        image = (2 - t * labels).view(-1, 1, 1, 1).expand_as(z) + 0.1 * z
        return flow.velocity_from_image(image, z, t)

    labels = torch.tensor([0, 1, 0, 0, 1])
    few, many = (
        flow.sample(velocity, labels, (1, 2, 2), 3, flow.Sampler(steps, 1.0, "multistep"), batch_size=5)
        for steps in (4, 8)
    )
    assert (few - many).abs().amax((1, 2, 3)).min() > 1e-4
    taken.clear()
    careful = flow.Sampler(4, 1.0, "multistep", tolerance=0.1)
    images = flow.sample(velocity, labels, (1, 2, 2), 3, careful, batch_size=batch_size)
    torch.testing.assert_close(images[[0, 2, 3]], few[[0, 2, 3]])
    torch.testing.assert_close(images[[1, 4]], many[[1, 4]])
    assert taken[-8:] == [[1, 1]] * 8
    assert len(taken) == 4 * -(-5 // batch_size) + 8
    sure = flow.Sampler(1, 1.0, "multistep", tolerance=0.0)  # one evaluation: nothing to compare it with
    flow.sample(velocity, labels, (1, 2, 2), 3, sure)
    assert len(taken) == 4 * -(-5 // batch_size) + 8 + 1


def test_image_k_is_the_same_whatever_the_batch_size_and_the_number_of_images():
    velocity = gaussian_velocity(0.1, 0.5)
    labels, few = torch.zeros(10, dtype=torch.long), flow.Sampler(5, 1.0)
    sample = {n: flow.sample(velocity, labels, (1, 4, 4), 3, few, seed=3, batch_size=n) for n in (1, 3, 10)}
    torch.testing.assert_close(sample[1], sample[10])
    torch.testing.assert_close(sample[3], sample[10])
    torch.testing.assert_close(flow.sample(velocity, labels[:4], (1, 4, 4), 3, few, seed=3), sample[10][:4])
    other = flow.sample(velocity, labels, (1, 4, 4), 3, few, seed=4)
    assert (other - sample[10]).abs().amax((1, 2, 3)).min() > 0.01


def test_seeds_share_no_images():
    """Seed + index would make image 1 of seed 0 image 0 of seed 1."""
    a, b = flow.noise_images((1, 4, 4), 0, range(20)), flow.noise_images((1, 4, 4), 1, range(20))
    assert (a[:, None] - b[None]).abs().amax((2, 3, 4)).min() > 0.1
    assert abs(a.mean().item()) < 0.2
    assert a.std().item() == pytest.approx(1, abs=0.15)


def test_images_are_clipped_to_0_1():
    assert flow.to_unit_range(torch.tensor([-3.0, -1, 0, 1, 2])).tolist() == [0, 0, 0.5, 1, 1]


@pytest.mark.parametrize(("last", "kept"), [(0.03, 0.58), (0.005, 0.98)])
def test_what_is_fainter_than_the_last_time_is_lost(last, kept):
    """Of the variance of Gaussian data of standard deviation s, the last step leaves the share s^2 / (s^2 + t^2)."""
    deviation = 0.035
    velocity = gaussian_velocity(0.0, deviation)
    sampler = flow.Sampler(40, 1.0, "multistep", "logit", last=last)
    noise, labels = torch.randn(20000, 1, 1, 1), torch.zeros(20000, dtype=torch.long)
    images = flow.SOLVERS["multistep"](velocity, noise, labels, flow.evaluation_times(sampler, False))
    assert images.var() / deviation**2 == pytest.approx(kept, abs=0.03)
    with pytest.raises(ValueError, match="no such sampler"):
        flow.Sampler(last=0.95)


def test_a_first_time_nearer_to_noise_keeps_what_is_rare():
    """One image in ten is bright; the velocity is the exact one of the two Gaussians."""
    deviations, shares = torch.tensor([1.0, 12.0], dtype=torch.float64), torch.tensor([0.9, 0.1], dtype=torch.float64)

    def velocity(z, t, labels):
        t = t[0]
        variances = ((1 - t) * deviations) ** 2 + t**2
        likely = shares * (-(z.view(-1, 1) ** 2) / (2 * variances)).exp() / variances.sqrt()
        image = (likely * (1 - t) * deviations**2 / variances).sum(1) / likely.sum(1) * z.flatten()
        return (z - image.view_as(z)) / t

    noise, labels = torch.randn(50000, 1, 1, 1, dtype=torch.float64), torch.zeros(50000)
    deviation = (shares * deviations**2).sum().sqrt().view(1, 1, 1)
    spread = {}
    for first in (0.9, 0.98):
        times = flow.evaluation_times(flow.Sampler(40, 1.0, "multistep", "logit", first=first), True)
        images = flow.multistep(velocity, flow.start(noise, deviation, times[0]), labels, times)
        spread[first] = (images.std() / deviation).item()
    assert spread[0.98] == pytest.approx(1, abs=0.03)
    assert spread[0.9] < 0.93
