"""Scan what is to be published for rows to forget and for secrets, in all the text that a file's format keeps."""

import io
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from tokenizers.decoders import ByteLevel

from ..files import UserError, looks_like_secret
from ..provenance.forget_hashes import ForgetHashes
from ..report.eval_results import EVAL_RESULTS
from ..report.model_card import CARD, card_wording
from ..report.records import RECOVERY, RESULTS, Checkpoint
from .files import ADAPTER_CONFIG, CONFIGS, VOCABULARIES, Source, content_of

SPACES = "\u0120\u010a\u2581"  # what stands for a space or a line break at the start of a token
LONGEST_HEADER = 100_000_000  # bytes, as safetensors allows


class LeakError(UserError):
    """A file that was to be published quotes a row to forget. Nothing was sent. The message names the file only."""


def check_files(
    files: dict[str, Source],
    checkpoint: Checkpoint,
    names: Mapping[str, str | None],
    published: Callable[[], set[str]],
) -> None:
    """Refuse files that hold a secret, or something of the rows to forget, where the checkpoint has hashes of them.

    The other arguments are as in `check_texts` and `check_vocabulary`.
    """
    check_secrets(files)
    if checkpoint.hashes is not None:
        # also the records before they are reduced to scores: what leaks in is found, and not just dropped
        records = {RESULTS: checkpoint.results, RECOVERY: checkpoint.recovery}
        given: dict[str, Source] = {
            f"{name} as given": json.dumps(asdict(record), default=str).encode()
            for name, record in records.items()
            if record is not None
        }
        check_texts(files | given, checkpoint.hashes, names)
        check_vocabulary(files, checkpoint.hashes, published)


def check_texts(files: dict[str, Source], hashes: ForgetHashes, names: Mapping[str, str | None] | None = None) -> None:
    """Scan every text, and the names of the files, for sentences of the rows to forget.

    `names` are what else is sent, by what a message calls it: the repository's name, say.

    Raises:
        LeakError: one was found; the message names the file, never the sentence.
    """
    quoting = {
        name: f"the name of file {i} of {len(files)}" for i, name in enumerate(files, 1) if hashes.found_in(name)
    }
    found = [
        quoting.get(name, name)
        for name, source in files.items()
        if name in quoting or hashes.found_in(text_of(name, source), card_wording() if name == CARD else "")
    ]
    found += [where for where, text in (names or {}).items() if text and hashes.found_in(text)]
    if found:
        raise LeakError(
            f"{', '.join(found)} {'quotes' if len(found) == 1 else 'quote'} rows that were to be forgotten. Nothing "
            "was sent. Remove the text there; in a tokenizer, look at the chat template and the added tokens."
        )


def check_vocabulary(files: dict[str, Source], hashes: ForgetHashes, published: Callable[[], set[str]]) -> None:
    """Scan the vocabulary of a tokenizer for words that only the rows to forget hold.

    Entries that the base's published vocabulary has, too, say nothing of the rows; `published` gives them, and is
    called only if something is found.

    Raises:
        LeakError: there are such entries; the message counts them, and names none.
    """
    entries = {name: found for name, source in files.items() if (found := vocabulary(name, source))}
    suspects = hashes.terms_in(set().union(*entries.values()))
    if suspects:
        suspects -= published()
    where = [name for name, found in entries.items() if found & suspects]
    if where:
        raise LeakError(
            f"{', '.join(where)}: {len(suspects)} entries of the vocabulary are or hold words that only the rows to "
            "forget hold: the tokenizer learned them there. Nothing was sent. Train it on the rows to keep only. "
            "If it is the public one of a base on the Hub, pass base_model='ORG/NAME'."
        )


def check_secrets(files: dict[str, Source]) -> None:
    """Refuse what looks like an access token or a password, outside of weights and vocabularies.

    Raises:
        ValueError: there is one; the message names the file only.
    """
    words = (
        CARD,
        RESULTS,
        RECOVERY,
        EVAL_RESULTS,
        ADAPTER_CONFIG,
        *CONFIGS,
        "tokenizer_config.json",
        "chat_template.jinja",
    )
    found = [name for name in words if name in files and looks_like_secret(text_of(name, files[name]))]
    if found:
        raise UserError(
            f"{', '.join(found)} holds what looks like an access token or a password. Nothing was sent. Remove it, "
            "and have it revoked if it is a real one."
        )


