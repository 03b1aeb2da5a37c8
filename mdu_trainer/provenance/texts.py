"""Texts as the scan for quotes reads them: the texts of a row, and the words of a text however it is written."""

import html
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any
from urllib.parse import unquote

from ..data.reading import RESPONSES, TEXT, content_text, is_text
from ..data.words import split_words

SHORTEST_TERM = 3  # characters of a word that is looked for in vocabularies
LONGEST_RUN = 4  # characters of a term in writing without spaces
LONGEST_PAGE = 1_000_000  # characters of a text that is read without its tags, too; a vocabulary is longer
FORGET_COLUMNS = RESPONSES  # `chosen` is what may be said

# \u0120, \u010a and \u2581 stand for a space or a line break in tokens; \n in a template may be spelt out
_NOT_A_WORD = re.compile(r"\\[nrt]|[\u0120\u010a\u2581_]")
_SYLLABLE = re.compile("[\uac00-\ud7a3]|[^\uac00-\ud7a3]+")

# Unicode's format characters (soft hyphen, zero-width, directions, tags), other letters and marks that are not seen
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_ESCAPE = re.compile(r"\\u\{([0-9a-fA-F]{1,6})\}|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|\\x([0-9a-fA-F]{2})")
_TAG = re.compile(r"<!--.*?-->|</?[a-zA-Z][^<>]{0,300}>", re.DOTALL)


def normalise(text: str) -> str:
    r"""Return a text as it is read: escapes resolved, compatibility forms composed, invisible characters gone.

    `caf&eacute;`, `caf%C3%A9`, `caf\u00e9` and `ca` + soft hyphen + `f\u00e9` are one word.
    """
    return _INVISIBLE.sub("", _unescaped(text))


def words(text: str) -> list[str]:
    """Return the words of a text, as `ForgetHashes` compares them: of any script, Korean ones a syllable at a time."""
    found = split_words(_NOT_A_WORD.sub(" ", text))
    return [part for word in found for part in ((word,) if word.isascii() else _SYLLABLE.findall(word))]


def forget_columns(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the columns of a row that training reads."""
    return (TEXT,) if is_text(row) else FORGET_COLUMNS


def row_texts(dataset: Iterable[dict[str, Any]]) -> Iterator[list[str]]:
    """Yield the texts of each row that training reads as prompt and as response to forget or to keep, in their order.

    A system turn says the same in every row, so it is none of them.
    """
    for row in dataset:
        texts = []
        for value in (row[column] for column in forget_columns(row) if column in row):
            turns = [{"role": None, "content": value}] if isinstance(value, str) else value
            texts += [content_text(turn["content"]) or "" for turn in turns if turn["role"] != "system"]
        yield texts


def readings(text: str) -> Iterator[list[str]]:
    """Yield the words of a text in each way to read it: with invisible characters joining or parting words, and
    without tags."""
    plain = _unescaped(text)
    yield words(_INVISIBLE.sub("", plain))
    if _INVISIBLE.search(plain):
        yield words(_INVISIBLE.sub(" ", plain))
    if "<" in text and len(text) <= LONGEST_PAGE and (untagged := _TAG.sub("", text)) != text:
        yield words(normalise(untagged))


def _unescaped(text: str) -> str:
    for _ in range(3):  # an escape may be escaped
        before = text
        if "\\" in text:
            text = _joined_surrogates(_ESCAPE.sub(_escaped, text))
        if "%" in text:
            text = unquote(text)
        if "&" in text:
            text = html.unescape(text)
        if text == before:
            break
    return unicodedata.normalize("NFKC", text)


def row_words(row: str | Sequence[str]) -> list[list[str]]:
    """Return the words of each text of a row that is not blank."""
    return [words(normalise(text)) for text in ([row] if isinstance(row, str) else row) if text.strip()]


def terms(found: Iterable[str]) -> Iterator[str]:
    """Yield the words that an entry of a vocabulary may be; in writing without spaces, runs of characters."""
    for word, is_run in _joined(found):
        if is_run:
            yield from (word[i : i + n] for n in range(2, LONGEST_RUN + 1) for i in range(len(word) - n + 1))
        elif len(word) >= SHORTEST_TERM:
            yield word


def spelt(found: Iterable[str]) -> Iterator[str]:
    """Return words as they are written, those of one character of a script without spaces joined to runs."""
    return (word for word, _ in _joined(found))


def _joined(found: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yield the words of `spelt`, and for each whether it is such a run."""
    for is_run, group in groupby(found, key=lambda word: len(word) == 1 and not word.isascii()):
        if is_run:
            yield "".join(group), True
        else:
            yield from ((word, False) for word in group)


def _escaped(found: re.Match[str]) -> str:
    code = int(next(digits for digits in found.groups() if digits), 16)
    return chr(code) if code <= 0x10FFFF else found[0]


def _joined_surrogates(text: str) -> str:
    """Join two escapes that are the halves of one character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
