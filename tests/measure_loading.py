"""Times one epoch of 15,000 files: NpyDataset with a warm cache, and np.load of each file in a DataLoader of 4 workers.

python tests/measure_loading.py
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dataset import NpyDataset, diffusion_transforms, epoch_batches

CLASSES = ("axion", "cdm", "no_sub")
FILES = 15000


class PlainDataset(Dataset):
    """Data set of the published code, which calls np.load for every image in every epoch."""

    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])

    def __init__(self, root: Path):
        self.files = sorted(root.glob("*/*.npy"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        file = self.files[index]
        return self.to_tensor(np.load(file).astype(np.float32)[..., None]), CLASSES.index(file.parent.name)


def seconds(batches) -> float:
    """Time to run through the batches."""
    started = time.perf_counter()
    assert sum(len(labels) for _, labels in batches) == FILES
    return time.perf_counter() - started


def main() -> None:
    """Makes the files, then times both in turn."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rng = np.random.default_rng(0)
        for i in range(FILES):
            path = root / CLASSES[i % 3] / f"{i}.npy"
            path.parent.mkdir(exist_ok=True)
            np.save(path, rng.random((64, 64), np.float32))
        loader = DataLoader(PlainDataset(root), batch_size=160, shuffle=True, num_workers=4)
        data = NpyDataset(root)
        data.images = diffusion_transforms(data.images)
        for _ in range(3):
            plain = seconds(loader)
            ours = float(np.median([seconds(map(data.__getitem__, epoch_batches(FILES, 160, 0, i))) for i in range(5)]))
            print(f"np.load a file: {plain:.2f} s, NpyDataset: {ours:.3f} s, {plain / ours:.0f} times faster")


if __name__ == "__main__":
    main()
