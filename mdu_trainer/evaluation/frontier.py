"""The Pareto front of forgetting against what is kept, and the choice of one run.

Where a model that never saw the rows to forget was scored (method "retain model"), its score is the target of
forgetting, and the best run is the nearest to it: answers above it still know something, and answers below it are
unlike those of any model that never knew, so they give the deletion away. Without such a model, lower is better.

marks = frontier(results.runs)
run = select(results.runs, "retain>=0.95*base,forget<=0.3")
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

from ..files import UserError
from .results import NEVER_TRAINED, ROUGE, Estimate, Place, Results, Run, level_of

FIGURES: dict[str, Place] = {  # scores by their short names
    "forget": ("forget", ROUGE),
    "retain": ("retain", ROUGE),
    "utility": (None, "model_utility"),
    "forget_quality": (None, "forget_quality"),
}
REFERENCES = ("base", NEVER_TRAINED)  # methods of runs to compare with, which nobody chooses
FRONT, DOMINATED, WITHIN = "front", "dominated", "within intervals"
CONDITION = re.compile(r"\s*([\w.]+)\s*(>=|<=)\s*(\d*\.?\d+(?:[eE][+-]?\d+)?)\s*(\*\s*base)?\s*")


class Mark(NamedTuple):
    """A run, and where it lies.

    Attributes:
        status: "front": no other run forgets as much and keeps as much, and more of one. "dominated": one does, and
            its interval of one of the two scores lies beyond this run's. "within intervals": one does, but the
            intervals of both scores overlap for each such run.
        by: the run that dominates it (clearly, if one does), the one that forgets best; None on the front.
    """

    run: Run
    status: str
    by: Run | None = None


class Condition(NamedTuple):
    """A bound on a score, e.g. `retain>=0.95*base`.

    Attributes:
        figure: the name of the score, see `place_of`.
        at_least: `>=`; otherwise `<=`.
        bound: the number.
        relative: the number multiplies the base's score.
    """

    figure: str
    at_least: bool
    bound: float
    relative: bool

    def __str__(self) -> str:
        return f"{self.figure}{'>=' if self.at_least else '<='}{self.bound:g}{'*base' if self.relative else ''}"

    def shortfall(self, run: Run, base: Run | None) -> float:
        """The distance of a run from satisfying it: 0 if it does, infinite if it was not measured."""
        value, bound = value_of(run, self.figure), self.bound
        if self.relative:
            assert base is not None  # `select` has looked
            bound *= value_of(base, self.figure)
        short = bound - value if self.at_least else value - bound
        return math.inf if math.isnan(short) else max(0.0, short)


def place_of(name: str) -> Place:
    """The set and the metric of the score of that name.

    Args:
        name: `forget`, `retain` (both ROUGE-L, the recall or the F1 as `Run.rouge` says), `utility`,
            `forget_quality`, or any other score as SET.METRIC, e.g. `retain.probability`, or `model.METRIC`.

    Raises:
        ValueError: for a name of neither kind.
    """
    if name in FIGURES:
        return FIGURES[name]
    part, dot, metric = name.partition(".")
    if not (part and dot and metric):
        raise UserError(f"There is no figure {name!r}: name {', '.join(FIGURES)}, or any other as SET.METRIC.")
    return (None if part == "model" else part), metric


def value_of(run: Run, name: str) -> float:
    """A run's score, NaN if it was not measured."""
    found = run.figure(*place_of(name))
    return math.nan if found is None else found.value


def candidates(runs: Iterable[Run]) -> list[Run]:
    """The runs that one can choose: without the base and the model that never saw the rows."""
    return [run for run in runs if run.method not in REFERENCES]


def frontier(runs: Sequence[Run], forget: str = "forget", keep: str = "retain") -> list[Mark]:
    """Mark the Pareto front of forgetting against a score to keep high.

    A run forgets as much as another if its forget score is as near to the never-trained model's, or, without such a
    model, as low. References (`REFERENCES`) and runs without one of the scores are left out. Intervals are those of
    each run alone: two runs that were scored on the same rows can differ beyond doubt although they overlap. A score
    without an interval settles nothing; and being nearer must hold at both ends of the never-trained model's interval.

    Args:
        runs: of one comparison.
        forget, keep: names of the scores, see `place_of`. The never-trained model must be among `runs` to count.

    Returns:
        A mark a run, in the order of `runs`.

    Raises:
        ValueError: for a score that does not exist.
    """
    measured = [run for run in candidates(runs) if not math.isnan(value_of(run, forget) + value_of(run, keep))]
    level = level_of(runs, place_of(forget))
    levels = [] if level is None else [end for end in (level.value, level.low, level.high) if end is not None]
    pairs = [(_score(run, forget), _score(run, keep)) for run in measured]
    points = [(_to_lower(lost, level).value, kept.value) for lost, kept in pairs]

    def mark(i: int) -> Mark:
        better = [j for j, other in enumerate(points) if _dominates(other, points[i])]
        if not better:
            return Mark(measured[i], FRONT)
        clear = [j for j in better if _clearly(pairs[j], pairs[i], levels)]
        by = min(clear or better, key=lambda j: (points[j][0], -points[j][1]))
        return Mark(measured[i], DOMINATED if clear else WITHIN, measured[by])

    return [mark(i) for i in range(len(measured))]


