"""Who answers for theta_0, the weights at the start."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from .models import row_logits


class Reference:
    """Predictions of the model as it was at the start, without gradient.

    A PEFT model holds theta_0 already: its base weights with the adapters switched off or, if the adapters had been
    trained before, with their first weights put back for the pass. Any other model is copied once and frozen.

    Args:
        model: the model at the start.
        accelerator: of the trainer; gives the copy its device and mixed precision.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, accelerator: Accelerator):
        self.accelerator = accelerator
        self.frozen: nn.Module | None = None
        self.first_adapter: dict[str, Tensor] = {}
        if not isinstance(model, PeftModel):
            self.frozen = copy.deepcopy(model).requires_grad_(False).eval().to(accelerator.device)
        elif not _adapter_is_identity(model):
            self.first_adapter = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def row_logits(
        self, model: nn.Module, unwrapped: nn.Module, input_ids: Tensor, attention_mask: Tensor, rows: Tensor, **kwargs
    ) -> Tensor:
        """theta_0's logits of the selected tokens, `[N, V]`; see `mdu_trainer.models.row_logits`.

        Args:
            model: the live model as the trainer wraps it. Its forward is what runs if there is no copy.
            unwrapped: the same without wrappers.
        """
        if self.frozen is not None:
            with torch.no_grad(), self.accelerator.autocast():
                return row_logits(self.frozen, input_ids, attention_mask, rows, **kwargs)
        switched = self._first_weights(unwrapped) if self.first_adapter else unwrapped.disable_adapter()
        with switched:
            return live_row_logits(model, input_ids, attention_mask, rows, **kwargs)

    @contextmanager
    def _first_weights(self, model: nn.Module) -> Iterator[None]:
        live = {name: p for name, p in model.named_parameters() if name in self.first_adapter}
        now = {name: p.data for name, p in live.items()}
        for name, p in live.items():
            p.data = self.first_adapter[name].to(p.device)
        try:
            yield
        finally:
            for name, p in live.items():
                p.data = now[name]


def live_row_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, rows: Tensor, **kwargs) -> Tensor:
    """`row_logits` of the model in training, without gradient and without dropout."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return row_logits(model, input_ids, attention_mask, rows, **kwargs)
    finally:
        model.train(training)


def _adapter_is_identity(model: PeftModel) -> bool:
    """Whether the active adapters change nothing yet: LoRA layers, one factor of which is zero (A in embeddings)."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    is_lora = all("lora_" in name or "modules_to_save" in name for name, _ in trained)
    zero_at_first = [p for name, p in trained if "lora_B" in name or "lora_embedding_A" in name]
    return is_lora and bool(zero_at_first) and not any(p.any() for p in zero_at_first)
