"""One run an output folder: a lock that a process holds while it trains, and loses when it dies."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from transformers.utils import logging

from ..files import UserError

logger = logging.get_logger(__name__)

LOCK = "_lock"  # nothing whose name starts with an underscore is pushed to the Hub
PATIENCE = 5.0  # seconds: the loaders of a killed run take a moment to notice


class FolderInUseError(UserError, RuntimeError):
    """Another run trains in the same output folder."""


@contextmanager
def sole_run(folder: str | Path) -> Iterator[None]:
    """Hold the lock of an output folder. The main process takes it for all processes of a run; the others wait.

    Raises:
        FolderInUseError: another run holds it.
    """
    lock = FileLock(Path(folder) / LOCK)
    problem: list[str | None] = [None]
    if PartialState().is_main_process:
        try:
            _take(lock, PATIENCE)
        except FolderInUseError as error:
            problem[0] = str(error)
    broadcast_object_list(problem)
    if problem[0]:
        raise FolderInUseError(problem[0])
    try:
        yield
    finally:
        lock.release()  # where it is held


def check_free(folder: str | Path) -> None:
    """Refuse a folder in which another process trains, without waiting for it.

    Raises:
        FolderInUseError: it holds the lock.
    """
    path = Path(folder) / LOCK
    if path.is_file() and _holder(path)[0] != os.getpid():
        lock = FileLock(path)
        _take(lock, 0)
        lock.release()


def _take(lock: FileLock, timeout: float) -> None:
    path = Path(lock.lock_file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=timeout)
    except Timeout:
        raise FolderInUseError(
            f"Another run is training in {path.parent}{_named(*_holder(path))}. Each would replace the other's "
            "checkpoints: choose another output_dir, or wait for its end, or end it."
        ) from None
    except OSError as error:  # some network file systems have no locks
        logger.warning(
            f"{path.parent} cannot be locked ({type(error).__name__}): take care that no other run trains in it."
        )
        return
    with suppress(OSError):  # Windows lets nobody write into a locked file
        path.write_text(f"{os.getpid()} {socket.gethostname()}\n", encoding="utf-8")


def _holder(path: Path) -> tuple[int | None, str]:
    """Process id and host of the last one that held a lock, as far as the file tells."""
    try:
        process, host = path.read_text(encoding="utf-8").split()
        return int(process), host
    except (OSError, ValueError):
        return None, ""


def _named(process: int | None, host: str) -> str:
    if process is None:
        return ""
    return f" (process {process}{'' if host == socket.gethostname() else f' on {host}'})"
