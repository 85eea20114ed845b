"""Pairs of noise and image: made by the sampler, found again, and learned at t = 1."""

import numpy as np
import pytest
import torch
from conftest import TINY_TRAINING, run_script

import settings
from models import flow
from models.checkpoint import build_generator, load_checkpoint
from train import make_pairs

FLAGS = ["--num_ode_steps", 3, "--device", "cpu"]


@pytest.fixture(scope="module")
def pairs(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    run_script("train/make_pairs.py", "--checkpoint_path", checkpoint, "--pairs_dir", folder, "--num_pairs", 1, *FLAGS)
    return folder


def test_a_pair_is_noise_and_what_the_sampler_makes_of_it(pairs, checkpoint):
    model = build_generator(load_checkpoint(checkpoint), checkpoint)
    noise, images, labels = make_pairs.read_pairs(pairs, model.sample_shape, 3)
    assert torch.bincount(labels).tolist() == [len(images) / 3] * 3
    some = torch.tensor([0, len(images) // 2, len(images) - 1])
    assert labels[some].tolist() == [0, 1, 2]
    with torch.inference_mode():
        made = flow.multistep(model, noise[some], labels[some], flow.time_grid(3, "cosine"))
    torch.testing.assert_close(images[some], made, rtol=1e-4, atol=1e-4)
    assert images[some].std() > 0.01
    assert noise.mean().abs() < 0.01
    assert noise.std() == pytest.approx(1, abs=0.01)


def test_more_pairs_are_added_and_those_of_another_sampler_refused(pairs, checkpoint, tmp_path, capsys):
    flags = ["--checkpoint_path", checkpoint, "--pairs_dir", pairs, "--num_pairs", 3_001]
    first = (pairs / "0.npy").stat().st_mtime_ns
    run_script("train/make_pairs.py", *flags, *FLAGS)
    assert (pairs / "0.npy").stat().st_mtime_ns == first
    noise, images, _ = make_pairs.read_pairs(pairs, np.load(pairs / "0.npy").shape[1:], 3)
    assert len(noise) == len(images) == 6_000
    assert not torch.equal(noise[0], noise[3_000])
    with pytest.raises(SystemExit):
        run_script("train/make_pairs.py", *flags, "--num_ode_steps", 4, "--device", "cpu")
    assert "holds pairs of another generator or sampler" in capsys.readouterr().err
    with pytest.raises(settings.InputError, match="no pairs"):
        make_pairs.read_pairs(tmp_path, (1, 64, 64), 3)
    with pytest.raises(settings.InputError, match="another network"):
        make_pairs.read_pairs(pairs, (1, 512), 3)


def test_training_meets_pairs_at_t_1_and_data_elsewhere(pairs, checkpoint, lens_data, tmp_path, monkeypatch, capsys):
    seen = []
    loss = flow.velocity_loss

    def spy(velocity, x, noise, t, *others):
        seen.append((x.clone(), noise.clone(), t.clone()))
        return loss(velocity, x, noise, t, *others)

    monkeypatch.setattr(flow, "velocity_loss", spy)
    flags = [*TINY_TRAINING, "--data_dir", lens_data, "--output_dir", tmp_path, "--start_path", checkpoint]
    run_script("train/train_diffusion.py", *flags, "--pairs_dir", pairs, "--pairs_share", 0.25, "--time_grid", "jump")
    noise, images, _ = make_pairs.read_pairs(pairs, (1, 64, 64), 3)
    known = {row.sum().item(): i for i, row in enumerate(noise)}
    x, z, t = seen[0]
    of_pairs = t == 1
    assert of_pairs.sum() == round(0.25 * len(x))
    for image, start in zip(x[of_pairs], z[of_pairs], strict=True):
        assert torch.equal(image, images[known[start.sum().item()]])
    assert not any(row.sum().item() in known for row in z[~of_pairs])
    final = load_checkpoint(tmp_path / "dit_conditional_ckpts" / "dit_conditional_final.pt")
    assert final["sampler"]["grid"] == "jump"
    assert "cannot be" not in capsys.readouterr().err


def test_training_starts_from_the_weights_of_a_checkpoint(checkpoint, lens_data, tmp_path, capsys):
    flags = ["--data_dir", lens_data, "--output_dir", tmp_path, "--learning_rate", 1e-30]
    flags += ["--min_learning_rate", 1e-30]
    run_script("train/train_diffusion.py", *TINY_TRAINING, *flags, "--start_path", checkpoint)
    started = load_checkpoint(tmp_path / "dit_conditional_ckpts" / "dit_conditional_final.pt")
    model = build_generator(load_checkpoint(checkpoint), checkpoint)
    for name, value in model.state_dict().items():
        assert torch.equal(started["model_state_dict"][name], value), name
    with pytest.raises(SystemExit):
        run_script(
            *("train/train_diffusion.py", *TINY_TRAINING, *flags, "--start_path", checkpoint, "--latent_dim", 64)
        )
    assert f"{checkpoint} is of another network" in capsys.readouterr().err
