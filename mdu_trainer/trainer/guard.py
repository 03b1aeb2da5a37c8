"""Finite updates only, and a checkpoint on a signal.

On SIGTERM or SIGINT the step in hand is finished, a checkpoint is written, and `train` raises `TrainingInterrupted`: a
script that does not catch it ends with status 143 or 130. The same signal again acts at once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from ..files import UserError

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
