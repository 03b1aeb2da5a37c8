"""The history of the leak checks of a model: one line of JSON a check, figures only."""

import json
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..files import UserError, read_jsonl, typed, write_whole

LEAK_HISTORY = "leak_history.jsonl"  # what a page looks for


@dataclass(frozen=True)
class PastCheck:
    """The figures of one check.

    Attributes:
        date: when it was made, as ISO 8601 has it, with the offset from UTC.
        leak, low, high: the mean over rows with its 95 % interval, None of a single row.
        rows, not_measured: how many rows.
        max_leak, passed: the limit and whether it was kept; None of an audit, which has no limit.
        checks: name of a check -> mean score.
        left_out: checks that suited none of the rows.
        seed: of the samples.
    """

    date: str
    leak: float
    low: float | None
    high: float | None
    rows: int
    not_measured: int
    max_leak: float | None = None
    passed: bool | None = None
    checks: dict[str, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    seed: int = 0

    @property
    def moment(self) -> datetime:
        """The date as a moment in UTC."""
        moment = datetime.fromisoformat(self.date)
        return moment.replace(tzinfo=timezone.utc) if moment.tzinfo is None else moment.astimezone(timezone.utc)


def load_history(path: str | Path) -> list[PastCheck]:
    """Return the checks in a file, in the order of their dates.

    Raises:
        UserError: a line is no check. The message names file and line, and quotes neither.
        FileNotFoundError: there is no such file.
    """
    found = []
    for number, line in enumerate(read_jsonl(path), 1):
        try:
            found.append(typed(PastCheck, line))
            found[-1].moment  # noqa: B018  a date that is none is refused here
        except ValueError as error:
            raise UserError(
                f"{path}, check {number}, is none of a leak check ({error}). Name the file that --history wrote."
            ) from None
    return sorted(found, key=lambda check: check.moment)


def add_to_history(path: str | Path, answer: dict[str, Any], date: str | None = None) -> None:
    """Add a check to a file, whole or not at all; the file is made if there is none.

    Args:
        path: of the file.
        answer: what the check prints. What it says of single rows, and their texts, stay out.
        date: by default now.
    """
    path, known = Path(path), {one.name for one in fields(PastCheck)}
    date = date or datetime.now(timezone.utc).isoformat(timespec="seconds")
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    line = json.dumps({"date": date} | {name: value for name, value in answer.items() if name in known})
    write_whole(path, f"{before.rstrip()}\n{line}\n".lstrip())
