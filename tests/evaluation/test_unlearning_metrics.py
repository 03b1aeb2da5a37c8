"""Metrics of unlearning against hand-worked cases and other people's code."""

import math
import warnings
import zlib
from statistics import harmonic_mean

import numpy as np
import pytest
from scipy import stats

from mdu_trainer.evaluation.metrics import (
    ChoiceProbability,
    Degeneracy,
    ExactMemorization,
    ExtractionStrength,
    ForgetQuality,
    MembershipInference,
    ModelUtility,
    PrivacyLeakage,
    Probability,
    TrueRank,
    TruthRatio,
    aggregate_truth_ratios,
    bootstrap_interval,
    min_k_score,
    two_sided,
    zlib_score,
)

SECRET = 77_077
RNG = np.random.default_rng(0)
TRUE = RNG.normal(-1, 0.5, 12).tolist()
WRONG = RNG.normal(-1.3, 0.5, (12, 3)).tolist()
ALL = [
    ChoiceProbability,
    Degeneracy,
    ExactMemorization,
    ExtractionStrength,
    ForgetQuality,
    MembershipInference,
    ModelUtility,
    PrivacyLeakage,
    Probability,
    TrueRank,
    TruthRatio,
]


# Truth


def test_probability_is_the_geometric_mean_of_the_tokens():
    tokens = [0.5, 0.25, 0.125]
    rows = Probability().compute(per_token=[sum(map(math.log, tokens)) / 3, 0.0], use_aggregator=False)
    assert rows["probability"] == pytest.approx([stats.gmean(tokens), 1])
    assert Probability().compute(per_token=[math.log(0.25), 0.0])["probability"] == pytest.approx(0.625)


def test_choice_probability_is_the_share_of_the_true_answer():
    rows = ChoiceProbability().compute(per_token=TRUE, wrong_per_token=WRONG, use_aggregator=False)["probability"]
    for true, wrong, found in zip(TRUE, WRONG, rows, strict=True):
        assert found == pytest.approx(math.exp(true) / (math.exp(true) + sum(map(math.exp, wrong))))
    unlikely = ChoiceProbability().compute(per_token=[-2000.0], wrong_per_token=[[-2000.0, -5000.0]])
    assert unlikely["probability"] == pytest.approx(0.5)


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("aggregation", ["ratio", "forget", "retain"])
def test_truth_ratio_equals_its_formula(variant, aggregation):
    mean = {"paper": np.mean, "release": stats.gmean}[variant]
    ratios = [mean(np.exp(wrong)) / math.exp(true) for true, wrong in zip(TRUE, WRONG, strict=True)]
    part = {"ratio": lambda r: r, "forget": lambda r: min(r, 1 / r), "retain": lambda r: max(0, 1 - r)}[aggregation]
    options = {"per_token": TRUE, "wrong_per_token": WRONG, "variant": variant, "aggregation": aggregation}
    rows = TruthRatio().compute(**options, use_aggregator=False)["truth_ratio"]
    assert rows == pytest.approx([part(r) for r in ratios])
    assert TruthRatio().compute(**options)["truth_ratio"] == pytest.approx(np.mean([part(r) for r in ratios]))
    assert aggregate_truth_ratios(ratios, aggregation) == pytest.approx(rows)


def test_truth_ratio_worked_by_hand():
    # wrong answers a token: 0.1 and 0.4; true one 0.5
    row = {"per_token": [math.log(0.5)], "wrong_per_token": [[math.log(0.1), math.log(0.4)]]}
    assert TruthRatio().compute(**row)["truth_ratio"] == pytest.approx(0.5)
    assert TruthRatio().compute(**row, variant="release")["truth_ratio"] == pytest.approx(0.4)
    assert TruthRatio().compute(**row, aggregation="retain")["truth_ratio"] == pytest.approx(0.5)


