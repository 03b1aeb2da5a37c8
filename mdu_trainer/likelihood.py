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
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from .divergence import cross_entropy
from .generation import CHUNK_ELEMENTS, evaluation_mode
from .models import Backbone, row_logits

DRAWS_A_REPLICATE = 64  # larger ones are better balanced, but there are fewer of them to measure the error
MAX_REPLICATES = 8
SLICE_POWER = 1.5  # slices of the range of l end at (k / draws) ** SLICE_POWER


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
    lengths = [len(ids) for ids in response_ids]
    estimates = [np.zeros((_num_replicates(length, num_draws), length)) for length in lengths]
    by_length = sorted(range(len(lengths)), key=lambda row: len(prompt_ids[row]) + lengths[row])
    passes = _passes(by_length, prompt_ids, response_ids, num_draws, seed)
    total = sum(_num_passes(length, num_draws) for length in lengths)
    with evaluation_mode(model), tqdm(total=total, unit="pass", disable=not show_progress) as progress:
        while batch := list(islice(passes, batch_size)):
            for one, log_p in zip(batch, _masked_log_likelihood(model, batch, backbone), strict=True):
                estimates[one.row][one.replicate, one.masked] += one.weight * log_p
            progress.update(len(batch))
    errors = [_standard_error(each.sum(axis=1), _exact(each.shape[1], num_draws)) for each in estimates]
    return Likelihood(
        log_likelihood=np.array([each.sum(axis=1).mean() for each in estimates]),
        standard_error=np.array(errors),
        tokens=[each.mean(axis=0) for each in estimates],
    )


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


def draw_masks(length: int, num_draws: int, rng: np.random.Generator) -> Draws:
    """Choose the sets of masked positions for a response of `length` tokens.

    Args:
        length: L.
        num_draws: sets at most.
        rng: where the draws come from; not used if all sets are covered.
    """
    if _exact(length, num_draws):
        masked = np.arange(1, 2**length)[:, None] >> np.arange(length) & 1 == 1
        weight = np.array([1 / (size * math.comb(length, size)) for size in masked.sum(axis=1).tolist()])
        return Draws(masked, weight, np.zeros(len(masked), dtype=np.int64))
    replicates = _num_replicates(length, num_draws)
    designs = [_balanced_sets(length, num_draws // replicates, rng) for _ in range(replicates)]
    masked, weight = (np.concatenate(parts) for parts in zip(*designs, strict=True))
    return Draws(masked, weight, np.repeat(np.arange(replicates), num_draws // replicates))


def _balanced_sets(length: int, num_draws: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One replicate: sets of stratified sizes that give every position about the same weight."""
    edges = np.linspace(0, 1, num_draws + 1) ** SLICE_POWER
    widths = np.diff(edges)
    sizes = np.floor((edges[:-1] + rng.random(num_draws) * widths) * length).astype(np.int64) + 1
    sizes = sizes.clip(max=length)  # the last slice may round up to its open end
    weights = widths * length / sizes
    masked = np.zeros((num_draws, length), dtype=bool)
    together = np.zeros((length, length))  # weight so far of each pair of positions, and of each alone on the diagonal
    for k in reversed(range(num_draws)):
        cost = together.diagonal() + 1e-9 * rng.random(length)  # ties, up to rounding, are broken at random
        for _ in range(sizes[k]):
            cheapest = cost.argmin()
            masked[k, cheapest] = True
            cost += together[cheapest]
            cost[cheapest] = np.inf
        together[np.ix_(masked[k], masked[k])] += weights[k]
    return masked, weights


def _exact(length: int, num_draws: int) -> bool:
    return 2**length - 1 <= num_draws


def _num_replicates(length: int, num_draws: int) -> int:
    if _exact(length, num_draws) or num_draws == 1:
        return 1
    return min(max(num_draws // DRAWS_A_REPLICATE, 2), MAX_REPLICATES)


def _num_passes(length: int, num_draws: int) -> int:
    if _exact(length, num_draws):
        return 2**length - 1
    replicates = _num_replicates(length, num_draws)
    return num_draws // replicates * replicates


def _standard_error(replicates: np.ndarray, exact: bool) -> float:
    if exact:
        return 0.0
    return math.nan if len(replicates) == 1 else float(replicates.std(ddof=1)) / math.sqrt(len(replicates))


class _Pass(NamedTuple):
    """One sequence of a forward pass."""

    row: int
    replicate: int
    weight: float
    prompt: list[int]
    response: list[int]
    masked: np.ndarray  # bool [L]


def _passes(
    rows: list[int],
    prompt_ids: Sequence[list[int]],
    response_ids: Sequence[list[int]],
    num_draws: int,
    seed: int,
) -> Iterator[_Pass]:
    for row in rows:
        prompt, response = prompt_ids[row], response_ids[row]
        draws = draw_masks(len(response), num_draws, _row_generator(seed, prompt, response))
        for masked, weight, replicate in zip(*draws, strict=True):
            yield _Pass(row, replicate, weight, prompt, response, masked)


def _row_generator(seed: int, prompt: list[int], response: list[int]) -> np.random.Generator:
    content = np.array([seed, len(prompt), *prompt, *response], dtype=np.int64)
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(content.tobytes(), digest_size=16).digest(), "little"))


def _masked_log_likelihood(model: nn.Module, batch: list[_Pass], backbone: Backbone) -> list[np.ndarray]:
    """log p of the true tokens at the masked positions of each sequence: B arrays, float64 `[l]`."""
    device = next(model.parameters()).device
    width = max(len(one.prompt) + len(one.response) for one in batch)
    ids = torch.full((len(batch), width), backbone.pad_token_id)
    attention_mask = torch.zeros_like(ids)
    masked = torch.zeros_like(ids, dtype=torch.bool)
    for i, one in enumerate(batch):
        start, stop = len(one.prompt), len(one.prompt) + len(one.response)
        ids[i, :stop] = torch.tensor(one.prompt + one.response)
        attention_mask[i, :stop] = 1
        masked[i, start:stop] = torch.from_numpy(one.masked)
    ids, attention_mask, masked = ids.to(device), attention_mask.to(device), masked.to(device)
    noisy_ids = ids.masked_fill(masked, backbone.mask_token_id)
    logits = row_logits(model, noisy_ids, attention_mask, masked, logit_shift=backbone.logit_shift)
    rows_a_chunk = max(1, CHUNK_ELEMENTS // logits.shape[1])
    chunks = zip(logits.split(rows_a_chunk), ids[masked].to(logits.device).split(rows_a_chunk), strict=True)
    nll = torch.cat([cross_entropy(part, targets) for part, targets in chunks]).cpu().double().numpy()
    return np.split(-nll, masked.sum(dim=1).cumsum(dim=0)[:-1].tolist())


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
