"""Measure what was forgotten, token by token.

report = analyse_roles(base, [("mdu", unlearned)], tokenizer, forget, retain)
print(report.details())
report.save("roles.json")
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path as FilePath

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.roles import ROLES, Labeller, Role, label_roles
from ..data.rows import question_answer_rows, tokenize_rows
from ..data.texts import is_plain, without_ends
from ..evaluation.metrics import bootstrap_interval
from ..evaluation.results import Estimate
from ..evaluation.scoring import digest
from ..evaluation.sources import QUESTION_ANSWER, check_columns
from ..files import UserError
from ..inference.generation import DiffusionGenerationConfig
from ..models import Backbone, resolve_backbone, weights_fingerprint
from .paths import Path, PathValues, by_row, by_step, decoded_paths, measure_paths, revelation, true_paths
from .results import OWN, TRUE, Change, Curve, RoleReport, RoleRun, RoleSettings

BASE = "base"  # what the model before unlearning is called


@dataclass(frozen=True, repr=False)
class RoleData:
    """The rows to forget, tokenised and labelled.

    Attributes:
        prompt_ids, completion_ids: of each row.
        roles: of each completion's tokens.
        questions, answers: texts of each row.
        others: questions and answers of the rows beside them, in which template words are found too.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    roles: list[list[Role]]
    questions: list[str]
    answers: list[str]
    others: tuple[list[str], list[str]]

    def paths(self, settings: RoleSettings) -> list[Path]:
        """The ground-truth paths of each row."""
        ids = self.prompt_ids, self.completion_ids
        return true_paths(*ids, self.roles, num_paths=settings.num_paths, seed=settings.seed)

    def label(
        self,
        answers: list[str],
        answer_ids: list[list[int]],
        tokenizer: PreTrainedTokenizerBase,
        labeller: Labeller | None,
    ) -> list[list[Role]]:
        """Roles of answers to the questions, true or not; template words are those of the true answers."""
        known = [] if answers is self.answers else list(zip(self.questions, self.answers, strict=True))
        known += zip(*self.others, strict=True)
        return label_roles(
            [*self.questions, *(question for question, _ in known)],
            [*answers, *(answer for _, answer in known)],
            [*answer_ids, *([] for _ in known)],
            tokenizer,
            labeller=labeller,
        )[: len(answers)]


def check_rows(forget: Dataset, retain: Dataset | None = None) -> None:
    """Refuse an empty set, a missing column or a blank text with a ValueError, before any model is loaded."""
    for name, rows in {"forget": forget, "retain": retain}.items():
        if rows is not None:
            check_columns(rows, name, QUESTION_ANSWER)


