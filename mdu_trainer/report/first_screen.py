"""The first screen of the page, for somebody in a hurry: what was to be forgotten, and did it work."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..attacks.results import Recovery
from ..evaluation.frontier import candidates, select
from ..evaluation.results import Results, Run
from ..provenance.facts import Facts
from .data_names import data_name
from .verdicts import KEPT, verdicts

MOST_ROWS = 12  # of the table of verdicts; a sweep has more, and its tables are below


def first_screen(
    results: Results | None, recovery: Recovery | None, facts: Sequence[Facts], selected: Run | None
) -> dict[str, Any]:
    """Return the template's words on what was to be forgotten, and the verdicts.

    The verdicts are on one model: the selected one; without one the run that keeps enough (`verdicts.KEPT`) and
    forgets best, or that forgets best if none keeps enough. A table has the verdicts on all models if they are few.

    Args:
        results, recovery: what the page shows.
        facts: of the models in the folder.
        selected: the run that the settings of a sweep select.
    """
    runs = results.runs if results else []
    names = list(dict.fromkeys([run.name for run in candidates(runs)] or (recovery.models if recovery else [])))
    if not names:
        return {"requests": requests(results, facts), "judged": None, "verdicts": [], "verdict_table": None, "why": ""}
    judged, why = _judged(runs, names, selected)
    table = [["model", *(verdict.question for verdict in verdicts(runs, judged))]]
    table += [[name, *(verdict.words for verdict in verdicts(runs, name, recovery))] for name in names]
    return {
        "requests": requests(results, facts),
        "judged": judged,
        "why": why,
        "verdicts": verdicts(runs, judged, recovery),
        "verdict_table": table if 1 < len(names) <= MOST_ROWS else None,
    }


def requests(results: Results | None, facts: Sequence[Facts]) -> list[str]:
    """Return what was asked to be forgotten, once each: its description or the name of the data, and how many rows."""
    data = data_name(results) if results else ""
    found = [f"{one.description or data or one.forget} ({_rows(one.forget.rows)})" for one in facts]
    if not found and results:
        description = results.settings.get("forget_description") or data
        scored = max((run.rows.get("forget", 0) for run in results.runs), default=0)
        found = [f"{description} ({_rows(scored)} scored)" if scored else str(description)]
    return list(dict.fromkeys(found))


def _judged(runs: Sequence[Run], names: Sequence[str], selected: Run | None) -> tuple[str, str]:
    """Return the model that the verdicts are on, and why it is this one; nothing to say where there is no other."""
    if len(names) == 1:
        return names[0], ""
    if selected is not None:
        return selected.name, f"the one of {len(names)} that is selected"
    for conditions, which in ((f"retain>={KEPT}*base", " among those that keep enough"), ("", "")):
        with suppress(ValueError):  # none does, or it was not measured
            return select(runs, conditions).name, f"of {len(names)} models the one that forgets best{which}"
    return names[0], f"the first of {len(names)} models, as forgetting was not measured"


def _rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"
