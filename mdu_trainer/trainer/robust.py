"""A trainer that ends in one of two ways: finished, or with a message and a whole checkpoint to go on from."""

import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, TrainOutput
from transformers.utils import logging

from ..files import UserError
from .checkpoints import (
    STATE,
    WRITING,
    CheckpointError,
    choose,
    clear_leftovers,
    complete_checkpoints,
    give_name,
    not_written,
    rotate,
    steps_of,
    write_manifest,
)
from .guard import RunGuard, check_weights
from .progress import TrainingProgress, replace_default
from .run_lock import sole_run
from .run_record import RUN_FILE, RunRecord
from .updates import TrainedTensors, check_trainable

logger = logging.get_logger(__name__)

OF_OPTIMIZERS = ("initial_lr", "lr", "betas", "eps", "weight_decay")  # what they are told, not what they found


class RobustTrainer(Trainer):
    """transformers' `Trainer` with whole checkpoints only, finite updates only, and an answer to signals.

    A checkpoint is written so that a kill at any moment leaves the one before usable. `save_total_limit` counts
    complete checkpoints: the one just written and the best one always stay, and what an earlier kill cut short goes
    first. What a subclass computes as the loss of a micro-batch, it shows to `guard.see`.
    """

    _doing = "training"  # what the progress bar says
    _made_optimizer = False  # by the trainer, not by the user
    _resumed_from: str | None = None  # the checkpoint that this call of `train` goes on from
    _publishes_by_list = False  # whether what is uploaded is chosen file by file
    _staging: Path | None = None  # where the checkpoint that is being written lies
    _written: Path | None = None  # the last one of this call of `train`, or the one that it went on from
    _run_record: RunRecord | None = None  # of this call of `train`
    _start_digest: str | None = None  # digest of the weights when `train` was first called
    _settings_changed = False  # whether the run goes on from a checkpoint with other settings

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._progress = TrainingProgress(self._doing)
        replace_default(self.callback_handler.callbacks, self._progress)
        self.guard = RunGuard(self.accelerator)
        self.add_callback(self.guard)

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, **kwargs: Any) -> TrainOutput:
        """As in `Trainer`, from whole checkpoints only, with finite updates only, and obeying signals.

        Args:
            resume_from_checkpoint: a checkpoint's path, or True for the newest in `args.output_dir` that is whole. If
                not given, `args.resume_from_checkpoint`.
            trial, **kwargs: as in `Trainer`.

        Raises:
            CheckpointError: the checkpoint to resume from is not whole, or of a run with other settings or data, or
                one could not be written.
            FolderInUseError: another run trains in `args.output_dir`.
            NonFiniteLossError: weights, or two updates in a row, are NaN or infinite.
            TrainingInterrupted: SIGTERM or SIGINT, after a checkpoint.
            UserError: the run would change nothing, or it did not.
        """
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        folder = Path(self._get_output_dir(trial))  # a trial of a search has one of its own
        with sole_run(folder):
            self._finish_current_push()  # of an earlier call
            if self.args.should_save:
                clear_leftovers(folder)
            self.accelerator.wait_for_everyone()
            self._resumed_from = checkpoint = choose(self.args.output_dir, resume_from_checkpoint)
            if self.model_init is None:  # or else the Trainer makes the model first
                self._begin()
            self._written = Path(checkpoint) if checkpoint else None
            with self._reporting_failure(), closing(self._progress), self.guard.listening():
                output = super().train(checkpoint, trial, **kwargs)
                self._check_changed()
        return output

    def _begin(self) -> None:
        """Look at the run and its weights before the first of them is changed."""
        check_trainable(self.model)
        self._check_run()
        self.guard.ended = self._open_record(self._resumed_from)
        check_weights(self.model, self.accelerator, "before training; no update was made")
        self._prepare_training()

    def _check_run(self) -> None:
        """Refuse a run that cannot end well."""

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        own_optimizer = self.optimizer is not None and not self._made_optimizer
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._made_optimizer = not own_optimizer
        self._trained = TrainedTensors(self.model, self.accelerator, None if own_optimizer else self.optimizer)
        return prepared

    def _check_changed(self) -> None:
        """Refuse to call a run a success that changed nothing. One that was resumed at its end had nothing to do."""
        updates = self.state.global_step - self._initial_global_step
        if updates:
            self._trained.check(updates)
        elif self.guard.ended or self.state.global_step >= self.state.max_steps:
            logger.warning(f"The run was finished at step {self.state.global_step}: no update was left to make.")
        else:
            raise UserError(
                "No update was made, so nothing has changed: a callback stopped it before the first one, or the data "
                "loader gave no batch."
            )

    def _prepare_training(self) -> None:
        """Do what needs the weights at the start."""

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As in `Trainer`, but nothing once training is to stop: a resumed run may have made all its updates."""
        if self.control.should_training_stop:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self._trained.see(grad_norm)
        if not self.guard.admits(model, grad_norm, self.state.global_step + 1):
            model.zero_grad()  # optimizers leave a weight without gradient alone, decay included
        return grad_norm

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        when = f"after step {self.state.global_step}; they are not saved, and the last checkpoint is intact"
        check_weights(model, self.accelerator, when, trained_only=True)
        folder = Path(self._get_output_dir(trial))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if checkpoint == self._written:  # a signal asks for what this step has saved already
            return
        if self.args.should_save:
            shutil.rmtree(folder / WRITING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self._staging = folder / WRITING
            super()._save_checkpoint(model, trial)
            self._staging = None
            if self._run_record is not None and not self._uploads_whole_checkpoints:
                replace(self._run_record, ended=self._why_ended()).save(folder / WRITING / checkpoint.name / RUN_FILE)
            self._complete(folder / WRITING / checkpoint.name, checkpoint)
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.args.should_save:
                shutil.rmtree(folder / WRITING, ignore_errors=True)
            raise CheckpointError(not_written(checkpoint, error)) from error
        finally:
            self._staging = None
        self._written = checkpoint
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # a checkpoint without its name is not whole yet
            super()._push_from_checkpoint(checkpoint_folder)

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
        return self.args.push_to_hub and whole and not self._publishes_by_list

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
        """Return why a callback ends training by the scores that it saw, as it would again."""
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
            self._run_record = self._current_record(stored.key if stored else None)
            if stored:
                answer = [stored.differences(self._run_record, steps_of(checkpoint)), stored.ended]
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

    def _current_record(self, key: str | None = None) -> RunRecord:
        """Return the record of this run, its data sets' digests under the key, or under a new one."""
        raise NotImplementedError

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
        """Say where training can go on, whatever ends it."""
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
