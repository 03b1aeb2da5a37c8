"""The output folder of a run: resumed, refused, or replaced once the new run has started."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..evaluation.runner import processes
from ..files import UserError, typed
from ..hub.files import CONFIGS, TEMPLATES, TOKENIZER
from ..models import base_of
from ..provenance.facts import FACTS_FILE
from ..provenance.forget_hashes import HASHES_FILE
from ..report.page import ANALYSES, PAGE
from ..report.records import RECOVERY, RESULTS
from ..trainer.anchor_cache import FOLDER as ANCHORS
from ..trainer.rollouts import FOLDER as ROLLOUTS
from ..trainer.run_record import RUN_FILE
from . import AGAIN, task
from .checks import check_not_written, check_output_folder

ASIDE = ".replaced"  # in the output folder: what was there before, until the new run has started
MOVED = ".complete"  # in there, once all of it is
CONFIG = "config.yaml"
PICTURES = ("tradeoff.png", "losses.png", "frontier.png", "frontier.svg")
# Beside the models. Also analyses of the models before: the page would take them for those of the new ones
WRITTEN = (RESULTS, *PICTURES, PAGE, *ANALYSES, CONFIG)
TRAINED = "trainer_state.json"  # of a trained model, written last: a folder that has it holds a whole model
MODEL_PATTERNS = ("checkpoint-*", "model*.safetensors*", "adapter_*", f"{ANCHORS}*", ROLLOUTS, "*-rows.jsonl")
MODEL_FILES = (*CONFIGS, *TOKENIZER, TEMPLATES, TRAINED, "README.md", "training_args.bin")
RECORDS = (FACTS_FILE, HASHES_FILE, RUN_FILE, RECOVERY)
RESUME = f"{AGAIN} with --resume"


@dataclass
class RunArguments:
    """What is to happen to a run that was begun already."""

    resume: bool = field(default=False, kw_only=True, metadata={"help": "Finish what was begun in output_dir."})
    overwrite_output_dir: bool = field(
        default=False, kw_only=True, metadata={"help": "Replace what is in output_dir."}
    )


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


@contextmanager
def output_folder(
    folder: Path,
    models: Sequence[Path],
    inputs: Sequence[str | None],
    args: RunArguments,
    chosen: dict[str, Any],
    unchanging: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Iterator[None]:
    """Make the output folder ready: empty, or with what the same command began. The body is the run's start.

    Every process of a launch must call this.

    Args:
        folder: the output folder; it gets a `config.yaml` with what was chosen.
        models: what the run writes into it, beside `WRITTEN`.
        inputs: models and data that it reads.
        args: whether to resume or to overwrite.
        chosen: what must be the same for a run to be resumed, as far as `unchanging` leaves it.
        unchanging: what must be the same, of what was chosen.

    Raises:
        UserError: the folder is not empty, is of another command, or something would be deleted that is read.
    """
    state, written, now = processes(), folder / CONFIG, yaml.safe_load(yaml.safe_dump(chosen))
    if not state.is_main_process:
        state.wait_for_everyone()
        yield
        return
    resumes = args.resume and written.is_file()
    if resumes and unchanging(_read_config(written)) != unchanging(now):
        raise UserError(f"{written} is not of this command, so there is nothing to resume: give the same options.")
    paths = [*models, *(folder / name for name in WRITTEN)]
    with starting(folder, paths, _with_bases(inputs), resume=resumes, overwrite=args.overwrite_output_dir):
        written.write_text(yaml.safe_dump(chosen), encoding="utf-8")
        state.wait_for_everyone()
        yield


@contextmanager
def model_folder(
    folder: Path, inputs: Sequence[str | None], args: RunArguments, chosen: dict[str, Any]
) -> Iterator[None]:
    """Make ready the output folder of a run that saves its model in there, not in a folder of its own.

    Arguments and errors are those of `output_folder`. Nothing that is read may lie in the folder.
    """
    check_not_written(_with_bases(inputs), [folder])
    files = [folder / name for name in (*MODEL_FILES, *RECORDS)]
    with output_folder(
        folder, [*files, *(p for pattern in MODEL_PATTERNS for p in folder.glob(pattern))], inputs, args, chosen
    ):
        yield


def check_run(args: RunArguments, folder: str | Path) -> None:
    """Refuse an output folder that is none, and two contrary options."""
    check_output_folder(folder)
    if args.resume and args.overwrite_output_dir:
        raise UserError("--resume goes on with what is in --output_dir, --overwrite_output_dir replaces it: pass one.")


def _with_bases(inputs: Sequence[str | None]) -> list[str]:
    """What is read, and of adapters the bases, too."""
    given = [path for path in inputs if path is not None]
    with task("reading the adapter's config"):
        return [*given, *map(base_of, given)]


def _read_config(path: Path) -> dict[str, Any]:
    """What an earlier run wrote of its options."""
    try:
        return typed(dict[str, Any], yaml.safe_load(path.read_bytes()) or {})
    except (yaml.YAMLError, ValueError):
        raise UserError(f"{path} cannot be read, so there is nothing to resume. Delete it to start anew.") from None


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
