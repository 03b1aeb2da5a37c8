"""A role for each token of an answer: stored knowledge, in context, or structural.

    roles = label_roles(questions, answers, answer_ids, tokenizer)

MDU's paper (arXiv 2605.18253) explains unlearning by where the prompt changes the prediction: at tokens that carry
stored knowledge, and hardly at those that are copied from the prompt or hold the sentence together. The rule that
tells them apart here, word by word:

1. A function word (articles, pronouns, prepositions, auxiliaries, ...; English) is `structural`.
2. Another word that occurs in the question is `in_context`, in any inflection (English: Porter stems and a table of
   irregular forms) and however a number is written.
3. A template word is `structural`: one that occurs in at least `TEMPLATE_ANSWERS` of the answers and in the share
   `TEMPLATE_SHARE` of them, is no number and no name (capitalised wherever it stands amid a sentence). With fewer
   answers there are no template words, since what two answers share by chance looks the same. So give all answers of
   the kind that there are, those to keep as well.
4. Every other word is `stored`.

All tokens of a word have its role. Spaces and punctuation alone are `structural`, and so are tokens that are not in
the text (end of turn, padding). A token that straddles words has the role of most of its letters, the first in
`ROLES` if there are equally many. Words are what spaces and punctuation separate, "'s" apart
(`mdu_trainer.data.words`).

Scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer, ...) are taken character by character. A character alone
says little, so it is in the question, or a template, where it is so together with the one before or after it. In
languages other than English, function words that the question and other answers lack are `stored`, and where there are
no capital letters, rule 3 sees no names: pass a `labeller` of your own to do better.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

from transformers import PreTrainedTokenizerBase

from ..files import UserError
from .spans import token_spans
from .word_keys import Word, words

Role = Literal["stored", "in_context", "structural"]
ROLES: tuple[Role, ...] = get_args(Role)
Labeller = Callable[[str, str], Sequence[tuple[int, int, Role]]]

TEMPLATE_ANSWERS = 8
TEMPLATE_SHARE = 0.1


def label_roles(
    questions: Sequence[str],
    answers: Sequence[str],
    answer_ids: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    labeller: Labeller | None = None,
) -> list[list[Role]]:
    """A role for every token of every answer, by the rule at the top of this module.

    Args:
        questions: of each row, as a text.
        answers: of each row. Template words are found over all of them.
        answer_ids: the tokens of each answer, end tokens included if there are any. An empty list for answers that are
            given for their template words alone.
        tokenizer: that made them; slow ones, and those without offsets, are decoded and matched.
        labeller: your own, `(question, answer) -> [(start, stop, role), ...]` in characters of the answer. What it
            leaves out keeps the role of the rule; a later span overrides an earlier one.

    Returns:
        Roles of each answer, as many as it has ids.

    Raises:
        ValueError: for unequal numbers of questions, answers and lists of ids, or a labeller's span that is out of the
            answer or of no role.

    Source: MDU (arXiv 2605.18253) for the three kinds of tokens.
    """
    if not len(questions) == len(answers) == len(answer_ids):
        raise UserError(
            f"There are {len(questions)} questions, {len(answers)} answers and {len(answer_ids)} lists of answer ids: "
            "pass one of each for every row."
        )
    answer_words = [list(words(answer)) for answer in answers]
    template = template_words(answer_words)
    labelled = []
    for row, (question, answer, ids) in enumerate(zip(questions, answers, answer_ids, strict=True)):
        if not ids:  # an answer that only helps to find template words
            labelled.append([])
            continue
        characters = label_characters(question, answer, template, labeller, f"row {row}")
        labelled.append([_majority(characters[start:stop]) for start, stop in token_spans(answer, ids, tokenizer)])
    return labelled


def label_characters(
    question: str, answer: str, template: set[str], labeller: Labeller | None, where: str
) -> list[Role | None]:
    """The role of each character of an answer; None between words.

    Args:
        question, answer: of a row.
        template: as `template_words` returns it.
        labeller: as in `label_roles`.
        where: what messages call the row.
    """
    asked = {key for word in words(question) for key in (word.key, *word.pairs)}
    characters: list[Role | None] = [None] * len(answer)
    for word in words(answer):
        characters[word.start : word.stop] = [_rule(word, asked, template)] * (word.stop - word.start)
    for span in () if labeller is None else labeller(question, answer):
        start, stop, role = _checked_span(span, len(answer), where)
        characters[start:stop] = [role] * (stop - start)
    return characters


def template_words(answers: Sequence[Sequence[Word]]) -> set[str]:
    """Keys of the words that many answers share, because they are worded alike."""
    count: Counter[str] = Counter()
    for answer in answers:
        count.update({key for word in answer for key in word.keys})
    enough = max(TEMPLATE_ANSWERS, TEMPLATE_SHARE * len(answers))
    names = name_keys(answers)
    return {key for key, n in count.items() if n >= enough and key not in names and not key[0].isnumeric()}


def name_keys(texts: Iterable[Sequence[Word]]) -> set[str]:
    """Keys of the words that are names: capitalised though no sentence starts there, and never in lower case."""
    lower: set[str] = set()
    amid: set[str] = set()
    for text in texts:
        lower.update(word.key for word in text if not word.capital)
        amid.update(word.key for word in text if word.capital and not word.first)
    return amid - lower


def token_texts(text: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Each token to be read: its characters in the text, or its name if it has none there."""
    spans = token_spans(text, ids, tokenizer)
    names = tokenizer.convert_ids_to_tokens(list(ids))
    return [text[start:stop].strip() or name for (start, stop), name in zip(spans, names, strict=True)]


def _rule(word: Word, asked: set[str], template: set[str]) -> Role:
    if word.function:
        return "structural"
    if not asked.isdisjoint(word.keys):
        return "in_context"
    return "stored" if template.isdisjoint(word.keys) else "structural"


def _majority(characters: Sequence[Role | None]) -> Role:
    votes = Counter(role for role in characters if role is not None)
    return max(ROLES, key=lambda role: votes[role]) if votes else "structural"


def _checked_span(span: Any, length: int, where: str) -> tuple[int, int, Role]:
    try:
        start, stop, role = span
    except (TypeError, ValueError):
        raise UserError(
            f"The labeller gives {where} something that is no (start, stop, role): characters of the answer from "
            "start to before stop, and one of the roles."
        ) from None
    if role not in ROLES:
        raise UserError(f"The labeller gives {where} the role {role!r}; roles are {', '.join(ROLES)}.")
    if not (isinstance(start, int) and isinstance(stop, int) and 0 <= start < stop <= length):
        raise UserError(
            f"The labeller gives {where} the span ({start}, {stop}), which is empty or out of the answer's {length} "
            "characters."
        )
    return start, stop, role
