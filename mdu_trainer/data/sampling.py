"""Which rows of a training come in an epoch, and batches of rows of like length."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..masking import permutation
from .rows import Order, TokenizedRows


def length_grouped(batch_size: int) -> Order:
    """Batches of rows of like length, in shuffled order; rows of equal length are shuffled."""

    def order(rows: TokenizedRows, seed: int, visit: int) -> Tensor:
        shuffle = permutation(seed, visit, len(rows))
        by_length = shuffle[torch.tensor(rows.lengths)[shuffle].argsort(stable=True)]
        full = len(rows) // batch_size * batch_size
        batches = by_length[:full].view(-1, batch_size)
        return torch.cat([batches[permutation(seed + 1, visit, len(batches))].flatten(), by_length[full:]])

    return order


class EpochSampler(torch.utils.data.Sampler[int]):
    """The counters of one epoch: `epoch * size ... (epoch + 1) * size - 1`, and filler up to a multiple.

    Args:
        size: rows an epoch.
        epoch: returns the current epoch; read when an epoch starts, so a resumed run reads the one it resumed in.
        multiple: the rows that all processes take together. They need as many batches each, and accelerate would
            repeat rows to get there, which would weigh twice.
    """

    def __init__(self, size: int, epoch: Callable[[], int], multiple: int = 1):
        self.size = size
        self.epoch = epoch
        self.filler = -size % multiple

    def __len__(self) -> int:
        return self.size + self.filler

    def __iter__(self) -> Iterator[int]:
        start = self.epoch() * self.size
        return iter([*range(start, start + self.size), *[~start] * self.filler])
