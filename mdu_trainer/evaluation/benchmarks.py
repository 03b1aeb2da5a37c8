"""The benchmarks that are registered from the start: TOFU, RWKU, those of `published_sets`, rows of one's own, the
embedded fictional authors.

options = BenchmarkOptions(dataset_name="locuslab/TOFU")
sets = BENCHMARKS["tofu"].load(options)
run = BENCHMARKS["tofu"].evaluate(model, tokenizer, sets, options)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..files import UserError
from ..inference.generation import DiffusionGenerationConfig
from ..testing import fictional_authors, forget_retain_split
from .open_unlearning import AGGREGATE_WORDS
from .own_rows import load_own_rows
from .protocol import check_protocol
from .published import WORDS, evaluate_published, load_published
from .published_sets import PUBLISHED
from .registry import Benchmark, BenchmarkOptions, register_benchmark
from .results import Run
from .runner import processes
from .rwku import evaluate_rwku, load_rwku
from .sources import spread
from .tofu import TOFU_METRICS, TruthRatios, evaluate_tofu, load_tofu, longest_answer

TRUTH_RATIOS = "truth_ratios.json"


def fictional_sets(max_rows: int | None = None) -> dict[str, Dataset]:
    """The embedded fictional authors to forget and to keep: at most `max_rows` evenly spaced rows of each."""
    forget, retain = forget_retain_split(fictional_authors())
    return {"forget": spread(forget, max_rows), "retain": spread(retain, max_rows)}


def _load_fictional(options: BenchmarkOptions) -> dict[str, Dataset]:
    sets = fictional_sets(options.max_eval_rows)
    _retain_log(options, sets)
    return sets


def _load_tofu(options: BenchmarkOptions) -> dict[str, Dataset]:
    sets = load_tofu(
        options.dataset_name,
        options.forget_split,
        options.retain_split,
        max_rows=options.max_eval_rows,
        keep_dataset_cache=options.keep_dataset_cache,
    )
    _retain_log(options, sets)
    return sets


def _load_own(options: BenchmarkOptions) -> dict[str, Dataset]:
    rows = load_own_rows(options.forget, options.retain, options.keep_dataset_cache, options.columns)
    sets = {name: spread(part, options.max_eval_rows) for name, part in rows.items()}
    _retain_log(options, sets)
    return sets


def _load_rwku(options: BenchmarkOptions) -> dict[str, Dataset]:
    if options.retain_log is not None:
        raise UserError("retain_log is for the truth ratios of TOFU, which RWKU does not have. Leave it out.")
    check_protocol(options.protocol, options.choices)
    return load_rwku(
        options.dataset_name,
        options.configs,
        options.subjects,
        options.max_eval_rows,
        keep_dataset_cache=options.keep_dataset_cache,
        protocol=options.protocol,
    )


def _evaluate_tofu(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, sets: Mapping[str, Dataset], options: BenchmarkOptions
) -> Run:
    """Score the sets; the truth ratios are saved for others to compare with."""
    metrics, log = TOFU_METRICS if options.metrics is None else options.metrics, _retain_log(options, sets)
    length = options.max_new_tokens or longest_answer(sets, tokenizer)
    shared = _shared(options, max_new_tokens=length)
    result = evaluate_tofu(model, tokenizer, sets, metrics=metrics, retain_log=log, **shared)
    if result.truth_ratios is not None and processes().is_main_process:
        result.truth_ratios.save(Path(options.output_dir) / TRUTH_RATIOS)
    return result.run


def _evaluate_rwku(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, sets: Mapping[str, Dataset], options: BenchmarkOptions
) -> Run:
    lengths = {"max_new_tokens": options.max_new_tokens}
    return evaluate_rwku(model, tokenizer, sets, choices=options.choices, **lengths, **_shared(options))


def _register_published(name: str) -> None:
    def load(options: BenchmarkOptions) -> dict[str, Dataset]:
        if options.protocol != "ours" or options.choices is not None:
            raise UserError(f"protocol and choices are of TOFU and RWKU; {name} has neither. Leave them out.")
        return load_published(name, options)

    def evaluate(
        model: nn.Module, tokenizer: PreTrainedTokenizerBase, sets: Mapping[str, Dataset], options: BenchmarkOptions
    ) -> Run:
        how = _shared(options) | {"max_new_tokens": options.max_new_tokens, "retain_log": options.retain_log}
        del how["protocol"]  # `load` takes none but ours
        return evaluate_published(name, model, tokenizer, sets, **how)

    reads_splits = any("{forget}" in part.place for part in PUBLISHED[name].parts.values())
    words = WORDS if name == "muse" else {}
    register_benchmark(name, Benchmark(load, evaluate, PUBLISHED[name].hub, words, reads_splits, maps_columns=True))


def _retain_log(options: BenchmarkOptions, sets: Mapping[str, Dataset]) -> TruthRatios | None:
    """The truth ratios of a model that never saw the rows, once it is clear that they are of these rows."""
    if options.choices is not None:
        raise UserError("choices is for the multiple choice of RWKU, which there is none of here. Leave it out.")
    return TruthRatios.load(options.retain_log, sets["forget"], options.protocol) if options.retain_log else None


def _shared(options: BenchmarkOptions, **decoding: Any) -> dict[str, Any]:
    """The arguments that all evaluations take."""
    shared = {"steps": options.decoding_steps, "batch_size": options.batch_size, "seed": options.seed}
    return {
        "generation_config": DiffusionGenerationConfig(**shared, **decoding),
        "decoding": options.decoding,
        "num_draws": options.likelihood_draws,
        "progress_path": Path(options.output_dir) / "rows.jsonl",
        "show_progress": True,
        "protocol": options.protocol,
    }


register_benchmark(
    "tofu",
    Benchmark(
        _load_tofu,
        _evaluate_tofu,
        source="locuslab/TOFU",
        reads_splits=True,
        words={
            "model_utility": "harmonic mean of the figures of the sets to keep",
            "forget_quality": "p-value of the hypothesis that the truth ratios are those of a model that never saw "
            "the rows",
            **AGGREGATE_WORDS,
        },
    ),
)
register_benchmark(
    "rwku",
    Benchmark(
        _load_rwku,
        _evaluate_rwku,
        source="jinzhuoran/RWKU",
        words={
            "accuracy": "share of multiple-choice questions of which a true choice is the likeliest",
            "letter_accuracy": "share of multiple-choice questions that the first generated letter answers",
            "substring_match": "share of questions of which an answer occurs in the decoded text",
        },
    ),
)
register_benchmark("fictional", Benchmark(_load_fictional, _evaluate_tofu))
for _name in PUBLISHED:
    _register_published(_name)
register_benchmark("own", Benchmark(_load_own, _evaluate_tofu, maps_columns=True))
