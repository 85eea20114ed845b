"""Simulates strong gravitational lenses by the DeepLense "Model II" recipe, for people without data of their own.

    python simulate/simulate_lenses.py --num_per_class 4000

Writes DATA_DIR/{axion,cdm,no_sub}/{i}.npy (float32, 64x64 pixels of 0.101") and DATA_DIR/parameters.fits, one row an
image with everything that was drawn for it. Image i of a class depends on SEED, its class and i alone, so a run that
was stopped goes on where it was, and more images or more processes never change the ones that are there.

Recipe: Alexander et al. 2020 (arXiv:1909.07346) as coded in DeepLenseSim, rendered by lenstronomy (Birrer & Amara
2018, arXiv:1803.09746).
"""

import io
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from astropy import constants, units
from astropy.cosmology import FlatLambdaCDM
from astropy.table import Table
from lenstronomy.ImSim.image_model import ImageModel
from lenstronomy.SimulationAPI.ObservationConfig.Euclid import Euclid
from lenstronomy.SimulationAPI.sim_api import SimAPI
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import settings
from files import contents, hold, is_empty, save_array, whole
from settings import Count, InputError, Whole

DATA_DIR: str = "data"  # Where the images go
NUM_PER_CLASS: Count = 5000  # Images of each class; the published set has 30000
SEED: Whole = 0  # Change it for an independent set
NUM_WORKERS: Whole = 0  # Processes; 0 takes one for each core

EINSTEIN_RADIUS_CONVENTION: Literal["luminosity", "angular_diameter"] = "luminosity"  # The second one is the textbook's

# The recipe itself
_CLASSES = ("axion", "cdm", "no_sub")
_Z_LENS, _Z_SOURCE = 0.5, 1.0
_HALO_MASS = 1e12  # solar masses, like all masses here
_VORTEX_MASS, _VORTEX_POINTS = 3e10, 100
_SUBHALO_COUNT, _SUBHALO_MASSES, _SUBHALO_SLOPE, _SUBHALO_RADII = 25, (1e6, 1e10), -0.9, (0.25, 2.0)  # radii in arcsec
_SOURCE_BOX = 0.35  # the source lies within +-0.35" on each axis


def main() -> None:
    """Writes the table of parameters, then every image that is not there yet."""
    folder = Path(DATA_DIR)
    table = parameter_table(NUM_PER_CLASS, SEED)
    table.meta = {"SEED": SEED, "THETA_E": EINSTEIN_RADIUS_CONVENTION}
    reserve_folder(folder, table)
    todo = [row for row in table if not image_path(folder, row).exists()]
    workers = min(NUM_WORKERS or usable_cores(), max(len(todo), 1))
    print(f"{len(table)} images in {folder}, {len(todo)} of them to simulate in {workers} processes")
    rows = [dict(zip(row.colnames, row, strict=True)) for row in todo]
    job = partial(simulate_to_file, folder, EINSTEIN_RADIUS_CONVENTION)
    pool = ProcessPoolExecutor(workers, initializer=settings.as_worker)
    try:
        for _ in tqdm(pool.map(job, rows, chunksize=16), total=len(rows), unit="image"):
            pass
    finally:
        pool.shutdown(cancel_futures=True)  # on Ctrl-C, drops what has not begun


