"""A generator can be asked for any subset of the parameters that it was trained with, and obeys."""

import math
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from test_components import component_generator
from test_model import random_model
from test_parameters import parameter

import settings
from models import flow
from models.checkpoint import load_checkpoint, save_checkpoint
from models.generator import Generator, generate_image, load_model
from models.layers import ParameterEmbedder
from parameters import asked, objects, phases
from settings import InputError

LENSES = ("axion", "cdm", "no_sub")
NAMES = ("x", "halo_mass_1", "halo_x_1", "halo_mass_2", "halo_x_2")
KNOWN = tuple(parameter(name=name, low=0.0, high=1.0, classes=LENSES) for name in NAMES)
NAN = math.nan


def randomized(network):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weights in network.p_embedder.parameters():
            weights.copy_(0.3 * torch.randn(weights.shape, generator=generator))
    return network


def pixel_generator(beside_lens: bool = True) -> Generator:
    network = randomized(random_model(objects=objects(KNOWN, beside_lens)))
    return Generator(network, LENSES, network.sample_shape, lens_parameters=KNOWN).eval()


def coefficient_generator() -> Generator:
    model = component_generator()[0].with_parameters(KNOWN).eval()
    randomized(model.network)
    return model


def older_generator() -> Generator:
    """As in older versions, which describe a subhalo without the parameters of the lens."""
    return pixel_generator(beside_lens=False)


MODELS = pytest.mark.parametrize("build", [pixel_generator, older_generator, coefficient_generator])


# The network


def test_vectors_of_parameters_follow_the_formula():
    """Against NumPy: Fourier features, one hidden layer for each kind of objects, summed over objects."""
    embedder = ParameterEmbedder([[[1]], [[0, 2, 1], [4, 3, 1]]], 6, num_octaves=2)
    given = torch.tensor([[0.3, NAN, -0.2, 0.1, NAN]])
    w = {name: value.detach().double().numpy() for name, value in embedder.named_parameters()}

    def features(value):
        if np.isnan(value):
            return [0, 0, 0, 0, 1]
        return [np.sin(value), np.sin(2 * value), np.cos(value), np.cos(2 * value), 0]

    def gelu(x):
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    def kind(k, objects_of_kind):
        hidden = 0
        for of_object in objects_of_kind:
            x = np.concatenate([features(given[0, i].double().item()) for i in of_object])
            hidden = hidden + gelu(w[f"hidden.{k}.weight"] @ x + w[f"hidden.{k}.bias"])
        return w[f"outputs.{k}.weight"] @ hidden + w[f"outputs.{k}.bias"]

    expected = kind(0, [[1]]) + kind(1, [[0, 2, 1], [4, 3, 1]])
    np.testing.assert_allclose(embedder(given)[0].detach().numpy(), expected, rtol=1e-5, atol=1e-6)


@MODELS
def test_each_known_parameter_counts_and_objects_of_a_kind_may_change_places(build):
    model = build()
    z, t, labels = torch.randn(1, *model.sample_shape), torch.tensor([0.7]), torch.tensor([1])
    given = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5]])

    def output(values):
        with torch.no_grad():
            return model(z, t, model.condition(labels, values))

    all_known = output(given)
    for i in range(len(NAMES)):
        without = given.clone()
        without[0, i] = NAN
        moved = given.clone()
        moved[0, i] += 0.2
        assert not torch.allclose(output(without), all_known, atol=1e-4)
        assert not torch.allclose(output(moved), all_known, atol=1e-4)
        assert not torch.allclose(output(moved), output(without), atol=1e-4)
    torch.testing.assert_close(output(given[:, [0, 3, 4, 1, 2]]), all_known)
    nothing = torch.full_like(given, NAN)
    torch.testing.assert_close(output(nothing), model(z, t, labels).detach())  # labels alone: nothing is known


@MODELS
def test_a_generator_that_is_told_parameters_from_now_on_is_the_same_before_it_learns(build):
    before = component_generator()[0] if build is coefficient_generator else None
    if before is None:
        network = random_model()
        before = Generator(network, LENSES, network.sample_shape).eval()
    after = before.with_parameters(KNOWN).eval()
    assert after.lens_parameters == KNOWN
    assert after.with_parameters(KNOWN) is after
    z, t, labels = torch.randn(4, *before.sample_shape), torch.rand(4), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        assert torch.equal(after(z, t, after.condition(labels, torch.rand(4, 5))), before(z, t, labels))


# The flow


def test_a_share_of_the_images_loses_parameters_as_many_as_may_be():
    random = torch.Generator().manual_seed(0)
    given = torch.rand(60_000, 4)
    found = flow.hide(given, 0.6, random)
    assert torch.equal(found[~found.isnan()], given[~found.isnan()])
    many = [(found.isnan().sum(1) == n).double().mean().item() for n in range(5)]
    np.testing.assert_allclose(many, [0.4 + 0.6 / 5, *[0.6 / 5] * 4], atol=0.01)  # all counts are as likely
    assert torch.equal(flow.hide(given, 0.0, random), given)
    unknown = torch.full((10, 4), NAN)
    assert flow.hide(unknown, 0.5, random).isnan().all()


