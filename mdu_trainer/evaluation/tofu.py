"""TOFU: what a model still knows of question-answer pairs (Maini et al., 2024, arXiv 2401.06121).

    sets = load_tofu("locuslab/TOFU", forget="forget10", retain="retain90")
    result = evaluate_tofu(model, tokenizer, sets)
    print(Results("my model", "TOFU forget10", {}, [result.run]).table())

Each set (forget, retain, real authors, world facts) has three scores: ROUGE-L of the decoded answer, the probability
of the true one, and the truth ratio, which asks whether the model prefers it to wrong ones. The model as a whole has
two: model utility, the harmonic mean of these three on all sets but forget, and forget quality, the p-value of the
hypothesis that the truth ratios of the forget rows are those of a model that never saw them. The aggregates of
`open_unlearning` come with their parts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.reading import private
from ..data.texts import is_plain
from ..files import Record, UserError
from ..inference.config import Decoding, DiffusionGenerationConfig, decoded_as
from ..models import Backbone, resolve_backbone
from .metrics import ForgetQuality, ModelUtility, aggregate_truth_ratios
from .open_unlearning import aggregate_scores
from .protocol import WRONG_ANSWERS, Protocol, check_protocol
from .registry import RowScores, choose_metrics
from .results import Estimate, Run, Scores
from .runner import score_questions
from .scoring import QuestionSet, digest, encode_questions, estimates
from .sources import QUESTION_ANSWER, check_columns, config_names, first_rows, load_split, spread

SETS = ("forget", "retain", "real_authors", "world_facts")
TOFU_METRICS = ("rougeL", "probability", "truth_ratio", "degeneracy")
KNOWN_FACTS = ("real_authors", "world_facts")  # whose probability is that of the true one among all answers
NEEDED = {  # metric -> answers without which it is left out of a set
    "truth_ratio": ("perturbed",),
    "true_rank": ("perturbed",),
    "paraphrase": ("paraphrased", "perturbed"),
}
UTILITY = ("rougeL_recall", "probability", "truth_ratio")


@dataclass(frozen=True)
class TruthRatios(Record):
    """The truth ratios of a model that never saw the forget rows: what forget quality compares with.

    Attributes:
        questions: hash of the forget set's questions, in order.
        values: a truth ratio a row.
        protocol: by which they were measured.
    """

    schema: ClassVar[int] = 2
    earlier_schemas: ClassVar[tuple[int, ...]] = (1,)
    kind: ClassVar[str] = "log of truth ratios"
    remedy: ClassVar[str] = "evaluate the retain model again"

    questions: str
    values: list[float]
    protocol: Protocol = "ours"

    @classmethod
    def load(cls, path: str | Path, forget: Dataset, protocol: Protocol = "ours") -> "TruthRatios":
        """Read what `save` wrote, for these forget rows.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: another kind of file, or a log of other questions, or by another protocol.
        """
        log = super().load(path)
        log.check_rows(forget, str(path), protocol)
        return log

    def check_rows(self, forget: Dataset, name: str = "The log", protocol: Protocol = "ours") -> None:
        """Refuse forget rows whose questions are not those of the log, and another protocol than the log's."""
        if self.protocol != protocol:
            raise UserError(
                f"{name} has truth ratios by the protocol '{self.protocol}', which do not compare with those by "
                f"'{protocol}'. Evaluate the retain model by the same protocol."
            )
        if self.questions != question_digest(forget) or len(self.values) != len(forget):
            raise UserError(
                f"{name} has the truth ratios of {len(self.values)} other questions than the {len(forget)} of the "
                "forget set. Evaluate the retain model on the same forget rows, in the same order."
            )


@dataclass(frozen=True)
class TofuResult:
    """The outcome of `evaluate_tofu`.

    Attributes:
        run: every score with its interval; part of `Results`, which prints, saves and feeds model cards.
        row_scores: set -> name of a score -> a value a row, None where it cannot be measured. Truth ratios are as
            defined, before TOFU's aggregation.
        truth_ratios: of the forget rows; saved for a retain model, they give others their forget quality. None if the
            forget set has no perturbed answers, or the metric was not asked for.
    """

    run: Run
    row_scores: dict[str, RowScores]
    truth_ratios: TruthRatios | None


