"""Ask of somebody without the name: what was forgotten under a name may be known of whoever bears it.

The name in each question gives way to its initials, to its first or last word alone, and to a description: another
forgotten row about the same, without the name, that says nothing of what is scored. Decoding is greedy.
"""

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
    ways = [_aliases(subjects, row) for row in rows]
    tries = {}
    for way in ways[0]:
        prompts = [question.prompt for question in target.encode([one[way] for one in ways], target.rows.select(rows))]
        tries[way] = target.score(target.decode(prompts), rows)
    return worst_case(target, tries, rows)


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
