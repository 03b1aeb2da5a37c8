"""Small files: written whole or not at all, and read with a word on what is wrong."""

import json
import math
import os
import re
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeGuard, TypeVar, Union, cast, get_args, get_origin, get_type_hints

SCHEMA = 1
LARGEST_INT, LARGEST_FLOAT = 2**63, 1e300  # what is beyond them was never counted or measured
_WORDS = {
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    NoneType: "null",
}

R = TypeVar("R", bound="Record")
F = TypeVar("F", bound="FolderRecord")

SECRET_KEY = re.compile(
    r"(^|[_\-.])(token|secrets?|passwords?|passwd|passphrase|(api|access|secret|private|auth|account|signing)[_-]?key|"
    r"credentials?|authorization|auth|cookies?|bearer)$",
    re.IGNORECASE,
)
SPECIAL_TOKEN = re.compile(r"(pad|mask|eos|bos|eot|unk|sep|cls|end|image|video|audio)_token", re.IGNORECASE)
SECRET = re.compile(
    r"\b(hf_(?=[A-Za-z0-9]*[0-9A-Z])[A-Za-z0-9]{8,}|(hf|api_org)_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|sk-[A-Za-z0-9_-]{16,}|(gh[opsur]|github_pat)_[A-Za-z0-9_]{16,}|glpat-[\w-]{16,}|xox[a-z]-[\w-]{10,}"
    r"|(AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"  # AWS, Google, JWT
    r"|(?i:\bbearer\s+[\w.~+/-]{8,}|\bbasic\s+[\w+/]{16,}=*)|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:@]*:[^/\s@]+@"
)


class UserError(ValueError):
    """A mistake that the user can mend. The message says what is wrong, where, and what to do; it quotes no row.

    Scripts print it in one line and end with status 2 (`mdu_trainer.commands.run`).
    """


def without_secrets(value: Any) -> Any:
    """Return a setting without access tokens and passwords, at any depth of dicts, lists and tuples.

    Dropped is what has the name of a secret (`hub_token`, `api_key`, ...), and what looks like one under any name:
    tokens of the Hub, OpenAI, GitHub, GitLab, Slack, AWS and Google, JWTs, bearer headers, private keys, passwords in
    URLs. A secret on its own becomes None.
    """
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if not (_names_secret(key) or looks_like_secret(item))}
        return {key: without_secrets(item) for key, item in kept.items()}
    if type(value) in (list, tuple):
        return type(value)(without_secrets(item) for item in value if not looks_like_secret(item))
    return None if looks_like_secret(value) else value


def looks_like_secret(value: Any) -> bool:
    """Whether a text holds what looks like an access token or a password."""
    return isinstance(value, str) and SECRET.search(value) is not None


def _names_secret(key: Any) -> bool:
    if not isinstance(key, str):
        return False
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)  # apiKey
    return looks_like_secret(key) or bool(SECRET_KEY.search(name)) and not SPECIAL_TOKEN.fullmatch(name)


