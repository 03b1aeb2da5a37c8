"""Rows of plain text (`text` alone: articles, books, corpora) as what a model learns, and as what it is asked.

A model learns a text in chunks of at most `max_length` tokens, and all of a chunk takes part in the diffusion. Only a
loss that compares with a prediction without the prompt needs a prompt: then it is the first share of each chunk. With
chunks of 4 tokens, a stride of 3 and a share of .25,

    text        The river bends north where the old mill stands
    chunks      The | river bends north     north | where the old     the | old mill stands

the last chunk ends with the text, whatever the stride. A chunk has no end token, for the text goes on after it.

To be asked about, a text is cut into passages of words: the first share of a passage is the question, the rest is the
answer (`passages`). They are asked as running text, never as turns of a chat.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..files import UserError
from ..models import Backbone
from .encoding import check_ids, refuse_special, special_ids
from .reading import TEXT, is_text, names_of, private, read_rows, read_text
from .words import WRITTEN_WORD

logger = logging.get_logger(__name__)

PLAIN = "plain"  # column of passages: they are running text, and so no turns of a chat
PASSAGE_WORDS = 128
PREFIX_SHARE = 0.25  # of a chunk or a passage that is its prompt


def of_text(dataset: Any) -> bool:
    """Whether the rows of a data set are plain texts."""
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        first = next(iter(dataset), None) if isinstance(dataset, Sequence) else None
        columns = first.keys() if isinstance(first, dict) else ()
    return is_text(columns)


def text_chunks(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    backbone: Backbone,
    *,
    name: str,
    max_length: int | None = None,
    stride: int | None = None,
    prompt_share: float = 0.0,
) -> tuple[list[list[int]], list[list[int]]]:
    """Cut texts into chunks of tokens. Nothing is written to disk.

    Args:
        dataset: rows with a `text` each.
        tokenizer, backbone: of the model.
        name: what messages call the data set.
        max_length: tokens of a chunk, at most; all of a text if None. A start token counts.
        stride: tokens from the start of a chunk to that of the next; as many as a chunk has if None.
        prompt_share: share of a chunk that is its prompt.

    Returns:
        The prompts (with the tokenizer's start token where it has one) and the responses, a pair a chunk.

    Raises:
        UserError: a text that is blank or holds a special token, or a stride that leaves tokens out.
    """
    special, start = special_ids(tokenizer, backbone), start_ids(tokenizer, backbone)
    size = None if max_length is None else max_length - len(start)
    if size is not None and size < 2:
        raise UserError(f"max_length = {max_length} leaves no room for a chunk of the {name} set. Raise it.")
    if size is not None and stride is not None and stride > size:
        raise UserError(
            f"text_stride = {stride} is more than the {size} tokens of a chunk: what lies between two chunks would "
            "not be read. Lower it, or leave it out."
        )
    prompts, responses = [], []
    for number, row in enumerate(read_rows(dataset, name)):
        where = f"Row {number} of the {name} set"
        text = read_text(row, where)
        refuse_special({TEXT: text}, tokenizer, special, where)
        with private(f"{where}: the tokenizer failed"):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        check_ids(ids, backbone, where)
        if not ids:
            raise UserError(f"{where}: text has no tokens, so there is nothing to learn. Remove the row.")
        for first, stop in chunk_bounds(len(ids), size or len(ids), stride):
            split = first + prefix_length(stop - first, prompt_share)
            prompts.append(start + ids[first:split])
            responses.append(ids[split:stop])
    shown = f", of which the first {prompt_share:.0%} are the prompt" if prompt_share else ""
    whole = "their whole length" if size is None else f"at most {size} tokens"
    logger.warning(f"{name} set: {len(dataset)} texts in {len(prompts)} chunks of {whole}{shown}.")
    return prompts, responses


def chunk_bounds(length: int, size: int, stride: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield the first place of each chunk of a text, and the one after its last.

    >>> list(chunk_bounds(9, size=4)), list(chunk_bounds(3, size=4))
    ([(0, 4), (4, 8), (5, 9)], [(0, 3)])
    """
    first = 0
    while first + size < length:
        yield first, first + size
        first += stride or size
    yield max(length - size, 0), length


def prefix_length(length: int, share: float) -> int:
    """How many of a chunk's or passage's parts are its prompt: a share of them, but neither none nor all.

    >>> [prefix_length(length, 0.25) for length in (1, 2, 10)], prefix_length(10, 0.0)
    ([0, 1, 2], 0)
    """
    return min(max(1, round(share * length)), length - 1) if share else 0


def start_ids(tokenizer: PreTrainedTokenizerBase, backbone: Backbone) -> list[int]:
    """The token that the tokenizer puts before any text, if it does; never one that ends a text."""
    start = tokenizer("")["input_ids"][:1]
    return [token for token in start if token not in backbone.end_token_ids]


def passages(rows: Dataset, words: int = PASSAGE_WORDS, share: float = PREFIX_SHARE) -> Dataset:
    """Texts as what can be asked about them: passages, the first words of which are given, and the rest is wanted.

    Args:
        rows: with a `text` each.
        words: of a passage, at most. In scripts without spaces, a character counts as a word.
        share: of a passage's words that are its question.

    Returns:
        `question`, `answer` and `plain`, a row a passage. The last passage of a text ends with the text, and so may
        hold words of the one before. All of the text's own characters are kept, spaces and line breaks included.

    Raises:
        UserError: for a text of fewer than two words, of which nothing could be asked.
    """
    made: dict[str, list[Any]] = {"question": [], "answer": []}
    for number, row in enumerate(read_rows(rows, "text")):
        text = read_text(row, f"Row {number}")
        spans = [found.span() for found in WRITTEN_WORD.finditer(text)]
        if len(spans) < 2:
            raise UserError(f"Row {number}: text has fewer than two words, so nothing of it can be asked. Remove it.")
        for first, stop in chunk_bounds(len(spans), words):
            split = first + prefix_length(stop - first, share)
            end = len(text) if stop == len(spans) else spans[stop - 1][1]
            made["question"].append(text[spans[first][0] : spans[split - 1][1]])
            made["answer"].append(text[spans[split - 1][1] : end].rstrip())
    made[PLAIN] = [True] * len(made["question"])
    return Dataset.from_dict(made, info=names_of(rows), split=rows.split)


def without_ends(responses: Sequence[list[int]], end_token_ids: Sequence[int]) -> list[list[int]]:
    """Return the ids of responses that go on: without the end token that others have."""
    return [ids[:-1] if ids and ids[-1] in end_token_ids else ids for ids in responses]


def is_plain(rows: Dataset) -> bool:
    """Whether rows of questions and answers are passages of texts, which are no turns of a chat."""
    return PLAIN in rows.column_names
