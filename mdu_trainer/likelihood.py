"""Monte-Carlo likelihood of a response under a masked diffusion language model.

    log p(y | x)  >=  E_l E_S [ L/l * sum_{i in S} log p(y_i | x, y without S) ]     l uniform on 1..L, S of size l

The right side, an average over the orders in which y can be revealed, is what evaluations of these models call the
likelihood. LLaDA (arXiv 2502.09992, appendix B) estimates it from 128 independent draws of (l, S), one forward pass
each. Here the draws of a response are made together, so that a few say as much as many independent ones:

- If the draws cover all 2^L - 1 sets S, each is evaluated once and the result is exact.
- Otherwise the range of l is cut into as many slices as there are draws, one draw in each, narrow slices at small l,
  where a pass predicts few tokens; a draw weighs as much as its slice is wide.
- S is built from the positions that have the least weight so far, alone and in pairs with those already in S, ties at
  random, from the largest set to the smallest. So every token counts about equally, and is predicted about equally
  often without each of the others. Nothing but chance tells positions apart, hence S is uniform among the sets of its
  size, and the estimate has exactly the expectation above, for any number of draws.
- Independent replicates of this design give the standard error: two up to 191 draws, so that it is right in the mean
  square but rough for a single row; eight from 512 draws on.
- From eight draws on, a control variate: the other replicates say how likely each token is on average, and by how much
  that changes with the share of masked tokens. What this line would give for the sets of a replicate is taken off, and
  its expectation, which is known, put back. Replicates are independent, so the expectation stays as it was.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from .divergence import TokenNLL
from .generation import evaluation_mode
from .models import Backbone, row_figures

DRAWS_A_REPLICATE = 64  # larger ones are better balanced, but there are fewer of them to measure the error
MAX_REPLICATES = 8
SLICE_POWER = 1.5  # slices of the range of l end at (k / draws) ** SLICE_POWER
SETS_FOR_A_LINE = 4  # of a replicate, to tell how likely its tokens are
ROWS_AT_ONCE = 256  # whose sets are drawn together
PAIRS_AT_ONCE = 1 << 20  # of positions, over the replicates that are drawn together


@dataclass(frozen=True)
class Likelihood:
    """Estimates for B responses, float64 `[B]`, natural logarithms.

    Attributes:
        log_likelihood: of each response, in nats.
        standard_error: of `log_likelihood`; 0 where it is exact, NaN where a single draw leaves it unknown.
        tokens: part of each token in `log_likelihood`, of which it is the sum: B arrays, float64 `[L]`.
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
            responses, or a number out of range.

    Example:

        scores = response_likelihood(model, rows.prompts, rows.responses, backbone, num_draws=32)
        scores.probability.mean()

    Source: LLaDA (arXiv 2502.09992, appendix B); the design of the draws is described at the top of this module.
    """
    _check(prompt_ids, response_ids, backbone, num_draws, batch_size)
    parts: list[np.ndarray] = [np.empty(0)] * len(response_ids)
    errors = np.zeros(len(response_ids))
    total = sum(_num_passes(len(ids), num_draws) for ids in response_ids)
    rows = _drawn_rows(prompt_ids, response_ids, num_draws, seed)
    with evaluation_mode(model), tqdm(total=total, unit="pass", disable=not show_progress) as progress:
        for batch in _batches(rows, batch_size):
            _fill_log_p(model, batch, backbone)
            for row in (piece.row for piece in batch if piece.is_last):
                replicates = token_parts(row.draws, row.log_p)
                errors[row.number] = _standard_error(replicates.sum(axis=1), _exact(len(row.response), num_draws))
                parts[row.number] = replicates.mean(axis=0)
            progress.update(sum(len(piece.masked) for piece in batch))
    for tokens in parts:
        if tokens.sum() > 0:
            tokens[:] = 0
    return Likelihood(np.array([tokens.sum() for tokens in parts]), errors, parts)


class Draws(NamedTuple):
    """The sets of masked positions whose log-likelihoods, weighted and summed, are an estimate.

    Attributes:
        masked: bool `[K, L]`, the sets.
        weight: `[K]`, of the sum of log p over each set.
        replicate: int `[K]`, the independent estimate that a set belongs to.
    """

    masked: np.ndarray
    weight: np.ndarray
    replicate: np.ndarray


def draw_masks(lengths: Sequence[int], num_draws: int, rngs: Sequence[np.random.Generator]) -> list[Draws]:
    """Choose the sets of masked positions for responses of some lengths, each by its own generator.

    Args:
        lengths: L of each response.
        num_draws: sets a response at most.
        rngs: where the draws of each response come from; not used where all sets are covered.
    """
    num_replicates = _num_replicates(num_draws)
    designs = [
        (length, rng)
        for length, rng in zip(lengths, rngs, strict=True)
        if not _exact(length, num_draws)
        for _ in range(num_replicates)
    ]
    at_once = max(1, PAIRS_AT_ONCE // max(lengths) ** 2)
    replicates = chain.from_iterable(
        _balanced_sets(designs[first : first + at_once], num_draws // num_replicates)
        for first in range(0, len(designs), at_once)
    )
    return [
        _all_sets(length) if _exact(length, num_draws) else _joined(list(islice(replicates, num_replicates)))
        for length in lengths
    ]


def token_parts(draws: Draws, log_p: np.ndarray) -> np.ndarray:
    """What each replicate says of each token's part in the log-likelihood: `[R, L]`.

    The line that the other replicates draw through the log p of token i, m_i + b (r - r_i) where a share r of the
    response is masked, is the control variate. m_i and r_i are weighted means over their sets with i; b, the slope
    within tokens, is common to all tokens.

    Args:
        draws: the sets, K of them.
        log_p: log p of the masked tokens of each set, 0 elsewhere, `[K, L]`.
    """
    num_sets, length = log_p.shape
    num_replicates = draws.replicate[-1] + 1
    weight = draws.masked * draws.weight[:, None]
    share = draws.masked.mean(axis=1)[:, None]
    terms = np.stack([weight, weight * share, weight * share**2, weight * log_p, weight * share * log_p])
    own = (np.arange(num_replicates)[:, None] == draws.replicate) @ terms  # five sums, each `[R, L]`
    if num_replicates == 1 or num_sets < SETS_FOR_A_LINE * num_replicates:
        return own[3]
    others = (1 - np.eye(num_replicates)) @ own
    seen, overall = others[0] > 0, others.sum(axis=2, keepdims=True)
    others = np.where(seen, others, overall)  # a token in no set of theirs counts as the average token
    mean_share, mean_log_p = others[1] / others[0], others[3] / others[0]
    spread = ((others[2] - others[1] * mean_share) * seen).sum(axis=1, keepdims=True)
    slope = ((others[4] - others[1] * mean_log_p) * seen).sum(axis=1, keepdims=True)
    known = spread > 1e-9 * overall[0]  # not known if every token is seen with a single share
    slope = np.divide(slope, spread, out=np.zeros_like(slope), where=known)
    excess, share_excess = own[0] - 1, own[1] - (length + 1) / (2 * length)  # over their expectations
    return own[3] - mean_log_p * excess - slope * (share_excess - mean_share * excess)


def _all_sets(length: int) -> Draws:
    masked = np.arange(1, 2**length)[:, None] >> np.arange(length) & 1 == 1
    weight = np.array([1 / (size * math.comb(length, size)) for size in masked.sum(axis=1).tolist()])
    return Draws(masked, weight, np.zeros(len(masked), dtype=np.int64))


def _joined(replicates: list[tuple[np.ndarray, np.ndarray]]) -> Draws:
    masked, weight = (np.concatenate(parts) for parts in zip(*replicates, strict=True))
    return Draws(masked, weight, np.repeat(np.arange(len(replicates)), len(weight) // len(replicates)))


def _balanced_sets(
    designs: list[tuple[int, np.random.Generator]], num_sets: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each replicate, sets of stratified sizes that give every position about the same weight, and their weights.

    Replicates are built side by side, position by position; none depends on the others.
    """
    lengths = np.array([[length] for length, _ in designs])
    edges = np.linspace(0, 1, num_sets + 1) ** SLICE_POWER
    widths = np.diff(edges)
    ties = np.full((len(designs), num_sets, lengths.max()), np.inf)
    sizes = np.empty((len(designs), num_sets), dtype=np.int64)
    for i, (length, rng) in enumerate(designs):
        sizes[i] = np.floor((edges[:-1] + rng.random(num_sets) * widths) * length) + 1
        ties[i, :, :length] = 1e-9 * rng.random((num_sets, length))
    sizes = sizes.clip(max=lengths)  # the last slice may round up to its open end
    weights = widths * lengths / sizes
    masked = np.zeros(ties.shape, dtype=bool)
    # weight so far of each pair of positions, and of each alone on the diagonal
    together = np.zeros((len(designs), lengths.max(), lengths.max()))
    for k in reversed(range(num_sets)):
        cost = together.diagonal(axis1=1, axis2=2) + ties[:, k]  # ties, up to rounding, are broken at random
        for taken in range(sizes[:, k].max()):
            growing = (sizes[:, k] > taken).nonzero()[0]
            cheapest = cost[growing].argmin(axis=1)
            masked[growing, k, cheapest] = True
            cost[growing] += together[growing, cheapest]
            cost[growing, cheapest] = np.inf
        members = masked[:, k]
        together += (members * weights[:, [k]])[:, :, None] * members[:, None]
    return [(masked[i, :, :length], weights[i]) for i, (length, _) in enumerate(designs)]


