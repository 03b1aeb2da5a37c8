"""Columns of rows under other names: a map from what they mean here to what they are called there.

    columns = parse_columns("prompt=input,completion=output")  # {"question": "input", "answer": "output"}
    rows = rename(rows, columns, "rows.jsonl")

Left stands the name here, right that of the data. A map with `text` alone makes rows of plain text. `rows` names a
column whose values are lists of rows, which then take the place of the rows.
"""

from collections.abc import Mapping, Sequence

from datasets import Dataset

from ..data.reading import TEXT, names_of
from ..files import UserError
from .sources import table

ROWS, GROUP = "rows", "group"
NAMES = {  # as a user may call a column -> as it is called where rows are scored
    "prompt": "question",
    "completion": "answer",
    "chosen": "refusal",
    **{name: name for name in ("question", "answer", "refusal", "paraphrased_question", "choices", TEXT, GROUP, ROWS)},
}


def parse_columns(given: str | None) -> dict[str, str]:
    """Read a map as a command line has it: `prompt=input,completion=output`; none if nothing is given.

    Raises:
        UserError: it is no such list of pairs, or names a column that has no meaning here, or one twice.
    """
    found: dict[str, str] = {}
    for pair in given.split(",") if given is not None else ():
        ours, equals, theirs = (part.strip() for part in pair.partition("="))
        if not equals or not theirs or ours not in NAMES:
            raise UserError(
                f"--columns {given} cannot be read at {pair.strip()!r}: write NAME=COLUMN, separated by commas, as in "
                f"prompt=input,completion=output. NAME is one of {', '.join(NAMES)}."
            )
        if NAMES[ours] in found or theirs in found.values():
            raise UserError(f"--columns {given} names {ours} or {theirs} twice: name each column once.")
        found[NAMES[ours]] = theirs
    return found


def rename(rows: Dataset, columns: Mapping[str, str], where: str) -> Dataset:
    """Give columns the names that they have here. Others keep theirs, but for those that a new name replaces.

    Args:
        rows: as they were read.
        columns: name here -> name there.
        where: what messages call the rows.

    Raises:
        UserError: a column is not there; the message has those that are, and the map to pass.
    """
    columns = dict(columns)
    if ROWS in columns:
        rows = _inner_rows(rows, columns.pop(ROWS), where)
    check_named(rows, columns, where)
    if TEXT in columns:
        return rows.select_columns([columns[TEXT]]).rename_columns({columns[TEXT]: TEXT})
    replaced = [name for name in columns if name in rows.column_names and name not in columns.values()]
    kept = rows.remove_columns(replaced)
    moved = {theirs: f"{ours} of the map" for ours, theirs in columns.items()}  # two columns may change places
    return kept.rename_columns(moved).rename_columns({f"{ours} of the map": ours for ours in columns})


def check_named(rows: Dataset, columns: Mapping[str, str], where: str) -> None:
    """Refuse rows that lack a column of the map."""
    missing = [ours for ours, theirs in columns.items() if theirs not in rows.column_names]
    if missing:
        named = ", ".join(columns[ours] for ours in missing)
        raise UserError(f"{where} has no column {named}. {map_to_pass(rows.column_names, missing)}")


def map_to_pass(found: Sequence[str], wanted: Sequence[str]) -> str:
    """Say which columns there are, and how to name those that are meant."""
    pairs = ",".join(f"{name}=NAME" for name in wanted)
    return f"Its columns are {', '.join(found)}. Say which are meant, by their names: --columns {pairs}."


def _inner_rows(rows: Dataset, column: str, where: str) -> Dataset:
    check_named(rows, {ROWS: column}, where)
    inner = [row for part in rows[column] for row in (part if isinstance(part, list) else [None])]
    return table(inner, f"column {column} of {where}", names_of(rows), str(rows.split))
