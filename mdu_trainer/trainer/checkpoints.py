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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, TrainOutput
from transformers.utils import logging

from ..files import UserError
from .run_lock import check_free
from .run_record import RUN_FILE, RunRecord, start_digest

logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
WRITING = "_writing"  # nothing whose name starts with an underscore is pushed to the Hub
REMOVED = "_removed-"  # a checkpoint's name while it is being deleted
SNAPSHOT = ".push-checkpoint-"  # its files' second name while they are being sent
SCHEMA = 1
STATE = "trainer_state.json"
OF_OPTIMIZERS = ("initial_lr", "lr", "betas", "eps", "weight_decay")  # what they are told, not what they found


class CheckpointError(UserError, RuntimeError):
    """A checkpoint could not be written, or the one to resume from is not whole, or of another run."""


class CheckpointMixin:
    """A trainer's checkpoints, written so that a kill at any moment leaves the one before usable.

    `save_total_limit` counts complete checkpoints: the one just written and the best one always stay, and what an
    earlier kill cut short goes first.
    """

    _staging: Path | None = None  # where the checkpoint that is being written lies
    _written: Path | None = None  # the last one of this call of `train`, or the one that it went on from
    _run_record: RunRecord | None = None  # of this call of `train`
    _start_digest: str | None = None  # digest of the weights when `train` was first called
    _settings_changed = False  # whether the run goes on from a checkpoint with other settings

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        folder = Path(self._get_output_dir(trial))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if checkpoint == self._written:  # a signal asks for what this step has saved already
            return
        if self.args.should_save:
            shutil.rmtree(folder / WRITING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            with self._writing_into(folder / WRITING):
                super()._save_checkpoint(model, trial)
            if self._run_record is not None and not self._uploads_whole_checkpoints:
                replace(self._run_record, ended=self._why_ended()).save(folder / WRITING / checkpoint.name / RUN_FILE)
            self._complete(folder / WRITING / checkpoint.name, checkpoint)
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.args.should_save:
                shutil.rmtree(folder / WRITING, ignore_errors=True)
            raise CheckpointError(_not_written(checkpoint, error)) from error
        self._written = checkpoint
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    @contextmanager
    def _writing_into(self, staging: Path) -> Iterator[None]:
        """What the Trainer writes goes there, and is not pushed from there."""
        self._staging, self._push_from_checkpoint = staging, lambda checkpoint: None
        try:
            yield
        finally:
            self._staging = None
            del self._push_from_checkpoint

    def _complete(self, staged: Path, checkpoint: Path) -> None:
        """Seal a checkpoint that every process has written its part of, and give it its name."""
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(checkpoint)
            if self.args.should_save:
                self.state.save_to_json(str(staged / STATE))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(staged)
            give_name(staged, checkpoint)
            staged.parent.rmdir()
            rotate(checkpoint.parent, self.args.save_total_limit, {checkpoint.name, self._best_name})
        self.accelerator.wait_for_everyone()

    @property
    def _best_name(self) -> str:
        return Path(self.state.best_model_checkpoint or "").name

    @property
    def _uploads_whole_checkpoints(self) -> bool:
        """Whether the Trainer sends checkpoints as they are: then what describes the data is not put into them."""
        whole = self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
        return self.args.push_to_hub and whole and type(self)._push_from_checkpoint is Trainer._push_from_checkpoint

    def _load_best_model(self) -> None:
        choose(self.args.output_dir, self.state.best_model_checkpoint)
        super()._load_best_model()
        self._keep_only_the_best()

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> TrainOutput:
        folder = Path(self._get_output_dir(trial))
        if self.args.should_save and self._written and self._written.parent.resolve() == folder.resolve():
            # a kill may have come between the last checkpoint's name and the deletion of others
            rotate(folder, self.args.save_total_limit, {self._written.name, self._best_name})
        if not self.args.load_best_model_at_end:
            self._keep_only_the_best()
        return super()._finalize_training(trial, *args, **kwargs)

    def _keep_only_the_best(self) -> None:
        """At a limit of one the Trainer ends by deleting the last checkpoint, file by file. Here it goes at once."""
        if self.args.should_save and self.args.save_total_limit == 1 and self._best_name:
            rotate(Path(self.state.best_model_checkpoint).parent, 1, {self._best_name})

    # Going on from a checkpoint

    def _why_ended(self) -> str | None:
        """Why a callback ends training by the figures that it saw, as it would again."""
        reasons = (getattr(callback, "stopped_because", None) for callback in self.callback_handler.callbacks)
        return next(filter(None, reasons), None) if self.control.should_training_stop else None

    def _open_record(self, checkpoint: str | None) -> str | None:
        """Note what this run is made of. All processes learn whether it may go on from the checkpoint.

        Returns:
            Why the checkpoint's run had ended with it, None if it goes on.

        Raises:
            CheckpointError: the checkpoint is of a run with other settings or data.
        """
        answer: list[Any] = [[], None]
        if PartialState().is_main_process:
            stored = RunRecord.of_checkpoint(checkpoint) if checkpoint else None
            self._start_digest = self._start_digest or start_digest(self)
            self._run_record = RunRecord.of(self, self._start_digest, stored.key if stored else None)
            if stored:
                answer = [stored.differences(self._run_record, _steps(checkpoint)), stored.ended]
            elif checkpoint:
                logger.warning(f"{checkpoint} does not say how it was trained: its settings could not be compared.")
        found, ended = broadcast_object_list(answer)
        self._settings_changed = bool(found)
        differences = f"{checkpoint} is of a run with other settings: {'; '.join(found)}."
        if found and not self.args.force_resume:
            raise CheckpointError(
                f"{differences} Set them as they were, or train without resume_from_checkpoint to start anew, or pass "
                "force_resume to go on with the new ones."
            )
        if found:
            logger.warning(f"{differences} force_resume: it goes on with the new ones.")
        return None if self.args.force_resume else ended

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in `Trainer`, which takes learning rate and decay from the checkpoint; forced, from the new settings."""
        fresh = [{k: v for k, v in group.items() if k in OF_OPTIMIZERS} for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self._settings_changed or self.is_deepspeed_enabled:
            return
        scheduler = self.lr_scheduler
        if not isinstance(scheduler, LambdaLR):
            logger.warning(f"A {type(scheduler).__name__} goes on with the learning rate of the checkpoint.")
        for group, new in zip(self.optimizer.param_groups, fresh, strict=True):
            group.update(new if isinstance(scheduler, LambdaLR) else {k: v for k, v in new.items() if "lr" not in k})
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
            for group, factor in zip(self.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    @contextmanager
    def _reporting_failure(self) -> Iterator[None]:
        """Whatever ends training, say where it can go on."""
        try:
            yield
        except BaseException as error:
            found = complete_checkpoints(Path(self.args.output_dir))
            advice = (
                f"The last complete checkpoint is {found[-1]}; train(resume_from_checkpoint=True) goes on from there."
                if found
                else f"There is no complete checkpoint in {self.args.output_dir}."
            )
            logger.error(f"{type(error).__name__} after step {self.state.global_step} ended training. {advice}")
            raise


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
    files = {str(path.relative_to(folder)): _entry(path, sync=True) for path in _files(folder)}
    temporary = folder / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps({"schema": SCHEMA, "files": files}, indent=2) + "\n")
    _sync(temporary)
    os.replace(temporary, folder / MANIFEST)
    _sync(folder)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if every file is as it was written."""
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


def _steps(checkpoint: str | Path) -> int:
    """The updates that a checkpoint was trained for."""
    return json.loads((Path(checkpoint) / STATE).read_text())["global_step"]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


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


def _not_written(checkpoint: Path, error: BaseException) -> str:
    cause = str(error).strip().splitlines()
    free = "unknown"
    with suppress(OSError):
        free = f"{shutil.disk_usage(checkpoint.parent).free / 2**20:.0f} MiB"
    return (
        f"{checkpoint} could not be written: {cause[0] if cause else type(error).__name__} (free space: {free}). What "
        "was written of it is deleted, earlier checkpoints are as they were. Make room or set the permissions, then "
        "train(resume_from_checkpoint=True)."
    )
