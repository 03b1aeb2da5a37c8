"""The attacks by name. One of your own is a function and a line, also from outside the package:

def shouting(target, seed):
    prompts = [question.prompt for question in target.encode([text.upper() for text in target.rows["question"]])]
    return worst_case(target, {"upper case": target.score(target.decode(prompts))})

register_attack("shouting", Attack(shouting, "ask in capital letters"))
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ..files import UserError
from . import (
    adapter,
    alias,
    context,
    decoding,
    guidance,
    infill,
    leak_at_k,
    membership,
    multi_turn,
    paraphrase,
    prefix,
    quantise,
    relearn,
)
from .base import AttackScores, AttackSettings, Target
from .results import NO_ATTACK

ADAPTER = "adapter"  # in `Attack.needs`: not a setting, but a model that has one


@dataclass(frozen=True)
class Attack:
    """An attack, as it is registered.

    Attributes:
        run: `(target, seed) -> AttackScores`. It leaves the model as it was. All processes of a launch make it
            together: what the target decodes, completes and weighs is shared, and what else is random must be drawn
            by the seed.
        words: what it does, in a line for tables and cards.
        needs: settings that must not be None, and "adapter" for a model that must have one.
    """

    run: Callable[[Target, int], AttackScores]
    words: str
    needs: tuple[str, ...] = ()


ATTACKS: dict[str, Attack] = {
    "relearn-related": Attack(
        relearn.related, "fine-tune on some of the forgotten rows at rates over a decade, ask the others"
    ),
    "relearn-lora": Attack(relearn.lora, "train a LoRA on some of the rows at two rates, ask the others"),
    "relearn-quantised": Attack(
        relearn.rounded, "round the weights to 4 bits and fine-tune on some of the rows, ask the others"
    ),
    "relearn-benign": Attack(relearn.benign, "fine-tune on unrelated rows", ("unrelated",)),
    **{
        f"infill-{which}": Attack(partial(infill.attack, which=which), f"reveal {words}, fill in the rest")
        for which, words in {
            "first": "the first tokens of the answer",
            "last": "the last tokens of the answer",
            "edges": "both ends of the answer",
            "random": "random tokens of the answer",
            "entity": "some of the answer's stored tokens",
            "structural": "the answer's structural words",
        }.items()
    },
    "prefix": Attack(prefix.attack, "reveal the first words of the answer, decode on"),
    "paraphrase": Attack(paraphrase.attack, "ask in other words"),
    "alias": Attack(alias.attack, "ask without the name of whom the question is about"),
    "context": Attack(context.attack, "put informative text before the question and after the answer"),
    "multi-turn": Attack(multi_turn.attack, "ask in a conversation, and again after calling the answer wrong"),
    "guidance": Attack(guidance.attack, "decode with classifier-free guidance"),
    "decoding": Attack(decoding.attack, "decode in other steps, blocks and orders"),
    "leak-at-k": Attack(leak_at_k.attack, "sample again and again"),
    "quantise-8": Attack(partial(quantise.attack, bits=8), "round the weights to 8 bits"),
    "quantise-4": Attack(partial(quantise.attack, bits=4), "round the weights to 4 bits"),
    "adapter": Attack(adapter.attack, "switch the adapter off, scale it, subtract it", (ADAPTER,)),
    "membership": Attack(membership.attack, "tell forget rows from unseen ones", ("unseen",)),
}


def register_attack(name: str, attack: Attack) -> None:
    """Make an attack of your own available by name, in `choose_attacks`, the scripts, tables, cards and pages.

    Raises:
        UserError: the name is taken.
    """
    if name in ATTACKS or name == NO_ATTACK:
        raise UserError(f"There is an attack {name!r} already. Choose another name.")
    ATTACKS[name] = attack


def choose_attacks(names: Sequence[str], settings: AttackSettings, *, has_adapter: bool = False) -> dict[str, Attack]:
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
