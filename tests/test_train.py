"""Training learns, writes what it promises, samples from the EMA weights and goes on where it stopped."""

import contextlib
import csv
import errno
import functools
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import TINY_TRAINING, run_script
from ema_pytorch import EMA

import settings
from models import checkpoint as checkpoint_module
from models import flow
from models.checkpoint import load_checkpoint, save_checkpoint
from models.model import SIZES, NanoDiT
from train import train_diffusion


def history_of(run):
    with open(run / "training_metrics.csv") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture
def train(monkeypatch, lens_data, tmp_path):
    """Runs main() of train_diffusion with the tiny settings, in this process, and returns its OUTPUT_DIR."""

    def run(output=tmp_path / "run", **constants):
        script = vars(train_diffusion).copy()
        settings.from_flags(
            script, [*map(str, TINY_TRAINING), "--data_dir", str(lens_data), "--output_dir", str(output)]
        )
        for name, value in ({k: v for k, v in script.items() if k.isupper()} | constants).items():
            monkeypatch.setattr(train_diffusion, name, value)
        train_diffusion.main()
        return output

    return run


def test_every_promised_file_is_there(generator_run):
    for path in (
        "training_metrics.png",
        "training_metrics.csv",
        "dit_conditional_images/sample_epoch_2.png",
        "dit_conditional_images/sample_epoch_4.png",
        "dit_conditional_npy/sample_epoch_4/class_2_sample_1.npy",
        "dit_conditional_ckpts/dit_conditional_epoch_2.pt",
        "dit_conditional_ckpts/dit_conditional_epoch_4.pt",
        "dit_conditional_ckpts/dit_conditional_final.pt",
    ):
        assert (generator_run / path).stat().st_size > 0, path
    sample = np.load(generator_run / "dit_conditional_npy/sample_epoch_4/class_0_sample_0.npy")
    assert sample.shape == (64, 64)
    assert sample.min() >= 0
    assert sample.max() <= 1


def test_the_loss_falls_and_the_csv_has_it(generator_run):
    history = history_of(generator_run)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["learning_rate"] < history[1]["learning_rate"] <= 2e-3


def test_a_checkpoint_holds_all_that_training_needs_and_the_networks_configuration(checkpoint):
    content = load_checkpoint(checkpoint)
    for part in ("model", "ema", "optimizer", "scheduler", "scaler"):
        assert f"{part}_state_dict" in content
    assert content["epoch"] == 4
    assert content["global_step"] == 24
    assert "cpu" in content["random_states"]
    assert NanoDiT(**content["model_config"]).patch_size == 16


def test_samples_come_from_the_ema_weights(train, monkeypatch):
    sampled = []
    monkeypatch.setattr(train_diffusion, "EMA", functools.partial(EMA, update_after_step=0))
    monkeypatch.setattr(flow, "sample", lambda model, *args, **kw: sampled.append(model) or torch.zeros(6, 1, 64, 64))
    content = load_checkpoint(train(EPOCHS=1, EMA_BETA=0.99) / "dit_conditional_ckpts" / "dit_conditional_final.pt")
    weights = sampled[0].state_dict()["final_layer.linear.weight"]
    assert torch.equal(weights, content["ema_state_dict"]["ema_model.final_layer.linear.weight"])
    assert not torch.allclose(weights, content["model_state_dict"]["final_layer.linear.weight"])


def test_a_resumed_run_ends_as_one_that_was_never_stopped(generator_run, train, tmp_path, capsys):
    copy = tmp_path / "stopped"
    (copy / "dit_conditional_ckpts").mkdir(parents=True)
    shutil.copy(generator_run / "dit_conditional_ckpts" / "dit_conditional_epoch_2.pt", copy / "dit_conditional_ckpts")
    train(copy)
    assert "at epoch 2, going on" in capsys.readouterr().out
    ends = [load_checkpoint(run / "dit_conditional_ckpts/dit_conditional_final.pt") for run in (generator_run, copy)]
    for part in ("model_state_dict", "ema_state_dict"):
        for name, value in ends[0][part].items():
            torch.testing.assert_close(ends[1][part][name], value, rtol=1e-5, atol=1e-6)
    straight, resumed = history_of(generator_run), history_of(copy)
    assert [row["loss"] for row in straight] == pytest.approx([row["loss"] for row in resumed], rel=1e-5)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the script runs any more."""


def same(a, b) -> bool:
    """Whether two parts of checkpoints are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != "images_per_second")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def final(run):
    return load_checkpoint(run / "dit_conditional_ckpts" / "dit_conditional_final.pt")


