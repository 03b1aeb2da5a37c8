"""The text in a file that is to be published: all of it, wherever a format keeps text."""

import io
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from tokenizers.decoders import ByteLevel

from ..files import UserError

Source = Path | bytes

VOCABULARIES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
SPACES = "\u0120\u010a\u2581"  # what stands for a space or a line break at the start of a token
LONGEST_HEADER = 100_000_000  # bytes, as safetensors allows


def content_of(source: Source) -> bytes:
    """The bytes of a file or content."""
    return source if isinstance(source, bytes) else source.read_bytes()


def text_of(name: str, source: Source) -> str:
    """The text in a file.

    All keys and values of JSON in their order, the names of tensors and the metadata of safetensors, the text chunks
    of a picture, else the file as it is.
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
    """Names, types and places of the tensors of a safetensors file, and its metadata.

    Raises:
        ValueError: it is no such file, or was cut short.
    """
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
    """The entries of a tokenizer's file, also as they are read where they are spelt in bytes; empty for other files.

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
    """The tokens in a part of a tokenizer's JSON: names with numbers, pairs of both, descriptions, or texts."""
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
    """The pieces of a SentencePiece model, a message whose field 1 is a piece, whose field 1 is its text."""
    for piece in _fields(content):
        yield from (text.decode("utf-8", errors="replace") for text in _fields(piece))


def _fields(message: bytes) -> Iterator[bytes]:
    """What the fields 1 of a Protocol Buffers message hold, up to the first that is none of bytes or fixed numbers."""
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
    """Keys and values; numbers too, so that words next to each other in the file only are no sentence."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    else:
        yield str(value)
