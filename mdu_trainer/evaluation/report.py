"""The outcome of a comparison: one typed record, a table to read, a JSON file to keep."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class Score:
    """How well a model still answers the questions of one set.

    Attributes:
        rougeL_recall, rougeL_f1: means over rows, in [0, 1].
        probability: mean over rows of p(answer | question)^(1 / tokens), in [0, 1].
        n: rows.
    """

    rougeL_recall: float
    rougeL_f1: float
    probability: float
    n: int


@dataclass(frozen=True)
class Run:
    """One model of a comparison: the base, or what a method made of it.

    Attributes:
        method: "base" or the method's name.
        tau: of MDU, None for other methods.
        forget, retain: scores.
        train_seconds, eval_seconds: wall-clock time.
    """

    method: str
    tau: float | None
    forget: Score
    retain: Score
    train_seconds: float
    eval_seconds: float

    @property
    def name(self) -> str:
        """What tables and pictures call the run."""
        return self.method if self.tau is None else f"{self.method} tau={self.tau:g}"


@dataclass
class Results:
    """A comparison of unlearning methods on one model and data set.

    Attributes:
        model, dataset: what was unlearned from what.
        settings: everything that was set.
        runs: "base" first.
    """

    model: str
    dataset: str
    settings: dict[str, Any]
    runs: list[Run] = field(default_factory=list)

    def save(self, path: str | Path) -> None:
        """Write JSON, whole or not at all."""
        path = Path(path)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"schema": SCHEMA} | asdict(self), indent=2) + "\n")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> "Results":
        """Read what `save` wrote.

        Raises:
            ValueError: for a file of another schema.
        """
        content = json.loads(Path(path).read_text())
        schema = content.pop("schema", None)
        if schema != SCHEMA:
            raise ValueError(f"{path} has schema {schema}, this version reads {SCHEMA}.")
        scores = ("forget", "retain")
        runs = [Run(**(run | {name: Score(**run[name]) for name in scores})) for run in content.pop("runs")]
        return cls(**content, runs=runs)

    def table(self) -> str:
        """The runs as a Markdown table."""
        rows = [
            ["method", "forget rL", "retain rL", "forget F1", "retain F1", "forget prob.", "retain prob.", "train s"]
        ]
        for run in self.runs:
            pairs = [(getattr(run.forget, key), getattr(run.retain, key)) for key in METRICS]
            figures = [f"{value:.3f}" for pair in pairs for value in pair]
            rows.append([run.name, *figures, f"{run.train_seconds:.0f}"])
        return _markdown(rows)


METRICS = ("rougeL_recall", "rougeL_f1", "probability")


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    align = [str.ljust] + [str.rjust] * (len(widths) - 1)
    lines = [
        "| " + " | ".join(a(cell, w) for a, cell, w in zip(align, row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