def read_jsonl(path: str | Path) -> list[Any]:
    """Return the rows of a file of JSON lines, or of one JSON array; of one object over several lines, this row.

    A byte order mark is skipped. Lines end at a line feed only: U+2028 and U+0085 may stand inside a text.

    Raises:
        UserError: not UTF-8, not JSON, or no rows. The message names file and line, and quotes neither.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        text = path.read_bytes().decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text. Save it as UTF-8.") from None
    is_array = text.startswith("[")
    rows = []
    for number, part in enumerate([text] if is_array else text.split("\n"), 1):
        try:
            rows += json.loads(part) if is_array else [json.loads(part)] if part.strip() else []
        except json.JSONDecodeError as error:
            if number == 1 and (whole := _object(text)) is not None:
                return [whole]
            raise UserError(f"{path}, line {number + error.lineno - 1}, is not JSON.") from None
    if not rows:
        raise UserError(f"{path} is empty: it has no rows.")
    return rows


def _object(text: str) -> dict[str, Any] | None:
    """The object that a text is as a whole, or None."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def write_whole(path: str | Path, text: str, *, private: bool = False) -> None:
    """Write a file, whole or not at all: a kill leaves the one before. Its folder is made.

    A private file is for its owner's eyes only.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.touch(mode=0o600 if private else 0o666)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


class Record:
    """The base of a dataclass that is kept as a JSON file with the number of its schema. Scores and names, no rows.

    Attributes:
        schema: of the file; it changes when the fields do.
        earlier_schemas: what `from_content` reads, too.
        kind: what messages call the file, a noun that takes "a".
        remedy: what to do about a file that cannot be read, after a colon.
        indent: of the JSON, None for one long line.
        private: whether the file is for its owner's eyes only.
    """

    schema: ClassVar[int] = SCHEMA
    earlier_schemas: ClassVar[tuple[int, ...]] = ()
    kind: ClassVar[str]
    remedy: ClassVar[str]
    indent: ClassVar[int | None] = 2
    private: ClassVar[bool] = False

    def content(self) -> dict[str, Any]:
        """Return what the file holds beside the schema."""
        return asdict(cast(Any, self))

    @classmethod
    def from_content(cls: type[R], content: dict[str, Any], schema: int) -> R:
        """Make the record of what `content` returned. A ValueError says what is wrong."""
        return typed(cls, content)

    def to_json(self) -> str:
        """Return the record as JSON, which has no word for NaN and infinity: they are written as null."""
        content = {"schema": self.schema} | _finite(self.content())
        return json.dumps(content, indent=self.indent, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write `to_json`, whole or not at all."""
        write_whole(path, self.to_json(), private=self.private)

    @classmethod
    def load(cls: type[R], path: str | Path) -> R:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: it holds something else, more or less. The message says what to do.
        """
        content = read_json(path, f"a {cls.kind}", cls.remedy)
        found = content.pop("schema", None) if isinstance(content, dict) else None
        if found not in (cls.schema, *cls.earlier_schemas):
            found = "no schema" if found is None else f"schema {found}" if _is_int(found) else "an unreadable schema"
            raise UserError(
                f"{path} is not a {cls.kind} of this version: it has {found}, this version reads {cls.schema}: "
                f"{cls.remedy}."
            )
        try:
            made = cls.from_content(content, found)
            made.check()
            return made
        except (ValueError, RecursionError) as error:  # a RecursionError has no place to name
            reason = error if isinstance(error, ValueError) else "it is nested too deep"
            raise UserError(f"{path} is not a {cls.kind}: {reason}. To mend it, {cls.remedy}.") from None

    def check(self) -> None:
        """Raise a ValueError that says what contradicts itself, if anything does."""


class FolderRecord(Record):
    """A record that lies beside the weights of a checkpoint, as `file`, for its owner's eyes only."""

    file: ClassVar[str]
    remedy: ClassVar[str] = "save the model with the trainer again"
    private: ClassVar[bool] = True

    def save(self, path: str | Path) -> None:
        """Write the record into a folder, whole or not at all."""
        super().save(Path(path) / self.file)

    @classmethod
    def load(cls: type[F], path: str | Path) -> F:
        """Read the record of a folder; errors are those of `Record.load`."""
        if not (Path(path) / cls.file).is_file():
            raise FileNotFoundError(
                f"{path} holds no {cls.file}: MDUTrainer writes it when it saves a model, beside the weights. "
                "Copy it along with them, or save the model with the trainer again."
            )
        return super().load(Path(path) / cls.file)


def read_json(path: str | Path, kind: str, remedy: str) -> Any:
    """Return the content of a JSON file.

    Messages call it `kind`, with its article, and say with `remedy` what to do if it cannot be read.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: a folder, not UTF-8, or not JSON.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.is_dir():
        raise UserError(f"{path} is a folder, not {kind}: name a file.")
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError):  # also of text that is not UTF-8
        raise UserError(f"{path} is not {kind}: it holds no JSON. To mend it, {remedy}.") from None


def typed(hint: Any, value: Any, place: str = "") -> Any:
    """Return a value from JSON as a type hint wants it.

    Args:
        hint: a dataclass, list, dict, Literal, str, int, float (finite), bool or Any, or one of them or None.
        value: as `json` reads it.
        place: what messages call it.

    Raises:
        ValueError: it is something else. The message names the place, not the value.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        if value is None and NoneType in parts:
            return None
        (option,) = [part for part in parts if part is not NoneType]
        return typed(option, value, place)
    if is_dataclass(hint):
        return _decode_dataclass(hint, value, place)
    if origin is Literal and isinstance(value, str) and value in parts:
        return value
    if origin is list and isinstance(value, list):
        return [typed(parts[0], each, f"{place}[{i}]") for i, each in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        of_key, of_value = parts
        return {typed(of_key, key, place): typed(of_value, each, _at(place, key)) for key, each in value.items()}
    if hint is NoneType and value is None:
        return None
    if hint is int and _is_int(value) and abs(value) < LARGEST_INT:
        return value
    if hint is float and (_is_int(value) or isinstance(value, float)) and abs(value) < LARGEST_FLOAT:
        return float(value)
    if hint in (str, bool) and isinstance(value, hint):
        return value
    wanted = _WORDS.get(origin or hint, "one of its choices")
    raise ValueError(f"{place or 'its content'} is not {wanted}")


def _decode_dataclass(cls: Any, value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{place or 'its content'} is not an object")
    hints, known = get_type_hints(cls), {f.name: f for f in fields(cls) if f.init}
    for name, f in known.items():
        if name not in value and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{place or 'it'} has no {name}")
    if value.keys() - known.keys():
        raise ValueError(f"{place or 'it'} has more in it than {', '.join(known)}")
    return cls(**{name: typed(hints[name], each, _at(place, name)) for name, each in value.items()})


def _at(place: str, name: Any) -> str:
    return f"{place}.{name}" if place else str(name)


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: Any) -> Any:
    """Return JSON without NaN and infinity."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
