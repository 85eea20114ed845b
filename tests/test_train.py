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
from models import flow
from models.checkpoint import load_checkpoint
from models.classifier import build_classifier
from models.generator import SIZES, Generator, build_generator, build_untrained, generate_image, load_model
from models.model import NanoDiT
from settings import InputError
from train import train_classifier, train_diffusion
from train.run import seconds_an_image

COMPONENTS = {"MODEL_SIZE": "ComponentMLP-512", "PATCH_SIZE": None, "MODEL_HEADS": None}
LENSES = ("axion", "cdm", "no_sub")

pytestmark = pytest.mark.usefixtures("undrawn")


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
    for part in ("model", "ema", "optimizer", "scaler"):
        assert f"{part}_state_dict" in content
    assert (content["epoch"], content["step_in_epoch"], content["steps_per_epoch"]) == (4, 0, 7)
    assert content["network"] == "NanoDiT"
    assert (content["classes"], content["image_shape"]) == (["axion", "cdm", "no_sub"], [1, 64, 64])
    assert NanoDiT(**content["model_config"]).patch_size == 16
    assert flow.Sampler(**content["sampler"]) == flow.Sampler(2, 1.5, "euler", "uniform")


def test_samples_come_from_the_ema_weights(train, monkeypatch):
    sampled = []
    monkeypatch.setattr(train_diffusion, "EMA", functools.partial(EMA, update_after_step=0))
    generate = Generator.generate
    monkeypatch.setattr(Generator, "generate", lambda model, labels: sampled.append(model) or generate(model, labels))
    content = load_checkpoint(train(EPOCHS=1, EMA_BETA=0.99) / "dit_conditional_ckpts" / "dit_conditional_final.pt")
    weights = sampled[0].network.state_dict()["final_layer.linear.weight"]
    assert torch.equal(weights, content["ema_state_dict"]["ema_model.final_layer.linear.weight"])
    assert not torch.allclose(weights, content["model_state_dict"]["final_layer.linear.weight"])


def test_low_precision_trains(train):
    assert history_of(train(EPOCHS=1, AMP_DTYPE="bfloat16"))[0]["loss"] < 60


def test_a_batch_larger_than_the_data_is_one_line(train):
    with pytest.raises(settings.InputError, match="--batch_size 1000 is more than the 108 training images"):
        train(BATCH_SIZE=1000)


@pytest.fixture
def few_components(monkeypatch):
    """The small generator takes 32 components: 108 images do not have more."""
    monkeypatch.setitem(SIZES, "ComponentMLP-512", SIZES["ComponentMLP-512"] | {"components": 32})


def test_components_are_fitted_trained_with_and_kept_in_the_checkpoint(train, lens_data, few_components):
    run = train(EPOCHS=2, **COMPONENTS)
    assert history_of(run)[1]["val_loss"] < history_of(run)[0]["val_loss"]
    model = load_model(run / "dit_conditional_ckpts" / "dit_conditional_final.pt", "cpu")
    images = NpyDataset(lens_data, None, "train").images
    assert torch.equal(model.network.standard_deviation, model.codec.standard_deviation)
    lost = (model.decode(model.encode(diffusion_transforms(images))) - images).square().mean().sqrt()
    assert lost < 0.15 * images.std()
    samples = generate_image(model, 1, 2, 1.5, 2)
    assert samples.shape == (2, 1, 64, 64)
    assert not torch.allclose(samples[0], samples[1])
    assert np.load(run / "dit_conditional_npy" / "sample_epoch_2" / "class_1_sample_0.npy").shape == (64, 64)


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"PATCH_SIZE": 65}, "a patch of 65 must lie within 64 pixels"),
        ({"LATENT_DIM": 30}, "a width of 30 must be a multiple of 4"),
        (COMPONENTS | {"PREDICTION": "velocity"}, 'components need prediction="image"'),
    ],
)
def test_a_network_that_cannot_be_is_one_line(train, constants, message):
    with pytest.raises(settings.InputError, match=message):
        train(**constants)