def usable_cores() -> int:
    """Cores that this process may use: in a SLURM job fewer than the node has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def parameter_table(num_per_class: int, seed: int) -> Table:
    """What is drawn for every image: a row each, NaN where a class has no such parameter.

    Row k depends on ``seed``, its class and its index alone. Angles are in radians, positions in arcsec, masses in
    solar masses, the axion mass in eV.
    """
    rows = []
    for index in range(num_per_class):
        for label, name in enumerate(_CLASSES):
            rng = np.random.default_rng([seed, label, index])
            row = {
                "class": name,
                "index": index,
                "source_xy": rng.uniform(-_SOURCE_BOX, _SOURCE_BOX, 2),
                "axion_mass": np.nan,
                "vortex_angle": np.nan,
                "subhalo_mass": np.full(_SUBHALO_COUNT, np.nan),
                "subhalo_xy": np.full((_SUBHALO_COUNT, 2), np.nan),
            }
            if name == "axion":
                row["axion_mass"] = 10 ** rng.uniform(-24, -22)
                row["vortex_angle"] = rng.uniform(0, 2 * np.pi)
            if name == "cdm":
                low, high = np.power(_SUBHALO_MASSES, _SUBHALO_SLOPE + 1)  # inverse CDF of p(m) ~ m^-0.9
                row["subhalo_mass"] = (low + (high - low) * rng.random(_SUBHALO_COUNT)) ** (1 / (_SUBHALO_SLOPE + 1))
                radius, angle = rng.uniform(*_SUBHALO_RADII, _SUBHALO_COUNT), rng.uniform(0, 2 * np.pi, _SUBHALO_COUNT)
                row["subhalo_xy"] = np.stack([radius * np.sin(angle), radius * np.cos(angle)], axis=1)
            rows.append(row)
    of_unit = {"source_xy": "arcsec", "subhalo_xy": "arcsec", "axion_mass": "eV", "vortex_angle": "rad"}
    return Table({key: [row[key] for row in rows] for key in rows[0]}, units=of_unit | {"subhalo_mass": "solMass"})


def point_masses(row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The substructure of an image: masses (n,) in solar masses and positions (n, 2) in arcsec; n is 0 for no_sub."""
    if row["class"] == "axion":
        # A vortex as long as the de Broglie wavelength: 100 equal points on a line through the centre
        length = 0.06 / (2 * row["axion_mass"]) * 1e-22
        direction = [np.cos(row["vortex_angle"]), np.sin(row["vortex_angle"])]
        positions = np.linspace(-length, length, _VORTEX_POINTS)[:, None] * direction
        return np.full(_VORTEX_POINTS, _VORTEX_MASS / _VORTEX_POINTS), positions
    if row["class"] == "cdm":
        return np.asarray(row["subhalo_mass"]), np.asarray(row["subhalo_xy"])
    return np.empty(0), np.empty((0, 2))


def einstein_radius(mass: np.ndarray | float, convention: str = "luminosity") -> np.ndarray:
    """Einstein radius in arcsec of point masses in solar masses, lens at z = 0.5 and source at z = 1.

    ``sqrt(4 G M / c^2 * D_LS / (D_L D_S))``. The published images take luminosity distances and D_LS = D_S - D_L
    (1.28149" for 1e12 solar masses); the textbook takes angular-diameter distances throughout.
    """
    return np.sqrt(np.asarray(mass)) * _einstein_radius_of_one(convention)


@cache
def _einstein_radius_of_one(convention: str) -> float:
    cosmology = FlatLambdaCDM(H0=70, Om0=0.3, Ob0=0.05)
    lens, source = cosmology.comoving_distance([_Z_LENS, _Z_SOURCE])
    if convention == "luminosity":
        lens, source = lens * (1 + _Z_LENS), source * (1 + _Z_SOURCE)
        between = source - lens
    else:
        between = (source - lens) / (1 + _Z_SOURCE)  # of a flat universe
        lens, source = lens / (1 + _Z_LENS), source / (1 + _Z_SOURCE)
    angle = np.sqrt(4 * constants.G * units.solMass / constants.c**2 * between / (lens * source))
    return 206265 * angle.to_value("")


