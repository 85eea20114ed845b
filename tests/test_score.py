"""Every metric catches the failure it exists for, and real images that nothing was done to stay at their floor."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script

from dataset import NpyDataset, split_of
from evaluate import check_metrics
from metrics import physics, report, two_sample, verdict
from metrics.score import Reference, apart, check_match, halves, titles_of
from models.checkpoint import save_checkpoint
from models.classifier import build_classifier, load_classifier
from settings import InputError
from simulate.instrument import observers_of
from simulate.recipes import MODEL_II

CLASSES = MODEL_II.classes
COUNT, SPLITS = 40, 3
CLASSIFIER = ROOT / "weights" / "resnet18_lens.safetensors"


@pytest.fixture(scope="module")
def many_lenses(tmp_path_factory):
    """600 images of each class, enough for 40 in each half of the test split."""
    folder = tmp_path_factory.mktemp("many")
    run_script("simulate/simulate_lenses.py", "--data_dir", folder, "--num_per_class", 600, "--num_workers", 1)
    return folder


@pytest.fixture(scope="module")
def scored(many_lenses, tmp_path_factory):
    """Scored images of each broken generator, by its name."""
    folder = tmp_path_factory.mktemp("broken")
    classifier = load_classifier(CLASSIFIER)
    train, val, test = (NpyDataset(many_lenses, None, part) for part in ("train", "val", "test"))
    reference = Reference(test, train, COUNT, classifier)
    folders = check_metrics.write_broken(folder, train, val, COUNT, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_sample, "_STEPS", 40)  # what is broken here is told apart after fewer steps than usual
        return {name: reference.score(name, NpyDataset(path), SPLITS, seed=0) for name, path in folders.items()}


@pytest.fixture(scope="module")
def metrics(scored):
    """Metrics of each broken generator, by its name."""
    return {name: sample.metrics for name, sample in scored.items()}


def fires(metric):
    """Farther from the floor than three of its standard deviations."""
    return abs(metric["value"] - metric["floor"]) > 3 * metric["floor_std"]


def one_or_two_images(metric):
    """At most as far from the floor as two images change a share; with so few, the standard deviation can be zero."""
    return abs(metric["value"] - metric["floor"]) <= 2 / COUNT


# metric and subset that must fire, by what is broken
CAUGHT = {
    "copies": [("fld_gap", "overall"), ("copy_share", "overall"), ("copy_share", "no_sub")],
    "one_image": [
        *(("recall", "overall"), ("coverage", "overall"), ("frechet_lens", "cdm"), ("two_sample_accuracy", "overall")),
    ],
    "blurred": [
        *(("power_16_32", part) for part in ("overall", *CLASSES)),
        *(("lens_residual", "no_sub"), ("precision", "no_sub"), ("two_sample_accuracy", "overall")),
    ],
    "swapped": [
        *(("frechet_lens", part) for part in CLASSES),
        *(("class_accuracy", "overall"), ("lens_residual", "no_sub"), ("lens_residual", "axion")),
    ],
    "rotated": [("ellipticity_angle", "overall"), ("lens_residual", "no_sub"), ("two_sample_accuracy", "overall")],
    "garbage": [("frechet_lens", "overall"), ("lens_residual", "no_sub"), ("knot_count", "overall")],
}


@pytest.mark.parametrize(
    ("broken", "name", "part"), [(broken, *metric) for broken, found in CAUGHT.items() for metric in found]
)
def test_what_is_broken_is_caught(metrics, broken, name, part):
    metric = metrics[broken][name][part]
    assert fires(metric), metric


def test_values_are_on_the_right_side(metrics):
    assert metrics["copies"]["copy_share"]["overall"]["value"] == 1
    assert metrics["copies"]["fld_gap"]["overall"]["value"] < metrics["copies"]["fld_gap"]["overall"]["floor"]
    assert metrics["one_image"]["recall"]["overall"]["value"] == 0
    assert metrics["blurred"]["two_sample_accuracy"]["overall"]["value"] > 0.8
    assert metrics["rotated"]["two_sample_accuracy"]["overall"]["value"] > 0.8


@pytest.mark.parametrize("name", ["frechet_lens", "kid_lens", "precision", "recall", "coverage", "lens_residual"])
def test_what_cannot_show_the_failure_stays_silent(metrics, name):
    """Copies are real images, and swapped classes are right overall: only the metrics above can catch them."""
    for broken in ("copies", "swapped"):
        metric = metrics[broken][name]["overall"]
        assert not fires(metric) or one_or_two_images(metric), metric


def test_real_images_stay_at_the_floor(scored):
    names = titles_of(scored["real"].dataset)
    assert len(names) >= 28
    for name in names:
        for part in ("overall", *CLASSES):
            metric = scored["real"].metrics[name][part]
            if name == "fid_inception":
                assert metric["value"] is None
            else:
                assert not apart(metric, SPLITS) or one_or_two_images(metric), (name, metric)


def test_the_verdict_is_at_the_floor_for_real_images_and_off_for_broken_ones(scored):
    words = {name: verdict.words(sample) for name, sample in scored.items()}
    deciding = ["frechet_lens", "two_sample_accuracy", "class_accuracy", "copy_share", "lens_residual"]
    assert all(list(found) == deciding for found in words.values())
    assert {words["real"][name]["overall"] for name in deciding} == {"at the floor"}
    said = verdict.sentences(scored["real"])
    worst = [max(words["real"][name].values(), key=verdict.WORDS.index) for name in deciding]
    assert said[0].startswith(f"Of the five metrics that decide, {worst.count('at the floor')} are at the floor")
    assert said[0].endswith(f"({COUNT} images a class{', too few to rely on' if COUNT < 100 else ''}).")
    assert said[2].startswith("No sign of copies: ")
    for broken, name in (
        *(("blurred", name) for name in ("frechet_lens", "two_sample_accuracy", "lens_residual")),
        *(("rotated", "lens_residual"), ("swapped", "class_accuracy"), ("copies", "copy_share")),
    ):
        assert words[broken][name]["overall"] == "off", (broken, name, scored[broken].metrics[name]["overall"])
    swapped = words["swapped"]["frechet_lens"]
    assert swapped["overall"] == "at the floor"
    assert "at the floor" not in {swapped[name] for name in CLASSES}
    said = verdict.sentences(scored["copies"])
    assert said[2].startswith("Signs of copies: 100.0% of the images")
    said = verdict.sentences(scored["swapped"])
    assert "0 are" not in said[0]
    assert re.search(r"\d (is|are) off, overall or in the class that is worst", said[0])  # in classes, not overall
    assert 'Farthest from its floor is "' in said[1]


def test_the_verdict_says_when_the_classifier_knows_nothing_of_the_images(scored, monkeypatch):
    assert len(verdict.sentences(scored["swapped"])) == 3
    accuracy = scored["real"].metrics["class_accuracy"]["overall"]
    monkeypatch.setitem(accuracy, "floor", 1 / 3)
    monkeypatch.setitem(accuracy, "floor_interval", (0.25, 0.43))
    *others, said = verdict.sentences(scored["real"])
    assert len(others) == 3
    assert said.startswith("The classifier is right on 33.3% of the real images, as by chance: ")


@pytest.mark.parametrize(
    ("name", "value", "floor", "deviation", "word"),
    [
        ("frechet_lens", 1.2, 1.0, 0.1, "at the floor"),  # within chance
        ("frechet_lens", 0.5, 1.0, 0.001, "at the floor"),  # better
        ("frechet_lens", 2.9, 1.0, 0.1, "near"),
        ("frechet_lens", 3.1, 1.0, 0.1, "off"),
        ("frechet_lens", 3.1, 1.0, 0.4, "near"),  # not apart from the floor, but three times as large
        ("frechet_lens", 2.9, 1.0, 0.4, "at the floor"),
        ("lens_residual", 1e-3, 0.0, 0.0, "off"),
        ("lens_residual", 1e-6, 1e-8, 0.0, "at the floor"),  # the rounding of float32
        ("two_sample_accuracy", 0.54, 0.5, 0.001, "near"),
        ("two_sample_accuracy", 0.56, 0.5, 0.001, "off"),
        ("two_sample_accuracy", 0.56, 0.5, 0.02, "near"),
        ("two_sample_accuracy", 0.54, 0.5, 0.02, "at the floor"),
        ("class_accuracy", 0.92, 0.95, 0.001, "near"),
        ("class_accuracy", 1.0, 0.94, 0.001, "off"),  # too easy to classify
        ("copy_share", 0.0, 0.05, 0.001, "at the floor"),
        ("copy_share", 0.09, 0.05, 0.001, "near"),
    ],
)
def test_words_of_the_verdict(name, value, floor, deviation, word):
    metric = {"value": value, "floor": floor, "value_std": deviation, "floor_std": deviation}
    assert verdict.word(name, metric) == word


def test_a_share_of_few_images_is_not_called_off():
    metric = {"value": 0.86, "floor": 1.0, "value_std": 0.0, "floor_std": 0.0}
    assert verdict.word("class_accuracy", metric) == "off"
    few = {"interval": (0.60, 0.96), "floor_interval": (0.79, 1.0)}  # 12 of 14, and all 14
    assert verdict.word("class_accuracy", metric | few) == "near"
    many = {"interval": (0.84, 0.88), "floor_interval": (0.99, 1.0)}
    assert verdict.word("class_accuracy", metric | many) == "off"


def write_images(folder, classes, shape, train=4, test=7):
    """A folder of images of rings, another size for each class; ``train`` and ``test`` of a class in these splits."""
    rng = np.random.default_rng(0)
    axis = np.arange(shape[-1]) - (shape[-1] - 1) / 2
    radius = np.hypot(axis[:, None], axis[None]) / shape[-1]
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        ring = np.exp(-((radius - 0.2 - 0.05 * label) ** 2) / 0.005)
        for split, count in (("train", train), ("test", test)):
            for i in [i for i in range(200) if split_of(f"{i}.npy") == split][:count]:
                np.save(
                    folder / name / f"{i}.npy", ring * rng.uniform(0.5, 1, (shape[0], 1, 1)) + rng.random(shape) / 9
                )
    return folder


@pytest.mark.parametrize(
    ("classes", "shape"),
    [
        (("axion", "cdm", "no_sub", "wdm"), (3, 32, 32)),
        (CLASSES, (1, 128, 128)),
        (("a lens",), (5, 75, 75)),
    ],
)
def test_other_classes_sizes_and_channels_are_scored_and_reported(classes, shape, tmp_path, monkeypatch, capsys):
    """No recipe is known for these: lengths are in pixels, and nothing is said of the lens equation."""
    train = NpyDataset(write_images(tmp_path / "data", classes, shape), None, "train")
    test = train.part("test")
    torch.manual_seed(0)
    classifier = build_classifier(32, classes, shape[0]).eval()
    save_checkpoint(tmp_path / "classifier.pt", model_state_dict=classifier.state_dict())
    one_each = [next(file for file in train.files if file.startswith(f"{name}/")) for name in classes]
    with pytest.raises(InputError, match="fewer than 2 training images of a class"):
        Reference(test, train.only(one_each), 3, classifier)
    reference = Reference(test, train, 3, classifier)
    other = write_images(tmp_path / "other", classes, shape)
    sample = reference.score("other", NpyDataset(other, classes=classes), 2, seed=0)
    absent = {name for name, of_subsets in sample.metrics.items() if of_subsets["overall"]["value"] is None}
    unclassified = {"class_accuracy", "learned"} if len(classes) == 1 else set()
    few = {"gain_30", "gain_100", "gain_300", "pqmass"}  # not for so few images
    residuals = {name for name in sample.metrics if "residual_" in name}
    assert absent == {"fid_inception", "lens_residual"} | residuals | unclassified | few
    assert all(set(of_subsets) == {"overall", *classes} for of_subsets in sample.metrics.values())
    report.print_table(sample, 3)
    out = capsys.readouterr().out
    assert "Ring radius, W1 in pixels" in out
    assert "residual" not in out.lower()
    low, high = list(physics.bands(shape[-1]).values())[-1]
    assert list(verdict.words(sample))[-1] == f"power_{low}_{high}"
    assert f"Of the {'four' if unclassified else 'five'} metrics that decide" in out
    settings = {"CLASSIFIER_PATH": str(tmp_path / "classifier.pt"), "NUM_SPLITS": 2}
    report.write_lenses(tmp_path / "lenses.png", sample)
    report.write_json(tmp_path / "report.json", settings, [sample], {})
    report.write_html(tmp_path / "report.html", settings, [sample], {})
    page = (tmp_path / "report.html").read_text()
    assert "Lens equation" not in page
    assert page.count("<details>") == 2
    assert json.loads((tmp_path / "report.json").read_text())["lens_fit"] == {}


def test_what_does_not_go_together_is_named(tmp_path):
    data = NpyDataset(write_images(tmp_path / "data", ("a", "b"), (1, 16, 16)))
    check_match(data, {"w.pt": build_classifier(32, ("a", "b"))})
    for classes, channels, complaint in (
        (("a", "c"), 1, "w.pt is of the classes a, c, but"),
        (("a", "b"), 3, "3 chan"),
    ):
        with pytest.raises(InputError, match=complaint) as raised:
            check_match(data, {"w.pt": build_classifier(32, classes, channels)})
        assert str(data.root_dir) in str(raised.value)
        assert raised.value.status == 2


def test_halves_have_no_common_image_and_the_same_number_of_each_class():
    labels = torch.tensor([0] * 9 + [1] * 12 + [2] * 30)
    first, second = halves(labels, 4, seed=3)
    assert not set(first.tolist()) & set(second.tolist())
    for half in (first, second):
        assert labels[half].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert not torch.equal(halves(labels, 4, seed=4)[0], first)


def test_the_script_prints_the_table(many_lenses, tmp_path, capsys):
    flags = ["--data_dir", many_lenses, "--output_dir", tmp_path, "--classifier_path", CLASSIFIER]
    run_script("evaluate/check_metrics.py", *flags, "--images_per_class", 4, "--num_splits", 2, "--device", "cpu")
    table = capsys.readouterr().out
    assert "| overall | floor | real | one_image | blurred | rotated | garbage | copies | swapped |" in table
    assert "**100.0% ± 0.0%**" in table
    (tmp_path / "made_here.txt").unlink()  # as if it were somebody else's
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit):
        run_script("evaluate/check_metrics.py", *flags, "--images_per_class", 3, "--num_splits", 2, "--device", "cpu")
    assert f"{tmp_path} was not made here: it holds blurred/, copies/" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_broken_is_caught_through_a_telescope_too(many_lenses, tmp_path, monkeypatch):
    """Copies of training images have different noise, and are still near to them."""
    monkeypatch.setattr(two_sample, "_STEPS", 80)
    train, val, test = (NpyDataset(many_lenses, None, part) for part in ("train", "val", "test"))
    of_test, of_train, of_broken = observers_of(test, "euclid", None, 0, 3)
    reference = Reference(test.observed(of_test), train.observed(of_train), COUNT, load_classifier(CLASSIFIER))
    folders = check_metrics.write_broken(tmp_path, train, val, COUNT, seed=0)
    found = {
        name: reference.score(name, NpyDataset(folders[name]).observed(of_broken), 2, seed=0).metrics
        for name in ("real", "blurred", "copies", "one_image")
    }
    assert one_or_two_images(found["real"]["copy_share"]["overall"])
    assert found["copies"]["copy_share"]["overall"]["value"] > 0.3
    for name in ("blurred", "one_image"):
        assert found[name]["two_sample_accuracy"]["overall"]["value"] > 0.9, name
    assert found["one_image"]["pqmass"]["overall"]["value"] < 0.01
    assert found["real"]["pqmass"]["overall"]["value"] > 0.1
    power = {name: metrics["power_16_32"]["overall"] for name, metrics in found.items()}
    assert power["blurred"]["value"] > 3 * power["blurred"]["floor"]
    assert power["real"]["value"] < 2 * power["real"]["floor"]
    assert all(metrics["lens_residual"]["overall"]["value"] is None for metrics in found.values())
