"""Options that can be refused before anything is loaded."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..files import UserError

PATH = re.compile(r"[./~]|\w:\\|.*/.*/")  # how a name begins that cannot be one of the Hub
REVISION = re.compile(r"(?!.*(\.\.|//|@\{))[\w][\w./@+-]*")  # of what git allows, what the Hub has
MODEL_FILES = ("config.json", "adapter_config.json")


def check_least(options: Any, **least: float) -> None:
    """Refuse numbers that are not finite, or below the smallest value that makes sense, given by the option's name.

    None stands for a default, and in a list every number counts.
    """
    for name, smallest in least.items():
        value = getattr(options, name)
        for each in value if isinstance(value, list) else [value]:
            if each is not None and not (math.isfinite(each) and each >= smallest):
                raise UserError(f"--{name} must be at least {smallest:g}, got {each:g}.")


def check_above_zero(options: Any, *names: str) -> None:
    """Refuse numbers that are 0, below, or not finite; None stands for a default."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name} must be above 0, got {value:g}.")


def check_once(options: Any, *names: str) -> None:
    """Refuse a list that names something twice, nothing, or a blank; what it names may be private."""
    for name in names:
        values = getattr(options, name)
        if values is None:
            continue
        if not values or any(isinstance(value, str) and not value.strip() for value in values):
            raise UserError(f"--{name} names nothing: leave it out, or give it a value.")
        twice = next((i for i, value in enumerate(values) if value in values[:i]), None)
        if twice is not None:
            raise UserError(f"--{name} names value {twice + 1} twice: leave one out.")


def check_output_folder(folder: str | Path) -> None:
    """Refuse an output folder that is none, or that other things live in."""
    path = Path(folder).expanduser().resolve()
    if not str(folder).strip():
        raise UserError("--output_dir is empty: name a folder.")
    if path in (Path(path.anchor), Path.home().resolve()):
        raise UserError(f"--output_dir {folder} is your home or the root of the disk: name a folder of its own.")
    file = next((part for part in (path, *path.parents) if part.exists() and not part.is_dir()), None)
    if file is not None:
        raise UserError(f"--output_dir {folder}: {file} is a file. Name a folder.")


def check_source(name: str, option: str, kind: str = "data set") -> None:
    """Refuse a name that neither a folder has, nor a model or data set (`kind`) on the Hub can have."""
    path = Path(name).expanduser()
    if path.is_file():
        raise UserError(f"--{option} {name} is a file: name a folder with the {kind}, or OWNER/NAME on the Hub.")
    if path.is_dir() and name.strip():
        if kind == "model" and not any((path / file).is_file() for file in MODEL_FILES):
            raise UserError(f"--{option} {name} holds no model: it has no {' and no '.join(MODEL_FILES)}.")
        return
    if PATH.match(name):
        raise UserError(f"--{option}: there is no folder {name}.")
    check_repository(name, f"--{option}")


def check_repository(name: str, option: str) -> None:
    """Refuse what is no id of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"{option}: {name!r} is neither a folder nor OWNER/NAME, as the Hub names things.") from None


def check_revision(name: str | None, option: str) -> None:
    """Refuse what is no branch, tag or commit; None is the default."""
    if name is not None and not REVISION.fullmatch(name):
        raise UserError(f"--{option} {name!r} is no name of a branch, tag or commit.")


def check_not_written(inputs: Iterable[str | None], written: Iterable[Path]) -> None:
    """Refuse to overwrite what is read: files, folders or Hub ids, None for those that a run does not read."""
    doomed = [path.resolve() for path in written]
    for name in filter(None, inputs):
        path = Path(name).expanduser()
        if path.exists() and any(path.resolve().is_relative_to(each) for each in doomed):
            raise UserError(f"{name} is read, and this run would overwrite it. Choose another --output_dir.")