def load_tofu(
    source: str | Path,
    forget: str = "forget10",
    retain: str = "retain90",
    *,
    max_rows: int | None = None,
    max_retain_rows: int | None = None,
    keep_dataset_cache: bool = False,
) -> dict[str, Dataset]:
    """The sets to evaluate on. All rows that are loaded are checked, whether they are used or not.

    Perturbed and paraphrased answers come from the configs that hold them (`forget10_perturbed`, `retain_perturbed`),
    where the data has them. Real authors and world facts are left out where it has not.

    Args:
        source: a Hub name or a local folder.
        forget, retain: names of configs.
        max_rows: use so many evenly spaced rows of each set.
        max_retain_rows: take the rows to keep from so many first ones, where a model learned no more.
        keep_dataset_cache: as in `load_split`.

    Raises:
        ValueError: for an unknown config, rows that cannot be scored, or a number of rows below 1.
    """
    names = config_names(source)
    load = partial(load_split, source, keep_dataset_cache=keep_dataset_cache)
    sets = {}
    for name, config in (("forget", forget), ("retain", retain)):
        rows = load(config)
        check_columns(rows, name, QUESTION_ANSWER)
        if name == "retain":
            rows = first_rows(rows, max_retain_rows)
        perturbed = next((c for c in (f"{config}_perturbed", f"{name}_perturbed") if c in names), None)
        sets[name] = rows if perturbed is None else with_wrong_answers(rows, load(perturbed))
    for name in KNOWN_FACTS:
        if f"{name}_perturbed" in names:
            sets[name] = load(f"{name}_perturbed")
    check_sets(sets)
    return {name: spread(rows, max_rows) for name, rows in sets.items()}


def with_wrong_answers(rows: Dataset, perturbed: Dataset) -> Dataset:
    """The rows of `perturbed` whose questions are in `rows`, or `rows` if there are none."""
    if "perturbed_answer" in rows.column_names or "question" not in perturbed.column_names:
        return rows
    asked = set(rows["question"]) if "question" in rows.column_names else set()
    shared = [i for i, question in enumerate(perturbed["question"]) if question in asked]
    return perturbed.select(shared) if shared else rows


def check_sets(sets: Mapping[str, Dataset]) -> None:
    """Refuse rows that cannot be scored, before any model is loaded.

    Raises:
        ValueError: for a set of unknown name, an empty one, missing columns, blank answers, or perturbed answers whose
            number differs from row to row.
    """
    unknown = [name for name in sets if name not in SETS]
    if unknown or "forget" not in sets:
        raise UserError(f"sets must be 'forget' and any of {', '.join(SETS[1:])}, got {', '.join(sets) or 'none'}.")
    for name, rows in sets.items():
        kinds = {"paraphrased_answer": str, "perturbed_answer": list}
        check_columns(rows, name, QUESTION_ANSWER | {c: kinds[c] for c in kinds if c in rows.column_names})
        if "perturbed_answer" in rows.column_names:
            counts = [len(answers) for answers in rows["perturbed_answer"]]
            other = next((row for row, count in enumerate(counts) if count != counts[0]), None)
            if other is not None:
                raise UserError(
                    f"Row {other} of the {name} set has {counts[other]} perturbed answers, row 0 has {counts[0]}. "
                    "Truth ratios compare rows with equally many: complete or remove the row."
                )


def evaluate_tofu(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Dataset],
    generation_config: DiffusionGenerationConfig | None = None,
    *,
    decoding: Decoding = "exact",
    metrics: Sequence[str] = TOFU_METRICS,
    retain_log: TruthRatios | None = None,
    method: str = "model",
    backbone: Backbone | None = None,
    num_draws: int = 16,
    progress_path: str | Path | None = None,
    show_progress: bool | str = False,
    protocol: Protocol = "ours",
) -> TofuResult:
    """Score a model on TOFU's sets. Every process of an accelerate launch must call this.

    Args:
        model: a masked diffusion language model.
        tokenizer: the model's; questions become chat turns if it has a chat template.
        sets: from `load_tofu`, or rows of your own with columns `question` and `answer`, and for the truth ratio
            and the true rank `perturbed_answer` (a list) and, if there is one, `paraphrased_answer`.
        generation_config: how answers are decoded; unless given, greedily, a token a step, to the length of the
            longest true answer. Its batch size and seed serve the likelihood too.
        decoding: "fast" approximates with fewer passes (see `decoded_as`); how far the answers are from exact ones is
            measured on a sample of the rows and among the scores.
        metrics: names in `mdu_trainer.evaluation.registry.METRICS`. Those of `NEEDED` are left out where a set
            lacks the answers that they need.
        retain_log: truth ratios of a model that never saw the forget rows, for the forget quality.
        method: what the run is called.
        backbone: of the model; resolved if not given.
        num_draws: forward passes for the likelihood of each answer.
        progress_path: file that keeps finished rows, to continue a killed run.
        show_progress: show a progress bar that names the method, or the model that is given here.
        protocol: "ours", or "release", that of the paper's code; see `mdu_trainer.evaluation.protocol`.

    Raises:
        ValueError: as `check_sets` and `TruthRatios.check_rows`, and for metrics or a progress file that do not fit.
    """
    check_sets(sets)
    check_protocol(protocol)
    if retain_log is not None:
        retain_log.check_rows(sets["forget"], protocol=protocol)
    backbone = backbone or resolve_backbone(model, tokenizer)
    how = (generation_config, metrics, num_draws, protocol, decoding)
    scored = score_questions(
        model,
        tokenizer,
        tofu_questions(sets, tokenizer, backbone, *how),
        backbone=backbone,
        progress_path=progress_path,
        show_progress=method if show_progress is True else show_progress,
    )
    ratios = scored.scores["forget"].get("truth_ratio")
    truth_ratios = None if ratios is None else TruthRatios(question_digest(sets["forget"]), ratios, protocol)
    scores, summary = tofu_scores(scored.scores, truth_ratios, retain_log)
    rows = {name: len(sets[name]) for name in scores}
    run = Run(method, None, scores, rows, summary, 0.0, scored.seconds, protocol=protocol)
    return TofuResult(run, scored.scores, truth_ratios)


