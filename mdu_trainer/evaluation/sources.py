"""Benchmark data from a local folder or the Hub, checked before any model is loaded. No message quotes a row."""

from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset, get_dataset_config_names, load_dataset

from ..data import whole_cache
from ..files import UserError

SUFFIXES = (".json", ".jsonl")


def config_names(source: str | Path) -> list[str]:
    """The configs of a data set: those its card lists, or the JSON files of a folder without a card."""
    folder = Path(source)
    if folder.is_dir() and not (folder / "README.md").is_file():
        return sorted(path.stem for path in folder.iterdir() if path.suffix in SUFFIXES)
    return get_dataset_config_names(str(source))


def load_config(source: str | Path, config: str, file_names: Mapping[str, str] | None = None) -> Dataset:
    """The rows of one config.

    Args:
        source: a Hub name, a folder with a card that lists its configs, or one with a JSON file for each.
        config: name of the config, and of its file in a folder without a card.
        file_names: config -> stem of its file, where a folder's files are named otherwise.

    Raises:
        ValueError: for a config that is not there, one of several splits, or no rows.
    """
    names = config_names(source)
    stem = (file_names or {}).get(config, config)
    name = config if config in names else stem
    if name not in names:
        raise UserError(f"{source} has no config {config!r}; it has {', '.join(names) or 'none'}.")
    with whole_cache(f"config {config!r} of {source}"):
        splits = _load(Path(source), str(source), name)
    if len(splits) != 1:
        raise UserError(f"Config {config!r} of {source} has the splits {', '.join(splits)}; there must be one.")
    (rows,) = splits.values()
    if len(rows) == 0:
        raise UserError(f"Config {config!r} of {source} is empty: it has no rows.")
    return rows


def _load(folder: Path, source: str, name: str) -> Mapping[str, Dataset]:
    if (folder / "README.md").is_file() or not folder.is_dir():
        return load_dataset(source, name)
    file = next(path for path in (folder / f"{name}{suffix}" for suffix in SUFFIXES) if path.is_file())
    return load_dataset("json", data_files=str(file)) if file.stat().st_size else {name: Dataset.from_dict({})}


def spread(rows: Dataset, limit: int | None) -> Dataset:
    """At most `limit` rows, evenly spaced; all if None."""
    count = min(len(rows), limit or len(rows))
    return rows.select([i * len(rows) // count for i in range(count)])


def check_texts(rows: Dataset, name: str, columns: Mapping[str, type]) -> None:
    """Refuse rows that cannot be asked or scored.

    Args:
        rows: to check.
        name: what messages call them.
        columns: name of a column -> `str` for a text, `list` for a list of texts.

    Raises:
        ValueError: for no rows, a missing column, or a value that is no text, blank or an empty list.
    """
    if len(rows) == 0:
        raise UserError(f"The {name} set is empty. Check the split's name and any filter applied to it.")
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise UserError(f"The {name} set has no column {', '.join(missing)}; its columns are {rows.column_names}.")
    for column, kind in columns.items():
        for row, value in enumerate(rows[column]):
            texts = value if kind is list else [value]
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                wanted = "a list of texts" if kind is list else "a text"
                raise UserError(f"Row {row} of the {name} set: {column} must be {wanted}.")
            if not all(text.strip() for text in texts):
                raise UserError(f"Row {row} of the {name} set: {column} is blank, so it has no tokens to score.")