def text_of(name: str, source: Source) -> str:
    """Return the text in a file.

    That are all keys and values of JSON in their order, the names of tensors and the metadata of safetensors, the text
    chunks of a picture, else the file as it is.
    """
    if name.endswith(".safetensors"):
        return " ".join(_leaves(safetensors_header(source)))
    if name.endswith(".png"):
        return _png_text(content_of(source))
    text = content_of(source).decode("utf-8", errors="replace")
    if ".json" not in name:
        return text
    try:
        return " ".join(_leaves(json.loads(text)))
    except (ValueError, RecursionError):
        return text


def safetensors_header(path: Path) -> dict:
    """Return names, types and places of the tensors of a safetensors file, and its metadata; or refuse the file."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, LONGEST_HEADER)))
        if isinstance(header, dict):
            return header
    except (struct.error, ValueError, RecursionError):
        pass
    raise UserError(f"{path} is no safetensors file, or was cut short. Nothing was sent. Save the model again.")


def vocabulary(name: str, source: Source) -> set[str]:
    """Return the entries of a tokenizer's file, those spelt in bytes also as they are read; none of another file.

    What continues a word (`##ing`) is no entry.
    """
    if name not in VOCABULARIES:
        return set()
    content = content_of(source)
    if name.endswith(".model"):
        found = set(_pieces(content))
    elif name.endswith(".txt"):
        lines = content.decode("utf-8", errors="replace").splitlines()
        found = {line.replace(" ", "") for line in lines if not line.startswith("#version")}
    else:
        try:
            found = set(_json_entries(name, json.loads(content)))
        except (ValueError, RecursionError):
            return set()  # which is scanned as text
    found = {entry for entry in found if not entry.startswith("##")}
    decoder = ByteLevel()
    spelt = (entry for entry in found if not entry.lstrip(SPACES).isascii())
    return found | {decoder.decode([entry]) for entry in spelt}


def _json_entries(name: str, content: object) -> Iterator[str]:
    if not isinstance(content, dict):
        return
    if name in ("vocab.json", "added_tokens.json"):
        yield from content
    elif name == "tokenizer.json":
        yield from _tokens(content.get("added_tokens"))
        model = content.get("model")
        if isinstance(model, dict):
            yield from _tokens(model.get("vocab"))
            for merge in model.get("merges") or ():
                yield merge.replace(" ", "") if isinstance(merge, str) else "".join(map(str, merge))
    else:
        for key, value in content.items():
            if key.endswith(("_token", "_tokens", "_tokens_decoder")):
                yield from _tokens(value)


def _tokens(part: object) -> Iterator[str]:
    """Yield the tokens in a part of a tokenizer's JSON: names with numbers, pairs of both, descriptions, or texts."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, Mapping):
        if isinstance(part.get("content"), str):
            yield part["content"]
        elif all(isinstance(value, int | float) for value in part.values()):
            yield from part
        else:
            for value in part.values():
                yield from _tokens(value)
    elif isinstance(part, list):
        for item in part:
            yield from _tokens(item)


def _pieces(content: bytes) -> Iterator[str]:
    """Yield the pieces of a SentencePiece model, a message whose field 1 is a piece, whose field 1 is its text."""
    for piece in _fields(content):
        yield from (text.decode("utf-8", errors="replace") for text in _fields(piece))


def _fields(message: bytes) -> Iterator[bytes]:
    """Yield the contents of the fields 1 of a Protocol Buffers message, up to a field of an unknown kind."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        kind = tag & 7
        if kind == 0:
            _, place = _varint(message, place)
        elif kind == 1 or kind == 5:
            place += 8 if kind == 1 else 4
        elif kind == 2:
            length, place = _varint(message, place)
            if tag >> 3 == 1:
                yield message[place : place + length]
            place += length
        else:
            return


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(message):
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
    return value, place


def _png_text(content: bytes) -> str:
    from PIL import Image  # it comes with matplotlib, which drew the picture

    with Image.open(io.BytesIO(content)) as image:
        image.load()
        return " ".join(_leaves({str(key): str(value) for key, value in image.info.items()}))


def _leaves(value: object) -> Iterator[str]:
    """Yield keys and values; numbers too, so that words next to each other in the file only are no sentence."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    else:
        yield str(value)
