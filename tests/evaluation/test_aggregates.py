"""Aggregate scores, and scores of membership, against hand-worked cases."""

from statistics import harmonic_mean

import pytest

from mdu_trainer.evaluation.metrics import (
    TruthRatio,
    memorization_score,
    privacy_score,
    reference_score,
    truth_share,
    utility_score,
)


def test_memorisation_is_the_harmonic_mean_of_what_is_not_known():
    found = memorization_score(0.1, 0.2, 0.4, 0.5)
    assert found == pytest.approx(harmonic_mean([0.9, 0.8, 0.6, 0.5]))
    assert memorization_score(0, 0, 0, 0) == 1 and memorization_score(1, 0, 0, 0) == 0


def test_privacy_is_how_near_the_attacks_are_to_another_model():
    never = {"loss": 0.4, "min-k": 0.5}
    assert privacy_score(never, never) == 1
    too_likely, too_unlikely = (
        privacy_score({"loss": 0.7, "min-k": 0.5}, never),
        privacy_score({"loss": 0.1}, {"loss": 0.4}),
    )
    assert too_likely == pytest.approx(harmonic_mean([1 - 0.3 / 0.6, 1])) and too_unlikely == pytest.approx(0.5)


def test_utility_is_nothing_without_either():
    assert utility_score(0.6, 0.9) == pytest.approx(harmonic_mean([0.6, 0.9]))
    assert utility_score(0.6, 0.0) == 0


def test_the_truth_share_is_that_of_the_true_answer_beside_the_mean_of_wrong_ones():
    true, wrong = 0.3, (0.1, 0.4)
    ratio = TruthRatio().compute(per_token=[-1.2], wrong_per_token=[[-2.3, -0.9]], variant="release")["truth_ratio"]
    assert ratio == pytest.approx(2.718281828459045 ** ((-2.3 - 0.9) / 2 + 1.2))
    mean = (wrong[0] * wrong[1]) ** 0.5
    assert truth_share([mean / true]) == pytest.approx([true / (true + mean)])


def test_a_reference_takes_off_what_any_model_knows():
    assert reference_score([-1.0, -2.0], [-1.5, -1.5]) == [0.5, -0.5]
    with pytest.raises(ValueError, match="1 likelihoods and 2 of the reference"):
        reference_score([-1.0], [-1.0, -2.0])


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda: memorization_score(1.5, 0, 0, 0), "extraction_strength must lead to a score from 0 to 1"),
        (lambda: privacy_score({"loss": 0.5}, {"zlib": 0.5}), "differ: loss and zlib"),
        (lambda: privacy_score({}, {}), "nothing to aggregate"),
        (lambda: privacy_score({"loss": 1.5}, {"loss": 0.5}), "loss must lead to"),
    ],
)
def test_wrong_scores_are_refused(compute, message):
    with pytest.raises(ValueError, match=message):
        compute()
