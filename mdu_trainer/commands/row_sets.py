"""Rows as a command line names them: the splits of a data set, or the embedded fictional authors."""

from dataclasses import dataclass, field

from datasets import Dataset

from ..data.rows import question_answer_rows
from ..data.texts import of_text
from ..evaluation.benchmarks import fictional_sets
from ..evaluation.own_rows import load_own_rows
from ..evaluation.runner import processes
from ..evaluation.sources import spread
from ..evaluation.tofu import load_tofu
from ..files import UserError
from ..testing import REFUSALS
from .checks import check_source

EMBEDDED = "fictional authors (embedded)"  # what results call the rows
COLUMNS = "Columns of your rows that are called otherwise, as in prompt=input,completion=output."
NO_RETAIN = (
    "Without --retain nothing holds on to what the model is to keep: expect it to lose other knowledge as well, and "
    "no figure here will say how much."
)


@dataclass
class DataArguments:
    """What every command that reads rows is asked."""

    keep_dataset_cache: bool = field(
        default=False, kw_only=True, metadata={"help": "Let `datasets` keep the rows in its cache, in plain text."}
    )


@dataclass
class SplitArguments(DataArguments):
    """Which rows are to be forgotten, and which to be kept: splits of TOFU or of a data set like it."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub name or folder; embedded authors if unset."})
    forget_split: str = field(default="forget10", metadata={"help": "Config name of the rows to forget."})
    retain_split: str = field(default="retain90", metadata={"help": "Config name of the rows to keep."})

    @property
    def data(self) -> str:
        """What results call the rows."""
        return EMBEDDED if self.dataset_name is None else f"{self.dataset_name} {self.forget_split}"


@dataclass
class OwnRowsArguments(SplitArguments):
    """Which rows were to be forgotten: one's own, splits of a data set, or the embedded fictional authors."""

    forget: str | None = field(default=None, metadata={"help": "Rows of your own: a file, or DATASET[:CONFIG]."})
    retain: str | None = field(default=None, metadata={"help": "Your own rows to keep, in the same form."})
    columns: str | None = field(default=None, metadata={"help": COLUMNS})

    @property
    def data(self) -> str:
        """What results call the rows."""
        return super().data if self.forget is None else "rows of one's own"


def check_rows_named(args: OwnRowsArguments) -> None:
    """Refuse rows that are named twice, or rows to keep alone, and a data set that cannot be."""
    if args.forget is not None and args.dataset_name is not None:
        raise UserError("--forget and --dataset_name both name the rows: pass one.")
    if args.retain is not None and args.forget is None:
        raise UserError("--retain goes with --forget. For a split of --dataset_name, pass --retain_split.")
    if args.columns is not None and args.forget is None:
        raise UserError("--columns is of the rows that --forget and --retain name: pass these, or leave it out.")
    if args.dataset_name is not None:
        check_source(args.dataset_name, "dataset_name")


def forget_and_retain(args: OwnRowsArguments, max_rows: int | None) -> dict[str, Dataset]:
    """Return the sets to score on, checked: of each so many evenly spaced rows, all if None."""
    if args.forget is not None:
        rows = load_own_rows(args.forget, args.retain, args.keep_dataset_cache, args.columns)
        return {name: spread(part, max_rows) for name, part in rows.items()}
    if args.dataset_name is None:
        return fictional_sets(max_rows)
    splits = (args.forget_split, args.retain_split)
    return load_tofu(args.dataset_name, *splits, max_rows=max_rows, keep_dataset_cache=args.keep_dataset_cache)


def say_what_is_not_kept() -> None:
    """Print, once for all processes, what unlearning without rows to keep costs."""
    processes().print(NO_RETAIN)


def answer_rows(rows: Dataset, conversational: bool, refusals: bool = False) -> Dataset:
    """Return prompt-completion rows of questions and answers; plain texts as they are.

    Args:
        rows: `question` and `answer`, and `refusal` where the data has it; or `text`.
        conversational: make turns of user and assistant, for a model that chats.
        refusals: add a refusal as the preferred response, which DPO needs; one that is built in where the data has
            none.
    """
    if of_text(rows):
        return rows
    if refusals and "refusal" not in rows.column_names:
        rows = rows.add_column("refusal", [REFUSALS[i % len(REFUSALS)] for i in range(len(rows))])
    return question_answer_rows(rows, conversational, preferred="refusal" if refusals else None)
