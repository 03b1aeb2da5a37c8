"""Keyed hashes of what a model was made to forget, by which a file that quotes it is found before it is published.

They lie beside the weights, in `forget_hashes.json`, and are never uploaded. They are pseudonymous, not anonymous:
their key lies beside them, so whoever has the file can confirm a sentence that they guess. Keep it as you keep the
forget set, and delete it with the forget set.
"""

import base64
import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import SCHEMA, read_record, write_whole
from .words import split_words

HASHES_FILE = "forget_hashes.json"
SEQUENCE_WORDS = 6  # shorter sequences are common wording, longer ones miss a sentence that was cut or reworded
SHORTEST_ROW_WORDS = 4  # below, a text cannot be told from ordinary language
DIGEST_BYTES = 8  # a million sequences against a million hashes collide once in ten million scans
FORGET_COLUMNS = ("messages", "prompt", "completion", "rejected")  # `chosen` is what may be said

# \u0120, \u010a and \u2581 stand for a space or a line break in tokens; \n in a template may be spelt out
_NOT_A_WORD = re.compile(r"\\[nrt]|[\u0120\u010a\u2581_]")
_SYLLABLE = re.compile("[\uac00-\ud7a3]|[^\uac00-\ud7a3]+")


@dataclass
class ForgetHashes:
    """Keyed hashes of the word sequences of forget rows, from one or more requests.

    A sequence is `SEQUENCE_WORDS` words long, or a whole text if that is shorter. One that the retain rows hold, too,
    is ordinary wording and not kept. Words are compared without case, punctuation and the marks that tokenizers put
    for a space (`mdu_trainer.words`); a character of a script without spaces, or of Korean, counts as a word.

    Attributes:
        requests: of each request, its key and its hashes by length of the sequence.
        too_short: texts of fewer than `SHORTEST_ROW_WORDS` words, which no scan finds.
    """

    requests: list[tuple[bytes, dict[int, set[bytes]]]] = field(default_factory=list)
    too_short: int = 0

    @classmethod
    def of(cls, forget: Iterable[str], retain: Iterable[str] = ()) -> "ForgetHashes":
        """The hashes of the texts to forget, under a new random key.

        Args:
            forget: texts to forget.
            retain: texts to keep, whose wording is no leak.
        """
        sequences: dict[int, set[str]] = {}
        too_short = 0
        for text in forget:
            found = words(text)
            length = min(len(found), SEQUENCE_WORDS)
            if length < SHORTEST_ROW_WORDS:
                too_short += 1
                continue
            sequences.setdefault(length, set()).update(_sequences(found, length))
        for text in retain:
            found = words(text)
            for length, known in sequences.items():
                known.difference_update(_sequences(found, length))
        key = secrets.token_bytes(16)
        return cls([(key, {n: {_digest(s, key) for s in known} for n, known in sequences.items()})], too_short)

    def found_in(self, text: str, wording: str = "") -> bool:
        """Whether a text holds a sequence of the forget rows that is not in `wording`, too."""
        found, known = words(text), words(wording)
        for key, by_length in self.requests:
            for length, digests in by_length.items():
                ordinary = set(_sequences(known, length))
                if any(_digest(s, key) in digests and s not in ordinary for s in _sequences(found, length)):
                    return True
        return False

    def save(self, folder: str | Path) -> None:
        """Write `forget_hashes.json`, whole or not at all, readable by its owner alone."""
        requests = [
            {
                "key": base64.b64encode(key).decode(),
                "hashes": {n: base64.b64encode(b"".join(sorted(digests))).decode() for n, digests in sets.items()},
            }
            for key, sets in self.requests
        ]
        content = {"schema": SCHEMA, "requests": requests, "too_short": self.too_short}
        write_whole(Path(folder) / HASHES_FILE, json.dumps(content) + "\n", private=True)

    @classmethod
    def load(cls, folder: str | Path) -> "ForgetHashes":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: the folder was not written by `MDUTrainer`.
            ValueError: the file is not readable, or of another schema.
        """
        content = read_record(Path(folder) / HASHES_FILE)
        requests = []
        for request in content["requests"]:
            by_length = {int(n): _split(base64.b64decode(joined)) for n, joined in request["hashes"].items()}
            requests.append((base64.b64decode(request["key"]), by_length))
        return cls(requests, content["too_short"])


def words(text: str) -> list[str]:
    """The words of a text, as `ForgetHashes` compares them: of any script, Korean ones a syllable at a time."""
    found = split_words(_NOT_A_WORD.sub(" ", text))
    return [part for word in found for part in ((word,) if word.isascii() else _SYLLABLE.findall(word))]


def row_texts(dataset: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The texts that training reads as prompt and as response to forget or to keep, one by one.

    A system turn says the same in every row, so it is none of them.
    """
    for row in dataset:
        for value in (row[column] for column in FORGET_COLUMNS if column in row):
            turns = [{"role": None, "content": value}] if isinstance(value, str) else value
            yield from (_content(turn["content"]) for turn in turns if turn["role"] != "system")


def _content(content: str | list[dict[str, Any]]) -> str:
    """The text of a message, which may come in parts."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _sequences(found: list[str], length: int) -> Iterator[str]:
    return (" ".join(found[i : i + length]) for i in range(len(found) - length + 1))


def _digest(sequence: str, key: bytes) -> bytes:
    return hashlib.blake2b(sequence.encode(), key=key, digest_size=DIGEST_BYTES).digest()


def _split(joined: bytes) -> set[bytes]:
    return {joined[i : i + DIGEST_BYTES] for i in range(0, len(joined), DIGEST_BYTES)}
