"""A run comes back after a kill, a signal, a full disk or a bad number just where it was, and says what went wrong."""

import errno
import os
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
from conftest import TINY_TRAINING, history_of, run_script
from kill_training import forkserver, kill_and_compare, same, train_and_watch

import settings
from files import whole
from models import flow
from models.checkpoint import load_checkpoint, save_checkpoint
from models.generator import build_generator
from train import run as train_run
from train import train_diffusion

pytestmark = pytest.mark.usefixtures("undrawn")


def final(run):
    """The last checkpoint of a run, without the settings, which name its folder."""
    content = load_checkpoint(run / "dit_conditional_ckpts" / "dit_conditional_final.pt")
    del content["settings"], content["run"]
    return content


@pytest.fixture(scope="module")
def straight(lens_data, tmp_path_factory):
    """A run of 4 epochs of 7 steps that was never stopped."""
    run = tmp_path_factory.mktemp("straight")
    run_script("train/train_diffusion.py", *TINY_TRAINING, "--data_dir", lens_data, "--output_dir", run)
    return run


# Killed


@pytest.mark.parametrize(
    ("training", "kills"),
    [
        ("diffusion", 8),
        ("classifier", 1),
        pytest.param("diffusion", 500, marks=pytest.mark.long),
        pytest.param("classifier", 20, marks=pytest.mark.long),
    ],
)
def test_a_run_killed_anywhere_and_resumed_ends_bit_for_bit_as_one_that_was_not(lens_data, tmp_path, training, kills):
    while_writing = kill_and_compare(training, lens_data, tmp_path, kills, seed=0)
    assert len(while_writing) == kills
    assert sum(while_writing) >= kills // 4


def at_step(step, do):
    """A replacement of flow.to_velocity that applies ``do`` to the velocity of one training step, of 7 an epoch."""
    calls = []

    def to_velocity(*args, original=flow.to_velocity):
        velocity = original(*args)
        if torch.is_grad_enabled():  # not in validation, nor to generate
            calls.append(1)
            if len(calls) == step:
                return do(velocity)
        return velocity

    return to_velocity


def signalled(number):
    def receive(velocity):
        os.kill(os.getpid(), number)
        return velocity

    return receive


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 10), (signal.SIGINT, 1), (signal.SIGHUP, 8)])
def test_a_signal_saves_and_the_run_goes_on_from_there(straight, train, heard, monkeypatch, capsys, number, step):
    with monkeypatch.context() as patch:
        patch.setattr(flow, "to_velocity", at_step(step, signalled(number)))
        run = train()
    names = [path.name for path in (run / "dit_conditional_ckpts").glob("*step*")]
    assert names == [f"dit_conditional_step_{step - 1}.pt"]
    assert "run the script again to go on" in capsys.readouterr().out
    train()
    assert {1: "is at epoch 0, going", 8: "at epoch 1, going", 10: "at epoch 1, step 2, going"}[step] in (
        capsys.readouterr().out
    )
    assert same(final(straight), final(run))


def test_a_second_signal_ends_at_once(train, monkeypatch):
    def pressed_twice(velocity):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        raise KeyboardInterrupt

    monkeypatch.setattr(flow, "to_velocity", at_step(1, pressed_twice))
    with pytest.raises(KeyboardInterrupt):
        train()


# Which checkpoint, of which run


def checkpoints_of(run):
    return {path.name: path for path in (run / "dit_conditional_ckpts").glob("*.pt")}


def test_a_save_removes_older_steps_of_the_run_and_nothing_else(train):
    folder = train(EPOCHS=1) / "dit_conditional_ckpts"
    for name in ("step_3", "step_3_mine"):
        shutil.copy(folder / "dit_conditional_final.pt", folder / f"dit_conditional_{name}.pt")
    (folder / "dit_conditional_step_1.pt").write_bytes(b"damaged, to be looked at")
    train(EPOCHS=2)
    steps = sorted(path.name for path in folder.glob("*step*"))
    assert steps == ["dit_conditional_step_1.pt", "dit_conditional_step_3_mine.pt"]


