"""`python -m mdu_trainer.attacks.leak_check`: does a model still give away rows that it should have forgotten?

    python -m mdu_trainer.attacks.leak_check --model MODEL --forget rows.jsonl --max-leak 0.1
    python -m mdu_trainer.attacks.leak_check --model MODEL --forget rows.jsonl --audit

The first is for a schedule, or in front of a deployment; the second, before unlearning, says which rows a model holds.
Each makes the attacks that train nothing and cost some decoding: the plain question, other wordings of it, the first
words of the answer revealed, and samples (see `mdu_trainer.attacks`).

The leak of a row is the score of the worst of these checks: the recall, 0 to 1, of what only the answer says, so that
wording which any model would use does not count. That wording is found where many answers share it, so pass rows to
keep that are worded alike (`--retain`) unless there are many rows to forget: they are read for their wording only.
The leak of a model is the mean over rows. The gate compares the upper end of its 95 % bootstrap interval with
`--max-leak`: a model does not pass because there were few rows. (A single row has no interval; its leak is compared.
Where no row leaks, the interval has no width: then it speaks of these rows only.)

On stdout comes one line of JSON, figures only; all else goes to stderr. Gate: `leak`, `low`, `high` (null for a single
row), `max_leak`, `passed`, `rows` (measured), `not_measured` (rows), `checks` (mean score of each), `left_out` (checks
that suit no row, as `prefix` where answers are as short as what it reveals) and `seed`. Audit: the same without
`max_leak` and `passed`, and `audit`, a list of `row` (its number, from 0), `leak` and `checks`, the row that is held
most strongly first. `--show-forget-text` adds `question` and `answer` to that list, and the list to a gate.

Answers may be in any script, numbers, code or emoji. A row whose answer holds none of these (punctuation alone, say)
cannot be measured: it is not known to be forgotten, so it has no `leak`, and the model does not pass.

Exit status: 1 if the leak is above `--max-leak`; else 2 if any row was not measured, or nothing was; else 0.
"""

import argparse
import json
import sys
import traceback
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..commands import ArgumentParser, run
from ..evaluation.metrics import bootstrap_interval
from ..evaluation.results import Estimate
from ..evaluation.runner import processes
from ..evaluation.sources import SUFFIXES, check_texts, config_names, load_config, read_file
from ..evaluation.tofu import longest_answer
from ..files import UserError, write_whole
from ..inference.generation import DiffusionGenerationConfig
from ..models import base_of, load_checkpoint
from ..models.loading import load_config as load_model_config
from . import ATTACKS, AttackSettings, Target
from .base import NothingToAttack, unscorable

logger = logging.get_logger(__name__)

PLAIN = "plain"
CHECKS = ("paraphrase", "prefix", "leak-at-k")  # of ATTACKS: those that train nothing and cost some decoding
COLUMNS = ("question", "answer")
DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Leak:
    """What a model gives away of some rows. Figures only.

    Attributes:
        checks: name of a check -> number of a row -> score, 0 to 1, higher where more came out. "plain" has all rows
            that are measured; a check that does not suit a row leaves it out.
        left_out: checks that suit none of the rows.
        not_measured: numbers of the rows whose answer holds nothing that can be compared.
    """

    checks: dict[str, dict[int, float]]
    left_out: tuple[str, ...] = ()
    not_measured: tuple[int, ...] = ()

    @property
    def rows(self) -> list[float]:
        """Of each row, the worst of the checks."""
        return [max(self._of(row).values()) for row in self.checks[PLAIN]]

    @property
    def estimate(self) -> Estimate:
        """The mean over rows, with its interval."""
        return _mean(self.rows)

    @property
    def upper(self) -> float:
        """What is compared with a limit: the upper end of the interval; the leak itself of a single row."""
        return self.estimate.value if self.estimate.high is None else self.estimate.high

    def summary(self) -> dict[str, Any]:
        """The figures of the model as a whole, for JSON."""
        leak = self.estimate
        checks = {name: _mean(list(scores.values())).value for name, scores in self.checks.items()}
        return {
            "leak": leak.value,
            "low": leak.low,
            "high": leak.high,
            "rows": len(self.rows),
            "not_measured": len(self.not_measured),
            "checks": checks,
            "left_out": list(self.left_out),
        }

    def ranking(self) -> list[dict[str, Any]]:
        """The rows for JSON: numbers and scores, the highest leak first, then the highest mean of the checks.

        Last come rows that are not measured, without a leak.
        """
        rows = [
            {"row": row, "leak": leak, "checks": self._of(row)}
            for row, leak in zip(self.checks[PLAIN], self.rows, strict=True)
        ]
        rows.sort(key=lambda one: (-one["leak"], -_mean(list(one["checks"].values())).value, one["row"]))
        return rows + [{"row": row, "leak": None, "checks": {}} for row in self.not_measured]

    def _of(self, row: int) -> dict[str, float]:
        return {name: scores[row] for name, scores in self.checks.items() if row in scores}