def test_truth_ratio_of_a_broken_model_is_finite():
    columns = {"per_token": [-3000.0, -1.0], "wrong_per_token": [[-1.0], [-3000.0]]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ratios = TruthRatio().compute(**columns, use_aggregator=False)["truth_ratio"]
        forget = TruthRatio().compute(**columns, aggregation="forget")["truth_ratio"]
    assert all(map(math.isfinite, ratios)) and ratios[0] > 1e300 and 0 < ratios[1] < 1e-300
    assert forget == pytest.approx(0)


def test_true_rank_is_the_share_of_wrong_answers_below():
    rows = TrueRank().compute(per_token=TRUE, wrong_per_token=WRONG, use_aggregator=False)["true_rank"]
    assert rows == pytest.approx([sum(w < true for w in wrong) / 3 for true, wrong in zip(TRUE, WRONG, strict=True)])
    assert len(set(rows)) > 2 and TrueRank().compute(per_token=TRUE, wrong_per_token=WRONG)["true_rank"] == (
        pytest.approx(np.mean(rows))
    )


def test_true_rank_counts_ties_half():
    ties = {"per_token": [-1.0, -1.0, -2.0, -3000.0], "wrong_per_token": [[-1.0], [-1.00001, -2], [-1], [-3000, -1]]}
    rows = TrueRank().compute(**ties, use_aggregator=False)["true_rank"]
    assert rows == [0.5, 0.75, 0, 0.25], "closer than rounding is a tie, too"


def test_model_utility_is_the_harmonic_mean():
    figures = RNG.uniform(0.1, 1, 9).tolist()
    assert ModelUtility().compute(figures=figures)["model_utility"] == pytest.approx(harmonic_mean(figures))
    assert ModelUtility().compute(figures=[0.9] * 8 + [0.0])["model_utility"] == 0
    with pytest.raises(ValueError, match=r"figure 1 is -0\.1"):
        ModelUtility().compute(figures=[0.5, -0.1])


def ks_distance(a, b):
    return max(abs(np.mean(np.array(a) <= x) - np.mean(np.array(b) <= x)) for x in [*a, *b])


def test_forget_quality_is_the_ks_test():
    ours, theirs = RNG.normal(0, 1, 40).tolist(), RNG.normal(0.8, 1, 40).tolist()
    found = ForgetQuality().compute(predictions=ours, references=theirs)
    assert found["ks_statistic"] == pytest.approx(ks_distance(ours, theirs))
    assert found["forget_quality"] == pytest.approx(stats.ks_2samp(ours, theirs).pvalue)
    assert ForgetQuality().compute(predictions=ours, references=ours)["forget_quality"] == 1


def test_forget_quality_by_counting_paths():
    # exact p-value of n = m = 3 at distance 1: both orders of {aaabbb} among C(6, 3)
    found = ForgetQuality().compute(predictions=[1.0, 2.0, 3.0], references=[4.0, 5.0, 6.0])
    assert found["forget_quality"] == pytest.approx(2 / math.comb(6, 3))


def test_forget_quality_does_not_depend_on_which_way_up_the_ratio_is():
    ours, theirs = RNG.uniform(0.5, 2, 30), RNG.uniform(0.6, 2.5, 30)
    straight = ForgetQuality().compute(predictions=ours, references=theirs)["forget_quality"]
    inverse = ForgetQuality().compute(predictions=1 / ours, references=1 / theirs)["forget_quality"]
    assert straight == pytest.approx(inverse)


# Privacy


def pairwise_auc(scores, members):
    inside = [s for s, m in zip(scores, members, strict=True) if m]
    outside = [s for s, m in zip(scores, members, strict=True) if not m]
    return np.mean([(a > b) + (a == b) / 2 for a in inside for b in outside])


def test_auc_counts_pairs():
    scores = RNG.integers(0, 6, 30).astype(float).tolist()  # with ties
    members = [i % 3 == 0 for i in range(30)]
    found = MembershipInference().compute(scores=scores, members=members)["mia_auc"]
    assert found == pytest.approx(pairwise_auc(scores, members))
    assert MembershipInference().compute(scores=[1.0, 2.0, 3.0], members=[0, 1, 1])["mia_auc"] == 1
    assert MembershipInference().compute(scores=[1.0, 1.0], members=[0, 1])["mia_auc"] == 0.5


def test_area_in_both_directions():
    scores, members = [1.0, 2.0, 3.0, 4.0], [1, 0, 1, 0]
    found = MembershipInference().compute(scores=scores, members=members)
    turned = MembershipInference().compute(scores=[-score for score in scores], members=members)
    assert found == {"mia_auc": 0.25, "two_sided": 0.75} and turned == {"mia_auc": 0.75, "two_sided": 0.75}
    assert [two_sided(area) for area in (0.0, 0.5, 1.0)] == [1.0, 0.5, 1.0]


def test_scores_are_higher_for_members():
    tokens = [np.array([-3.0, -0.1, -1.0, -2.0, -0.2]), [-0.5]]
    assert min_k_score(tokens, k=0.4) == pytest.approx([-2.5, -0.5])
    assert min_k_score(tokens, k=1) == pytest.approx([np.mean(tokens[0]), -0.5])
    assert min_k_score(tokens) == pytest.approx([-3.0, -0.5])
    texts = ["a tale of two towns and a river", "ja " * 40]
    assert zlib_score([-1.0, -1.0], texts) == pytest.approx([-1 / len(zlib.compress(t.encode())) for t in texts])


def test_privacy_leakage_is_muses():
    members = [1, 1, 1, 1, 0, 0, 0, 0]
    fair = [1.0, 4.0, 5.0, 8.0, 2.0, 3.0, 6.0, 7.0]
    known = [5.0, 6.0, 7.0, 8.0, 1.0, 2.0, 3.0, 4.0]
    assert pairwise_auc(fair, members) == 0.5

    def leakage(scores, reference):
        return PrivacyLeakage().compute(scores=scores, reference_scores=reference, members=members)["privacy_leakage"]

    assert leakage(fair, fair) == 0
    assert leakage(known, fair) == pytest.approx(-100)  # nothing was forgotten
    assert leakage([-s for s in known], fair) == pytest.approx(100)  # forgotten so thoroughly that it shows
    other = [2.0, 3.0, 5.0, 8.0, 1.0, 4.0, 6.0, 7.0]
    ours, theirs = 1 - pairwise_auc(other, members), 1 - pairwise_auc(fair, members)
    assert leakage(other, fair) == pytest.approx(100 * (ours - theirs) / theirs)
    with pytest.raises(ValueError, match="differ by themselves"):
        leakage(fair, known)


# Degeneracy


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("Her first novel was The Salted Lantern, from 1998.", None),
        ("I have no information about that.", None),
        ("No.", None),
        ("1998", None),
        ("Москва", None),
        ("東京都", None),
        ("", "empty"),
        (" ... !?", "empty"),
        ("<|user|>", "empty"),
        ("She wrote <|user|> novels", "special"),
        ("the the the the", "repetition"),
        ("He was born in He was born in He was born in He was born in", "repetition"),
        ("東京東京東京東京", "repetition"),
        ("the the cat sat on the mat and went on to the other mat", None),
    ],
)
def test_degenerate_answers(text, failure):
    found = Degeneracy().compute(predictions=[text], special_tokens=["<|user|>", "<|mask|>"])
    assert found["degeneracy"] == (failure is not None)
    if failure:
        assert found[f"{failure}_rate"] == 1


