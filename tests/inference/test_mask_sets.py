import math

import numpy as np
import pytest

from mdu_trainer.inference import mask_sets
from mdu_trainer.inference.mask_sets import Draws, draw_masks, num_sets, standard_error, token_parts


def hard_to_easy(length: int, seed: int = 0):
    """Made-up log p of the masked tokens `[K, L]`: tokens differ, and masked ones make others harder."""
    rng = np.random.default_rng(seed)
    alone, together = rng.exponential(size=length), rng.exponential(size=(length, length)) / length
    return lambda masked: -(alone + masked @ together) * masked


def known_by_heart(length: int, seed: int):
    """Made-up log p of the masked tokens `[K, L]`: near 0 until much is masked, then falling fast."""
    rng = np.random.default_rng(seed)
    height, together = rng.exponential(size=length), rng.exponential(size=(length, length)) / length
    start = rng.uniform(0.5, 1.2, size=length)
    return lambda masked: -np.log1p(height * np.exp(10 * (masked @ together - start))) * masked


def draw(length: int, num_draws: int, num_seeds: int = 1) -> list[Draws]:
    return draw_masks([length] * num_seeds, num_draws, [np.random.default_rng(seed) for seed in range(num_seeds)])


def made_up_estimates(length: int, num_draws: int, num_seeds: int) -> np.ndarray:
    """What each replicate says of the tokens of a hard-to-easy response, `[seeds, R, L]`."""
    log_p = hard_to_easy(length)
    return np.array([token_parts(draws, log_p(draws.masked)) for draws in draw(length, num_draws, num_seeds)])


def independent_draws(length: int, num_draws: int, rng: np.random.Generator):
    sizes = rng.integers(1, length + 1, num_draws)
    masked = rng.random((num_draws, length)).argsort(axis=1) < sizes[:, None]
    return masked, length / sizes / num_draws


@pytest.mark.parametrize(("length", "num_draws"), [(2, 1), (3, 2), (3, 6), (4, 5), (4, 8)])
def test_every_set_has_its_exact_weight_on_average(length, num_draws):
    # unbiased for any function of the set: the expected weight of S is 1 / (l * number of sets of that size)
    (exact,) = draw(length, 2**length)
    bits = 1 << np.arange(length)
    weights = np.zeros((2000, 2**length))
    for seed, draws in enumerate(draw(length, num_draws, len(weights))):
        np.add.at(weights[seed], draws.masked @ bits, draws.weight / (draws.replicate.max() + 1))
    mean, error = weights.mean(axis=0), weights.std(axis=0) / math.sqrt(len(weights))
    assert len(exact.masked) == 2**length - 1
    assert (np.abs(mean[exact.masked @ bits] - exact.weight) < 4.5 * error[exact.masked @ bits] + 1e-12).all()


@pytest.mark.parametrize(("length", "num_draws"), [(4, 8), (6, 8), (6, 32), (8, 200)])
def test_every_token_is_unbiased_with_the_control_variate(length, num_draws):
    exact = made_up_estimates(length, 2**length, 1)[0, 0]
    estimates = made_up_estimates(length, num_draws, 3000).mean(axis=1)
    error = estimates.std(axis=0) / math.sqrt(len(estimates))
    assert (error > 0).all() and (error < 0.02).all()
    assert (np.abs(estimates.mean(axis=0) - exact) < 4.5 * error).all()


@pytest.mark.parametrize(("length", "num_draws"), [(4, 8), (5, 9), (12, 16), (40, 64), (9, 200)])
def test_tokens_on_lines_of_one_slope_are_exact(length, num_draws):
    # log p falls with the share of masked tokens, from token to token at another height: the control variate
    height = -np.random.default_rng(0).exponential(size=length)
    (draws,) = draw(length, num_draws)
    parts = token_parts(draws, draws.masked * (height - 2 * draws.masked.mean(axis=1, keepdims=True)))
    expected = height - 2 * (length + 1) / (2 * length)
    seen = [draws.masked[draws.replicate == r].any(axis=0).all() for r in range(len(parts))]
    assert all(seen) and parts == pytest.approx(np.tile(expected, (len(parts), 1)))


def test_a_token_that_others_never_saw_counts_as_the_average_one():
    masked = np.ones((8, 3), dtype=bool)
    masked[[0, 4, 5, 6, 7], 2] = False  # in three sets of the first replicate and none of the second
    draws = Draws(masked, np.full(8, 0.25), np.repeat([0, 1], 4))
    first, second = token_parts(draws, masked * [-1.0, -3.0, -5.0])
    assert first == pytest.approx([-1, -3, 0.75 * -5 + 0.25 * -2])  # what is missing counts as the mean of -1 and -3
    assert second == pytest.approx([-1, -3, -5])


