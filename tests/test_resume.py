"""A run comes back after a kill, a signal, a full disk or a bad number just where it was, and says what went wrong."""

import errno
import multiprocessing
import os
import signal
import subprocess

import pytest
import torch
from conftest import TINY_TRAINING, history_of, run_script
from kill_training import kill_and_compare, same, train_and_watch

import settings
from files import whole
from models import flow
from models.checkpoint import load_checkpoint, save_checkpoint
from train import train_diffusion


def final(run):
    """The last checkpoint of a run, but for the settings, which name its folder."""
    content = load_checkpoint(run / "dit_conditional_ckpts" / "dit_conditional_final.pt")
    content.pop("settings")
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
        ("diffusion", 20),
        ("classifier", 1),
        pytest.param("diffusion", 500, marks=pytest.mark.long),
        pytest.param("classifier", 20, marks=pytest.mark.long),
    ],
)
def test_a_run_killed_anywhere_and_resumed_ends_bit_for_bit_as_one_that_was_not(lens_data, tmp_path, training, kills):
    while_writing = kill_and_compare(training, lens_data, tmp_path, kills, seed=0)
    assert len(while_writing) == kills
    assert sum(while_writing) >= kills // 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_the_run_goes_on_from_there(straight, train, monkeypatch, capsys, number):
    calls = []

    def ends_the_job(*args, original=flow.velocity_loss):
        calls.append(1)
        if len(calls) == 11:  # seven steps of an epoch, its validation, and three
            os.kill(os.getpid(), number)
        return original(*args)

    monkeypatch.setattr(flow, "velocity_loss", ends_the_job)
    run = train()
    assert len(calls) == 11
    assert [path.name for path in (run / "dit_conditional_ckpts").glob("*step*")] == ["dit_conditional_step_10.pt"]
    assert "run the script again to go on" in capsys.readouterr().out
    train()
    assert "is at epoch 1, step 3, going on" in capsys.readouterr().out
    assert same(final(straight), final(run))


def test_a_second_signal_ends_at_once(train, monkeypatch):
    def pressed_twice(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a run before in this process has set its own
    monkeypatch.setattr(flow, "velocity_loss", pressed_twice)
    with pytest.raises(KeyboardInterrupt):
        train()


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
    losses = iter([5.0, 1.0, 4.0, 3.0, 2.0, 6.0])
    monkeypatch.setattr(train_diffusion, "validation_loss", lambda *args: next(losses))
    run = train(EPOCHS=6, CHECKPOINT_SAVE_INTERVAL=1, CHECKPOINT_SAVE_STEPS=3, KEEP_CHECKPOINTS=keep, SAMPLE_INTERVAL=9)
    names = sorted(path.name for path in (run / "dit_conditional_ckpts").iterdir())
    assert names == [f"dit_conditional_{name}.pt" for name in (*(f"epoch_{n}" for n in kept), "final")]


def test_validation_is_of_the_same_noise_every_time_and_of_all_classes(train, generator_run, lens_data):
    from dataset import NpyDataset
    from models.checkpoint import build_generator

    model = build_generator(final(generator_run), "final")
    validation = NpyDataset(lens_data, None, "val")
    first = train_diffusion.validation_loss(model, validation, flow.T_FLOOR)
    torch.rand(3)
    assert train_diffusion.validation_loss(model, validation, flow.T_FLOOR) == first
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


def bad_from(step, value):
    """A loss that is no number from a step on."""
    calls = []

    def loss(velocity, *args, original=flow.velocity_loss):
        calls.append(1)
        return velocity.sum() * value if len(calls) >= step else original(velocity, *args)

    return loss


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_run_with_a_checkpoint_from_before(train, monkeypatch, tmp_path, value):
    with monkeypatch.context() as patch:
        patch.setattr(flow, "velocity_loss", bad_from(5, value))
        with pytest.raises(settings.InputError, match=r"step 5: loss (nan|-?inf) .* rate of 0\.00.*MAX_GRAD_NORM"):
            train()
    content = load_checkpoint(tmp_path / "run" / "dit_conditional_ckpts" / "dit_conditional_step_4.pt")
    assert content["step_in_epoch"] == 4
    assert all(value.isfinite().all() for value in content["model_state_dict"].values())


def test_a_gradient_that_is_no_number_ends_the_run_too(train, monkeypatch):
    def infinite_slope(velocity, *args):
        return (velocity * 0).sqrt().sum()

    monkeypatch.setattr(flow, "velocity_loss", infinite_slope)
    with pytest.raises(settings.InputError, match="step 1: loss 0 and gradient norm nan"):
        train()


def test_a_run_stopped_by_a_bad_number_goes_on_with_a_lower_rate(straight, train, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(flow, "velocity_loss", bad_from(5, float("nan")))
        with pytest.raises(settings.InputError):
            train()
    run = train(LEARNING_RATE=1e-3)
    assert "changed since then: LEARNING_RATE 0.002 -> 0.001" in capsys.readouterr().out
    rates = [row["learning_rate"] for row in history_of(run)]
    assert rates == pytest.approx([row["learning_rate"] / 2 for row in history_of(straight)], rel=0.01, abs=1e-6)


def test_the_classifier_stops_at_a_loss_that_is_no_number(lens_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.nn.functional.cross_entropy", lambda logits, labels: logits.sum() * float("nan"))
    flags = ["--image_size", 32, "--batch_size", 32, "--pretrained", "false", "--data_dir", lens_data]
    with pytest.raises(SystemExit):
        run_script("train/train_classifier.py", *flags, "--output_dir", tmp_path)
    assert "step 1: loss nan at a learning rate of" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "classifier_ckpts" / "resnet18_step_0.pt")["step_in_epoch"] == 0


def test_steps_that_float16_skips_are_counted(train, monkeypatch, capsys):
    calls = []

    def overflows_twice(velocity, *args, original=flow.velocity_loss):
        calls.append(1)
        if len(calls) in (3, 10):
            velocity.register_hook(lambda gradient: gradient * float("inf"))
        return original(velocity, *args)

    usual = history_of(train(AMP_DTYPE="float16", EPOCHS=2, RESUME="never"))  # a first step may overflow by itself
    monkeypatch.setattr(flow, "velocity_loss", overflows_twice)
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

    monkeypatch.setattr(flow, "velocity_loss", no_memory)
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
    """In a process of its own, from step 200 on."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe()
    flags = [*map(str, TINY_TRAINING), "--data_dir", str(lens_data), "--output_dir", str(tmp_path)]
    flags += ["--batch_size", "1", "--epochs", str(steps // 108 + 1), "--sample_interval", "5"]  # 108 steps an epoch
    process = context.Process(target=train_and_watch, args=("train.train_diffusion", flags, sender))
    process.start()
    sender.close()
    early, end = receiver.recv(), receiver.recv()
    process.join()
    assert end["steps"] >= steps
    assert abs(end["memory"] / early["memory"] - 1) < 0.02
    assert end["files"] <= early["files"]
