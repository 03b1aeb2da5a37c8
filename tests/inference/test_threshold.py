"""Parallel decoding by a confidence threshold, and logits that are read a few at a time."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from mdu_trainer.inference.config import FAST_THRESHOLD, DiffusionGenerationConfig, decoded_as
from mdu_trainer.inference.generation import generate_ids
from mdu_trainer.models import head, logits_at, scan_logits_at

PROMPTS = [[20, 21, 22], [30], [40, 41, 42, 43, 44, 45, 46]]
LENGTH = 12


@torch.no_grad()
def parallel_decode(model, prompt, backbone, threshold, block_length, least=1):
    """Fast-dLLM's loop for one prompt: all above the threshold, and the surest ones. The tokens, and the passes."""
    start, passes = len(prompt), 0
    x = torch.tensor([prompt + [backbone.mask_token_id] * LENGTH])
    masked = torch.arange(x.shape[1]) >= start
    for first in range(start, start + LENGTH, block_length):
        block = (torch.arange(x.shape[1]) >= first) & (torch.arange(x.shape[1]) < first + block_length)
        while (masked & block).any():
            logits = model(input_ids=x).logits[0]
            logits[:, [backbone.mask_token_id, backbone.pad_token_id]] = -torch.inf
            confidence, token = logits.softmax(dim=-1).max(dim=-1)
            confidence[~(masked & block)] = -torch.inf
            chosen = confidence > threshold
            chosen[confidence.topk(min(least, int((masked & block).sum()))).indices] = True
            x[0, chosen] = token[chosen]
            masked &= ~chosen
            passes += 1
    return x[0, start:].tolist(), passes


@pytest.fixture
def endless(backbone):
    return replace(backbone, end_token_ids=(10**6,))  # so that every response has its full length


@pytest.mark.parametrize("shape", [{}, {"block_length": 4}, {"block_length": 5}])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.15, 1.0])
def test_agrees_with_the_published_loop(model, endless, threshold, shape):
    config = DiffusionGenerationConfig(LENGTH, confidence_threshold=threshold, **shape)
    steps = [set() for _ in PROMPTS]

    def note(revealed):
        for row in revealed.place.tolist():
            steps[row].add(revealed.step)

    found = generate_ids(model, PROMPTS, config, endless, on_reveal=note)
    expected = [
        parallel_decode(model, prompt, endless, threshold, shape.get("block_length", LENGTH)) for prompt in PROMPTS
    ]
    assert list(zip(found, map(len, steps), strict=True)) == expected
    blocks = len(config.blocks)
    if threshold in (0.0, 1.0):
        assert {passes for _, passes in expected} == {blocks if threshold == 0.0 else LENGTH}
    if threshold == 0.1:
        assert any(blocks < passes < LENGTH for _, passes in expected)
    assert generate_ids(model, PROMPTS, replace(config, batch_size=1), endless) == found


def test_no_more_passes_than_steps(model, endless):
    config = DiffusionGenerationConfig(LENGTH, steps=4, confidence_threshold=0.1)
    expected = [parallel_decode(model, prompt, endless, 0.1, LENGTH, least=3)[0] for prompt in PROMPTS]
    assert generate_ids(model, PROMPTS, config, endless) == expected


def test_fast_is_a_threshold_by_name():
    config = DiffusionGenerationConfig(LENGTH)
    assert decoded_as(config, "exact") == config
    assert decoded_as(config, "fast") == replace(config, confidence_threshold=FAST_THRESHOLD)
    own = replace(config, confidence_threshold=0.5)
    assert decoded_as(own, "fast") == decoded_as(own, "exact") == own
    with pytest.raises(ValueError, match="decoding must be one of exact, fast, got 'quick'"):
        decoded_as(config, "quick")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"remasking": "random"}, "does not go with remasking='random'"),
        ({"remasking": "margin"}, "does not go with remasking='margin'"),
        ({"schedule": "dream"}, "does not go with schedule='dream'"),
        ({"position_temperature": 0.5}, "does not go with position_temperature=0.5"),
    ],
)
def test_fast_is_refused_where_it_means_nothing(fields, message):
    with pytest.raises(ValueError, match=message):
        decoded_as(DiffusionGenerationConfig(LENGTH, **fields), "fast")


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan"), "0.9", True])
def test_a_threshold_is_a_probability(threshold):
    with pytest.raises(ValueError, match="confidence_threshold must lie in"):
        DiffusionGenerationConfig(LENGTH, confidence_threshold=threshold)


class Headless(nn.Module):
    """The same predictions from a model whose head cannot be run for some tokens alone."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask):
        return (self.inner(input_ids=input_ids, attention_mask=attention_mask).logits,)


@pytest.mark.parametrize("wrap", [lambda model: model, Headless], ids=["head", "headless"])
def test_logits_are_read_a_few_at_a_time(model, backbone, monkeypatch, wrap):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 5 * backbone.vocab_size)
    monkeypatch.setattr(head, "BLOCK_ELEMENTS", 2 * backbone.vocab_size)
    ids = torch.arange(20, 40).view(2, 10)
    inputs, mask = [ids, ids + 100], torch.ones_like(ids)
    selected = ids % 3 > 0
    seen = []

    def read(logits, rows):
        seen.append((rows.start, rows.stop))
        return torch.stack([one.logsumexp(dim=1) + one[:, 7] for one in logits], dim=1)

    found = scan_logits_at(wrap(model), inputs, mask, selected, read)
    whole = [logits_at(model, one, mask, selected) for one in inputs]
    assert seen == [(0, 2), (2, 4), (4, 5), (5, 7), (7, 9), (9, 10), (10, 12), (12, 13)]
    for column, logits in zip(found.T, whole, strict=True):
        torch.testing.assert_close(column, logits.detach().logsumexp(dim=1) + logits[:, 7].detach())
    none = scan_logits_at(wrap(model), inputs, mask, torch.zeros_like(selected), read)
    assert none.shape == (0, 2)