def test_the_newest_checkpoint_is_that_of_most_steps_whatever_the_time_of_the_file(straight, train, tmp_path, capsys):
    """As after cp, rsync or unzip: the oldest has the newest time."""
    train(EPOCHS=3, CHECKPOINT_SAVE_INTERVAL=1)
    run = shutil.copytree(tmp_path / "run", tmp_path / "copy")
    checkpoints_of(run)["dit_conditional_final.pt"].unlink()
    for age, name in enumerate(("epoch_1", "epoch_2", "epoch_3")):
        os.utime(checkpoints_of(run)[f"dit_conditional_{name}.pt"], (10**9 - age, 10**9 - age))
    capsys.readouterr()
    train(run, CHECKPOINT_SAVE_INTERVAL=1)
    assert "dit_conditional_epoch_3.pt is at epoch 3, going on" in capsys.readouterr().out
    assert len(checkpoints_of(run)) >= 4  # the oldest was removed, not the newest
    assert "dit_conditional_epoch_4.pt" in checkpoints_of(run)
    assert [row["epoch"] for row in history_of(run)] == [1, 2, 3, 4]


def test_within_an_epoch_too_and_with_batches_of_any_size(train, monkeypatch, tmp_path, capsys):
    """Step 12, with 7 an epoch, is farther than step 20, with 14 an epoch."""
    for steps, size in ((12, 16), (20, 8)):
        with monkeypatch.context() as patch:
            patch.setattr(flow, "to_velocity", at_step(steps + 1, signalled(signal.SIGTERM)))
            train(tmp_path / str(steps), BATCH_SIZE=size)
    first, second = (checkpoints_of(tmp_path / str(steps)) for steps in (12, 20))
    content = load_checkpoint(second["dit_conditional_step_20.pt"])
    content["run"] = load_checkpoint(first["dit_conditional_step_12.pt"])["run"]
    save_checkpoint(first["dit_conditional_step_12.pt"].with_name("dit_conditional_step_20.pt"), **content)
    capsys.readouterr()
    train(tmp_path / "12", EPOCHS=3)
    assert "dit_conditional_step_12.pt is at epoch 1, step 5, going on" in capsys.readouterr().out


def test_a_new_run_neither_picks_up_nor_removes_an_older_one(straight, train, monkeypatch, tmp_path, capsys):
    run = train()
    before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:  # killed before its first checkpoint
        patch.setattr(flow, "to_velocity", at_step(3, lambda velocity: 1 / 0))
        with pytest.raises(ZeroDivisionError):
            train(RESUME="never", SEED=1)
    assert f"What an earlier run has left in {run} is in {run / 'earlier_1'} now" in capsys.readouterr().out
    train(SEED=1, EPOCHS=1)
    assert "going on" not in capsys.readouterr().out
    assert len(history_of(run)) == 1
    train(RESUME="never", SEED=1, EPOCHS=1)
    kept = run / "earlier_1"
    assert all(
        (kept / name).read_bytes() == content for name, content in before.items() if not name.name.startswith(".")
    )
    assert len(history_of(run / "earlier_2")) == 1


def test_a_run_goes_on_from_the_checkpoint_that_is_named(straight, train, monkeypatch, tmp_path, capsys):
    other = train(tmp_path / "other", CHECKPOINT_SAVE_INTERVAL=1)
    path = checkpoints_of(other)["dit_conditional_epoch_2.pt"]
    capsys.readouterr()
    with monkeypatch.context() as patch:  # killed before a checkpoint of its own
        patch.setattr(flow, "to_velocity", at_step(1, lambda velocity: 1 / 0))
        with pytest.raises(ZeroDivisionError):
            train(RESUME=str(path))
    assert "dit_conditional_epoch_2.pt is at epoch 2, going on" in capsys.readouterr().out
    run = train()
    assert "dit_conditional_epoch_2.pt is at epoch 2, going on" in capsys.readouterr().out
    assert same(final(straight), final(run))
    train(other, RESUME=str(path))  # back to an earlier one of its own: what came after it is kept
    assert same(final(straight), final(other))
    assert len(checkpoints_of(other / "earlier_1")) == 4
    for wrong in ("nowhere.pt", "Never", "AUTO"):
        with pytest.raises(
            settings.InputError, match=rf"RESUME '{wrong}' is neither \"auto\" nor \"never\" nor the path"
        ):
            train(RESUME=wrong)
    assert final(run)
    with pytest.raises(settings.InputError, match=r"component_mlp.safetensors holds no state to go on from"):
        train(RESUME=str(settings.ROOT / "weights" / "component_mlp.safetensors"))


