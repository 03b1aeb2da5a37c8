"""Figures of `lasting.py`: what is measured of a model that was made to forget, and the table of all of them."""

import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from lasting_methods import METHODS, Job
from lasting_models import Split, load
from torch import nn

from mdu_trainer import evaluate_tofu
from mdu_trainer.attacks import ATTACKS, Attack, AttackSettings, choose_attacks
from mdu_trainer.attacks.registry import ADAPTER
from mdu_trainer.attacks.results import BASE, NEVER, TWO_SIDED, Recovery
from mdu_trainer.attacks.run import run_attacks
from mdu_trainer.evaluation.results import Estimate, markdown_table
from mdu_trainer.evaluation.sources import spread
from mdu_trainer.evaluation.tofu import TofuResult, TruthRatios
from mdu_trainer.files import Record
from mdu_trainer.models import weights_fingerprint

RELEARNING_RATE = 1e-3  # the middle of a decade
MEMBERSHIP = "membership"
KEPT = 0.98  # retain rL that a learning rate must leave
FORWARD_ONLY = 1 / 3  # of a row pass: a backward pass costs two forward ones
UNLEARNED = "unlearned"
SCORES = {
    "forget rL": ("forget", "rougeL_recall"),
    "retain rL": ("retain", "rougeL_recall"),
    "forget prob.": ("forget", "probability"),
    "retain prob.": ("retain", "probability"),
    "KS p": (None, "forget_quality"),
}


@dataclass(frozen=True)
class Ends(Record):
    """Scores of the two models that all others lie between, and what forget quality compares with.

    Attributes:
        base, never: name of a score -> value.
        truth_ratios: of the model that never saw the rows to forget.
    """

    kind: ClassVar[str] = "file of scores"
    remedy: ClassVar[str] = "delete it and run again"

    base: dict[str, float]
    never: dict[str, float]
    truth_ratios: TruthRatios


@dataclass(frozen=True)
class Cell(Record):
    """The figures of one run of a method. Numbers and names only.

    Attributes:
        method, learning_rate, seed: of the run.
        scores: name of a score -> value.
        recoveries: attack -> recovery, where the base and the never-trained model can be told apart under it.
        membership: "base", "never trained" or "unlearned" -> areas under the curve, "one-sided" and "two-sided".
        row_passes: rows that went forwards and backwards through the model; a row that went forwards alone is a third.
        of_base, of_retraining: the share of the row passes of the base's fine-tuning, and of one on the rows to keep.
    """

    kind: ClassVar[str] = "file of figures"
    remedy: ClassVar[str] = "delete it and run again"

    method: str
    learning_rate: float
    seed: int
    scores: dict[str, float]
    recoveries: dict[str, Estimate]
    membership: dict[str, dict[str, float]]
    row_passes: float
    of_base: float
    of_retraining: float

    @cached_property
    def worst(self) -> tuple[str, Estimate]:
        """The attack that recovers most, and how much. Membership is not among them: it brings nothing back."""
        return max(self.recoveries.items(), key=lambda item: item[1].value, default=("", Estimate(math.nan)))

    @property
    def relearned(self) -> float:
        """The most that comes back by relearning, over all rates."""
        return max((r.value for name, r in self.recoveries.items() if name.startswith("relearn")), default=math.nan)

    @property
    def upper_end(self) -> float:
        """The highest upper end of an interval of a recovery."""
        return max((r.high for r in self.recoveries.values() if r.high is not None), default=math.nan)

    def figures(self) -> dict[str, float]:
        """Return the columns of the table that are numbers."""
        return self.scores | {
            "recovery": self.worst[1].value,
            "upper end": self.upper_end,
            "relearned": self.relearned,
            **{name: area for name, area in self.membership.get(UNLEARNED, {}).items()},
            "cost / base": self.of_base,
            "cost / retraining": self.of_retraining,
        }

    def line(self) -> str:
        """Return the run in one line."""
        scores = f"forget rL {self.scores['forget rL']:.2f}, retain rL {self.scores['retain rL']:.2f}"
        worst = f"recovery {self.worst[1].value:.2f} {self.worst[0]}".rstrip()
        return f"{self.method} lr {self.learning_rate:g} seed {self.seed}: {scores}, {worst}"


