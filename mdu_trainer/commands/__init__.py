"""The base of all commands: whatever a user can mend ends in one line on stderr and status 2, not in a traceback."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from ..files import UserError
from .help import HelpFormatter, description_of, program
from .quiet import silence, tidy_bars

TRACEBACK = "--traceback"
STATUS = 2  # as argparse ends for wrong options
FAULT = 1
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
STOPPED = (INTERRUPTED, 143)  # how a training ends that a signal stopped, after a checkpoint
LONGEST_MESSAGE = 800  # characters; libraries answer a wrong name with a page
AGAIN = "To go on from what is finished, give the same command again"
LIBRARIES = (
    *("accelerate", "bitsandbytes", "huggingface_hub", "lm_eval", "peft", "safetensors", "tokenizers", "torch"),
    *("transformers", "trl"),
)

silence()


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser that answers a wrong option in one line, as `run` answers other mistakes.

    Options are written with underscores, as transformers has them, and taken with dashes, too.

    Args:
        description: what `--help` says; it is shown as it is.
    """

    def __init__(self, description: str | None = None):
        super().__init__(
            prog=program(),
            description=description_of(description),
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )

    def parse_known_args(self, args=None, namespace=None):  # noqa: D102  as argparse has it
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([_underscored(word) for word in words], namespace)

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        _say(f"error: {message} (--help lists the options)", self.prog)
        raise SystemExit(STATUS)


def run(main: Callable[[], int | None], *, again: str = AGAIN) -> int:
    """Run a command, and turn what a user can mend into one line and a status.

    `--traceback`, taken off the command line here, shows the rest. Of several processes the main one speaks; a process
    that runs out of memory or meets a fault of ours speaks for itself.

    Args:
        main: the command; it reads `sys.argv`. What it returns is the exit status.
        again: how to go on after an interruption, a sentence without its end.

    Returns:
        The exit status: 2 for a mistake that `explain` explains, 130 after an interruption, 1 for a fault of ours,
        whose message is shown with `--traceback` only, for it may quote data.
    """
    tidy_bars()
    show = TRACEBACK in sys.argv[1:]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != TRACEBACK]
    try:
        return main() or 0
    except KeyboardInterrupt:
        _say(f"interrupted. {again}.")
        return INTERRUPTED
    except SystemExit as end:
        if end.code in STOPPED:
            _say(f"stopped. {again}.")
        raise
    except Exception as error:
        if show:
            traceback.print_exc()
        words = explain(error)
        if words is not None:
            _say(f"error: {words}" + ("" if show else f" ({TRACEBACK} shows where)"), all_processes=_no_memory(error))
            return STATUS
        if not show:
            traceback.print_tb(error.__traceback__)
        _say(
            f"{type(error).__name__}: a fault of the program, not yours. Its message may quote data; "
            f"{TRACEBACK} shows it.",
            all_processes=True,
        )
        return FAULT


@contextmanager
def task(words: str) -> Iterator[None]:
    """Say what was being done when a library refuses what a user has given.

    Args:
        words: for messages, e.g. "loading outputs/base". What the library says is shown, so nothing that reads rows
            may run inside.
    """
    try:
        yield
    except Exception as error:
        if not hasattr(error, "task"):
            error.task = words
        raise


def explain(error: BaseException) -> str | None:
    """Return one line for the user on an error that he can mend; None for a fault of ours.

    He can mend a `UserError`, a file or repository that cannot be read or written, a missing package, no memory,
    modules that PEFT does not find, and whatever a library refuses within a `task`.
    """
    text, doing = " ".join(str(error).split()), getattr(error, "task", None)
    if _no_memory(error):
        text = f"out of memory{f' while {doing}' if doing else ''}. Take smaller batches, shorter rows, or a lower "
        return text + "--dtype."
    if isinstance(error, UserError | ImportError):
        return text
    library = _library(error)
    refused = library and (doing or (library == "peft" and isinstance(error, ValueError)))
    if not isinstance(error, OSError) and not refused:
        return None
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    text = text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"
    text = text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + " ..."
    return f"{doing}: {text}" if doing else text


def _no_memory(error: BaseException) -> bool:
    """Whether the memory of the host, or of a device as torch says it, was not enough."""
    signs = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)
    )


def _library(error: BaseException) -> str | None:
    """Return the library whose code raised an error, if it is one that reads what users give."""
    place, package = error.__traceback__, ""
    while place is not None:
        name = (place.tb_frame.f_globals.get("__name__") or "").partition(".")[0]
        package = package if name in sys.stdlib_module_names else name  # a library may call json, and json raise
        place = place.tb_next
    raised_by = [package, type(error).__module__.partition(".")[0]]  # compiled code has no frame
    return next((name for name in raised_by if name in LIBRARIES), None)


def _say(words: str, name: str | None = None, *, all_processes: bool = False) -> None:
    """Print one line on stderr, from the main process alone or from each."""
    rank = int(os.environ.get("RANK", 0))
    if rank == 0 or all_processes:
        number = f" (process {rank})" if rank else ""
        print(f"{name or program()}{number}: {words}", file=sys.stderr, flush=True)


def _underscored(word: str) -> str:
    """`--max-leak=0.1` as `--max_leak=0.1`."""
    name, sign, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{sign}{value}" if name.startswith("--") else word
