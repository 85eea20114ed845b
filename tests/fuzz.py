"""Damages .npy files and checkpoints at random. Each must load right or be refused in one line, in bounded time.

python tests/fuzz.py --cases 100000
"""

import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
from kill_training import same

import settings
from image_files import read_image
from models.checkpoint import load_checkpoint, save_checkpoint, save_weights
from models.generator import build_generator, build_untrained

CASES = 10_000  # Damaged files; a third each .npy, .pt and .safetensors
SEED = 0  # Of the damage

_SECONDS = 20  # a file that takes longer hangs


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "whole.pt"
        save_checkpoint(checkpoint, epoch=1, **content_of(("axion", "cdm", "no_sub"), (1, 64, 64)))
        images = sorted((ROOT / "tests" / "data" / "published_format").rglob("*.npy"))
        grown = fuzz(CASES, images, checkpoint, Path(folder), SEED)
    print(f"{CASES} damaged files: each was refused in a line or read right; memory grew by {grown / 1e6:.0f} MB")


def content_of(classes: tuple[str, ...], image_shape: tuple[int, ...], **changes: Any) -> dict[str, Any]:
    """A checkpoint of a tiny untrained generator."""
    sizes = {"hidden_size": 16, "depth": 1, "num_heads": 2} | changes
    generator = build_untrained("NanoDiT-S/16", classes, image_shape, **sizes)
    return {"model_state_dict": generator.network.state_dict(), "sampler": {}, **generator.description()}


def fuzz(cases: int, images: list[Path], checkpoint: Path, folder: Path, seed: int) -> float:
    """Growth of memory in bytes while damaged files are loaded; fails at the first that hangs or is read wrongly."""
    content = load_checkpoint(checkpoint)
    weights = folder / "whole.safetensors"
    told = ("network", "model_config", "prediction", "classes", "image_shape", "sampler")
    save_weights(weights, content["model_state_dict"], **{name: content[name] for name in told})
    right = {checkpoint: content, weights: load_checkpoint(weights)}
    sources = [images, [checkpoint], [weights]]
    random = np.random.default_rng(seed)
    signal.signal(signal.SIGALRM, _hangs)
    before = 0.0
    for case in tqdm(range(cases), "damaging", leave=False):
        if case == cases // 4:  # by now, everything that is loaded only once is loaded
            before = _peak()
        source = sources[case % 3][random.integers(len(sources[case % 3]))]
        path = folder / f"damaged{source.suffix}"
        path.write_bytes(damaged(source.read_bytes(), random))
        signal.alarm(_SECONDS)
        try:
            if source.suffix == ".npy":
                image, _ = read_image(path)
                assert image.shape == (1, 64, 64)
                assert np.isfinite(image).all()
            else:
                found = load_checkpoint(path)
                assert same(found, right[source]), f"seed {seed}, case {case}: read wrongly"
                build_generator(found, path)
        except settings.InputError:
            pass
        except Exception:
            shutil.copy(path, f"fuzz_failure{path.suffix}")
            raise
        finally:
            signal.alarm(0)
    return _peak() - before


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """Content with some bytes changed, a part cut off, doubled or moved, most often near its ends."""
    changed = bytearray(content)
    for _ in range(random.integers(1, 5)):
        near = min(len(changed), 2000)
        where = int(random.choice([random.integers(len(changed)), random.integers(near), -1 - random.integers(near)]))
        changed[where] = random.integers(256)
    kind = random.integers(6)
    a, b = sorted(random.integers(len(changed) + 1, size=2))
    if kind == 0:
        return bytes(changed[:b])
    if kind == 1:
        return bytes(changed[:a] + changed[b:])
    if kind == 2:
        return bytes(changed[:b] + changed[a:])
    return bytes(changed)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _hangs(number: int, frame: object) -> None:
    raise TimeoutError(f"more than {_SECONDS} s for a damaged file")


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings.run(main, globals())
