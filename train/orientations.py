"""Training images in every orientation that their kind of data has: lenses by the thousand count as many more."""

import torch
from torch import Tensor

# Quarter turns and whether mirrored first. Shear and sources of one direction leave half a turn alone
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
    """Number of an orientation for each of n images, (n,); nothing is drawn where there is but one."""
    count = len(SYMMETRIES[symmetry])
    if count == 1:
        return torch.zeros(n, dtype=torch.long, device=random.device)
    return torch.randint(count, (n,), generator=random, device=random.device)


def oriented(images: Tensor, orientations: Tensor, symmetry: str) -> Tensor:
    """Images (n, c, s, s), each in the orientation of its number (n,)."""
    if len(SYMMETRIES[symmetry]) == 1:
        return images
    found = torch.empty_like(images)
    for number, orientation in enumerate(SYMMETRIES[symmetry]):
        of_number = orientations == number
        found[of_number] = turned(images[of_number], *orientation)
    return found


def some_of_all(images: Tensor, symmetry: str, most: int) -> Tensor:
    """At most so many images (n, c, s, s), at random; each in as many orientations, one after the other, as leave room
    for all images."""
    ways = len(SYMMETRIES[symmetry])
    each = min(ways, max(1, most // len(images)))
    random = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(images), generator=random)[: most // each]
    orientations = torch.rand(len(chosen), ways, generator=random).argsort(1)[:, :each]
    return oriented(images[chosen.repeat_interleave(each)], orientations.flatten(), symmetry)
