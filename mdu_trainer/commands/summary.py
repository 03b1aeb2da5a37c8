"""The last lines of a command: where to look, and what to type next."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from trl import ModelConfig

from ..report.model_card import CARD
from ..report.page import PAGE
from ..report.records import RESULTS
from ..terminal import columns


def summary(files: Mapping[str, Path], *commands: Sequence[str | Path]) -> str:
    """Some lines on what a run has written, and on the commands that go on from there.

    Args:
        files: what it is -> its path; one that is not there is left out.
        *commands: the words of a subcommand of `mdu` and of its options.
    """
    there = {what: path for what, path in files.items() if path.exists()}
    width = max(map(len, [*there, "next"]))
    lines = [f"{what:<{width}}  {path}" for what, path in there.items()]
    for words in commands:
        lines.append(f"{'next':<{width}}  {_folded([*_mdu(), *(quote(str(word)) for word in words)], width + 2)}")
    return "\n".join(lines)


def comparison_summary(args: Any, model_args: ModelConfig, folder: Path, run: str, picture: str) -> str:
    """The summary of a comparison.

    Args:
        args, model_args: of the command.
        folder: of the comparison.
        run: folder of the model whose card is named, and which is attacked next.
        picture: the one to look at first.
    """
    own = {name: str(folder / name) for name in ("base", "retain") if (folder / name).is_dir()}
    base, never = own.get("base", model_args.model_name_or_path), own.get("retain", args.retain_model)
    attack = attack_command(args, model_args, run, base or "BASE", never)
    files = {"figures": folder / RESULTS, "picture": folder / picture, "card": Path(run, CARD), "page": folder / PAGE}
    return summary(files, attack, *([] if files["page"].exists() else [["report", folder]]))


def unlearn_summary(args: Any, model_args: ModelConfig, folder: Path) -> str:
    """The summary of one unlearning, whose model lies in a folder."""
    files = {"figures": folder / RESULTS, "card": folder / CARD, "model": folder}
    return summary(files, attack_command(args, model_args, folder, model_args.model_name_or_path), ["report", folder])


def attack_command(
    args: Any, model_args: ModelConfig, model: str | Path, base: str | None, retain_model: str | None = None
) -> list[str]:
    """The words that attack a model with the rows of a command.

    Args:
        args, model_args: of the command, which names the rows, and says how a model is loaded.
        model, base, retain_model: the unlearned one, the one before, and one that never saw the rows.
    """
    names = ("forget", "retain", "columns") if getattr(args, "forget", None) else ()
    if not names and getattr(args, "dataset_name", None):
        names = ("dataset_name", "forget_split", "retain_split")
    options = {"model": str(model), "base": base, "retain_model": retain_model}
    options |= {name: getattr(args, name) for name in names}
    options["dtype"] = None if model_args.dtype == ModelConfig.dtype else model_args.dtype
    return ["attack", *(word for name, value in options.items() if value for word in (f"--{name}", str(value)))]


def _mdu() -> list[str]:
    """How `mdu` is called here: it may not be on the path."""
    beside = Path(sys.executable).with_name("mdu")
    if shutil.which("mdu"):
        return ["mdu"]
    if beside.is_file() and beside.is_relative_to(Path.cwd()):
        return [str(beside.relative_to(Path.cwd()))]
    return ["python", "-m", "mdu_trainer.mdu"]


def _folded(words: Sequence[str], indent: int) -> str:
    """A command in one line, or on a terminal in several that a shell reads as one."""
    room, parts = columns(sys.stdout), [""]
    for word in words:  # an option and its values are a part
        parts = [*parts, word] if word.startswith("--") else [*parts[:-1], f"{parts[-1]} {word}".strip()]
    lines = parts[:1]
    for part in parts[1:]:
        if room is not None and indent + len(f"{lines[-1]} {part} \\") > room:
            lines.append(part)
        else:
            lines[-1] += f" {part}"
    return (" \\\n" + " " * indent).join(lines)