def role_data(
    forget: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    backbone: Backbone,
    retain: Dataset | None = None,
    *,
    labeller: Labeller | None = None,
) -> RoleData:
    """Tokenise and label rows, once `check_rows` has passed them.

    Args:
        forget: rows with columns `question` and `answer`.
        tokenizer, backbone: of the model; questions become chat turns if the tokenizer has a chat template, but for
            passages of texts.
        retain: further rows of the same kind, so that template words are found among many answers.
        labeller: as in `label_roles`.
    """
    check_rows(forget, retain)
    plain = is_plain(forget)
    chats = bool(tokenizer.chat_template) and not plain
    rows = tokenize_rows(question_answer_rows(forget, conversational=chats), tokenizer, backbone, name="forget")
    texts = list(forget["question"]), list(forget["answer"])
    others = ([], []) if retain is None else (list(retain["question"]), list(retain["answer"]))
    responses = without_ends(rows.completion_ids, backbone.end_token_ids) if plain else rows.completion_ids
    data = RoleData(rows.prompt_ids, responses, [], *texts, others)
    return replace(data, roles=data.label(data.answers, data.completion_ids, tokenizer, labeller))


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
        path: where to save the report after every model. Given again, the models that it holds are not measured again
            if their weights are the same; so a killed run goes on.
        show_progress: show progress bars.

    Raises:
        ValueError: as `check_rows`, for two models of one name, for an example row that is not there, or for a file at
            `path` that is no report, or one of other rows, another base or other settings.
    """
    settings = settings or RoleSettings()
    backbone = resolve_backbone(base, tokenizer)
    data = role_data(forget, tokenizer, backbone, retain, labeller=labeller)
    if not 0 <= settings.example_row < len(data.prompt_ids):
        raise UserError(
            f"example_row = {settings.example_row}: the forget set has rows 0 to {len(data.prompt_ids) - 1}."
        )
    counts = {role: [roles.count(role) for roles in data.roles] for role in ROLES}
    report = RoleReport(
        digest([data.prompt_ids, data.completion_ids, data.roles]),
        settings,
        {role: sum(map(bool, of_rows)) for role, of_rows in counts.items()},
        {role: sum(of_rows) for role, of_rows in counts.items()},
        data.roles[settings.example_row],
    )
    known = _known(path, report, weights_fingerprint(base))
    analysis = _Analysis(base, backbone, tokenizer, data, settings, labeller, show_progress)
    for name, model in chain([(BASE, base)], models):
        if name in [run.name for run in report.runs]:
            raise UserError(f"Each model needs a name of its own, and {name!r} is taken.")
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
        raise UserError(
            f"{path} is the report of other rows, another base or other settings. Choose another file, or delete this "
            "one to start anew."
        )
    return {run.name: run for run in earlier.runs}


@dataclass(frozen=True, repr=False)
class _Analysis:
    """Measures one model after the other on the same paths; the base is measured once."""

    base: nn.Module
    backbone: Backbone
    tokenizer: PreTrainedTokenizerBase
    data: RoleData
    settings: RoleSettings
    labeller: Labeller | None
    show_progress: bool

    @cached_property
    def paths(self) -> list[Path]:
        """The ground-truth paths."""
        return self.data.paths(self.settings)

    @cached_property
    def before(self) -> PathValues:
        """The base on the ground-truth paths."""
        return self.measure(self.base, self.paths, "base, true answers")

    def run(self, name: str, model: nn.Module) -> RoleRun:
        """The values of a model, by role."""
        is_base = name == BASE
        after = self.before if is_base else self.measure(model, self.paths, f"{name}, true answers", self.base)
        own = self.decode(model)
        along_own = self.measure(model, own, f"{name}, own decoding", None if is_base else self.base)
        means = {value: self.means(of_paths) for value, of_paths in after.items()}
        changes = {
            value: {role: self.change(of_paths, after[value], role) for role in means[value]}
            for value, of_paths in ({} if is_base else self.before).items()
        }
        orders = {role: revelation(own, role) for role in ROLES}
        place = self.settings.example_row * self.settings.num_paths
        return RoleRun(
            name,
            weights_fingerprint(model),
            means,
            changes,
            {
                TRUE: {value: _curves(of_paths, self.paths) for value, of_paths in after.items()},
                OWN: {value: _curves(of_paths, own) for value, of_paths in along_own.items()},
            },
            {role: self.estimate(rows) for role, rows in orders.items() if np.isfinite(rows).any()},
            {role: sum(path.roles.count(role) for path in own) for role in ROLES},
            [[_number(value) for value in step] for step in after["kl"][place]],
        )

    def measure(self, model: nn.Module, paths: Sequence[Path], name: str, base: nn.Module | None = None) -> PathValues:
        return measure_paths(
            model,
            paths,
            self.backbone,
            base=base,
            num_steps=self.settings.num_steps,
            batch_size=self.settings.batch_size,
            show_progress=f"asking {name}" if self.show_progress else None,
        )

    def decode(self, model: nn.Module) -> list[Path]:
        def label(decoded: list[list[int]]) -> list[list[Role]]:
            texts = self.tokenizer.batch_decode(decoded, skip_special_tokens=True)
            return self.data.label(texts, decoded, self.tokenizer, self.labeller)

        longest, settings = max(map(len, self.data.completion_ids)), self.settings
        config = DiffusionGenerationConfig(max_new_tokens=longest, batch_size=settings.batch_size, seed=settings.seed)
        return decoded_paths(model, self.data.prompt_ids, self.backbone, config, label)

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
        steps = np.ma.masked_invalid(by_step(values, paths, role))
        error = np.ma.sqrt(steps.var(axis=0, ddof=1) / steps.count(axis=0))
        mean, error = (found.filled(np.nan) for found in (steps.mean(axis=0), error))
        curves[role] = Curve([_number(value) for value in mean], [_number(value) for value in error])
    return curves


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
