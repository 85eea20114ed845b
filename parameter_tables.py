"""Reads the physical parameters of images from their folder.

    data/parameters.fits, data/parameters.csv    a row for each image: its file, and a column for each parameter
    [image, v1, v2, ...]                         values that follow the image in a pickled file: v1, v2, ...
    FITS headers                                 keywords of the image's own header

A table lies beside the images or in a folder above them. Its column "file" (in a CSV file without one, the first
column) has the path of the image from the table's folder, or its name alone, or "stack.npy#3"; tables of simulate/ have
"class" and "index" instead. Any value may be missing. A column with many numbers a row describes many objects:
"subhalo_mass" of 25 subhaloes becomes subhalo_mass_1, the heaviest one, to subhalo_mass_25, and their sum
subhalo_mass_total. "source_xy" becomes source_x and source_y.
"""

import csv
import io
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from parameters import Column, converted, some_of
from settings import InputError

TABLES = ("parameters.fits", "parameters.csv")
_OF_STACK = re.compile(r"(.*)\.npy#(\d+)")  # an image that a table with class and index calls class/index.npy
_MISSING = ("", "na", "n/a", "#n/a", "nan", "none", "null", "-", "--")  # cells of a CSV file that stand for no value
_NOWHERE, _SEVERAL = -1, -2  # in place of the number of an image: there is none, there are several


def read_columns(
    root: Path, files: Sequence[str], pickled: np.ndarray, names: Sequence[str], lenient: bool = False
) -> dict[str, Column]:
    """Parameters of images by name, in the order of the images.

    Args:
        files: paths of the images relative to ``root``.
        pickled: (n, 4), the values that follow the images in pickled files.
        names: of the parameters that are wanted.
        lenient: True makes a parameter that is found nowhere NaN for all images.

    Raises:
        InputError: for a damaged table, for a table of other images, or for a parameter that is found nowhere.
    """
    known = {f"v{i + 1}": Column(values) for i, values in enumerate(pickled.T) if np.isfinite(values).any()}
    if "v1" in known:
        known["axion_mass"] = Column(known["v1"].values, "eV")
    for folder in sorted({"", *(name for file in files for name in _folders_of(file))}):
        for table in TABLES:
            if (path := root / folder / table).is_file():
                _merge(known, _read_table(path, folder, files, names, lenient), len(files))
    if missing := [name for name in names if name not in known]:
        known |= _read_headers(root, files, missing)
    missing = [name for name in names if name not in known]
    if missing and not lenient:
        near = sorted(known, key=lambda name: -SequenceMatcher(None, name, missing[0]).ratio())
        there = f"there are {some_of(near)}" if known else f"no {' or '.join(TABLES)} has columns of numbers"
        raise InputError(f"{root}: no parameter {some_of(missing)} of its images; {there}", 2)
    unknown = Column(np.full(len(files), np.nan))
    return {name: known.get(name, unknown) for name in names}


def _folders_of(file: str) -> list[str]:
    """Folders between the root and a file, as "train" and "train/axion" for train/axion/0.npy."""
    parts = file.split("/")[:-1]
    return ["/".join(parts[: i + 1]) for i in range(len(parts)) if parts[i] != ".."]


def _merge(known: dict[str, Column], table: dict[str, Column], count: int) -> None:
    """Adds the columns of a table to ``known``; their values, except NaN, replace those that are known already."""
    for name, column in table.items():
        before = known.get(name, Column(np.full(count, np.nan)))
        unit = before.unit or column.unit
        values = converted(name, column, unit)
        known[name] = Column(np.where(np.isfinite(values), values, before.values), unit)


def _read_table(
    path: Path, folder: str, files: Sequence[str], wanted: Sequence[str], lenient: bool
) -> dict[str, Column]:
    """Columns of a table, in the order of ``files``; NaN for those that the table lacks.

    Raises:
        InputError: for a damaged table; for one of other images, unless ``lenient``; for a ``wanted`` column that holds
            anything but numbers.
    """
    from astropy.table import Table  # here, since it takes a second and few need it

    try:
        table = Table.read(path, format="fits") if path.suffix == ".fits" else _read_csv(path)
    except Exception as error:  # astropy can raise nearly anything
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else "no reason is known"
        raise InputError(f"{path}: is damaged, or no table: {reason}") from None
    if not table.colnames:
        raise InputError(f"{path}: is empty")
    prefix = f"{folder}/" if folder else ""
    here = {file.removeprefix(prefix): i for i, file in enumerate(files) if file.startswith(prefix)}
    names = _names_in(table, path)
    alone: dict[str, int] = {}
    for file, i in here.items():  # by its name alone, if no other file has that name
        short = file.rsplit("/", 1)[-1]
        alone[short] = _SEVERAL if short in alone else i
    stacks = {f"{match[1]}/{match[2]}.npy": i for file, i in here.items() if (match := _OF_STACK.fullmatch(file))}
    known = alone | stacks | here
    rows = np.array([known.get(name, _NOWHERE) for name in names], np.int64)
    there, problem, remark = rows >= 0, "", ""
    if (rows == _SEVERAL).any():
        first = names[(rows == _SEVERAL).argmax()]
        problem = f"{path}: several files are called {first}: name folders, too, as in {min(here)}"
    elif not there.any():
        first = f"it begins with {names[0]}, the folder with {min(here)}" if names else "it is empty"
        problem = f"{path}: no row is of a file in its folder: {first}"
    elif not there.all():
        first = names[there.argmin()]
        remark = f"{path}: {(~there).sum():,} of its {len(rows):,} rows are of no image here, the first of {first}"
    if problem and not lenient:
        raise InputError(problem)
    if problem or remark:
        print(problem or remark)
    if not there.any():
        return {}
    own = rows[there]
    if twice := np.flatnonzero(np.bincount(own) > 1).tolist():
        raise InputError(f"{path}: has several rows of {files[twice[0]]}, of which only one can be right")
    _check_numbers(table, path, wanted)
    found = {}
    for name, column in _flat(table, path).items():
        values = np.full(len(files), np.nan)
        values[own] = column.values[there]
        found[name] = Column(values, column.unit)
    return found