class Measurer:
    """Measures methods on one split, whose models are made first.

    Args:
        split: the rows, and the folder where all that is finished is kept.
    """

    def __init__(self, split: Split):
        split.make_models()
        self.split = split
        self.settings = AttackSettings(
            decoding=split.decoding,
            unseen=split.unseen,
            unrelated=split.retain,
            relearn_learning_rate=RELEARNING_RATE,
            **split.scale.attacking,
        )
        retain = spread(split.retain, min(split.scale.scored, len(split.retain)))
        self.sets = {"forget": split.forget, "retain": retain.select_columns(["question", "answer"])}

    def cell(self, method: str, learning_rate: float, seed: int) -> Cell:
        """Return the figures of a run, and say so in a line if it was not finished before."""
        path = self.split.folder / "runs" / f"{method}-lr{learning_rate:g}-seed{seed}.json"
        if path.is_file():
            return Cell.load(path)
        start = time.perf_counter()
        model, tokenizer = load(self.split.base)
        with tempfile.TemporaryDirectory() as folder, counted(model) as passes:
            rows = (self.split.forget, self.split.retain)
            where = (str(self.split.first), folder)
            scale = self.split.scale
            METHODS[method](Job(model, tokenizer, *rows, *where, learning_rate, seed, scale.updates, scale.lora))
        model.eval()
        trained, total = time.perf_counter() - start, passes["trained"] + FORWARD_ONLY * passes["run"]
        scores = named_scores(self._score(model, tokenizer, self.ends.truth_ratios))
        name = f"{method} {learning_rate:g} {seed} {weights_fingerprint(model)[:8]}"  # a repetition may differ
        recovery = self._attack(name, model, tokenizer)
        shares = (total / self.split.base_passes, total / self.split.retraining_passes)
        cell = Cell(method, learning_rate, seed, scores, *attacked(recovery, name), total, *shares)
        cell.save(path)
        seconds = time.perf_counter() - start
        print(f"{self.split.folder.name} {cell.line()}; {trained:.0f} + {seconds - trained:.0f} s", flush=True)
        return cell

    @cached_property
    def ends(self) -> Ends:
        """The scores of the base and of the never-trained model."""
        path = self.split.folder / "ends.json"
        if not path.is_file():
            never = self._score(*load(self.split.never), None)
            assert never.truth_ratios is not None
            base = self._score(*load(self.split.base), never.truth_ratios)
            Ends(named_scores(base), named_scores(never) | {"KS p": 1.0}, never.truth_ratios).save(path)
        return Ends.load(path)

    def _score(self, model: Any, tokenizer: Any, never: TruthRatios | None) -> TofuResult:
        metrics = ("rougeL", "probability", "truth_ratio")
        draws = self.settings.num_draws
        return evaluate_tofu(
            model, tokenizer, self.sets, self.split.decoding, metrics=metrics, retain_log=never, num_draws=draws
        )

    def _attack(self, name: str, model: Any, tokenizer: Any) -> Recovery:
        return run_attacks(
            {name: lambda: (model, tokenizer)},
            partial(load, self.split.base),
            partial(load, self.split.never),
            self.split.forget,
            self.settings,
            all_attacks(self.settings, self.split.scale.attacks),
            dataset=self.split.name,
            progress_path=self.split.folder / "attacks.jsonl",  # the base and the never-trained are attacked once
            left_out=lambda attack, error: None,
        )


def all_attacks(settings: AttackSettings, names: Sequence[str] | None) -> dict[str, Attack]:
    """The attacks of these names, all if None, on models without adapters."""
    return choose_attacks([name for name in names or ATTACKS if ADAPTER not in ATTACKS[name].needs], settings)


def named_scores(result: TofuResult) -> dict[str, float]:
    """The scores of the table."""
    found = {name: result.run.figure(*place) for name, place in SCORES.items()}
    return {name: estimate.value for name, estimate in found.items() if estimate is not None}


def attacked(recovery: Recovery, name: str) -> tuple[dict[str, Estimate], dict[str, dict[str, float]]]:
    """The recoveries of a model, and the areas under the curve of membership of all three."""
    recoveries = {
        attack: found
        for attack, outcome in recovery.attacks.items()
        if attack != MEMBERSHIP and (found := outcome.models[name].recovery) is not None
    }
    areas = {}
    for model, outcome in recovery.attacks[MEMBERSHIP].models.items():
        found = {"one-sided": outcome.after.value, "two-sided": outcome.path[TWO_SIDED]}
        areas[UNLEARNED if model == name else model] = found
    return recoveries, areas


@contextmanager
def counted(model: nn.Module) -> Iterator[dict[str, int]]:
    """Count the rows that a model and copies made of it are run on: "trained" with a gradient, "run" without."""
    passes = {"trained": 0, "run": 0}

    def count(module: nn.Module, args: tuple) -> None:
        passes["trained" if torch.is_grad_enabled() else "run"] += len(args[0])

    # of the embeddings, for an adapter's wrapper calls no hook of the model; a function: a copy's hook counts here too
    hook = model.get_input_embeddings().register_forward_pre_hook(count)
    try:
        yield passes
    finally:
        hook.remove()


def best_rate(cells: Sequence[Cell]) -> float:
    """The learning rate of the lowest worst-case recovery among those that keep the retain rL at `KEPT`.

    If none does, that which keeps most.
    """
    keeping = [cell for cell in cells if cell.scores["retain rL"] >= KEPT]
    if not keeping:
        return max(cells, key=lambda cell: cell.scores["retain rL"]).learning_rate
    return min(keeping, key=lambda cell: (cell.worst[1].value, cell.learning_rate)).learning_rate


def table(ends: Ends, cells: dict[str, list[Cell]]) -> str:
    """The figures of one scale as a Markdown table, with the base and the never-trained model: method -> runs."""
    columns = list(next(iter(cells.values()))[0].figures())
    membership = next(iter(cells.values()))[0].membership
    rows = [["method", "lr", *columns, "worst attack"]]
    for model, scores in ((BASE, ends.base), (NEVER, ends.never)):
        figures = scores | membership.get(model, {})
        rows.append([model, "", *(f"{figures[name]:.3f}" if name in figures else "" for name in columns), ""])
    for method, runs in cells.items():
        values = [run.figures() for run in runs]
        attack = Counter(run.worst[0] for run in runs).most_common(1)[0][0]
        cells_of = [spread_of([one.get(name, math.nan) for one in values]) for name in columns]
        rows.append([method, f"{runs[0].learning_rate:g}", *cells_of, attack])
    return markdown_table(rows)


def spread_of(values: Sequence[float]) -> str:
    """The mean, with the lowest and the highest value of several; empty if any is unknown."""
    if any(math.isnan(value) for value in values):
        return ""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f}-{max(values):.2f})"
