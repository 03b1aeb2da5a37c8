"""The scores of membership against independent computations, and what a never-trained model adds to them."""

import math
import zlib
from dataclasses import replace
from statistics import harmonic_mean, mean

import pytest
import torch
from stand_in import make_settings

from mdu_trainer import DiffusionGenerationConfig
from mdu_trainer.attacks import ATTACKS, AttackScores, Target, choose_attacks
from mdu_trainer.attacks.membership import OF_PRIVACY, beside_never_trained, gradient_norms
from mdu_trainer.attacks.results import BASE, NEVER
from mdu_trainer.attacks.run import run_attacks
from mdu_trainer.inference.likelihood import response_likelihood
from mdu_trainer.testing import unseen_answers

SCORES = ["loss", "zlib", "min-k", "min-k++", "multi-mask", "gradient"]


@pytest.fixture
def target(tokenizer, rows, unrelated):
    """`target(model)`: two rows before a model, and six that nobody was trained on."""

    def of(model, **changes) -> Target:
        settings = make_settings(unrelated, rows, **changes)
        return Target(model.eval(), tokenizer, rows.select([0, 1]), settings)

    return of


def area(inside, outside) -> float:
    """Pair by pair."""
    return mean((one > other) + (one == other) / 2 for one in inside for other in outside)


def likelihoods(target) -> tuple[list[float], list[float]]:
    unseen = target.settings.unseen
    sets = target.questions, target.encode(unseen["question"], unseen)
    found = [
        response_likelihood(
            target.model,
            [one.prompt for one in questions],
            [one.answers["answer"][0] for one in questions],
            target.backbone,
            num_draws=target.settings.num_draws,
            seed=0,
        ).per_token.tolist()
        for questions in sets
    ]
    return found[0], found[1]


def test_zlib_and_gradient_are_among_the_areas(make_model, target, rows):
    asked = target(make_model(initializer_range=0.2), unseen=unseen_answers(rows, 3).select(range(5)))
    found, unseen = ATTACKS["membership"].run(asked, 0), asked.settings.unseen
    assert list(found.path) == [*SCORES, "two_sided"]
    log_p = likelihoods(asked)
    packed = [
        [value / len(zlib.compress(text.encode())) for value, text in zip(values, texts, strict=True)]
        for values, texts in zip(log_p, (asked.rows["answer"], unseen["answer"]), strict=True)
    ]
    assert found.path["zlib"] == pytest.approx(area(*packed))
    assert [len(values) for values in found.log_p] == [2, len(unseen)]
    assert found.log_p[1] == pytest.approx(log_p[1], abs=1e-4)
    norms = [
        gradient_norms(asked, questions, 0)
        for questions in (asked.questions, asked.encode(unseen["question"], unseen))
    ]
    assert found.path["gradient"] == pytest.approx(area(norms[1], norms[0])), "small for what was trained on"
    assert found.path["gradient"] == pytest.approx(mean(found.after)) or found.reached_by != "gradient"


def test_small_gradients_tell_where_likelihoods_do_not(make_model, target, monkeypatch):
    asked = target(make_model())
    norms = iter([[1.0, 2.0], [3.0] * len(asked.settings.unseen)])
    monkeypatch.setattr("mdu_trainer.attacks.membership.gradient_norms", lambda *_: next(norms))
    found = ATTACKS["membership"].run(asked, 0)
    assert found.path["gradient"] == 1 and found.reached_by == "gradient" and found.after == [1, 1]


def test_gradients_do_not_depend_on_the_batch_size(make_model, target):
    model = make_model(initializer_range=0.2).double()
    decodings = [DiffusionGenerationConfig(max_new_tokens=24, batch_size=size) for size in (1, 8)]
    one, eight = (
        gradient_norms(asked, asked.questions, 3) for asked in (target(model, decoding=d) for d in decodings)
    )
    assert one == pytest.approx(eight, rel=1e-9) and one[0] != one[1]
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens are as likely, whatever the layers say
    asked = target(model)
    flat = gradient_norms(asked, asked.questions, 3)
    assert all(0 < norm < other for norm, other in zip(flat, one, strict=True))


def scores(areas: float, log_p: list[list[float]]) -> AttackScores:
    return AttackScores([0, 1], [0.5, 0.5], [areas, areas], dict.fromkeys(SCORES, areas), "", log_p)


def test_what_a_never_trained_model_adds():
    never = scores(0.4, [[-3.0, -2.0], [-3.0, -2.0, -1.0]])
    leaky = scores(0.7, [[-2.0, -1.5], [-3.0, -1.9, -1.0]])  # above the other by 1 and .5; 0, .1 and 0
    gone = scores(0.1, [[-9.0, -2.0], [-3.0, -2.0, -1.0]])  # below it by 6, and no different in anything else
    found = beside_never_trained({BASE: leaky, NEVER: never, "unlearned": gone})
    assert list(found) == [BASE, NEVER, "unlearned"] and found[NEVER] is never
    assert found[BASE].path["reference"] == 1
    assert found["unlearned"].path["reference"] == 1 - (0 * 3 + 0.5 * 3) / 6
    assert found[BASE].path["privacy"] == pytest.approx(harmonic_mean([1 - 0.3 / 0.6] * len(OF_PRIVACY)))
    assert found["unlearned"].path["privacy"] == pytest.approx(0.5), "as far below the other as it can be, but .1"
    uneven = replace(leaky, path=leaky.path | {"zlib": 0.4, "multi-mask": 0.0, "gradient": 0.0})
    found = beside_never_trained({BASE: uneven, NEVER: never})
    assert found[BASE].path["privacy"] == pytest.approx(harmonic_mean([0.5, 1, 0.5, 0.5])), "of OpenUnlearning's four"
    assert list(leaky.path) == SCORES, "what was measured is left alone"


def test_nothing_is_added_to_other_attacks_or_without_such_a_model():
    other = AttackScores([0], [0.5], [0.5])
    assert beside_never_trained({BASE: other, NEVER: other}) == {BASE: other, NEVER: other}
    leaky = scores(0.7, [[-2.0], [-3.0]])
    assert beside_never_trained({BASE: leaky, "unlearned": leaky}) == {BASE: leaky, "unlearned": leaky}


@pytest.fixture
def attack(make_model, tokenizer, rows, unrelated, tmp_path):
    decoding = DiffusionGenerationConfig(max_new_tokens=24, steps=1)
    settings = make_settings(unrelated, rows, decoding=decoding, unseen=unseen_answers(rows, 3).select(range(3)))

    def run():
        models = [make_model(num_layers=1, initializer_range=0.2, seed=seed) for seed in (0, 1, 2)]
        loaders = [lambda model=model: (model.eval(), tokenizer) for model in models]
        chosen, path = choose_attacks(["membership"], settings), tmp_path / "attacks.jsonl"
        asked = rows.select([0, 1]), settings, chosen
        return run_attacks({"mdu": loaders[2]}, *loaders[:2], *asked, progress_path=path)

    return run


def test_a_reference_and_the_privacy_score_stand_below_the_table(attack):
    recovery = attack()
    path = recovery.attacks["membership"].models["mdu"].path
    assert list(path) == [*SCORES, "two_sided", "reference", "privacy"]
    assert "privacy" not in recovery.attacks["membership"].models[NEVER].path
    assert path["privacy"] < 1 and not math.isnan(path["reference"])
    text = recovery.text()
    assert f"mdu {path['reference']:.3f}. Privacy score, by likelihoods (1: they tell no more than" in text
    assert f"mdu {path['privacy']:.3f}.\n" in text
    assert attack() == recovery, "from the file of progress"
