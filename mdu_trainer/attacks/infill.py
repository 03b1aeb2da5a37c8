"""Reveal a part of the answer, and let the model fill in the rest: a masked model sees what stands on both sides.

Decoding is greedy at the true length, as in `mdu_trainer.evaluation.metrics.memorization`. A row's score is the recall
of its stored words that are not revealed to the last token; names and wording, which a model that never saw the row
fills in too, do not count. `before` is that of the same words when nothing is revealed. Rows of which nothing is
revealed, or all stored words are, are left out. `path` has the share of tokens that was revealed.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from ..masking import counter_uniform
from .base import AttackScores, NothingToAttack, Target, mean, recall, said

DRAWS = 4  # of what is random; a row's score is their mean


def _some_stored(roles: Sequence[str], share: float, noise: Sequence[float]) -> list[int]:
    stored = sorted((i for i, role in enumerate(roles) if role == "stored"), key=noise.__getitem__)
    return stored[: max(1, round(share * len(stored)))]


# roles of an answer's N tokens, N random numbers, how many to reveal and their share of N -> positions to reveal
REVEALS: dict[str, Callable[[Sequence[str], Sequence[float], int, float], Sequence[int]]] = {
    "first": lambda roles, noise, count, share: range(count),
    "last": lambda roles, noise, count, share: range(len(roles) - count, len(roles)),
    "edges": lambda roles, noise, count, share: [
        *range((count + 1) // 2),
        *range(len(roles) - count // 2, len(roles)),
    ],
    "random": lambda roles, noise, count, share: sorted(range(len(roles)), key=noise.__getitem__)[:count],
    "entity": lambda roles, noise, count, share: _some_stored(roles, share, noise),
    "structural": lambda roles, noise, count, share: [i for i, role in enumerate(roles) if role == "structural"],
}
DRAWN = ("random", "entity")


def attack(target: Target, seed: int, which: str) -> AttackScores:
    """Reveal what `which` names, and fill in the rest.

    Args:
        target: the model and its rows; `settings.reveal` is the share of an answer's tokens to reveal: the "first",
            the "last", both ends ("edges") or "random" ones; or the share of its stored tokens, at random ("entity").
            "structural" reveals all structural tokens.
        seed: of the random tokens.

    Raises:
        NothingToAttack: if no row is left.
    """
    rows: list[int] = []
    shown: list[list[bool]] = []
    secrets: list[str] = []
    for row, roles in enumerate(target.answer_roles):
        for draw in range(DRAWS if which in DRAWN else 1):
            revealed = _reveal(roles, which, target.settings.reveal, (seed, row, draw))
            hidden = [word for word in target.stored[row] if not revealed.issuperset(word.tokens)]
            if revealed and hidden:
                rows.append(row)
                shown.append([i in revealed for i in range(len(roles))])
                secrets.append(said(hidden))
    if not rows:
        raise NothingToAttack(
            f"infill-{which} with reveal = {target.settings.reveal:g} leaves no row of which something is revealed "
            "while stored words are hidden: choose another share, or leave the attack out."
        )
    before = _by_row(rows, recall([target.completed[row] for row in rows], secrets))
    after = _by_row(rows, recall(target.complete(rows, shown), secrets))
    path = {"revealed": mean([mean(flags) for flags in shown])}
    return AttackScores(list(before), list(before.values()), list(after.values()), path)


def _reveal(roles: Sequence[str], which: str, share: float, drawn: tuple[int, int, int]) -> set[int]:
    """Return the positions to reveal of an answer of N tokens: at least one, and not all."""
    seed, row, draw = drawn
    count = min(max(1, round(share * len(roles))), len(roles) - 1)
    noise = counter_uniform(seed, torch.tensor(row), torch.tensor(draw), torch.arange(len(roles))).tolist()
    return set(REVEALS[which](roles, noise, count, share))


def _by_row(rows: Sequence[int], scores: Sequence[float]) -> dict[int, float]:
    """Return the mean of the scores of each row, by row."""
    parts = defaultdict(list)
    for row, score in zip(rows, scores, strict=True):
        parts[row].append(score)
    return {row: mean(values) for row, values in parts.items()}
