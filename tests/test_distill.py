"""The student learns, at its own times, the average velocity of its teacher's path; it stops and goes on exactly."""

import os
import re
import signal
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import history_of, run_script

import files
import settings
from models import flow
from models.checkpoint import build_generator, load_checkpoint, save_checkpoint
from train import distill

FLAGS = ["--num_ode_steps", 2, "--teacher_steps", 6, "--noises_per_epoch", 64, "--batch_size", 32, "--epochs", 3]
FLAGS += ["--ema_beta", 0.9, "--device", "cpu"]


@pytest.fixture(scope="module")
def student(checkpoint, tmp_path_factory):
    """OUTPUT_DIR of a short distillation."""
    folder = tmp_path_factory.mktemp("distill")
    run_script("train/distill.py", "--checkpoint_path", checkpoint, "--output_dir", folder, *FLAGS)
    return folder


@pytest.fixture
def run(monkeypatch, checkpoint, tmp_path):
    """Runs main() of distill in this process and returns its OUTPUT_DIR."""

    def start(**constants):
        script = vars(distill).copy()
        settings.from_flags(script, list(map(str, ["--checkpoint_path", checkpoint, *FLAGS])))
        for name, value in ({k: v for k, v in script.items() if k.isupper()} | constants).items():
            monkeypatch.setattr(distill, name, value)
        monkeypatch.setattr(distill, "OUTPUT_DIR", str(tmp_path / "run"))
        try:
            distill.main()
        finally:
            files.release()
        return tmp_path / "run"

    return start


def final(folder):
    return load_checkpoint(folder / "dit_conditional_ckpts" / "dit_conditional_final.pt")


@pytest.mark.parametrize(("passes", "steps"), [(1, 8), (2, 6), (4, 24), (8, 16)])
def test_the_teacher_passes_every_time_of_the_student(passes, steps):
    grid = flow.time_grid(passes, "square")
    times, stops = distill.teacher_times(grid, steps)
    assert len(times) == steps + 1
    assert [times[stop] for stop in stops] == pytest.approx(grid)
    assert all(before > after for before, after in pairwise(times))
    assert times[-2] == pytest.approx(min(1 / 64, grid[-2] / 2))
    roots = torch.tensor(times[: stops[1]], dtype=torch.double).sqrt()  # the square of equal distances
    assert roots.diff().tolist() == pytest.approx([roots.diff()[0].item()] * (len(roots) - 1))


def test_teacher_steps_that_do_not_fit_are_refused():
    with pytest.raises(settings.InputError, match="twice"):
        distill.teacher_times(flow.time_grid(4, "square"), 10)
    with pytest.raises(settings.InputError, match="twice"):
        distill.teacher_times(flow.time_grid(4, "square"), 4)


def test_long_steps_have_the_average_velocity_of_the_exact_path():
    """Images N(0.7, 0.3^2): a path goes from noise e to 0.7 + 0.3 e, and is at (1 - t) 0.7 + s(t) e on the way."""

    class Exact(torch.nn.Module):
        pos_embed, num_classes, sample_shape, spread = torch.zeros(1), 3, (1, 2, 2), None

        def along(self, times):
            return self

        def forward(self, z, t, labels):
            t = t.view(-1, 1, 1, 1)
            a, b = (1 - t) * 0.3, t
            return b / (a**2 + b**2) * (z - (1 - t) * 0.7) - (0.7 + 0.3 * a / (a**2 + b**2) * (z - (1 - t) * 0.7))

    times, stops = distill.teacher_times(flow.time_grid(2, "square"), 200)
    start, average, t, labels = distill.long_steps(Exact(), times, stops, 300, 1)
    noise, middle = start.split(300)
    assert t.tolist() == pytest.approx([1.0] * 300 + [0.9] * 300)
    assert torch.bincount(labels).min() > 140
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    reached = 0.1 * 0.7 + (0.1**2 * 0.3**2 + 0.9**2) ** 0.5 * noise
    torch.testing.assert_close(middle, reached, atol=2e-3, rtol=0)
    torch.testing.assert_close(noise - 0.1 * average[:300], middle)
    torch.testing.assert_close(middle - 0.9 * average[300:], 0.7 + 0.3 * noise, atol=5e-3, rtol=0)


def test_long_steps_begin_where_the_first_step_ends():
    """Where the teacher needs no pass for it, the student has nothing to learn of it either."""
    teacher = SimpleNamespace(
        pos_embed=torch.zeros(1),
        num_classes=3,
        sample_shape=(1, 5),
        spread=torch.full((1, 5), 900.0),
        along=lambda times: lambda z, t, labels: torch.zeros_like(z),
    )
    grid = flow.pass_times(flow.Sampler(2, 1.0, "euler", "square"), True)
    times, stops = distill.teacher_times(grid, 4)
    start, average, t, _ = distill.long_steps(teacher, times, stops, 300, 1)
    assert t.tolist() == pytest.approx([grid[0]] * 300 + [grid[1]] * 300)
    assert start.shape == (600, 1, 5)
    assert start[:300].std().item() == pytest.approx(90, rel=0.05)
    assert average.abs().max() < 1e-3