@pytest.fixture(scope="module")
def straight(lens_data, tmp_path_factory):
    """The last checkpoint of a run of 24 steps that was never stopped."""
    run = tmp_path_factory.mktemp("straight")
    run_script("train/train_diffusion.py", *TINY_TRAINING, "--data_dir", lens_data, "--output_dir", run)
    return run


@pytest.mark.parametrize("seed", range(6))
def test_a_run_killed_anywhere_and_resumed_ends_bit_for_bit_as_one_that_was_not(straight, train, tmp_path, seed):
    """Killed three times, in a step or while a checkpoint is written, with one every two steps."""
    moments = np.random.default_rng(seed).integers(1, 20, 3)
    for moment in moments:
        with pytest.MonkeyPatch.context() as patch:
            at, where = (flow, "velocity_loss") if moment % 2 else (checkpoint_module.os, "replace")
            original, calls = getattr(at, where), []

            def dies(*args, original=original, calls=calls, moment=moment):
                calls.append(1)
                if len(calls) > moment // 2:
                    raise Killed
                return original(*args)

            patch.setattr(at, where, dies)
            with contextlib.suppress(Killed):
                train(CHECKPOINT_SAVE_STEPS=2)
    run = train(CHECKPOINT_SAVE_STEPS=2)
    assert same(final(straight), final(run))
    rows = history_of(run)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert [row["loss"] for row in rows] == [row["loss"] for row in history_of(straight)]
    assert not list((run / "dit_conditional_ckpts").glob("*step*"))


def test_sigterm_finishes_the_step_saves_and_the_run_goes_on_from_there(straight, train, monkeypatch, tmp_path, capsys):
    calls = []

    def ends_the_job(*args, original=flow.velocity_loss):
        calls.append(1)
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(flow, "velocity_loss", ends_the_job)
    run = train()
    assert len(calls) == 9
    assert [path.name for path in (run / "dit_conditional_ckpts").glob("*step*")] == ["dit_conditional_step_9.pt"]
    assert "run the script again to go on" in capsys.readouterr().out
    train()
    assert "is at epoch 1, step 3, going on" in capsys.readouterr().out
    assert same(final(straight), final(run))


