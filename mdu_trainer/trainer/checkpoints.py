"""Checkpoints that are whole or not there, and resuming from the newest one that is.

A checkpoint is written into a folder beside the others, `_writing`, and takes its name, `checkpoint-N`, when all of it
is on the disk. The last file is `manifest.json`, with the size and SHA-256 of every other: a checkpoint that was cut
short, truncated or changed is told from a good one before anything of it is loaded. One that goes loses its name
first: at every moment, whatever is named `checkpoint-N` is whole.
"""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..files import UserError
from .run_lock import check_free

logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
WRITING = "_writing"  # nothing whose name starts with an underscore is pushed to the Hub
REMOVED = "_removed-"  # a checkpoint's name while it is being deleted
SNAPSHOT = ".push-checkpoint-"  # its files' second name while they are being sent
SCHEMA = 1
STATE = "trainer_state.json"


class CheckpointError(UserError, RuntimeError):
    """A checkpoint could not be written, or the one to resume from is not whole, or of another run."""


def choose(folder: str | Path, wanted: str | bool | None) -> str | None:
    """The checkpoint to resume from. The main process looks; all processes get its answer.

    Args:
        folder: of the checkpoints.
        wanted: the path of one, True for the newest that is whole, or None or False for none.

    Returns:
        Its path, or None if none is wanted.

    Raises:
        CheckpointError: the wanted one is damaged, or none is whole.
    """
    if not wanted:
        return None
    answer: list[str | None] = [None, None]
    if PartialState().is_main_process:
        try:
            answer[0] = str(newest_intact(Path(folder)) if wanted is True else _intact(Path(wanted)))
        except CheckpointError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    path, problem = answer
    if problem:
        raise CheckpointError(problem)
    return path


def newest_intact(folder: Path) -> Path:
    """The checkpoint with the most steps whose files are as they were written; warns of those it skips.

    Raises:
        CheckpointError: there is none.
    """
    skipped = []
    for checkpoint in reversed(_checkpoints(folder)):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        skipped.append(f"{checkpoint.name} ({problem})")
        logger.warning(f"{checkpoint} is skipped: {problem}.")
    raise CheckpointError(
        f"There is no checkpoint to resume from in {folder}"
        + (f"; not whole: {', '.join(skipped)}" if skipped else "")
        + ". Train without resume_from_checkpoint to start anew."
    )


def _intact(checkpoint: Path) -> Path:
    problem = damage(checkpoint) if checkpoint.is_dir() else "there is no such folder"
    if problem is not None:
        raise CheckpointError(
            f"{checkpoint} cannot be resumed from: {problem}. Name another checkpoint, or pass "
            "resume_from_checkpoint=True for the newest that is whole."
        )
    return checkpoint


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`, the last file of a checkpoint, once all others are on the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {str(path.relative_to(folder)): _entry(path, sync=True) for path in paths}
    temporary = folder / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps({"schema": SCHEMA, "files": files}, indent=2) + "\n")
    _sync(temporary)
    os.replace(temporary, folder / MANIFEST)
    _sync(folder)


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, in a few words; None if every file is as it was written."""
    try:
        content = json.loads((checkpoint / MANIFEST).read_text())
        files = content["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}: its writing was cut short, or another program wrote it"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    for name, entry in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
    for name, entry in files.items():
        if _entry(checkpoint / name) != entry:
            return f"{name} is not what was written"
    return None


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that were written to the end, by steps. Their files are not read."""
    return [checkpoint for checkpoint in _checkpoints(folder) if (checkpoint / MANIFEST).is_file()]


def rotate(folder: Path, limit: int | None, keep: set[str]) -> None:
    """Delete checkpoints over the limit: first those cut short, then complete ones, the earliest written first.

    Args:
        folder: of the checkpoints.
        limit: how many stay; all if None or not above 0.
        keep: names of those that always stay.
    """
    if limit is None or limit <= 0:
        return
    complete = complete_checkpoints(folder)
    others = [checkpoint for checkpoint in complete if checkpoint.name not in keep]
    others.sort(key=lambda checkpoint: (checkpoint / MANIFEST).stat().st_mtime_ns)
    surplus = others[: max(0, min(len(others), len(complete) - limit))]
    for checkpoint in [*surplus, *(c for c in _checkpoints(folder) if c not in complete)]:
        with suppress(OSError):
            remove(checkpoint)


def give_name(staged: Path, checkpoint: Path) -> None:
    """Give a sealed checkpoint its name, in place of one of an earlier run."""
    aside = _aside(checkpoint)
    os.replace(staged, checkpoint)
    _sync(checkpoint.parent)
    shutil.rmtree(aside, ignore_errors=True)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, its name first: should this be cut short, nothing is taken for a checkpoint."""
    shutil.rmtree(_aside(checkpoint), ignore_errors=True)


def _aside(checkpoint: Path) -> Path:
    """Take away the name of a checkpoint, if there is one; where it lies then."""
    aside = checkpoint.with_name(f"{REMOVED}{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.replace(checkpoint, aside)
    return aside


def clear_leftovers(folder: Path) -> None:
    """Name a checkpoint that was sealed when a kill came, and delete what was half written or half deleted."""
    for staged in _checkpoints(folder / WRITING):
        if damage(staged) is None:
            give_name(staged, folder / staged.name)
    for pattern in (WRITING, f"{REMOVED}*", f"{SNAPSHOT}*"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def make_writable(folder: str | Path) -> None:
    """Make sure that checkpoints can be written, before a model is loaded and hours are spent.

    Raises:
        FolderInUseError: another process trains there.
        OSError: the folder cannot be made, or nothing can be written into it.
    """
    check_free(folder)
    probe = Path(folder) / f".writable-{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        with suppress(OSError):
            probe.unlink()
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno or 0)}: nothing can be written into output_dir. Choose another, or make room "
            "and set its permissions",
            str(folder),
        ) from error


def _checkpoints(folder: Path) -> list[Path]:
    """Folders named `checkpoint-N`, by N."""
    found = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal() and path.is_dir():
            found[int(step)] = path
    return [found[step] for step in sorted(found)]


def steps_of(checkpoint: str | Path) -> int:
    """The updates that a checkpoint was trained for."""
    return json.loads((Path(checkpoint) / STATE).read_text())["global_step"]


def _entry(path: Path, sync: bool = False) -> dict[str, Any]:
    """Size and hash of a file; with `sync` it is on the disk afterwards."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        if sync:
            os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def not_written(checkpoint: Path, error: BaseException) -> str:
    """Return the message for a checkpoint that could not be written."""
    cause = str(error).strip().splitlines()
    free = "unknown"
    with suppress(OSError):
        free = f"{shutil.disk_usage(checkpoint.parent).free / 2**20:.0f} MiB"
    return (
        f"{checkpoint} could not be written: {cause[0] if cause else type(error).__name__} (free space: {free}). What "
        "was written of it is deleted, earlier checkpoints are as they were. Make room or set the permissions, then "
        "train(resume_from_checkpoint=True)."
    )