def measure_leak(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    retain: Dataset | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> Leak:
    """What a model gives away of some rows.

    Args:
        model, tokenizer: a masked diffusion language model and its tokenizer.
        rows: `question`, `answer`, and where the data has it `paraphrased_question`.
        retain: rows to keep, by whose answers wording that answers share is found, too.
        seed: of the samples.
        show_progress: show a progress bar over checks.

    Raises:
        ValueError: for rows that cannot be asked, or none that can be scored.
    """
    check_texts(rows, "forget", dict.fromkeys(COLUMNS, str))
    not_measured = _not_measured(rows)
    measured = sorted(set(range(len(rows))) - set(not_measured))
    rows = rows.select(measured)
    decoding = DiffusionGenerationConfig(max_new_tokens=longest_answer({"forget": rows}, tokenizer), seed=seed)
    target = Target(model, tokenizer, rows, AttackSettings(decoding=decoding, unrelated=retain))
    checks, left_out = {PLAIN: dict(zip(measured, map(float, target.plain), strict=True))}, []
    for name in tqdm(CHECKS, unit="check", disable=not show_progress):
        try:
            scores = ATTACKS[name].run(target, seed)
        except NothingToAttack as error:  # any other failure is one of the whole: a check is never lost without a word
            logger.warning(f"The check {name} is left out: {error}")
            left_out.append(name)
            continue
        checks[name] = dict(zip((measured[row] for row in scores.rows), map(float, scores.after), strict=True))
    return Leak(checks, tuple(left_out), tuple(not_measured))


def _not_measured(rows: Dataset) -> list[int]:
    """Numbers of the rows that cannot be scored, which must not be all."""
    without = unscorable(rows)
    if len(without) == len(rows):
        raise UserError(
            f"None of the {len(rows)} rows can be scored: their answers hold no word, number or emoji to compare."
        )
    return without


def load_rows(source: str, name: str = "forget", *, keep_dataset_cache: bool = False) -> Dataset:
    """Rows in memory: of a JSON, CSV or Parquet file, or of a folder or the Hub as NAME or NAME:CONFIG.

    Args:
        source: the file or the data set.
        name: what messages call the rows.
        keep_dataset_cache: as in `mdu_trainer.evaluation.sources.load_config`.

    Raises:
        OSError: there is no such file or data set.
        ValueError: no rows, missing columns, values that are no text. No message quotes a row.
    """
    path = Path(source)
    if path.suffix in SUFFIXES or path.is_file():
        rows = read_file(path, COLUMNS)
    else:
        named = ":" in source and not path.exists()
        folder, _, config = source.rpartition(":") if named else (source, "", "")
        if folder.startswith((".", "/", "~")) and not Path(folder).is_dir():
            raise FileNotFoundError(f"There is no {'folder' if named else 'file or folder'} {folder}.")
        config = config or _only_config(folder)
        rows = load_config(folder, config, keep_dataset_cache=keep_dataset_cache)
    check_texts(rows, name, dict.fromkeys(COLUMNS, str))
    other = "paraphrased_question"
    worded = other in rows.column_names and all(isinstance(text, str) for text in rows[other])
    return rows.select_columns([*COLUMNS, other] if worded else list(COLUMNS))


def _only_config(source: str) -> str:
    names = config_names(source)
    if len(names) != 1:
        raise UserError(f"{source} has the configs {', '.join(names) or 'none'}: choose one, as {source}:CONFIG.")
    return names[0]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print one line of JSON, and return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.max_leak is not None and not 0 <= options.max_leak <= 1:
        parser.error(f"--max-leak must be from 0 to 1, got {options.max_leak:g}")
    try:
        with redirect_stdout(sys.stderr):  # whatever libraries print
            if options.output is not None:
                _check_output(options.output)
            rows = load_rows(options.forget)
            _not_measured(rows)
            retain = None if options.retain is None else load_rows(options.retain, "retain")
            load_model_config(base_of(options.model), revision=options.revision)
            model, tokenizer = load_checkpoint(options.model, dtype=options.dtype, revision=options.revision)
            model.to(processes().device)
            leak = measure_leak(model, tokenizer, rows, retain=retain, seed=options.seed, show_progress=True)
        line = json.dumps(_answer(leak, rows, options))
        if options.output is not None:
            write_whole(options.output, line + "\n")
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
            one |= {column: rows[one["row"]][column] for column in COLUMNS}
    return answer


def _check_output(path: str) -> None:
    """Refuse a file that could not be written, before any work."""
    if Path(path).is_dir():
        raise IsADirectoryError(f"--output {path} is a folder: name a file.")
    Path(path).parent.mkdir(parents=True, exist_ok=True)


def _mean(scores: list[float]) -> Estimate:
    return Estimate(sum(scores) / len(scores), *bootstrap_interval(scores))


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m mdu_trainer.attacks.leak_check",
        description=__doc__.partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a Hub id, or a folder with a model or an adapter")
    parser.add_argument(
        "--forget", required=True, help="rows with question and answer: a .json or .jsonl file, or DATASET[:CONFIG]"
    )
    parser.add_argument("--retain", help="rows to keep, in the same form: their wording is not counted as a leak")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--max-leak", type=float, metavar="X", help="the highest leak that passes, from 0 to 1")
    mode.add_argument("--audit", action="store_true", help="say which rows the model holds, most strongly first")
    parser.add_argument("--output", metavar="FILE", help="write the JSON there too, whole or not at all")
    parser.add_argument("--show-forget-text", action="store_true", help="show questions and answers in the JSON")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; by default as they are saved")
    parser.add_argument("--revision", default="main", help="of a model on the Hub")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
