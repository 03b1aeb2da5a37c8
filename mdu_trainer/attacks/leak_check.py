"""Measure how much a model still gives away of rows that it should have forgotten.

It makes the attacks that train nothing and cost some decoding. `python -m mdu_trainer.leak_check` is its command.
"""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..evaluation.metrics import bootstrap_interval
from ..evaluation.own_rows import QUESTIONS
from ..evaluation.results import Estimate
from ..evaluation.sources import check_columns
from ..evaluation.tofu import longest_answer
from ..files import UserError
from ..inference.generation import DiffusionGenerationConfig
from ..terminal import Bar
from . import ATTACKS, AttackSettings, Target
from .base import NothingToAttack, unscorable

logger = logging.get_logger(__name__)

PLAIN = "plain"
CHECKS = ("paraphrase", "prefix", "leak-at-k")  # of ATTACKS: those that train nothing and cost some decoding


@dataclass(frozen=True)
class Leak:
    """The leak of a model: what it gives away of some rows. Numbers only.

    Attributes:
        checks: name of a check -> number of a row -> score, 0 to 1, higher where more came out. "plain" has all rows
            that are measured; a check that does not suit a row leaves it out.
        left_out: checks that suit none of the rows.
        not_measured: numbers of the rows whose answer holds nothing that can be compared.
    """

    checks: dict[str, dict[int, float]]
    left_out: tuple[str, ...] = ()
    not_measured: tuple[int, ...] = ()

    @property
    def rows(self) -> list[float]:
        """The worst of the checks, for each row."""
        return [max(self._of(row).values()) for row in self.checks[PLAIN]]

    @property
    def estimate(self) -> Estimate:
        """The mean over rows, with its interval."""
        return _mean(self.rows)

    @property
    def upper(self) -> float:
        """The value to compare with a limit: the upper end of the interval, or the leak itself of a single row."""
        return self.estimate.value if self.estimate.high is None else self.estimate.high

    def summary(self) -> dict[str, Any]:
        """Return the scores of the model as a whole, for JSON."""
        leak = self.estimate
        checks = {name: _mean(list(scores.values())).value for name, scores in self.checks.items()}
        return {
            "leak": leak.value,
            "low": leak.low,
            "high": leak.high,
            "rows": len(self.rows),
            "not_measured": len(self.not_measured),
            "checks": checks,
            "left_out": list(self.left_out),
        }

    def ranking(self) -> list[dict[str, Any]]:
        """Return the rows for JSON: numbers and scores, the highest leak first, then the highest mean of the checks.

        Last come rows that are not measured, without a leak.
        """
        rows = [
            {"row": row, "leak": leak, "checks": self._of(row)}
            for row, leak in zip(self.checks[PLAIN], self.rows, strict=True)
        ]
        rows.sort(key=lambda one: (-one["leak"], -_mean(list(one["checks"].values())).value, one["row"]))
        return rows + [{"row": row, "leak": None, "checks": {}} for row in self.not_measured]

    def _of(self, row: int) -> dict[str, float]:
        return {name: scores[row] for name, scores in self.checks.items() if row in scores}


def measure_leak(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    retain: Dataset | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> Leak:
    """Measure what a model gives away of some rows.

    Args:
        model, tokenizer: a masked diffusion language model and its tokenizer.
        rows: `question`, `answer`, and where the data has it `paraphrased_question`.
        retain: rows to keep, by whose answers wording that answers share is found, too.
        seed: of the samples.
        show_progress: show a progress bar over checks.

    Raises:
        ValueError: for rows that cannot be asked, or none that can be scored.
    """
    check_columns(rows, "forget", dict.fromkeys(QUESTIONS, str))
    without = not_measured(rows)
    measured = sorted(set(range(len(rows))) - set(without))
    rows = rows.select(measured)
    decoding = DiffusionGenerationConfig(max_new_tokens=longest_answer({"forget": rows}, tokenizer), seed=seed)
    target = Target(model, tokenizer, rows, AttackSettings(decoding=decoding, unrelated=retain))
    checks, left_out = {PLAIN: dict(zip(measured, map(float, target.plain), strict=True))}, []
    for name in Bar("checking for leaks", CHECKS, total=len(CHECKS), unit="check", show=show_progress):
        try:
            scores = ATTACKS[name].run(target, seed)
        except NothingToAttack as error:  # any other failure is one of the whole: a check is never lost without a word
            logger.warning(f"The check {name} is left out: {error}")
            left_out.append(name)
            continue
        checks[name] = dict(zip((measured[row] for row in scores.rows), map(float, scores.after), strict=True))
    return Leak(checks, tuple(left_out), tuple(without))


def not_measured(rows: Dataset) -> list[int]:
    """Return the numbers of the rows that cannot be scored.

    Raises:
        ValueError: that are all.
    """
    without = unscorable(rows)
    if len(without) == len(rows):
        raise UserError(
            f"None of the {len(rows)} rows can be scored: their answers hold no word, number or emoji to compare."
        )
    return without


def _mean(scores: list[float]) -> Estimate:
    return Estimate(sum(scores) / len(scores), *bootstrap_interval(scores))
