"""Monte-Carlo likelihood of a response under a masked diffusion language model.

    log p(y | x)  >=  E_l E_S [ L/l * sum_{i in S} log p(y_i | x, y without S) ]     l uniform on 1..L, S of size l

The right side, an average over the orders in which y can be revealed, is what evaluations of these models call the
likelihood. LLaDA (arXiv 2502.09992, appendix B) estimates it from 128 draws of (l, S), one forward pass each:
independent ones in the paper, while its script `get_log_likelihood.py` spreads l evenly over 1..L within a batch, so
its draws say more. Here the draws of a response are made together (`mdu_trainer.inference.mask_sets`): unbiased, too,
exact where they cover all sets, and a few of them say as much as many independent ones. What they save against either
kind: `examples/benchmarks/likelihood.py`. (One bias is taken on: no estimate is above 0.) Block-wise models are asked
block by block: `mdu_trainer.inference.block_likelihood`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ..data.encoding import check_ids
from ..divergence import TokenNLL
from ..files import UserError
from ..masking import pad_rows
from ..models import Backbone, evaluation_mode, measure_at
from ..terminal import Bar
from .block_likelihood import block_likelihoods, count_passes
from .config import check_count
from .mask_sets import Draws, draw_masks, num_sets, standard_error, token_parts

ROWS_AT_ONCE = 256  # whose sets are drawn together


@dataclass(frozen=True)
class Likelihood:
    """Estimates for B responses, float64 `[B]`, natural logarithms.

    Attributes:
        log_likelihood: of each response, in nats; 0 where chance takes the estimate of an all but certain one above 0.
        standard_error: of `log_likelihood`; 0 where it is exact, NaN where a single draw leaves it unknown.
        tokens: part of each token in `log_likelihood`, of which it is the sum: B arrays, float64 `[L]`. An estimate of
            its mean log p over the orders of revealing, which chance, too, can take above 0.
    """

    log_likelihood: np.ndarray
    standard_error: np.ndarray
    tokens: list[np.ndarray]

    @property
    def num_tokens(self) -> np.ndarray:
        """Length of each response, int64."""
        return np.array([len(tokens) for tokens in self.tokens], dtype=np.int64)

    @property
    def per_token(self) -> np.ndarray:
        """Mean log-likelihood a token, in nats."""
        return self.log_likelihood / self.num_tokens

    @property
    def probability(self) -> np.ndarray:
        """exp of the mean log-likelihood a token: TOFU's probability of an answer (arXiv 2401.06121)."""
        return np.exp(self.per_token)


@torch.no_grad()
def response_likelihood(
    model: nn.Module,
    prompt_ids: Sequence[list[int]],
    response_ids: Sequence[list[int]],
    backbone: Backbone,
    *,
    num_draws: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    show_progress: bool = False,
) -> Likelihood:
    """Estimate log p(response | prompt) of each row.

    What is drawn for a row is a function of the seed and of the row's ids alone. So an estimate depends neither on the
    other rows nor on batches, and two models are compared on the same draws, which cancels much of the noise.

    Args:
        model: a masked diffusion language model; in evaluation mode during the call.
        prompt_ids: ids of each prompt, generation prompt included.
        response_ids: ids of each response, with the end token if it is to count.
        backbone: facts of the model.
        num_draws: forward passes a row, at most. Responses of up to log2(num_draws + 1) tokens are exact: those of one
            token with a single pass, those of up to seven with 127.
        batch_size: sequences a forward pass.
        seed: of the draws.
        show_progress: show a progress bar over forward passes.

    Raises:
        ValueError: for an empty response, a row longer than the model's context, unequal numbers of prompts and
            responses, ids that the model has no embedding for, or a number out of range.

    Example:

        scores = response_likelihood(model, rows.prompt_ids, rows.completion_ids, backbone, num_draws=32)
        scores.probability.mean()

    Source: LLaDA (arXiv 2502.09992, appendix B); how sets are drawn and combined: `mdu_trainer.inference.mask_sets`.
    """
    check_count("num_draws", num_draws)
    check_count("batch_size", batch_size)
    _check(prompt_ids, response_ids, backbone)
    if backbone.block_size is not None:
        return _by_block(model, prompt_ids, response_ids, backbone, num_draws, batch_size, seed, show_progress)
    parts: list[np.ndarray] = [np.empty(0)] * len(response_ids)
    errors = np.zeros(len(response_ids))
    total = sum(num_sets(len(ids), num_draws) for ids in response_ids)
    rows = _drawn_rows(prompt_ids, response_ids, num_draws, seed)
    sequences = ((row, k) for row in rows for k in range(len(row.log_p)))
    bar = Bar("measuring likelihoods", total=total, unit="pass", show=show_progress)
    with evaluation_mode(model), bar as progress:
        while batch := list(islice(sequences, batch_size)):
            _fill_log_p(model, batch, backbone)
            for row in (row for row, k in batch if k == len(row.log_p) - 1):  # its last set
                replicates = token_parts(row.draws, row.log_p)
                errors[row.number] = standard_error(row.draws, replicates.sum(axis=1))
                tokens = replicates.mean(axis=0)
                parts[row.number] = tokens if tokens.sum() <= 0 else np.zeros_like(tokens)
            progress.update(len(batch))
    return Likelihood(np.array([tokens.sum() for tokens in parts]), errors, parts)


