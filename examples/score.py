"""Score a checkpoint: on TOFU, RWKU, rows of your own or the embedded fictional authors.

    python examples/score.py --model_name_or_path outputs/demo/mdu-tau0 --benchmark fictional \\
        --baseline outputs/demo/results.json
    python examples/score.py --model_name_or_path PATH --forget forget.jsonl --retain retain.jsonl
    accelerate launch examples/score.py --model_name_or_path PATH --dtype bfloat16 --benchmark tofu \\
        --dataset_name locuslab/TOFU --forget_split forget10 --retain_split retain90
    accelerate launch examples/score.py --model_name_or_path PATH --dtype bfloat16 --benchmark rwku \\
        --dataset_name jinzhuoran/RWKU --subjects "Stephen King"

PATH is a model or a folder with an adapter. Finished rows are kept in the output folder as figures, so a killed run
continues where it stopped when the same command is given again. Processes share the rows; the figures are those of
one. `--along_path N` also computes TOFU's metrics at N moments of the denoising path.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from trl import ModelConfig

from mdu_trainer.commands import run
from mdu_trainer.commands.along_path import check_along_path, save_path, score_path
from mdu_trainer.commands.checks import check_least, check_not_written, check_once, check_output_folder, check_source
from mdu_trainer.commands.loading import check_model, load
from mdu_trainer.commands.options import parse_options, settings
from mdu_trainer.commands.summary import attack_command, summary
from mdu_trainer.evaluation.benchmarks import TRUTH_RATIOS
from mdu_trainer.evaluation.registry import BENCHMARKS, BenchmarkOptions, choose_metrics
from mdu_trainer.evaluation.results import Results, today
from mdu_trainer.evaluation.runner import processes
from mdu_trainer.files import UserError
from mdu_trainer.token_roles.path_results import PathScores

ATTACKED = ("fictional", "own", "tofu")  # of pairs: examples/attack.py takes their rows, and --along_path


@dataclass
class ScoreArguments(BenchmarkOptions):
    """What to score a model on, and how."""

    benchmark: str | None = field(
        default=None,
        metadata={"help": "Questions to ask; own with --forget, fictional if unset.", "choices": BENCHMARKS.keys()},
    )
    baseline: str | None = field(default=None, metadata={"help": "results.json to print the change from."})
    along_path: int | None = field(
        default=None,
        metadata={
            "help": "Also score at N moments of the denoising path, and tokens as they are fixed: up to N forward "
            "passes a row and answer (true and wrong ones), one a token of it, and a decoding with N passes a row."
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether the model may run code of its own."})


def check(args: ScoreArguments, model_args: ModelConfig) -> PathScores | None:
    """Refuse options that are wrong before anything is loaded. Returns the baseline's scores along the path."""
    check_model(model_args)
    args.benchmark = args.benchmark or ("fictional" if args.forget is None else "own")
    if args.columns is not None and not BENCHMARKS[args.benchmark].maps_columns:
        raise UserError(f"--benchmark {args.benchmark} reads its columns by their own names: leave --columns out.")
    if args.forget is not None and args.benchmark != "own":
        raise UserError(f"--benchmark {args.benchmark} has other questions than --forget names: leave one out.")
    check_output_folder(args.output_dir)
    check_once(args, "subjects", "configs", "metrics")
    if args.metrics is not None:
        choose_metrics(args.metrics)
    if args.protocol != "ours" and args.benchmark not in (*ATTACKED, "rwku"):
        raise UserError(f"--benchmark {args.benchmark} has no protocol but its own: leave --protocol out.")
    positive = ("max_eval_rows", "batch_size", "max_new_tokens", "decoding_steps", "likelihood_draws")
    check_least(args, **dict.fromkeys(positive, 1), seed=0)
    if args.dataset_name is not None:
        check_source(args.dataset_name, "dataset_name")
    elif BENCHMARKS[args.benchmark].source is not None:
        source = BENCHMARKS[args.benchmark].source
        raise UserError(f"--benchmark {args.benchmark} needs --dataset_name: {source}, or a folder with a copy.")
    folder = Path(args.output_dir)
    check_not_written([args.baseline, args.retain_log], [folder / "results.json", folder / TRUTH_RATIOS])
    if args.along_path is not None and args.benchmark not in ATTACKED:
        raise UserError(f"--benchmark {args.benchmark} is not scored along the path: leave --along_path out.")
    return check_along_path(args)


def main(args: ScoreArguments, model_args: ModelConfig) -> None:
    earlier = check(args, model_args)
    benchmark, path = BENCHMARKS[args.benchmark], model_args.model_name_or_path
    sets = benchmark.load(args)
    baseline = Results.load(args.baseline) if args.baseline else None
    if baseline is not None and baseline.protocol != args.protocol:
        raise UserError(f"{args.baseline} has figures by the protocol '{baseline.protocol}': pass --protocol, too.")
    model, tokenizer = load(path, model_args, args.trust_remote_code)
    scored = replace(benchmark.evaluate(model, tokenizer, sets, args), method=Path(path).name, rouge=args.rouge)
    along = None if args.along_path is None else score_path(model, tokenizer, sets, args, scored.method)
    if not processes().is_main_process:
        return
    data = args.benchmark if benchmark.source is None else args.dataset_name
    data += f" {args.forget_split}" if benchmark.reads_splits else ""
    results = Results(path, data, settings(args), [scored], today())
    results.save(Path(args.output_dir) / "results.json")
    print(f"\n{results.details()}")
    if baseline is not None:
        print(f"\nChange from {baseline.runs[0].name} of {args.baseline}:\n\n{scored.change(baseline.runs[0])}")
    files = {"figures": Path(args.output_dir, "results.json")}
    if along is not None:
        paths, picture = save_path(along, args, data, earlier)
        print(f"\nAlong the path, by the share of the answer that is revealed:\n\n{paths.details()}")
        files |= {"along path": picture}
    following = [attack_command(args, model_args, path, "BASE")] if args.benchmark in ATTACKED else []
    print(f"\n{summary(files, *following)}")


def command() -> None:
    """The script as it is called."""
    main(*parse_options(ScoreArguments, ModelConfig, description=__doc__))


if __name__ == "__main__":
    sys.exit(run(command))
