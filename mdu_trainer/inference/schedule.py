"""The plan of a decoding: how many tokens each step reveals, and where.

LLaDA and dllm (`ZHZisZZ/dllm`) reveal equally many tokens a step, and differ where that does not come out even:

                                                    "linear", as LLaDA         "dllm"
    steps do not divide a block, as 10 in 4 steps   3, 3, 2, 2: the first      2, 3, 2, 3: what is left over the steps
                                                    reveal one more            left, rounded, halves to even
    blocks do not divide the steps, as 7 over 3     3, 2, 2 (LLaDA refuses)    3, 3, 3: rounded up
    blocks do not divide the response               a shorter last block       the same
                                                    (LLaDA refuses)
"""

import math
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
        steps: in all, spread evenly over the blocks, the remainder over the first ones, or rounded up with "dllm"; one
            a token if None.
        schedule: as in `reveal_schedule`.
    """
    block_steps = [stop - start for start, stop in blocks]
    if steps is not None and schedule == "dllm":
        block_steps = [math.ceil(steps / len(blocks))] * len(blocks)
    elif steps is not None:
        block_steps = reveal_schedule(steps, len(blocks), "linear")
    index = 0
    for (start, stop), count_steps in zip(blocks, block_steps, strict=True):
        counts = reveal_schedule(stop - start, count_steps, schedule)
        for count, share in zip(counts, dream_shares(count_steps), strict=True):
            yield Step(index, start, stop, count, share)
            index += 1


def reveal_schedule(num_tokens: int, steps: int, schedule: str) -> list[int]:
    """Divide `num_tokens` masked tokens over `steps` steps: how many each reveals.

    "linear" spreads them evenly, the remainder over the first steps (LLaDA). "dllm" takes the share 1 - s/t of what is
    left, of even timesteps from 1 to 0, rounded to the nearest number. "dream" takes the share of its own timesteps,
    rounded down, and all that is left in the last step.
    """
    if schedule == "linear":
        return [num_tokens // steps + (step < num_tokens % steps) for step in range(steps)]
    shares, to_whole = (dllm_shares(steps), round) if schedule == "dllm" else (dream_shares(steps), int)
    counts: list[int] = []
    for share in shares:
        counts.append(to_whole((num_tokens - sum(counts)) * share))
    return counts


def dllm_shares(steps: int) -> list[float]:
    """The share 1 - s/t of what is masked that each step of dllm's schedule reveals, evenly from t = 1 to s = 0."""
    t = (torch.arange(steps, -1, -1, dtype=torch.float64) / steps).float()
    masked = 1 - (1 - t)  # in float32, as published: halves must round alike
    return (1 - (masked[1:] / masked[:-1]).double()).tolist()


def dream_shares(steps: int) -> list[float]:
    """The share 1 - s/t of what is masked that each step of Dream's schedule reveals; 1 in the last."""
    t = torch.linspace(1, DREAM_EPSILON, steps + 1)  # float32, as published: rounding down must round alike
    return [*(1 - t[1:-1] / t[:-2]).tolist(), 1.0]
