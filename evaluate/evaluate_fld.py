"""Generates lenses, or takes those of a folder, and scores them against the test images of DATA_DIR.

    python evaluate/evaluate_fld.py
    python evaluate/evaluate_fld.py --generated_dir D      # images {class}/*.npy of any other generator

Every metric stands beside its floor, the same metric of real images against real images. Writes the generated images
to OUTPUT_DIR/{class}/{i}.npy, a picture of real above generated lenses, REPORT_DIR/report.json and
REPORT_DIR/report.html; prints a table with a verdict. In a notebook:
``from evaluate.evaluate_fld import load_model, generate_image``.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distributed
import settings
from dataset import NpyDataset, load_parts, print_counts
from files import contents, hold, holder_of
from image_files import KINDS, is_image_file
from layouts import classes_with_files
from models import generated_folder
from models.generator import Generator, default_generator, generate_image, load_model  # noqa: F401
from scaling import Scaling
from settings import Count, Guidance, InputError, Positive, Splits, Steps, Whole
from simulate.instrument import INSTRUMENTS, Observer, observers_of

if TYPE_CHECKING:
    from models.regressor import LensRegressor

DATA_DIR: str = "data"  # Folder with a folder of images for each class: its test images are the reference
REAL_DIR: str | None = None  # Another such folder of real images, used instead of DATA_DIR
GENERATED_DIR: str | None = None  # A folder of images to score; None generates them. Nothing is ever written to it
OUTPUT_DIR: str = "generated_npy"  # Where generated images go; those of a second checkpoint go to OUTPUT_DIR_compared
REPORT_DIR: str = "evaluation"  # Where report.html and report.json go
FIGURE_PATH: str = "evaluation/lenses.png"  # Picture of real and generated lenses
INSTRUMENT: Literal[(None, *INSTRUMENTS)] = None  # Looks at noise-free images, real and generated, with this telescope
PEAK: Positive | None = None  # Counts per second of the brightest pixel, for INSTRUMENT; None takes it from the files
BESIDE: bool = False  # Also scores the images without INSTRUMENT, in columns of their own
PIXEL_SCALE: Positive | None = None  # Arcsec a pixel; None: from FITS headers or the recipe, or else lengths in pixels
KEEPS_FLUX: bool | None = None  # Compares sky, peak and flux in the unit of the files, too; None: if a checkpoint does
CHECKPOINT_PATH: str = default_generator()  # The one trained here, or else the one of the repository
COMPARE_PATH: str | None = None  # A second checkpoint, or folder of images, to be scored in columns beside the first
CLASSIFIER_PATH: str | None = None  # Gives the lens features; None: one trained here, or a shipped one for INSTRUMENT
REGRESSOR_PATH: str | None = settings.first_there(  # Reads parameters off images; None measures emulation alone
    "regressor_training_resnet18/regressor_ckpts/resnet18_best.pt", "weights/resnet18_regressor.safetensors"
)
INCEPTION_WEIGHTS_PATH: str | None = None  # File of Inception's weights, for a machine without internet
ON_BAD_FILE: Literal["raise", "skip"] = "raise"  # "skip" goes on without the files that cannot be read
CACHE_DIR: str | None = None  # Where packed images are kept; None means their own folder, if it can be written to
IMAGES_PER_CLASS: Count = 1000  # To be scored; at most half of the test images of a class
NUM_SPLITS: Splits = 10  # Random halves of the real images, for floors and standard deviations; more are steadier
NUM_ODE_STEPS: Steps | None = None  # Steps from noise to image; None takes as many as the checkpoint says
CFG_SCALE: Guidance | None = None  # Guidance scale, 1 is no guidance; None takes that of the checkpoint
BATCH_SIZE: Count = 128  # Images at once; reduce when memory runs out
SEED: Whole = 0  # Image k of a seed is always the same
DEVICE: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto" takes the GPU when there is one


def main() -> None:
    # Here, not above: importing what scores images takes seconds, and generate_image does not need it
    import plots
    from metrics import report
    from metrics.inception import load_inception
    from metrics.obedience import obedience
    from metrics.score import Reference, check_match, fewest, half_size
    from models.classifier import default_classifier, load_classifier

    device = distributed.join(settings.pick_device(DEVICE))
    plots.check_format(FIGURE_PATH)  # now, not after minutes of work
    check_settings()
    with distributed.main_first():
        if distributed.is_main():
            hold(REPORT_DIR)
        Path(FIGURE_PATH).parent.mkdir(parents=True, exist_ok=True)
        real, train = load_parts(REAL_DIR or DATA_DIR, "test", "train", on_bad_file=ON_BAD_FILE, cache_dir=CACHE_DIR)
    path = CLASSIFIER_PATH or default_classifier(INSTRUMENT)
    classifier = load_classifier(path, device)
    print(f"Lens features of {path}")
    paths = [GENERATED_DIR or CHECKPOINT_PATH] + ([COMPARE_PATH] if COMPARE_PATH else [])
    found = [open_folder_or_checkpoint(path, real.classes) for path in paths]
    check_match(real, {path: classifier, **dict(zip(paths, found, strict=True))})
    knowing = [knows(model, real) for model in found]
    regressor = regressor_of(real, device) if any(knowing) else None
    outputs = (OUTPUT_DIR, f"{OUTPUT_DIR.rstrip('/')}_compared")
    to_score = [
        folder if isinstance(folder, NpyDataset) else prepare(folder, path, output)
        for folder, path, output in zip(found, paths, outputs, strict=False)
    ]
    count = min(
        [half_size(real, IMAGES_PER_CLASS), *(fewest(folder) for folder in found if isinstance(folder, NpyDataset))]
    )
    if count < 3:
        raise InputError("fewer than 3 images of a class to score; add images")
    samples = [
        take_numbered(folder, count) if isinstance(folder, NpyDataset) else generate(*folder, count)
        for folder in to_score
    ]
    count = min(count, *(fewest(dataset) for dataset, _ in samples))  # bad images may have been skipped
    if count < 3:
        raise InputError("fewer than 3 sound images of a class to score")
    real.pixel_scale = PIXEL_SCALE or real.pixel_scale
    kept = any(Scaling(**source.get("scaling", {})).keeps_flux for _, source in samples)
    real.keeps_flux = kept if KEEPS_FLUX is None else KEEPS_FLUX
    with distributed.main_first():
        inception = load_inception(INCEPTION_WEIGHTS_PATH, device)
    for space, features in {"lens": classifier.fc.in_features, "Inception": 2048 if inception else 0}.items():
        if count <= features:
            print(
                f"{count} images of a class are too few for the covariance of {features} features: Fréchet distances "
                f"in {space} features are too high, and mean something only beside their floor"
            )
    names = [dataset.root_dir.name for dataset, _ in samples]
    if len({"real", *names}) <= len(names):
        names = [str(dataset.root_dir) for dataset, _ in samples]
    names = [name.encode("utf-8", "replace").decode() for name in names]  # to draw; a folder's name may be any bytes
    scored = []
    for title, observers in views(real):
        looks = [data.observed(observer) for data, observer in zip((real, train), observers, strict=False)]
        reference = Reference(*looks, count, classifier, inception, BATCH_SIZE, SEED, f"real{title}")
        for k, (name, (dataset, source)) in enumerate(zip(names, samples, strict=True)):
            scored.append(reference.score(f"{name}{title}", dataset.observed(observers[2 + k]), NUM_SPLITS, SEED))
            scored[-1].source = source
            report.print_table(scored[-1], count)
    if not distributed.is_main():
        return
    sampler = (NUM_ODE_STEPS, CFG_SCALE)
    told = {
        name: obedience(model, regressor, real, count, SEED, BATCH_SIZE, model.sampler_for(*sampler))
        for name, model, known in zip(names, found, knowing, strict=True)
        if known
    }
    report.print_obedience(told)
    report.write_lenses(FIGURE_PATH, scored[0])
    constants = settings.constants(globals()) | {"CLASSIFIER_PATH": path}
    report.write_json(Path(REPORT_DIR) / "report.json", constants, scored, told)
    report.write_html(Path(REPORT_DIR) / "report.html", constants, scored, told)
    print(f"Pictures: {FIGURE_PATH} and {Path(REPORT_DIR) / 'report.html'}, images: {samples[0][0].root_dir}/")


def views(real: NpyDataset) -> list[tuple[str, list[Observer | None]]]:
    """Ways to observe images: a title, and observers for the real images, the training images, and one or two samples.

    Each observer adds noise of its own; None leaves images as they are.
    """
    found = [(f", as {INSTRUMENT} sees it" if INSTRUMENT else "", observers_of(real, INSTRUMENT, PEAK, SEED, 4))]
    return [*found, (", noise-free", [None] * 4)] if INSTRUMENT and BESIDE else found


def knows(model: NpyDataset | Generator, real: NpyDataset) -> bool:
    """Whether ``model`` is a generator that can be asked for parameters known of the real images."""
    if not isinstance(model, Generator) or not model.lens_parameters:
        return False
    known = bool(real.phases(model.lens_parameters, lenient=True).isfinite().any())
    if not known:
        print("Parameters are not tested: no table gives those of the real images")
    return known


def regressor_of(real: NpyDataset, device: torch.device) -> "LensRegressor | None":
    """The regressor that reads parameters off such images, or None if there is none for them."""
    from models.regressor import load_regressor  # here, as in main

    if REGRESSOR_PATH is None:
        return None
    regressor = load_regressor(REGRESSOR_PATH, device)
    if regressor.channels != real.image_shape[0]:
        print(f"{REGRESSOR_PATH} is left out: it reads images of {regressor.channels} channels")
        return None
    return regressor


def check_settings() -> None:
    """Raises InputError when the report would be written into a folder that is only to be scored, or when BESIDE is set
    without INSTRUMENT."""
    if BESIDE and not INSTRUMENT:
        raise InputError("BESIDE scores images without an instrument beside those with it: name it, as INSTRUMENT", 2)
    for scored in [Path(path) for path in (GENERATED_DIR, COMPARE_PATH) if path and Path(path).is_dir()]:
        for written in (REPORT_DIR, FIGURE_PATH):
            if scored.resolve() in (Path(written).resolve(), *Path(written).resolve().parents):
                raise InputError(f"{scored} is only to be scored: nothing may be written to {written}", 2)


def open_folder_or_checkpoint(path: str, classes: tuple[str, ...]) -> NpyDataset | Generator:
    """The images of a folder that is to be scored as it is, or else the generator of a checkpoint.

    Raises:
        InputError: when the folder has no images of a class (it says what is there), or is still being written to.
    """
    folder = Path(path)
    if path != GENERATED_DIR and (path == CHECKPOINT_PATH or not folder.is_dir()):
        return load_model(path, DEVICE)
    if distributed.is_main() and (holder := holder_of(folder)):
        raise InputError(f"{folder} is in use; it belongs to {holder}: score it when that has ended")
    there = classes_with_files(folder)
    if missing := [f"{name}/" for name in classes if name not in there]:
        found = contents(folder)
        deeper = {path.parent for path in folder.rglob("*") if is_image_file(path.name)} - {folder}
        found += f", with images in {min(deeper)}" if deeper else ""
        raise InputError(f"{folder}: nothing to score: no {KINDS} in {', '.join(missing)}; it {found}", status=2)
    print(f"Scoring the images of {folder}: nothing is generated")
    cache = CACHE_DIR or Path(REPORT_DIR) / "cache"
    with distributed.main_first():
        dataset = NpyDataset(folder, None, "all", ON_BAD_FILE, cache_dir=cache, classes=classes)
    print_counts({"images": dataset}, str(folder))
    return dataset


def take_numbered(dataset: NpyDataset, count: int) -> tuple[NpyDataset, dict[str, Any]]:
    """Images 0 to count - 1 of each class of a folder that this script made, or all images of any other folder; and
    where they come from."""
    folder = dataset.root_dir
    source = generated_folder.source_of(folder)
    if source is None:
        return dataset, {"folder": str(folder)}
    if changed := generated_folder.altered(folder):
        print(f"{len(changed)} images of {folder} are not as they were written here, {changed[0]} for one")
    names = generated_folder.numbered(count, dataset.classes)
    first = dataset.only(names)
    return (first if len(first) == len(names) else dataset), source | {"folder": str(folder)}


def prepare(model: Generator, checkpoint: str, output: str) -> tuple[Generator, Path, dict[str, Any]]:
    """A generator, the folder for its images, which from now on belongs to this process, and how it makes them."""
    source = {
        "checkpoint": str(checkpoint),
        "sha256": generated_folder.sha256(checkpoint),
        "sampler": asdict(model.sampler_for(NUM_ODE_STEPS, CFG_SCALE)),
        "seed": SEED,
        "scaling": asdict(model.scaling),
    }
    with distributed.main_first():
        if distributed.is_main():
            generated_folder.begin(Path(output), source)
    return model, Path(output), source


def generate(model: Generator, folder: Path, source: dict[str, Any], count: int) -> tuple[NpyDataset, dict[str, Any]]:
    """Images 0 to count - 1 of each class, and how they were made."""
    generated_folder.generate_to_folder(model, folder, count, source, BATCH_SIZE)
    try:
        with distributed.main_first():
            dataset = NpyDataset(folder, None, "all", ON_BAD_FILE, classes=model.classes)
    except InputError as error:
        raise InputError(f"{source['checkpoint']} draws invalid images: train it longer\n{error}") from None
    return dataset.only(generated_folder.numbered(count, model.classes)), source


if __name__ == "__main__":
    settings.run(main, globals(), torchrun=True)
