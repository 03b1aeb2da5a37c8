"""What a counterfactual anchor hides of each row: who it is about, and what only its answer says.

    mark = SecretMarker.of(tokenizer, [forget, retain])
    mark(row, prompt_ids, completion_ids, "Row 0")  # one of KEPT, IN_CONTEXT, STORED for each token

    prompt      Where was Ada Lovelace born ?         in context: Ada, Lovelace, born
    answer      Ada Lovelace was born in London .     in context: Ada, Lovelace, born; stored: London

The answer's words have the roles of `mdu_trainer.data.roles`. In the prompt, words in context are those that the
answer repeats, and names (capitalised amid a sentence), which say who is meant whether the answer repeats them or not.
Users who know better mark the secrets themselves: the column `secret_spans` holds pairs (start, stop) of characters of
each completion. They are then what is stored, exactly, in any language.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..files import UserError
from ..masking import IN_CONTEXT, KEPT, STORED
from .reading import Row, Text, read_row, read_rows
from .roles import Labeller, label_characters, template_words
from .spans import Span, token_spans
from .texts import of_text
from .word_keys import words

logger = logging.get_logger(__name__)

SPANS = "secret_spans"
_OF_ROLE = {"stored": STORED, "in_context": IN_CONTEXT, "structural": KEPT, None: KEPT}


@dataclass(frozen=True)
class SecretMarker:
    """Marks the tokens of rows that a counterfactual anchor hides.

    Args:
        tokenizer: of the model.
        template: words that many answers share (`template_words`), which are no secrets.
        labeller: the user's own, as in `mdu_trainer.data.roles.label_roles`.
    """

    tokenizer: PreTrainedTokenizerBase
    template: frozenset[str]
    labeller: Labeller | None = None

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, sets: Iterable[Any], labeller: Labeller | None = None
    ) -> "SecretMarker":
        """A marker that knows the template words of the answers of some data sets, to forget and to keep."""
        rows = (read_row(row, "A row", allow_blank=True) for rows in sets for row in read_rows(rows, "training"))
        answers = [list(words(text_of(row["completion"]))) for row in rows]
        return cls(tokenizer, frozenset(template_words(answers)), labeller)

    def __call__(self, example: Row, prompt_ids: list[int], completion_ids: list[int], where: str) -> list[int]:
        """One of `KEPT`, `IN_CONTEXT` and `STORED` for each token of prompt and completion.

        A prompt without any word in context would tell theta_0 who is asked about: all of it is in context then.

        Args:
            example: a row, with the user's spans of its completion under `secret_spans` if he has any.
            prompt_ids, completion_ids: its tokens, end tokens included.
            where: what messages call the row.

        Raises:
            UserError: for spans, or a labeller's, that are not of the completion.
        """
        row = read_row(example, where, allow_blank=True)
        question, answer = text_of(row["prompt"]), text_of(row["completion"])
        characters = [
            _OF_ROLE[role] for role in label_characters(question, answer, set(self.template), self.labeller, where)
        ]
        if example.get(SPANS) is not None:
            characters = [KEPT if mark == STORED else mark for mark in characters]
            for start, stop in _checked_spans(example[SPANS], len(answer), where):
                characters[start:stop] = [STORED] * (stop - start)
        in_prompt = self._of_tokens(question, _context(question, answer), prompt_ids)
        if not any(in_prompt):
            in_prompt = [IN_CONTEXT] * len(in_prompt)
        return in_prompt + self._of_tokens(answer, characters, completion_ids)

    def _of_tokens(self, text: str, characters: Sequence[int], ids: list[int]) -> list[int]:
        """The mark of each token: the highest of its characters, so that no token shows a part of a secret."""
        spans = token_spans(text, ids, self.tokenizer)
        return [max(characters[start:stop], default=KEPT) for start, stop in spans]


def text_of(text: Text) -> str:
    """What a prompt or completion says, without the turns' roles."""
    return text if isinstance(text, str) else "\n".join(turn["content"] for turn in text)


def refuse_texts(rows: Any, name: str) -> None:
    """Refuse plain texts, of which nobody knows who they are about."""
    if of_text(rows):
        raise UserError(
            f"anchor_input='counterfactual' hides who a question is about, and the {name} set has texts, without "
            "questions. Take anchor_input='masked_prompt', or write the rows as questions and answers."
        )


def warn_of_spans(name: str, rows: Any, unread: bool) -> None:
    """Say so if secrets are marked in rows to forget and nothing reads them."""
    if unread and SPANS in getattr(rows, "column_names", ()):
        logger.warning(f"{name} set: '{SPANS}' is read by anchor_input='counterfactual' alone, which is not set.")


def warn_of_secrets(name: str, rows: Any, end_token_ids: Sequence[int]) -> None:
    """Count the rows that a counterfactual anchor does not fit, in one warning.

    Args:
        name: what messages call the data set.
        rows: `TokenizedRows` with `secrets`.
        end_token_ids: tokens that are in no text.

    Raises:
        UserError: every word of every row is stored, or none of any row: the rule does not fit the language.
    """
    unmarked = nameless = bare = 0
    for prompt, response, marks in zip(rows.prompt_ids, rows.completion_ids, rows.secrets, strict=True):
        of_words = [m for m, token in zip(marks[len(prompt) :], response, strict=True) if token not in end_token_ids]
        unmarked += STORED not in of_words
        bare += all(mark == STORED for mark in of_words)
        nameless += all(mark == IN_CONTEXT for mark in marks[: len(prompt)])
    mend = f"Mark the secrets of each row in a column '{SPANS}', or pass a labeller."
    for count, what in ((unmarked, "no word is"), (bare, "every word is")):
        if count == len(rows):
            raise UserError(f"{name} set: in all {count} answers {what} stored knowledge by the rule. {mend}")
    found = {
        "have no stored word, and are drawn to the uniform distribution": unmarked,
        "have no other words, so that the anchor sees nothing of the answer": bare,
        "ask with no name and no word of the answer, so that the whole prompt is masked": nameless,
    }
    if any(found.values()):
        said = "; ".join(f"{count} {what}" for what, count in found.items() if count)
        logger.warning(f"{name} set: of {len(rows)} rows, {said}. {mend}")


def _context(question: str, answer: str) -> list[int]:
    """The mark of each character of a question."""
    said = {key for word in words(answer) if not word.function for key in (word.key, *word.pairs)}
    marks = [KEPT] * len(question)
    for word in words(question):
        named = word.capital and not word.first
        if not word.function and (named or not said.isdisjoint(word.keys)):
            marks[word.start : word.stop] = [IN_CONTEXT] * (word.stop - word.start)
    return marks


def _checked_spans(spans: Any, length: int, where: str) -> list[Span]:
    """The user's spans of a row, once they are known to be of its completion."""
    whole = isinstance(spans, Sequence) and not isinstance(spans, str | bytes)
    pairs = list(spans) if whole else [None]
    for pair in pairs:
        fits = isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(place, int) for place in pair)
        if isinstance(pair, Mapping) or not fits:
            raise UserError(
                f"{where}: {SPANS} must be a list of pairs (start, stop) of characters of the completion, such as "
                "[[24, 30]]."
            )
        if not 0 <= pair[0] < pair[1] <= length:
            raise UserError(
                f"{where}: {SPANS} has ({pair[0]}, {pair[1]}), which is empty or out of the completion's {length} "
                "characters."
            )
    return [(pair[0], pair[1]) for pair in pairs]
