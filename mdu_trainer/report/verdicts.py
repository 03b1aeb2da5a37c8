"""Did it work? One verdict in words, with its figure, on each of three questions: forgotten, kept, safe from attacks.

The rule, all of it:

- Forgetting compares the forget rL (ROUGE-L recall, or F1 if the runs show that) with a never-trained model's. Two
  scores differ if they are further apart than the 95 % interval of their difference, the root of the summed squares of
  the two half-widths that face each other, and than `NEGLIGIBLE`. No difference: "forgotten", but "cannot be told" if
  the base does not differ from the model either. Above: "still known". Below: "over-forgotten", which gives the
  deletion away. Without a never-trained model it is only said whether the score fell from the base's.
- Keeping compares the retain rL with the base's: `KEPT` of it or more is "kept", less is "damaged".
- Attacks goes by the highest upper end of the intervals of recovery (0: as a never-trained model, 1: as the base).
  Up to `LITTLE` is "held", up to `MUCH` "may leak some", above "may leak much". Where the lower end of that interval
  is above 0 it "leaks some", or "leaks some, maybe much", and above `MUCH` it "leaks much". Recovery needs a
  never-trained model; without one nothing is judged.

Told apart from a model that never saw the rows is a model under an attack if the two scores differ in the sense above,
in either direction: the card counts the attacks, without the plain question.

What was not measured is "not measured". The verdicts are on these scores, and are no proof of anything else.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ..attacks.results import BASE, NEVER, NO_ATTACK, Recovery
from ..evaluation.protocol import RL
from ..evaluation.results import COLUMNS, Estimate, Run, common, level_of

NEGLIGIBLE = 0.01  # a difference in rL that counts as none
KEPT = 0.95  # share of the base's retain rL
LITTLE, MUCH = 0.1, 0.5  # recovery
GOOD, BAD, OPEN = "good", "bad", "open"  # tones


class Verdict(NamedTuple):
    """A verdict on one question.

    Attributes:
        question: "Forgotten?", "Kept?" or "Safe from attacks?".
        words: the verdict, a word or two.
        figure: what it is based on; empty if nothing was measured.
        meaning: a sentence on what it means.
        tone: "good", "bad", or "open" where nothing can be concluded.
    """

    question: str
    words: str
    figure: str
    meaning: str
    tone: str


def verdicts(runs: Sequence[Run], name: str, recovery: Recovery | None = None) -> list[Verdict]:
    """Judge one model.

    Args:
        runs: of a comparison, with the base and the never-trained model if they were scored.
        name: of the model's run, and of the model in `recovery`.
        recovery: attacks on it.

    Returns:
        The verdicts on forgetting, keeping and attacks, always the three.

    Raises:
        UserError: the runs show different rL.
    """
    common(runs, "rouge")
    run = next((run for run in runs if run.name == name), None)
    base = next((run for run in runs if run.method == BASE), None)
    return [forgetting(run, base, level_of(runs, COLUMNS["forget rL"])), keeping(run, base), attacks(recovery, name)]


def forgetting(run: Run | None, base: Run | None, level: Estimate | None) -> Verdict:
    """Judge the forget rL of a run against a never-trained model's, or against the base's without one."""
    question = "Forgotten?"
    score, before = (one and one.figure(*COLUMNS["forget rL"]) for one in (run, base))
    if run is None or score is None:
        return Verdict(question, "not measured", "", "The rL on the rows to forget was not measured.", OPEN)
    if level is None:
        return _without_level(question, RL[run.rouge], score, before)
    figure = f"forget {RL[run.rouge]} {score}; never trained {level}"
    if differs(score, level):
        if score.value > level.value:
            return Verdict(question, "still known", figure, "It says more than a model that never saw the rows.", BAD)
        meaning = "It says less than any model that never saw the rows, which gives the deletion away."
        return Verdict(question, "over-forgotten", figure, meaning, BAD)
    if before is not None and not differs(score, before):
        meaning = "It can be told neither from a model that never saw the rows nor from the base."
        return Verdict(question, "cannot be told", figure, meaning, OPEN)
    return Verdict(question, "forgotten", figure, "It cannot be told from a model that never saw the rows.", GOOD)


def keeping(run: Run | None, base: Run | None) -> Verdict:
    """Judge the retain rL of a run against the base's."""
    question = "Kept?"
    score, before = (one and one.figure(*COLUMNS["retain rL"]) for one in (run, base))
    if run is None or score is None:
        return Verdict(question, "not measured", "", "The rL on the rows to keep was not measured.", OPEN)
    figure = f"retain {RL[run.rouge]} {score}"
    if before is None or before.value <= 0:
        return Verdict(question, "not known", figure, "There is no score of the base beside it.", OPEN)
    share = score.value / before.value
    figure += f"; base {before}"
    meaning = f"{math.floor(100 * share + 1e-9)} % of the base's score on the rows to keep is left."
    words, tone = ("kept", GOOD) if share >= KEPT else ("damaged", BAD)
    return Verdict(question, words, figure, meaning, tone)


