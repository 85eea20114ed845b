"""Training learns, writes what it promises, samples from the EMA weights and goes on where it stopped."""

import functools
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY_TRAINING, history_of, run_script
from ema_pytorch import EMA

import settings
from dataset import NpyDataset, diffusion_transforms
from evaluate.evaluate_fld import generate_image, load_model
from models import flow
from models.checkpoint import build_generator, load_checkpoint
from models.model import SIZES, NanoDiT
from settings import InputError
from train import train_diffusion


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
    assert content["global_step"] == 28
    assert "cpu" in content["random_states"]
    assert NanoDiT(**content["model_config"]).patch_size == 16
    assert flow.Sampler(**content["sampler"]) == flow.Sampler(2, 1.5, "euler", "uniform")


def test_samples_come_from_the_ema_weights(train, monkeypatch):
    sampled = []
    monkeypatch.setattr(train_diffusion, "EMA", functools.partial(EMA, update_after_step=0))
    generate = NanoDiT.generate
    monkeypatch.setattr(NanoDiT, "generate", lambda model, labels: sampled.append(model) or generate(model, labels))
    content = load_checkpoint(train(EPOCHS=1, EMA_BETA=0.99) / "dit_conditional_ckpts" / "dit_conditional_final.pt")
    weights = sampled[0].state_dict()["final_layer.linear.weight"]
    assert torch.equal(weights, content["ema_state_dict"]["ema_model.final_layer.linear.weight"])
    assert not torch.allclose(weights, content["model_state_dict"]["final_layer.linear.weight"])


def test_low_precision_trains(train):
    assert history_of(train(EPOCHS=1, AMP_DTYPE="bfloat16"))[0]["loss"] < 60


def test_a_batch_larger_than_the_data_is_one_line(train):
    with pytest.raises(settings.InputError, match="--batch_size 1000 is more than the 108 training images"):
        train(BATCH_SIZE=1000)


def test_a_patch_basis_is_fitted_trained_with_and_kept_in_the_checkpoint(train, lens_data):
    run = train(EPOCHS=2, PATCH_SIZE=64, PATCH_BASIS=32)
    assert history_of(run)[1]["val_loss"] < history_of(run)[0]["val_loss"]
    model = load_model(run / "dit_conditional_ckpts" / "dit_conditional_final.pt", "cpu")
    images = NpyDataset(lens_data, None, "train").images
    lost = (model.decode(model.encode(diffusion_transforms(images))) - images).square().mean().sqrt()
    assert lost < 0.15 * images.std()
    samples = generate_image(model, 1, 2, 1.5, 2)
    assert samples.shape == (2, 1, 64, 64)
    assert not torch.allclose(samples[0], samples[1])
    assert np.load(run / "dit_conditional_npy" / "sample_epoch_2" / "class_1_sample_0.npy").shape == (64, 64)


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"PATCH_SIZE": 3}, "patches of 3 must tile 64 pixels"),
        ({"LATENT_DIM": 30}, "a width of 30 must be a multiple of 4"),
        ({"PATCH_BASIS": 8, "PREDICTION": "velocity"}, 'a patch_basis needs prediction="image"'),
        ({"PATCH_SIZE": 64, "PATCH_BASIS": 200}, "108 images are too few for a patch basis"),
    ],
)
def test_a_network_that_cannot_be_is_one_line(train, constants, message):
    with pytest.raises(settings.InputError, match=message):
        train(**constants)


def test_learning_rate_warms_up_and_decays_to_its_minimum(monkeypatch):
    monkeypatch.setattr(train_diffusion, "LEARNING_RATE", 1e-4)
    monkeypatch.setattr(train_diffusion, "MIN_LEARNING_RATE", 1e-6)
    rates = [train_diffusion.warmup_cosine(step, 10, 110) for step in range(111)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1
    assert rates[60] == pytest.approx((1 + 0.01) / 2)
    assert rates[110] == pytest.approx(0.01)


def test_a_run_that_cannot_end_names_the_size_that_can(monkeypatch, capsys):
    seconds = {2: 2.1, 4: 0.5, 8: 0.012, 16: 0.005, 64: 0.002}  # measured on two CPU cores
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
    assert "--model_size NanoDiT-S/64 --epochs" in capsys.readouterr().out


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


def test_pretrained_weights_are_numbers_and_of_any_wrapper(lens_data, tmp_path, capsys):
    import torchvision

    weights = torchvision.models.resnet18().state_dict()
    torch.save({f"module.{name}": value for name, value in weights.items()}, tmp_path / "wrapped.pth")
    weights["layer1.0.conv1.weight"][0] = float("nan")
    torch.save(weights, tmp_path / "nan.pth")
    flags = ["--image_size", 8, "--batch_size", 108, "--epochs", 1, "--data_dir", lens_data, "--weights_path"]
    run_script("train/train_classifier.py", *flags, tmp_path / "wrapped.pth", "--output_dir", tmp_path / "a")
    with pytest.raises(SystemExit):
        run_script("train/train_classifier.py", *flags, tmp_path / "nan.pth", "--output_dir", tmp_path / "b")
    assert "nan.pth: its weights layer1.0.conv1.weight hold NaN or Inf" in capsys.readouterr().err


def test_a_file_that_is_no_resnet18_is_one_line(lens_data, tmp_path, capsys):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "w.pth")
    flags = ["--batch_size", 16, "--data_dir", lens_data]
    for name in ("w.pth", "absent.pth"):
        with pytest.raises(SystemExit):
            run_script("train/train_classifier.py", *flags, "--weights_path", tmp_path / name)
        assert "no file with weights of a ResNet18" in capsys.readouterr().err.strip().splitlines()[-1]


