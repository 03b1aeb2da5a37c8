"""Rows of one's own as questions and answers: from a file, a folder or the Hub, in the forms that training takes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data.reading import TEXT, check_table, names_of, read_row, read_rows, read_text
from ..data.secrets import SPANS
from ..data.texts import of_text, passages
from ..files import UserError
from .columns import map_to_pass, parse_columns, rename
from .pairs import is_pair, questions_of_pairs
from .rwku import load_forget_rows
from .sources import SUFFIXES, check_columns, config_names, load_split, read_file, table

QUESTIONS = ("question", "answer")
RESPONSES = {"messages", "completion", "rejected"}  # columns of rows as a trainer takes them
FURTHER = ("paraphrased_question", "refusal")  # kept where every row has them
TURNS = {"prompt": ("question", "user"), "completion": ("answer", "assistant"), "chosen": ("refusal", "assistant")}


def load_own_rows(
    forget: str | None,
    retain: str | None,
    keep_dataset_cache: bool = False,
    columns: str | None = None,
    *,
    to_train: bool = False,
) -> dict[str, Dataset]:
    """Load the rows that a command line names as one's own, as questions and answers.

    Args:
        forget, retain: files or data sets, as `load_questions` takes them; rows to keep may be left out.
        keep_dataset_cache: as in `load_questions`.
        columns: names of columns, as `mdu_trainer.evaluation.columns.parse_columns` reads them.
        to_train: leave texts whole, for a training; `as_questions` makes passages of them.

    Returns:
        "forget", and "retain" if there are any.

    Raises:
        UserError: no rows to forget were named, or rows are not what they must be. No message quotes one.
    """
    if forget is None:
        raise UserError("Which rows are to be forgotten? Pass --forget FILE, or the name of a data set.")
    sources = {"forget": forget} | ({} if retain is None else {"retain": retain})
    load = load_rows if to_train else load_questions
    how: dict[str, Any] = {"columns": parse_columns(columns), "keep_dataset_cache": keep_dataset_cache}
    return {name: load(source, name, **how) for name, source in sources.items()}


def load_questions(
    source: str,
    name: str = "forget",
    *,
    columns: Mapping[str, str] | None = None,
    keep_dataset_cache: bool = False,
) -> Dataset:
    """Load rows as questions and answers, in memory; of texts, passages. Arguments and errors as in `load_rows`."""
    return as_questions(load_rows(source, name, columns=columns, keep_dataset_cache=keep_dataset_cache))


def as_questions(rows: Dataset) -> Dataset:
    """Rows as `load_rows` gives them, as what can be asked: of texts, passages (`mdu_trainer.data.texts`)."""
    return passages(rows) if of_text(rows) else rows


def load_rows(
    source: str,
    name: str = "forget",
    *,
    columns: Mapping[str, str] | None = None,
    keep_dataset_cache: bool = False,
) -> Dataset:
    """Load rows as questions and answers, or as texts, in memory.

    A row has `question` and `answer`; or `prompt` and `completion`, both texts or both messages; or `messages`, a turn
    of the user and the response to it. `paraphrased_question` is kept, `chosen`, the response that DPO prefers, as
    `refusal`, and `secret_spans` (see `mdu_trainer.data.secrets`). RWKU's pairs are read, too (see `pairs`). A row
    without any of these but with `text` is one of plain text.

    Args:
        source: a JSON, JSON Lines, CSV, Parquet or text file, or a folder or a data set on the Hub, as NAME,
            NAME:CONFIG or NAME:CONFIG/SPLIT; or a folder that has nothing but a folder a subject, as
            `rwku.load_forget_rows` takes it.
        name: what messages call the rows.
        columns: name here -> name in the data, of columns that are called otherwise.
        keep_dataset_cache: as in `mdu_trainer.evaluation.sources.load_split`.

    Returns:
        `question`, `answer`, and of the others what every row has; or `text`.

    Raises:
        OSError: there is no such file or data set.
        UserError: no rows, missing columns, values that are no text, conversations. No message quotes a row.
    """
    rows = _load_source(source, keep_dataset_cache)
    rows = rename(rows, columns, source) if columns else rows
    known = set(rows.column_names)
    if is_pair(dict.fromkeys(known)) and not known & RESPONSES:
        rows = table(questions_of_pairs(rows, source), source, names_of(rows), rows.split)
    if of_text(rows):
        for number, row in enumerate(read_rows(rows, name)):
            read_text(row, f"Row {number} of {source}")
        return rows.select_columns([TEXT])
    known = set(rows.column_names)
    if not known & set(QUESTIONS) and known & RESPONSES:
        rows = _of_turns(rows, source, name)
    else:
        _check_texts(rows, source)
        rows = rows.rename_columns({"chosen": "refusal"}) if "chosen" in known - {"refusal"} else rows
    check_columns(rows, name, dict.fromkeys(QUESTIONS, str))
    whole = [c for c in FURTHER if c in rows.column_names and all(isinstance(text, str) for text in rows[c])]
    whole += [SPANS] if SPANS in rows.column_names else []
    return rows.select_columns([*QUESTIONS, *whole])


def _load_source(source: str, keep_dataset_cache: bool) -> Dataset:
    path = Path(source)
    if path.suffix in (*SUFFIXES, ".txt") or path.is_file():
        return read_file(path)
    if path.is_dir() and not any(file.is_file() for file in path.iterdir()):
        return load_forget_rows(path)
    named = ":" in source and not path.exists()
    folder, _, config = source.rpartition(":") if named else (source, "", "")
    if folder.startswith((".", "/", "~")) and not Path(folder).is_dir():
        raise FileNotFoundError(f"There is no {'folder' if named else 'file or folder'} {folder}.")
    return load_split(folder, config or _only_config(folder), keep_dataset_cache=keep_dataset_cache)


def _only_config(source: str) -> str:
    names = config_names(source)
    if len(names) != 1:
        raise UserError(f"{source} has the configs {', '.join(names) or 'none'}: choose one, as {source}:CONFIG.")
    return names[0]


def _check_texts(rows: Dataset, source: str) -> None:
    """Refuse the first row without a question or an answer, by its number."""
    values = {column: rows[column] if column in rows.column_names else [None] * len(rows) for column in QUESTIONS}
    for number, pair in enumerate(zip(*values.values(), strict=True)):
        missing = [column for column, value in zip(QUESTIONS, pair, strict=True) if value is None]
        if missing:
            absent = [column for column in missing if column not in rows.column_names]
            mend = f" {map_to_pass(rows.column_names, absent)}" if absent else ""
            raise UserError(f"Row {number} of {source} has no {' and no '.join(missing)}.{mend}")
        wrong = [column for column, value in zip(QUESTIONS, pair, strict=True) if not isinstance(value, str)]
        if wrong:
            raise UserError(f"Row {number} of {source}: {wrong[0]} must be a text.")


def _of_turns(rows: Dataset, source: str, name: str) -> Dataset:
    """Rows of prompts and completions, or of messages, as questions and answers."""
    preferred = "chosen" in rows.column_names
    check_table(rows, name, preferred)
    texts: dict[str, list[str]] = {}
    for number, example in enumerate(read_rows(rows, name)):
        where = f"Row {number} of {source}"
        for part, value in read_row(example, where, preferred).items():
            column, role = TURNS[part]
            texts.setdefault(column, []).append(_text_of(value, role, f"{where}: its {part}"))
    for column in {FURTHER[0], SPANS} & set(rows.column_names):
        texts[column] = list(rows[column])
    return Dataset.from_dict(texts, info=names_of(rows), split=rows.split)


def _text_of(value: str | list[Mapping[str, Any]], role: str, where: str) -> str:
    if isinstance(value, str):
        return value
    if len(value) != 1 or value[0]["role"] != role:
        raise UserError(
            f"{where} is not one turn of the {role}. Here a row is one question and its answer; MDUTrainer itself "
            "trains on whole conversations."
        )
    return value[0]["content"]