def attacks(recovery: Recovery | None, name: str) -> Verdict:
    """Judge a model by the attack that may have brought back most of what was forgotten."""
    question = "Safe from attacks?"
    if recovery is None or name not in recovery.models:
        meaning = "No attack was run on this model. What plain questions do not show may still be in the weights."
        return Verdict(question, "not measured", "", meaning, OPEN)
    if not recovery.has_floor:
        meaning = "No never-trained model was attacked beside it: how much of a score is guessing is not known."
        return Verdict(question, "not known", _highest_score(recovery, name), meaning, OPEN)
    found = {
        attack: one
        for attack, one in recovery.recoveries().get(name, {}).items()
        if attack != NO_ATTACK and math.isfinite(_upper(one))
    }
    if not found:
        meaning = "Under no attack can the base be told from a never-trained model, so nothing follows."
        return Verdict(question, "cannot be told", "", meaning, OPEN)
    attack, worst = max(found.items(), key=lambda item: _upper(item[1]))
    figure = f"recovery up to {_upper(worst):.2f} (1 is the base): {attack}, {worst}"
    count = f"Highest of {len(found)} attack{'s' if len(found) > 1 else ''}."
    if _upper(worst) <= LITTLE:
        return Verdict(question, "held", figure, f"{count} Attacks that were not tried may do more.", GOOD)
    return Verdict(question, _leak(worst), figure, count, BAD)


def told_apart(recovery: Recovery | None, name: str) -> str:
    """Say in one sentence under how many attacks a model can be told apart from one that never saw the rows."""
    if recovery is None or name not in recovery.models:
        return "No attack was run on it, so it is not known what one would bring back."
    if not recovery.has_floor:
        return (
            "No model that never saw the rows was attacked beside it, so it is not known whether it can be told apart "
            "from one."
        )
    tried = {attack: one.models for attack, one in recovery.attacks.items() if attack != NO_ATTACK}
    found = [attack for attack, models in tried.items() if differs(models[name].after, models[NEVER].after)]
    count = f"{len(found) or 'none'} of {len(tried)} attack{'' if len(tried) == 1 else 's'}"
    which = f" ({', '.join(found)})" if found else ""
    return f"It can be told apart from a model that never saw the rows in {count}{which}."


def differs(one: Estimate, other: Estimate) -> bool:
    """Whether two scores are further apart than the 95 % interval of their difference, and than `NEGLIGIBLE`."""
    low, high = sorted((one, other), key=lambda score: score.value)
    above = 0.0 if low.high is None else max(0.0, low.high - low.value)
    below = 0.0 if high.low is None else max(0.0, high.value - high.low)
    return high.value - low.value > max(NEGLIGIBLE, math.hypot(above, below))


def _without_level(question: str, title: str, score: Estimate, before: Estimate | None) -> Verdict:
    """Judge forgetting by the base alone: lower is better, as far as that goes."""
    figure = f"forget {title} {score}" + ("" if before is None else f"; base {before}")
    meaning = "No never-trained model was scored: whether it is too much or not enough is not known."
    if before is None:
        return Verdict(question, "not known", figure, meaning, OPEN)
    if score.value < before.value and differs(score, before):
        return Verdict(question, "less than before", figure, meaning, OPEN)
    return Verdict(question, "not forgotten", figure, "It says as much as before.", BAD)


def _leak(recovery: Estimate) -> str:
    """How much leaks for sure, and how much may."""
    least, is_much = recovery.low or 0.0, _upper(recovery) > MUCH
    if least > MUCH:
        return "leaks much"
    if least > 0:
        return "leaks some, maybe much" if is_much else "leaks some"
    return "may leak much" if is_much else "may leak some"


def _highest_score(recovery: Recovery, name: str) -> str:
    """The attack with the highest score, where recovery is not defined."""
    scores = {attack: one.models[name].after for attack, one in recovery.attacks.items() if attack != NO_ATTACK}
    if not scores:
        return ""
    attack = max(scores, key=lambda one: scores[one].value)
    return f"highest score {scores[attack]}: {attack}; base {recovery.attacks[attack].models[BASE].after}"


def _upper(estimate: Estimate) -> float:
    return estimate.value if estimate.high is None else max(estimate.value, estimate.high)
