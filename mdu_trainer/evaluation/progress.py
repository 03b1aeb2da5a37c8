"""A file of what long work has finished, so that a killed run goes on from there. Scores only."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..files import UserError

T = TypeVar("T")
SCORING = 2  # in headers; another number once the same text scores otherwise, so that no file mixes the two


class ProgressFile:
    """A file of finished work: a header line that says of what, then a line each, appended as it is finished.

    Args:
        path: of the file, or None to keep nothing.
        work: what messages call the work, a noun that takes "an".
    """

    def __init__(self, path: str | Path | None, work: str = "evaluation"):
        self.path, self.work = None if path is None else Path(path), work
        self._file = None

    def __enter__(self) -> "ProgressFile":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._file is not None:
            self._file.close()

    def resume(self, header: dict[str, Any], read: Callable[[dict[str, Any]], T]) -> list[T]:
        """Open the file for appending, and return what it holds.

        Args:
            header: what the work depends on. `progress` names the kind of file.
            read: makes a finished piece of a line; it may raise any error of a line that is none, such as KeyError.

        Raises:
            UserError: the file is of other work, which the message names, or damaged. Nothing of it is changed.
        """
        if self.path is None:
            return []
        header = json.loads(json.dumps(header))  # as it is read back
        if self.path.is_dir():
            raise UserError(f"{self.path} is a folder, not the progress of an {self.work}; choose another file.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]  # a kill may leave half a line
        first, *lines = whole.decode(errors="replace").split("\n")[:-1] or [""]
        if whole or not json.dumps(header).encode().startswith(content):
            self._check(first, header)
        done = []
        for number, text in enumerate(lines, start=2):
            try:
                done.append(read(json.loads(text)))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(f"{self.path}, line {number}, is damaged. Delete the file to start anew.") from None
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        self.path.touch(mode=0o600)  # it has a hash of the rows, and scores of each
        self._file = self.path.open("a", encoding="utf-8")
        if not whole:
            self.append([header])
        return done

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Keep these finished pieces."""
        if self._file is not None:
            self._file.write("".join(json.dumps(line) + "\n" for line in lines))
            self._file.flush()

    def _check(self, line: str, header: dict[str, Any]) -> None:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or found.get("progress") != header["progress"]:
            raise UserError(f"{self.path} is not the progress of an {self.work}; choose another file.")
        other = list(_differences(found, header))
        if other:
            raise UserError(
                f"{self.path} holds the progress of another {self.work} ({', '.join(other)} differ). Choose another "
                "file, or delete this one to start anew."
            )


def _differences(found: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """Dotted names of what differs between two JSON objects."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in {**found, **wanted}:
            yield from _differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif found != wanted:
        yield name
