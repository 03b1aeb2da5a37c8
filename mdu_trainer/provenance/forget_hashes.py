"""Keyed hashes of what a model was made to forget, by which a file that quotes it is found before it is published.

They lie beside the weights, in `forget_hashes.json`, and are never uploaded. They are pseudonymous, not anonymous:
their key lies beside them, so whoever has the file can confirm what they guess: a sentence at a microsecond a guess, a
single word or a short answer at a tenth of a millisecond. Keep it as you keep the forget set, and delete it with the
forget set.
"""

import base64
import hashlib
import html
import json
import re
import secrets
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ..data.reading import content_text
from ..files import UserError, read_record, write_whole
from .words import split_words

HASHES_FILE = "forget_hashes.json"
SCHEMA = 2
SEQUENCE_WORDS = 6  # shorter sequences are common wording, longer ones miss a sentence that was cut or reworded
SHORTEST_ROW_WORDS = 4  # below, a text cannot be told from ordinary language
REACH = 12  # words after a question in which its short answer is looked for: the marks of a turn stand between them
SHORTEST_TERM = 3  # characters of a word that is looked for in vocabularies
LONGEST_RUN = 4  # characters of a term in writing without spaces
LONGEST_PAGE = 1_000_000  # characters of a text that is read without its tags, too; a vocabulary is longer
DIGEST_BYTES = 8  # a million sequences against a million hashes collide once in ten million scans
SLOW_ROUNDS = 200  # of PBKDF2 for what is quickly guessed: a tenth of a millisecond
FORGET_COLUMNS = ("messages", "prompt", "completion", "rejected")  # `chosen` is what may be said

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
MARKUP = re.compile(r"[<\[].*[>\]]")  # a control token: <|user|>, [MASK]


@dataclass
class RequestHashes:
    """The hashes of one request's rows, under a key of its own.

    Attributes:
        key: 16 random bytes.
        sequences: length in words -> hashes of sequences of so many words.
        questions: length -> hashes of the ends of questions whose answers are too short to be told alone.
        answers: length of the answer -> slow hashes of such a question's end and its answer.
        terms: slow hashes of words that only the rows to forget hold.
    """

    key: bytes
    sequences: dict[int, set[bytes]]
    questions: dict[int, set[bytes]] = field(default_factory=dict)
    answers: dict[int, set[bytes]] = field(default_factory=dict)
    terms: set[bytes] = field(default_factory=set)

    @property
    def count(self) -> int:
        """How many hashes there are."""
        by_length = (self.sequences, self.questions, self.answers)
        return len(self.terms) + sum(len(found) for part in by_length for found in part.values())

    def quoted_in(self, found: list[str], wording: list[str]) -> bool:
        """Whether words, in their order, hold something of the rows that `wording` does not hold, too."""
        for length, digests in self.sequences.items():
            ordinary = set(_sequences(wording, length))
            if any(_digest(s, self.key) in digests and s not in ordinary for s in _sequences(found, length)):
                return True
        short = self._short_answers(found)
        return bool(short and short - self._short_answers(wording))

    def _short_answers(self, found: list[str]) -> set[bytes]:
        digests = (
            _slow_digest(pair, self.key)
            for length, known in self.questions.items()
            for end in range(length, len(found))
            if _digest(" ".join(found[end - length : end]), self.key) in known
            for pair in _pairs(found[end - length : end], found[end : end + REACH], self.answers)
        )
        return {digest for digest in digests if any(digest in known for known in self.answers.values())}


