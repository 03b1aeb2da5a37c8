"""Unlearn one request after the other, each from what the one before left, and score all earlier ones every time.

The embedded default (three of twelve fictional authors ask to be forgotten; two CPU cores, a few minutes):

    python examples/sequential.py

Your own requests, as configs (or CONFIG/SPLIT) of a data set with columns `question` and `answer`, or `text` alone:

    accelerate launch examples/sequential.py --model_name_or_path PATH --dtype bfloat16 --dataset_name DATA \\
        --requests request1 request2 --retain_split keep --output_dir outputs/requests

A request's rows leave the rows to keep for good, or later requests would teach them again. Whether later requests
train on the rows of earlier ones once more is for you to say (`--repeat_earlier`): it needs rows that you may have had
to delete. Each model's folder records the earlier requests by fingerprint. `--resume` finishes what was begun.
"""

import gc
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from trl import ModelConfig

from mdu_trainer import MDUConfig
from mdu_trainer.commands import run
from mdu_trainer.commands.checks import check_once, check_source
from mdu_trainer.commands.finetuning import FinetuningArguments, check_finetuning, finetune
from mdu_trainer.commands.folders import RESUME, RunArguments, check_run, output_folder
from mdu_trainer.commands.loading import check_models, load
from mdu_trainer.commands.options import parse_options, settings
from mdu_trainer.commands.row_sets import EMBEDDED, DataArguments
from mdu_trainer.commands.scoring import Scorer, ScoringArguments, check_scoring
from mdu_trainer.commands.training import train_seconds, unlearn
from mdu_trainer.data.texts import of_text
from mdu_trainer.evaluation.own_rows import as_questions
from mdu_trainer.evaluation.results import Results, Run, today
from mdu_trainer.evaluation.runner import processes
from mdu_trainer.evaluation.sources import load_split, spread
from mdu_trainer.files import UserError
from mdu_trainer.testing import fictional_authors

CONFIG = Path(__file__).parent / "configs" / "sequential.yaml"