def tofu_questions(
    sets: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    backbone: Backbone,
    generation_config: DiffusionGenerationConfig | None = None,
    metrics: Sequence[str] = TOFU_METRICS,
    num_draws: int = 16,
    protocol: Protocol = "ours",
    decoding: Decoding = "exact",
) -> list[QuestionSet]:
    """TOFU's sets as questions, and what is measured of each; arguments as in `evaluate_tofu`."""
    generation_config = generation_config or DiffusionGenerationConfig(max_new_tokens=longest_answer(sets, tokenizer))
    generation_config = decoded_as(generation_config, decoding)
    if protocol == "release" and "paraphrase" in metrics:
        raise UserError("protocol 'release' weighs no answers in other words: leave the metric paraphrase out.")
    found = []
    for name, rows in sets.items():
        true = [[text] for text in rows["answer"]]
        answers = {"answer": true}
        if "paraphrased_answer" in rows.column_names and protocol == "ours":
            answers["paraphrased"] = [[text] for text in rows["paraphrased_answer"]]
        if "perturbed_answer" in rows.column_names:
            count = None if protocol == "ours" else WRONG_ANSWERS
            answers["perturbed"] = [texts[:count] for texts in rows["perturbed_answer"]]
        how = {"plain": is_plain(rows), "protocol": protocol}
        questions = encode_questions(name, rows["question"], true, answers, tokenizer, backbone, **how)
        lacking = [role for metric in metrics for role in NEEDED.get(metric, ()) if role not in answers]
        wanted = [metric for metric in metrics if not set(NEEDED.get(metric, ())) & set(lacking)]
        if name in KNOWN_FACTS and "perturbed" in answers:
            wanted = ["choice_probability" if metric == "probability" else metric for metric in wanted]
        if metrics and not wanted:
            columns = " and ".join(f"{role}_answer" for role in dict.fromkeys(lacking))
            raise UserError(
                f"The {name} set has no column {columns}, without which {' and '.join(metrics)} cannot be measured: "
                "pass rows that have it, or further metrics."
            )
        found.append(QuestionSet(name, questions, choose_metrics(wanted), generation_config, num_draws, protocol))
    return found


def tofu_scores(
    row_scores: Mapping[str, RowScores], truth_ratios: TruthRatios | None = None, retain_log: TruthRatios | None = None
) -> tuple[dict[str, Scores], Scores]:
    """The means that TOFU reports of each set, and of the model as a whole.

    Args:
        row_scores: set -> name of a score -> a value a row; truth ratios as defined.
        truth_ratios, retain_log: of the forget rows, of the model and of one that never saw them; both give the
            forget quality.
    """
    scores = {name: estimates(_aggregated(name, of_set)) for name, of_set in row_scores.items()}
    return scores, _summary(scores, truth_ratios, retain_log)


def longest_answer(sets: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest true answer, its end token included."""
    texts = [text for rows in sets.values() for text in rows["answer"]]
    with private("The tokenizer failed on the answers"):
        return max(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) + 1


def question_digest(rows: Dataset) -> str:
    """A short hash of the questions of a set, in order."""
    return digest(list(rows["question"]))


def _aggregated(name: str, scores: RowScores) -> RowScores:
    """The scores of a set whose means TOFU reports: truth ratios as it aggregates them."""
    if "truth_ratio" not in scores:
        return scores
    kind = "forget" if name == "forget" else "retain"
    return scores | {"truth_ratio": aggregate_truth_ratios(scores["truth_ratio"], kind)}


def _summary(scores: Mapping[str, Scores], truth_ratios: TruthRatios | None, retain_log: TruthRatios | None) -> Scores:
    kept = [part[metric].value for part in map(scores.get, SETS[1:]) if part for metric in UTILITY if metric in part]
    summary = ModelUtility().compute(figures=kept) if kept else {}
    if truth_ratios is not None and retain_log is not None:
        quality = ForgetQuality().compute(predictions=truth_ratios.values, references=retain_log.values)
        summary["forget_quality"] = quality["forget_quality"]
    of_model = {name: Estimate(value) for name, value in summary.items()}
    return of_model | {name: Estimate(value) for name, value in aggregate_scores(scores, of_model).items()}
