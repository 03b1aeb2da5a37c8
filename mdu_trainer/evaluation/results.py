"""The outcome of a comparison: one typed record, tables to read, a JSON file to keep. Figures only, never texts."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, ClassVar, Literal

from ..files import Record, UserError, without_secrets
from .protocol import RL, Protocol, Rouge
from .registry import score_titles

Place = tuple[str | None, str]  # set and metric of a score, the set None for the model as a whole

ROUGE = "rougeL"  # metric of a place that stands for the recall or the F1, whichever a run shows
NEVER_TRAINED = "retain model"  # method of the run of a model that never saw the rows to forget
DISTANCE = "to never-trained"  # title of the column with the signed distance of the forget rL to that run's
COLUMNS: dict[str, Place] = {  # of `Results.table`, where any run has the score
    "forget rL": ("forget", ROUGE),
    "retain rL": ("retain", ROUGE),
    "forget prob.": ("forget", "probability"),
    "retain prob.": ("retain", "probability"),
    "truth ratio": ("forget", "truth_ratio"),
    "utility": (None, "model_utility"),
    "forget quality": (None, "forget_quality"),
}
SHORT = {  # in the name of a run
    "learning_rate": "lr",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "forget_masking": "masks",
    "anchor_source": "anchor",
    "anchor_input": "input",
}
SUMMARISED = ("forget", "retain", "real_authors", "world_facts")  # sets that COLUMNS cover; others get their own
RWKU_SETS = {  # as tables of RWKU call them
    **{f"forget_level{n}": f"F-L{n}" for n in (1, 2, 3)},
    **{f"neighbor_level{n}": f"N-L{n}" for n in (1, 2)},
    "utility_general": "MMLU",
    "utility_truthfulness": "TruthfulQA",
    "utility_factuality": "TriviaQA",
    "utility_reason": "BBH",
    "utility_fluency": "AlpacaEval",
}
HEADLINES = {  # the one of a further set that the table shows
    "accuracy": "acc.",
    "letter_accuracy": "letter acc.",
    ROUGE: "rL",
    "exact_match": "match",
    "substring_match": "substring",
    "entropy": "entropy",
    "loss": "loss",
}


@dataclass(frozen=True)
class Estimate:
    """The value of a score, with its 95 % bootstrap interval over rows: `low` and `high`, None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return _rounded(self.value)
        return f"{_rounded(self.value)} [{_rounded(self.low)}, {_rounded(self.high)}]"

    def distance(self, level: float) -> "Estimate":
        """How far the value is from a level, in either direction, with the interval carried over."""
        if self.low is None or self.high is None:
            return Estimate(abs(self.value - level))
        ends = sorted(abs(end - level) for end in (self.low, self.high))
        return Estimate(abs(self.value - level), 0.0 if self.low <= level <= self.high else ends[0], ends[1])


Scores = dict[str, Estimate]


