"""The trainer's side of publishing: what it keeps in checkpoints, and pushes that go through `mdu_trainer.hub.push`."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from ..trainer.checkpoints import SNAPSHOT
from ..trainer.run_lock import FolderInUseError, check_free
from ..trainer.run_record import RUN_FILE

logger = logging.get_logger(__name__)


class PublishingMixin:
    """`push_to_hub`, `create_model_card` and every `hub_strategy` of a trainer that unlearns.

    What is uploaded is the list of `mdu_trainer.hub.push`: weights, config, tokenizer, card and figures. It has no state of
    optimizer, scheduler or random numbers, so the strategies "checkpoint" and "all_checkpoints" publish the weights of
    checkpoints in folders of their own, from which a run cannot be resumed: resume from `output_dir`.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.provenance.save(self, output_dir or self.args.output_dir)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, private unless `private` or `args.hub_private_repo` says otherwise."""
        super().init_hf_repo(token, self._private(private))

    def _private(self, private: bool | None = None) -> bool:
        private = self.args.hub_private_repo if private is None else private
        return private is None or private

    def create_model_card(self, **details: Any) -> None:
        """Write `README.md`, and the picture that it shows, into `args.output_dir`.

        Args:
            **details: what the run does not know: `language`, `license`, `tags`, `base_model`, `datasets`,
                `description`, `results` and `recovery` (by default the folder's `results.json` and `recovery.json`);
                see `mdu_trainer.report.model_card.unlearned_model_card`.
        """
        from ..report.model_card import write_model_card

        if self.is_world_process_zero():
            facts = self.provenance.facts(self)
            write_model_card(self.args.output_dir, facts, repo_id=self.hub_model_id, **details)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **details: Any,
    ) -> CommitInfo | Future | None:
        """Save the model in `args.output_dir` and publish it as `mdu_trainer.push_unlearned_model` does.

        Args:
            commit_message, blocking, token, revision: as in `Trainer`.
            private: whether a new repository is private; by default `args.hub_private_repo`, or True.
            **details: for the card, as in `create_model_card`; `leak_scan=False` publishes without the scan for rows
                to forget, and says so in the log.

        Returns:
            What was committed, or a `Future` of it if not `blocking`; None on processes other than the first.

        Raises:
            LeakError: a file quotes a row to forget. Nothing was sent.
            PushError: the Hub could not be reached or refused.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        self._remove_snapshots()
        commit = self._prepare_push(
            self.args.output_dir,
            commit_message=commit_message,
            token=token,
            revision=revision or self.args.hub_revision,
            private=self._private(private),
            **details,
        )
        return commit() if blocking else _hub_api().run_as_future(commit)

    def _remove_snapshots(self) -> None:
        """Delete what a kill left of pushes; not while another run may be sending it."""
        folder = Path(self.args.output_dir)
        with suppress(FolderInUseError):
            check_free(folder)
            for snapshot in folder.glob(f"{SNAPSHOT}*"):
                shutil.rmtree(snapshot, ignore_errors=True)

    def _prepare_push(self, folder: str | Path, **options: Any) -> Callable[[], CommitInfo]:
        from .push import prepare_push

        return prepare_push(folder, self.hub_model_id, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        names = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name}
        snapshot = Path(self.args.output_dir) / f".push-{Path(checkpoint_folder).name}"
        try:
            _link_tree(checkpoint_folder, snapshot)
            commit = self._prepare_push(
                snapshot,
                commit_message=f"Training in progress, step {self.state.global_step}",
                token=self.args.hub_token,
                revision=self.args.hub_revision,
                private=self._private(),
                copy_to=names.get(strategy),
                results=False,  # figures of the end, if there are any, are not this checkpoint's
                recovery=False,
            )
        except Exception as error:
            _report(error, snapshot)
            return
        job = _hub_api().run_as_future(_reporting, commit, snapshot)
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress = PushInProgress([job])
        else:
            self.push_in_progress.jobs.append(job)


def _hub_api() -> Any:
    from .push import hub_api

    return hub_api()


def _link_tree(source: str, target: Path) -> None:
    """The checkpoint's files under a second name, so that the Trainer may delete it while it is being sent."""
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
    """A push that fails while training goes on costs the push, not the training."""
    shutil.rmtree(snapshot, ignore_errors=True)
    logger.error(f"The checkpoint was saved but not pushed. {type(error).__name__}: {error}")
