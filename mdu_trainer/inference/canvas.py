"""The responses of a batch in the making, and what a step of decoding has revealed of them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Revealed(NamedTuple):
    """The M tokens that a step revealed of the responses of a batch."""

    step: int  # from 0
    place: Tensor  # [M] place of the prompt in the call
    position: Tensor  # [M] in the response
    token: Tensor  # [M] its id


class Canvas(NamedTuple):
    """B rows in the making: the prompt, then N response positions, then padding up to L."""

    place: Tensor  # [B] place of the prompt in the call
    row: Tensor  # [B] number of the prompt, by which is drawn
    start: Tensor  # [B] where the response starts
    ids: Tensor  # [B, L]
    attention_mask: Tensor  # [B, L]
    masked: Tensor  # bool [B, N], response positions yet to reveal

    def keep(self, rows: Tensor) -> "Canvas":
        """The canvas of some rows (bool `[B]`), without padding that all of them share."""
        kept = Canvas(*(part[rows] for part in self))
        width = int(kept.start.max()) + kept.masked.shape[1]
        return kept._replace(ids=kept.ids[:, :width], attention_mask=kept.attention_mask[:, :width])

    def give(self, beginnings: Sequence[Sequence[int | None]]) -> None:
        """Reveal the first ids of each response but for those that are None, in place."""
        given = [(b, n, ids[n]) for b, ids in enumerate(beginnings) for n in range(len(ids)) if ids[n] is not None]
        self.reveal(*torch.tensor(given, dtype=torch.long, device=self.ids.device).view(-1, 3).T)

    def reveal(self, batch_index: Tensor, position: Tensor, token: Tensor) -> None:
        """Put M tokens to positions of the responses, in place: `[M]` each."""
        self.ids[batch_index, self.start[batch_index] + position] = token
        self.masked[batch_index, position] = False

    def response(self) -> Tensor:
        """The response positions: ids `[B, N]`."""
        return self.ids.gather(1, self.start[:, None] + torch.arange(self.masked.shape[1], device=self.ids.device))

    def settled(self, ends: Tensor, length: int | None = None) -> tuple[Tensor, Iterator[tuple[int, list[int]]]]:
        """Find the rows whose response is settled: everything up to its first end token is revealed.

        Args:
            ends: `[E]`, tokens that end a response.
            length: of the response, where the canvas goes on behind it.

        Returns:
            The rows, bool `[B]`; and of each (place of the prompt, response ids).
        """
        response, masked = self.response()[:, :length], self.masked[:, :length]
        first_end = _first(torch.isin(response, ends) & ~masked)
        settled = first_end <= _first(masked)  # equal only if there is neither
        found = zip(self.place[settled], response[settled], first_end[settled], strict=True)
        return settled, ((int(place), ids[:end].tolist()) for place, ids, end in found)


def _first(flags: Tensor) -> Tensor:
    """The first true position in each row of bool `[B, N]`, N if there is none: `[B]`."""
    return torch.where(flags.any(dim=1), flags.int().argmax(dim=1), flags.shape[1])