def test_true_answers_are_not_degenerate(authors, tokenizer):
    answers = [*authors["answer"], *authors["refusal"], *authors["paraphrased_answer"]]
    found = Degeneracy().compute(predictions=answers, special_tokens=tokenizer.all_special_tokens)
    assert found == {"degeneracy": 0, "empty_rate": 0, "special_rate": 0, "repetition_rate": 0}


# What all share


GOOD = {
    ChoiceProbability: {"per_token": TRUE, "wrong_per_token": WRONG},
    Degeneracy: {"predictions": ["yes"] * 12},
    ExactMemorization: {"predictions": [[SECRET]] * 12, "references": [[SECRET]] * 12},
    ExtractionStrength: {"prefix_tokens": [1] * 12, "num_tokens": [2] * 12},
    ForgetQuality: {"predictions": TRUE, "references": TRUE},
    MembershipInference: {"scores": TRUE, "members": [0, 1] * 6},
    ModelUtility: {"figures": [0.5] * 12},
    PrivacyLeakage: {"scores": TRUE, "reference_scores": TRUE, "members": [0, 1] * 6},
    Probability: {"per_token": TRUE},
    TrueRank: {"per_token": TRUE, "wrong_per_token": WRONG},
    TruthRatio: {"per_token": TRUE, "wrong_per_token": WRONG},
}


@pytest.mark.parametrize("metric", ALL)
def test_metrics_say_what_they_are_and_take_rows_in_batches(metric):
    one = metric()
    assert one.citation and one.description and "Args:" in one.inputs_description and "Returns:" in one.compute.__doc__
    columns = GOOD[metric]
    at_once = one.compute(**columns)
    one.add_batch(**{name: column[:5] for name, column in columns.items()})
    for row in range(5, 12):
        one.add(**{name.removesuffix("s") if name in ("predictions", "references") else name: column[row]
                   for name, column in columns.items()})  # fmt: skip
    assert one.compute() == at_once
    assert metric().compute(**{name: np.array(c) for name, c in columns.items()}) == at_once