def test_training_starts_from_the_weights_of_a_checkpoint(checkpoint, lens_data, tmp_path, capsys):
    flags = [*TINY_TRAINING, "--data_dir", lens_data, "--output_dir", tmp_path, "--start_path", checkpoint]
    flags += ["--learning_rate", 1e-30, "--min_learning_rate", 1e-30]
    run_script("train/train_diffusion.py", *flags)
    started = load_checkpoint(tmp_path / "dit_conditional_ckpts" / "dit_conditional_final.pt")
    model = build_generator(load_checkpoint(checkpoint), checkpoint)
    for name, value in model.state_dict().items():
        assert torch.equal(started["model_state_dict"][name], value), name
    with pytest.raises(SystemExit):
        run_script("train/train_diffusion.py", *flags, "--latent_dim", 64)
    assert f"{checkpoint} is of another network, not of hidden_size 64" in capsys.readouterr().err


def test_the_size_of_a_network_to_start_from_is_its_own(checkpoint, lens_data, tmp_path, capsys):
    flags = ["--data_dir", lens_data, "--output_dir", tmp_path, "--start_path", checkpoint, "--batch_size", 16]
    flags += ["--epochs", 1, "--warmup_epochs", 0, "--cfg_scale", 1, "--num_ode_steps", 1, "--ema_update_every", 1]
    run_script("train/train_diffusion.py", *flags)
    assert f"network: that of {checkpoint}\n" in capsys.readouterr().out
    path = tmp_path / "dit_conditional_ckpts" / "dit_conditional_final.pt"
    assert load_checkpoint(path)["model_config"] == load_checkpoint(checkpoint)["model_config"]
    trained, start = (load_checkpoint(of)["model_state_dict"] for of in (path, checkpoint))
    assert not torch.equal(trained["blocks.0.mlp.fc1.weight"], start["blocks.0.mlp.fc1.weight"])
    assert torch.equal(trained["pos_embed"], start["pos_embed"])
    with pytest.raises(SystemExit):
        run_script("train/train_diffusion.py", *flags, "--model_size", "NanoDiT-S/8")
    assert "is of another network, not of patch_size 8, hidden_size 192, depth 6" in capsys.readouterr().err


def test_a_size_beside_a_named_one_counts_and_is_said(train, capsys):
    run = train(MODEL_SIZE="NanoDiT-S/16", MODEL_DEPTH=1, LATENT_DIM=None, MODEL_HEADS=None, EPOCHS=1)
    assert "network: NanoDiT-S/16, but patch_size 16, but depth 1, but prediction image\n" in capsys.readouterr().out
    config = load_checkpoint(run / "dit_conditional_ckpts" / "dit_conditional_final.pt")["model_config"]
    assert (config["depth"], config["hidden_size"], config["num_heads"]) == (1, 192, 3)


