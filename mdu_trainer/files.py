"""Small files: written whole or not at all, and read with a word on what is wrong."""

import json
import os
from pathlib import Path
from typing import Any

SCHEMA = 1


class UserError(ValueError):
    """A mistake that the user can mend. The message says what is wrong, where, and what to do; it quotes no row.

    Scripts print it in one line and end with status 2 (`mdu_trainer.commands.run`).
    """


def read_jsonl(path: str | Path) -> list[Any]:
    """The rows of a file of JSON lines, or of one JSON array.

    A byte order mark is skipped. Lines end at a line feed only: U+2028 and U+0085 may stand inside a text.

    Raises:
        UserError: not UTF-8, not JSON, or no rows. The message names file and line, and quotes neither.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        text = path.read_bytes().decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text. Save it as UTF-8.") from None
    is_array = text.startswith("[")
    rows = []
    for number, part in enumerate([text] if is_array else text.split("\n"), 1):
        try:
            rows += json.loads(part) if is_array else [json.loads(part)] if part.strip() else []
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number + error.lineno - 1}, is not JSON.") from None
    if not rows:
        raise UserError(f"{path} is empty: it has no rows.")
    return rows


def write_whole(path: str | Path, text: str, *, private: bool = False) -> None:
    """Write a file whole or not at all: a kill leaves the one before.

    Args:
        path: of the file; its folder is made.
        text: the content.
        private: for its owner's eyes only.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.touch(mode=0o600 if private else 0o666)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_record(path: Path) -> dict[str, Any]:
    """The content of a JSON file beside the weights, without its schema.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not readable, or of another schema.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} holds no {path.name}: MDUTrainer writes it when it saves a model, beside the weights. "
            "Copy it along with them, or save the model with the trainer again."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content.pop("schema")
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be read. Save the model with the trainer again.") from error
    if found != SCHEMA:
        raise UserError(f"{path} has schema {found}, this version reads {SCHEMA}: save the model again.")
    return content
