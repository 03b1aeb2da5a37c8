"""What keeps a run from spoiling its weights, and lets it end well: finite updates only, and a checkpoint on a signal.

On SIGTERM or SIGINT the step in hand is finished, a checkpoint is written, and `train` raises `TrainingInterrupted`: a
script that does not catch it ends with status 143 or 130. The same signal again acts at once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy, TrainOutput
from transformers.utils import logging

from .checkpoints import CheckpointMixin, choose, clear_leftovers
from .files import UserError
from .run_lock import holding_lock
from .updates import TrainedTensors, check_trainable

logger = logging.get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class NonFiniteLossError(UserError, FloatingPointError):
    """Losses, gradients or weights are NaN or infinite. Training stopped before the update; checkpoints are intact."""


class TrainingInterrupted(SystemExit):
    """A signal stopped training, after a checkpoint. Uncaught, it ends the process with status 128 + signal.

    Attributes:
        signal: which one.
        step: the last one that was trained, and saved.
    """

    def __init__(self, signum: int, step: int):
        super().__init__(128 + signum)
        self.signal, self.step = signal.Signals(signum), step


class SafeTrainingMixin(CheckpointMixin):
    """A trainer's loop that ends in one of two ways: finished, or with a message and a checkpoint to go on from.

    What a subclass computes as the loss of a micro-batch, it shows to `guard.see`.
    """

    _made_optimizer = False  # by the trainer, not by the user
    _resumed_from: str | None = None  # the checkpoint that this call of `train` goes on from

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.guard = RunGuard(self.accelerator)
        self.add_callback(self.guard)

    @holding_lock
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
        self._finish_current_push()  # of an earlier call
        if self.args.should_save:
            clear_leftovers(Path(self._get_output_dir(trial)))
        self.accelerator.wait_for_everyone()
        self._resumed_from = checkpoint = choose(self.args.output_dir, resume_from_checkpoint)
        if self.model_init is None:  # or else the Trainer makes the model first
            self._begin()
        self._written = Path(checkpoint) if checkpoint else None
        with self._reporting_failure(), self.guard.listening():
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
        """What is to be done while the weights are those at the start."""

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        when = f"after step {self.state.global_step}; they are not saved, and the last checkpoint is intact"
        check_weights(model, self.accelerator, when, trained_only=True)
        super()._save_checkpoint(model, trial)

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


class RunGuard(TrainerCallback):
    """Skips the first update that is not finite, stops at a second in a row, and stops with a checkpoint on a signal.

    All processes decide alike: what one saw, a loss or a signal, is summed over all of them once an update.

    Args:
        accelerator: of the trainer.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._bad_losses = torch.zeros((), device=accelerator.device)
        self.ended: str | None = None  # why the run that goes on had ended already
        self._skipped = False  # the update before
        self._received: int | None = None  # by this process
        self._stopping: int | None = None  # by any, as all of them know

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop before the first update where a resumed run has made all of them, or had been ended by a callback."""
        if state.global_step >= state.max_steps:
            logger.warning(f"All {state.max_steps} updates are made already; none is added.")
            control.should_training_stop = True
        elif self.ended:
            logger.warning(
                f"Training had ended after step {state.global_step}: {self.ended}. No update is added; force_resume "
                "trains on."
            )
            control.should_training_stop = True

    # Updates

    def see(self, loss: Tensor) -> None:
        """Remember whether the loss of a micro-batch is finite. Nothing is copied from the device."""
        self._bad_losses += ~torch.isfinite(loss.detach())

    def admits(self, model: nn.Module, gradient_norm: Tensor | float | None, step: int) -> bool:
        """Whether the update of this step may be made.

        Raises:
            NonFiniteLossError: not this one, and not the one before; or the weights are not finite.
        """
        bad = self._agree(gradient_norm)
        self._bad_losses.zero_()
        if not bad:
            self._skipped = False
            return True
        check_weights(model, self.accelerator, f"at step {step}; training stopped before the update")
        cannot_skip = self.accelerator.distributed_type == DistributedType.DEEPSPEED  # which has updated already
        if self._skipped or cannot_skip:
            since = f"at step {step}" if cannot_skip else f"at step {step - 1} and again at step {step}"
            raise NonFiniteLossError(
                f"The loss or its gradient is NaN or infinite {since}; training stopped before the update. The last "
                "checkpoint is intact. Lower the learning rate, clip gradients (max_grad_norm), or unlearn for fewer "
                "steps."
            )
        logger.warning(f"The loss or its gradient is NaN or infinite at step {step}: the update is skipped.")
        self._skipped = True
        return False

    def _agree(self, gradient_norm: Tensor | float | None) -> bool:
        """Whether any process saw something that is not finite; learns of signals on the same trip."""
        seen = torch.stack([self._bad_losses, *(self._bad_losses.new_tensor(self._received == s) for s in SIGNALS)])
        scaled = getattr(self.accelerator, "scaler", None) is not None  # float16 overflows until its scale is found
        if gradient_norm is not None and not scaled:
            norm = torch.as_tensor(gradient_norm, device=seen.device)
            seen[0] += ~torch.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        bad, *signals = self.accelerator.reduce(seen, "sum").tolist()
        self._stopping = next((s for s, count in zip(SIGNALS, signals, strict=True) if count), None)
        return bad > 0

    # Signals

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the first of each signal. Outside the main thread Python allows no handlers, and none is set."""
        self._received = self._stopping = None
        self._skipped = False
        self._bad_losses.zero_()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {signum: signal.getsignal(signum) or signal.SIG_DFL for signum in SIGNALS}

        def receive(signum: int, frame: Any) -> None:
            self._received = signum
            signal.signal(signum, before[signum])

        for signum in SIGNALS:
            signal.signal(signum, receive)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
        if self._received is not None:  # after the last step: nothing is left to save, so it acts as it would have
            signal.raise_signal(self._received)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save, and stop; where an epoch ends here, once its own evaluation is done."""
        if self._stopping is None:
            return
        name = signal.Signals(self._stopping).name
        logger.warning(f"{name}: training stops after step {state.global_step} with a checkpoint.")
        control.should_training_stop = True
        control.should_save = not _epoch_ends(state)
        if args.save_strategy == SaveStrategy.BEST:  # an evaluation would decide whether to save
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """An epoch that a signal broke off has not ended: nothing is due."""
        if self._stopping is None:
            return
        control.should_save = _epoch_ends(state)
        if not control.should_save or args.save_strategy == SaveStrategy.BEST:
            control.should_evaluate = control.should_log = False

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End a run that a signal stopped, before it is wound up as a finished one: no checkpoint is cleared away."""
        if self._stopping is not None:
            raise TrainingInterrupted(self._stopping, state.global_step)


def check_weights(model: nn.Module, accelerator: Accelerator, when: str, trained_only: bool = False) -> None:
    """Refuse weights that are NaN or infinite, on all processes if one holds some.

    Args:
        model: whose parameters are looked at.
        accelerator: of the trainer.
        when: how the message goes on after "... is not finite".
        trained_only: leave out those that are not trained, and so cannot have changed.

    Raises:
        NonFiniteLossError: naming the first of them.
    """
    names = [
        name
        for name, p in model.named_parameters()
        if (p.requires_grad or not trained_only) and p.is_floating_point() and not _all_finite(p.detach())
    ]
    total = accelerator.reduce(torch.tensor(float(len(names)), device=accelerator.device), "sum")
    if total:
        first = names[0] if names else "a weight held by another process"
        more = f" and {len(names) - 1} other tensors hold" if len(names) > 1 else " holds"
        raise NonFiniteLossError(f"{first}{more} NaN or infinite values {when}.")


def _all_finite(tensor: Tensor) -> bool:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a shard of FSDP
    return bool(torch.isfinite(local).all())


def _epoch_ends(state: TrainerState) -> bool:
    return float(state.epoch).is_integer()
