"""Words on attacks: by which way most came back, and how far the weights are from the base."""

from dataclasses import replace
from pathlib import Path

import pytest

from mdu_trainer.attacks.results import AttackOutcome, Outcome, Recovery, WeightPath
from mdu_trainer.evaluation.results import Estimate
from mdu_trainer.provenance.facts import Facts
from mdu_trainer.report.attack_words import attack_words

DEMO = Path(__file__).resolve().parents[1] / "demo_card"
MODELS = ("base", "never trained", "mdu tau=0")


@pytest.fixture
def recovery() -> Recovery:
    """Two attacks, of which the second tried several ways."""

    def outcome(value: float, way: str = "") -> AttackOutcome:
        found = {
            name: Outcome(Estimate(0.0), Estimate(one)) for name, one in zip(MODELS, (1.0, 0.0, 0.0), strict=True)
        }
        recovered = Estimate(value, value - 0.1, value + 0.1)
        found["mdu tau=0"] = Outcome(Estimate(0.0), Estimate(value), recovered, reached_by=way)
        return AttackOutcome("what it does", 16, found)

    return Recovery("rows", {}, {"prefix": outcome(0.1), "relearn-related": outcome(0.4, "lr 0.001")})


def test_the_way_that_brought_back_most_is_named(recovery):
    assert recovery.way_cells() == [["attack", "mdu tau=0"], ["relearn-related", "lr 0.001"]]
    assert "the one that brought back most:\n\n| attack" in recovery.text() and "| lr 0.001" in recovery.text()
    facts = Facts.load(DEMO)
    assert (
        "the strongest here, relearn-related (lr 0.001), reached 0.4"
        in attack_words(recovery, facts)["attack_sentence"]
    )
    alone = replace(recovery, attacks={"prefix": recovery.attacks["prefix"]})
    assert "brought back most" not in alone.text()
    assert "the strongest here, prefix, reached" in attack_words(alone, facts)["attack_sentence"]


def test_distance_and_barrier_are_in_the_table_and_on_the_card(recovery, tmp_path):
    assert "barrier" not in recovery.text()
    path = WeightPath(0.0625, {"0": 4.0, "0.5": 3.5, "1": 2.0})
    measured = replace(recovery, weights={"never trained": path, "mdu tau=0": path})
    header, *rows = measured.weight_cells()
    assert header == ["weights", "distance", "loss at 0", "loss at 0.5", "loss at 1", "barrier"]
    assert rows[1] == ["mdu tau=0", "0.062", "4.00", "3.50", "2.00", "0.50"]
    assert "arXiv 2505.22310" in measured.text()
    sentence = attack_words(measured, Facts.load(DEMO))["attack_sentence"]
    assert (
        "0.062 of the base's norm" in sentence and "4.00, 3.50, 2.00 nats a token, with a barrier of 0.50" in sentence
    )
    measured.save(tmp_path / "recovery.json")
    assert Recovery.load(tmp_path / "recovery.json") == measured
