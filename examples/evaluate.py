"""Score a checkpoint: TOFU, RWKU or the embedded fictional authors.

    python examples/evaluate.py --model_name_or_path outputs/demo/mdu-tau0 --benchmark fictional \\
        --baseline outputs/demo/results.json
    accelerate launch examples/evaluate.py --model_name_or_path PATH --dtype bfloat16 --benchmark tofu \\
        --dataset_name locuslab/TOFU --forget_split forget10 --retain_split retain90
    accelerate launch examples/evaluate.py --model_name_or_path PATH --dtype bfloat16 --benchmark rwku \\
        --dataset_name jinzhuoran/RWKU --subjects "Stephen King"

PATH is a model or a folder with an adapter. Finished rows are kept in the output folder as figures, so a killed run
continues where it stopped when the same command is given again. Processes share the rows; the figures are those of
one.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from common import DataArguments, check_models, forget_and_retain, load, settings
from datasets import Dataset
from trl import ModelConfig

from mdu_trainer import DiffusionGenerationConfig
from mdu_trainer.commands import run
from mdu_trainer.commands.checks import check_least, check_not_written, check_once, check_output_folder, check_source
from mdu_trainer.commands.options import parse_options
from mdu_trainer.evaluation.results import Results, Run
from mdu_trainer.evaluation.runner import processes
from mdu_trainer.evaluation.rwku import evaluate_rwku, load_rwku
from mdu_trainer.evaluation.scoring import choose_metrics
from mdu_trainer.evaluation.tofu import TOFU_METRICS, TruthRatios, evaluate_tofu, longest_answer
from mdu_trainer.files import UserError


@dataclass
class EvaluationArguments(DataArguments):
    """What to score a model on, and how."""

    benchmark: str = field(
        default="fictional", metadata={"help": "Questions to ask.", "choices": ["tofu", "rwku", "fictional"]}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Hub name or folder of TOFU or RWKU."})
    forget_split: str = field(default="forget10", metadata={"help": "TOFU: config name of the rows to forget."})
    retain_split: str = field(default="retain90", metadata={"help": "TOFU: config name of the rows to keep."})
    subjects: list[str] | None = field(default=None, metadata={"help": "RWKU: whom to forget; everybody if unset."})
    configs: list[str] | None = field(default=None, metadata={"help": "RWKU: names of configs; all if unset."})
    metrics: list[str] = field(
        default_factory=lambda: list(TOFU_METRICS), metadata={"help": "TOFU: what is measured."}
    )
    max_rows: int | None = field(default=400, metadata={"help": "Score N evenly spaced rows of each set."})
    batch_size: int = field(default=32, metadata={"help": "Sequences a forward pass."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "TOFU: decoded tokens; the longest answer."})
    decoding_steps: int | None = field(default=None, metadata={"help": "Decoding steps; one a token if unset."})
    likelihood_draws: int = field(default=16, metadata={"help": "Passes an answer for its likelihood."})
    seed: int = field(default=0, metadata={"help": "Of the draws."})
    retain_log: str | None = field(
        default=None, metadata={"help": "truth_ratios.json of a model of the rows to keep; adds the forget quality."}
    )
    baseline: str | None = field(default=None, metadata={"help": "results.json to print the change from."})
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Folder of results and progress."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether the model may run code of its own."})


def load_sets(args: EvaluationArguments) -> dict[str, Dataset]:
    """The rows of the benchmark, checked."""
    if args.benchmark == "fictional":
        return forget_and_retain(None, args.forget_split, args.retain_split, args.max_rows)
    if args.dataset_name is None:
        name = {"tofu": "locuslab/TOFU", "rwku": "jinzhuoran/RWKU"}[args.benchmark]
        raise UserError(f"--benchmark {args.benchmark} needs --dataset_name: {name}, or a folder with a copy.")
    if args.benchmark == "rwku":
        cache = {"keep_dataset_cache": args.keep_dataset_cache}
        return load_rwku(args.dataset_name, args.configs, args.subjects, args.max_rows, **cache)
    splits = (args.forget_split, args.retain_split)
    return forget_and_retain(args.dataset_name, *splits, args.max_rows, args.keep_dataset_cache)


def evaluate(
    args: EvaluationArguments, model_args: ModelConfig, sets: dict[str, Dataset], retain_log: TruthRatios | None
) -> Run:
    """Load the model and score it; a TOFU run's truth ratios are saved for others."""
    folder = Path(args.output_dir)
    model, tokenizer = load(model_args.model_name_or_path, model_args, args.trust_remote_code)
    decoding = {"steps": args.decoding_steps, "batch_size": args.batch_size, "seed": args.seed}
    shared = {
        "num_draws": args.likelihood_draws,
        "progress_path": folder / "rows.jsonl",
        "method": Path(model_args.model_name_or_path).name,
        "show_progress": True,
    }
    if args.benchmark == "rwku":
        return evaluate_rwku(model, tokenizer, sets, DiffusionGenerationConfig(**decoding), **shared)
    length = args.max_new_tokens or longest_answer(sets, tokenizer)
    decoding = DiffusionGenerationConfig(max_new_tokens=length, **decoding)
    result = evaluate_tofu(model, tokenizer, sets, decoding, metrics=args.metrics, retain_log=retain_log, **shared)
    if result.truth_ratios is not None and processes().is_main_process:
        result.truth_ratios.save(folder / "truth_ratios.json")
    return result.run


def check(args: EvaluationArguments, model_args: ModelConfig) -> None:
    """Refuse options that are wrong before anything is loaded."""
    if model_args.model_name_or_path is None:
        raise UserError("Which model? Pass --model_name_or_path.")
    check_output_folder(args.output_dir)
    check_once(args, "subjects", "configs", "metrics")
    choose_metrics(args.metrics)
    positive = ("max_rows", "batch_size", "max_new_tokens", "decoding_steps", "likelihood_draws")
    check_least(args, **dict.fromkeys(positive, 1), seed=0)
    if args.dataset_name is not None:
        check_source(args.dataset_name, "dataset_name")
    folder = Path(args.output_dir)
    check_not_written([args.baseline, args.retain_log], [folder / "results.json", folder / "truth_ratios.json"])


def main(args: EvaluationArguments, model_args: ModelConfig) -> None:
    check(args, model_args)
    sets = load_sets(args)
    baseline = Results.load(args.baseline) if args.baseline else None
    retain_log = TruthRatios.load(args.retain_log, sets["forget"]) if args.retain_log else None
    check_models(model_args, model_name_or_path=model_args.model_name_or_path)
    scored = evaluate(args, model_args, sets, retain_log)
    if not processes().is_main_process:
        return
    data = args.benchmark if args.benchmark == "fictional" else f"{args.dataset_name} {args.forget_split}"
    results = Results(model_args.model_name_or_path, data, settings(args), [scored])
    results.save(Path(args.output_dir) / "results.json")
    print(f"\n{results.details()}")
    if baseline is not None:
        print(f"\nChange from {baseline.runs[0].name} of {args.baseline}:\n\n{scored.change(baseline.runs[0])}")
    print(f"\nWritten to {args.output_dir}")


def command() -> None:
    """The script as it is called."""
    main(*parse_options(EvaluationArguments, ModelConfig))


if __name__ == "__main__":
    sys.exit(run(command))
