"""C2ST, the classifier two-sample test: a network learns to tell two sets of images apart (Lopez-Paz & Oquab 2017,
arXiv:1610.06545)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HELD_OUT = 0.5  # share of the images that only test the network
_STEPS, _EPOCHS = 200, 40  # of training: whichever is less
_BATCH_SIZE, _LEARNING_RATE = 32, 2e-3  # images of each sample in a batch; learning rate


Read = Callable[[Tensor, torch.Generator | None], Tensor]  # images (m, c, s, s) in [0, 1] of indices (m,)


def c2st(a: Read, b: Read, labels: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Trains a network on half of the images of two samples to tell which sample an image is of; tests it on the rest.

    All classes share one network, with an output for each class, so that each profits from what the others teach it.

    Args:
        a, b: the two samples. Image i of both is of class labels[i]. In training, the second argument gives observed
            images fresh noise each time.
        labels: (n,) int64.
        seed: of the weights, the order and the choice of held-out images.

    Returns:
        Right or wrong for every held-out image, (m,) bool, and its class, (m,). Chance is one half.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():  # the same share of each class
        of_class = torch.nonzero(labels == label).flatten()
        order = torch.randperm(len(of_class), generator=generator)
        held_out[of_class[order[: round(HELD_OUT * len(of_class))]]] = True
    train, test = torch.nonzero(~held_out).flatten(), torch.nonzero(held_out).flatten()
    order = torch.cat([train[torch.randperm(len(train), generator=generator)] for _ in range(_EPOCHS)])
    batches = order.split(_BATCH_SIZE)[:_STEPS]

    def read(index: Tensor, random: torch.Generator | None = None) -> Tensor:
        return torch.cat([a(index, random), b(index, random)])

    def logits_and_answers(network: nn.Module, images: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        answers = torch.arange(2).repeat_interleave(len(index))
        return network(images).gather(1, labels[index].repeat(2)[:, None])[:, 0], answers

    def loss(network: nn.Module, index: Tensor) -> Tensor:
        logits, answers = logits_and_answers(network, read(index, generator), index)
        return F.binary_cross_entropy_with_logits(logits, answers.float())

    network = learned(int(labels.max()) + 1, read(order[:256]), batches, loss, _LEARNING_RATE, seed)
    right, of_class = [], []
    with torch.inference_mode():
        for index in test.split(128):
            logits, answers = logits_and_answers(network, read(index), index)
            right.append((logits > 0) == answers)
            of_class.append(labels[index].repeat(2))
    return torch.cat(right), torch.cat(of_class)


def learned(
    outputs: int,
    examples: Tensor,
    batches: Sequence[Tensor],
    loss: Callable[[nn.Module, Tensor], Tensor],
    rate: float,
    seed: int,
) -> "SmallNetwork":
    """A small network, trained on batches of indices; ``loss`` is a function of the network and a batch.

    Args:
        outputs: number of outputs of the network.
        examples: images (n, c, s, s) like those that it will be shown.
        rate: the largest learning rate.
        seed: of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallNetwork(outputs, examples)
    optimizer = torch.optim.AdamW(network.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, len(batches))
    for batch in batches:
        optimizer.zero_grad()
        loss(network, batch).backward()
        optimizer.step()
        schedule.step()
    return network


class SmallNetwork(nn.Module):
    """A small convolutional network that is shown faint light and small scales as clearly as the bright arcs."""

    def __init__(self, outputs: int, examples: Tensor):
        super().__init__()
        shown = self._shown(examples)
        side = (shown.shape[-1] // 4 + 1) // 2  # pixels that the convolutions leave of an image
        self.layers = nn.Sequential(
            nn.Conv2d(shown.shape[1], 32, 4, 4),
            nn.GroupNorm(4, 32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1),
            nn.GroupNorm(4, 64),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * side**2, outputs),
        )
        self.mean = shown.mean((0, 2, 3), keepdim=True)
        self.deviation = shown.std((0, 2, 3), keepdim=True).clamp_min(1e-6)  # of a channel that is dark everywhere

    def forward(self, images: Tensor) -> Tensor:
        return self.layers((self._shown(images) - self.mean) / self.deviation)

    @staticmethod
    def _shown(images: Tensor) -> Tensor:
        """Images (n, c, s, s) with their logarithm and their small scales beside them, (n, 3 c, s, s)."""
        faint = (images + 1e-3).log()
        small = images - F.avg_pool2d(images, 3, 1, 1)
        return torch.cat([images, faint, small], 1)
