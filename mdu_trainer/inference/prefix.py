"""A prefix cache for models that attend in full (LLaDA, Dream): faster, and an approximation.

    prompt          a b c d e f                              what stands before the block is kept
    response        x y z w [M] [M] [M] [M] [M] [M]          from its first step,
                            |- block -|                      and not computed again in the others

In a model that attends in full, what is kept depends on the tokens of the block, which change while it is decoded. So
from the second step of a block on, predictions are not quite those of a whole pass (Fast-dLLM, arXiv 2505.22618, alg.
1). Block-wise models need no approximation: `mdu_trainer.inference.blocks`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..models import Backbone, ReadLogits, scan_logits_at
from .canvas import Canvas
from .schedule import Step


class PrefixCache:
    """What a model keeps of the tokens before the block that is decoded.

    Args:
        model: a model that attends in full.
        backbone: facts of the model.
    """

    def __init__(self, model: nn.Module, backbone: Backbone):
        self.model, self.backbone = model, backbone
        self.cache, self.block, self.length = DynamicCache(), -1, 0

    def keep(self, rows: Tensor) -> None:
        """Keep some rows, bool `[B]`, alone."""
        if self.length:
            self.cache.batch_select_indices(rows.nonzero()[:, 0])

    def scan_logits_at(self, canvas: Canvas, selected: Tensor, step: Step, read: ReadLogits) -> Tensor:
        """Predict the selected tokens (bool `[B, L]`) of a canvas, and read their logits as `scan_logits_at` does."""
        if step.start != self.block:
            self.cache, self.block, self.length = DynamicCache(), step.start, 0
        kept = self.length
        ids, shift = canvas.ids, self.backbone.logit_shift
        places = torch.arange(kept, ids.shape[1], device=ids.device).expand(len(ids), -1)
        inputs: dict[str, Any] = {"position_ids": places, "past_key_values": self.cache, "use_cache": True}
        where = ([ids[:, kept:]], canvas.attention_mask, selected[:, kept:])
        found = scan_logits_at(self.model, *where, read, logit_shift=shift, **inputs)
        # rows stand as far to the left as their prompts are short: kept is what is before the block in all of them
        self.length = max(0, int(canvas.start.min()) + step.start - shift)
        self.cache.crop(self.length - ids.shape[1])
        return found