def test_what_is_no_number_in_a_checkpoint_is_named_and_names_of_compiled_modules_load(straight, train, tmp_path):
    run = train()
    for name in ("final", "epoch_4"):
        checkpoints_of(run)[f"dit_conditional_{name}.pt"].unlink()
    path = checkpoints_of(run)["dit_conditional_epoch_2.pt"]
    content = load_checkpoint(path)
    weights = {f"module._orig_mod.{name}": value for name, value in content["model_state_dict"].items()}
    averaged = {name.replace("ema_model.", "ema_model._orig_mod."): v for name, v in content["ema_state_dict"].items()}
    save_checkpoint(path, **content | {"model_state_dict": weights, "ema_state_dict": averaged})
    assert same(final(straight), final(train()))
    content = load_checkpoint(path)
    content["optimizer_state_dict"]["state"][3]["exp_avg_sq"][:] = float("inf")
    save_checkpoint(path, **content)
    for name in ("final", "epoch_4"):
        checkpoints_of(run)[f"dit_conditional_{name}.pt"].unlink()
    message = r"epoch_2.pt: its weights exp_avg_sq 3 of the optimizer hold NaN or Inf"
    with pytest.raises(settings.InputError, match=message):
        train()


@pytest.mark.parametrize("count", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_job_that_is_started_again_goes_on_whatever_it_was_told_at_first(train, monkeypatch, capsys, count):
    run = train(EPOCHS=2, RESUME="never")
    monkeypatch.setenv(count, "1")
    train(EPOCHS=3, RESUME="never")
    assert "is at epoch 2, going on" in capsys.readouterr().out
    assert not (run / "earlier_1").exists()


def test_the_earlier_run_stays_where_it_is_when_the_new_one_cannot_begin(train, checkpoint, tmp_path):
    run = train(EPOCHS=1)
    other = train(tmp_path / "other", EPOCHS=1, LATENT_DIM=64)
    with pytest.raises(settings.InputError, match="is of another network"):
        train(RESUME=str(checkpoints_of(other)["dit_conditional_final.pt"]))
    assert not (run / "earlier_1").exists()


def test_a_folder_with_another_networks_run_is_left_alone(train, lens_data, capsys):
    run = train(EPOCHS=1)
    before = sorted(run.rglob("*"))
    with pytest.raises(SystemExit):
        run_script("train/train_classifier.py", "--data_dir", lens_data, "--output_dir", run, "--batch_size", 16)
    complaint = "holds a run of another network, in dit_conditional_ckpts: choose another --output_dir"
    assert complaint in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before


def test_a_run_on_other_classes_or_images_is_told_which_it_was_on(train, data_copy, tmp_path):
    train(EPOCHS=1, DATA_DIR=str(data_copy))
    for path in data_copy.glob("*/*.npy"):
        np.save(path, np.load(path)[::2, ::2])
    complaint = r"final.pt is of images of 64x64 pixels.*, but .* of images of 32x32 .*: choose another --output_dir"
    with pytest.raises(settings.InputError, match=complaint):
        train(EPOCHS=1, DATA_DIR=str(data_copy))
    shutil.rmtree(data_copy / "cdm")
    complaint = "is of the classes axion, cdm, no_sub, but .* of the classes axion, no_sub: choose another --output_dir"
    with pytest.raises(settings.InputError, match=complaint):
        train(EPOCHS=1, DATA_DIR=str(data_copy))


def test_components_are_not_gone_on_with_for_images_of_another_size(lens_data, tmp_path, undrawn, capsys):
    flags = ["--recipe", "component_mlp", "--latent_dim", 16, "--batch_size", 16, "--epochs", 1]
    flags += ["--output_dir", tmp_path / "run"]
    run_script("train/train_diffusion.py", *flags, "--data_dir", lens_data)
    for path in lens_data.glob("*/*.npy"):
        small = tmp_path / "small" / path.relative_to(lens_data)
        small.parent.mkdir(parents=True, exist_ok=True)
        np.save(small, np.load(path)[::2, ::2])
    with pytest.raises(SystemExit) as stopped:
        run_script("train/train_diffusion.py", *flags, "--data_dir", tmp_path / "small")
    assert stopped.value.code == 2
    assert "is of images of 64x64 pixels" in (line := capsys.readouterr().err.strip().splitlines()[-1])
    assert "of images of 32x32 pixels" in line
    assert "choose another --output_dir" in line


def test_the_checkpoint_of_another_script_is_not_gone_on_from(train, classifier_run, lens_data, tmp_path, capsys):
    of_classifier = classifier_run / "classifier_ckpts" / "resnet18_epoch_2.pt"
    complaint = r"_epoch_2.pt is of train/train_classifier.py: choose another --output_dir, or checkpoint"
    (tmp_path / "mixed" / "dit_conditional_ckpts").mkdir(parents=True)
    shutil.copy(of_classifier, tmp_path / "mixed" / "dit_conditional_ckpts" / "dit_conditional_epoch_2.pt")
    for output, constants in (("mixed", {}), ("new", {"RESUME": str(of_classifier)})):
        with pytest.raises(settings.InputError, match=complaint):
            train(tmp_path / output, **constants)
    of_generator = checkpoints_of(train(EPOCHS=1))["dit_conditional_final.pt"]
    flags = ["--data_dir", lens_data, "--output_dir", tmp_path / "c", "--batch_size", 16, "--resume", of_generator]
    with pytest.raises(SystemExit):
        run_script("train/train_classifier.py", *flags)
    assert "final.pt is of train/train_diffusion.py: choose another --output_dir" in capsys.readouterr().err


def test_a_published_checkpoint_in_the_folder_is_one_line(train, tmp_path):
    path = tmp_path / "run" / "dit_conditional_ckpts" / "dit_conditional_epoch_100.pt"
    save_checkpoint(path, model_state_dict={}, optimizer_state_dict={}, epoch=100, loss=0.01)
    with pytest.raises(settings.InputError, match=r"epoch_100.pt holds no state to go on from: --start_path begins"):
        train()
    assert path.exists()


def test_checkpoints_of_two_runs_in_one_folder_are_not_guessed_among(train, tmp_path):
    run, other = train(EPOCHS=1), train(tmp_path / "other", EPOCHS=1)
    path = checkpoints_of(other)["dit_conditional_final.pt"]
    shutil.copy(path, run / "dit_conditional_ckpts" / "dit_conditional_epoch_7.pt")
    with pytest.raises(settings.InputError, match="holds checkpoints of 2 runs: --resume takes the path of one"):
        train()


def test_other_images_are_named(train, data_copy, capsys):
    run = train(DATA_DIR=str(data_copy), EPOCHS=2)
    train(DATA_DIR=str(data_copy), EPOCHS=3)
    assert "changed since then" not in capsys.readouterr().out
    for path in (data_copy / "cdm").glob("*.npy"):
        np.save(path, np.rot90(np.load(path)))
    train(DATA_DIR=str(data_copy))
    assert "changed since then: the training images: not those that the run began with" in capsys.readouterr().out
    train(DATA_DIR=str(data_copy), EPOCHS=2)
    assert len(history_of(run)) == 4


def test_the_loss_of_an_epoch_is_that_of_its_images_whatever_the_batches(train, monkeypatch, tmp_path):
    """Three of seven steps of 15 or 16 images have a loss of 1; then, in batches of 8, the rest has a loss of 2."""
    value = [1.0]
    monkeypatch.setattr(flow, "objective", lambda network, z, noise, *args: network(z, *args[:2]).sum() * 0 + value[0])
    with monkeypatch.context() as patch:
        patch.setattr(settings, "stop_on_signal", lambda: iter([False] * 3 + [True]).__next__)
        train()
    value[0] = 2.0
    train(BATCH_SIZE=8, EPOCHS=1, WARMUP_EPOCHS=0)
    content = load_checkpoint(tmp_path / "run" / "dit_conditional_ckpts" / "dit_conditional_final.pt")
    first = 3 * 16
    total = content["history"][0]["step"]
    assert total == 14
    row = history_of(tmp_path / "run")[0]
    images = 108  # in training
    assert row["loss"] == pytest.approx((first * 1.0 + (images - first) * 2.0) / images, abs=0.01)


def test_a_run_of_any_length_loses_minutes_at_most(train, monkeypatch):
    """The clock ticks half a minute a step; there are 4 epochs of 7 steps, without a checkpoint for each epoch."""
    clock, saved = [0.0], []
    monkeypatch.setattr("train.run.time.monotonic", lambda: clock[0])

    def tick(*args, original=flow.objective):
        clock[0] += 30 * torch.is_grad_enabled()
        return original(*args)

    def save(path, original=save_checkpoint, **content):
        saved.append(7 * content["epoch"] + content["step_in_epoch"])
        original(path, **content)

    monkeypatch.setattr(flow, "objective", tick)
    monkeypatch.setattr(train_run, "save_checkpoint", save)
    run = train(CHECKPOINT_SAVE_INTERVAL=10, **{"CHECKPOINT_SAVE_MINUTES": 3.0})
    assert saved == [5, 11, 17, 23, 28]
    assert list(checkpoints_of(run)) == ["dit_conditional_final.pt"]


# Checkpoints


def test_the_newest_whole_checkpoint_is_taken_and_a_damaged_one_named(straight, train, capsys):
    run = train()
    folder = run / "dit_conditional_ckpts"
    whole_file = (folder / "dit_conditional_final.pt").read_bytes()
    place = whole_file.index(final(straight)["model_state_dict"]["pos_embed"].numpy().tobytes()[:64])
    one_bit = bytes([whole_file[place] ^ 1])
    (folder / "dit_conditional_epoch_4.pt").write_bytes(whole_file[: len(whole_file) // 2])
    (folder / "dit_conditional_final.pt").write_bytes(whole_file[:place] + one_bit + whole_file[place + 1 :])
    capsys.readouterr()
    train(run)
    out = capsys.readouterr().out
    assert "dit_conditional_final.pt: damaged: not a checkpoint any more: going on from an older" in out
    assert "dit_conditional_epoch_4.pt: not a checkpoint, a damaged one" in out
    assert "dit_conditional_epoch_2.pt is at epoch 2, going on" in out
    assert same(final(straight), final(run))
    for broken in folder.glob("*.pt"):
        broken.write_bytes(b"")
    with pytest.raises(settings.InputError, match="no whole checkpoint: remove them, or --resume never"):
        train(run)
    train(run, RESUME="never", EPOCHS=1)


def test_a_changed_number_is_found(tmp_path):
    path = tmp_path / "c.pt"
    save_checkpoint(path, model_state_dict={"weight": torch.arange(4.0)}, epoch=1)
    content = torch.load(path, weights_only=True)
    for damaged in ({"epoch": 2}, {"model_state_dict": {"weight": torch.tensor([0, 1, 2, 3.0001])}}):
        torch.save(content | damaged, path)
        with pytest.raises(settings.InputError, match="checksum does not match"):
            load_checkpoint(path)


@pytest.mark.parametrize(("keep", "kept"), [(1, "26"), (2, "256"), (4, "23456"), (9, "123456")])
def test_the_newest_checkpoints_and_the_best_are_kept(train, monkeypatch, keep, kept):
    losses = iter([9.0, 5.0, 1.0, 4.0, 3.0, 2.0, 6.0])  # the first one is that of an untrained network
    monkeypatch.setattr(train_diffusion, "validation_loss", lambda *args: next(losses) if len(args) == 3 else 9.0)
    saving = {"CHECKPOINT_SAVE_INTERVAL": 1, "CHECKPOINT_SAVE_MINUTES": 1e-3, "KEEP_CHECKPOINTS": keep}
    run = train(EPOCHS=6, BATCH_SIZE=54, SAMPLE_INTERVAL=9, **saving)
    names = sorted(path.name for path in (run / "dit_conditional_ckpts").iterdir())
    assert names == [f"dit_conditional_{name}.pt" for name in (*(f"epoch_{n}" for n in kept), "final")]


def test_damaged_checkpoints_do_not_count_among_the_newest(train):
    run = train(EPOCHS=2, CHECKPOINT_SAVE_INTERVAL=1)
    for number in (7, 8, 9):
        (run / "dit_conditional_ckpts" / f"dit_conditional_epoch_{number}.pt").write_bytes(b"damaged")
    train(CHECKPOINT_SAVE_INTERVAL=1, KEEP_CHECKPOINTS=3)
    assert {f"dit_conditional_epoch_{number}.pt" for number in (2, 3, 4, 7, 8, 9)} <= set(checkpoints_of(run))


def test_validation_is_of_the_same_noise_every_time_and_of_all_classes(train, generator_run, lens_data):
    from dataset import NpyDataset

    model = build_generator(final(generator_run), "final")
    validation = NpyDataset(lens_data, None, "val")
    first = train_diffusion.validation_loss(model, model.network, validation)
    torch.rand(3)
    assert train_diffusion.validation_loss(model, model.network, validation) == first
    assert first == pytest.approx(history_of(generator_run)[-1]["val_loss"])


def test_a_finished_run_is_not_trained_again_and_another_network_is_not_mixed_in(train, capsys):
    run = train(EPOCHS=1)
    path = run / "dit_conditional_ckpts" / "dit_conditional_final.pt"
    before = path.stat().st_mtime_ns
    train(EPOCHS=1)
    assert "nothing to do" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == before
    with pytest.raises(settings.InputError, match="another network"):
        train(LATENT_DIM=64)


# Disks


def test_a_full_disk_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, model_state_dict={}, epoch=1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as raised:
        save_checkpoint(path, model_state_dict={}, epoch=2)
    assert raised.value.filename == str(path)
    assert load_checkpoint(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_file_that_is_not_finished_never_appears(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(ZeroDivisionError), whole(tmp_path / "x") as file:
        file.write(b"new" % (1 / 0))
    assert (tmp_path / "x").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_who_reads_a_file_while_it_is_written_anew_reads_the_old_one(tmp_path):
    (tmp_path / "x").write_text("old")
    with open(tmp_path / "x") as reader:
        with whole(tmp_path / "x") as file:
            file.write(b"new")
        assert reader.read() == "old"
    assert (tmp_path / "x").read_text() == "new"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1.5 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be made here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_the_run_with_one_line_and_the_previous_checkpoint_whole(small_disk, lens_data, capsys):
    flags = [*TINY_TRAINING, "--data_dir", lens_data, "--output_dir", small_disk, "--checkpoint_save_interval", 1]
    with pytest.raises(SystemExit) as ended:
        run_script("train/train_diffusion.py", *flags, "--epochs", 20, "--keep_checkpoints", 20)
    assert ended.value.code == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(str(small_disk))
    assert error.endswith("No space left on device")
    saved = list(small_disk.glob("*ckpts/*.pt"))
    assert saved
    for path in saved:
        assert load_checkpoint(path)["epoch"] >= 1
    assert not list(small_disk.rglob("*.part"))
    assert len(history_of(small_disk)) >= 1


# Bad numbers, memory


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e4])
def test_a_loss_that_is_lost_ends_the_run_with_the_checkpoint_of_a_sound_one(train, monkeypatch, tmp_path, value):
    """Step 5 has a lost loss, so the weights that it was computed with, those after step 4, are not kept."""
    with monkeypatch.context() as patch:
        patch.setattr(flow, "to_velocity", at_step(5, lambda velocity: velocity * value))
        found = r"step 5: loss \S+( and gradient norm \S+)?, where an untrained network has a loss of \S+\. "
        advice = r"Halve LEARNING_RATE 0.002 and run again, which goes on from \S+step_3.pt, whose loss was sound"
        with pytest.raises(settings.InputError, match=found + advice):
            train(CHECKPOINT_SAVE_MINUTES=0)
    (path,) = (tmp_path / "run" / "dit_conditional_ckpts").glob("*.pt")
    content = load_checkpoint(path)
    assert content["step_in_epoch"] == 3
    assert all(value.isfinite().all() for value in content["model_state_dict"].values())


@pytest.mark.parametrize("minutes", [0, 3])
def test_a_run_that_diverges_goes_on_when_its_advice_is_followed(train, capsys, minutes):
    """The advice is followed as often as needed: with a checkpoint of every step, or from the start without any."""
    rate = 1e3
    for _ in range(25):
        try:
            run = train(LEARNING_RATE=rate, EMA_BETA=0.5, CHECKPOINT_SAVE_MINUTES=minutes)
            break
        except settings.InputError as error:
            assert f"Halve LEARNING_RATE {rate:g} and run again, which " in str(error)  # noqa: PT017
            rate /= 2
    assert 1e-3 < rate < 1e3
    assert history_of(run)[-1]["loss"] < 100  # of an untrained network it is about 50
    content = final(run)
    assert all(value.isfinite().all() for value in content["model_state_dict"].values())


@pytest.mark.parametrize(
    ("size", "first"),
    [
        (["--image_size", 8, "--batch_size", 36, "--epochs", 1], 0.125),
        pytest.param(["--image_size", 32, "--batch_size", 16, "--epochs", 2], 1e3, marks=pytest.mark.long),
    ],
)
def test_a_classifier_that_diverges_goes_on_when_its_advice_is_followed(lens_data, tmp_path, capsys, size, first):
    flags = [*size, "--pretrained", "false", "--data_dir", lens_data, "--output_dir", tmp_path]
    flags += ["--checkpoint_save_minutes", 0, "--scratch_learning_rate"]
    rate, status = first, 1
    while status:
        try:
            run_script("train/train_classifier.py", *flags, rate)
            status = 0
        except SystemExit:
            assert f"Halve SCRATCH_LEARNING_RATE {rate:g} and run again, which " in capsys.readouterr().err
            rate /= 2
        assert rate > 1e-4
    assert rate < first / 2
    assert (tmp_path / "classifier_ckpts" / "resnet18_best.pt").exists()


@pytest.mark.parametrize("last", [False, True])
def test_weights_worse_than_untrained_ones_are_no_checkpoint_of_an_epoch(train, monkeypatch, tmp_path, capsys, last):
    original = train_diffusion.validation_loss

    def bad_weights(generator, network, *args):
        found, to_be_saved = original(generator, network, *args), network == generator.network.forward
        return 200 * found if to_be_saved and (len(history_of(tmp_path / "run")) == 4) == last else found

    monkeypatch.setattr(train_diffusion, "validation_loss", bad_weights)
    if last:  # the earlier checkpoint is kept
        with pytest.raises(settings.InputError, match=r"Halve .* which goes on from \S+epoch_2.pt"):
            train()
    else:
        train()
    assert "epoch 2 is not saved: loss" in capsys.readouterr().out or last
    assert set(checkpoints_of(tmp_path / "run")) == {
        f"dit_conditional_{name}.pt" for name in (["epoch_2"] if last else ["final", "epoch_4"])
    }


def test_a_gradient_that_is_no_number_ends_the_run_too(train, monkeypatch):
    def infinite_slope(network, x, noise, t, labels, *args):
        return (network(x, t, labels) * 0).sqrt().sum()

    monkeypatch.setattr(flow, "objective", infinite_slope)
    with pytest.raises(settings.InputError, match="step 1: loss 0 and gradient norm nan"):
        train()


def test_a_run_stopped_by_a_bad_number_goes_on_with_a_lower_rate(straight, train, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(flow, "to_velocity", at_step(5, lambda velocity: velocity * float("nan")))
        with pytest.raises(settings.InputError):
            train(CHECKPOINT_SAVE_MINUTES=0)
    run = train(LEARNING_RATE=1e-3)
    out = capsys.readouterr().out
    assert "is at epoch 0, step 3, going on" in out
    assert "changed since then: LEARNING_RATE 0.002 -> 0.001" in out
    rates = [row["learning_rate"] for row in history_of(run)]
    assert rates == pytest.approx([row["learning_rate"] / 2 for row in history_of(straight)], rel=0.01, abs=1e-6)


def test_the_classifier_stops_at_a_loss_that_is_no_number(lens_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.nn.functional.cross_entropy", lambda logits, labels: logits.sum() * float("nan"))
    flags = ["--image_size", 32, "--batch_size", 32, "--pretrained", "false", "--data_dir", lens_data]
    with pytest.raises(SystemExit):
        run_script("train/train_classifier.py", *flags, "--output_dir", tmp_path)
    error = capsys.readouterr().err
    assert "step 1: loss nan, where an untrained network has a loss of 1.1. Halve SCRATCH_LEARNING_RATE 0.001" in error
    assert "which starts anew" in error
    assert not list((tmp_path / "classifier_ckpts").glob("*.pt"))


def test_a_run_goes_on_in_float16(train):
    train(EPOCHS=1)
    assert len(history_of(train(EPOCHS=2, AMP_DTYPE="float16"))) == 2


def test_steps_that_float16_skips_are_counted(train, monkeypatch, capsys):
    calls = []

    def overflows_twice(*args, original=flow.to_velocity):
        velocity = original(*args)
        calls.append(torch.is_grad_enabled())
        if calls[-1] and sum(calls) in (3, 10):
            velocity.register_hook(lambda gradient: gradient * float("inf"))
        return velocity

    usual = history_of(train(AMP_DTYPE="float16", EPOCHS=2, RESUME="never"))  # a first step may overflow by itself
    monkeypatch.setattr(flow, "to_velocity", overflows_twice)
    rows = history_of(train(AMP_DTYPE="float16", EPOCHS=2, RESUME="never"))
    assert [row["skipped_steps"] - other["skipped_steps"] for row, other in zip(rows, usual, strict=True)] == [1, 1]
    assert "steps skipped in float16" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_what_to_try_next(lens_data, tmp_path, monkeypatch, capsys, error):
    def no_memory(*args):
        raise error

    monkeypatch.setattr(flow, "objective", no_memory)
    flags = [*TINY_TRAINING, "--data_dir", lens_data, "--output_dir", tmp_path, "--accumulate_steps", 2]
    with pytest.raises(SystemExit) as ended:
        run_script("train/train_diffusion.py", *flags)
    assert ended.value.code == 1
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "out of memory with --batch_size 16 in 2 parts: try --accumulate_steps 4, which keeps the batch and takes half "
        "as much"
    )
    monkeypatch.setattr("torch.nn.functional.cross_entropy", no_memory)
    flags = ["--image_size", 32, "--batch_size", 32, "--pretrained", "false", "--data_dir", lens_data]
    with pytest.raises(SystemExit):
        run_script("train/train_classifier.py", *flags, "--output_dir", tmp_path)
    assert "out of memory with --batch_size 32: try --batch_size 16" in capsys.readouterr().err


@pytest.mark.parametrize("parts", [2, 5])
def test_accumulating_keeps_the_effective_batch(straight, train, parts):
    rows = history_of(train(ACCUMULATE_STEPS=parts))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in history_of(straight)], rel=1e-5)


# Long runs


@pytest.mark.parametrize("steps", [2000, pytest.param(20000, marks=pytest.mark.long)])
def test_memory_and_open_files_do_not_grow(lens_data, tmp_path, steps):
    """In a process of its own, from step 1000 on: by then it has done everything that it does once."""
    context = forkserver()
    receiver, sender = context.Pipe()
    flags = [*map(str, TINY_TRAINING), "--data_dir", str(lens_data), "--output_dir", str(tmp_path)]
    flags += ["--batch_size", "1", "--epochs", str(steps // 108 + 1), "--sample_interval", "5"]  # 108 steps an epoch
    process = context.Process(target=train_and_watch, args=("train.train_diffusion", flags, sender))
    process.start()
    sender.close()
    early, end = receiver.recv(), receiver.recv()
    process.join()
    assert end["steps"] >= steps
    assert abs(end["memory"] / early["memory"] - 1) < 0.01
    assert end["files"] <= early["files"]
