"""Predictions where they are needed: the LM head runs for selected positions only, or not at all.

With a vocabulary of 126,464 the head dominates memory, and a diffusion step reads it at masked positions alone. Hooks
on the output embedding keep only those hidden states, so all of this happens inside any wrapper's forward (DDP, FSDP,
DeepSpeed, PEFT, autocast). `torch.compile` compiles what comes before the head: the hooks, which differ from batch to
batch, are left out of its graphs.
"""

from collections.abc import Callable
from contextlib import ExitStack
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from ..divergence import Measure, Prediction, Projection, TokenFigures

# Heads whose output reaches the model's as it is, and those where something (soft-capping, scaling) follows.
_HEAD_IS_LAST: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def row_logits(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, rows: Tensor, *, logit_shift: bool = False
) -> Tensor:
    """Logits that predict the selected tokens, computed for these alone.

    A model without an output embedding module computes all logits, which are then selected.

    Args:
        model: any model whose forward takes `input_ids` and `attention_mask` and returns `logits`.
        input_ids: `[B, L]`.
        attention_mask: `[B, L]`, 1 for tokens and 0 for padding.
        rows: bool `[B, L]`, the N positions to predict.
        logit_shift: the model predicts token i at position i - 1 (Dream) instead of i (LLaDA).

    Returns:
        `[N, V]`, in the order of `rows.nonzero()`.
    """
    batch_index, position = _source(rows, logit_shift)
    head = _head(model)
    with ExitStack() as hooks:
        if head is not None:
            handle = head.register_forward_pre_hook(_keep(batch_index, position))
            hooks.callback(handle.remove)
        output = model(input_ids=input_ids, attention_mask=attention_mask)
    logits = output.logits if hasattr(output, "logits") else output[0]
    return logits if logits.ndim == 2 else logits[batch_index.to(logits.device), position.to(logits.device)]


def row_figures(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    rows: Tensor,
    measure: Measure,
    *,
    logit_shift: bool = False,
) -> TokenFigures:
    """`measure` of the predictions of the selected tokens, fused with the head where the head is a plain linear layer.

    Args:
        model, input_ids, attention_mask, rows, logit_shift: as in `row_logits`.
        measure: what is asked of each prediction; targets or anchor are in the order of `rows.nonzero()`.

    Returns:
        Figures of the N tokens.
    """
    inputs = (model, input_ids, attention_mask, rows, logit_shift)
    figures = _inside(*inputs, lambda projection: torch.stack(measure(projection), dim=1))
    if figures is None:
        return measure(row_logits(model, input_ids, attention_mask, rows, logit_shift=logit_shift))
    return TokenFigures(figures[:, 0], figures[:, 1].detach())


@torch.no_grad()
def row_projection(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, rows: Tensor, *, logit_shift: bool = False
) -> Prediction:
    """Predictions of the selected tokens as the head's input, or as logits where the head cannot be fused.

    The weights are left out: a wrapper may hold them only during its forward.
    """
    hidden = _inside(model, input_ids, attention_mask, rows, logit_shift, lambda projection: projection.hidden)
    if hidden is None:
        return row_logits(model, input_ids, attention_mask, rows, logit_shift=logit_shift)
    return Projection(hidden)


def _inside(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    rows: Tensor,
    logit_shift: bool,
    compute: Callable[[Projection], Tensor],
) -> Tensor | None:
    """What `compute` makes of the selected rows of the head's input, within the model's forward.

    The head itself is given no rows, and what was computed leaves the model in place of its logits. None if the head
    is no plain linear layer, or something follows it.
    """
    head = _head(model)
    if not _is_plain(head) or not _HEAD_IS_LAST.get(head, True):
        return None
    keep, computed = _keep(*_source(rows, logit_shift)), []

    @torch.compiler.disable
    def before(module: nn.Linear, args: tuple) -> tuple:
        hidden = keep(module, args)[0].to(module.weight.device)
        computed.append(compute(Projection(hidden, module.weight, module.bias)))
        return (hidden[:0], *args[1:])

    @torch.compiler.disable
    def after(module: nn.Linear, args: tuple, logits: Tensor) -> Tensor:
        return computed[0]

    with ExitStack() as hooks:
        hooks.callback(head.register_forward_pre_hook(before).remove)
        # first of the hooks: FSDP's and DeepSpeed's must see the tensor through which the gradient comes back
        hooks.callback(head.register_forward_hook(after, prepend=True).remove)
        output = model(input_ids=input_ids, attention_mask=attention_mask)
    output = output.logits if hasattr(output, "logits") else output[0]
    if head not in _HEAD_IS_LAST:
        _HEAD_IS_LAST[head] = _is_same(output, computed[0])
        if not _HEAD_IS_LAST[head]:
            return None
    # a wrapper in mixed precision rounds its output, so it adds nothing but its place in the graph: wrappers prepare
    # their backward pass where the gradient reaches their output
    return computed[0] + 0 * output if output.requires_grad else computed[0]


def _source(rows: Tensor, logit_shift: bool) -> tuple[Tensor, Tensor]:
    """Where the selected tokens are predicted: rows of the batch and positions, `[N]` each."""
    batch_index, position = rows.nonzero(as_tuple=True)
    return batch_index, (position - 1).clamp(min=0) if logit_shift else position


def _keep(batch_index: Tensor, position: Tensor) -> Callable[[nn.Module, tuple], tuple]:
    @torch.compiler.disable
    def keep(module: nn.Module, args: tuple) -> tuple:
        hidden = args[0]
        return (hidden[batch_index.to(hidden.device), position.to(hidden.device)], *args[1:])

    return keep


def _head(model: nn.Module) -> nn.Module | None:
    base = extract_model_from_parallel(model)
    return base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None


def _is_plain(head: nn.Module | None) -> bool:
    """Whether the head is `hidden @ weight.T + bias`: not quantised, not adapted, not offloaded."""
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and not head.weight.is_meta


def _is_same(output: Tensor, computed: Tensor) -> bool:
    """Whether a model's output is what its head returned, at whatever precision."""
    if output.shape != computed.shape:
        return False
    output, computed = output.detach().float(), computed.detach().float()
    return any(torch.equal(output, computed.to(dtype).float()) for dtype in (torch.float, torch.bfloat16, torch.half))
