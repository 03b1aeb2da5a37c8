"""Metrics of whether an answer comes out word for word: two of autoregressive models, restated for masked decoding.

Teacher forcing predicts token i from the true tokens before it. A masked diffusion model has no such pass, since it
sees both sides; what stands for it here is greedy decoding at the true length: all that is not revealed is [MASK], the
most confident token is revealed in each step, and what was revealed wrongly stays. `greedy_completions` and
`shortest_prefixes` run the model, the metrics compare ids.
"""

from collections import defaultdict
from collections.abc import Sequence

from torch import nn

from ...files import UserError
from ...inference.config import check_count
from ...inference.generation import DiffusionGenerationConfig, generate_ids
from ...models import Backbone
from ..registry import RowScores
from .base import RowMetric


class ExactMemorization(RowMetric):
    """Share of an answer's tokens that greedy decoding from all [MASK], at the true length, gets right.

        EM = |{i : decoded_i = y_i}| / |y|

    Of an autoregressive model (Tirumala et al., 2022) decoded_i is the argmax given the true tokens before i.

    Example:

        decoded, answers = greedy_completions(model, rows.prompt_ids, rows.completion_ids, backbone)
        ExactMemorization().compute(predictions=decoded, references=answers)
    """

    inputs = {"predictions": "ids", "references": "ids"}
    source = "Tirumala et al. Memorization Without Overfitting. NeurIPS 2022, arXiv 2205.10770"
    url = "https://arxiv.org/abs/2205.10770"

    def _rows(self, predictions: list[list[int]], references: list[list[int]]) -> RowScores:
        """
        Args:
            predictions: list of lists of int, the decoded ids of each row. Those that are missing count as wrong.
            references: list of lists of int, the true ids, compared place by place.

        Returns:
            exact_memorization: float in [0, 1].

        Raises:
            ValueError: for an empty reference.
        """
        empty = [row for row, ids in enumerate(references) if not ids]
        if empty:
            raise UserError(f"The reference of row {empty[0]} has no tokens: remove the row.")
        return {
            "exact_memorization": [
                sum(a == b for a, b in zip(predicted, true, strict=False)) / len(true)
                for predicted, true in zip(predictions, references, strict=True)
            ]
        }


class ExtractionStrength(RowMetric):
    """The share of an answer that need not be revealed for the model to complete it.

        ES = 1 - k / |y|,  k the shortest prefix after which greedy decoding gives the rest of y exactly

    1 if the prompt alone is enough, 0 if no prefix is. Of an autoregressive model (Carlini et al., 2021;
    OpenUnlearning, arXiv 2506.12618) the rest need only be the argmax given the true tokens before. With fewer
    `num_prefixes` than tokens, `shortest_prefixes` skips some, and ES is a lower bound.

    Example:

        prefixes, lengths = shortest_prefixes(model, rows.prompt_ids, rows.completion_ids, backbone)
        ExtractionStrength().compute(prefix_tokens=prefixes, num_tokens=lengths)
    """

    inputs = {"prefix_tokens": "count", "num_tokens": "count"}
    source = "Carlini et al. Extracting Training Data from Large Language Models. USENIX Security 2021, 2012.07805"
    url = "https://arxiv.org/abs/2506.12618"

    def _rows(self, prefix_tokens: list[int], num_tokens: list[int]) -> RowScores:
        """
        Args:
            prefix_tokens: list of int, tokens of the shortest prefix; all tokens of the answer if none is enough.
            num_tokens: list of int, tokens of each answer.

        Returns:
            extraction_strength: float in [0, 1].

        Raises:
            ValueError: for an answer without tokens, or a prefix longer than its answer.
        """
        for row, (prefix, length) in enumerate(zip(prefix_tokens, num_tokens, strict=True)):
            if not 0 <= prefix <= length or length == 0:
                raise UserError(f"Row {row} has a prefix of {prefix} tokens and an answer of {length}.")
        pairs = zip(prefix_tokens, num_tokens, strict=True)
        return {"extraction_strength": [1 - prefix / length for prefix, length in pairs]}