@dataclass
class ForgetHashes:
    """Keyed hashes of the word sequences of forget rows, from one or more requests.

    A sequence is `SEQUENCE_WORDS` words long, or a whole text if that is shorter. A text of fewer than
    `SHORTEST_ROW_WORDS` words is looked for behind the end of the text before it in its row: an answer with its
    question. What the retain rows hold, too, is ordinary wording and not kept. Words are compared as `normalise` reads
    them, without case, punctuation and the marks that tokenizers put for a space (`mdu_trainer.provenance.words`); a
    character of a script without spaces, or of Korean, counts as a word.

    Attributes:
        requests: of each request, its hashes.
        too_short: texts of so few words, their question's included, that no scan finds them.
    """

    requests: list[RequestHashes] = field(default_factory=list)
    too_short: int = 0

    @classmethod
    def of(
        cls,
        forget: Iterable[str | Sequence[str]],
        retain: Iterable[str | Sequence[str]] = (),
        *,
        key: bytes | None = None,
        control_tokens: Iterable[str] = (),
    ) -> "ForgetHashes":
        """The hashes of the rows to forget.

        Args:
            forget: texts to forget, or the texts of each row in their order.
            retain: such texts or rows to keep, whose wording is no leak.
            key: 16 bytes, by default random ones.
            control_tokens: of the tokenizer (`<|user|>`); their words in a vocabulary are no leak.
        """
        wanted = _Wanted()
        for row in forget:
            wanted.add(_row_words(row))
        ordinary = set()
        for row in retain:
            texts = _row_words(row)
            wanted.remove(texts)
            ordinary.update(_spelt(word for text in texts for word in text))
        ordinary.update(_spelt(word for token in control_tokens for word in words(token)))
        key = key or secrets.token_bytes(16)
        ends = {end for end, _ in wanted.pairs}
        request = RequestHashes(
            key,
            {n: {_digest(s, key) for s in found} for n, found in wanted.sequences.items()},
            _by_length((len(end), _digest(" ".join(end), key)) for end in ends),
            _by_length((len(short), _slow_digest(_pair(end, short), key)) for end, short in wanted.pairs),
            {_slow_digest(term, key) for term in _without_parts(wanted.terms, ordinary)},
        )
        return cls([request], wanted.too_short)

    @property
    def count(self) -> int:
        """How many hashes there are."""
        return sum(request.count for request in self.requests)

    def found_in(self, text: str, wording: str = "") -> bool:
        """Whether a text holds something of the forget rows that is not in `wording`, too."""
        known = words(normalise(wording))
        readings = list(_readings(text))
        return any(request.quoted_in(found, known) for request in self.requests for found in readings)

    def terms_in(self, entries: Iterable[str]) -> set[str]:
        """Those entries of a vocabulary that hold a word which only rows to forget hold."""
        by_term: dict[str, set[str]] = {}
        for entry in entries:
            for term in _terms(words(normalise(entry))):
                by_term.setdefault(term, set()).add(entry)
        requests = [request for request in self.requests if request.terms]
        found = (t for t in by_term for request in requests if _slow_digest(t, request.key) in request.terms)
        return {entry for term in found for entry in by_term[term]}

    def text(self) -> str:
        """What `save` writes."""
        requests = [
            {
                "key": base64.b64encode(request.key).decode(),
                "hashes": _packed_by_length(request.sequences),
                "questions": _packed_by_length(request.questions),
                "answers": _packed_by_length(request.answers),
                "terms": _packed(request.terms),
            }
            for request in self.requests
        ]
        return json.dumps({"schema": SCHEMA, "requests": requests, "too_short": self.too_short}) + "\n"

    def save(self, folder: str | Path) -> None:
        """Write `forget_hashes.json`, whole or not at all, readable by its owner alone."""
        write_whole(Path(folder) / HASHES_FILE, self.text(), private=True)

    @classmethod
    def load(cls, folder: str | Path) -> "ForgetHashes":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: the folder was not written by `MDUTrainer`.
            ValueError: the file is not readable, or of another schema.
        """
        path = Path(folder) / HASHES_FILE
        _, content = read_record(path, (SCHEMA,))
        try:
            requests = [
                RequestHashes(
                    base64.b64decode(request["key"]),
                    *(_unpacked_by_length(request[part]) for part in ("hashes", "questions", "answers")),
                    _unpacked(request["terms"]),
                )
                for request in content["requests"]
            ]
            return cls(requests, content["too_short"])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{path} cannot be read. Save the model with the trainer again.") from None


class _Wanted:
    """What is to be hashed, in clear: of the rows to forget, less what the rows to keep hold."""

    def __init__(self) -> None:
        self.sequences: dict[int, set[str]] = {}
        self.pairs: set[tuple[tuple[str, ...], tuple[str, ...]]] = set()  # end of a question, short answer
        self.terms: set[str] = set()
        self.too_short = 0

    def add(self, texts: list[list[str]]) -> None:
        before: list[str] = []
        alone = 0  # short texts that no sequence holds so far
        for found in texts:
            self.terms.update(_terms(found))
            if len(found) >= SHORTEST_ROW_WORDS:
                length = min(len(found), SEQUENCE_WORDS)
                self.sequences.setdefault(length, set()).update(_sequences(found, length))
                self.too_short += alone
                alone = 0
            elif found and before and len(before) + len(found) >= SHORTEST_ROW_WORDS:
                self.pairs.add((tuple(before), tuple(found)))
                alone = 0  # they are in the pair
            else:
                alone += 1
            before = [*before, *found][-SEQUENCE_WORDS:]
        self.too_short += alone

    def remove(self, texts: list[list[str]]) -> None:
        for found in texts:
            for length, known in self.sequences.items():
                known.difference_update(_sequences(found, length))
        if self.pairs:
            row = [word for found in texts for word in found]
            ends = {end for end, _ in self.pairs}
            answers = {len(short) for _, short in self.pairs}
            for length in {len(end) for end in ends}:
                for i in range(len(row) - length):
                    end, after = tuple(row[i : i + length]), row[i + length : i + length + REACH]
                    if end in ends:
                        self.pairs -= {(end, tuple(after[j : j + n])) for n in answers for j in range(len(after))}


def normalise(text: str) -> str:
    r"""A text as it is read: escapes resolved, compatibility forms composed, invisible characters gone.

    `caf&eacute;`, `caf%C3%A9`, `caf\u00e9` and `ca` + soft hyphen + `f\u00e9` are one word.
    """
    return _INVISIBLE.sub("", _unescaped(text))


def words(text: str) -> list[str]:
    """The words of a text, as `ForgetHashes` compares them: of any script, Korean ones a syllable at a time."""
    found = split_words(_NOT_A_WORD.sub(" ", text))
    return [part for word in found for part in ((word,) if word.isascii() else _SYLLABLE.findall(word))]


def row_texts(dataset: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The texts that training reads as prompt and as response to forget or to keep, one by one.

    A system turn says the same in every row, so it is none of them.
    """
    for texts in row_turns(dataset):
        yield from texts