def test_noise_is_new_in_every_epoch_and_the_same_in_every_run(checkpoint):
    teacher = build_generator(load_checkpoint(checkpoint), checkpoint)
    times, stops = distill.teacher_times(flow.time_grid(2, "square"), 4)
    first, again, other = (distill.long_steps(teacher, times, stops, 8, epoch) for epoch in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][:8], other[0][:8])


def test_the_student_comes_closer_to_its_teacher(student, checkpoint):
    rows = history_of(student)
    teacher = build_generator(load_checkpoint(checkpoint), checkpoint)
    times, stops = distill.teacher_times(flow.time_grid(2, "square"), 6)
    untaught = distill.loss_of(teacher, distill.long_steps(teacher, times, stops, 512, 0), flow.T_FLOOR)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["val_loss"] < 0.9 * untaught
    model = build_generator(final(student), "")
    assert model.sampler == flow.Sampler(2, 1.0, "euler", "square")
    assert torch.equal(model.pos_embed, teacher.pos_embed)
    assert (student / "dit_conditional_images" / "sample_epoch_3.png").stat().st_size > 1000


def test_a_distillation_that_was_stopped_ends_as_one_that_was_not(student, run, monkeypatch, capsys):
    calls = []

    def stops(*args, original=flow.velocity_loss):
        calls.append(torch.is_grad_enabled())
        if calls[-1] and sum(calls) == 30:  # in the second epoch
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(flow, "velocity_loss", stops)
        run()
    assert "run the script again" in capsys.readouterr().out
    folder = run()
    assert re.search(r"_step_28.pt is at epoch 1, step \d+, going on", capsys.readouterr().out)
    mine, straight = final(folder)["ema_state_dict"], final(student)["ema_state_dict"]
    assert all(torch.equal(mine[name], straight[name]) for name in straight)
    run()
    assert "nothing to do" in capsys.readouterr().out


def test_a_signal_is_obeyed_while_the_teacher_walks(checkpoint):
    teacher = build_generator(load_checkpoint(checkpoint), checkpoint)
    times, stops = distill.teacher_times(flow.time_grid(2, "square"), 4)
    with pytest.raises(KeyboardInterrupt):
        distill.long_steps(teacher, times, stops, 8, 1, lambda: True)


def test_a_distillation_goes_on_with_batches_of_another_size(run, monkeypatch):
    """The loss is that of all long steps of the epoch, whatever the batches: here 1, then 2 from a half on."""
    value, stops = [1.0], iter([False] * 9 + [True])
    monkeypatch.setattr(flow, "velocity_loss", lambda velocity, *args: velocity.sum() * 0 + value[0])
    with monkeypatch.context() as patch:
        patch.setattr(settings, "stop_on_signal", lambda: lambda: next(stops))
        run()
    value[0] = 2.0
    (row,) = history_of(run(BATCH_SIZE=64, EPOCHS=1))
    assert (row["epoch"], row["loss"]) == (1, pytest.approx(1.5))


def test_another_teacher_is_named_and_a_good_student_not_lost(run, checkpoint, tmp_path, capsys):
    folder = run(EPOCHS=1)
    content = load_checkpoint(checkpoint)
    content["ema_state_dict"]["ema_model.final_layer.linear.bias"] += 0.1
    save_checkpoint(tmp_path / "other.pt", **content)
    before = (folder / "dit_conditional_ckpts" / "dit_conditional_final.pt").read_bytes()
    with pytest.raises(settings.InputError, match="Halve LEARNING_RATE 100 and run again, which goes on from"):
        run(CHECKPOINT_PATH=str(tmp_path / "other.pt"), EPOCHS=2, LEARNING_RATE=100.0, EMA_BETA=0.1)
    assert "the weights of the teacher: not those that the run began with" in capsys.readouterr().out
    assert (folder / "dit_conditional_ckpts" / "dit_conditional_final.pt").read_bytes() == before


def test_guidance_of_the_teacher_is_learned(checkpoint, monkeypatch):
    teacher = build_generator(load_checkpoint(checkpoint), checkpoint)
    times, stops = distill.teacher_times(flow.time_grid(2, "square"), 4)
    plain = distill.long_steps(teacher, times, stops, 8, 1)
    monkeypatch.setattr(distill, "CFG_SCALE", 3.0)
    guided = distill.long_steps(teacher, times, stops, 8, 1)
    assert torch.equal(plain[0][:8], guided[0][:8])
    velocity = flow.guided(teacher, 3, 3.0)
    path = list(flow.multistep_path(velocity, guided[0][:8], guided[3][:8], times))
    torch.testing.assert_close(guided[0][8:16], path[stops[1] - 1])
    assert not torch.allclose(plain[1], guided[1], atol=1e-3)
