"""An unlearning in short, for people: what was asked for, what was measured before and after, and a verdict.

The card and the certificate say the same. The verdicts follow the rule of `verdicts`.
"""

from dataclasses import dataclass, replace
from typing import Any

from ..attacks.results import BASE, Recovery
from ..evaluation.results import COLUMNS, Estimate, Results, Run, level_of, markdown_table
from ..provenance.facts import Facts
from .markup import markdown_text
from .verdicts import Verdict, attacks, forgetting, keeping, told_apart

NOT_KNOWN = "Whether it worked is not known here: no figures were handed over."
BEFORE_AFTER = {"forget rL": ("rows to forget", "forget"), "retain rL": ("rows to keep", "retain")}
DIAGNOSTICS = {  # title -> place of a score that tells how a model forgot, and of whom
    "degenerate answers on the rows to forget": ("forget", "degeneracy"),
    "on the rows to keep": ("retain", "degeneracy"),
    "truth ratio on the rows to forget": ("forget", "truth_ratio"),
    "forget quality": (None, "forget_quality"),
}


@dataclass(frozen=True)
class Short:
    """What is said in short.

    Attributes:
        table: ROUGE-L recall before and after, and of a never-trained model, under a header; empty if not measured.
        verdicts: on forgetting, keeping and attacks; empty if nothing was measured.
        sentence: the verdict in one sentence.
        diagnostics: title -> value.
    """

    table: list[list[str]]
    verdicts: list[Verdict]
    sentence: str
    diagnostics: dict[str, str]


def in_short(facts: Facts, results: Results | None, run: Run | None, recovery: Recovery | None) -> Short:
    """Return an unlearning in short.

    Args:
        facts: of the checkpoint.
        results, run: a comparison, and the checkpoint's run in it.
        recovery: attacks on it.
    """
    if run is None and recovery is None:
        return Short([], [], NOT_KNOWN, {})
    runs = results.runs if results else []
    base = next((one for one in runs if one.method == BASE), None)
    level = level_of(runs, COLUMNS["forget rL"])
    judged = [forgetting(run, base, level), keeping(run, base), attacks(recovery, facts.name)]
    return Short(
        _before_after(runs, base, run), judged, told_apart(recovery, facts.name), _diagnostics(run, recovery, facts)
    )


def card_short(facts: Facts, results: Results | None, run: Run | None, recovery: Recovery | None) -> dict[str, Any]:
    """Return the words of a card on an unlearning in short, as Markdown."""
    if recovery is not None:  # whose names are others' words
        recovery = replace(recovery, attacks={markdown_text(name): one for name, one in recovery.attacks.items()})
    short = in_short(facts, results, run, recovery)
    return {"short": short, "short_table": short.table and markdown_table(short.table)}


def _before_after(runs: list[Run], base: Run | None, run: Run | None) -> list[list[str]]:
    if run is None:
        return []
    columns = {"before": (lambda place: base and base.figure(*place)), "after": (lambda place: run.figure(*place))}
    columns["never trained"] = lambda place: level_of(runs, place)
    rows = []
    for title, (words, name) in BEFORE_AFTER.items():
        found = {column: figure(COLUMNS[title]) for column, figure in columns.items()}
        if found["after"]:
            rows.append([f"{words} ({run.rows.get(name, 0)})", *(str(one or "") for one in found.values())])
    return [["ROUGE-L recall", *columns], *rows] if rows else []


def _diagnostics(run: Run | None, recovery: Recovery | None, facts: Facts) -> dict[str, str]:
    scores = {title: run.figure(*place) for title, place in DIAGNOSTICS.items()} if run else {}
    found = {title: str(Estimate(score.value)) for title, score in scores.items() if score}
    area = None if recovery is None else recovery.two_sided().get(facts.name)
    return found | ({} if area is None else {"membership (0.5 is a guess)": f"{area:.3f}"})
