"""Logits where they are needed: the LM head runs for selected positions only.

With a vocabulary of 126,464 the head dominates memory, and a diffusion step reads it at masked positions alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn


def row_logits(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, rows: Tensor, *, logit_shift: bool = False
) -> Tensor:
    """Logits that predict the selected tokens, computed for these alone.

    A forward pre-hook on the output embedding keeps only the selected hidden states, so it works inside any wrapper's
    forward (DDP, FSDP, PEFT, autocast). A model without such a module computes all logits, which are then selected.

    Args:
        model: any model whose forward takes `input_ids` and `attention_mask` and returns `logits`.
        input_ids: `[B, L]`.
        attention_mask: `[B, L]`, 1 for tokens and 0 for padding.
        rows: bool `[B, L]`, the N positions to predict.
        logit_shift: the model predicts token i at position i - 1 (Dream) instead of i (LLaDA).

    Returns:
        `[N, V]`, in the order of `rows.nonzero()`.
    """
    batch_index, position = rows.nonzero(as_tuple=True)
    if logit_shift:
        position = (position - 1).clamp(min=0)
    base = extract_model_from_parallel(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    with _keep_rows(head, batch_index, position):
        output = model(input_ids=input_ids, attention_mask=attention_mask)
    logits = output.logits if hasattr(output, "logits") else output[0]
    return logits if logits.ndim == 2 else logits[batch_index.to(logits.device), position.to(logits.device)]


@contextmanager
def _keep_rows(head: nn.Module | None, batch_index: Tensor, position: Tensor) -> Iterator[None]:
    if head is None:
        yield
        return

    def keep(module: nn.Module, args: tuple) -> tuple:
        hidden = args[0]
        return (hidden[batch_index.to(hidden.device), position.to(hidden.device)], *args[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
