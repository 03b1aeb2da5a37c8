"""The record of what was forgotten, token by token: values by role before and after unlearning, never texts.

    report = RoleReport.load("roles.json")  # of `measure.analyse_roles`, or of examples/roles.py
    print(report.details())

How to read it. `kl` says how much the prompt changes a prediction, right or wrong: a model that never saw the rows
and is sure of its wrong answers has a high one. So read it beside `probability`, that of the true tokens. MDU pulls
the prediction towards the prompt-masked one where tau = 1, and towards a flatter one below: at tau = 0, once the
prediction is uniform, `kl` says how far from uniform the prompt-masked one is.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..data.roles import ROLES, Role
from ..evaluation.results import Estimate, markdown_table
from ..files import Record, UserError
from ..inference.config import check_count

TRUE, OWN = "true", "own"  # the ground-truth path, and the model's own decoding


@dataclass(frozen=True)
class RoleSettings:
    """Settings of the measurement along the denoising path.

    Attributes:
        num_steps: moments of each path, evenly spaced over the tokens revealed.
        num_paths: random orders of the true answer, a row.
        batch_size: sequences a forward pass; changes no value.
        seed: of the orders, the decoding and the resampling.
        example_row: the row whose tokens the heat map shows.
    """

    num_steps: int = 16
    num_paths: int = 4
    batch_size: int = 32
    seed: int = 0
    example_row: int = 0

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_paths", "batch_size"):
            check_count(name, getattr(self, name))


@dataclass(frozen=True)
class Change:
    """The move of a value from the base to a model, on the same noisy inputs.

    Attributes:
        difference: after minus before, with the paired bootstrap interval over rows.
        percent: the change of the mean over rows in percent of the base's, its interval paired as well. None where the
            base's mean is 0.
    """

    difference: Estimate
    percent: Estimate | None


@dataclass(frozen=True)
class Curve:
    """A value along the path.

    Attributes:
        mean: over rows, of each step; None where no row has a masked token of the role.
        standard_error: of the mean, over rows; None where fewer than two have one.
    """

    mean: list[float | None]
    standard_error: list[float | None]


@dataclass(frozen=True)
class RoleRun:
    """One model.

    Attributes:
        name: what tables and pictures call it.
        fingerprint: of its weights.
        figures: on the ground-truth path, name of a value (`paths.VALUES`) -> role -> mean over rows.
        changes: from the base, value -> role -> change; empty for the base itself.
        curves: path ("true" or "own") -> value -> role -> along its steps.
        order: when its own decoding reveals the tokens of each role: 0 first, 1 last.
        own_tokens: tokens of each role in the answers that it decodes.
        example: `kl` of the row of the heat map along its first ground-truth path, `[S][L]`, None where not masked.
    """

    name: str
    fingerprint: str
    figures: dict[str, dict[Role, Estimate]]
    changes: dict[str, dict[Role, Change]]
    curves: dict[str, dict[str, dict[Role, Curve]]]
    order: dict[Role, Estimate]
    own_tokens: dict[Role, int]
    example: list[list[float | None]]


@dataclass(frozen=True)
class RoleReport(Record):
    """Base and unlearned models on the tokens of the rows to forget.

    Attributes:
        dataset: fingerprint of the rows and their roles.
        settings: how it was measured.
        rows: rows that have tokens of each role.
        tokens: tokens of each role.
        example_roles: of the tokens of the row of the heat map.
        runs: the base first.
    """

    kind: ClassVar[str] = "report on token roles"
    remedy: ClassVar[str] = "repeat the analysis"
    indent: ClassVar[int | None] = None
    private: ClassVar[bool] = True  # it has a hash of the rows

    dataset: str
    settings: RoleSettings
    rows: dict[Role, int]
    tokens: dict[Role, int]
    example_roles: list[Role]
    runs: list[RoleRun] = field(default_factory=list)

    def check(self) -> None:
        """Refuse a report without base, or with a run that lacks what tables and pictures read of it."""
        if not self.runs or "kl" not in self.runs[0].figures:
            raise ValueError("it holds no base")
        wanted, curve_lengths = _places(self.runs[0].figures), {self.settings.num_steps}
        for number, run in enumerate(self.runs):
            changes = wanted if number == 0 else _places(run.changes)
            curves = [curve for values in run.curves.values() for of in values.values() for curve in of.values()]
            lengths = {len(values) for curve in curves for values in (curve.mean, curve.standard_error)}
            if not wanted <= _places(run.figures) & changes or {*run.curves} != {TRUE, OWN}:
                raise ValueError(f"runs[{number}] lacks figures of the base")
            if lengths - curve_lengths or {len(step) for step in run.example} - {len(self.example_roles)}:
                raise ValueError(f"runs[{number}] has curves or an example of another length")
        if any({*counts} != {*ROLES} for counts in (self.rows, self.tokens, *(run.own_tokens for run in self.runs))):
            raise ValueError("it does not count every role")

    def details(self, value: str = "kl") -> str:
        """The cells of `details_cells` as a Markdown table."""
        return markdown_table(self.details_cells(value), text_columns=2)

    def details_cells(self, value: str = "kl") -> list[list[str]]:
        """A value by role under a header, before and after, with intervals and the change.

        Args:
            value: "kl", "entropy" or "probability".

        Raises:
            ValueError: for a value that there is no change of.
        """
        base, *others = self.runs
        if value not in base.figures:
            raise UserError(f"There is no change of {value!r}; there is one of {', '.join(base.figures)}.")
        rows = [["model", "role", "tokens", f"{value} before", f"{value} after", "change", "change in %"]]
        for run in others:
            for role in base.figures[value]:
                change = run.changes[value][role]
                cells = map(str, (base.figures[value][role], run.figures[value][role], change.difference))
                percent = "" if change.percent is None else _percent(change.percent)
                rows.append([run.name, role_words(role), str(self.tokens[role]), *cells, percent])
        return rows

    def order_table(self) -> str:
        """A Markdown table of each model's own decoding: tokens of each role, and when they are revealed."""
        rows = [["model", *(f"{role_words(role)} {what}" for role in ROLES for what in ("tokens", "revealed at"))]]
        for run in self.runs:
            cells = [run.name]
            for role in ROLES:
                cells += [str(run.own_tokens[role]), str(run.order[role]) if role in run.order else ""]
            rows.append(cells)
        return markdown_table(rows)


def role_words(role: Role) -> str:
    """A role as tables and pictures call it."""
    return role.replace("_", " ")


def _percent(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:+.1f}"
    return f"{estimate.value:+.1f} [{estimate.low:+.1f}, {estimate.high:+.1f}]"


def _places(values: dict[str, dict[Role, Any]]) -> set[tuple[str, Role]]:
    return {(name, role) for name, of in values.items() for role in of}
