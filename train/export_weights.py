"""Writes the weights of a checkpoint as one small safetensors file to share; of a generator, its EMA weights.

    python train/export_weights.py --checkpoint_path C --output_path weights.safetensors

The file also holds the configuration of the network and how it was trained. Scripts take it in place of a checkpoint,
except to resume a training.
"""

import sys
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import settings
from models.checkpoint import PARTS, load_checkpoint, save_weights
from models.classifier import load_classifier
from models.generator import build_generator
from models.regressor import load_regressor
from settings import InputError
from train.recipes import RECIPES

CHECKPOINT_PATH: str = "diffusion_training/dit_conditional_ckpts/dit_conditional_final.pt"  # Of any network
OUTPUT_PATH: str = "weights/nanodit.safetensors"  # The file to write
HALVED: str = ""  # Pattern for the names of parameters to store in float16, half as large; "*" for all

_KEPT = ("epoch", "sampler", "val_accuracy", "settings")  # other entries of a checkpoint that are kept


def main() -> None:
    if Path(OUTPUT_PATH).suffix != ".safetensors":
        raise InputError(f"--output_path {OUTPUT_PATH}: its name must end in .safetensors")
    content = load_checkpoint(CHECKPOINT_PATH)
    plain = {name: content[name] for name in _KEPT if name in content}
    if "image_size" in content:
        load = load_regressor if "regressor_parameters" in content else load_classifier
        network = load(CHECKPOINT_PATH)
        plain |= network.description()
        weights = network.state_dict()
    else:
        network = build_generator(content, CHECKPOINT_PATH)
        plain |= network.description()
        weights = network.network.state_dict()
        for part in PARTS:
            own = of_part.state_dict() if (of_part := getattr(network, part)) else {}
            weights |= {f"{part}.{name}": value for name, value in own.items()}
    # Batch normalization's running averages are not halved: rounding them hides the faint light that classes differ by
    whole = {name for name, _ in network.named_buffers()}
    for name, value in weights.items():
        if fnmatch(name, HALVED) and name not in whole and value.is_floating_point():
            weights[name] = value.half()
    save_weights(OUTPUT_PATH, weights, **plain)
    print(f"{OUTPUT_PATH}: {Path(OUTPUT_PATH).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    settings.run(main, globals(), recipes=RECIPES)
