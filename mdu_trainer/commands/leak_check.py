"""`python -m mdu_trainer.leak_check`: does a model still give away rows that it should have forgotten?

    python -m mdu_trainer.leak_check --model MODEL --forget rows.jsonl --max_leak 0.1
    python -m mdu_trainer.leak_check --model MODEL --forget rows.jsonl --audit

The first is for a schedule, or in front of a deployment; the second, before unlearning, says which rows a model holds.
Each makes the attacks that train nothing and cost some decoding: the plain question, other wordings of it, the first
words of the answer revealed, and samples (see `mdu_trainer.attacks`).

The leak of a row is the score of the worst of these checks: the recall, 0 to 1, of what only the answer says, so that
wording which any model would use does not count. That wording is found where many answers share it, so pass rows to
keep that are worded alike (`--retain`) unless there are many rows to forget: they are read for their wording only.
The leak of a model is the mean over rows. The gate compares the upper end of its 95 % bootstrap interval with
`--max_leak`: a model does not pass because there were few rows. (A single row has no interval; its leak is compared.
Where no row leaks, the interval has no width: then it speaks of these rows only.)

On stdout comes one line of JSON, figures only; all else goes to stderr. Gate: `leak`, `low`, `high` (null for a single
row), `max_leak`, `passed`, `rows` (measured), `not_measured` (rows), `checks` (mean score of each), `left_out` (checks
that suit no row, as `prefix` where answers are as short as what it reveals) and `seed`. Audit: the same without
`max_leak` and `passed`, and `audit`, a list of `row` (its number, from 0), `leak` and `checks`, the row that is held
most strongly first. `--show_forget_text` adds `question` and `answer` to that list, and the list to a gate.

Answers may be in any script, numbers, code or emoji. A row whose answer holds none of these (punctuation alone, say)
cannot be measured: it is not known to be forgotten, so it has no `leak`, and the model does not pass.

`--history FILE` adds the figures to a file, one line a check; `mdu report` draws the leak_history.jsonl of a folder.
`--every day --jobs` measures nothing: it prints the Job that repeats the check on the Hub, and `--submit` makes it.
The rows are then a private data set, the model lies on the Hub, and the Job's log has the figures.

Exit status: 1 if the leak is above `--max_leak`; else 2 if any row was not measured, or nothing was; else 0.
"""

import argparse
import json
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.utils import logging

from mdu_trainer.attacks.leak_check import Leak, measure_leak, not_measured
from mdu_trainer.attacks.leak_history import add_to_history, load_history
from mdu_trainer.commands import ArgumentParser, run
from mdu_trainer.commands.leak_schedule import add_schedule_options, is_schedule, schedule
from mdu_trainer.evaluation.columns import parse_columns
from mdu_trainer.evaluation.own_rows import QUESTIONS, load_questions
from mdu_trainer.evaluation.runner import processes
from mdu_trainer.files import write_whole
from mdu_trainer.models import base_of, load_checkpoint
from mdu_trainer.models.loading import load_config

logger = logging.get_logger(__name__)

DTYPES = ("auto", "bfloat16", "float16", "float32")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print one line of JSON, and return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.max_leak is not None and not 0 <= options.max_leak <= 1:
        parser.error(f"--max_leak must be from 0 to 1, got {options.max_leak:g}")
    try:
        if is_schedule(options):
            return schedule(options)
        with redirect_stdout(sys.stderr):  # whatever libraries print
            if options.output is not None:
                _check_output(options.output, "output")
            if options.history is not None:
                _check_output(options.history, "history")
                if Path(options.history).exists():
                    load_history(options.history)
            columns = parse_columns(options.columns)
            rows = load_questions(options.forget, columns=columns)
            not_measured(rows)
            retain = None if options.retain is None else load_questions(options.retain, "retain", columns=columns)
            path, revision = options.model_name_or_path, options.model_revision
            load_config(base_of(path), revision=revision)
            model, tokenizer = load_checkpoint(path, dtype=options.dtype, revision=revision)
            model.to(processes().device)
            leak = measure_leak(model, tokenizer, rows, retain=retain, seed=options.seed, show_progress=True)
        answer = _answer(leak, rows, options)
        line = json.dumps(answer)
        if options.output is not None:
            write_whole(options.output, line + "\n")
        if options.history is not None:
            add_to_history(options.history, answer)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        parser.error(str(error))
    except Exception as error:  # status 1 would say that the model leaks; the message might quote a row
        traceback.print_tb(error.__traceback__)
        parser.error(f"{type(error).__name__}: nothing was measured")
    print(line, flush=True)
    if leak.not_measured:
        logger.warning(
            f"{len(leak.not_measured)} of {len(rows)} rows (first row {leak.not_measured[0]}) were not measured: "
            "their answers hold no word, number or emoji to compare. They are not known to be forgotten: remove them."
        )
    if options.max_leak is not None and leak.upper > options.max_leak:
        return 1
    return 2 if leak.not_measured else 0


def _answer(leak: Leak, rows: Dataset, options: argparse.Namespace) -> dict[str, Any]:
    answer = leak.summary() | {"seed": options.seed}
    if options.max_leak is not None:
        passed = leak.upper <= options.max_leak and not leak.not_measured
        answer |= {"max_leak": options.max_leak, "passed": passed}
    if options.audit or options.show_forget_text:
        answer["audit"] = leak.ranking()
    if options.show_forget_text:
        for one in answer["audit"]:
            one |= {column: rows[one["row"]][column] for column in QUESTIONS}
    return answer


def _check_output(path: str, option: str) -> None:
    """Refuse a file that could not be written, before any work."""
    if Path(path).is_dir():
        raise IsADirectoryError(f"--{option} {path} is a folder: name a file.")
    Path(path).parent.mkdir(parents=True, exist_ok=True)


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(__doc__.partition("\n")[2])
    parser.add_argument(
        "--model_name_or_path", "--model", required=True, help="a Hub id, or a folder with a model or an adapter"
    )
    parser.add_argument(
        "--forget", required=True, help="questions and answers: a JSONL, CSV or Parquet file, or DATASET[:CONFIG]"
    )
    parser.add_argument("--retain", help="rows to keep, in the same form: their wording is not counted as a leak")
    parser.add_argument("--columns", help="columns that are called otherwise, as in prompt=input,completion=output")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--max_leak", type=float, metavar="X", help="the highest leak that passes, from 0 to 1")
    mode.add_argument("--audit", action="store_true", help="say which rows the model holds, most strongly first")
    parser.add_argument("--output", metavar="FILE", help="write the JSON there too, whole or not at all")
    parser.add_argument("--history", metavar="FILE", help="add the figures to this file, one line a check")
    parser.add_argument("--show_forget_text", action="store_true", help="show questions and answers in the JSON")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; by default as they are saved")
    parser.add_argument("--model_revision", default="main", help="of a model on the Hub")
    add_schedule_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
