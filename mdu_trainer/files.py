"""Small files: written whole or not at all, and read with a word on what is wrong."""

import json
import os
import re
from pathlib import Path
from typing import Any

SCHEMA = 1

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
    """A setting without access tokens and passwords, at any depth of dicts, lists and tuples.

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
    """The rows of a file of JSON lines, or of one JSON array.

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
            raise UserError(f"{path}, line {number + error.lineno - 1}, is not JSON.") from None
    if not rows:
        raise UserError(f"{path} is empty: it has no rows.")
    return rows


def write_whole(path: str | Path, text: str, *, private: bool = False) -> None:
    """Write a file whole or not at all: a kill leaves the one before.

    Args:
        path: of the file; its folder is made.
        text: the content.
        private: for its owner's eyes only.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.touch(mode=0o600 if private else 0o666)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_record(path: Path, schemas: tuple[int, ...] = (SCHEMA,)) -> tuple[int, dict[str, Any]]:
    """The schema of a JSON file beside the weights, and the rest of its content.

    Args:
        path: of the file.
        schemas: those that the caller reads, the newest last.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not readable, or of another schema.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} holds no {path.name}: MDUTrainer writes it when it saves a model, beside the weights. "
            "Copy it along with them, or save the model with the trainer again."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content.pop("schema")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read. Save the model with the trainer again.") from error
    if found not in schemas:
        raise UserError(f"{path} has schema {found}, this version reads {schemas[-1]}: save the model again.")
    return found, content