def _by_block(
    model: nn.Module,
    prompt_ids: Sequence[list[int]],
    response_ids: Sequence[list[int]],
    backbone: Backbone,
    num_draws: int,
    batch_size: int,
    seed: int,
    show_progress: bool,
) -> Likelihood:
    """The same of a block-wise model, as the sum over the blocks of a response."""
    rows = list(zip(range(len(prompt_ids)), prompt_ids, response_ids, strict=True))
    rows.sort(key=lambda row: len(row[1]) + len(row[2]))
    total = sum(count_passes(prompt, response, backbone, num_draws) for _, prompt, response in rows)
    parts: list[np.ndarray] = [np.empty(0)] * len(rows)
    errors = np.zeros(len(rows))
    bar = Bar("measuring likelihoods", total=total, unit="pass", show=show_progress)
    with evaluation_mode(model), bar as progress:
        for first in range(0, len(rows), ROWS_AT_ONCE):
            chunk = rows[first : first + ROWS_AT_ONCE]
            generators = [_row_generator(seed, prompt, response) for _, prompt, response in chunk]
            how = (backbone, num_draws, generators, batch_size, progress)
            for number, tokens, error in block_likelihoods(model, chunk, *how):
                parts[number] = tokens if tokens.sum() <= 0 else np.zeros_like(tokens)
                errors[number] = error
    return Likelihood(np.array([tokens.sum() for tokens in parts]), errors, parts)


class _Row(NamedTuple):
    """A response, its draws, and what the model has said so far."""

    number: int
    prompt: list[int]
    response: list[int]
    draws: Draws
    log_p: np.ndarray  # [K, L], as `token_parts` takes it; filled set by set


def _drawn_rows(
    prompt_ids: Sequence[list[int]], response_ids: Sequence[list[int]], num_draws: int, seed: int
) -> Iterator[_Row]:
    """The rows with their draws, rows of like length one after the other."""
    by_length = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]) + len(response_ids[row]))
    for first in range(0, len(by_length), ROWS_AT_ONCE):
        numbers = by_length[first : first + ROWS_AT_ONCE]
        rows = [(prompt_ids[number], response_ids[number]) for number in numbers]
        generators = [_row_generator(seed, prompt, response) for prompt, response in rows]
        drawn = draw_masks([len(response) for _, response in rows], num_draws, generators)
        for number, (prompt, response), draws in zip(numbers, rows, drawn, strict=True):
            yield _Row(number, prompt, response, draws, np.zeros(draws.masked.shape))


def _row_generator(seed: int, prompt: list[int], response: list[int]) -> np.random.Generator:
    content = np.array([seed, len(prompt), *prompt, *response], dtype=np.int64)
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(content.tobytes(), digest_size=16).digest(), "little"))


def _fill_log_p(model: nn.Module, batch: list[tuple[_Row, int]], backbone: Backbone) -> None:
    """Run one forward pass over pairs of a row and k: log p of what set k masks goes into the row."""
    masked = [(row.prompt, row.response, row.draws.masked[k]) for row, k in batch]
    for (row, k), found in zip(batch, masked_log_p(model, masked, backbone), strict=True):
        row.log_p[k, row.draws.masked[k]] = found


@torch.no_grad()
def masked_log_p(
    model: nn.Module, rows: Sequence[tuple[list[int], list[int], np.ndarray]], backbone: Backbone
) -> list[np.ndarray]:
    """log p of the masked tokens of each response given the others, in nats, from one pass: float64 `[n]` each.

    Args:
        model: in evaluation mode. A block-wise one is shown the whole blocks before each block, whatever is masked.
        rows: ids of a prompt, those of a response, and which of the latter are masked, bool `[L]`, each.
        backbone: facts of the model.
    """
    ids, attention_mask = pad_rows([prompt + response for prompt, response, _ in rows], backbone.pad_token_id)
    masked = torch.zeros_like(ids, dtype=torch.bool)
    for positions, (prompt, response, hidden) in zip(masked, rows, strict=True):
        positions[len(prompt) :][: len(response)] = torch.from_numpy(hidden)
    device = next(model.parameters()).device
    ids, attention_mask, masked = (part.to(device) for part in (ids, attention_mask, masked))
    noisy_ids = ids.masked_fill(masked, backbone.mask_token_id)
    nll = measure_at(model, noisy_ids, attention_mask, masked, TokenNLL(ids[masked]), **backbone.form(ids)).value
    return [part.numpy() for part in (-nll.cpu().double()).split(masked.sum(dim=1).tolist())]


def _check(prompt_ids: Sequence[list[int]], response_ids: Sequence[list[int]], backbone: Backbone) -> None:
    if len(prompt_ids) != len(response_ids):
        raise UserError(f"There are {len(prompt_ids)} prompts and {len(response_ids)} responses: pass one for each.")
    for row, (prompt, response) in enumerate(zip(prompt_ids, response_ids, strict=True)):
        length = len(prompt) + len(response)
        if not response:
            raise UserError(f"The response of row {row} is empty, so it has no likelihood: remove the row.")
        check_ids([*prompt, *response], backbone, f"Row {row}")
        if backbone.context_length is not None and length > backbone.context_length:
            raise UserError(
                f"Row {row} has {length} tokens, {len(response)} of them response, and the model's context is "
                f"{backbone.context_length}: shorten or remove the row."
            )