def select(runs: Sequence[Run], conditions: str = "", forget: str = "forget", keep: str = "retain") -> Run:
    """The run to keep: of those that satisfy the conditions the one that forgets best.

    That is the one nearest to the never-trained model, or without such a model the one with the lowest score.

    Args:
        runs: of one comparison.
        conditions: bounds, separated by commas: `retain>=0.95`, `utility>=0.9`, `forget<=0.2`; `*base` makes a bound
            relative to the base, as in `retain>=0.95*base`. All must hold.
        forget, keep: names of the scores: of runs that forget equally well the one that keeps more is chosen.

    Raises:
        ValueError: for conditions that cannot be read, a score that does not exist or that no run has, and if no run
            satisfies them: the message says how close the nearest comes.
    """
    bounds, base = parse_conditions(conditions), next((run for run in runs if run.method == "base"), None)
    chosen = candidates(runs)
    if not chosen:
        raise UserError("There is no run to select from: the comparison has no unlearned model.")
    for name in dict.fromkeys([forget, *(bound.figure for bound in bounds)]):
        if all(math.isnan(value_of(run, name)) for run in chosen):
            known = dict.fromkeys(f"{part or 'model'}.{metric}" for run in chosen for part, metric in run.places())
            raise UserError(f"No run has the figure {name}: measured are {', '.join(known)}.")
    for bound in bounds:
        if bound.relative and (base is None or math.isnan(value_of(base, bound.figure))):
            raise UserError(f"{bound} needs a base run that has the figure {bound.figure}.")
    short = [(max((bound.shortfall(run, base) for bound in bounds), default=0.0), run) for run in chosen]
    fit = [run for gap, run in short if gap == 0 and not math.isnan(value_of(run, forget))]
    if fit:
        level = level_of(runs, place_of(forget))

        def rank(run: Run) -> tuple[float, float]:
            kept = value_of(run, keep)
            lost = _to_lower(Estimate(value_of(run, forget)), level).value
            return lost, math.inf if math.isnan(kept) else -kept

        return min(fit, key=rank)
    _, nearest = min(short, key=lambda pair: pair[0])
    missed = [
        f"{bound.figure} is {value_of(nearest, bound.figure):.3f}, {bound.shortfall(nearest, base):.2g} from {bound}"
        for bound in bounds
        if bound.shortfall(nearest, base) > 0
    ]
    raise UserError(f"No run satisfies {conditions.strip()}. The nearest is {nearest.name}: {'; '.join(missed)}.")


def parse_conditions(text: str) -> list[Condition]:
    """Read bounds like `retain>=0.95*base,forget<=0.2`. A part that is none, or an unknown score, is a ValueError."""
    conditions = []
    for part in filter(str.strip, text.split(",")):
        found = CONDITION.fullmatch(part)
        if found is None:
            raise UserError(f"{part.strip()!r} is no condition: write e.g. retain>=0.95, forget<=0.2*base.")
        name, sign, bound, relative = found.groups()
        place_of(name)
        conditions.append(Condition(name, sign == ">=", float(bound), relative is not None))
    return conditions


def frontier_cells(results: Results, selected: Run | None = None, keep: str = "retain") -> list[list[str]]:
    """`Results.table_cells` with a column that says where each run lies, and which one is selected (*).

    Without the column where no run has both scores.
    """
    words = {mark.run.name: mark.status for mark in frontier(results.runs, keep=keep)}
    if selected is not None:
        words[selected.name] = f"{words.get(selected.name, '')} *".strip()
    return results.table_cells({"front": words} if words else None)


def reading(runs: Sequence[Run], forget: str = "forget") -> str:
    """How the forget score is read in this comparison, in a sentence; empty if no run was measured."""
    level = level_of(runs, place_of(forget))
    if all(math.isnan(value_of(run, forget)) for run in candidates(runs)):
        return ""
    if level is None:
        return (
            "No never-trained model was scored, so a lower forget score counts as better, and over-forgetting, which "
            "gives the deletion away, goes unseen."
        )
    return (
        f"The target of forgetting is the score of the never-trained model, {level}: nearer to it is better. "
        "Above it something is still known; below it is over-forgotten, which gives the deletion away."
    )


def _score(run: Run, name: str) -> Estimate:
    return cast(Estimate, run.figure(*place_of(name)))


def _to_lower(score: Estimate, level: Estimate | None) -> Estimate:
    """What is the lower the better: the distance to the never-trained model, without one the score."""
    return score if level is None else score.distance(level.value)


def _dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """At least as low in the first figure and as high in the second, and better in one."""
    return one[0] <= other[0] and one[1] >= other[1] and one != other


def _clearly(one: tuple[Estimate, Estimate], other: tuple[Estimate, Estimate], levels: Sequence[float]) -> bool:
    """Whether one of the two scores is better beyond both intervals; the first by its distance to each level."""
    nearer = [(one[0].distance(level), other[0].distance(level)) for level in levels] or [(one[0], other[0])]
    return all(_below(*pair) for pair in nearer) or _below(other[1], one[1])


def _below(low: Estimate, high: Estimate) -> bool:
    """Whether an interval lies wholly below another."""
    return low.high is not None and high.low is not None and low.high < high.low
