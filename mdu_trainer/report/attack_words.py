"""The words of a model card on attacks, and the part of their record that is published."""

from dataclasses import replace

from ..attacks.results import BASE, NEVER, NO_ATTACK, Recovery
from ..evaluation.results import markdown_table
from ..files import UserError
from ..provenance.facts import Facts
from .markup import markdown_text


def attack_words(recovery: Recovery | None, facts: Facts) -> dict[str, str]:
    """Return the template's words on the attacks on a checkpoint: a table and sentences; nothing without attacks.

    Raises:
        ValueError: the checkpoint is none of the models that were attacked.
    """
    if recovery is None:
        return {}
    name = facts.name
    if name not in recovery.models:
        raise UserError(
            f"The checkpoint is {name}, and the attacks were on {', '.join(recovery.models)}. Pass the recovery of "
            "this checkpoint, or recovery=False."
        )
    return {
        "attacks": _table(recovery, name),
        "attack_sentence": _sentence(recovery, name) + _membership(recovery, name) + _weights(recovery, name),
    }


def public(recovery: Recovery, dataset: str) -> Recovery:
    """Return what is published: scores, with nothing but numbers among the settings, and another name for the data."""
    settings = recovery.settings | recovery.settings.get("decoding", {})
    return replace(
        recovery, dataset=dataset, settings={k: v for k, v in settings.items() if isinstance(v, int | float)}
    )


def _table(recovery: Recovery, name: str) -> str:
    ends = [BASE, NEVER] if recovery.has_floor else [BASE]
    rows = [["attack", "what it does", *ends, "this model", *(["recovery"] if recovery.has_floor else [])]]
    for attack, outcome in recovery.attacks.items():
        one = outcome.models[name]
        cells = [str(outcome.models[end].after) for end in ends] + [str(one.after)]
        if recovery.has_floor:
            cells.append("" if one.recovery is None else str(one.recovery))
        rows.append([markdown_text(attack), markdown_text(outcome.words), *cells])
    return markdown_table(rows, text_columns=2)


def _sentence(recovery: Recovery, name: str) -> str:
    found = {attack: e for attack, e in recovery.recoveries().get(name, {}).items() if attack != NO_ATTACK}
    if not recovery.has_floor:
        return (
            "No model that never saw the rows was attacked beside it, so it is not known how much of these scores is "
            "guessing or relearning that works on any model."
        )
    if not found:
        return (
            "Under none of these attacks can the base be told from a model that never saw the rows, so nothing "
            "follows from them."
        )
    attack = max(found, key=lambda one: found[one].value)
    way = recovery.attacks[attack].models[name].reached_by
    strongest = markdown_text(f"{attack} ({way})" if way else attack)
    return (
        "Recovery is 0 where an attack brings back no more than it gets out of a model that never saw the rows, and 1 "
        f"where it brings back all that the base knew; the strongest here, {strongest}, reached "
        f"{found[attack]}."
    )


def _membership(recovery: Recovery, name: str) -> str:
    """Return further sentences on membership, or nothing where it was not measured."""
    words = recovery.membership_words({BASE: BASE, NEVER: NEVER, name: "this model"})
    return f" {words}" if words else ""


def _weights(recovery: Recovery, name: str) -> str:
    """Return a further sentence on the weights, or nothing where they were not compared with the base's."""
    path = recovery.weights.get(name)
    if path is None:
        return ""
    losses = ", ".join(f"{loss:.2f}" for loss in path.losses.values())
    return (
        f" The weights are {path.distance:.3f} of the base's norm away from the base; on the straight line to it the "
        f"loss of the rows to forget is {losses} nats a token, with a barrier of {path.barrier:.2f}. A small distance "
        "without a barrier goes with knowledge that fine-tuning brings back (arXiv 2505.22310)."
    )
