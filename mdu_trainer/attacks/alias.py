"""Ask of somebody without the name: what was forgotten under a name may be known of whoever bears it.

The name in each question gives way to its initials, to its first or last word alone, and to a description: another
forgotten row about the same, without the name, that says nothing of what is scored. Or half of its tokens are masked,
which a masked model is used to read. Decoding is greedy.
"""

import re

from ..data.spans import token_spans
from .base import AttackScores, NothingToAttack, Target, worst_case
from .subjects import Subjects

SOMEBODY, THEM = "Somebody", "this person"


def attack(target: Target, seed: int) -> AttackScores:
    """Return the best score over the ways to speak of whom a question names. Nothing is random.

    Rows whose question names nobody, in capital letters, are left out.

    Raises:
        NothingToAttack: if no row is left.
    """
    subjects = Subjects(target)
    rows = [row for row in range(len(target.rows)) if subjects.name(row)]
    if not rows:
        raise NothingToAttack("alias finds no name in any question, which capital letters would show: leave it out.")
    texts, of_rows = [_aliases(subjects, row) for row in rows], target.rows.select(rows)
    prompts = {way: [q.prompt for q in target.encode([one[way] for one in texts], of_rows)] for way in texts[0]}
    for way in ("first half masked", "second half masked"):
        prompts[way] = [_half_masked(subjects, row, first=way.startswith("first")) for row in rows]
    return worst_case(target, {way: target.score(target.decode(ids), rows) for way, ids in prompts.items()}, rows)


def _aliases(subjects: Subjects, row: int) -> dict[str, str]:
    """Return the question of a row by the way in which it speaks of whom it names."""
    name = subjects.name(row)
    words = name.split()
    told = [one.answer for one in subjects.others(row, subjects.forget, len(subjects.forget)) if name in one.answer]
    description = told[0].replace(name, SOMEBODY) + " " if told else ""
    return {
        "initials": subjects.renamed(row, " ".join(f"{word[0]}." for word in words)),
        "first name": subjects.renamed(row, words[0]),
        "last name": subjects.renamed(row, words[-1]),
        "description": description + subjects.renamed(row, THEM),
    }


def _half_masked(subjects: Subjects, row: int, *, first: bool) -> list[int]:
    """Return the prompt of a row with the first or the second half of the name's tokens masked."""
    target, question, name = subjects.target, subjects.forget[row].question, subjects.name(row)
    prompt, starts = list(target.prompts[row]), [found.start() for found in re.finditer(re.escape(name), question)]
    spans = token_spans(question, prompt, target.tokenizer)
    for at in starts:
        tokens = [i for i, (start, stop) in enumerate(spans) if start < at + len(name) and stop > max(at, start)]
        half = max(1, len(tokens) // 2)
        for i in tokens[:half] if first else tokens[-half:]:
            prompt[i] = target.backbone.mask_token_id
    return prompt