@MODELS
def test_guidance_goes_from_nothing_known_to_all_that_is_asked_for(build):
    model = build()
    times = flow.evaluation_times(flow.Sampler(2, 3.0), model.standard_deviation is not None)[:-1]
    z, labels, given = torch.randn(3, *model.sample_shape), torch.tensor([0, 2, 1]), torch.rand(3, 5)
    t = torch.full((3,), times[0])
    with torch.inference_mode():
        condition = model.embedded(model.condition(labels, given))
        found = flow.guided(model.along(times), model.nothing, 3.0)(z, t, condition)
        with_all = model(z, t, model.condition(labels, given))
        without = model(z, t, model.condition(torch.full((3,), 3), torch.full((3, 5), NAN)))
    torch.testing.assert_close(found, without + 3 * (with_all - without), rtol=1e-4, atol=1e-4)


@MODELS
def test_images_are_those_that_the_network_itself_would_give(build):
    """Along a path, parameters are embedded once; the solver on the plain network embeds them every time."""
    model = build()
    labels, given = torch.tensor([0, 2, 1, 1]), torch.rand(4, 5)
    given[1:3, 2] = NAN
    sampler = flow.Sampler(4, 2.0, "heun")
    with torch.inference_mode():
        condition, nothing = model.condition(labels, given), torch.tensor([3.0, *[NAN] * 5])
        z = flow.sample(model, condition, model.sample_shape, nothing, sampler, 7, 128, 0, model.standard_deviation)
    expected = model.decode(z)
    images = model.generate(labels, sampler, seed=7, phases=given)
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.generate(labels, sampler, 7, 2, phases=given), images, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model.generate(labels, sampler, seed=7), images, atol=1e-2)


# The generator


@MODELS
def test_a_checkpoint_knows_its_parameters(build, tmp_path):
    model = build()
    codec = {} if model.codec is None else {"codec_state_dict": model.codec.state_dict()}
    content = {"model_state_dict": model.network.state_dict(), **codec, **model.description(), "sampler": {}}
    save_checkpoint(tmp_path / "c.pt", **content)
    loaded = load_model(tmp_path / "c.pt", "cpu")
    assert loaded.lens_parameters == KNOWN
    one = generate_image(loaded, "cdm", 2, 1.0, parameters={"x": 0.3, "halo_x_2": 0.9})
    asked_for = phases(KNOWN, asked(KNOWN, {"x": 0.3, "halo_x_2": 0.9}, 1, "cdm"))
    torch.testing.assert_close(one, model.generate(torch.tensor([1]), flow.Sampler(2, 1.0), phases=asked_for))
    two = generate_image(loaded, 1, 2, 1.0, num_samples=2, parameters={"x": [0.3, 0.6]})
    assert two.shape == (2, *model.image_shape)
    with pytest.raises(InputError, match="no parameter 'y': x, 0 to 1; halo_mass_1"):
        generate_image(loaded, "cdm", parameters={"y": 1})
    other = content | {"parameters": content["parameters"][:-1]}
    save_checkpoint(tmp_path / "d.pt", **other)
    with pytest.raises(InputError, match="configuration is not that of a generator"):
        load_model(tmp_path / "d.pt", "cpu")


def test_the_generator_of_an_older_version_takes_none():
    model = load_model(ROOT / "weights" / "component_mlp.safetensors", "cpu")
    assert model.lens_parameters == ()
    with pytest.raises(InputError, match="no parameter 'source_x': it was trained without any"):
        generate_image(model, "axion", parameters={"source_x": 0.1})
    assert torch.equal(generate_image(model, "axion", parameters={}), generate_image(model, "axion"))


# The scripts


@pytest.fixture(scope="session")
def spots(tmp_path_factory):
    """Images of a spot whose place is in parameters.csv, except for every fifth image; its width is in no table."""
    root = tmp_path_factory.mktemp("spots")
    random, rows = np.random.default_rng(0), ["file,place_x [pixel],place_y [pixel]"]
    i, j = np.mgrid[:16, :16]
    for name, width in (("narrow", 1.5), ("wide", 2.5)):
        (root / name).mkdir()
        for k in range(300):
            x, y = random.uniform(4, 11, 2)
            spot = np.exp(-((j - x) ** 2 + (i - y) ** 2) / 2 / (width * random.uniform(0.9, 1.1)) ** 2)
            np.save(root / name / f"{k}.npy", spot.astype(np.float32))
            rows += [f"{name}/{k}.npy,{x},{y}"] if k % 5 else []
    (root / "parameters.csv").write_text("\n".join(rows) + "\n")
    return root


TRAINING = {
    "NanoDiT-S/16": ["--recipe", "first_look", "--patch_size", 4, "--latent_dim", 48, "--model_depth", 2],
    "ComponentMLP-512": ["--recipe", "component_mlp", "--latent_dim", 96, "--time_median", 0.8],
}