def greedy_completions(
    model: nn.Module,
    prompt_ids: Sequence[list[int]],
    response_ids: Sequence[list[int]],
    backbone: Backbone,
    *,
    revealed: Sequence[Sequence[bool]] | None = None,
    batch_size: int = 32,
) -> tuple[list[list[int]], list[list[int]]]:
    """Decode responses at their true length, one token a step, the most confident first.

    Args:
        model: a masked diffusion language model; in evaluation mode during the call.
        prompt_ids: ids of each prompt, generation prompt included.
        response_ids: ids of each response, with the end token if the model was trained on it.
        backbone: facts of the model.
        revealed: of each response, which of its first tokens are given (True) and not decoded; none if not set.
        batch_size: rows a forward pass. Rows share one if their responses are equally long.

    Returns:
        The decoded and the true tokens of each row; both up to and without the first end token.

    Raises:
        ValueError: for a response without tokens before its end token.
    """
    by_length: dict[int, list[int]] = defaultdict(list)  # rows of a batch must be equally long
    for row, ids in enumerate(response_ids):
        by_length[len(ids)].append(row)
    answers = _answers(response_ids, backbone)
    shown = [[]] * len(answers) if revealed is None else revealed
    completions: list[list[int]] = [[] for _ in response_ids]
    for length, rows in sorted(by_length.items()):
        given = [
            [token if known else None for token, known in zip(response_ids[row], shown[row], strict=False)]
            for row in rows
        ]
        config = DiffusionGenerationConfig(max_new_tokens=length, batch_size=batch_size)
        decoded = generate_ids(model, [prompt_ids[row] for row in rows], config, backbone, given=given)
        for row, ids in zip(rows, decoded, strict=True):
            completions[row] = ids
    return completions, answers


def shortest_prefixes(
    model: nn.Module,
    prompt_ids: Sequence[list[int]],
    response_ids: Sequence[list[int]],
    backbone: Backbone,
    *,
    num_prefixes: int = 8,
    batch_size: int = 32,
) -> tuple[list[int], list[int]]:
    """The shortest prefix of each response after which greedy decoding gives the rest.

    Prefixes of 0, 1/n, ..., (n - 1)/n of the response, rounded down, are tried in this order, until one is enough.

    Args:
        model, prompt_ids, response_ids, backbone, batch_size: as in `greedy_completions`.
        num_prefixes: n. With as many as the longest response has tokens, every prefix is tried.

    Returns:
        Tokens of each prefix (those of the response if none is enough), and of each response, without its end token.

    Raises:
        ValueError: for a response without tokens before its end token, or num_prefixes below 1.
    """
    check_count("num_prefixes", num_prefixes)
    answers = _answers(response_ids, backbone)
    lengths = [len(ids) for ids in answers]
    tries = [sorted({length * i // num_prefixes for i in range(num_prefixes)}, reverse=True) for length in lengths]
    shortest = list(lengths)
    left = list(range(len(answers)))
    while left:
        prefixes = [tries[row].pop() for row in left]
        shown = [[True] * prefix for prefix in prefixes]
        prompts, responses = [prompt_ids[row] for row in left], [response_ids[row] for row in left]
        decoded, _ = greedy_completions(model, prompts, responses, backbone, revealed=shown, batch_size=batch_size)
        for row, prefix, ids in zip(left, prefixes, decoded, strict=True):
            if ids == answers[row]:
                shortest[row] = prefix
                tries[row].clear()
        left = [row for row in left if tries[row]]
    return shortest, lengths


def _answers(response_ids: Sequence[list[int]], backbone: Backbone) -> list[list[int]]:
    """The responses, each up to and without its first end token."""
    answers = []
    for row, ids in enumerate(response_ids):
        end = next((i for i, token in enumerate(ids) if token in backbone.end_token_ids), len(ids))
        if end == 0:
            raise UserError(f"The response of row {row} has no tokens before its end token: remove the row.")
        answers.append(ids[:end])
    return answers