def test_learning_rate_warms_up_and_decays_to_its_minimum(monkeypatch):
    monkeypatch.setattr(train_diffusion, "LEARNING_RATE", 1e-4)
    monkeypatch.setattr(train_diffusion, "MIN_LEARNING_RATE", 1e-6)
    rates = [train_diffusion.warmup_cosine(10, 110, step) for step in range(111)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1
    assert rates[60] == pytest.approx((1 + 0.01) / 2)
    assert rates[110] == pytest.approx(0.01)


def test_a_run_that_cannot_end_names_the_size_that_can(monkeypatch, capsys):
    seconds = {2: 2.1, 4: 0.5, 8: 0.012, 16: 0.005, None: 0.002}  # measured on two CPU cores

    def measured(generator, batch_size):
        return seconds[getattr(generator.network, "patch_size", None)]

    monkeypatch.setattr(train_diffusion, "seconds_an_image", measured)
    published = build_untrained("NanoDiT-B/2", LENSES, (1, 64, 64))
    train_diffusion.announce(published, 63000 * 600)
    assert capsys.readouterr().out.splitlines() == [
        "29,283,844 trainable parameters, training on cpu",
        "This run would take about 2.5 years on this machine (cpu).",
        "--model_size NanoDiT-S/8 would take 5.2 days; see --recipe for its settings.",
    ]
    train_diffusion.announce(build_untrained("NanoDiT-S/8", LENSES, (1, 64, 64)), 35000)
    assert len(capsys.readouterr().out.splitlines()) == 1
    train_diffusion.announce(published, 63000 * 6000)
    assert "--model_size ComponentMLP-512 --epochs" in capsys.readouterr().out


def test_a_size_that_small_images_have_too_few_pixels_for_is_not_named(monkeypatch, capsys):
    monkeypatch.setattr(train_diffusion, "seconds_an_image", lambda *_: 1.0)
    train_diffusion.announce(build_untrained("NanoDiT-S/16", LENSES, (1, 16, 16)), 10**9)
    assert "--model_size NanoDiT-S/16 --epochs" in capsys.readouterr().out


def test_the_last_time_lies_before_the_grid_begins(train, capsys):
    with pytest.raises(SystemExit):
        run_script("train/train_diffusion.py", "--last_time", 0.9)
    assert "0.9 is not a number above 0 and below 0.9" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "changes"), [("NanoDiT-S/16", {"depth": 1}), ("ComponentMLP-512", {"depth": 1})])
def test_a_step_is_timed(size, changes):
    tiny = build_untrained(size, LENSES, (1, 64, 64), hidden_size=24, **changes)
    assert 0 < seconds_an_image(tiny, 16) < 1
    assert all(parameter.grad is None for parameter in tiny.parameters())


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


def test_pretrained_weights_of_any_wrapper_train_the_last_layers_only(lens_data, tmp_path):
    import torchvision

    torch.manual_seed(1)
    weights = torchvision.models.resnet18(num_classes=1000).state_dict()
    torch.save({f"module.{name}": value for name, value in weights.items()}, tmp_path / "resnet18.pth")
    flags = ["--image_size", 32, "--batch_size", 32, "--epochs", 1, "--weights_path", tmp_path / "resnet18.pth"]
    run_script("train/train_classifier.py", *flags, "--data_dir", lens_data, "--output_dir", tmp_path / "run")
    trained = load_checkpoint(tmp_path / "run/classifier_ckpts/resnet18_best.pt")["model_state_dict"]
    changed = {name for name, value in weights.items() if "fc" not in name and not torch.equal(trained[name], value)}
    changed = {name.split(".")[0] for name in changed if "running" not in name and "num_batches" not in name}
    assert changed == {"layer3", "layer4"}
    assert trained["fc.weight"].shape == (3, 512)


def test_a_first_layer_without_pretrained_weights_is_trained(monkeypatch):
    for channels, trained in ((3, False), (4, True)):
        model = build_classifier(32, LENSES, channels)
        train_classifier.trained_layers(model, True)
        assert model.conv1.weight.requires_grad == trained
        assert not model.layer1[0].conv1.weight.requires_grad


def test_pretrained_weights_are_numbers(lens_data, tmp_path, capsys):
    import torchvision

    weights = torchvision.models.resnet18().state_dict()
    weights["layer1.0.conv1.weight"][0] = float("nan")
    torch.save(weights, tmp_path / "nan.pth")
    flags = ["--batch_size", 108, "--data_dir", lens_data, "--weights_path", tmp_path / "nan.pth"]
    with pytest.raises(SystemExit):
        run_script("train/train_classifier.py", *flags, "--output_dir", tmp_path)
    assert "nan.pth: its weights layer1.0.conv1.weight hold NaN or Inf" in capsys.readouterr().err


def test_without_weights_and_network_every_layer_is_trained_if_only_for_ten_steps(
    lens_data, tmp_path, monkeypatch, capsys
):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    flags = ["--image_size", 8, "--batch_size", 11, "--epochs", 1, "--output_dir", tmp_path / "run"]
    run_script("train/train_classifier.py", *flags, "--data_dir", lens_data)
    out = capsys.readouterr().out
    assert "cannot be fetched (--weights_path takes a file): training from scratch" in out
    assert "11,178,051 trainable parameters" in out
    final = load_checkpoint(tmp_path / "run" / "classifier_ckpts" / "resnet18_final.pt")
    assert final["steps_per_epoch"] == 10  # with ten steps, a one-cycle rate can divide by zero
    assert final["pretrained"] is False


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
    for name, value in model.network.state_dict().items():
        assert torch.equal(started["model_state_dict"][name], value), name
    run = tmp_path / "dit_conditional_ckpts" / "dit_conditional_final.pt"
    for output, named, advice in (
        ("new", checkpoint, "leave that to it"),
        (".", run, "choose another --output_dir for this one"),
    ):
        with pytest.raises(SystemExit):
            run_script("train/train_diffusion.py", *flags, "--latent_dim", 64, "--output_dir", tmp_path / output)
        assert f"{named} is of another network, not of hidden_size 64: {advice}" in capsys.readouterr().err


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
    assert (
        "is of another network, not of hidden_size 192, depth 6, num_heads 3, patch_size 8" in capsys.readouterr().err
    )


