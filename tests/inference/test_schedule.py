"""How many tokens each step reveals, where steps, blocks and the response do not divide one another."""

import pytest
import torch

from mdu_trainer.inference.generation import DiffusionGenerationConfig
from mdu_trainer.inference.schedule import plan, reveal_schedule


def counts(num_tokens: int, steps: int | None, block_length: int, schedule: str) -> list[list[int]]:
    """The counts of each block's steps."""
    blocks = DiffusionGenerationConfig(num_tokens, block_length=block_length).blocks
    found = {block: [] for block in blocks}
    for step in plan(blocks, steps, schedule):
        found[step.start, step.stop].append(step.count)
    return list(found.values())


def llada_transfer_tokens(num_masked: int, steps: int) -> list[int]:
    """LLaDA's `get_num_transfer_tokens` for one row."""
    num_transfer_tokens = torch.zeros(steps, dtype=torch.int64) + num_masked // steps
    num_transfer_tokens[: num_masked % steps] += 1
    return num_transfer_tokens.tolist()


def dllm_transfer_tokens(num_masked: int, steps: int) -> list[int]:
    """dllm's `get_num_transfer_tokens` for one row and its linear scheduler, whose alpha(t) = 1 - t is in float32."""

    def mask_rate(step: int) -> torch.Tensor:
        alpha = 1 - torch.tensor(step / steps, dtype=torch.float32)
        return 1 - alpha

    num_transfer_tokens = []
    for t in range(steps, 0, -1):
        probability = 1 - (mask_rate(t - 1) / mask_rate(t)).item()
        wanted = torch.round(torch.tensor(num_masked, dtype=torch.float64) * probability)
        num_transfer_tokens.append(min(int(wanted), num_masked))
        num_masked -= num_transfer_tokens[-1]
    return num_transfer_tokens


@pytest.mark.parametrize(
    ("schedule", "published"), [("linear", llada_transfer_tokens), ("dllm", dllm_transfer_tokens)]
)
def test_a_block_is_revealed_as_published(schedule, published):
    for num_tokens in (*range(1, 33), 63, 64, 100, 128, 250):
        for steps in {1, 2, 3, 4, 5, 7, 10, 31, 64, num_tokens}:
            found = reveal_schedule(num_tokens, steps, schedule)
            assert found == published(num_tokens, steps)
            assert sum(found) == num_tokens and len(found) == steps


def test_steps_that_do_not_divide_a_block():
    assert counts(20, 8, 10, "linear") == [[3, 3, 2, 2]] * 2
    assert counts(20, 8, 10, "dllm") == [[2, 3, 2, 3]] * 2
    assert counts(20, 10, 10, "linear") == counts(20, 10, 10, "dllm") == [[2] * 5] * 2


def test_blocks_that_do_not_divide_the_steps_or_the_response():
    assert counts(12, 7, 4, "linear") == [[2, 1, 1], [2, 2], [2, 2]]
    assert [len(block) for block in counts(12, 7, 4, "dllm")] == [3, 3, 3]
    assert counts(11, 6, 4, "linear") == counts(11, 6, 4, "dllm") == [[2, 2], [2, 2], [2, 1]]
    for schedule in ("linear", "dllm"):
        assert counts(11, None, 4, schedule) == [[1] * 4, [1] * 4, [1] * 3]
