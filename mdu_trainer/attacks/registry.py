"""The attacks by name. Importing this costs nothing: an attack's module is loaded when the attack is run."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from ..files import UserError

if TYPE_CHECKING:
    from .base import AttackScores, AttackSettings, Target

ADAPTER = "adapter"  # in `Attack.needs`: not a setting, but a model that has one


class Attack(NamedTuple):
    """An attack, as it is registered.

    Attributes:
        run: `(target, seed) -> AttackScores`. It leaves the model as it was.
        words: what it does, in a line for tables and cards.
        needs: settings that must not be None, and "adapter" for a model that must have one.
    """

    run: Callable[["Target", int], "AttackScores"]
    words: str
    needs: tuple[str, ...] = ()


def _lazy(module: str, function: str = "attack", *arguments: float | str) -> Callable[["Target", int], "AttackScores"]:
    """`function(target, seed, *arguments)` of a module that is imported when it is called."""

    def run(target: "Target", seed: int) -> "AttackScores":
        return getattr(import_module(f".{module}", __package__), function)(target, seed, *arguments)

    return run


ATTACKS: dict[str, Attack] = {
    "relearn-related": Attack(_lazy("relearn", "related"), "fine-tune on some of the forgotten rows, ask the others"),
    "relearn-benign": Attack(_lazy("relearn", "benign"), "fine-tune on unrelated rows", ("unrelated",)),
    **{
        f"infill-{which}": Attack(_lazy("infill", "attack", which), f"reveal {words}, fill in the rest")
        for which, words in {
            "first": "the first tokens of the answer",
            "last": "the last tokens of the answer",
            "edges": "both ends of the answer",
            "random": "random tokens of the answer",
            "entity": "some of the answer's stored tokens",
            "structural": "the answer's structural words",
        }.items()
    },
    "prefix": Attack(_lazy("prefix"), "reveal the first words of the answer, decode on"),
    "paraphrase": Attack(_lazy("paraphrase"), "ask in other words"),
    "guidance": Attack(_lazy("guidance"), "decode with classifier-free guidance"),
    "decoding": Attack(_lazy("decoding"), "decode in other steps, blocks and orders"),
    "leak-at-k": Attack(_lazy("leak_at_k"), "sample again and again"),
    "quantise-8": Attack(_lazy("quantise", "attack", 8), "round the weights to 8 bits"),
    "quantise-4": Attack(_lazy("quantise", "attack", 4), "round the weights to 4 bits"),
    "adapter": Attack(_lazy("adapter"), "switch the adapter off, scale it, subtract it", (ADAPTER,)),
    "membership": Attack(_lazy("membership"), "tell forget rows from unseen ones", ("unseen",)),
}


def choose_attacks(
    names: Sequence[str], settings: "AttackSettings", *, has_adapter: bool = False
) -> dict[str, Attack]:
    """Attacks by their names, once it is clear that each has what it needs. No model need be loaded for that.

    Args:
        names: in `ATTACKS`.
        settings: of the attacks.
        has_adapter: whether the models have an adapter that can be switched off.

    Raises:
        ValueError: for no name, an unknown one, or an attack without what it needs.
    """
    unknown = [name for name in names if name not in ATTACKS]
    if unknown or not names:
        raise UserError(f"Unknown attacks: {', '.join(unknown) or 'none given'}. Choose from {', '.join(ATTACKS)}.")
    for name in names:
        for need in ATTACKS[name].needs:
            if need == ADAPTER and not has_adapter:
                raise UserError(f"The attack {name!r} needs a PEFT adapter, and the model has none: leave it out.")
            if need != ADAPTER and getattr(settings, need) is None:
                raise UserError(
                    f"The attack {name!r} needs rows in AttackSettings.{need}: pass some, or leave the attack out."
                )
    return {name: ATTACKS[name] for name in names}