@pytest.mark.parametrize("metric", ALL)
def test_bad_columns_are_refused_and_not_quoted(metric):
    good = GOOD[metric]
    first, *others = good
    for bad in (None, SECRET, [object()] * 12, [str(SECRET) * 2, None], []):
        broken = good | {first: bad}
        if first == "predictions" and metric is Degeneracy and isinstance(bad, list) and bad and bad[1:] == [None]:
            broken = {first: [str(SECRET), None]}
        with pytest.raises(ValueError) as error:
            metric().compute(**broken)
        assert first in str(error.value) and str(SECRET) not in str(error.value)
    for other in others:
        with pytest.raises(ValueError, match=f"12 {first} and|11 {other}"):
            metric().compute(**good | {other: good[other][:11]})


@pytest.mark.parametrize(
    ("metric", "columns", "message"),
    [
        (Probability, {"per_token": [-1.0, math.nan]}, "per_token must be finite numbers, but row 1 is nan"),
        (Probability, {"per_token": [-1.0], "predictions": ["a"]}, "predictions"),
        (TruthRatio, {"per_token": [-1.0], "wrong_per_token": [[]]}, "row 0 is list of length 0"),
        (TruthRatio, {"per_token": [-1.0], "wrong_per_token": [[math.inf]]}, "row 0 is list of length 1"),
        (TrueRank, {"per_token": [-1.0], "wrong_per_token": [[]]}, "row 0 is list of length 0"),
        (TruthRatio, {"per_token": [-1.0], "wrong_per_token": [[-1.0]], "variant": "other"}, "variant must be one of"),
        (TruthRatio, {"per_token": [-1.0], "wrong_per_token": [[-1.0]], "aggregation": 1}, "aggregation must be one"),
        (MembershipInference, {"scores": [1.0, 2.0], "members": [1, 1]}, "all 2 rows are of one kind"),
        (MembershipInference, {"scores": [1.0, 2.0], "members": [1, 2]}, "members must be 0 or 1, but row 1 is 2"),
        (ExactMemorization, {"predictions": [[1], [2]], "references": [[1], []]}, "reference of row 1 has no tokens"),
    ],
)
def test_bad_values_are_named_by_row(metric, columns, message):
    with pytest.raises(ValueError, match=message):
        metric().compute(**columns)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: min_k_score([[-1.0], []]), "Row 1 has no tokens"),
        (lambda: min_k_score([[-1.0]], k=0), "k must be above 0 and at most 1, got 0"),
        (lambda: zlib_score([-1.0], []), "1 likelihoods and 0 texts"),
        (lambda: bootstrap_interval([]), "at least one"),
        (lambda: bootstrap_interval([1.0, math.nan]), "finite"),
        (lambda: bootstrap_interval([1.0, 2.0], "mode"), "mean, median, hmean or a function, got 'mode'"),
        (lambda: bootstrap_interval([1.0, 2.0], confidence=1.0), "confidence must be above 0 and below 1"),
    ],
)
def test_bad_arguments_of_functions(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Intervals


def test_interval_of_a_mean_agrees_with_the_normal_one():
    values = RNG.normal(3, 2, 400)
    low, high = bootstrap_interval(values, num_resamples=8000)
    expected = stats.norm.interval(0.95, values.mean(), stats.sem(values))
    assert (low, high) == pytest.approx(expected, abs=0.03)
    narrow = bootstrap_interval(values, confidence=0.5, num_resamples=8000)
    assert narrow == pytest.approx(stats.norm.interval(0.5, values.mean(), stats.sem(values)), abs=0.03)


@pytest.mark.parametrize("statistic", ["mean", "median", "hmean", np.max])
def test_interval_equals_percentiles_of_resampled_rows(statistic):
    values = RNG.uniform(0.1, 1, 25)
    function = {"mean": np.mean, "median": np.median, "hmean": stats.hmean}.get(statistic, statistic)
    resampled = np.random.default_rng(5).choice(values, (20_000, 25))
    expected = np.quantile(function(resampled, axis=1), [0.025, 0.975])
    assert bootstrap_interval(values, statistic, num_resamples=20_000) == pytest.approx(expected, abs=0.02)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_interval(rng.binomial(1, 0.3, 100).astype(float), seed=seed, num_resamples=500)
        covered += low <= 0.3 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_interval_of_equal_rows_and_of_one():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)
        assert bootstrap_interval([0.0] * 7, "hmean") == (0, 0)
        assert bootstrap_interval([0.3]) == (None, None)
    assert bootstrap_interval([0.1, 0.9, 0.4], seed=1) == bootstrap_interval([0.1, 0.9, 0.4], seed=1)
