"""The output folder of a run, which replaces what an earlier one left only once it has started."""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..files import UserError
from .checks import check_not_written

ASIDE = ".replaced"  # in the output folder: what was there before, until the new run has started
MOVED = ".complete"  # in there, once all of it is


@contextmanager
def starting(
    folder: Path, written: Sequence[Path], inputs: Iterable[str | None], *, resume: bool, overwrite: bool
) -> Iterator[None]:
    """Make an output folder ready for a run, whose start is the body.

    Everything is checked first. What was there is moved aside and comes back if the start fails; it is deleted when
    the start is over. An interruption leaves both, so that the run can be resumed.

    Args:
        folder, inputs: the output folder, and what the run reads: Hub ids, folders and files.
        written: files and folders in it that the run makes; nothing else is touched.
        resume, overwrite: go on with what is there, or replace it.

    Raises:
        UserError: the folder is not empty, with neither; or something would be deleted that is read.
    """
    aside, is_new = folder / ASIDE, not folder.exists()
    if not resume:
        _check(folder, aside, overwrite)
        check_not_written(inputs, [*written, aside])
        _move_aside(folder, aside, written)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except Exception:
        if not resume:
            _delete(written)
            _put_back(written, aside, folder)
            _delete([aside])
        if is_new:
            with suppress(OSError):  # somebody else may have put something there
                folder.rmdir()
        raise
    _delete([aside])


def _check(folder: Path, aside: Path, overwrite: bool) -> None:
    files = folder.iterdir() if folder.is_dir() else ()
    if overwrite or not (aside.exists() or any(path.name[0] not in "._" for path in files)):  # as a lock's is
        return
    before = f" What an interrupted start was to replace lies in {aside}." if aside.exists() else ""
    raise UserError(
        f"{folder} is not empty. Choose another --output_dir, or pass --resume to finish what was begun there, or "
        f"--overwrite_output_dir.{before}"
    )


def _move_aside(folder: Path, aside: Path, written: Sequence[Path]) -> None:
    if (aside / MOVED).exists():  # by a start that was interrupted: what is in its place is no result
        _delete(written)
        return
    try:
        for path in written:
            _rename(path, aside / path.relative_to(folder))
        if aside.exists():
            (aside / MOVED).touch()
    except OSError:
        _put_back(written, aside, folder)
        raise


def _put_back(written: Sequence[Path], aside: Path, folder: Path) -> None:
    for path in written:
        _rename(aside / path.relative_to(folder), path)


def _rename(path: Path, new: Path) -> None:
    if os.path.lexists(path):
        new.parent.mkdir(parents=True, exist_ok=True)
        path.rename(new)


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
