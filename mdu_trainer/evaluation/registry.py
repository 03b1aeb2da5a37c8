"""Metrics and benchmarks by name, and their scores in words. One of your own is a function and a line, also from
outside the package:

    def brevity(batch):
        return {"brevity": [1 / (1 + len(text)) for text in batch.texts]}

    register_metric("brevity", Metric(brevity, words={"brevity": "how short answers are, between 0 and 1"}))

Then `evaluate_tofu(..., metrics=["rougeL", "brevity"])` computes it, and cards and pages explain it. What this package
measures itself is registered by `scoring` and `benchmarks`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from ..files import UserError
from ..inference.config import DECODING_HELP, Decoding
from .protocol import Choices, Protocol, Rouge

RowScores = dict[str, list[float | None]]  # name -> a value a row, None where it cannot be measured


@dataclass(frozen=True)
class Metric:
    """A metric of answers, as it is registered.

    Attributes:
        compute: from a `scoring.QuestionBatch` to its scores: name -> a value a row, None where it cannot be measured.
        roles: of the answers whose likelihood it needs.
        words: score -> what it is, in a line for cards and pages.
        titles: score -> its short name, for scores that have columns of their own in `Results.table`.
    """

    compute: Callable[[Any], RowScores]
    roles: tuple[str, ...] = ()
    words: Mapping[str, str] = field(default_factory=dict)
    titles: Mapping[str, str] = field(default_factory=dict)


@dataclass
class BenchmarkOptions:
    """The options of all benchmarks. Each reads those that it has a use for."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub name or folder of the benchmark."})
    forget_split: str = field(default="forget10", metadata={"help": "TOFU: config name of the rows to forget."})
    retain_split: str = field(default="retain90", metadata={"help": "TOFU: config name of the rows to keep."})
    forget: str | None = field(
        default=None, metadata={"help": "Rows of your own to forget: a file, or DATASET[:CONFIG]."}
    )
    retain: str | None = field(default=None, metadata={"help": "Your own rows to keep, in the same form."})
    columns: str | None = field(
        default=None, metadata={"help": "Columns that are called otherwise, as in prompt=input,completion=output."}
    )
    subjects: list[str] | None = field(
        default=None, metadata={"help": "RWKU: whom to forget; everybody if unset. PISTOL: which edges."}
    )
    configs: list[str] | None = field(
        default=None, metadata={"help": "Names of a benchmark's sets, or SET=CONFIG/SPLIT; all if unset."}
    )
    metrics: list[str] | None = field(
        default=None, metadata={"help": "TOFU: what is measured; the benchmark's own metrics if unset."}
    )
    max_eval_rows: int | None = field(default=400, metadata={"help": "Score N evenly spaced rows of each set."})
    batch_size: int = field(default=32, metadata={"help": "Sequences a forward pass."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Decoded tokens; TOFU: the longest answer, RWKU: the protocol's, if unset."}
    )
    decoding_steps: int | None = field(default=None, metadata={"help": "Decoding steps; one a token if unset."})
    decoding: Decoding = field(default="exact", metadata={"help": DECODING_HELP})
    likelihood_draws: int = field(default=16, metadata={"help": "Passes an answer for its likelihood."})
    seed: int = field(default=0, metadata={"help": "Of the draws."})
    protocol: Protocol = field(
        default="ours", metadata={"help": "Ask and score as we do, or as the release of the MDU paper does."}
    )
    choices: Choices | None = field(
        default=None,
        metadata={"help": "RWKU: how choices are scored; likelihood, by the release generated, if unset."},
    )
    rouge: Rouge = field(default="recall", metadata={"help": "What tables and pictures show as rL of ROUGE-L."})
    retain_log: str | None = field(
        default=None, metadata={"help": "truth_ratios.json of a model of the rows to keep; adds the forget quality."}
    )
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Folder of results and progress."})
    keep_dataset_cache: bool = field(
        default=False, metadata={"help": "Let `datasets` keep the rows in its cache, in plain text."}
    )


@dataclass(frozen=True)
class Benchmark:
    """Questions to ask of a model, as they are registered.

    Attributes:
        load: `(BenchmarkOptions) -> {set: rows}`, checked, before any model is loaded.
        evaluate: `(model, tokenizer, sets, BenchmarkOptions) -> Run`. Every process of a launch calls it.
        source: where its data is on the Hub; None if it needs no `dataset_name`.
        words: score -> what it is, for scores that are no metric's: those of the model as a whole, say.
        reads_splits: whether `forget_split` and `retain_split` name its rows.
        maps_columns: whether `columns` may give its columns other names.
    """

    load: Callable[[BenchmarkOptions], dict[str, Dataset]]
    evaluate: Callable[[Any, Any, Mapping[str, Dataset], BenchmarkOptions], Any]
    source: str | None = None
    words: Mapping[str, str] = field(default_factory=dict)
    reads_splits: bool = False
    maps_columns: bool = False


METRICS: dict[str, Metric] = {}
BENCHMARKS: dict[str, Benchmark] = {}


def register_metric(name: str, metric: Metric) -> None:
    """Make a metric of your own available by name, in evaluations, the scripts, tables, cards and pages.

    Raises:
        UserError: the name is taken, or a score of it is explained already.
    """
    taken = set(metric.titles.values()) & set(score_titles().values())
    if taken:
        raise UserError(f"Columns are called {', '.join(sorted(taken))} already: give {name!r} other titles.")
    _register(METRICS, "metric", name, metric)


def register_benchmark(name: str, benchmark: Benchmark) -> None:
    """Make a benchmark of your own available to `examples/score.py`, and its scores explained on cards and pages.

    Raises:
        UserError: the name is taken, or a score of it is explained already.
    """
    _register(BENCHMARKS, "benchmark", name, benchmark)


def choose_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """Metrics by their names. No name, or one that is unknown, is a ValueError."""
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise UserError(f"Unknown metrics: {', '.join(unknown) or 'none given'}. Choose from {', '.join(METRICS)}.")
    return {name: METRICS[name] for name in names}


def score_words() -> dict[str, str]:
    """Explain each score of all metrics and benchmarks that are registered now, in a line."""
    return {score: text for one in (*METRICS.values(), *BENCHMARKS.values()) for score, text in one.words.items()}


def explained(scores: Iterable[str]) -> dict[str, str]:
    """The scores of these that `score_words` explains, in their order, and how."""
    words = score_words()
    return {score: words[score] for score in scores if score in words}


def score_titles() -> dict[str, str]:
    """Short names of the scores that have columns of their own in tables."""
    return {score: title for metric in METRICS.values() for score, title in metric.titles.items()}


def _register(registry: dict[str, Any], kind: str, name: str, entry: Metric | Benchmark) -> None:
    if name in registry:
        raise UserError(f"There is a {kind} {name!r} already. Choose another name.")
    explained = sorted(set(entry.words) & set(score_words()))
    if explained:
        raise UserError(
            f"The {kind} {name!r} explains {', '.join(explained)}, a score of another one already. Choose other names."
        )
    registry[name] = entry
