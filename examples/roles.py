"""What was forgotten, token by token: stored knowledge, what the question says, or the wording as well.

    python examples/roles.py --base outputs/demo/base --model outputs/demo/mdu-tau0 outputs/demo/mdu-tau0.5
    python examples/roles.py --base PATH --model PATH_OF_ADAPTER --dtype bfloat16 \\
        --dataset_name locuslab/TOFU --forget_split forget10 --retain_split retain90

For each model: by how much the prompt changes its predictions along the denoising path of the rows to forget, by the
role of the token, before and after unlearning, with paired intervals. The output folder gets roles.json, which holds
figures only and keeps the models that are done, so that a killed run goes on; roles.png and .svg (KL by role),
path.png (along the true answers), decoding.png (along what each model decodes), heatmap.png (one answer, token by
token).

Rows of your own, as examples/unlearn.py takes them, are named by `--forget` and `--retain`. The rows to forget are
private, so no text is shown unless you ask for it with `--show_forget_text`.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from torch import nn

from mdu_trainer import resolve_backbone
from mdu_trainer.commands import run
from mdu_trainer.commands.checks import check_least, check_output_folder
from mdu_trainer.commands.loading import ModelsConfig, check_compared, load, model_names
from mdu_trainer.commands.options import parse_options
from mdu_trainer.commands.row_sets import OwnRowsArguments, check_rows_named
from mdu_trainer.data.roles import token_texts
from mdu_trainer.evaluation.own_rows import load_own_rows
from mdu_trainer.evaluation.runner import processes
from mdu_trainer.evaluation.sources import load_split, spread
from mdu_trainer.files import UserError
from mdu_trainer.report.role_plots import plot_heatmap, plot_path, plot_roles
from mdu_trainer.report.role_text import audit_view
from mdu_trainer.testing import fictional_authors, forget_retain_split
from mdu_trainer.token_roles.measure import analyse_roles, check_rows, role_data
from mdu_trainer.token_roles.results import RoleReport, RoleSettings


@dataclass
class RolesArguments(OwnRowsArguments):
    """What the models are compared with, and on which rows."""

    base: str | None = field(default=None, metadata={"help": "The model before unlearning."})
    retain_split: str | None = field(
        default=None, metadata={"help": "Config name of rows to keep: more answers to tell template words by."}
    )
    max_eval_rows: int | None = field(default=None, metadata={"help": "Measure N evenly spaced rows to forget."})
    num_steps: int = field(default=16, metadata={"help": "Moments of each denoising path."})
    num_paths: int = field(default=4, metadata={"help": "Random orders of each true answer."})
    batch_size: int = field(default=32, metadata={"help": "Sequences a forward pass."})
    seed: int = field(default=0, metadata={"help": "Of orders, decoding and resampling."})
    example_row: int = field(default=0, metadata={"help": "The row to forget that the heat map shows."})
    show_forget_text: bool = field(
        default=False, metadata={"help": "Print the answers to forget with their roles, and put them on the heat map."}
    )
    output_dir: str = field(default="outputs/roles", metadata={"help": "Folder of the report and the pictures."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether the models may run code of their own."})


def load_rows(args: RolesArguments) -> tuple[Dataset, Dataset | None]:
    """The rows to forget, and rows to keep if there are any."""
    if args.forget is not None:
        rows = load_own_rows(args.forget, args.retain, args.keep_dataset_cache, args.columns)
        forget, retain = rows["forget"], rows.get("retain")
    elif args.dataset_name is None:
        forget, retain = forget_retain_split(fictional_authors())
    else:
        cache = {"keep_dataset_cache": args.keep_dataset_cache}
        forget = load_split(args.dataset_name, args.forget_split, **cache)
        retain = load_split(args.dataset_name, args.retain_split, **cache) if args.retain_split else None
    return spread(forget, args.max_eval_rows), retain


def check(args: RolesArguments, model_args: ModelsConfig) -> RoleSettings:
    """Refuse options that are wrong before anything is loaded."""
    if processes().num_processes > 1:
        raise UserError("This script runs in one process: start it with python, not with accelerate launch.")
    check_output_folder(args.output_dir)
    check_least(args, max_eval_rows=1, seed=0)
    check_rows_named(args)
    check_compared(model_args, args.base)
    report = Path(args.output_dir) / "roles.json"
    if report.exists():
        RoleReport.load(report)
    return RoleSettings(args.num_steps, args.num_paths, args.batch_size, args.seed, args.example_row)


def main(args: RolesArguments, model_args: ModelsConfig) -> None:
    settings = check(args, model_args)
    forget, retain = load_rows(args)
    check_rows(forget, retain)
    if not 0 <= args.example_row < len(forget):
        raise UserError(f"--example_row {args.example_row}: the rows to forget are 0 to {len(forget) - 1}.")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    paths = model_args.model_name_or_path
    base, tokenizer = load(args.base, model_args, args.trust_remote_code)

    def models() -> Iterator[tuple[str, nn.Module]]:  # one in memory at a time, beside the base
        for name, path in zip(model_names(paths), paths, strict=True):
            yield name, load(path, model_args, args.trust_remote_code)[0]

    tokens = None
    if args.show_forget_text:
        data = role_data(forget, tokenizer, resolve_backbone(base, tokenizer), retain)
        shown = data.answers, data.completion_ids, data.roles
        print(audit_view(*shown, tokenizer, colour=sys.stdout.isatty()))
        tokens = token_texts(data.answers[args.example_row], data.completion_ids[args.example_row], tokenizer)
    report = analyse_roles(
        base, models(), tokenizer, forget, retain, settings, path=folder / "roles.json", show_progress=True
    )
    plot_roles(report, folder / "roles.png")
    plot_roles(report, folder / "roles.svg")
    plot_path(report, folder / "path.png")
    plot_path(report, folder / "decoding.png", "own")
    plot_heatmap(report, folder / "heatmap.png", tokens)
    print("\nWhat the prompt adds to the prediction of the true answers' tokens (KL, nats):\n")
    print(report.details())
    print(f"\nProbability of the true tokens:\n\n{report.details('probability')}")
    print(f"\nThe models' own answers, tokens revealed first at 0 and last at 1:\n\n{report.order_table()}")
    print(f"\nWritten to {folder}")


def command() -> None:
    """The script as it is called."""
    main(*parse_options(RolesArguments, ModelsConfig, description=__doc__))


if __name__ == "__main__":
    sys.exit(run(command))
