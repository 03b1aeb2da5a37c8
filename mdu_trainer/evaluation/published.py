"""The benchmarks of `published_sets`: loaded, checked and scored.

sets = load_published("muse", BenchmarkOptions(dataset_name="muse-bench/MUSE-News"))
run = evaluate_published("muse", model, tokenizer, sets)
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.reading import read_rows
from ..files import UserError
from ..inference.config import Decoding, DiffusionGenerationConfig, decoded_as
from ..models import Backbone, resolve_backbone
from .columns import GROUP, ROWS, parse_columns, rename
from .metrics import MembershipInference, two_sided
from .published_sets import CHOICES, LEAST_LIKELY, METRICS_OF, PUBLISHED, Part
from .registry import BenchmarkOptions
from .results import Estimate, Results, Run, Scores
from .runner import score_run
from .scoring import QuestionSet, encode_questions
from .sources import check_columns, load_split, spread

logger = logging.get_logger(__name__)

MEMBERS, OTHERS = "privleak_forget", "privleak_holdout"  # sets that MUSE's membership attack compares
AREA = "privleak_auc"
CODE = re.compile(r"[A-Za-z][\w.-]{0,18}\d", re.ASCII)  # names of sets are published: a group's must be no text
MOST_GROUPS = 12
WORDS = {
    "min_k": f"mean log p of the {LEAST_LIKELY:.0%} of a text's tokens that are least likely (Min-K% Prob)",
    AREA: f"area under the curve by which `min_k` tells {MEMBERS} from {OTHERS}; 0.5 is a guess",
    "privleak_two_sided": "the same for whoever guesses in the direction that tells more",
    "privleak": "MUSE's PrivLeak, in percent of the retain model's: 0 is perfect, below it members are still "
    "recognised, above it they stick out",
}


class Given:
    """The columns that a user names, and those of them that some set has.

    Args:
        columns: name here -> name in the data.
    """

    def __init__(self, columns: Mapping[str, str]):
        self.columns, self.used = columns, set[str]()

    def choose(self, ours: str, part: Part, rows: Dataset) -> str:
        """What a column is called in these rows: as the user says, as it was published, or as it is called here."""
        names = [name for name in (self.columns.get(ours), part.columns.get(ours), ours) if name is not None]
        found = next((name for name in names if name in rows.column_names), names[0])
        self.used |= {ours} if found == self.columns.get(ours) else set()
        return found

    def check(self) -> None:
        """Refuse a column that no set has."""
        unread = [f"{ours}={theirs}" for ours, theirs in self.columns.items() if ours not in self.used]
        if unread:
            raise UserError(f"--columns {','.join(unread)}: no set of the benchmark has such a column to read.")


def load_published(name: str, options: BenchmarkOptions) -> dict[str, Dataset]:
    """The sets of a benchmark of `PUBLISHED`. All rows that are loaded are checked, whether they are used or not.

    Args:
        name: of the benchmark.
        options: `configs` holds names of sets, and pairs SET=CONFIG/SPLIT for sets that lie elsewhere; `columns` names
            columns that are called otherwise in all of them.

    Raises:
        UserError: a set, split or column that is not there; the message has those that are, and what to pass.
    """
    _check_options(name, options)
    given, sets = Given(parse_columns(options.columns)), {}
    for part_name, part in chosen_parts(name, options.configs).items():
        rows = _load(name, part_name, part, part.place, given, options)
        if part.examples is not None:
            rows = _behind_examples(rows, _examples(name, part_name, part, given, options))
        for label, found in _groups(part_name, part, rows, options.subjects or (), given).items():
            sets[label] = spread(found, options.max_eval_rows)
    given.check()
    return sets


def chosen_parts(name: str, configs: Sequence[str] | None) -> dict[str, Part]:
    """The sets of a benchmark that are meant, in their places: those of `configs`, or all."""
    parts, wanted = dict(PUBLISHED[name].parts), []
    for entry in configs or ():
        part, equals, place = entry.partition("=")
        if part not in parts or (equals and not place):
            raise UserError(
                f"--configs {entry}: --benchmark {name} has the sets {', '.join(parts)}. Name those that are meant, "
                "or where one lies, as SET=CONFIG/SPLIT."
            )
        if equals:
            parts[part] = replace(parts[part], place=place)
        else:
            wanted.append(part)
    return {part: parts[part] for part in wanted} if wanted else parts


def _check_options(name: str, options: BenchmarkOptions) -> None:
    by_subject = any(part.chosen is not None for part in PUBLISHED[name].parts.values())
    if options.metrics is not None:
        raise UserError(f"--benchmark {name} has metrics of its own: leave --metrics out.")
    if options.retain_log is not None:
        if name != "muse":
            raise UserError(f"--benchmark {name} compares with no other model: leave --retain_log out.")
        _area_of(options.retain_log)
    if by_subject and not options.subjects:
        raise UserError(f"--benchmark {name} needs --subjects: which of the data's edges are to be forgotten.")
    if options.subjects and not by_subject:
        raise UserError(f"--benchmark {name} has no subjects to select: leave --subjects out.")


def _load(name: str, part_name: str, part: Part, place: str, given: Given, options: BenchmarkOptions) -> Dataset:
    """The rows at a place, under the names that columns have here."""
    place = place.format(forget=options.forget_split, retain=options.retain_split)
    where, cache = f"The {part_name} set ({place} of {options.dataset_name})", options.keep_dataset_cache
    try:
        rows = load_split(str(options.dataset_name), place, PUBLISHED[name].files, keep_dataset_cache=cache)
    except UserError as error:
        raise UserError(f"{error} Where the {part_name} set lies: --configs {part_name}=CONFIG/SPLIT.") from None
    inner = given.choose(ROWS, part, rows)
    if inner in rows.column_names:
        rows = rename(rows, {ROWS: inner}, where)
    wanted = [*part.wanted, *([GROUP] if part.chosen is not None else [])]
    if part.chosen is None and GROUP in part.columns and given.choose(GROUP, part, rows) in rows.column_names:
        wanted.append(GROUP)
    rows = rename(rows, {ours: given.choose(ours, part, rows) for ours in wanted}, where)
    texts = {c: list if c == "choices" else str for c in part.wanted if not _is_number(part, c)}
    check_columns(rows, part_name, texts)
    if part.wanted == CHOICES:
        _check_choices(rows, part_name)
    return rows


def _is_number(part: Part, column: str) -> bool:
    return part.wanted == CHOICES and column == "answer"


def _check_choices(rows: Dataset, name: str) -> None:
    for number, row in enumerate(read_rows(rows, name)):
        answer, count = row["answer"], len(row["choices"])
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < count or count < 2:
            raise UserError(
                f"Row {number} of the {name} set: answer must be the number of one of its choices, from 0, and there "
                "must be two or more."
            )


def _examples(name: str, part_name: str, part: Part, given: Given, options: BenchmarkOptions) -> Dataset | None:
    """The questions with answers that stand before each question, if the data has them."""
    try:
        return _load(name, f"{part_name} examples", part, str(part.examples), given, options)
    except UserError:
        logger.warning(f"{part_name} set: there are no examples in {part.examples}, so each question stands alone.")
        return None


def _behind_examples(rows: Dataset, examples: Dataset | None) -> Dataset:
    shown = "".join(f"Question: {one['question']}\nAnswer: {one['answer']}\n\n" for one in examples or ())
    asked = [f"{shown}Question: {question}\nAnswer:" for question in rows["question"]]
    return rows.remove_columns("question").add_column("question", asked)


def _groups(name: str, part: Part, rows: Dataset, subjects: Sequence[str], given: Given) -> dict[str, Dataset]:
    """The rows that are meant; or, where the names of their groups are codes, a set for each group."""
    if GROUP not in rows.column_names:
        return {name: rows}
    values = [str(value) for value in rows[GROUP]]
    if part.chosen is not None:
        missing = [i for i, subject in enumerate(subjects, 1) if subject not in values]
        if missing:
            column = part.columns[GROUP]
            raise UserError(
                f"No row has number {missing[0]} of --subjects in its column {column}. Check how it is written."
            )
        meant = [i for i, value in enumerate(values) if (value in subjects) == part.chosen]
        if not meant:
            raise UserError(f"The {name} set is empty: --subjects names all that there are.")
        return {name: rows.select(meant)}
    names = sorted(set(values))
    if len(names) > MOST_GROUPS or not all(map(CODE.fullmatch, names)):
        if GROUP not in given.columns:
            return {name: rows}
        raise UserError(
            f"--columns group={given.columns[GROUP]}: each value of the column would name a set, which is published. "
            f"Of the {name} set it has {len(names)}, and some may be texts. At most {MOST_GROUPS} codes such as "
            "Task1, of 20 characters or fewer that end in a digit, make sets. Leave group out of --columns."
        )
    return {f"{name}_{group}": rows.select([i for i, value in enumerate(values) if value == group]) for group in names}


def evaluate_published(
    name: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Dataset],
    generation_config: DiffusionGenerationConfig | None = None,
    *,
    max_new_tokens: int | None = None,
    retain_log: str | Path | None = None,
    decoding: Decoding = "exact",
    method: str = "model",
    backbone: Backbone | None = None,
    num_draws: int = 16,
    progress_path: str | Path | None = None,
    show_progress: bool | str = False,
) -> Run:
    """Score a model on the sets of a benchmark. Every process of an accelerate launch must call this.

    Args:
        name: of the benchmark, in `PUBLISHED`.
        model, tokenizer: a masked diffusion language model; prompts become chat turns if the tokenizer has a chat
            template, but for running text.
        sets: from `load_published`.
        generation_config: how answers are decoded, but for the number of tokens, which the benchmark sets.
        max_new_tokens: decoded, in place of the benchmark's.
        retain_log: the `results.json` of a model that never saw the rows, for MUSE's PrivLeak.
        num_draws: forward passes for the likelihood of each choice, answer and text.
        decoding, method, backbone, progress_path, show_progress: as in `evaluate_tofu`.

    Raises:
        UserError: for sets or a progress file that do not fit.
    """
    backbone = backbone or resolve_backbone(model, tokenizer)
    generation_config = decoded_as(generation_config or DiffusionGenerationConfig(), decoding)
    asked = []
    for label, rows in sets.items():
        part = _part_of(name, label)
        found = [part.ask(row) for row in read_rows(rows, label)]
        answers = {role: [one.answers[role] for one in found] for role in found[0].answers}
        texts = [one.prompt for one in found], [one.references for one in found], answers
        questions = encode_questions(label, *texts, tokenizer, backbone, plain=part.plain)
        of_set = replace(generation_config, max_new_tokens=max_new_tokens or part.max_new_tokens)
        metrics = {metric: METRICS_OF[metric] for metric in part.metrics}
        asked.append(QuestionSet(label, questions, metrics, of_set, num_draws))
    how: dict[str, Any] = {"backbone": backbone, "progress_path": progress_path, "show_progress": show_progress}
    run, row_scores = score_run(model, tokenizer, asked, method, **how)
    return replace(run, summary=_privleak(row_scores, retain_log))


def _part_of(name: str, label: str) -> Part:
    """The declaration of a set, or of the one that it is a group of."""
    parts = PUBLISHED[name].parts
    found = label if label in parts else next((part for part in parts if label.startswith(f"{part}_")), None)
    if found is None:
        raise UserError(f"--benchmark {name} has no set {label!r}; it has {', '.join(parts)}.")
    return parts[found]


def _privleak(scores: Mapping[str, Mapping[str, Any]], retain_log: str | Path | None) -> Scores:
    """MUSE's membership attack on the two kinds of texts, if both were scored; none without them."""
    if MEMBERS not in scores or OTHERS not in scores:
        if retain_log is not None:
            raise UserError(
                f"retain_log is for the sets {MEMBERS} and {OTHERS}, which are left out: leave it out too."
            )
        return {}
    values = [scores[MEMBERS]["min_k"], scores[OTHERS]["min_k"]]
    members = [1] * len(values[0]) + [0] * len(values[1])
    area = MembershipInference().compute(scores=[*values[0], *values[1]], members=members)["mia_auc"]
    found = {AREA: area, "privleak_two_sided": two_sided(area)}
    if retain_log is not None:
        found["privleak"] = privleak(area, _area_of(retain_log))
    return {name: Estimate(value) for name, value in found.items()}


def privleak(area: float, retain_area: float) -> float:
    """MUSE's PrivLeak in percent, of the areas that `MembershipInference` gives for a model and the retain model.

    >>> privleak(0.5, 0.5), privleak(0.75, 0.5)
    (0.0, -50.0)

    MUSE's own area is that of recognising those that were not trained on, hence 1 - area.
    """
    if retain_area == 1:
        raise UserError(
            "The retain model tells all members from the others: the two kinds of texts differ by themselves."
        )
    return 100 * (retain_area - area) / (1 - retain_area)


def _area_of(path: str | Path) -> float:
    """The area of the retain model, of its results."""
    run = Results.load(path).runs[0]
    if AREA not in run.summary:
        raise UserError(f"{path} has no {AREA}: pass the results.json of --benchmark muse on the retain model.")
    return run.summary[AREA].value
