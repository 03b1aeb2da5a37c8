"""Small files: written whole or not at all, and read with a word on what is wrong."""

import json
import os
from pathlib import Path
from typing import Any

SCHEMA = 1


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
        raise ValueError(f"{path} cannot be read. Save the model with the trainer again.") from error
    if found != SCHEMA:
        raise ValueError(f"{path} has schema {found}, this version reads {SCHEMA}: save the model again.")
    return content