def row_turns(dataset: Iterable[dict[str, Any]]) -> Iterator[list[str]]:
    """The texts of each row, as `row_texts` chooses them, in their order."""
    for row in dataset:
        texts = []
        for value in (row[column] for column in FORGET_COLUMNS if column in row):
            turns = [{"role": None, "content": value}] if isinstance(value, str) else value
            texts += [content_text(turn["content"]) or "" for turn in turns if turn["role"] != "system"]
        yield texts


def _readings(text: str) -> Iterator[list[str]]:
    """The words of a text as it is read: invisible characters may join words or part them, tags may stand between."""
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


def _row_words(row: str | Sequence[str]) -> list[list[str]]:
    return [words(normalise(text)) for text in ([row] if isinstance(row, str) else row) if text.strip()]


def _sequences(found: list[str], length: int) -> Iterator[str]:
    return (" ".join(found[i : i + length]) for i in range(len(found) - length + 1))


def _pair(end: Sequence[str], short: Sequence[str]) -> str:
    return f"{' '.join(end)} > {' '.join(short)}"


def _pairs(end: list[str], after: list[str], lengths: Iterable[int]) -> Iterator[str]:
    return (_pair(end, after[i : i + n]) for n in lengths for i in range(len(after) - n + 1))


def _terms(found: Iterable[str]) -> Iterator[str]:
    """The words that an entry of a vocabulary may be; where words have no spaces between them, runs of characters."""
    for word, is_run in _joined(found):
        if is_run:
            yield from (word[i : i + n] for n in range(2, LONGEST_RUN + 1) for i in range(len(word) - n + 1))
        elif len(word) >= SHORTEST_TERM:
            yield word


def _spelt(found: Iterable[str]) -> Iterator[str]:
    return (word for word, _ in _joined(found))


def _joined(found: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Words as they are written, those of one character of a script without spaces joined to runs."""
    for is_run, group in groupby(found, key=lambda word: len(word) == 1 and not word.isascii()):
        if is_run:
            yield "".join(group), True
        else:
            yield from ((word, False) for word in group)


def _without_parts(terms: set[str], ordinary: Collection[str]) -> set[str]:
    """The terms that are no part of an ordinary word, which a tokenizer may have learned from there."""
    text = " ".join(ordinary)
    return {term for term in terms if term not in ordinary and term not in text}


def _by_length(digests: Iterable[tuple[int, bytes]]) -> dict[int, set[bytes]]:
    found: dict[int, set[bytes]] = {}
    for length, digest in digests:
        found.setdefault(length, set()).add(digest)
    return found


def _digest(sequence: str, key: bytes) -> bytes:
    return hashlib.blake2b(sequence.encode(errors="surrogatepass"), key=key, digest_size=DIGEST_BYTES).digest()


def _slow_digest(text: str, key: bytes) -> bytes:
    """Of what there are few enough of to try them all."""
    return hashlib.pbkdf2_hmac("sha256", text.encode(errors="surrogatepass"), key, SLOW_ROUNDS, DIGEST_BYTES)


def _escaped(found: re.Match[str]) -> str:
    code = int(next(digits for digits in found.groups() if digits), 16)
    return chr(code) if code <= 0x10FFFF else found[0]


def _joined_surrogates(text: str) -> str:
    """Two escapes that are the halves of one character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _packed(digests: set[bytes]) -> str:
    return base64.b64encode(b"".join(sorted(digests))).decode()


def _packed_by_length(sets: dict[int, set[bytes]]) -> dict[str, str]:
    return {str(length): _packed(sets[length]) for length in sorted(sets)}


def _unpacked(packed: str) -> set[bytes]:
    joined = base64.b64decode(packed, validate=True)
    if len(joined) % DIGEST_BYTES:
        raise ValueError("half a hash")
    return {joined[i : i + DIGEST_BYTES] for i in range(0, len(joined), DIGEST_BYTES)}


def _unpacked_by_length(packed: dict[str, str]) -> dict[int, set[bytes]]:
    return {int(length): _unpacked(part) for length, part in packed.items()}