@dataclass(frozen=True)
class Run:
    """One model of a comparison: the base, or what a method made of it.

    Attributes:
        method: "base" or the method's name.
        tau: of MDU, None for other methods.
        scores: name of a set ("forget", "retain", ...) -> name of a metric -> score. A missing score is absent.
        rows: name of a set -> rows scored.
        summary: scores of the model as a whole (`model_utility`, `forget_quality`, ...).
        train_seconds, eval_seconds: wall-clock time.
        settings: what tells the run from others of its method, e.g. `{"learning_rate": 1e-4, "max_steps": 60}`.
        protocol: how it was asked and scored, see `mdu_trainer.evaluation.protocol`.
        rouge: what tables and pictures show as its rL. Both are among the scores.
    """

    method: str
    tau: float | None
    scores: dict[str, Scores]
    rows: dict[str, int]
    summary: Scores = field(default_factory=dict)
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    protocol: Protocol = "ours"
    rouge: Rouge = "recall"

    @property
    def name(self) -> str:
        """The run in tables and pictures: method, tau and settings, e.g. "mdu tau=0 lr=0.0001 steps=60"."""
        values = ({} if self.tau is None else {"tau": self.tau}) | self.settings
        texts = {key: f"{value:.9g}" if isinstance(value, float) else value for key, value in values.items()}
        return " ".join([self.method, *(f"{SHORT.get(key, key)}={text}" for key, text in texts.items())])

    def renamed(self, text: Callable[[str], str]) -> "Run":
        """The run with every name that it holds changed, for a place where names have another spelling."""

        def texts(named: Mapping[str, Any]) -> dict[str, Any]:
            return {text(name): value for name, value in named.items()}

        return replace(
            self,
            method=text(self.method),
            scores={name: texts(scores) for name, scores in texts(self.scores).items()},
            rows=texts(self.rows),
            summary=texts(self.summary),
            settings={k: text(v) if isinstance(v, str) else v for k, v in texts(self.settings).items()},
        )

    def figure(self, name: str | None, metric: str) -> Estimate | None:
        """The score of a set, or of the summary if `name` is None; None if it was not measured.

        The metric `ROUGE` is the recall or the F1, whichever the run shows.
        """
        metric = f"{ROUGE}_{self.rouge}" if metric == ROUGE else metric
        return (self.summary if name is None else self.scores.get(name, {})).get(metric)

    def places(self) -> list[Place]:
        """The set and the metric of each score that the run has."""
        return [(name, metric) for name, scores in [*self.scores.items(), (None, self.summary)] for metric in scores]

    def change(self, baseline: "Run") -> str:
        """A Markdown table of the scores that both runs have, and how far this one has moved from the other.

        Raises:
            UserError: they have different protocols.
        """
        common([baseline, self], "protocol")
        rows = [["set", "metric", baseline.name, self.name, "change"]]
        for name, metric in self.places():
            before, after = baseline.figure(name, metric), self.figure(name, metric)
            if before and after:
                values = [_rounded(before.value), _rounded(after.value), f"{after.value - before.value:+.3f}"]
                rows.append([name or "model", metric, *values])
        return markdown_table(rows, text_columns=2)


@dataclass
class Results(Record):
    """A comparison of unlearning methods on one model and data set.

    Attributes:
        model, dataset: what was unlearned from what.
        settings: everything that was set.
        runs: "base" first.
        date: day of the evaluation, as ISO 8601 has it; None where it is not on record.
    """

    schema: ClassVar[int] = 3
    earlier_schemas: ClassVar[tuple[int, ...]] = (2,)
    kind: ClassVar[str] = "results file"
    remedy: ClassVar[str] = "repeat the evaluation"

    model: str
    dataset: str
    settings: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    date: str | None = None

    def to_json(self) -> str:
        """Return, as JSON, the scores that were measured, and the settings without the secrets among them."""
        return super(Results, replace(self.finite(), settings=without_secrets(self.settings))).to_json()

    def check(self) -> None:
        """Refuse a comparison of nothing, and one of what does not compare."""
        if not self.runs:
            raise ValueError("it holds no run")
        for name in ("protocol", "rouge"):
            if len({getattr(run, name) for run in self.runs}) > 1:
                raise ValueError(f"its runs differ in their {name}")

    @property
    def protocol(self) -> str:
        """How all runs were asked and scored."""
        return common(self.runs, "protocol")

    @property
    def rouge(self) -> str:
        """What rL stands for: "recall" or "f1"."""
        return common(self.runs, "rouge")

    def finite(self) -> "Results":
        """The comparison without scores that are NaN or infinite: nothing was measured there."""

        def finite(scores: Scores) -> Scores:
            return {metric: score for metric, score in scores.items() if math.isfinite(score.value)}

        runs = [
            replace(run, scores={name: finite(part) for name, part in run.scores.items()}, summary=finite(run.summary))
            for run in self.runs
        ]
        return replace(self, runs=runs)

    def table(self, further: dict[str, dict[str, str]] | None = None) -> str:
        """The cells of `table_cells` as a Markdown table."""
        return markdown_table(self.table_cells(further))

    def table_cells(self, further: dict[str, dict[str, str]] | None = None) -> list[list[str]]:
        """The runs, one a row, under a header. Columns that no run has a score for are left out.

        Where a never-trained model was scored, "to never-trained" is the signed distance of the forget rL to its: +
        above it (something is still known), - below it (over-forgotten).

        Args:
            further: columns at the end: title -> name of a run -> text.
        """
        further, rouge = further or {}, RL[self.rouge]
        common(self.runs, "protocol")
        columns = {
            title: place for title, place in self._columns().items() if any(run.figure(*place) for run in self.runs)
        }
        level = level_of(self.runs, COLUMNS["forget rL"])
        after = [title in columns for title in ("forget rL", "retain rL")].count(True)  # the two come first
        titles = [title.replace("rL", rouge) if place[1] == ROUGE else title for title, place in columns.items()]
        rows = [["method", *titles, "train s", *further]]
        for run in self.runs:
            found = [run.figure(*place) for place in columns.values()]
            scores = ["" if score is None else _rounded(score.value) for score in found]
            texts = [texts.get(run.name, "") for texts in further.values()]
            rows.append([run.name, *scores, f"{run.train_seconds:.0f}", *texts])
        if level is not None:
            rows[0].insert(1 + after, DISTANCE)
            for run, row in zip(self.runs, rows[1:], strict=True):
                row.insert(1 + after, _signed_distance(run, level.value))
        return rows

    def details(self) -> str:
        """The cells of `details_cells` as a Markdown table."""
        return markdown_table(self.details_cells(), text_columns=2)

    def details_cells(self) -> list[list[str]]:
        """Every score with its interval, one a row, under a header; the runs are the columns."""
        common(self.runs, "protocol")
        places = dict.fromkeys(place for run in self.runs for place in run.places())
        rows = [["set", "metric", "rows", *(run.name for run in self.runs)]]
        for name, metric in sorted(places, key=lambda place: place[0] is None):  # the summary last
            counts = sorted({run.rows[name] for run in self.runs if name in run.rows})
            scores = [str(run.figure(name, metric) or "") for run in self.runs]
            rows.append([name or "model", metric, ", ".join(map(str, counts)), *scores])
        return rows

    def _columns(self) -> dict[str, Place]:
        further = dict.fromkeys(name for run in self.runs for name in run.scores if name not in SUMMARISED)
        titles = score_titles()
        own: dict[str, Place] = {
            f"{name} {title}": (name, score) for score, title in titles.items() for name in ("forget", "retain")
        }
        columns = COLUMNS | own | COLUMNS  # titles that are taken stay what they are
        for name in further:
            for metric, short in (HEADLINES | titles).items():
                if any(run.figure(name, metric) for run in self.runs):
                    columns[f"{RWKU_SETS.get(name, name.replace('_', ' '))} {short}"] = (name, metric)
                    break
        return columns


