"""Rows to forget and rows to keep, for all tests of token roles."""

import pytest

from mdu_trainer.testing import forget_retain_split


@pytest.fixture(scope="module")
def sets(authors):
    forget, retain = (part.select_columns(["question", "answer"]) for part in forget_retain_split(authors))
    return forget.select(range(5)), retain