@cache
def telescope(num_points: int) -> tuple[SimAPI, ImageModel]:
    """lenstronomy's simulator and image model for a lens with so many point masses; slow to build, fast to reuse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it asks us to check the cosmology that the recipe fixes
        simulator = SimAPI(
            num_pix=64,
            kwargs_single_band=Euclid(band="VIS", psf_type="GAUSSIAN", coadd_years=6).kwargs_single_band(),
            kwargs_model={
                "lens_model_list": ["SIE", "SHEAR"] + ["POINT_MASS"] * num_points,
                "lens_redshift_list": [_Z_LENS] * (2 + num_points),
                "source_light_model_list": ["SERSIC_ELLIPSE"],
                "source_redshift_list": [_Z_SOURCE],
                # Deflections are meant for a source at 2.5: for ours at 1.0 lenstronomy scales them by 0.6343
                "z_source_convention": 2.5,
                "z_source": _Z_SOURCE,
                "cosmo": FlatLambdaCDM(H0=69.7, Om0=0.2814, Ob0=0.0464),
            },
        )
        return simulator, simulator.image_model_class({"point_source_supersampling_factor": 1})


def render(
    source_xy: np.ndarray, theta_e: np.ndarray, positions: np.ndarray, halo_theta_e: float | None = None
) -> np.ndarray:
    """One noise-free image of the recipe, (64, 64) float64 in counts per second.

    Args:
        source_xy: centre of the source in arcsec, (2,).
        theta_e: Einstein radii of the point masses in arcsec, (n,).
        positions: their positions in arcsec, (n, 2).
        halo_theta_e: Einstein radius of the main halo in arcsec; that of 1e12 solar masses when None.
    """
    simulator, image_model = telescope(len(theta_e))
    lens = smooth_lens(halo_theta_e)
    lens += [{"theta_E": t, "center_x": x, "center_y": y} for t, (x, y) in zip(theta_e, positions, strict=True)]
    x, y = source_xy
    source = source_light() | {"center_x": x, "center_y": y}
    _, source_amplitude, _ = simulator.magnitude2amplitude(kwargs_source_mag=[source])
    return 2 * image_model.image(lens, source_amplitude)  # twice, as the published files are


def render_row(row: dict[str, Any], convention: str = "luminosity") -> np.ndarray:
    """The image of a row of ``parameter_table``, as ``render`` gives it."""
    masses, positions = point_masses(row)
    halo = einstein_radius(_HALO_MASS, convention)
    return render(row["source_xy"], einstein_radius(masses, convention), positions, halo)


def smooth_lens(halo_theta_e: float | None = None) -> list[dict[str, float]]:
    """The lens without substructure, as lenstronomy takes it."""
    halo_theta_e = einstein_radius(_HALO_MASS) if halo_theta_e is None else halo_theta_e
    return [
        {"theta_E": halo_theta_e, "e1": 0.1, "e2": 0.0, "center_x": 0.0, "center_y": 0.0},
        {"gamma1": 0.05, "gamma2": 0.0},
    ]


def source_light() -> dict[str, float]:
    """The source but for its position, as lenstronomy's SERSIC_ELLIPSE takes it."""
    return {"magnitude": 20, "R_sersic": 0.25, "n_sersic": 1, "e1": -0.1, "e2": 0.1}


def source_plane() -> np.ndarray:
    """Where the ray of each pixel meets the source plane behind the smooth lens, (2, 64, 64) in arcsec."""
    _, image_model = telescope(0)
    x, y = image_model.ImageNumerics.coordinates_evaluate
    return np.stack(image_model.source_mapping.image2source(x, y, smooth_lens(), 0)).reshape(2, 64, 64)


def psf_matrix() -> np.ndarray:
    """P, (64, 64), such that P @ image @ P.T is the image blurred by the telescope's Gaussian point spread function."""
    convolve = telescope(0)[1].ImageNumerics.re_size_convolve
    rows = np.repeat(np.eye(64)[:, :, None], 64, axis=2)  # image i is 1 in row i
    matrix = np.stack([convolve(image.ravel())[:, 0] for image in rows], axis=1)
    return matrix / matrix.sum(1, keepdims=True)  # a flat image stays as it is


def simulate_to_file(folder: Path, convention: str, row: dict[str, Any]) -> None:
    """Renders a row of the table to its file; the file appears whole or not at all."""
    save_array(image_path(folder, row), render_row(row, convention).astype(np.float32))


def image_path(folder: Path, row: dict[str, Any]) -> Path:
    return folder / row["class"] / f"{row['index']}.npy"


def reserve_folder(folder: Path, table: Table) -> None:
    """Makes the class folders and writes the table, unless the folder holds images that are not of this table.

    From then on the folder is this process's own.
    """
    path = folder / "parameters.fits"
    try:
        old = Table.read(path, format="fits") if path.exists() else None
    except Exception:  # astropy can raise nearly anything
        raise InputError(f"{path} is damaged: remove {folder}, or choose another --data_dir") from None
    if old is not None and dict(old.meta) != table.meta:
        raise InputError(f"{folder} was simulated with {dict(old.meta)}: choose another --data_dir")
    if old is None and not is_empty(folder):
        raise InputError(f"{folder} was not simulated here: it {contents(folder)}; choose another --data_dir")
    hold(folder)
    if old is None or len(old) < len(table):
        packed = io.BytesIO()
        table.write(packed, format="fits")
        with whole(path) as file:  # before the folders: whatever is there then belongs to it
            file.write(packed.getbuffer())
    for name in _CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    settings.run(main, globals())