def _exact(length: int, num_draws: int) -> bool:
    return 2**length - 1 <= num_draws


def _num_replicates(num_draws: int) -> int:
    return 1 if num_draws == 1 else min(max(num_draws // DRAWS_A_REPLICATE, 2), MAX_REPLICATES)


def _num_passes(length: int, num_draws: int) -> int:
    if _exact(length, num_draws):
        return 2**length - 1
    return num_draws - num_draws % _num_replicates(num_draws)


def _standard_error(replicates: np.ndarray, exact: bool) -> float:
    if exact:
        return 0.0
    return math.nan if len(replicates) == 1 else float(replicates.std(ddof=1)) / math.sqrt(len(replicates))


class _Row(NamedTuple):
    """A response, its draws, and what the model has said so far."""

    number: int
    prompt: list[int]
    response: list[int]
    draws: Draws
    log_p: np.ndarray  # [K, L], as `token_parts` takes it


class _Piece(NamedTuple):
    """The sequences that one row has in a forward pass."""

    row: _Row
    start: int
    stop: int

    @property
    def masked(self) -> np.ndarray:
        return self.row.draws.masked[self.start : self.stop]

    @property
    def is_last(self) -> bool:
        return self.stop == len(self.row.log_p)


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


def _batches(rows: Iterator[_Row], batch_size: int) -> Iterator[list[_Piece]]:
    """The sequences of all rows, `batch_size` at a time."""
    batch, room = [], batch_size
    for row in rows:
        stop = 0
        while stop < len(row.log_p):
            start, stop = stop, min(stop + room, len(row.log_p))
            batch.append(_Piece(row, start, stop))
            room -= stop - start
            if room == 0:
                yield batch
                batch, room = [], batch_size
    if batch:
        yield batch


def _row_generator(seed: int, prompt: list[int], response: list[int]) -> np.random.Generator:
    content = np.array([seed, len(prompt), *prompt, *response], dtype=np.int64)
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(content.tobytes(), digest_size=16).digest(), "little"))