def test_the_newest_whole_checkpoint_is_taken_and_a_damaged_one_named(straight, train, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(straight / "dit_conditional_ckpts", run / "dit_conditional_ckpts")
    path = run / "dit_conditional_ckpts" / "dit_conditional_final.pt"
    whole = path.read_bytes()
    place = whole.index(final(straight)["model_state_dict"]["pos_embed"].numpy().tobytes()[:64])
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])  # one bit, in a weight
    (run / "dit_conditional_ckpts" / "dit_conditional_epoch_4.pt").write_bytes(whole[: len(whole) // 2])
    train(run)
    out = capsys.readouterr().out
    assert "dit_conditional_final.pt: damaged: its checksum does not match its content: going on from an older" in out
    assert "dit_conditional_epoch_4.pt: not a checkpoint, a damaged one" in out
    assert "dit_conditional_epoch_2.pt is at epoch 2, going on" in out
    assert same(final(straight), final(run))
    for broken in run.glob("dit_conditional_ckpts/*.pt"):
        broken.write_bytes(b"")
    with pytest.raises(settings.InputError, match="no whole checkpoint: remove them, or --resume never"):
        train(run)
    train(run, RESUME="never", EPOCHS=1)


def test_a_full_disk_leaves_the_older_checkpoint(straight, tmp_path, monkeypatch):
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


def test_a_finished_run_is_not_trained_again_and_another_network_is_not_mixed_in(
    train, generator_run, tmp_path, capsys
):
    copy = shutil.copytree(generator_run, tmp_path / "copy")
    before = (copy / "dit_conditional_ckpts" / "dit_conditional_final.pt").stat().st_mtime_ns
    train(copy)
    assert "nothing to do" in capsys.readouterr().out
    assert (copy / "dit_conditional_ckpts" / "dit_conditional_final.pt").stat().st_mtime_ns == before
    with pytest.raises(settings.InputError, match="another network"):
        train(copy, LATENT_DIM=64)


def test_low_precision_trains(train):
    assert history_of(train(EPOCHS=1, AMP_DTYPE="bfloat16"))[0]["loss"] < 60


def test_a_batch_larger_than_the_data_is_one_line(train):
    with pytest.raises(settings.InputError, match="--batch_size 1000 is more than the 108 training images"):
        train(BATCH_SIZE=1000)


def test_a_loss_that_is_not_finite_ends_the_run_with_the_remedies(train, monkeypatch):
    monkeypatch.setattr(flow, "velocity_loss", lambda velocity, *args: velocity.sum() * float("nan"))
    with pytest.raises(settings.InputError, match="not finite: reduce LEARNING_RATE"):
        train()


def test_learning_rate_warms_up_and_decays_to_its_minimum(monkeypatch):
    monkeypatch.setattr(train_diffusion, "LEARNING_RATE", 1e-4)
    monkeypatch.setattr(train_diffusion, "MIN_LEARNING_RATE", 1e-6)
    rates = [train_diffusion.warmup_cosine(step, 10, 110) for step in range(111)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1
    assert rates[60] == pytest.approx((1 + 0.01) / 2)
    assert rates[110] == pytest.approx(0.01)


def test_a_run_that_cannot_end_names_the_size_that_can(monkeypatch, capsys):
    seconds = {2: 2.1, 4: 0.5, 8: 0.012, 16: 0.005}  # measured on two CPU cores
    monkeypatch.setattr(train_diffusion, "seconds_an_image", lambda network, device: seconds[network["patch_size"]])
    cpu = torch.device("cpu")
    train_diffusion.warn_if_endless(SIZES["NanoDiT-B/2"], 63000 * 600, cpu)
    assert capsys.readouterr().out.splitlines() == [
        "This run would take about 2.5 years on this machine (cpu).",
        "--model_size NanoDiT-S/8 would take 5.2 days; its settings are at the top of this script.",
    ]
    train_diffusion.warn_if_endless(SIZES["NanoDiT-S/8"], 35000, cpu)
    assert capsys.readouterr().out == ""
    train_diffusion.warn_if_endless(SIZES["NanoDiT-B/2"], 63000 * 6000, cpu)
    assert "--model_size NanoDiT-S/16 --epochs" in capsys.readouterr().out


def test_a_step_is_timed(monkeypatch):
    tiny = {"patch_size": 16, "hidden_size": 16, "depth": 1, "num_heads": 1, "prediction": "image"}
    assert 0 < train_diffusion.seconds_an_image(tiny, torch.device("cpu")) < 1


# The classifier


def test_the_classifier_writes_what_it_promises(classifier_run):
    for path in (
        "classifier_ckpts/resnet18_best.pt",
        "training_metrics.png",
        "training_metrics.csv",
        "confusion_matrix.png",
    ):
        assert (classifier_run / path).stat().st_size > 0, path
    best = load_checkpoint(classifier_run / "classifier_ckpts" / "resnet18_best.pt")
    assert best["val_accuracy"] == max(row["val_accuracy"] for row in history_of(classifier_run))


def test_pretrained_weights_train_the_last_layers_only(lens_data, tmp_path, monkeypatch, capsys):
    import torchvision

    torch.manual_seed(1)
    weights = torchvision.models.resnet18(num_classes=1000).state_dict()
    torch.save(weights, tmp_path / "resnet18.pth")
    flags = ["--image_size", 32, "--batch_size", 32, "--epochs", 1, "--weights_path", tmp_path / "resnet18.pth"]
    run_script("train/train_classifier.py", *flags, "--data_dir", lens_data, "--output_dir", tmp_path / "run")
    trained = load_checkpoint(tmp_path / "run/classifier_ckpts/resnet18_best.pt")["model_state_dict"]
    changed = {name for name, value in weights.items() if "fc" not in name and not torch.equal(trained[name], value)}
    changed = {name.split(".")[0] for name in changed if "running" not in name and "num_batches" not in name}
    assert changed == {"layer3", "layer4"}
    assert trained["fc.weight"].shape == (3, 512)


def test_without_weights_and_network_every_layer_is_trained(lens_data, tmp_path, monkeypatch, capsys):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    flags = ["--image_size", 32, "--batch_size", 32, "--epochs", 1, "--output_dir", tmp_path / "run"]
    run_script("train/train_classifier.py", *flags, "--data_dir", lens_data)
    out = capsys.readouterr().out
    assert "cannot be fetched (--weights_path takes a file): training from scratch" in out
    assert "11,178,051 trainable parameters" in out


def test_a_file_that_is_no_resnet18_is_one_line(lens_data, tmp_path, capsys):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "w.pth")
    flags = ["--batch_size", 16, "--data_dir", lens_data]
    for name in ("w.pth", "absent.pth"):
        with pytest.raises(SystemExit):
            run_script("train/train_classifier.py", *flags, "--weights_path", tmp_path / name)
        assert "no file with weights of a ResNet18" in capsys.readouterr().err.strip().splitlines()[-1]