@pytest.mark.parametrize("length", [1, 3, 9])
@pytest.mark.parametrize("num_draws", [1, 2, 7, 9, 64, 200, 1000])
def test_number_of_sets(length, num_draws):
    (draws,) = draw(length, num_draws)
    assert len(draws.masked) == len(draws.weight) == num_sets(length, num_draws) <= num_draws
    if len(draws.masked) == 2**length - 1:
        assert len(np.unique(draws.masked, axis=0)) == len(draws.masked)
        assert standard_error(draws, np.array([-3.0])) == 0
    elif num_draws == 1:
        assert math.isnan(standard_error(draws, np.array([-3.0])))
    else:
        sizes = np.bincount(draws.replicate)
        assert len(sizes) >= 2 and (sizes == sizes[0]).all()
        # two replicates of at least 4 sets have control variates, and their spread is a little too small
        alike = 1 / (3 * sizes[0]) if sizes[0] >= 4 else 0
        assert len(sizes) > 2 or standard_error(draws, np.array([-3.0, -5.0])) == pytest.approx(1 + alike)


def test_draws_are_the_same_alone_and_side_by_side(monkeypatch):
    lengths = [5, 23, 1, 9, 60]

    def drawn():
        return draw_masks(lengths, 16, [np.random.default_rng(seed) for seed in range(5)])

    def same(one, other):
        return all((part == its).all() for part, its in zip(one, other, strict=True))

    together = drawn()
    for at_once in (1, 23 * 60**2):
        monkeypatch.setattr(mask_sets, "PAIRS_AT_ONCE", at_once)
        assert all(map(same, together, drawn()))
    for seed, (length, one) in enumerate(zip(lengths, together, strict=True)):
        assert same(one, draw_masks([length], 16, [np.random.default_rng(seed)])[0])


@pytest.mark.parametrize(("length", "num_draws"), [(12, 8), (12, 128), (40, 64), (40, 200)])
def test_standard_error_is_the_spread_over_seeds(length, num_draws):
    estimates = made_up_estimates(length, num_draws, 300).sum(axis=2)
    claimed = (estimates.var(axis=1, ddof=1) / estimates.shape[1]).mean()
    assert claimed / estimates.mean(axis=1).var(ddof=1) == pytest.approx(1, abs=0.35)  # 3 standard errors


@pytest.mark.parametrize("answer", [known_by_heart, hard_to_easy])
@pytest.mark.parametrize("num_draws", [8, 16])
def test_standard_error_of_answers_known_by_heart_and_others(answer, num_draws):
    claimed, actual = [], []
    for row in range(20):
        log_p = answer(25, row)
        drawn = draw(25, num_draws, 200)
        estimates = [token_parts(draws, log_p(draws.masked)).sum(axis=1) for draws in drawn]
        claimed.append(np.mean([standard_error(*pair) ** 2 for pair in zip(drawn, estimates, strict=True)]))
        actual.append(np.var(np.mean(estimates, axis=1), ddof=1))
    assert np.sqrt(np.mean(claimed) / np.mean(actual)) == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("length", [12, 40])
@pytest.mark.parametrize("num_draws", [8, 16, 32, 128])
def test_a_quarter_of_the_independent_draws_is_enough(length, num_draws):
    ours = made_up_estimates(length, num_draws, 150).mean(axis=1).sum(axis=1)
    log_p = hard_to_easy(length)
    independent = []
    for seed in range(150):
        masked, weight = independent_draws(length, 4 * num_draws, np.random.default_rng(seed))
        independent.append((weight * log_p(masked).sum(axis=1)).sum())
    assert np.mean(ours) == pytest.approx(np.mean(independent), rel=0.03)
    assert np.var(ours) < np.var(independent)


@pytest.mark.parametrize("num_draws", [1, 2, 7, 32])
def test_equal_tokens_are_exact_with_any_number_of_draws(num_draws):
    for length in (5, 23):
        (draws,) = draw(length, num_draws)
        sums = token_parts(draws, draws.masked.astype(float)).sum(axis=1)
        assert sums == pytest.approx(length)  # the estimate of a model that gives every token log p = 1
        assert len(draws.masked) <= num_draws