def common(runs: Iterable[Run], name: Literal["protocol", "rouge"]) -> str:
    """Return what all runs have as their protocol, or as their rL.

    Raises:
        UserError: they differ, so they do not compare.
    """
    found = dict.fromkeys(getattr(run, name) for run in runs)
    if len(found) > 1:
        raise UserError(f"Runs differ in their {name} ({', '.join(found)}), so they do not compare: score them alike.")
    return next(iter(found), Run.__dataclass_fields__[name].default)


def today() -> str:
    """The day in UTC, for `Results.date`."""
    return datetime.now(timezone.utc).date().isoformat()


def level_of(runs: Iterable[Run], place: Place) -> Estimate | None:
    """The score of the model that never saw the rows to forget: the target of forgetting. None if there is none."""
    return next((found for run in runs if run.method == NEVER_TRAINED and (found := run.figure(*place))), None)


def _signed_distance(run: Run, level: float) -> str:
    """How far the forget rL lies above (+) or below (-) a level; empty for the model that sets it."""
    score = None if run.method == NEVER_TRAINED else run.figure(*COLUMNS["forget rL"])
    if score is None:
        return ""
    return f"{round(score.value - level, 3) + 0.0:+.3f}"  # + 0.0: no negative zero


def markdown_table(rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table, padded to be read as it is too.

    Args:
        rows: the cells, the first row being the header. A bar in one is escaped, a line break becomes a space.
        text_columns: so many columns on the left are aligned to the left, the others to the right.
    """
    rows = [[" ".join(cell.splitlines()).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = [i < text_columns for i in range(len(widths))]
    padded = [
        [cell.ljust(w) if t else cell.rjust(w) for cell, w, t in zip(row, widths, text, strict=True)] for row in rows
    ]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    rule = "|" + "|".join("-" * (w + 2) if t else "-" * (w + 1) + ":" for w, t in zip(widths, text, strict=True)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _rounded(value: float) -> str:
    """Three decimals; small p-values keep their order of magnitude."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.0005 else f"{value:.0e}"
