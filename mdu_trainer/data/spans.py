"""The places of tokens in their text, for any tokenizer."""

import unicodedata
from collections.abc import Sequence
from difflib import SequenceMatcher

from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # characters, from and to (exclusive)


def token_spans(text: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """The characters of `text` that each token covers; none (`start == stop`) for one that is not in the text.

    A fast tokenizer says it itself. Where it cannot (a slow one, or ids that it would not make of the text alone), the
    ids are decoded one by one and what comes out is matched with the text, whatever the tokenizer does to case,
    accents and spaces. An unknown token covers what its neighbours leave.

    Args:
        text: of the response.
        ids: its tokens, with end tokens or cut short as they may be.
        tokenizer: that made them.
    """
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        found = _same_ids(encoded["input_ids"], encoded["offset_mapping"], list(ids), len(text), tokenizer)
        if found is not None:
            return found
    return _matched(text, list(ids), tokenizer)


def _same_ids(
    own: list[int], offsets: list[Span], ids: list[int], length: int, tokenizer: PreTrainedTokenizerBase
) -> list[Span] | None:
    """The offsets of the tokenizer's own ids, if `ids` are these but for special tokens around them."""
    special = set(tokenizer.all_special_ids)
    first = next((i for i, token in enumerate(ids) if token not in special), len(ids))
    if own[:1] == ids[:1]:
        first = 0
    shared = min(len(own), len(ids) - first)
    if own[:shared] != ids[first : first + shared]:
        return None
    after = len(ids) - first - shared
    return [(0, 0)] * first + [tuple(span) for span in offsets[:shared]] + [(length, length)] * after


def _matched(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    letters, place = _letters(text)
    decoded, ends = _decoded(ids, special | {tokenizer.unk_token_id}, tokenizer)
    there: dict[int, int] = {}
    for a, b, size in SequenceMatcher(None, decoded, letters, autojunk=False).get_matching_blocks():
        there |= {a + i: b + i for i in range(size)}
    spans: list[Span | None] = []
    for i, token in enumerate(ids):
        found = [there[at] for at in range(*ends[i]) if at in there]
        blank = ends[i][0] == ends[i][1] and token != tokenizer.unk_token_id
        if found:
            spans.append((place[min(found)], place[max(found)] + 1))
        else:  # what was in the text but is not in the decoded one covers what is left; others cover nothing
            spans.append((-1, -1) if blank or token in special else None)
    return _fill(spans, len(text))


def _decoded(ids: list[int], skip: set[int | None], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span]]:
    """The letters that the ids decode to, and which of them each token brought."""
    kept: list[int] = []
    letters, ends = "", []
    for token in ids:
        if token in skip:
            ends.append((len(letters), len(letters)))
            continue
        kept.append(token)
        text = tokenizer.decode(kept, clean_up_tokenization_spaces=False)
        start = len(letters)
        letters = _letters(text.rstrip("\ufffd"))[0]
        # a part of a character: it covers the character that the next tokens complete
        ends.append((start, max(len(letters), start + 1) if text.endswith("\ufffd") else len(letters)))
    return letters, ends


def _letters(text: str) -> tuple[str, list[int]]:
    """A text without spaces and case, accents apart from their letters, and where each of its characters comes from.

    Where a tokenizer drops accents, the letters match without them; where it keeps them, they have a token.
    """
    letters, place = [], []
    for i, character in enumerate(text):
        for part in unicodedata.normalize("NFKD", character).casefold():
            if not part.isspace():
                letters.append(part)
                place.append(i)
    return "".join(letters), place


def _fill(spans: list[Span | None], length: int) -> list[Span]:
    """Give tokens without a place (None) what lies between their neighbours, and others (-1, -1) no characters."""
    filled: list[Span] = []
    stop = 0
    for i, span in enumerate(spans):
        if span == (-1, -1):
            span = (stop, stop)
        elif span is None:
            later = (other[0] for other in spans[i + 1 :] if other is not None and other != (-1, -1))
            span = (stop, max(stop, next(later, length)))
            if spans[i + 1 : i + 2] == [None]:  # a run of unknown tokens shares its characters
                filled.append(span)
                continue
        filled.append(span)
        stop = max(stop, span[1])
    return filled