@pytest.mark.parametrize(
    ("constants", "complaint"),
    [
        ({"CFG_SCALE": 5.0, "LABEL_DROPOUT": 0.0}, "CFG_SCALE 5 needs hidden labels: raise LABEL_DROPOUT"),
        ({"CFG_SCALE": 0.0, "LABEL_DROPOUT": 0.0}, "CFG_SCALE 0 needs hidden labels"),
        ({"WARMUP_EPOCHS": 4.0}, "WARMUP_EPOCHS 4 must be less than EPOCHS 4"),
        ({"EMA_UPDATE_EVERY": 29}, "EMA_UPDATE_EVERY 29 is more than all steps"),
        ({"PATCH_BASIS": 257}, "no such network: a patch of 16x16 pixels has fewer principal components: 257"),
        ({"BATCH_SIZE": 109}, "--batch_size 109 is more than the 108 training images"),
        ({"MIN_LEARNING_RATE": 0.01}, "MIN_LEARNING_RATE 0.01 is more than LEARNING_RATE 0.002"),
    ],
)
def test_settings_that_defeat_each_other_are_named(train, tmp_path, constants, complaint):
    with pytest.raises(InputError, match=complaint) as raised:
        train(**constants)
    assert raised.value.status == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("label_dropout", value) for value in (1, 2)),
        *(("ema_beta", value) for value in (1, 1.5)),
        *(("adam_beta2", value) for value in (1, 1.5)),
        *(("time_median", value) for value in (0, 1)),
        *(("time_width", 0), ("max_grad_norm", 0), ("img_size", 32), ("num_ode_steps", 0), ("cfg_scale", -1)),
        *(("prediction", "Image"), ("time_sampling", "Uniform"), ("solver", "Euler")),
    ],
)
def test_a_value_that_cannot_be_is_one_line_from_a_flag_and_from_the_script(capsys, flag, value):
    for name, flags in ((None, [f"--{flag}", str(value)]), (flag.upper(), [])):
        script = vars(train_diffusion).copy()
        if name:
            script[name] = value
        with pytest.raises(SystemExit) as stopped:
            settings.from_flags(script, flags)
        assert stopped.value.code == 2
        assert re.search(rf"{flag}.* is not ", capsys.readouterr().err, re.I)


@pytest.mark.parametrize("pixels", [4, 7, 2000])
def test_a_classifier_is_of_a_size_that_can_be_loaded(lens_data, capsys, pixels):
    with pytest.raises(SystemExit) as stopped:
        run_script("train/train_classifier.py", "--data_dir", lens_data, "--image_size", pixels)
    assert stopped.value.code == 2
    assert f"{pixels} is not a number from 8 to 1,024" in capsys.readouterr().err


def test_a_classifier_of_ten_steps_in_all(lens_data, tmp_path):
    flags = ["--image_size", 8, "--batch_size", 11, "--epochs", 1, "--pretrained", "false", "--data_dir", lens_data]
    run_script("train/train_classifier.py", *flags, "--output_dir", tmp_path)
    assert (tmp_path / "classifier_ckpts" / "resnet18_step_10.pt").exists()


@pytest.mark.parametrize("script", ["train_diffusion", "train_classifier"])
def test_a_class_without_images_ends_a_training_at_its_start(data_copy, tmp_path, capsys, script):
    for path in (data_copy / "axion").glob("*.npy"):
        path.unlink()
    flags = ["--data_dir", data_copy, "--output_dir", tmp_path / "run", "--batch_size", 16]
    with pytest.raises(SystemExit) as stopped:
        run_script(f"train/{script}.py", *flags)
    assert stopped.value.code == 2
    assert "axion: no .npy files in it" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    if script == "train_diffusion":
        flags += [*TINY_TRAINING, "--epochs", 1, "--on_missing_class", "go_on"]
        run_script(f"train/{script}.py", *flags)
        assert (tmp_path / "run" / "dit_conditional_ckpts" / "dit_conditional_final.pt").exists()


def test_a_new_classifier_keeps_the_older_one(classifier_run, lens_data, tmp_path, capsys):
    run = shutil.copytree(classifier_run, tmp_path / "run")
    best = (run / "classifier_ckpts" / "resnet18_best.pt").read_bytes()
    flags = ["--image_size", 32, "--batch_size", 16, "--epochs", 1, "--pretrained", "false", "--data_dir", lens_data]
    run_script("train/train_classifier.py", *flags, "--output_dir", run, "--resume", "never", "--seed", 7)
    assert (run / "earlier_1" / "classifier_ckpts" / "resnet18_best.pt").read_bytes() == best
    assert len(history_of(run)) == 1
    for path in (run / "classifier_ckpts").glob("resnet18_step_*.pt"):
        path.unlink()
    best = (run / "classifier_ckpts" / "resnet18_best.pt").read_bytes()
    run_script("train/train_classifier.py", *flags, "--output_dir", run)  # which finds nothing to go on from
    assert (run / "earlier_2" / "classifier_ckpts" / "resnet18_best.pt").read_bytes() == best
    path = next((run / "earlier_1" / "classifier_ckpts").glob("resnet18_step_*.pt"))
    run_script("train/train_classifier.py", *flags, "--epochs", 3, "--output_dir", tmp_path / "on", "--resume", path)
    assert f"{tmp_path / 'on' / 'classifier_ckpts' / path.name} is at epoch" in capsys.readouterr().out