def _fill_log_p(model: nn.Module, batch: list[_Piece], backbone: Backbone) -> None:
    """One forward pass: log p of the true tokens at the masked positions goes into the rows of the batch."""
    width = max(len(piece.row.prompt) + len(piece.row.response) for piece in batch)
    ids = np.full((sum(len(piece.masked) for piece in batch), width), backbone.pad_token_id)
    attention_mask, masked = np.zeros_like(ids), np.zeros_like(ids, dtype=bool)
    first = 0
    for piece in batch:
        rows, content = slice(first, first + len(piece.masked)), piece.row.prompt + piece.row.response
        ids[rows, : len(content)] = content
        attention_mask[rows, : len(content)] = 1
        masked[rows, len(piece.row.prompt) : len(content)] = piece.masked
        first = rows.stop
    device = next(model.parameters()).device
    ids, attention_mask, masked = (torch.from_numpy(part).to(device) for part in (ids, attention_mask, masked))
    noisy_ids = ids.masked_fill(masked, backbone.mask_token_id)
    measure, shift = TokenNLL(ids[masked]), backbone.logit_shift
    figures = row_figures(model, noisy_ids, attention_mask, masked, measure, logit_shift=shift)
    log_p = -figures.value.cpu().double().numpy()
    for piece in batch:
        found, log_p = np.split(log_p, [piece.masked.sum()])
        piece.row.log_p[piece.start : piece.stop][piece.masked] = found


def _check(
    prompt_ids: Sequence[list[int]],
    response_ids: Sequence[list[int]],
    backbone: Backbone,
    num_draws: int,
    batch_size: int,
) -> None:
    for name, value in (("num_draws", num_draws), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if len(prompt_ids) != len(response_ids):
        raise ValueError(f"There are {len(prompt_ids)} prompts and {len(response_ids)} responses: pass one for each.")
    for row, (prompt, response) in enumerate(zip(prompt_ids, response_ids, strict=True)):
        length = len(prompt) + len(response)
        if not response:
            raise ValueError(f"The response of row {row} is empty, so it has no likelihood: remove the row.")
        if backbone.context_length is not None and length > backbone.context_length:
            raise ValueError(
                f"Row {row} has {length} tokens, {len(response)} of them response, and the model's context is "
                f"{backbone.context_length}: shorten or remove the row."
            )
