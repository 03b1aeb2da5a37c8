"""The likelihood of block-wise models: the sum over the blocks, as an enumeration gives it."""

import itertools
import math

import numpy as np
import pytest
import torch

from mdu_trainer.inference import block_likelihood
from mdu_trainer.inference.likelihood import response_likelihood
from mdu_trainer.models import resolve_backbone

SIZE = 4
PROMPTS, ANSWERS = (3, 4, 6, 7, 5), (6, 5, 2, 8, 1)  # tokens; the third and the last end in the block they begin in


@pytest.fixture(params=[False, True], ids=["", "shifted"])
def asked(request, make_model, tokenizer):
    """A model, prompts, responses and the facts of the model."""
    model = make_model(block_size=SIZE, initializer_range=0.2, logit_shift=request.param).eval()
    generator = torch.Generator().manual_seed(0)
    prompts, answers = (
        [torch.randint(10, 250, (length,), generator=generator).tolist() for length in lengths]
        for lengths in (PROMPTS, ANSWERS)
    )
    return model, prompts, answers, resolve_backbone(model, tokenizer)


@torch.no_grad()
def enumerated(model, prompt, answer, backbone):
    """Every set of every block, each in a pass of its own over no more than the tokens up to the end of the block."""
    ids, total, start, shift = prompt + answer, 0.0, len(prompt), backbone.logit_shift
    while start < len(ids):
        stop = min((start // SIZE + 1) * SIZE, len(ids))
        if shift and start % SIZE == 0:  # decoded by the last token of the block before
            log_p = model(input_ids=torch.tensor([ids[:start]])).logits[0, -1].double().log_softmax(-1)
            total += log_p[ids[start]].item()
            start += 1
        length = stop - start
        for size in range(1, length + 1):
            for masked in itertools.combinations(range(start, stop), size):
                noisy = [backbone.mask_token_id if i in masked else token for i, token in enumerate(ids[:stop])]
                log_p = model(input_ids=torch.tensor([noisy])).logits[0].double().log_softmax(-1)
                share = 1 / length / math.comb(length, size) * length / size
                total += share * sum(log_p[i - shift, ids[i]].item() for i in masked)
        start = stop
    return total


def test_equals_the_enumeration(asked):
    model, prompts, answers, backbone = asked
    found = response_likelihood(model, prompts, answers, backbone, num_draws=15, batch_size=7)
    expected = [enumerated(model, *row, backbone) for row in zip(prompts, answers, strict=True)]
    np.testing.assert_allclose(found.log_likelihood, expected, rtol=1e-5)
    assert (found.standard_error == 0).all()
    assert [len(tokens) for tokens in found.tokens] == list(ANSWERS)


def test_is_unbiased_where_sets_are_drawn(asked):
    model, prompts, answers, backbone = asked
    expected = [enumerated(model, *row, backbone) for row in zip(prompts, answers, strict=True)]
    several = [response_likelihood(model, prompts, answers, backbone, num_draws=4, seed=seed) for seed in range(40)]
    estimates = np.stack([one.log_likelihood for one in several])
    error = estimates.std(axis=0, ddof=1) / math.sqrt(len(several))
    assert (np.abs(estimates.mean(axis=0) - expected) <= 4 * error + 1e-4).all()
    claimed = np.sqrt(np.square([one.standard_error for one in several]).mean(axis=0))
    np.testing.assert_allclose(claimed[[0, 1, 3]], estimates.std(axis=0, ddof=1)[[0, 1, 3]], rtol=0.6)


def test_neither_batch_nor_other_rows_change_anything(asked):
    model, prompts, answers, backbone = asked
    whole = response_likelihood(model, prompts, answers, backbone, num_draws=6, batch_size=32)
    for row in range(len(prompts)):
        alone = response_likelihood(model, [prompts[row]], [answers[row]], backbone, num_draws=6, batch_size=1)
        np.testing.assert_allclose(alone.log_likelihood[0], whole.log_likelihood[row], rtol=1e-5)
        np.testing.assert_allclose(alone.standard_error[0], whole.standard_error[row], rtol=1e-3, atol=1e-5)


def test_short_form_equals_the_long_one_and_runs_half_the_tokens(asked, monkeypatch):
    model, prompts, answers, backbone = asked
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    short = response_likelihood(model, prompts[2:3], answers[2:3], backbone)
    assert seen[-1] == 8
    drawn = block_likelihood._drawn
    monkeypatch.setattr(block_likelihood, "_drawn", lambda *row: drawn(*row)._replace(one_block=False))
    long = response_likelihood(model, prompts[2:3], answers[2:3], backbone)
    assert seen[-1] == 16
    np.testing.assert_allclose(short.log_likelihood, long.log_likelihood, rtol=1e-5)