def test_a_network_of_other_classes_is_nothing_to_start_from(checkpoint, data_copy, train):
    (data_copy / "cdm").rename(data_copy / "wdm")
    message = "final.pt is of the classes axion, cdm, no_sub, but .* of the classes axion, no_sub, wdm: .*--start_path"
    with pytest.raises(InputError, match=message):
        train(DATA_DIR=str(data_copy), START_PATH=str(checkpoint))


def test_a_size_beside_a_named_one_counts_and_is_said(train, capsys):
    run = train(MODEL_SIZE="NanoDiT-S/16", MODEL_DEPTH=1, LATENT_DIM=None, MODEL_HEADS=None, EPOCHS=1)
    assert (
        "network: NanoDiT-S/16, but patch_size 16, but depth 1, but prediction image: 4x4 patches of 16 pixels\n"
        in capsys.readouterr().out
    )
    config = load_checkpoint(run / "dit_conditional_ckpts" / "dit_conditional_final.pt")["model_config"]
    assert (config["depth"], config["hidden_size"], config["num_heads"]) == (1, 192, 3)


@pytest.mark.parametrize(
    ("constants", "complaint"),
    [
        ({"CFG_SCALE": 5.0, "LABEL_DROPOUT": 0.0}, "CFG_SCALE 5 needs hidden labels: raise LABEL_DROPOUT"),
        ({"CFG_SCALE": 0.0, "LABEL_DROPOUT": 0.0}, "CFG_SCALE 0 needs hidden labels"),
        ({"WARMUP_EPOCHS": 4.0}, "WARMUP_EPOCHS 4 must be less than EPOCHS 4"),
        ({"EMA_UPDATE_EVERY": 29}, "EMA_UPDATE_EVERY 29 is more than all steps"),
        ({"MODEL_HEADS": 3}, "no such network: a patch of 16 must lie within 64 pixels, and a width of 32 must be"),
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
        *(("time_width", 0), ("max_grad_norm", 0), ("num_ode_steps", 0), ("cfg_scale", -1)),
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


@pytest.mark.parametrize("script", ["train_diffusion", "train_classifier"])
def test_a_class_without_images_ends_a_training_at_its_start(data_copy, tmp_path, capsys, script):
    for path in (data_copy / "axion").glob("*.npy"):
        path.unlink()
    flags = ["--data_dir", data_copy, "--output_dir", tmp_path / "run", "--batch_size", 16]
    with pytest.raises(SystemExit) as stopped:
        run_script(f"train/{script}.py", *flags)
    assert stopped.value.code == 2
    assert "axion: no .npy, .npz or FITS files in it" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    if script == "train_diffusion":
        flags += [*TINY_TRAINING, "--epochs", 1, "--on_missing_class", "go_on"]
        run_script(f"train/{script}.py", *flags)
        assert (tmp_path / "run" / "dit_conditional_ckpts" / "dit_conditional_final.pt").exists()


def test_a_new_classifier_keeps_the_older_one(classifier_run, lens_data, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(classifier_run, tmp_path / "run", ignore=shutil.ignore_patterns("*_final.pt"))
    best = (run / "classifier_ckpts" / "resnet18_best.pt").read_bytes()
    flags = ["--image_size", 8, "--batch_size", 108, "--epochs", 1, "--pretrained", "false", "--data_dir", lens_data]
    run_script("train/train_classifier.py", *flags, "--output_dir", run, "--resume", "never", "--seed", 7)
    assert (run / "earlier_1" / "classifier_ckpts" / "resnet18_best.pt").read_bytes() == best
    assert len(history_of(run)) == 1
    for name in ("epoch_1", "final"):
        (run / "classifier_ckpts" / f"resnet18_{name}.pt").unlink()
    best = (run / "classifier_ckpts" / "resnet18_best.pt").read_bytes()

    def killed(logits, labels):
        raise ZeroDivisionError

    monkeypatch.setattr("torch.nn.functional.cross_entropy", killed)
    with pytest.raises(ZeroDivisionError):
        run_script("train/train_classifier.py", *flags, "--output_dir", run)  # which finds nothing to go on from
    assert (run / "earlier_2" / "classifier_ckpts" / "resnet18_best.pt").read_bytes() == best
    path = run / "earlier_1" / "classifier_ckpts" / "resnet18_epoch_2.pt"
    flags += ["--image_size", 32, "--epochs", 3, "--output_dir", tmp_path / "on", "--resume", path]
    with pytest.raises(ZeroDivisionError):
        run_script("train/train_classifier.py", *flags)
    assert f"{tmp_path / 'on' / 'classifier_ckpts' / path.name} is at epoch 2, going on" in capsys.readouterr().out
