"""What was forgotten, token by token: figures by role before and after unlearning. Figures only, never texts.

report = analyse_roles(base, [("mdu", unlearned)], tokenizer, forget, retain)
print(report.details())
report.save("roles.json")
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data import question_answer_rows, tokenize_rows
from ..evaluation.metrics import bootstrap_interval
from ..evaluation.report import Estimate, markdown_table
from ..evaluation.scoring import digest
from ..evaluation.sources import check_texts
from ..generation import DiffusionGenerationConfig
from ..models import Backbone, resolve_backbone, weights_fingerprint
from .token_roles import ROLES, Labeller, Role, label_roles
from .trajectories import Figures, Path, by_row, by_step, decoded_paths, measure_paths, revelation, true_paths

SCHEMA = 1
TRUE, OWN = "true", "own"  # the ground-truth path, and the model's own decoding


@dataclass(frozen=True)
class RoleSettings:
    """How the denoising path is measured.

    Attributes:
        num_steps: moments of each path, evenly spaced over the tokens revealed.
        num_paths: random orders of the true answer, a row.
        batch_size: sequences a forward pass; changes no figure.
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
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Change:
    """How a figure moved from the base to a model, on the same noisy inputs.

    Attributes:
        difference: after minus before, with the paired bootstrap interval over rows.
        percent: the change of the mean over rows in percent of the base's, its interval paired as well. None where the
            base's mean is 0.
    """

    difference: Estimate
    percent: Estimate | None


@dataclass(frozen=True)
class Curve:
    """A figure along the path.

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
        figures: on the ground-truth path, figure -> role -> mean over rows. The figures are those of `trajectories`.
        changes: from the base, figure -> role -> change; empty for the base itself.
        curves: path ("true" or "own") -> figure -> role -> along its steps.
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
class RoleReport:
    """Base and unlearned models on the tokens of the rows to forget.

    Attributes:
        dataset: fingerprint of the rows and their roles.
        settings: how it was measured.
        rows: rows that have tokens of each role.
        tokens: tokens of each role.
        example_roles: of the tokens of the row of the heat map.
        runs: the base first.
    """

    dataset: str
    settings: RoleSettings
    rows: dict[Role, int]
    tokens: dict[Role, int]
    example_roles: list[Role]
    runs: list[RoleRun] = field(default_factory=list)

    def save(self, path: str | FilePath) -> None:
        """Write JSON, whole or not at all."""
        path = FilePath(path)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"schema": SCHEMA} | asdict(self)) + "\n")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | FilePath) -> "RoleReport":
        """Read what `save` wrote.

        Raises:
            ValueError: for a file that is not JSON, or of another schema.
        """
        try:
            content = json.loads(FilePath(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not a report on token roles: it holds no JSON.") from error
        schema = content.pop("schema", None) if isinstance(content, dict) else None
        if schema != SCHEMA or "example_roles" not in content:
            raise ValueError(
                f"{path} is not a report on token roles of schema {SCHEMA} (it says {schema}): repeat the analysis."
            )
        runs = [_run(run) for run in content["runs"]]
        return cls(**content | {"settings": RoleSettings(**content["settings"]), "runs": runs})

    def details(self, figure: str = "kl") -> str:
        """A Markdown table of a figure by role, before and after, with intervals and the change.

        Args:
            figure: "kl", "entropy" or "probability".

        Raises:
            ValueError: for a figure that there is no change of.
        """
        base, *others = self.runs
        if figure not in base.figures:
            raise ValueError(f"There is no change of {figure!r}; there is one of {', '.join(base.figures)}.")
        rows = [["model", "role", "tokens", f"{figure} before", f"{figure} after", "change", "change in %"]]
        for run in others:
            for role in base.figures[figure]:
                change = run.changes[figure][role]
                figures = [base.figures[figure][role], run.figures[figure][role], change.difference]
                percent = "" if change.percent is None else _percent(change.percent)
                rows.append([run.name, _words(role), str(self.tokens[role]), *map(str, figures), percent])
        return markdown_table(rows, text_columns=2)

    def order_table(self) -> str:
        """A Markdown table of each model's own decoding: tokens of each role, and when they are revealed."""
        rows = [["model", *(f"{_words(role)} {what}" for role in ROLES for what in ("tokens", "revealed at"))]]
        for run in self.runs:
            cells = [run.name]
            for role in ROLES:
                cells += [str(run.own_tokens[role]), str(run.order[role]) if role in run.order else ""]
            rows.append(cells)
        return markdown_table(rows)


