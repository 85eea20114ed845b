"""Every figure catches the failure it exists for, and real images that nothing was done to stay at their floor."""

import pytest
import torch
from conftest import run_script

from dataset import CLASSES, NpyDataset
from evaluate import check_metrics, two_sample
from evaluate.figures import TITLES, Reference, apart, halves
from models.classifier import load_classifier

COUNT, SPLITS = 40, 3


@pytest.fixture(scope="module")
def many_lenses(tmp_path_factory):
    """600 images of each class, enough for 40 in each half of the test part."""
    folder = tmp_path_factory.mktemp("many")
    run_script("simulate/simulate_lenses.py", "--data_dir", folder, "--num_per_class", 600, "--num_workers", 1)
    return folder


@pytest.fixture(scope="module")
def figures(many_lenses, tmp_path_factory):
    """Figures of each broken generator, by its name."""
    folder = tmp_path_factory.mktemp("broken")
    flags = ["--image_size", 32, "--batch_size", 32, "--epochs", 4, "--pretrained", "false"]
    run_script("train/train_classifier.py", *flags, "--data_dir", many_lenses, "--output_dir", folder)
    classifier = load_classifier(folder / "classifier_ckpts" / "resnet18_best.pt")
    train, val, test = (NpyDataset(many_lenses, None, part) for part in ("train", "val", "test"))
    reference = Reference(test, train, COUNT, classifier)
    folders = check_metrics.write_broken(folder, train, val, COUNT, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_sample, "_STEPS", 80)  # what is broken here is told apart after fewer steps than usual
        return {name: reference.score(name, NpyDataset(path), SPLITS, seed=0).figures for name, path in folders.items()}


def fires(figure):
    """Farther from the floor than three of its standard deviations."""
    return abs(figure["value"] - figure["floor"]) > 3 * figure["floor_std"]


def one_or_two_images(figure):
    """No farther from the floor than one or two images take a share; its spread can be zero, of so few."""
    return abs(figure["value"] - figure["floor"]) <= 2 / COUNT


# figure and part that must fire, by what is broken
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
    ("broken", "name", "part"), [(broken, *figure) for broken, found in CAUGHT.items() for figure in found]
)
def test_what_is_broken_is_caught(figures, broken, name, part):
    figure = figures[broken][name][part]
    assert fires(figure), figure


def test_values_are_on_the_right_side(figures):
    assert figures["copies"]["copy_share"]["overall"]["value"] == 1
    assert figures["copies"]["fld_gap"]["overall"]["value"] < figures["copies"]["fld_gap"]["overall"]["floor"]
    assert figures["one_image"]["recall"]["overall"]["value"] == 0
    assert figures["blurred"]["two_sample_accuracy"]["overall"]["value"] > 0.8
    assert figures["rotated"]["two_sample_accuracy"]["overall"]["value"] > 0.8


@pytest.mark.parametrize("name", ["frechet_lens", "kid_lens", "precision", "recall", "coverage", "lens_residual"])
def test_what_cannot_show_the_failure_stays_silent(figures, name):
    """Copies are real images, and swapped classes are the right images overall: that takes the figures above."""
    for broken in ("copies", "swapped"):
        figure = figures[broken][name]["overall"]
        assert not fires(figure) or one_or_two_images(figure), figure


@pytest.mark.parametrize("name", [name for name in TITLES if name != "fid_inception"])
def test_real_images_stay_at_the_floor(figures, name):
    for part in ("overall", *CLASSES):
        figure = figures["real"][name][part]
        assert not apart(figure, SPLITS) or one_or_two_images(figure), figure


def test_halves_have_no_common_image_and_the_same_number_of_each_class():
    labels = torch.tensor([0] * 9 + [1] * 12 + [2] * 30)
    first, second = halves(labels, 4, seed=3)
    assert not set(first.tolist()) & set(second.tolist())
    for half in (first, second):
        assert labels[half].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert not torch.equal(halves(labels, 4, seed=4)[0], first)


def test_the_script_prints_the_table(many_lenses, classifier, tmp_path, capsys):
    flags = ["--data_dir", many_lenses, "--classifier_path", classifier, "--output_dir", tmp_path]
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
