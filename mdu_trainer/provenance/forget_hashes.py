"""Keyed hashes of what a model was made to forget, by which a file that quotes it is found before it is published.

They lie beside the weights, in `forget_hashes.json`, and are never uploaded. They are pseudonymous, not anonymous:
their key lies beside them, so whoever has the file can confirm what they guess: a sentence at a microsecond a guess, a
single word or a short answer at a tenth of a millisecond. Keep it as you keep the forget set, and delete it with the
forget set.
"""

import base64
import hashlib
import secrets
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from ..files import FolderRecord, typed
from .texts import normalise, readings, row_words, spelt, terms, words

HASHES_FILE = "forget_hashes.json"
SEQUENCE_WORDS = 6  # shorter sequences are common wording, longer ones miss a sentence that was cut or reworded
SHORTEST_ROW_WORDS = 4  # below, a text cannot be told from ordinary language
REACH = 12  # words after a question in which its short answer is looked for: the marks of a turn stand between them
DIGEST_BYTES = 8  # a million sequences against a million hashes collide once in ten million scans
SLOW_ROUNDS = 200  # of PBKDF2 for what is quickly guessed: a tenth of a millisecond


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
        """The number of hashes."""
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


@dataclass(frozen=True)
class _PackedHashes:
    """`RequestHashes` as the file has them: in base64, by length as a text."""

    key: str
    hashes: dict[str, str]
    questions: dict[str, str]
    answers: dict[str, str]
    terms: str


@dataclass
class ForgetHashes(FolderRecord):
    """Keyed hashes of the word sequences of forget rows, from one or more requests.

    A sequence is `SEQUENCE_WORDS` words long, or a whole text if that is shorter. A text of fewer than
    `SHORTEST_ROW_WORDS` words is looked for behind the end of the text before it in its row: an answer with its
    question. What the retain rows hold, too, is ordinary wording and not kept. Words are compared as `normalise` reads
    them, without case, punctuation and the marks that tokenizers put for a space (`mdu_trainer.data.words`); a
    character of a script without spaces, or of Korean, counts as a word.

    Attributes:
        requests: of each request, its hashes.
        too_short: texts of so few words, their question's included, that no scan finds them.
    """

    schema: ClassVar[int] = 2
    kind: ClassVar[str] = "file of hashes"
    indent: ClassVar[int | None] = None
    file: ClassVar[str] = HASHES_FILE

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
        """Hash the rows to forget.

        Args:
            forget: texts to forget, or the texts of each row in their order.
            retain: such texts or rows to keep, whose wording is no leak.
            key: 16 bytes, by default random ones.
            control_tokens: of the tokenizer (`<|user|>`); their words in a vocabulary are no leak.
        """
        wanted = _Wanted()
        for row in forget:
            wanted.add(row_words(row))
        ordinary = set()
        for row in retain:
            texts = row_words(row)
            wanted.remove(texts)
            ordinary.update(spelt(word for text in texts for word in text))
        ordinary.update(spelt(word for token in control_tokens for word in words(token)))
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
        """The number of hashes."""
        return sum(request.count for request in self.requests)

    def found_in(self, text: str, wording: str = "") -> bool:
        """Whether a text holds something of the forget rows that is not in `wording`, too."""
        known, ways = words(normalise(wording)), list(readings(text))
        return any(request.quoted_in(found, known) for request in self.requests for found in ways)

    def terms_in(self, entries: Iterable[str]) -> set[str]:
        """Return the entries of a vocabulary that hold a word which only rows to forget hold."""
        by_term: dict[str, set[str]] = {}
        for entry in entries:
            for term in terms(words(normalise(entry))):
                by_term.setdefault(term, set()).add(entry)
        requests = [request for request in self.requests if request.terms]
        found = (t for t in by_term for request in requests if _slow_digest(t, request.key) in request.terms)
        return {entry for term in found for entry in by_term[term]}

    def content(self) -> dict[str, Any]:
        """Return the hashes, packed."""
        requests = [
            _PackedHashes(
                base64.b64encode(request.key).decode(),
                _packed_by_length(request.sequences),
                _packed_by_length(request.questions),
                _packed_by_length(request.answers),
                _packed(request.terms),
            )
            for request in self.requests
        ]
        return {"requests": [asdict(request) for request in requests], "too_short": self.too_short}

    @classmethod
    def from_content(cls, content: dict[str, Any], schema: int) -> "ForgetHashes":
        """Unpack the hashes."""
        requests = [
            RequestHashes(
                base64.b64decode(request.key),
                _unpacked_by_length(request.hashes),
                _unpacked_by_length(request.questions),
                _unpacked_by_length(request.answers),
                _unpacked(request.terms),
            )
            for request in typed(list[_PackedHashes], content.get("requests"), "requests")
        ]
        return cls(requests, typed(int, content.get("too_short"), "too_short"))


class _Wanted:
    """The texts to hash, in clear: those of the rows to forget, less what the rows to keep hold."""

    def __init__(self) -> None:
        self.sequences: dict[int, set[str]] = {}
        self.pairs: set[tuple[tuple[str, ...], tuple[str, ...]]] = set()  # end of a question, short answer
        self.terms: set[str] = set()
        self.too_short = 0

    def add(self, texts: list[list[str]]) -> None:
        before: list[str] = []
        alone = 0  # short texts that no sequence holds so far
        for found in texts:
            self.terms.update(terms(found))
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


def _sequences(found: list[str], length: int) -> Iterator[str]:
    return (" ".join(found[i : i + length]) for i in range(len(found) - length + 1))


def _pair(end: Sequence[str], short: Sequence[str]) -> str:
    return f"{' '.join(end)} > {' '.join(short)}"


def _pairs(end: list[str], after: list[str], lengths: Iterable[int]) -> Iterator[str]:
    return (_pair(end, after[i : i + n]) for n in lengths for i in range(len(after) - n + 1))


def _without_parts(terms: set[str], ordinary: Collection[str]) -> set[str]:
    """Return the terms that are no part of an ordinary word, from which a tokenizer may have learned them."""
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
    """Hash a text that is one of few, so that trying them all takes long."""
    return hashlib.pbkdf2_hmac("sha256", text.encode(errors="surrogatepass"), key, SLOW_ROUNDS, DIGEST_BYTES)


def _packed(digests: set[bytes]) -> str:
    return base64.b64encode(b"".join(sorted(digests))).decode()


def _packed_by_length(sets: dict[int, set[bytes]]) -> dict[str, str]:
    return {str(length): _packed(sets[length]) for length in sorted(sets)}


def _unpacked(packed: str) -> set[bytes]:
    joined = base64.b64decode(packed, validate=True)
    if len(joined) % DIGEST_BYTES:
        raise ValueError("it has half a hash")
    return {joined[i : i + DIGEST_BYTES] for i in range(0, len(joined), DIGEST_BYTES)}


def _unpacked_by_length(packed: dict[str, str]) -> dict[int, set[bytes]]:
    return {int(length): _unpacked(part) for length, part in packed.items()}
