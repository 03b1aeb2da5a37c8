"""An exponential moving average of the weights in training, whose prediction is an anchor."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback

from ..files import UserError
from .checkpoints import CheckpointError
from .distributed import DistributedBackend
from .reference import Reference

IN_CHECKPOINT = "anchor_ema.safetensors"


class MovingAverage(Reference):
    """Predictions of the average of the weights so far, a <- decay a + (1 - decay) theta after each update.

    It begins as the model at the start, and is kept in the precision of the weights. A PEFT model keeps the average of
    what is trained, which takes the place of the live weights for a pass; any other model is copied.

    Args:
        model: the model at the start, not wrapped yet.
        distributed: as in `Reference`.
        decay: between 0 and 1.
        device: of the copy, as in `Reference`.

    Raises:
        UserError: weights that are not whole in each process, or a device for a copy that a PEFT model does without.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        distributed: DistributedBackend,
        decay: float,
        device: str | None = None,
    ):
        if distributed.shards:
            raise UserError(
                "anchor_source='ema' needs whole weights in every process, and FSDP2 and ZeRO-3 take them apart. Use "
                "DDP or ZeRO-2, or anchor_source='current' or 'initial'."
            )
        super().__init__(model, distributed, device=device)
        self.decay = decay
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if self.frozen is None:
            self.switches_off = False
            self.first_adapter = self.first_adapter or {name: p.detach().clone() for name, p in trained.items()}
            self.average = self.first_adapter
        else:
            self.average = {name: p.data for name, p in self.frozen.named_parameters() if name in trained}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the live weights."""
        live = dict(self.accelerator.unwrap_model(model).named_parameters())
        for name, mean in self.average.items():
            mean.lerp_(live[name].detach().to(mean.device, mean.dtype), 1 - self.decay)
        self.head = None  # it may lie on another device, as a copy

    def save(self, folder: str | Path) -> None:
        """Write the average into a checkpoint."""
        save_file({name: mean.cpu() for name, mean in self.average.items()}, Path(folder) / IN_CHECKPOINT)

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Go on with the average of a checkpoint.

        Raises:
            CheckpointError: it has none.
        """
        path = Path(folder) / IN_CHECKPOINT
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no {IN_CHECKPOINT}, the average that anchor_source='ema' goes on from. Resume from a "
                "checkpoint written with save_only_model=False, or start anew."
            )
        saved: dict[str, Tensor] = load_file(path)
        for name, mean in self.average.items():
            mean.copy_(saved[name])
        self.head = None


class UpdateAverage(TrainerCallback):
    """Updates the anchor's average after each update of the weights."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Also if the update was left out, as it would be again in a resumed run."""
        self.trainer.anchor.update(self.trainer.model)