@pytest.mark.parametrize("size", TRAINING)
def test_spots_appear_where_they_are_asked_for(size, spots, tmp_path, undrawn):
    """One training is asked with all, some and none of the places given; those not given vary as in the data."""
    flags = [*TRAINING[size], "--model_size", size, "--parameters", "place_x,place_y", "--num_ode_steps", 8]
    flags += ["--batch_size", 16, "--learning_rate", 3e-3, "--epochs", 60, "--ema_beta", 0.99]
    flags += ["--sample_interval", 60, "--checkpoint_save_interval", 60, "--data_dir", spots]
    flags += ["--output_dir", tmp_path / "run"]
    run_script("train/train_diffusion.py", *flags)
    model = load_model(tmp_path / "run" / "dit_conditional_ckpts" / "dit_conditional_final.pt", "cpu")
    assert [(of.name, of.unit, of.scale, of.classes) for of in model.lens_parameters] == [
        ("place_x", "pixel", "linear", ("narrow", "wide")),
        ("place_y", "pixel", "linear", ("narrow", "wide")),
    ]

    def places(**given):
        images = generate_image(model, "wide", num_samples=64, parameters=given)[:, 0]
        light = (images - 0.3).clamp_min(0)
        grid = torch.arange(16.0)
        return [(light.sum(of) * grid).sum(1) / light.sum((1, 2)) for of in (1, 2)]

    x, y = torch.linspace(5, 10, 64), torch.linspace(5, 10, 64)[torch.randperm(64)]
    found_x, found_y = places(place_x=x.numpy(), place_y=y.numpy())
    assert (found_x - x).abs().mean() < 0.6  # small, as places differ by 2 from each other
    assert (found_y - y).abs().mean() < 0.6
    found_x, found_y = places(place_y=6.0)
    assert (found_y - 6).abs().mean() < 1.1
    assert found_x.std() > 1.5  # free, as in the data, where it is 2
    assert all(of.std() > 1.5 for of in places())


def test_a_run_goes_on_with_its_parameters_and_starts_from_weights_without_any(spots, tmp_path, undrawn, capsys):
    flags = ["--recipe", "first_look", "--patch_size", 8, "--latent_dim", 24, "--model_depth", 1, "--data_dir", spots]
    run_script("train/train_diffusion.py", *flags, "--epochs", 1, "--output_dir", tmp_path / "plain")
    plain = tmp_path / "plain" / "dit_conditional_ckpts" / "dit_conditional_final.pt"
    few = ["--batch_size", 16, "--warmup_epochs", 0.2, "--num_ode_steps", 2, "--data_dir", spots]
    start = [*few, "--start_path", plain, "--parameters", "place_x"]
    start += ["--output_dir", tmp_path / "told"]
    run_script("train/train_diffusion.py", *start, "--epochs", 1)
    told = tmp_path / "told" / "dit_conditional_ckpts" / "dit_conditional_final.pt"
    assert [of.name for of in load_model(told, "cpu").lens_parameters] == ["place_x"]
    run_script("train/train_diffusion.py", *start, "--epochs", 2)
    assert load_checkpoint(told)["epoch"] == 2
    more = [*few, "--output_dir", tmp_path / "more", "--start_path", told]
    run_script("train/train_diffusion.py", *more, "--epochs", 1)
    kept = load_model(tmp_path / "more" / "dit_conditional_ckpts" / "dit_conditional_final.pt", "cpu")
    assert [of.name for of in kept.lens_parameters] == ["place_x"]
    shutil.copytree(spots, tmp_path / "bare", ignore=shutil.ignore_patterns("parameters.csv"))
    for wrong, fault in (
        (["--parameters", "place_y"], "has other parameters, order or scales: place_x:linear"),
        (["--parameters", "place_x:log10"], "has other parameters, order or scales: place_x:linear"),
        (["--augment", "square", "--parameters", "place_x"], "turns images, but not their parameters"),
        (["--augment", "square"], "turns images, but not their parameters"),
        (["--data_dir", tmp_path / "bare"], "no parameter place_x of its images"),
        (["--parameters", "place_z"], "no parameter place_z of its images; there are place_x, place_y"),
        (["--parameters", "place_x,place_x"], "is not a list of different names"),
    ):
        begin = few if "place_z" in wrong else more
        with pytest.raises(SystemExit) as stopped:
            run_script("train/train_diffusion.py", *begin, *wrong, "--epochs", 1, "--resume", "never")
        assert stopped.value.code == 2
        assert fault in capsys.readouterr().err
    assert not [*tmp_path.rglob("earlier*")]  # a run that cannot begin has moved no earlier files


def test_names_are_given_with_commas_and_checked_like_any_constant():
    script = {"__file__": str(ROOT / "train" / "train_diffusion.py"), "__doc__": "", "PARAMETERS": ()}
    script["__annotations__"] = {"PARAMETERS": settings.Names}
    settings.from_flags(script, ["--parameters", "a, b:log10"])
    assert script["PARAMETERS"] == ("a", "b:log10")
    settings.from_flags(script, ["--parameters", ""])
    assert script["PARAMETERS"] == ()