@dataclass(frozen=True, repr=False)
class RoleData:
    """The rows to forget, tokenised and labelled.

    Attributes:
        prompts, responses: ids of each row.
        roles: of each response's tokens.
        questions, answers: texts of each row.
        others: questions and answers of the rows beside them, in which template words are found too.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    roles: list[list[Role]]
    questions: list[str]
    answers: list[str]
    others: tuple[list[str], list[str]]

    def digest(self) -> str:
        """A hash of ids and roles."""
        return digest([self.prompts, self.responses, self.roles])

    def count(self, role: Role) -> tuple[int, int]:
        """Rows that have tokens of a role, and tokens."""
        counts = [row.count(role) for row in self.roles]
        return sum(map(bool, counts)), sum(counts)


def check_rows(forget: Dataset, retain: Dataset | None = None) -> None:
    """Refuse rows that cannot be asked, before any model is loaded.

    Raises:
        ValueError: for an empty set, a missing column or a blank text.
    """
    for name, rows in {"forget": forget, "retain": retain}.items():
        if rows is not None:
            check_texts(rows, name, {"question": str, "answer": str})


def role_data(
    forget: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    backbone: Backbone,
    retain: Dataset | None = None,
    *,
    labeller: Labeller | None = None,
) -> RoleData:
    """Tokenise and label rows.

    Args:
        forget: rows with columns `question` and `answer`.
        tokenizer, backbone: of the model; questions become chat turns if the tokenizer has a chat template.
        retain: further rows of the same kind, so that template words are found among many answers.
        labeller: as in `label_roles`.

    Raises:
        ValueError: as `check_rows`.
    """
    check_rows(forget, retain)
    parts = [rows for rows in (forget, retain) if rows is not None]
    encoded = [
        tokenize_rows(
            question_answer_rows(rows, conversational=bool(tokenizer.chat_template)), tokenizer, backbone, name=name
        )
        for name, rows in zip(("forget", "retain"), parts, strict=False)
    ]
    questions, answers = ([text for rows in parts for text in rows[name]] for name in ("question", "answer"))
    ids = [response for rows in encoded for response in rows.responses]
    roles = label_roles(questions, answers, ids, tokenizer, labeller=labeller)
    n = len(forget)
    texts = questions[:n], answers[:n], (questions[n:], answers[n:])
    return RoleData(encoded[0].prompts, encoded[0].responses, roles[:n], *texts)


def analyse_roles(
    base: nn.Module,
    models: Iterable[tuple[str, nn.Module]],
    tokenizer: PreTrainedTokenizerBase,
    forget: Dataset,
    retain: Dataset | None = None,
    settings: RoleSettings | None = None,
    *,
    labeller: Labeller | None = None,
    path: str | FilePath | None = None,
    show_progress: bool = False,
) -> RoleReport:
    """Compare models with the base on the tokens of the rows to forget, role by role.

    Args:
        base: the model before unlearning.
        models: names and models after it, on the base's device. An iterator may load one after the other.
        tokenizer: of all of them.
        forget: rows with columns `question` and `answer`.
        retain: rows to keep. They are not measured, but template words show among many answers only.
        settings: how the path is measured.
        labeller: as in `label_roles`.
        path: where to save the report after every model. Given again after a kill, models that it holds are skipped.
        show_progress: show progress bars.

    Raises:
        ValueError: as `check_rows`, for two models of one name, for an example row that is not there, or for a file at
            `path` that is no report.
    """
    settings = settings or RoleSettings()
    backbone = resolve_backbone(base, tokenizer)
    data = role_data(forget, tokenizer, backbone, retain, labeller=labeller)
    if not 0 <= settings.example_row < len(data.prompts):
        raise ValueError(
            f"example_row = {settings.example_row}: the forget set has rows 0 to {len(data.prompts) - 1}."
        )
    report = RoleReport(
        data.digest(),
        settings,
        {role: data.count(role)[0] for role in ROLES},
        {role: data.count(role)[1] for role in ROLES},
        data.roles[settings.example_row],
    )
    known = _known(path, report, weights_fingerprint(base))
    analysis = _Analysis(base, backbone, tokenizer, data, settings, labeller, show_progress)
    report = replace(report, runs=[known.get("base") or analysis.run("base", base)])
    for name, model in models:
        if name in [run.name for run in report.runs]:
            raise ValueError(f"Each model needs a name of its own, and {name!r} is taken.")
        found = known.get(name)
        if found is None or found.fingerprint != weights_fingerprint(model):
            found = analysis.run(name, model)
        report = replace(report, runs=[*report.runs, found])
        if path is not None:
            report.save(path)
    return report


def _known(path: str | FilePath | None, report: RoleReport, base: str) -> dict[str, RoleRun]:
    """The runs of an earlier report on the same rows and base, measured alike."""
    if path is None or not FilePath(path).exists():
        return {}
    earlier = RoleReport.load(path)
    settings = replace(earlier.settings, batch_size=report.settings.batch_size)
    if (earlier.dataset, settings) != (report.dataset, report.settings) or earlier.runs[0].fingerprint != base:
        return {}
    return {run.name: run for run in earlier.runs}


class _Analysis:
    """Measures one model after the other on the same paths; the base is measured once."""

    def __init__(
        self,
        base: nn.Module,
        backbone: Backbone,
        tokenizer: PreTrainedTokenizerBase,
        data: RoleData,
        settings: RoleSettings,
        labeller: Labeller | None,
        show_progress: bool,
    ):
        self.base, self.backbone, self.tokenizer, self.data = base, backbone, tokenizer, data
        self.settings, self.labeller, self.show_progress = settings, labeller, show_progress
        self.paths = true_paths(
            data.prompts, data.responses, data.roles, num_paths=settings.num_paths, seed=settings.seed
        )
        self._before: Figures | None = None

    @property
    def before(self) -> Figures:
        """The base on the ground-truth paths."""
        if self._before is None:
            self._before = self.measure(self.base, self.paths, "base, true answers")
        return self._before

    def run(self, name: str, model: nn.Module) -> RoleRun:
        """The figures of a model."""
        is_base = model is self.base
        after = self.before if is_base else self.measure(model, self.paths, f"{name}, true answers")
        own = self.decode(model, name)
        figures = {figure: self.means(values) for figure, values in after.items()}
        compared = {} if is_base else {figure: after[figure] for figure in self.before}
        changes = {
            figure: {role: self.change(self.before[figure], values, role) for role in figures[figure]}
            for figure, values in compared.items()
        }
        along = {TRUE: (self.paths, after), OWN: (own, self.measure(model, own, f"{name}, own decoding"))}
        orders = {role: revelation(own, role) for role in ROLES}
        place = self.settings.example_row * self.settings.num_paths
        return RoleRun(
            name,
            weights_fingerprint(model),
            figures,
            changes,
            {
                kind: {figure: _curves(values, paths) for figure, values in found.items()}
                for kind, (paths, found) in along.items()
            },
            {role: self.estimate(values) for role, values in orders.items() if np.isfinite(values).any()},
            {role: sum(path.roles.count(role) for path in own) for role in ROLES},
            [[_number(value) for value in step] for step in after["kl"][place]],
        )

    def measure(self, model: nn.Module, paths: Sequence[Path], name: str) -> Figures:
        return measure_paths(
            model,
            paths,
            self.backbone,
            base=None if model is self.base else self.base,
            num_steps=self.settings.num_steps,
            batch_size=self.settings.batch_size,
            show_progress=name if self.show_progress else None,
        )

    def decode(self, model: nn.Module, name: str) -> list[Path]:
        length = max(map(len, self.data.responses))
        config = DiffusionGenerationConfig(
            max_new_tokens=length, batch_size=self.settings.batch_size, seed=self.settings.seed
        )
        return decoded_paths(model, self.data.prompts, self.backbone, config, self.label_decoded)

    def label_decoded(self, decoded: list[list[int]]) -> list[list[Role]]:
        """Roles of decoded answers, whose template words are those of the true answers."""
        texts = self.tokenizer.batch_decode(decoded, skip_special_tokens=True)
        questions, answers = self.data.others
        others = [*self.data.questions, *questions], [*self.data.answers, *answers]
        nothing: list[list[int]] = [[] for _ in others[0]]
        return label_roles(
            [*self.data.questions, *others[0]],
            [*texts, *others[1]],
            [*decoded, *nothing],
            self.tokenizer,
            labeller=self.labeller,
        )[: len(decoded)]

    def means(self, values: Sequence[np.ndarray]) -> dict[Role, Estimate]:
        rows = {role: by_row(values, self.paths, role) for role in ROLES}
        return {role: self.estimate(each) for role, each in rows.items() if np.isfinite(each).any()}

    def estimate(self, rows: np.ndarray) -> Estimate:
        rows = rows[np.isfinite(rows)]
        return Estimate(float(rows.mean()), *bootstrap_interval(rows, seed=self.settings.seed))

    def change(self, before: Sequence[np.ndarray], after: Sequence[np.ndarray], role: Role) -> Change:
        first, second = (by_row(values, self.paths, role) for values in (before, after))
        both = np.isfinite(first)
        first, second = first[both], second[both]
        difference = self.estimate(second - first)
        if first.mean() == 0:
            return Change(difference, None)

        def percent(rows: np.ndarray, axis: int) -> np.ndarray:
            drawn = rows.astype(np.int64)  # row numbers, so that both models are resampled together
            return 100 * (second[drawn].mean(axis=axis) / first[drawn].mean(axis=axis) - 1)

        numbers = np.arange(len(first))
        interval = bootstrap_interval(numbers, percent, seed=self.settings.seed)
        return Change(difference, Estimate(float(percent(numbers, axis=0)), *interval))


def _curves(values: Sequence[np.ndarray], paths: Sequence[Path]) -> dict[Role, Curve]:
    curves = {}
    for role in ROLES:
        steps = by_step(values, paths, role)
        count = np.isfinite(steps).sum(axis=0)
        filled = np.where(np.isfinite(steps), steps, 0)
        mean = filled.sum(axis=0) / np.maximum(count, 1)
        squares = np.where(np.isfinite(steps), (steps - mean) ** 2, 0).sum(axis=0)
        error = np.sqrt(squares / np.maximum(count - 1, 1) / np.maximum(count, 1))
        curves[role] = Curve(
            [_number(value) if n else None for value, n in zip(mean, count, strict=True)],
            [_number(value) if n > 1 else None for value, n in zip(error, count, strict=True)],
        )
    return curves


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _words(role: Role) -> str:
    return role.replace("_", " ")


def _percent(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:+.1f}"
    return f"{estimate.value:+.1f} [{estimate.low:+.1f}, {estimate.high:+.1f}]"


def _run(content: dict[str, Any]) -> RoleRun:
    def estimates(figures: dict[str, Any]) -> dict[str, Estimate]:
        return {role: Estimate(**figure) for role, figure in figures.items()}

    def change(found: dict[str, Any]) -> Change:
        percent = found["percent"]
        return Change(Estimate(**found["difference"]), None if percent is None else Estimate(**percent))

    return RoleRun(
        **content
        | {
            "figures": {name: estimates(found) for name, found in content["figures"].items()},
            "changes": {
                name: {role: change(each) for role, each in found.items()}
                for name, found in content["changes"].items()
            },
            "curves": {
                kind: {
                    name: {role: Curve(**curve) for role, curve in roles.items()} for name, roles in figures.items()
                }
                for kind, figures in content["curves"].items()
            },
            "order": estimates(content["order"]),
        }
    )
