"""Obedience is checked on generators with known errors: one that draws the very lens, and others that do not."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_script
from test_parameters import parameter

from dataset import NpyDataset, some_of_each_class
from evaluate import evaluate_fld
from metrics.distances import wasserstein
from metrics.obedience import obedience
from models.checkpoint import load_checkpoint, save_checkpoint
from models.regressor import LensRegressor, Recovery, build_regressor, load_regressor, phases_of
from scaling import Scaling
from settings import InputError

X, ANGLE = (
    parameter(name="x", low=3.0, high=12.0, mean=7.0, deviation=2.0, classes=("a", "b")),
    parameter("angle", name="angle", unit="rad", mean=0.0, deviation=1.0, period=np.pi, classes=("b",)),
)
MASS = parameter("log10", name="mass", unit="eV", low=1.0, high=100.0, mean=1.0, deviation=0.5, classes=("b",))
ALL = (X, ANGLE, MASS)


def draw(phases: torch.Tensor) -> torch.Tensor:
    """A spot at x, with pixels for cosine and sine of the angle and for the mass; 0 stands for unknown."""
    x, angle, mass = (phases.double().nan_to_num(0)[:, i] for i in range(3))
    columns = torch.arange(16.0, dtype=torch.double)
    light = torch.exp(-((columns - (7 + 4 * x)[:, None]) ** 2) / 4)
    images = torch.zeros(len(phases), 1, 16, 16, dtype=torch.double)
    images[:, 0, 4:7] = light[:, None]
    images[:, 0, 10, 0], images[:, 0, 10, 1] = 0.5 + 0.5 * angle.cos(), 0.5 + 0.5 * angle.sin()
    images[:, 0, 12, 0] = 0.5 + 0.2 * mass
    images[:, 0, 15, 15] = 1  # the peak is always 1, so that reading does not rescale
    return images.float()


class Reader:
    """Reads exactly what ``draw`` has drawn."""

    lens_parameters = ALL

    def outputs(self, images, batch_size=128):
        images = images.double()
        row = images[:, 0, 5]
        x = ((row * torch.arange(16)).sum(1) / row.sum(1) - 7) / 4
        cosine, sine = (2 * images[:, 0, 10, i] - 1 for i in (0, 1))
        return torch.stack([x, cosine, sine, (images[:, 0, 12, 0] - 0.5) / 0.2], 1)

    def read(self, images, batch_size=128):
        return phases_of(self.outputs(images), ALL)


class Drawer:
    """A generator that draws what is asked for; all else is as in the data. ``how`` names other behaviour."""

    classes, lens_parameters, how, scaling = ("a", "b"), ALL, "right", Scaling()

    def __init__(self, how="right"):
        self.how = how

    def generate(self, labels, sampler=None, seed=0, batch_size=128, first=0, phases=None):
        random = torch.Generator().manual_seed(seed + first)
        free = torch.rand(len(labels), 3, generator=random) - 0.5
        free[:, 1] *= 4 * np.pi
        free[labels == 0, 1:] = 0
        asked = free if phases is None or self.how == "deaf" else torch.where(phases.isnan(), free, phases)
        if self.how == "backwards" and phases is not None:
            asked = asked * torch.tensor([-1.0, 1, 1])
        if self.how == "narrow" and phases is not None:
            asked = torch.where(phases.isnan(), 0.1 * free, phases)
        return draw(asked)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """120 images of each of two classes, of which the second one alone has angle and mass."""
    root = tmp_path_factory.mktemp("drawn")
    random, rows = np.random.default_rng(0), ["file,x,angle [rad],mass [eV]"]
    for name in ("a", "b"):
        (root / name).mkdir()
        for k in range(120):
            x, angle, mass = random.uniform(5, 9), random.uniform(0, np.pi), 10 ** random.uniform(0.5, 1.5)
            of = [p.phase(np.array(v)) for p, v in zip(ALL, (x, angle, mass), strict=True)]
            known = torch.tensor([of if name == "b" else [of[0], np.nan, np.nan]])
            if name == "a":
                known[:, 1:] = 0
            np.save(root / name / f"{k}.npy", draw(known)[0, 0].numpy())
            rows.append(f"{name}/{k}.npy,{x},{angle},{mass}" if name == "b" else f"{name}/{k}.npy,{x},,")
    (root / "parameters.csv").write_text("\n".join(rows) + "\n")
    return NpyDataset(root)


def test_a_generator_that_draws_the_very_lens_makes_no_error(drawn):
    found = obedience(Drawer(), Reader(), drawn, 100, 0, 128)
    assert all(row["given"] < 1e-6 and row["worst"] < 1e-6 for row in found["emulation"].values())
    assert all(row["class"] > 0.05 for row in found["emulation"].values())
    assert found["emulation"]["a"]["common"] < 1e-6
    assert found["emulation"]["b"]["common"] > 0.03
    for of in ("generated", "real"):
        table = found["recovery"][of]
        assert [(name, row["count"]) for name, row in table.items()] == [("x", 200), ("angle", 100), ("mass", 100)]
        assert all(row["r2"] > 0.99 and row["scatter"] < 0.1 for row in table.values())
    assert [row["unit"] for row in table.values()] == ["", "rad", "log10 eV"]
    assert found["order"] == pytest.approx({"x": 1.0, "mass": 1.0})
    assert found["conditionals"].keys() == {"angle", "mass"}
    assert all(row["value"] < 3 * row["floor"] + 0.2 for row in found["conditionals"].values())
    assert found["worst"]["generated"].shape == (8, 1, 16, 16)
    assert found["errors"]["a"].shape == (100,)


def test_generators_that_do_not_obey_are_told(drawn):
    deaf = obedience(Drawer("deaf"), Reader(), drawn, 100, 0, 128)
    assert deaf["emulation"]["a"]["given"] > 0.05
    assert deaf["recovery"]["generated"]["x"]["r2"] < 0
    assert abs(deaf["order"]["x"]) < 0.4
    backwards = obedience(Drawer("backwards"), Reader(), drawn, 100, 0, 128)
    assert backwards["order"]["x"] == pytest.approx(-1)
    narrow = obedience(Drawer("narrow"), Reader(), drawn, 100, 0, 128)
    right = obedience(Drawer(), Reader(), drawn, 100, 0, 128)
    assert narrow["conditionals"]["mass"]["value"] > 3 * right["conditionals"]["mass"]["value"]
    assert narrow["emulation"]["b"]["given"] < 1e-6


def test_errors_are_root_mean_squares_over_the_peak(drawn):
    class Off(Drawer):
        def generate(self, labels, sampler=None, seed=0, batch_size=128, first=0, phases=None):
            return super().generate(labels, sampler, seed, batch_size, first, phases) + (
                0.02 if phases is not None else 0
            )

    found = obedience(Off(), None, drawn, 50, 0, 128)
    assert found.keys() == {"emulation", "errors", "worst", "captions"}
    assert {*found["captions"]} <= {"a, 2.0%", "b, 2.0%"}
    assert found["emulation"]["b"]["given"] == pytest.approx(0.02, rel=1e-3)


def test_images_that_keep_their_flux_are_compared_in_the_unit_of_the_data(tmp_path):
    random, rows = np.random.default_rng(0), ["file,x,y"]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for k in range(40):
            of, level = torch.rand(1, 3) - 0.5, random.uniform(50, 900)
            np.save(tmp_path / name / f"{k}.npy", 7 + level * draw(of)[0, 0].numpy())
            rows.append(f"{name}/{k}.npy,{k},1")
    (tmp_path / "parameters.csv").write_text("\n".join(rows) + "\n")
    images = NpyDataset(tmp_path)
    low, high = torch.from_numpy(images.low), torch.from_numpy(images.high)

    class Exact(Drawer):
        """Draws the very images in the range of its scaling, exactly or one percent too bright."""

        lens_parameters, factor = (parameter(name="x", classes=("a", "b")), parameter(name="y", classes=("a",))), 1.0

        def generate(self, labels, sampler=None, seed=0, batch_size=128, first=0, phases=None):
            index = some_of_each_class(images.labels, 30, 0)
            light = self.scaling.undo(self.scaling.apply(images.read(index), low[index], high[index]))
            unit = Scaling(kind="set", low=self.scaling.low, high=self.scaling.high)
            light = self.scaling.low + self.factor * (light - self.scaling.low)
            if self.scaling.kind == "asinh":
                above = (light - self.scaling.low) / self.scaling.softening
                return above.asinh() / np.arcsinh((self.scaling.high - self.scaling.low) / self.scaling.softening)
            return (light - unit.low) / (unit.high - unit.low)

    for kind in ("set", "asinh"):
        exact = Exact()
        exact.scaling = Scaling.of(kind, images.images, low, high)
        found = obedience(exact, None, images, 30, 0, 128)["emulation"]
        assert all(row["given"] < 1e-5 for row in found.values())
        exact.factor = 1.01
        brighter = obedience(exact, None, images, 30, 0, 128)["emulation"]
        assert all(0.0005 < row["given"] < 0.01 for row in brighter.values())


def test_what_does_not_vary_is_left_out(drawn, tmp_path):
    """A parameter that is known of one test image, or is the same in all, has neither R^2 nor a correlation."""
    shutil.copytree(drawn.root_dir, tmp_path / "alike")
    rows = (tmp_path / "alike" / "parameters.csv").read_text().splitlines()
    alike = [",".join(["", "6.5", *row.split(",")[2:]]).replace("", row.split(",")[0], 1) for row in rows[1:]]
    once = [row if k == 130 else row.rsplit(",", 1)[0] + "," for k, row in enumerate(alike)]
    (tmp_path / "alike" / "parameters.csv").write_text("\n".join([rows[0], *once]) + "\n")
    found = obedience(Drawer(), Reader(), NpyDataset(tmp_path / "alike"), 100, 0, 128)
    told = {name: found[name] for name in ("emulation", "recovery", "conditionals", "order")}
    json.dumps(told, allow_nan=False)
    assert found["recovery"]["real"].keys() == {"angle"}
    assert "x" not in found["order"]


def test_a_sweep_changes_nothing_but_what_is_swept(drawn):
    """All images of a lens begin with the same noise."""

    class Noisy(Drawer):
        def generate(self, labels, sampler=None, seed=0, batch_size=128, first=0, phases=None):
            numbers = range(first, first + len(labels))
            noise = torch.tensor([np.random.default_rng([seed, k]).normal(0, 2) for k in numbers])
            moved = phases.clone() if phases is not None else torch.zeros(len(labels), 3)
            moved[:, 0] += noise.float()
            return draw(moved.clamp(-0.8, 0.8) if phases is None else moved * torch.tensor([0.2, 1.0, 1.0]))

    assert obedience(Noisy(), Reader(), drawn, 100, 0, 128)["order"]["x"] > 0.95


def test_recovery_is_that_of_the_formulas():
    random = np.random.default_rng(0)
    asked = np.stack([random.normal(0, 0.5, 5000), random.uniform(0, 2 * np.pi, 5000), random.normal(0, 0.5, 5000)], 1)
    read = asked + np.array([0.1, 0.2, 0.0]) + random.normal(0, [0.05, 0.1, 0.25], asked.shape)
    asked[::2, 2] = np.nan

    def recovery(read) -> Recovery:
        columns = [read[:, 0], np.cos(read[:, 1]), np.sin(read[:, 1]), read[:, 2]]
        return Recovery(ALL, asked, torch.from_numpy(np.stack(columns, 1)))

    table = recovery(read).table()
    x, angle, mass = table["x"], table["angle"], table["mass"]
    # A phase is half the distance from the mean in standard deviations
    assert (x["bias"], x["scatter"]) == pytest.approx((0.1 * 4, 0.05 * 4), rel=0.03)
    assert x["r2"] == pytest.approx(1 - (0.1**2 + 0.05**2) / 0.25, abs=0.01)
    assert (angle["bias"], angle["scatter"]) == pytest.approx((0.2 / 2, 0.1 / 2), rel=0.03)  # its period is pi
    assert angle["r2"] == pytest.approx(2 * np.exp(-0.005) * np.cos(0.2) - 1, abs=0.01)
    assert mass["r2"] == pytest.approx(0.75, abs=0.02)
    assert mass["count"] == 2500
    turned = recovery(asked + 2 * np.pi).table()["angle"]
    assert (turned["r2"], turned["bias"]) == pytest.approx((1, 0), abs=1e-9)
    unsure = recovery(read)
    unsure.outputs[:, 1:3] *= 0.01  # reading the mean of all, whatever the angle, explains nothing
    assert unsure.table()["angle"]["r2"] == pytest.approx(0.02, abs=0.01)


def test_angles_are_moved_the_short_way_round():
    random = np.random.default_rng(0)
    first = random.normal(0, 0.1, 2000) % (2 * np.pi)  # on both sides of the cut
    assert wasserstein(first, (first + 0.3) % (2 * np.pi), 2 * np.pi) == pytest.approx(0.3, rel=0.01)
    assert wasserstein(first, (first - 0.3) % (2 * np.pi), 2 * np.pi) == pytest.approx(0.3, rel=0.01)
    assert wasserstein(np.zeros(5), np.full(5, np.pi), 2 * np.pi) == pytest.approx(np.pi)
    assert wasserstein(first, first, 2 * np.pi) == 0
    uniform = np.linspace(0, 2 * np.pi, 1000, endpoint=False)
    assert wasserstein(np.zeros(1000), uniform, 2 * np.pi) == pytest.approx(np.pi / 2, rel=0.01)


# The regressor


def test_outputs_of_angles_are_sine_and_cosine_and_unknown_targets_count_nothing():
    model = build_regressor(32, 1, ALL)
    assert model.fc.out_features == 4
    phases = torch.tensor([[0.5, np.pi / 2, np.nan]])
    torch.testing.assert_close(model.targets(phases), torch.tensor([[0.5, 0.0, 1.0, np.nan]]), equal_nan=True)

    class Fixed(LensRegressor):
        def forward(self, images):
            return torch.tensor([[0.5, -2.0, 0.0, 0.1]]).expand(len(images), -1)

    fixed = Fixed(32, 1, ALL)
    torch.testing.assert_close(fixed.read(torch.rand(3, 1, 16, 16))[0], torch.tensor([0.5, np.pi, 0.1]))
    found = fixed.read_values(torch.rand(2, 1, 16, 16))
    np.testing.assert_allclose([found["x"][0], found["angle"][0], found["mass"][0]], [9, np.pi / 2, 10**1.1])


@pytest.fixture(scope="session")
def regressor(lens_data, tmp_path_factory):
    """A regressor after a short training."""
    output = tmp_path_factory.mktemp("regressor")
    flags = ["--parameters", "source_x,axion_mass,vortex_angle:angle/2", "--image_size", 32, "--epochs", 3]
    run_script("train/train_regressor.py", *flags, "--data_dir", lens_data, "--output_dir", output)
    return output


def test_a_regressor_is_trained_to_read_and_tells_how_well(regressor, capsys):
    model = load_regressor(regressor / "regressor_ckpts" / "resnet18_best.pt")
    assert [of.scale for of in model.lens_parameters] == ["linear", "log10", "angle"]
    assert (regressor / "recovery.png").stat().st_size > 20_000
    assert (regressor / "training_metrics.csv").exists()


def test_a_regressor_learns_where_spots_are(drawn, tmp_path, undrawn):
    flags = ["--parameters", "x", "--image_size", 16, "--epochs", 6, "--batch_size", 16, "--data_dir", drawn.root_dir]
    run_script("train/train_regressor.py", *flags, "--output_dir", tmp_path)
    model = load_regressor(tmp_path / "regressor_ckpts" / "resnet18_best.pt")
    assert Recovery.of(model, drawn.part("test")).table()["x"]["r2"] > 0.5


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ([], "--parameters is empty: name those to be read"),
        (["--parameters", "redshift"], "no parameter redshift of its images; there are "),
        (["--parameters", "source_x", "--batch_size", 1000], "--batch_size 1000 is more than"),
    ],
)
def test_what_cannot_be_trained_is_one_line(flags, fault, lens_data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_script("train/train_regressor.py", *flags, "--data_dir", lens_data, "--output_dir", tmp_path / "run")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert fault in error
    assert error.count("\n") == 1


def test_a_parameter_that_no_validation_image_has_is_refused_before_training(drawn, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(drawn.root_dir, data, ignore=shutil.ignore_patterns(".*"))
    early = [f"{file},{k}" for k, file in enumerate(drawn.part("train").files)]
    (data / "parameters.csv").write_text("\n".join(["file,early", *early]) + "\n")
    flags = ["--parameters", "early", "--data_dir", data, "--output_dir", tmp_path / "run"]
    with pytest.raises(SystemExit):
        run_script("train/train_regressor.py", *flags)
    assert "parameter early: no validation image has it" in capsys.readouterr().err


def test_a_regressor_of_a_handful_of_images_says_that_nobody_can_say(drawn, tmp_path, undrawn, capsys):
    """A last batch of a single image does not stop batch normalization, either."""
    for name in ("a", "b"):
        (tmp_path / "few" / name).mkdir(parents=True)
        for k in range(20):
            shutil.copy(drawn.root_dir / name / f"{k}.npy", tmp_path / "few" / name)
    shutil.copy(drawn.root_dir / "parameters.csv", tmp_path / "few")
    count = len(NpyDataset(tmp_path / "few", split="train"))
    flags = ["--data_dir", tmp_path / "few", "--output_dir", tmp_path / "run", "--parameters", "x", "--epochs", 1]
    batch = next(size for size in range(5, count) if count % size == 1)
    run_script("train/train_regressor.py", *flags, "--batch_size", batch, "--image_size", 16)
    assert "Nobody can say how well it reads" in capsys.readouterr().out
    assert not (tmp_path / "run" / "recovery.png").exists()


def test_a_regressor_goes_on_when_values_were_added(drawn, tmp_path, undrawn, capsys):
    shutil.copytree(drawn.root_dir, tmp_path / "more")
    flags = ["--data_dir", tmp_path / "more", "--output_dir", tmp_path / "run", "--image_size", 16, "--batch_size", 16]
    run_script("train/train_regressor.py", *flags, "--parameters", "x", "--epochs", 1)
    table, file = tmp_path / "more" / "parameters.csv", NpyDataset(tmp_path / "more", split="train").files[0]
    table.write_text(re.sub(f"^{file},[^,]*", f"{file},9.5", table.read_text(), flags=re.MULTILINE))  # out of the range
    run_script("train/train_regressor.py", *flags, "--parameters", "x", "--epochs", 2)
    assert "going on" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_script("train/train_regressor.py", *flags, "--parameters", "x,mass", "--epochs", 3)
    assert "is of another regressor parameters: choose another --output_dir" in capsys.readouterr().err
    newest = tmp_path / "run" / "regressor_ckpts" / "resnet18_epoch_2.pt"
    save_checkpoint(newest, **load_checkpoint(newest) | {"regressor_parameters": [{"name": "x"}]})
    with pytest.raises(SystemExit):
        run_script("train/train_regressor.py", *flags, "--parameters", "x", "--epochs", 3, "--resume", newest)
    assert capsys.readouterr().err.endswith("where a regressor is wanted\n")


def test_a_regressor_of_other_images_is_left_out_and_none_can_be_chosen(regressor, monkeypatch, capsys):
    real = SimpleNamespace(image_shape=(3, 64, 64))
    monkeypatch.setattr(evaluate_fld, "REGRESSOR_PATH", str(regressor / "regressor_ckpts" / "resnet18_best.pt"))
    assert evaluate_fld.regressor_of(real, torch.device("cpu")) is None
    assert "is left out: it reads images of 1 channels" in capsys.readouterr().out
    real.image_shape = (1, 64, 64)
    assert evaluate_fld.regressor_of(real, torch.device("cpu")) is not None
    monkeypatch.setattr(evaluate_fld, "REGRESSOR_PATH", None)
    assert evaluate_fld.regressor_of(real, torch.device("cpu")) is None


def test_other_checkpoints_are_no_regressors(checkpoint, classifier):
    for path in (checkpoint, classifier):
        with pytest.raises(InputError, match="of another network, where a regressor is wanted"):
            load_regressor(path)


# The report


def test_the_report_tells_whether_a_generator_obeys(lens_data, regressor, classifier, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("models.regressor._FEWEST", 3)
    size = ["--patch_size", 16, "--latent_dim", 24, "--model_depth", 1, "--epochs", 1, "--num_ode_steps", 2]
    flags = ["--recipe", "first_look", *size, "--parameters", "source_x,axion_mass", "--data_dir", lens_data]
    run_script("train/train_diffusion.py", *flags, "--output_dir", tmp_path / "run")
    checkpoint = tmp_path / "run" / "dit_conditional_ckpts" / "dit_conditional_final.pt"
    flags = ["--data_dir", lens_data, "--checkpoint_path", checkpoint, "--classifier_path", classifier]
    flags += ["--output_dir", tmp_path / "generated", "--report_dir", tmp_path / "report", "--num_splits", 2]
    flags += ["--figure_path", tmp_path / "report" / "lenses.png"]
    reader = regressor / "regressor_ckpts" / "resnet18_best.pt"
    run_script("evaluate/evaluate_fld.py", *flags, "--regressor_path", reader)
    said = capsys.readouterr().out
    assert "asked for the parameters of test images" in said
    assert "source_x (arcsec)" in said
    (told,) = json.loads((tmp_path / "report" / "report.json").read_text())["parameters"].values()
    assert told["emulation"].keys() == {"axion", "cdm", "no_sub"}
    assert {"given", "class", "euclid", "hst"} <= told["emulation"]["cdm"].keys()
    assert told["order"].keys() == {"source_x", "axion_mass"} & told["order"].keys()
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Asked for by parameters" in page
    assert "noise of euclid" in page
    with pytest.raises(SystemExit):  # now, not after minutes of work
        run_script("evaluate/evaluate_fld.py", *flags, "--regressor_path", classifier)
    assert "where a regressor is wanted" in capsys.readouterr().err


def test_what_a_table_does_not_have_is_left_out(drawn, tmp_path):
    """The regressor reads more than the table has, and one parameter is in its training images alone."""
    rows = [line.split(",") for line in (drawn.root_dir / "parameters.csv").read_text().splitlines()]
    few = NpyDataset(drawn.root_dir)
    few._records = few._records.copy()
    names = {file: row for file, *row in rows[1:]}
    (tmp_path / "parameters.csv").write_text(
        "file,x,mass [eV]\n" + "".join(f"{file},{row[0]},\n" for file, row in names.items())
    )
    few.root_dir = tmp_path
    found = obedience(Drawer(), Reader(), few, 100, 0, 128)
    assert found["recovery"]["generated"].keys() == {"x"}
    assert found["order"].keys() == {"x"}
