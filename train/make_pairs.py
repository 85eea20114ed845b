"""Makes pairs of noise and the image that a trained generator makes of it, so that another one can learn to jump.

    python train/make_pairs.py --checkpoint_path C
    python train/train_diffusion.py --start_path C --pairs_dir pairs --time_grid jump --num_ode_steps 8 ...

Writes PAIRS_DIR/{i}.npy, parts of images as the flow sees them, class after class, and PAIRS_DIR/pairs.json; the noise
follows from SEED. A run that was stopped goes on where it was, and a later one can add more.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import settings
from files import save_array, whole
from models import flow
from models.checkpoint import build_generator, checksum, generator_weights, load_checkpoint
from settings import InputError

CHECKPOINT_PATH = "diffusion_training/dit_conditional_ckpts/dit_conditional_final.pt"  # The generator
PAIRS_DIR = "pairs"  # Where the pairs go
NUM_PAIRS = 300_000  # More are better: with a fifth of them, the jump learns them by heart
NUM_ODE_STEPS = 12  # From noise to image
SOLVER: Literal[(*flow.SOLVERS,)] = "multistep"  # Of them
TIME_GRID: Literal[flow.TIME_GRIDS] = "cosine"  # Of them
SEED = 2026  # Of the noise; images should be generated with another one, from noise that the jump has not seen
BATCH_SIZE = 512  # Images at once; reduce when memory runs out
DEVICE: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto" takes the GPU when there is one

_PART = 3_000  # images in a file


def main() -> None:
    device, folder = settings.pick_device(DEVICE), Path(PAIRS_DIR)
    content = load_checkpoint(CHECKPOINT_PATH)
    model = build_generator(content, CHECKPOINT_PATH).to(device)
    sampler = flow.Sampler(NUM_ODE_STEPS, 1.0, SOLVER, TIME_GRID)  # without guidance: every image of the class counts
    made_by = {"weights": checksum(generator_weights(content)), "sampler": asdict(sampler), "seed": SEED}
    marker = folder / "pairs.json"
    if marker.exists() and json.loads(marker.read_text()) != made_by:
        raise InputError(f"{folder} holds pairs of another generator or sampler: choose another --pairs_dir")
    with whole(marker) as file:
        file.write(json.dumps(made_by, indent=1).encode())
    labels = labels_of(_PART, model.num_classes).to(device)
    for part in tqdm(range(-(-NUM_PAIRS // _PART)), "pairs", unit_scale=_PART, unit="pair"):
        path = folder / f"{part}.npy"
        if not path.exists():
            images = flow.sample(
                *(model, labels, model.sample_shape, model.num_classes, sampler, SEED, BATCH_SIZE, part * _PART, False)
            )
            save_array(path, images.cpu().numpy())


def labels_of(n: int, num_classes: int) -> Tensor:
    """The class of each of n pairs."""
    return torch.arange(n) * num_classes // n


def read_pairs(folder: str, shape: tuple[int, ...], num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise (n, *shape), images (n, *shape) and labels (n,) of PAIRS_DIR.

    Raises:
        InputError: when the folder has none, or those of another network.
    """
    try:
        seed = json.loads((Path(folder) / "pairs.json").read_text())["seed"]
        parts = [np.load(Path(folder) / f"{i}.npy") for i in range(len(list(Path(folder).glob("*.npy"))))]
        images = torch.from_numpy(np.concatenate(parts))
    except (OSError, ValueError, KeyError):
        raise InputError(f"{folder}: no pairs of train/make_pairs.py in it") from None
    if images.shape[1:] != shape:
        raise InputError(f"{folder}: its pairs are of another network")
    labels = labels_of(len(parts[0]), num_classes).repeat(len(parts))
    return flow.noise_images(shape, seed, 0, len(images)), images, labels


if __name__ == "__main__":
    settings.run(main, globals())
