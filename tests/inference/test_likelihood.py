import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from published import Shifted
from torch import nn

from mdu_trainer.inference import likelihood
from mdu_trainer.inference.likelihood import response_likelihood

PROMPTS = [[20, 21, 22], [30, 31, 32, 33, 34, 35], [40], [50, 51]]
RESPONSES = [[60, 61, 62, 63, 64, 65, 66, 67, 68], [70, 71, 72], [80, 81, 82, 83, 84, 85, 86, 87, 88, 89, 90], [91]]


class Counting(nn.Module):
    """A model that counts the sequences it is given."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.sequences = 0

    def forward(self, input_ids, attention_mask):
        self.sequences += len(input_ids)
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


@torch.no_grad()
def enumerated(model, prompt, response, mask_token_id):
    """E_l E_S [ L/l * sum log p ], one subset after the other."""
    total = 0.0
    length = len(response)
    for size in range(1, length + 1):
        subsets = list(combinations(range(length), size))
        for subset in subsets:
            ids = torch.tensor([prompt + [mask_token_id if i in subset else t for i, t in enumerate(response)]])
            log_p = model(input_ids=ids).logits[0, len(prompt) :].double().log_softmax(dim=-1)
            total += sum(log_p[i, response[i]].item() for i in subset) * length / size / len(subsets) / length
    return total


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_exact_where_the_draws_cover_every_set(model, backbone, length):
    response = RESPONSES[0][:length]
    counting = Counting(model)
    result = response_likelihood(counting, PROMPTS[:1], [response], backbone, num_draws=2**length - 1)
    expected = enumerated(model, PROMPTS[0], response, backbone.mask_token_id)
    assert counting.sequences == 2**length - 1
    assert result.log_likelihood[0] == pytest.approx(expected, rel=1e-5)
    assert result.standard_error.tolist() == [0.0] and result.num_tokens.tolist() == [length]


def test_one_token_takes_one_pass(model, backbone):
    counting = Counting(model)
    result = response_likelihood(counting, PROMPTS[:1], [[60]], backbone)
    logits = model(input_ids=torch.tensor([PROMPTS[0] + [backbone.mask_token_id]])).logits[0, -1]
    assert counting.sequences == 1
    assert result.log_likelihood[0] == pytest.approx(logits.log_softmax(dim=0)[60].item(), rel=1e-5)


@pytest.mark.parametrize("num_draws", [3, 8])
def test_unbiased_on_a_model(model, backbone, num_draws):
    response = RESPONSES[0][:4]
    expected = enumerated(model, PROMPTS[0], response, backbone.mask_token_id)
    estimates = np.array(
        [
            response_likelihood(
                model, PROMPTS[:1], [response], backbone, num_draws=num_draws, seed=seed
            ).log_likelihood
            for seed in range(150)
        ]
    )
    assert estimates.std() > 0
    assert abs(estimates.mean() - expected) < 4 * estimates.std() / math.sqrt(len(estimates))


def test_standard_error_on_a_model(model, backbone):
    results = [
        response_likelihood(model, PROMPTS[:1], RESPONSES[:1], backbone, num_draws=16, seed=seed) for seed in range(80)
    ]
    spread = np.std([result.log_likelihood[0] for result in results], ddof=1)
    claimed = math.sqrt(np.mean([result.standard_error[0] ** 2 for result in results]))
    assert claimed == pytest.approx(spread, rel=0.4)


def test_depends_on_nothing_but_the_row_and_the_seed(model, backbone):
    together = response_likelihood(model, PROMPTS, RESPONSES, backbone, num_draws=16, batch_size=7)
    for row in range(4):
        alone = response_likelihood(model, [PROMPTS[row]], [RESPONSES[row]], backbone, num_draws=16, batch_size=1)
        assert alone.log_likelihood[0] == pytest.approx(together.log_likelihood[row], rel=1e-5)
        assert alone.standard_error[0] == pytest.approx(together.standard_error[row], abs=1e-4)
    backwards = response_likelihood(model, PROMPTS[::-1], RESPONSES[::-1], backbone, num_draws=16)
    assert backwards.log_likelihood[::-1] == pytest.approx(together.log_likelihood, rel=1e-5)
    again = response_likelihood(model, PROMPTS, RESPONSES, backbone, num_draws=16, batch_size=7)
    assert (again.log_likelihood == together.log_likelihood).all()
    other = response_likelihood(model, PROMPTS, RESPONSES, backbone, num_draws=16, seed=1)
    assert (other.log_likelihood != together.log_likelihood)[:3:2].all()


def test_probability_is_normalised_by_length(model, backbone):
    result = response_likelihood(model, PROMPTS, RESPONSES, backbone, num_draws=8)
    assert result.num_tokens.tolist() == [9, 3, 11, 1]
    assert result.per_token == pytest.approx(result.log_likelihood / [9, 3, 11, 1])
    assert result.probability == pytest.approx(np.exp(result.per_token))
    assert (result.standard_error[[1, 3]] == 0).all() and (result.standard_error[[0, 2]] > 0).all()


def test_tokens_have_their_parts_in_the_sum(model, backbone):
    result = response_likelihood(model, PROMPTS, RESPONSES, backbone, num_draws=8)
    assert [tokens.sum() for tokens in result.tokens] == pytest.approx(result.log_likelihood)
    first, second, _ = result.tokens[1]  # three tokens and eight draws: exact, so each is a mean over orders

    def log_p(masked, position):
        ids = [model_id if i not in masked else backbone.mask_token_id for i, model_id in enumerate(RESPONSES[1])]
        logits = model(input_ids=torch.tensor([PROMPTS[1] + ids])).logits[0, len(PROMPTS[1]) + position]
        return logits.log_softmax(dim=0)[RESPONSES[1][position]].item()

    for position, found in ((0, first), (1, second)):
        others = [i for i in range(3) if i != position]
        alone, both = log_p({position}, position), log_p({0, 1, 2}, position)
        one = sum(log_p({position, other}, position) for other in others) / 2
        assert found == pytest.approx((alone + one + both) / 3, rel=1e-5)


def test_no_likelihood_is_above_one(model, backbone, monkeypatch):
    # chance can take the estimate of an all but certain response above 0
    monkeypatch.setattr(likelihood, "token_parts", lambda draws, log_p: np.array([[0.5, -0.2], [0.1, 0.1]]))
    result = response_likelihood(model, PROMPTS[:1], RESPONSES[:1], backbone, num_draws=8)
    assert result.log_likelihood.tolist() == [0.0] and result.tokens[0].tolist() == [0.0, 0.0]
    assert result.standard_error[0] > 0


def test_a_single_draw_has_no_standard_error(model, backbone):
    result = response_likelihood(model, PROMPTS[:1], RESPONSES[:1], backbone, num_draws=1)
    assert np.isfinite(result.log_likelihood).all() and np.isnan(result.standard_error).all()


def test_shifted_logits_give_the_same_likelihood(model, backbone):
    shifted = response_likelihood(Shifted(model), PROMPTS, RESPONSES, replace(backbone, logit_shift=True), num_draws=8)
    straight = response_likelihood(model, PROMPTS, RESPONSES, backbone, num_draws=8)
    assert shifted.log_likelihood == pytest.approx(straight.log_likelihood, rel=1e-5)


def test_the_model_is_evaluated_and_left_as_it_was(make_model, backbone):
    model = make_model(attention_dropout=0.5)
    model.train()
    scored = response_likelihood(model, PROMPTS, RESPONSES, backbone, num_draws=4)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    evaluated = response_likelihood(model.eval(), PROMPTS, RESPONSES, backbone, num_draws=4)
    assert (scored.log_likelihood == evaluated.log_likelihood).all()


def test_the_progress_bar_counts_passes(model, backbone, capsys):
    response_likelihood(model, PROMPTS, RESPONSES, backbone, num_draws=8, show_progress=True)
    assert "likelihoods: 24 passes in" in capsys.readouterr().err  # 8 + 7 + 8 + 1
    response_likelihood(model, PROMPTS, RESPONSES, backbone, num_draws=8)
    assert capsys.readouterr().err == ""


def test_no_rows(model, backbone):
    assert response_likelihood(model, [], [], backbone).log_likelihood.shape == (0,)


@pytest.mark.parametrize(
    ("prompts", "responses", "kwargs", "message"),
    [
        ([[20], [21]], [[60], []], {}, "response of row 1 is empty"),
        ([[20] * 60], [[60] * 5], {}, r"Row 0 has 65 tokens, 5 of them response, and the model's context is 64"),
        ([[20], [21]], [[60]], {}, "2 prompts and 1 responses"),
        ([[20]], [[60]], {"num_draws": 0}, "num_draws must be at least 1, got 0"),
        ([[20]], [[60]], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named_by_number(model, backbone, prompts, responses, kwargs, message):
    with pytest.raises(ValueError, match=message):
        response_likelihood(model, prompts, responses, backbone, **kwargs)
