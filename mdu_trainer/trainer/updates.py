"""A check that a run changed what it trained. One that did not is an error, however smoothly it went."""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers.utils import logging

from ..files import UserError

logger = logging.get_logger(__name__)

CHUNK = 1 << 20  # values that are looked at at a time
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def check_trainable(model: nn.Module) -> None:
    """Refuse a model of which nothing is trained.

    Raises:
        UserError: saying how tensors are made trainable.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(
            "No tensor of the model is trainable, so training would change nothing. Load an adapter with "
            "PeftModel.from_pretrained(..., is_trainable=True), pass a peft_config, or call requires_grad_(True) on "
            "what is to be trained."
        )


class TrainedTensors:
    """The tensors that a run trains, and their fingerprints at its start.

    Two integers a tensor are kept, no copy. Every process looks at the shards that it holds; all decide alike.

    Args:
        model: with the weights that the run starts from, spread over the processes as they are going to be.
        accelerator: of the trainer.
        optimizer: whose parameters are compared with the trainable ones; None if it was made by the user, who may
            train some of them only.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, optimizer: torch.optim.Optimizer | None):
        self.model, self.accelerator, self.optimizer = model, accelerator, optimizer
        self._before = {name: fingerprint(p) for name, p in model.named_parameters() if p.requires_grad}
        self._saw_gradient = torch.zeros((), dtype=torch.bool, device=accelerator.device)
        self._checked = False

    def see(self, gradient_norm: Tensor | float | None) -> None:
        """Look at an update that is about to be made. Nothing is copied from the device."""
        if gradient_norm is None:  # unknown
            self._saw_gradient |= True
        else:
            norm = torch.as_tensor(gradient_norm, device=self._saw_gradient.device)
            self._saw_gradient |= (norm.full_tensor() if hasattr(norm, "full_tensor") else norm) != 0
        if not self._checked:
            self.check_optimizer()

    def check_optimizer(self) -> None:
        """Refuse tensors that became trainable after the optimiser was made: it never updates them.

        Raises:
            UserError: naming the first of them.
        """
        self._checked = True
        if self.optimizer is None or self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return  # DeepSpeed's optimiser has tensors of its own
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        names = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in known]
        late = [name for name in names if name not in self._before]
        if late:
            more = f" and {len(late) - 1} other tensors" if len(late) > 1 else ""
            raise UserError(
                f"{late[0]}{more} became trainable after the optimiser was made, which would never update them. Make "
                "tensors trainable before train() is called."
            )

    def check(self, updates: int) -> None:
        """Refuse a run that changed nothing.

        Args:
            updates: how many were made.

        Raises:
            UserError: no trained tensor differs from what it was, or no gradient differed from zero.
        """
        self.check_optimizer()
        now = dict(self.model.named_parameters())
        moved = sum(name not in now or fingerprint(now[name]) != old for name, old in self._before.items())
        counts = torch.tensor([moved, bool(self._saw_gradient)], device=self.accelerator.device, dtype=torch.float)
        moved, saw_gradient = self.accelerator.reduce(counts, "sum").tolist()
        made = f"{updates} updates were made, but" if updates != 1 else "An update was made, but"
        if not saw_gradient:
            raise UserError(
                f"{made} every gradient was zero: nothing was learned or forgotten. The loss does not depend on what "
                "is trained, or the prediction equals its anchor."
            )
        if not moved:
            half = {p.dtype for p in now.values() if p.requires_grad} <= {torch.bfloat16, torch.float16}
            advice = (
                "The weights are in half precision, which rounds small updates away: load them in float32 (and train "
                "with bf16=True), or raise the learning rate."
                if half
                else "Raise the learning rate, and look in the log for updates that were skipped."
            )
            raise UserError(f"{made} no trained tensor differs from what it was. {advice}")


@torch.no_grad()
def fingerprint(tensor: Tensor) -> tuple[int, int]:
    """Two sums over the bits of a tensor, or of the shard that this process holds: one plain, one by position."""
    shard = getattr(tensor, "ds_tensor", tensor)  # ZeRO-3
    local = shard.to_local() if hasattr(shard, "to_local") else shard  # FSDP2
    if local.is_meta:
        return 0, 0
    bits = local.detach().contiguous().flatten().view(INTEGERS[local.element_size()])
    sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for part in bits.split(CHUNK):
        part = part.long()
        sums[0] += part.sum()
        sums[1] += (part * torch.arange(1, len(part) + 1, device=part.device)).sum()
    plain, by_position = sums.tolist()
    return plain, by_position
