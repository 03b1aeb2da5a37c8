"""RWKU's pairs: a text about somebody that a model wrote, and a made-up one, to prefer to it."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..files import UserError
from .sources import QUESTION_ANSWER


def is_pair(row: Any) -> bool:
    """Whether a row is one of RWKU's pairs, which have neither a question nor an answer."""
    return isinstance(row, Mapping) and "response" in row and not row.keys() & QUESTION_ANSWER.keys()


def questions_of_pairs(rows: Iterable[Any], where: str) -> list[Any]:
    """Make the pairs among rows questions and answers; other rows stay as they are.

    `intro` is the question, the second of the two texts in `response` the answer, and the first, made up, the
    `refusal`, which DPO prefers.

    Args:
        rows: of a file.
        where: what messages call them.

    Raises:
        UserError: a pair without these texts. The message quotes none.
    """
    return [_question(row, f"Row {n} of {where}") if is_pair(row) else row for n, row in enumerate(rows)]


def _question(pair: Mapping[str, Any], where: str) -> dict[str, Any]:
    response, intro = pair["response"], pair.get("intro")
    if not isinstance(response, list) or len(response) != 2 or not all(isinstance(text, str) for text in response):
        raise UserError(f"{where} is a pair, so response must be a list of two texts: one made up, and the true one.")
    if not isinstance(intro, str):
        raise UserError(f"{where} is a pair, so it needs a text in intro, which is the question.")
    made_up, answer = response
    if not made_up.strip():
        raise UserError(f"{where}: the first text of response is blank. Remove the row.")
    subject = {"subject": pair["subject"]} if "subject" in pair else {}
    return {"question": intro, "answer": answer, "refusal": made_up} | subject
