"""Publishing from a trainer: its card, its pushes, and those of its checkpoints while it trains.

The files are those of `mdu_trainer.hub.push`, without state of optimizer, scheduler or random numbers. So the
strategies "checkpoint" and "all_checkpoints" publish the weights of checkpoints in folders of their own, from which a
run cannot be resumed: resume from `output_dir`.
"""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from ..report.model_card import CardDetails, write_model_card
from ..report.records import RecoveryLike, ResultsLike
from ..trainer.checkpoints import SNAPSHOT
from ..trainer.run_lock import FolderInUseError, check_free
from ..trainer.run_record import RUN_FILE
from .push import Destination, hub_api, prepare_push, read_checkpoint

logger = logging.get_logger(__name__)


def is_private(trainer: Trainer, private: bool | None = None) -> bool:
    """Whether a new repository is private: unless `private`, or else `args.hub_private_repo`, says otherwise."""
    private = trainer.args.hub_private_repo if private is None else private
    return private is None or private


def push(
    trainer: Trainer,
    commit_message: str | None = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    results: ResultsLike = None,
    recovery: RecoveryLike = None,
    leak_scan: bool = True,
    **details: Any,
) -> CommitInfo | Future | None:
    """Save a trainer's model in `args.output_dir` and publish it.

    Args:
        trainer: a `MDUTrainer`.
        commit_message, blocking, token, revision: as in `Trainer.push_to_hub`.
        private: whether a new repository is private; by default `args.hub_private_repo`, or True.
        tokenizer, results, recovery, leak_scan, **details: as in `mdu_trainer.push_unlearned_model`, as are errors.

    Returns:
        What was committed, or a `Future` of it if not `blocking`; None on processes other than the first.
    """
    args, said = trainer.args, CardDetails.of(**details)
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    token = token or args.hub_token
    if trainer.hub_model_id is None:
        trainer.init_hf_repo(token=token, private=private)
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    trainer._finish_current_push()
    _remove_snapshots(Path(args.output_dir))
    destination = Destination(
        trainer.hub_model_id,
        is_private(trainer, private),
        revision or args.hub_revision,
        token=token,
        commit_message=commit_message,
    )
    checkpoint = read_checkpoint(args.output_dir, results, recovery, leak_scan)
    commit = prepare_push(checkpoint, destination, said, tokenizer=tokenizer)
    return commit() if blocking else hub_api().run_as_future(commit)


def write_card(trainer: Trainer, **details: Any) -> None:
    """Write the card of a trainer's model into `args.output_dir`. The details are as in `write_model_card`."""
    if trainer.is_world_process_zero():
        facts = trainer.provenance.facts(trainer._run())
        write_model_card(trainer.args.output_dir, facts, repo_id=trainer.hub_model_id, **details)


def push_checkpoint(trainer: Trainer, checkpoint_folder: str) -> None:
    """Publish a checkpoint while training goes on, as `args.hub_strategy` says."""
    args = trainer.args
    strategy, running = args.hub_strategy, trainer.push_in_progress
    if not trainer.is_world_process_zero() or strategy == HubStrategy.END:
        return
    if not args.hub_always_push and running is not None and not running.is_done():
        return
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    names = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name}
    snapshot = Path(args.output_dir) / f".push-{Path(checkpoint_folder).name}"
    try:
        _link_tree(checkpoint_folder, snapshot)
        destination = Destination(
            trainer.hub_model_id,
            is_private(trainer),
            args.hub_revision,
            token=args.hub_token,
            commit_message=f"Training in progress, step {trainer.state.global_step}",
            copy_to=names.get(strategy),
        )
        # scores of the end, if there are any, are not this checkpoint's
        commit = prepare_push(read_checkpoint(snapshot, results=False, recovery=False), destination)
    except Exception as error:
        _report(error, snapshot)
        return
    job = hub_api().run_as_future(_reporting, commit, snapshot)
    if running is None or running.is_done():
        trainer.push_in_progress = PushInProgress([job])
    else:
        running.jobs.append(job)


def _remove_snapshots(folder: Path) -> None:
    """Delete what a kill left of pushes; not while another run may be sending it."""
    with suppress(FolderInUseError):
        check_free(folder)
        for snapshot in folder.glob(f"{SNAPSHOT}*"):
            shutil.rmtree(snapshot, ignore_errors=True)


def _link_tree(source: str, target: Path) -> None:
    """Give the checkpoint's files a second name, so that the Trainer may delete it while it is being sent."""
    shutil.rmtree(target, ignore_errors=True)

    def link(file: str, other: str) -> None:
        try:
            os.link(file, other)
        except OSError:  # a file system without links
            shutil.copy(file, other)

    shutil.copytree(
        source, target, copy_function=link, ignore=shutil.ignore_patterns("*.pt", "*.pth", "*.bin", RUN_FILE)
    )


def _reporting(commit: Callable[[], CommitInfo], snapshot: Path) -> CommitInfo | None:
    try:
        info = commit()
    except Exception as error:
        _report(error, snapshot)
        return None
    shutil.rmtree(snapshot, ignore_errors=True)
    return info


def _report(error: Exception, snapshot: Path) -> None:
    """Log a failed push: while training goes on it costs the push, not the training."""
    shutil.rmtree(snapshot, ignore_errors=True)
    logger.error(f"The checkpoint was saved but not pushed. {type(error).__name__}: {error}")