def _read_csv(path: Path) -> Any:
    """The table of a CSV file, with commas, semicolons or tabs between its cells."""
    from astropy.io import ascii as text_tables

    text = path.read_text("utf-8-sig")
    head = text.lstrip().partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    cases = {case(missing) for missing in _MISSING for case in (str.lower, str.upper, str.capitalize)} | {"NaN"}
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    commas = io.StringIO()  # astropy takes several tabs for one
    csv.writer(commas).writerows(rows)
    fill = [(missing, "0") for missing in cases]  # the cell is masked, whatever it is filled with
    return text_tables.read(commas.getvalue().splitlines(), format="csv", fill_values=fill)


def _names_in(table: Any, path: Path) -> list[str]:
    """The file that each row of a table describes."""
    if "file" not in table.colnames and {"class", "index"} <= {*table.colnames}:
        return [f"{of}/{index}.npy" for of, index in zip(table["class"], table["index"], strict=True)]
    named = [name for name in table.colnames if name.strip().lower() == "file"]
    if path.suffix == ".fits" and not named:
        raise InputError(f'{path}: has no column "file"')
    files = table[named[0] if named else table.colnames[0]]
    return [str(name).strip().replace("\\", "/").removeprefix("./") for name in files]


def _name_and_unit(title: str) -> tuple[str, str]:
    """Name and unit in the title of a column, such as "mass [solMass]" or "theta_E (arcsec)"."""
    name, square, round_ = re.fullmatch(r"\s*(.*?)\s*(?:\[([^\[\]]*)\]|\s\(([^()]*)\))?\s*", title).groups()
    return name, square or round_ or ""


def _check_numbers(table: Any, path: Path, wanted: Sequence[str]) -> None:
    """Raises InputError, with the first bad cell, for a column of a wanted name that holds anything but numbers."""
    for key in table.colnames:
        if _name_and_unit(key)[0] in wanted and table[key].dtype.kind not in "iufb":
            for row, cell in enumerate(table[key].tolist()):
                try:
                    float("nan" if cell is None else cell)
                except (TypeError, ValueError):
                    raise InputError(f"{path}: {key} of row {row + 1} is {cell!r}, which is no number", 2) from None


def _flat(table: Any, path: Path) -> dict[str, Column]:
    """The numeric columns of a table, split so that each has one number a row; see the top of this file."""
    found, many = {}, {}
    for key in table.colnames:
        column = table[key]
        counts = key == "index" and "class" in table.colnames  # numbers the images of a class, in a table of simulate/
        if counts or column.dtype.kind not in "iufb" or column.ndim > 3:
            continue
        name, bracketed = _name_and_unit(key)
        if name in found or name in many:
            raise InputError(f"{path}: has two columns {name}")
        values = np.ma.filled(np.ma.masked_array(column, dtype=np.float64), np.nan)
        unit = str(column.unit or bracketed)
        parts = {name: values}
        if name.endswith("_xy") and values.ndim > 1 and values.shape[-1] == 2:
            parts = {name.removesuffix("xy") + axis: values[..., i] for i, axis in enumerate("xy")}
        for part, of_part in parts.items():
            (found if of_part.ndim == 1 else many)[part] = Column(of_part, unit)
    for name, (values, unit) in many.items():
        mass = many.get(f"{name.rpartition('_')[0]}_mass")
        if mass is not None and mass.values.shape == values.shape:  # the heaviest object first
            values = np.take_along_axis(values, np.argsort(-mass.values, 1, kind="stable"), 1)
        if values.ndim > 2:
            continue
        found |= {f"{name}_{i + 1}": Column(values[:, i], unit) for i in range(values.shape[1])}
        if name.endswith("_mass"):
            there = np.isfinite(values).any(1)
            found[f"{name}_total"] = Column(np.where(there, np.nansum(values, 1), np.nan), unit)
    return found


def _read_headers(root: Path, files: Sequence[str], names: Sequence[str]) -> dict[str, Column]:
    """Columns of the parameters ``names`` that FITS headers hold as keywords; NaN for files without them."""
    from image_files import read_keywords

    found: dict[str, np.ndarray] = {}
    units: dict[str, str] = {}
    for i, file in enumerate(tqdm(files, "reading headers", unit="file", leave=False, delay=1)):
        for name, (value, unit) in read_keywords(root / file, names).items():
            units[name] = units.get(name) or unit
            column = found.setdefault(name, np.full(len(files), np.nan))
            column[i] = converted(name, Column(value, unit), units[name])
    return {name: Column(values, units[name]) for name, values in found.items()}
