"""Sets of masked positions for the Monte-Carlo likelihood of a response, and the estimate that they give together.

Wanted is, for a response of L tokens and any function of a set S and a token i in it,

    sum_i E_l E_S [ 1[i in S] L/l * f_i(S) ]     l uniform on 1..L, S of size l, each such set equally likely

where f_i(S) is log p(y_i | x, y without S). The draws of a response are made together, so that a few say as much as
many independent ones:

- If the draws cover all 2^L - 1 sets S, each is evaluated once, weighs 1 / (l C(L, l)), and the result is exact:

      three tokens:  S       {1}  {2}  {3}  {1,2}  {1,3}  {2,3}  {1,2,3}
                     weight  1/3  1/3  1/3   1/6    1/6    1/6     1/3     those with token 1 sum to 1

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
- Replicates that take their lines from each other err a little alike, the more the fewer sets they have, so their
  spread is too small: with 4 sets by 5 % to 9 %, most where the answer is known by heart, with 8 by 1 % to 7 %, with
  16 by nothing that shows (made-up answers of 25 tokens). The standard error is raised by 1 / (3 sets): 8 %, 4 %, 2 %.
"""

import math
from collections.abc import Sequence
from itertools import chain, islice
from typing import NamedTuple

import numpy as np

DRAWS_A_REPLICATE = 64  # larger ones are better balanced, but there are fewer of them to measure the error
MAX_REPLICATES = 8
SLICE_POWER = 1.5  # slices of the range of l end at (k / draws) ** SLICE_POWER
SETS_FOR_A_LINE = 4  # of a replicate, to tell how likely its tokens are
PAIRS_AT_ONCE = 1 << 20  # of positions, over the replicates that are drawn together


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


def num_sets(length: int, num_draws: int) -> int:
    """The number of sets that `draw_masks` chooses for a response of `length` tokens."""
    return 2**length - 1 if _exact(length, num_draws) else num_draws - num_draws % _num_replicates(num_draws)


def token_parts(draws: Draws, log_p: np.ndarray) -> np.ndarray:
    """Estimate each token's part in the log-likelihood, once from each replicate: `[R, L]`.

    The line that the other replicates draw through the log p of token i, m_i + b (r - r_i) where a share r of the
    response is masked, is the control variate. m_i and r_i are weighted means over their sets with i; b, the slope
    within tokens, is common to all tokens. Summed over the sets S_k with i, of weight w_k and share r_k:

        sum w_k log p_k - (line - E[line])    where    line = m_i count_i + b (shares_i - r_i count_i)
        count_i = sum w_k, E = 1;    shares_i = sum w_k r_k, E = (L + 1) / 2L

    Args:
        draws: the sets, K of them.
        log_p: log p of the masked tokens of each set, 0 elsewhere, `[K, L]`.
    """
    length = log_p.shape[1]
    num_replicates = draws.replicate[-1] + 1
    weight = (np.arange(num_replicates)[:, None] == draws.replicate) * draws.weight  # [R, K]
    share = draws.masked.mean(axis=1)
    weights = np.stack([weight, weight * share, weight * share**2])
    count, shares, squares = weights @ draws.masked.astype(float)
    values, products = weights[:2] @ log_p
    if not _draws_lines(draws):
        return values
    others = (1 - np.eye(num_replicates)) @ np.stack([count, shares, squares, values, products])
    mean_log_p, mean_share, slope = _lines(others)
    excess, share_excess = count - 1, shares - (length + 1) / (2 * length)  # over their expectations
    return values - mean_log_p * excess - slope * (share_excess - mean_share * excess)


def standard_error(draws: Draws, estimates: np.ndarray) -> float:
    """The standard error of the mean of `[R]` estimates: 0 if the draws cover every set, NaN for one replicate."""
    sets, length = draws.masked.shape
    if _exact(length, sets):
        return 0.0
    if len(estimates) == 1:
        return math.nan
    alike = len(estimates) / (3 * sets) if _draws_lines(draws) else 0.0
    return (1 + alike) * float(estimates.std(ddof=1)) / math.sqrt(len(estimates))


def _draws_lines(draws: Draws) -> bool:
    """Whether there are replicates, and sets enough in each, for a control variate."""
    num_replicates = draws.replicate[-1] + 1
    return bool(num_replicates > 1 and len(draws.masked) >= SETS_FOR_A_LINE * num_replicates)


def _lines(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each token's mean log p `[R, L]` and mean share `[R, L]`, and the slope within tokens `[R, 1]`.

    Args:
        sums: of weights, times share, times its square, times log p, and times both, `[5, R, L]`.
    """
    seen, overall = sums[0] > 0, sums.sum(axis=2, keepdims=True)
    count, shares, squares, values, products = np.where(seen, sums, overall)  # unseen: as the average token
    mean_log_p, mean_share = values / count, shares / count
    spread = ((squares - shares * mean_share) * seen).sum(axis=1, keepdims=True)
    together = ((products - shares * mean_log_p) * seen).sum(axis=1, keepdims=True)
    known = spread > 1e-9 * overall[0]  # not if each token is seen with a single share
    return mean_log_p, mean_share, np.divide(together, spread, out=np.zeros_like(spread), where=known)


def _all_sets(length: int) -> Draws:
    masked = np.arange(1, 2**length)[:, None] >> np.arange(length) & 1 == 1
    weight = np.array([1 / (size * math.comb(length, size)) for size in masked.sum(axis=1).tolist()])
    return Draws(masked, weight, np.zeros(len(masked), dtype=np.int64))


def _joined(replicates: list[tuple[np.ndarray, np.ndarray]]) -> Draws:
    masked, weight = (np.concatenate(parts) for parts in zip(*replicates, strict=True))
    return Draws(masked, weight, np.repeat(np.arange(len(replicates)), len(weight) // len(replicates)))


def _balanced_sets(designs: list[tuple[int, np.random.Generator]], count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Build the sets of each replicate, of stratified sizes, so that all positions weigh about the same; and weights.

    Replicates are built side by side, position by position; none depends on the others. Three tokens, two draws:

        k = 1: l in 2..3, say 2, weight .65 * 3/2 = .97    all positions cost 0: chance takes {1, 3}
        k = 0: l in 1..2, say 1, weight .35 * 3/1 = 1.06   1 and 3 cost .97 each, 2 costs 0: it takes {2}
    """
    lengths = np.array([[length] for length, _ in designs])
    edges = np.linspace(0, 1, count + 1) ** SLICE_POWER
    widths = np.diff(edges)
    ties = np.full((len(designs), count, lengths.max()), np.inf)
    sizes = np.empty((len(designs), count), dtype=np.int64)
    for i, (length, rng) in enumerate(designs):
        sizes[i] = np.floor((edges[:-1] + rng.random(count) * widths) * length) + 1
        ties[i, :, :length] = 1e-9 * rng.random((count, length))
    sizes = sizes.clip(max=lengths)  # the last slice may round up to its open end
    weights = widths * lengths / sizes
    masked = np.zeros(ties.shape, dtype=bool)
    # weight so far of each pair of positions, and of each alone on the diagonal
    together = np.zeros((len(designs), lengths.max(), lengths.max()))
    for k in reversed(range(count)):
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
