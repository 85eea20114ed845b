"""Training images in every orientation that their symmetry allows, so that a few thousand lenses count as many more."""

import torch
from torch import Tensor

# (quarter turns, whether mirrored first). Where shear and source have a fixed direction, only half a turn is a symmetry
SYMMETRIES = {
    "none": ((0, False),),
    "half_turn": ((0, False), (2, False)),
    "flips": ((0, False), (2, False), (0, True), (2, True)),
    "square": tuple((turns, mirrored) for mirrored in (False, True) for turns in range(4)),
}


def turned(images: Tensor, quarter_turns: int, mirrored: bool) -> Tensor:
    """Images (..., s, s), mirrored left to right or not, then turned."""
    return torch.rot90(images.flip(-1) if mirrored else images, quarter_turns, (-2, -1))


def draw_orientations(symmetry: str, n: int, random: torch.Generator) -> Tensor:
    """Random index of an orientation for each of n images, (n,); with only one orientation, nothing is drawn."""
    count = len(SYMMETRIES[symmetry])
    if count == 1:
        return torch.zeros(n, dtype=torch.long, device=random.device)
    return torch.randint(count, (n,), generator=random, device=random.device)


def oriented(images: Tensor, orientations: Tensor, symmetry: str) -> Tensor:
    """Images (n, c, s, s), each brought into the orientation of its index in ``orientations`` (n,)."""
    if len(SYMMETRIES[symmetry]) == 1:
        return images
    found = torch.empty_like(images)
    for number, orientation in enumerate(SYMMETRIES[symmetry]):
        of_number = orientations == number
        found[of_number] = turned(images[of_number], *orientation)
    return found


def some_of_all(images: Tensor, symmetry: str, most: int) -> Tensor:
    """At most ``most`` of the images (n, c, s, s), at random. Each comes in as many orientations as leave room for all
    images; those of one image are adjacent."""
    ways = len(SYMMETRIES[symmetry])
    each = min(ways, max(1, most // len(images)))
    random = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(images), generator=random)[: most // each]
    orientations = torch.rand(len(chosen), ways, generator=random).argsort(1)[:, :each]
    return oriented(images[chosen.repeat_interleave(each)], orientations.flatten(), symmetry)
