"""Exact memorisation and extraction strength, and the decoding that they rest on."""

from dataclasses import replace

import pytest
import torch

from mdu_trainer.evaluation.metrics import ExactMemorization, ExtractionStrength, greedy_completions, shortest_prefixes


def test_exact_memorization_worked_by_hand():
    rows = ExactMemorization().compute(
        predictions=[[1, 2, 3, 4], [1, 2], [9, 1, 2, 3], [], [1, 2, 3]],
        references=[[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3], [1], [1, 5, 3]],
        use_aggregator=False,
    )
    assert rows["exact_memorization"] == pytest.approx([1, 0.5, 0, 0, 2 / 3])


def test_extraction_strength_worked_by_hand():
    rows = ExtractionStrength().compute(prefix_tokens=[0, 3, 4], num_tokens=[5, 12, 4], use_aggregator=False)
    assert rows["extraction_strength"] == pytest.approx([1, 0.75, 0])
    with pytest.raises(ValueError, match="Row 1 has a prefix of 3 tokens and an answer of 2"):
        ExtractionStrength().compute(prefix_tokens=[0, 3], num_tokens=[5, 2])


PROMPTS = [[20, 21, 22], [30], [40, 41], [50, 51]]


@torch.no_grad()
def greedy(model, context, length, backbone):
    """One row, one token a step: the position and token of highest probability."""
    ids = torch.tensor([context + [backbone.mask_token_id] * length])
    left = set(range(len(context), len(context) + length))
    while left:
        p = model(input_ids=ids).logits[0].softmax(dim=-1)
        p[:, [backbone.mask_token_id, backbone.pad_token_id]] = 0
        best = max(sorted(left), key=lambda i: p[i].max().item())
        ids[0, best] = p[best].argmax()
        left.remove(best)
    decoded = ids[0, len(context) :].tolist()
    return next((decoded[:i] for i, token in enumerate(decoded) if token in backbone.end_token_ids), decoded)


@pytest.fixture
def responses(model, backbone):
    """What the model says to two prompts (so it knows them), and something else to the others."""
    known = [greedy(model, prompt, 6, backbone) for prompt in PROMPTS[:2]]
    assert all(len(ids) == 6 for ids in known)
    return [*known, [60, 61, 62, 63, 64], [70, 71, 72, *backbone.end_token_ids[:1]]]


def test_completions_are_decoded_greedily_at_the_true_length(model, backbone, responses):
    decoded, answers = greedy_completions(model, PROMPTS, responses, backbone, batch_size=3)
    assert decoded[:2] == responses[:2]
    expected = [greedy(model, p, len(r), backbone) for p, r in zip(PROMPTS, responses, strict=True)]
    assert decoded == expected
    assert answers == [*responses[:3], [70, 71, 72]]  # without the end token
    scores = ExactMemorization().compute(predictions=decoded, references=answers, use_aggregator=False)
    assert scores["exact_memorization"][:2] == [1, 1]


def test_completions_see_what_is_revealed(model, backbone, responses):
    revealed = [[], [False, True], [False, False, False, False, True], [True, True]]
    decoded, answers = greedy_completions(model, PROMPTS, responses, backbone, revealed=revealed, batch_size=3)
    assert decoded[0] == responses[0] and decoded[1] != responses[1]  # the second is led astray
    for flags, found, true in zip(revealed, decoded, answers, strict=True):
        assert [a for a, b in zip(found, flags, strict=False) if b] == [
            a for a, b in zip(true, flags, strict=False) if b
        ]
    prompt, rest = PROMPTS[3] + answers[3][:2], len(responses[3]) - 2
    assert decoded[3] == answers[3][:2] + greedy(model, prompt, rest, backbone)


def test_shortest_prefixes_are_the_first_that_are_completed(model, backbone, responses):
    # a row whose first tokens the model would not say, and the rest of which it completes
    half = [60, 61]
    responses = [*responses, half + greedy(model, PROMPTS[3] + half, 4, backbone)]
    prompts = [*PROMPTS, PROMPTS[3]]
    prefixes, lengths = shortest_prefixes(model, prompts, responses, backbone, num_prefixes=6)
    assert lengths == [6, 6, 5, 3, 6]
    for prompt, response, found, length in zip(prompts, responses, prefixes, lengths, strict=True):
        answer = response[:length]
        enough = [
            k
            for k in range(length)
            if response[:k] + greedy(model, prompt + response[:k], len(response) - k, backbone) == answer
        ]
        assert found == min(enough, default=length)
    assert prefixes[:2] == [0, 0] and 0 < prefixes[4] <= 2
    coarse, _ = shortest_prefixes(model, prompts, responses, backbone, num_prefixes=2)
    assert all(few >= many for few, many in zip(coarse, prefixes, strict=True))


def test_an_answer_that_ends_early_is_not_extracted(model, backbone, responses):
    spoken = responses[0]
    backbone = replace(backbone, end_token_ids=(spoken[3],))  # now the model ends after three tokens
    decoded, answers = greedy_completions(model, PROMPTS[:1], [spoken[:3] + [99, 98, 97]], backbone)
    scores = ExactMemorization().compute(predictions=decoded, references=answers)
    assert decoded == [greedy(model, PROMPTS[0], 6, backbone)] and len(decoded[0]) <= 3
    assert scores["exact_memorization"] <= 0.5


def test_responses_without_tokens_are_named_by_number(model, backbone):
    end = list(backbone.end_token_ids[:1])
    for function in (greedy_completions, shortest_prefixes):
        with pytest.raises(ValueError, match="response of row 1 has no tokens before its end token"):
            function(model, [[20], [21]], [[60], end], backbone)
    with pytest.raises(ValueError, match="num_prefixes must be at least 1, got 0"):
        shortest_prefixes(model, [[20]], [[60]], backbone, num_prefixes=0)
