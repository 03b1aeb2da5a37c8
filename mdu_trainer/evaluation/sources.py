"""Rows from a file, a folder or the Hub, in memory, checked before any model is loaded. No message quotes a row.

`datasets` would write what it loads to its cache folder, in plain text. Rows to forget must not stay there, so nothing
is written here unless `keep_dataset_cache` asks for it.
"""

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas
import pyarrow.parquet
from datasets import (
    BuilderConfig,
    Dataset,
    DatasetBuilder,
    DatasetInfo,
    get_dataset_config_names,
    load_dataset,
    load_dataset_builder,
)

from ..data.reading import TEXT, private, whole_cache
from ..data.texts import of_text
from ..files import UserError, read_jsonl

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
QUESTION_ANSWER = {"question": str, "answer": str}  # columns of most sets, see `check_columns`
KINDS = {str: "a text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}


def config_names(source: str | Path) -> list[str]:
    """The configs of a data set: those its card lists, or the files of a folder without a card."""
    folder = Path(source)
    if folder.is_dir() and not (folder / "README.md").is_file():
        return sorted({path.stem for path in folder.iterdir() if path.suffix in SUFFIXES})
    with _readable(source):
        return get_dataset_config_names(str(source))


def load_split(
    source: str | Path,
    config: str,
    file_names: Mapping[str, str] | None = None,
    *,
    keep_dataset_cache: bool = False,
) -> Dataset:
    """The rows of one config, in memory.

    Args:
        source: a Hub name, a folder with a card that lists its configs, or one with a file for each (JSON, JSON Lines,
            CSV or Parquet).
        config: name of the config, and of its file in a folder without a card; or CONFIG/SPLIT for one of several
            splits. Without a card these are the files SPLIT.json (or the like) in a folder CONFIG, those of the config
            "default" in the folder itself or in `data`.
        file_names: config -> stem of its file, where a folder's files are named otherwise.
        keep_dataset_cache: let `datasets` keep a copy of the rows in its cache folder, in plain text, as it does by
            itself: large sets load faster the next time, and without the Hub.

    Raises:
        ValueError: for a config that is not there, one of several splits, no rows, or rows that are no table.
    """
    folder, where = Path(source), f"config {config!r} of {source}"
    bare, names = folder.is_dir() and not (folder / "README.md").is_file(), config_names(source)
    config, _, split = config.partition("/") if config not in names else (config, "", "")
    stem = (file_names or {}).get(config, config)
    name = config if config in names else stem
    if bare and (split or name not in names) and (files := _split_files(folder, config)):
        chosen = _choose(files, split, where)
        content = [row for file in files[chosen] for row in (_file_rows(file) if file.stat().st_size else [])]
        rows = table(content, where, DatasetInfo(dataset_name="json", config_name=config), chosen)
    elif name not in names:
        raise UserError(f"{source} has no config {config!r}; it has {', '.join(names) or 'none'}.")
    elif bare and split:
        raise UserError(f"{source} has a file for the config {config!r}, and so no split {split!r}: leave it out.")
    elif bare:
        file = next(path for path in (folder / f"{name}{suffix}" for suffix in SUFFIXES) if path.is_file())
        content = _file_rows(file) if file.stat().st_size else []
        rows = table(content, where, DatasetInfo(dataset_name="json", config_name="default"), "train")
    elif keep_dataset_cache:
        with whole_cache(where):
            splits = load_dataset(str(source), name)
            rows = splits[_choose(splits, split, where)]
    else:
        rows = _uncached(str(source), name, split, where)
    if len(rows) == 0:
        raise UserError(f"{where[0].upper()}{where[1:]} is empty: it has no rows.")
    return rows


def read_file(path: str | Path, columns: Sequence[str] = ()) -> Dataset:
    """The rows of a JSON, JSON Lines, CSV or Parquet file, in memory. The cells of a CSV file are texts.

    A text file (`.txt`) is one row of plain text.

    Args:
        path: of the file.
        columns: that must be texts in every row.

    Raises:
        UserError: no rows, a row without these texts, or a content that is no table of rows.
        FileNotFoundError: there is no such file.
    """
    rows = _file_rows(Path(path))
    for number, row in enumerate(rows if columns else ()):
        if not isinstance(row, dict):
            raise UserError(f"Row {number} of {path} is not an object with {' and '.join(columns)}.")
        missing = [column for column in columns if column not in row]
        if missing:
            raise UserError(f"Row {number} of {path} has no {' and no '.join(missing)}.")
        wrong = [column for column in columns if not isinstance(row[column], str)]
        if wrong:
            raise UserError(f"Row {number} of {path}: {wrong[0]} must be a text.")
    return table(rows, str(path))


def table(rows: Sequence[Any], where: str, info: DatasetInfo | None = None, split: str | None = None) -> Dataset:
    """Rows as a data set in memory, with a column for each name that any row has.

    Args:
        rows: objects with a value for each column.
        where: what messages call them.
        info, split: by which a card names them.

    Raises:
        UserError: for a row that is no object, a column of texts and numbers mixed, or half a character.
    """
    columns: dict[str, str | None] = {}  # and the kind of value in each
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise UserError(f"Row {number} of {where} is not an object with a value for each column.")
        for column, value in row.items():
            kind, before = KINDS.get(type(value)), columns.setdefault(column, None)
            if kind and before and kind != before:
                raise UserError(f"Row {number} of {where}: {column} is {kind}, and {before} in rows before.")
            columns[column] = before or kind
            with private(f"Row {number} of {where}: {column} holds half a character (a lone surrogate)"):
                value.encode() if isinstance(value, str) else None
    with private(f"The rows of {where} do not make a table: within a column they are built differently"):
        return Dataset.from_dict(
            {column: [row.get(column) for row in rows] for column in columns}, info=info, split=split
        )


def _file_rows(path: Path) -> list[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.suffix == ".txt":
        with private(f"{path} is not UTF-8 text"):
            return [{TEXT: path.read_bytes().decode("utf-8-sig")}]
    if path.suffix not in (".csv", ".parquet"):
        return read_jsonl(path)
    with private(f"{path} cannot be read as a {path.suffix[1:]} file"):
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path).to_pylist()
        return pandas.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")


def _uncached(source: str, name: str, split: str, where: str) -> Dataset:
    """Rows as the card says, where nothing is left on disk: local files are read here, all else is streamed."""
    with tempfile.TemporaryDirectory(prefix="mdu_trainer_") as cache:
        with _readable(source):
            builder = load_dataset_builder(source, name, cache_dir=cache)
        info = DatasetInfo(dataset_name=builder.info.dataset_name, config_name=builder.info.config_name)
        files = builder.config.data_files or {}
        chosen = _choose(files, split, where) if files else split
        paths = [Path(file) for file in files.get(chosen, ())]
        if paths and all(path.suffix in SUFFIXES and path.is_file() for path in paths) and not _has_options(builder):
            return table([row for path in paths for row in _file_rows(path)], where, info, chosen)
        with _readable(source):
            stream = load_dataset(source, name, streaming=True, cache_dir=cache)
        rows = stream[_choose(stream, split, where)]
        with private(f"The rows of {where} cannot be read"):
            content = list(rows)
        return table(content, where, info, str(rows.split))


def _has_options(builder: DatasetBuilder) -> bool:
    """Whether a card says how its files are to be read, such as by which separator."""
    names = {field.name for field in fields(builder.config)} - set(BuilderConfig.__dataclass_fields__)
    usual = type(builder.config)()
    return any(getattr(builder.config, name) != getattr(usual, name) for name in names)


def _choose(splits: Mapping[str, Any], split: str, where: str) -> str:
    """The name of the split that is meant: the one that is named, or the only one."""
    if split and split not in splits:
        raise UserError(f"{where[0].upper()}{where[1:]} has no split {split!r}; it has {', '.join(splits)}.")
    if not split and len(splits) != 1:
        raise UserError(
            f"{where[0].upper()}{where[1:]} has the splits {', '.join(splits)}; there must be one: choose it, as "
            "CONFIG/SPLIT."
        )
    return split or next(iter(splits))


def _split_files(folder: Path, config: str) -> dict[str, list[Path]]:
    """The files of each split of a config in a folder without a card: `SPLIT.json`, `SPLIT-00000-of-00002.parquet`."""
    found: dict[str, list[Path]] = {}
    for part in [folder / config, *([folder / "data", folder] if config == "default" else [])]:
        for path in sorted(part.iterdir()) if part.is_dir() and not found else ():
            if path.suffix in SUFFIXES:
                found.setdefault(re.sub(r"-\d+-of-\d+$", "", path.stem), []).append(path)
    return found


@contextmanager
def _readable(source: str | Path) -> Iterator[None]:
    """Errors about a card or a name; those of the system and of the Hub are clear, and quote no row."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        kind = type(error).__name__
        raise UserError(f"The card of {source} cannot be read, or lists files that are not there ({kind}).") from None


def first_rows(rows: Dataset, limit: int | None) -> Dataset:
    """The first `limit` rows; all if None. A limit below 1 is a ValueError."""
    return rows.select(range(_count(rows, limit)))


def spread(rows: Dataset, limit: int | None) -> Dataset:
    """At most `limit` rows, evenly spaced; all if None. A limit below 1 is a ValueError."""
    count = _count(rows, limit)
    return rows.select([i * len(rows) // count for i in range(count)])


def _count(rows: Dataset, limit: int | None) -> int:
    if limit is not None and limit < 1:
        raise UserError(f"The number of rows to use must be at least 1, got {limit}. Leave it out to use all.")
    return len(rows) if limit is None else min(len(rows), limit)


def check_columns(rows: Dataset, name: str, columns: Mapping[str, type]) -> None:
    """Refuse rows that cannot be asked or scored.

    Args:
        rows: to check.
        name: what messages call them.
        columns: name of a column -> `str` for a text, `list` for a list of texts.

    Raises:
        ValueError: for no rows, a missing column, or a value that is no text, blank or an empty list.
    """
    if not hasattr(rows, "column_names"):
        raise UserError(f"The {name} set is a {type(rows).__name__}: pass a `Dataset`.")
    if len(rows) == 0:
        raise UserError(f"The {name} set is empty. Check the split's name and any filter applied to it.")
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        asked = " Ask about texts with mdu_trainer.data.texts.passages(rows)." if of_text(rows) else ""
        raise UserError(
            f"The {name} set has no column {', '.join(missing)}; its columns are {rows.column_names}.{asked}"
        )
    for column, kind in columns.items():
        with private(f"Column {column} of the {name} set cannot be read"), whole_cache(f"the {name} set"):
            values = list(rows[column])
        for row, value in enumerate(values):
            texts = value if kind is list else [value]
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                wanted = "a list of texts" if kind is list else "a text"
                raise UserError(f"Row {row} of the {name} set: {column} must be {wanted}.")
            if not all(text.strip() for text in texts):
                raise UserError(f"Row {row} of the {name} set: {column} is blank, so it has no tokens to score.")
