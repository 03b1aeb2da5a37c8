"""The plan of a decoding: how many tokens each step reveals, and where."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

DREAM_EPSILON = 1e-3  # where Dream's timesteps end


@dataclass(frozen=True)
class Step:
    """A step of the plan: where it reveals, and how much."""

    index: int
    start: int
    stop: int
    count: int
    share: float


def plan(blocks: Sequence[tuple[int, int]], steps: int | None, schedule: str) -> Iterator[Step]:
    """The steps of a decoding, block by block.

    Args:
        blocks: where each starts and stops (exclusive) within the response.
        steps: in all, spread evenly over the blocks; one a token if None.
        schedule: as in `reveal_schedule`.
    """
    block_steps = [stop - start for start, stop in blocks]
    if steps is not None:
        block_steps = reveal_schedule(steps, len(blocks), "linear")
    index = 0
    for (start, stop), count_steps in zip(blocks, block_steps, strict=True):
        counts = reveal_schedule(stop - start, count_steps, schedule)
        for count, share in zip(counts, dream_shares(count_steps), strict=True):
            yield Step(index, start, stop, count, share)
            index += 1


def reveal_schedule(num_tokens: int, steps: int, schedule: str) -> list[int]:
    """Divide `num_tokens` masked tokens over `steps` steps: how many each reveals.

    "linear" spreads them evenly, the remainder over the first steps (LLaDA). "dream" takes the share 1 - s/t of what
    is left, rounded down, and all of it in the last step.
    """
    if schedule == "linear":
        return [num_tokens // steps + (step < num_tokens % steps) for step in range(steps)]
    counts = []
    for share in dream_shares(steps):
        counts.append(int((num_tokens - sum(counts)) * share))
    return counts


def dream_shares(steps: int) -> list[float]:
    """The share 1 - s/t of what is masked that each step of Dream's schedule reveals; 1 in the last."""
    t = torch.linspace(1, DREAM_EPSILON, steps + 1)  # float32, as published: rounding down must round alike
    return [*(1 - t[1:-1] / t[:-2]).tolist(), 1.0]