@dataclass
class SequentialArguments(RunArguments, ScoringArguments, FinetuningArguments, DataArguments):
    """The requests, in order, and the rows that nobody asked to forget.

    Without `dataset_name` the requests are the last of the embedded fictional authors, `num_requests` of them; without
    `model_name_or_path` the model is a small one from scratch, which `finetune_epochs` teaches all rows first.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Hub name or folder; embedded authors if unset."})
    requests: list[str] = field(default_factory=list, metadata={"help": "Config names of the requests, in order."})
    retain_split: str | None = field(default=None, metadata={"help": "Config name of the rows to keep."})
    num_requests: int = field(default=3, metadata={"help": "Embedded authors who ask to be forgotten, one each."})
    repeat_earlier: bool = field(default=False, metadata={"help": "Forget the rows of earlier requests again."})
    max_eval_rows: int | None = field(default=None, metadata={"help": "Score N evenly spaced rows of each set."})
    likelihood_draws: int = field(default=8, metadata={"help": "Passes a row for the probability."})


@dataclass
class SequentialConfig(MDUConfig):
    """MDUConfig as it is written on the command line; each request has one of its own."""

    def __post_init__(self):
        pass  # each request's own MDUConfig checks its values

    def of_request(self, folder: Path) -> MDUConfig:
        """The configuration of the request that is kept in a folder."""
        values = {f.name: getattr(self, f.name) for f in fields(MDUConfig) if f.init}
        return MDUConfig(**values | {"output_dir": str(folder)})


def load_requests(args: SequentialArguments) -> tuple[list[Dataset], Dataset]:
    """The rows of each request, and those that no request names."""
    if args.dataset_name is not None:
        cache = {"keep_dataset_cache": args.keep_dataset_cache}
        loaded = [load_split(args.dataset_name, name, **cache) for name in (*args.requests, args.retain_split)]
        rows = [part.select_columns(["text"] if of_text(part) else ["question", "answer"]) for part in loaded]
        if len(set(map(of_text, rows))) > 1:
            raise UserError("Some of the requests and rows to keep are texts, and some questions: pass one kind.")
        return rows[:-1], rows[-1]
    authors = fictional_authors()
    count = max(authors["author"]) + 1
    if not 1 <= args.num_requests < count:
        raise UserError(f"--num_requests must be from 1 to {count - 1}, got {args.num_requests}.")
    rows = authors.select_columns(["question", "answer"])

    def of(chosen: range) -> Dataset:
        return rows.select([row for row, author in enumerate(authors["author"]) if author in chosen])

    first = count - args.num_requests
    return [of(range(author, author + 1)) for author in range(first, count)], of(range(first))


def request_rows(requests: list[Dataset], kept: Dataset, number: int, repeat_earlier: bool) -> tuple[Dataset, Dataset]:
    """The rows to forget and to keep in a request, counted from 0.

    Rows of requests to come are kept, for nobody knows yet that they will be made.
    """
    forget = requests[: number + 1] if repeat_earlier else [requests[number]]
    return concatenate_datasets(forget), concatenate_datasets([*requests[number + 1 :], kept])


def score_requests(score: Scorer, model, tokenizer, names: list[str], label: str, folder: Path) -> Run:
    """One run with the scores of each request named, and of the rows to keep."""
    scores, rows, seconds = {}, {}, 0.0
    for name in names:
        sets = {"forget": score.sets[name]} | ({"retain": score.sets["retain"]} if name == names[-1] else {})
        run = score(model, tokenizer, label, folder / f"{label.replace(' ', '-')}-{name}-rows.jsonl", sets).run
        for part in sets:
            known_as = name if part == "forget" else part
            scores[known_as], rows[known_as] = run.scores[part], run.rows[part]
        seconds += run.eval_seconds
    run = Run(label, None, scores, rows, eval_seconds=seconds)
    return replace(run, protocol=score.args.protocol, rouge=score.args.rouge)


def check(args: SequentialArguments, folder: Path, model_args: ModelConfig) -> None:
    """Refuse options that are wrong before anything is loaded."""
    check_run(args, folder)
    check_scoring(args)
    check_finetuning(args, model_args)
    if args.dataset_name is not None:
        check_source(args.dataset_name, "dataset_name")
        if not args.requests or args.retain_split is None:
            raise UserError("--dataset_name needs --requests and --retain_split.")
        check_once(args, "requests")
    check_models(model_args, model_name_or_path=model_args.model_name_or_path)


def main(args: SequentialArguments, config: SequentialConfig, model_args: ModelConfig) -> None:
    state, path = processes(), model_args.model_name_or_path
    folder = Path("outputs/sequential" if config.output_dir is None else config.output_dir)
    check(args, folder, model_args)
    config.of_request(folder)  # which checks the rest
    requests, kept = load_requests(args)
    names = [f"request{number}" for number in range(1, len(requests) + 1)]
    chosen = settings(args, config, model_args)
    written = [*(folder / name for name in ("base", *names)), *folder.glob("*-rows.jsonl")]
    with output_folder(folder, written, [path, args.dataset_name], args, chosen):
        if args.finetune_epochs or path is None:
            path = finetune(folder / "base", args, config, model_args, concatenate_datasets([*requests, kept]), kept)
        loaded = load(path, model_args, config.trust_remote_code)
    results = Results(
        model_args.model_name_or_path or "from scratch", args.dataset_name or EMBEDDED, chosen, date=today()
    )
    asked = [spread(as_questions(rows), args.max_eval_rows) for rows in (*requests, kept)]
    sets = dict(zip([*names, "retain"], asked, strict=True))
    score = Scorer(sets, args)
    results.runs.append(score_requests(score, *loaded, names, "base", folder))
    del loaded
    for number, name in enumerate(names):
        gc.collect()  # the model before, with its optimiser
        forget, retain = request_rows(requests, kept, number, args.repeat_earlier)
        request = config.of_request(folder / name)
        model, tokenizer = unlearn(request, path, model_args, forget, retain if config.retain_weight else None)
        scored = score_requests(score, model, tokenizer, names[: number + 1], f"after {name}", folder)
        results.runs.append(replace(scored, train_seconds=train_seconds(folder / name)))
        path = request.output_dir
        del model
        if state.is_main_process:
            score.decoding(tokenizer).save_pretrained(request.output_dir)
            results.save(folder / "results.json")
    if state.is_main_process:
        print(f"\n{results.table()}\n\nWritten to {folder}")


def command() -> None:
    """The script as it is called."""
    main(*parse_options(SequentialArguments, SequentialConfig, ModelConfig, default=CONFIG, description=__doc__))


if __name__ == "__main__":
    sys.exit(run(command, again=RESUME))
