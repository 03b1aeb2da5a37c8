"""Rows to attack, and an attack on a stand-in."""

from collections.abc import Callable

import pytest
from datasets import Dataset
from stand_in import StandIn, make_settings

from mdu_trainer.attacks import ATTACKS, Target
from mdu_trainer.testing import forget_retain_split


@pytest.fixture(scope="session")
def rows(authors: Dataset) -> Dataset:
    """Six rows of one forgotten author."""
    return forget_retain_split(authors)[0].select(range(6)).select_columns(["question", "answer", "author"])


@pytest.fixture(scope="session")
def unrelated(authors: Dataset) -> Dataset:
    """Rows of the others: so many that the wording they share is known."""
    return forget_retain_split(authors)[1].select_columns(["question", "answer"])


@pytest.fixture
def attack(tokenizer, rows, unrelated, make_model):
    """`attack(name, knows, **settings)`: the mean score before and after, of a stand-in that knows where it says."""

    def run(name: str, knows: Callable, seed: int = 0, model=None, **settings):
        target = Target(model or stand_in(knows), tokenizer, rows, make_settings(unrelated, rows, **settings))
        scores = ATTACKS[name].run(target, seed)
        assert len(scores.rows) == len(scores.before) == len(scores.after) > 0
        assert scores.rows == sorted(scores.rows)
        return sum(scores.before) / len(scores.rows), sum(scores.after) / len(scores.rows)

    def stand_in(knows: Callable) -> StandIn:
        model = make_model()
        model.__class__ = StandIn
        known = Dataset.from_dict({key: [*rows[key], *unrelated[key][:4]] for key in ("question", "answer")})
        return model.prepare(tokenizer, known, knows)

    run.stand_in = stand_in
    return run
