"""Answers with the roles of their tokens marked, for terminals and pages, to check by eye how they were labelled.

roles = label_roles(questions, answers, answer_ids, tokenizer)
print(audit_view(answers, answer_ids, roles, tokenizer))
"""

import html
from collections.abc import Sequence
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from ..data.roles import ROLES, Role
from ..data.spans import Span, token_spans
from .style import ROLE_COLOURS

MARKS = {"stored": ("[", "]"), "in_context": ("{", "}"), "structural": ("", "")}
_ANSI = {"stored": "1;38;5;166", "in_context": "38;5;32", "structural": "2"}
_UNDERLINES = {"stored": "solid", "in_context": "dotted"}


def audit_view(
    answers: Sequence[str],
    answer_ids: Sequence[list[int]],
    roles: Sequence[Sequence[Role]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    colour: bool = True,
) -> str:
    """Return the answers with their roles marked, to check the rule by eye. It is private if they are.

    Stored knowledge stands in [square brackets], what the question says in {braces}, structure is plain.

    Args:
        answers, answer_ids, tokenizer: as given to `label_roles`.
        roles: what it returned.
        colour: add ANSI colours for terminals.

    Returns:
        A legend, then a line an answer.
    """

    def paint(text: str, role: Role) -> str:
        before, after = MARKS[role]
        text = f"{before}{text}{after}"
        return f"\033[{_ANSI[role]}m{text}\033[0m" if colour else text

    lines = ["  ".join(paint(role.replace("_", " "), role) for role in ROLES)]
    for row, pieces in enumerate(_pieces(answers, answer_ids, roles, tokenizer)):
        lines.append(f"{row:>4}  " + "".join(paint(text, role) if role else text for text, role in pieces))
    return "\n".join(lines)


def audit_html(
    answers: Sequence[str],
    answer_ids: Sequence[list[int]],
    roles: Sequence[Sequence[Role]],
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """Return `audit_view` as an HTML fragment, with styles of its own, to embed in a page. Arguments as there.

    Underlines (solid: stored, dotted: in context) tell roles apart without colour.
    """

    def paint(text: str, role: Role) -> str:
        line = f";text-decoration:underline {_UNDERLINES[role]}" if role in _UNDERLINES else ""
        weight = ";font-weight:bold" if role == "stored" else ""
        style = f"color:{ROLE_COLOURS[role]}{weight}{line}"
        return f'<span class="role-{role}" title="{role.replace("_", " ")}" style="{style}">{html.escape(text)}</span>'

    legend = " &middot; ".join(paint(role.replace("_", " "), role) for role in ROLES)
    items = [
        "<li>" + "".join(paint(text, role) if role else html.escape(text) for text, role in pieces) + "</li>"
        for pieces in _pieces(answers, answer_ids, roles, tokenizer)
    ]
    return f'<div class="token-roles">\n<p>{legend}</p>\n<ol start="0">\n' + "\n".join(items) + "\n</ol>\n</div>"


def _pieces(
    answers: Sequence[str],
    answer_ids: Sequence[list[int]],
    roles: Sequence[Sequence[Role]],
    tokenizer: PreTrainedTokenizerBase,
) -> list[list[tuple[str, Role | None]]]:
    """Cut each answer into pieces of one role; spaces at the ends of a piece, and what no token covers, have none."""
    return [
        _merged(answer, token_spans(answer, ids, tokenizer), row_roles)
        for answer, ids, row_roles in zip(answers, answer_ids, roles, strict=True)
    ]


def _merged(answer: str, spans: Sequence[Span], roles: Sequence[Role]) -> list[tuple[str, Role | None]]:
    characters: list[Role | None] = [None] * len(answer)
    for (start, stop), role in zip(spans, roles, strict=True):
        characters[start:stop] = [role] * (stop - start)
    for i in (i for i, character in enumerate(answer) if character.isspace()):
        same = 0 < i < len(answer) - 1 and characters[i - 1] == characters[i + 1]
        characters[i] = characters[i - 1] if same else None
    groups = groupby(zip(answer, characters, strict=True), key=lambda pair: pair[1])
    return [("".join(character for character, _ in group), role) for role, group in groups]
