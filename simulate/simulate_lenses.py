"""Simulates strong gravitational lenses as the DeepLense "Models" I to IV, for people without data of their own.

    python simulate/simulate_lenses.py --num_per_class 4000
    python simulate/simulate_lenses.py --model III --data_dir data_III

Writes DATA_DIR/{axion,cdm,no_sub}/{i}.npy (float32, in Model II 64x64 pixels of 0.101"), DATA_DIR/recipe.json, which
says how they were made, and DATA_DIR/parameters.fits, one row an image with all parameters that were drawn for it.
Image i of a class depends on SEED, its class and i alone. So a run that was stopped goes on where it was, and more
images or more processes never change the ones that are there. docs/simulators.md describes the models,
simulate/recipes.py has their numbers.
"""

import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from astropy.table import Table
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import settings
from files import contents, hold, is_empty, save_array, whole
from settings import Count, InputError, Whole
from simulate.recipes import MODEL_II, MODELS, RECIPE_FILE, Recipe, description
from simulate.renderer import draw_lens, parameter_table, render_row
from simulate.workers import render_pool, usable_cores

DATA_DIR: str = "data"  # Where the images go
MODEL: Literal["I", "II", "III", "IV"] = "II"  # See docs/simulators.md; IV needs requirements-model-iv.txt
NUM_PER_CLASS: Count = 5000  # Images of each class; the published sets have 30000
SEED: Whole = 0  # Change it for an independent set
NUM_WORKERS: Whole = 0  # Processes; 0 takes one for each core
GALAXIES_PATH: str | None = None  # Galaxy10_DECals.h5, whose galaxies are the sources of Model IV; None draws galaxies
AS_PUBLISHED: bool = False  # Writes files as the published code does, those of axions as pickles

# The defaults are as in the published code; the other values make sense, too
NOISE: Literal["published", "on", "off"] = "published"  # Models I and IV have it; "on" adds it to II and III
COSMOLOGY: Literal["WMAP9", "Planck18"] = "WMAP9"  # Of the ray tracing; Planck18 is newer: images differ by 1% of peak
EINSTEIN_RADIUS_CONVENTION: Literal["luminosity", "angular_diameter"] = "luminosity"  # Textbooks: angular_diameter


def main() -> None:
    """Writes the table of parameters, then every image that is not there yet."""
    folder, recipe = Path(DATA_DIR), chosen_recipe()
    draw, render = draw_lens, render_row
    if MODEL == "IV":
        from simulate import model_iv  # here: it needs packages of its own

        draw, render = model_iv.with_galaxies(GALAXIES_PATH)
    table = parameter_table(NUM_PER_CLASS, SEED, recipe, draw)
    table.meta = {"SEED": SEED, "THETA_E": EINSTEIN_RADIUS_CONVENTION}
    others = {"MODEL": (MODEL, "II"), "NOISE": (NOISE, "published"), "COSMO": (COSMOLOGY, "WMAP9")}
    others |= {"AS_PUBL": (AS_PUBLISHED, False), "GALAXIES": (GALAXIES_PATH and Path(GALAXIES_PATH).name, None)}
    table.meta |= {name: value for name, (value, usual) in others.items() if value != usual}
    if AS_PUBLISHED:  # the names of these files do not follow from class and index
        table["file"] = [str(image_path(folder, row, recipe, True).relative_to(folder)) for row in table]
    reserve_folder(folder, table, recipe, AS_PUBLISHED)
    todo = [row for row in table if not image_path(folder, row, recipe, AS_PUBLISHED).exists()]
    workers = min(NUM_WORKERS or usable_cores(), max(len(todo), 1))
    print(f"{len(table)} images in {folder}, {len(todo)} of them to simulate in {workers} processes")
    rows = [dict(zip(row.colnames, row, strict=True)) for row in todo]
    job = partial(simulate_to_file, folder, recipe, render, AS_PUBLISHED)
    pool = render_pool(workers)
    try:
        chunk = max(1, min(16, len(rows) // (4 * workers)))  # small for few images, so that all processes have work
        for _ in tqdm(pool.map(job, rows, chunksize=chunk), total=len(rows), unit="image"):
            pass
    finally:
        pool.shutdown(cancel_futures=True)  # on Ctrl-C, drops images that were not begun


def chosen_recipe() -> Recipe:
    """The recipe of MODEL, changed where the other constants are not as published."""
    recipe = replace(MODELS[MODEL], cosmology=COSMOLOGY, convention=EINSTEIN_RADIUS_CONVENTION)
    if NOISE != "published":
        recipe = replace(recipe, noise=NOISE == "on")
    # The noise is that of the published instrument
    return replace(recipe, zero_point=recipe.published_zero_point) if recipe.noise or AS_PUBLISHED else recipe


def simulate_to_file(
    folder: Path, recipe: Recipe, render: Callable[..., np.ndarray], as_published: bool, row: dict[str, Any]
) -> None:
    """Renders a row of the table to its file; the file appears whole or not at all."""
    image = render(row, recipe)
    if not as_published:
        image = image.astype(np.uint16 if recipe.photons and recipe.noise else np.float32)
    elif row.get("axion_mass", np.nan) > 0:
        pair = np.empty(2, object)
        pair[:] = image, row["axion_mass"]
        image = pair
    save_array(image_path(folder, row, recipe, as_published), image)


def image_path(folder: Path, row: dict[str, Any], recipe: Recipe = MODEL_II, as_published: bool = False) -> Path:
    """The file of the image of a row."""
    name = recipe.published_file if as_published else "{class}/{index}.npy"
    split = "val" if row["index"] % 10 == 0 else "train"
    return folder / name.format_map({"class": row["class"], "index": row["index"], "split": split})


def reserve_folder(folder: Path, table: Table, recipe: Recipe = MODEL_II, as_published: bool = False) -> None:
    """Makes the class folders and writes the table and recipe.json, unless the folder holds images that are not of this
    table.

    From then on the folder is this process's own.
    """
    path = folder / "parameters.fits"
    try:
        old = Table.read(path, format="fits") if path.exists() else None
    except Exception:  # astropy can raise nearly anything
        raise InputError(f"{path} is damaged: remove {folder}, or choose another --data_dir") from None
    if old is not None and dict(old.meta) != table.meta:
        before, now = ({"MODEL": "II"} | dict(meta) for meta in (old.meta, table.meta))
        others = [name for name in before | now if before.get(name) != now.get(name)]
        told = ", ".join(f"{name} {before.get(name, 'as usual')}, not {now.get(name, 'as usual')}" for name in others)
        raise InputError(f"{folder} was simulated with {told}: choose another --data_dir")
    if old is None and not is_empty(folder):
        raise InputError(f"{folder} was not simulated here: it {contents(folder)}; choose another --data_dir")
    hold(folder)
    if old is None or len(old) < len(table):
        packed = io.BytesIO()
        table.write(packed, format="fits")
        with whole(path) as file:  # before the class folders, so that whatever they hold belongs to this table
            file.write(packed.getbuffer())
    class_folders = {image_path(folder, row, recipe, as_published).parent for row in table}
    for place in {folder, *(path.parent for path in class_folders)}:
        with whole(place / RECIPE_FILE) as file:
            file.write(json.dumps(description(recipe), indent=1).encode() + b"\n")
    for path in class_folders:
        path.mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    settings.run(main, globals())
