"""The record of metrics along the denoising path: means over rows with intervals, never texts.

scores = PathScores.load("along_path.json")  # of `along_path.score_along_path`, or of examples/score.py
print(scores.details())
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..evaluation.results import Estimate, markdown_table
from ..files import Record

ALONG_PATH = "along_path.json"
FIXED = "at fixing"  # what tables call the last row
WHOLE = "model"  # what stands for a set where a score is of the model as a whole


@dataclass(frozen=True)
class PathCurve:
    """A score along the path.

    Attributes:
        steps: at moment s of S, when a share s/S of the answer is revealed, s = 0 ... S - 1; None where it is not
            measured.
        fixed: of tokens at the moments at which each is fixed.
    """

    steps: list[Estimate | None]
    fixed: Estimate | None


@dataclass(frozen=True)
class PathRun:
    """One model.

    Attributes:
        name: what tables and pictures call it.
        rows: name of a set -> rows scored.
        scores: name of a set -> name of a score -> along the path.
        summary: scores of the model as a whole (`model_utility`).
    """

    name: str
    rows: dict[str, int]
    scores: dict[str, dict[str, PathCurve]]
    summary: dict[str, PathCurve] = field(default_factory=dict)

    def parts(self) -> dict[str, dict[str, PathCurve]]:
        """Return the scores of each set, and under `WHOLE` those of the model as a whole if there are any."""
        return self.scores | ({WHOLE: self.summary} if self.summary else {})


@dataclass(frozen=True)
class PathScores(Record):
    """Metrics of one or more models along the denoising path. Numbers only.

    Attributes:
        dataset: what the rows are called.
        num_steps: S, moments of each path.
        settings: how it was measured.
        runs: a model each.
    """

    kind: ClassVar[str] = "record of scores along the path"
    remedy: ClassVar[str] = "score the model again"

    dataset: str
    num_steps: int
    settings: dict[str, Any]
    runs: list[PathRun]

    def check(self) -> None:
        """Refuse a record without models, with two of one name, or with curves of another length."""
        if not self.runs or len({run.name for run in self.runs}) < len(self.runs):
            raise ValueError("it holds no models, or two of one name")
        curves = [curve for run in self.runs for of_set in run.parts().values() for curve in of_set.values()]
        if self.num_steps < 1 or any(len(curve.steps) != self.num_steps for curve in curves):
            raise ValueError(f"it has curves of another length than {self.num_steps}")
        if not all(run.rows.keys() == run.scores.keys() for run in self.runs):
            raise ValueError("it does not count the rows of every set")

    def tables(self) -> dict[str, list[list[str]]]:
        """Return a table for each model and set: the steps, one a row, under a header of scores; the last is `FIXED`.

        The title names the model where there are several, and the set. The steps say how much is revealed.
        """
        found = {}
        for run in self.runs:
            for name, scores in run.parts().items():
                rows = [["revealed", *scores]]
                for step in range(self.num_steps):
                    cells = [_cell(curve.steps[step]) for curve in scores.values()]
                    rows.append([f"{step / self.num_steps:.2f}", *cells])
                rows.append([FIXED, *(_cell(curve.fixed) for curve in scores.values())])
                found[name if len(self.runs) == 1 else f"{run.name}: {name}"] = rows
        return found

    def details(self) -> str:
        """Return the tables in Markdown without intervals, under their titles."""
        parts = []
        for title, rows in self.tables().items():
            values = [[cell.partition(" [")[0] for cell in row] for row in rows]
            parts.append(f"{title}\n\n{markdown_table(values)}")
        return "\n\n".join(parts)


def _cell(estimate: Estimate | None) -> str:
    return "" if estimate is None else str(estimate)
