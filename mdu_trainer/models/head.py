"""Predictions where they are needed: the LM head runs for selected positions only, or not at all.

With a vocabulary of 126,464 the head dominates memory, and a diffusion step reads it at masked positions alone. Hooks
on the output embedding keep only those hidden states, so all of this happens inside any wrapper's forward (DDP, FSDP,
DeepSpeed, PEFT, autocast). `torch.compile` compiles what comes before the head: the hooks, which differ from batch to
batch, are left out of its graphs.

Not every model lets its head be run so. Each is tried on a few tokens first, and a `Way` chosen that gives its logits.
"""

from collections.abc import Callable
from contextlib import ExitStack
from enum import Enum
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers.utils import logging

from ..divergence import Measure, Prediction, Projection, TokenValues
from .probe import LENGTH, logits_of, probe_tokens, probing

logger = logging.get_logger(__name__)


class Way(Enum):
    """How a model's predictions of selected tokens are computed."""

    INSIDE = "in place of the head, which is last: hidden @ weight.T + bias are the logits"
    ROWS = "by the head for the selected tokens alone, and by whatever follows it (soft-capping, a bias)"
    LOGITS = "for all tokens, of which the selected are kept"


# Of each model the head for which its way was found, and the way
_WAYS: WeakKeyDictionary[nn.Module, tuple[nn.Module | None, Way]] = WeakKeyDictionary()


def logits_at(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, rows: Tensor, *, logit_shift: bool = False
) -> Tensor:
    """Logits that predict the selected tokens, computed for these alone.

    A model whose head cannot be run for these alone computes all logits, of which they are kept.

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
    if head_way(model) is not Way.LOGITS:
        return _logits_of_rows(model, input_ids, attention_mask, batch_index, position)
    logits = logits_of(model(input_ids=input_ids, attention_mask=attention_mask))
    return logits[batch_index.to(logits.device), position.to(logits.device)]


def measure_at(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    rows: Tensor,
    measure: Measure,
    *,
    logit_shift: bool = False,
) -> TokenValues:
    """`measure` of the predictions of the selected tokens, fused with the head where the logits are the head's alone.

    Args:
        model, input_ids, attention_mask, rows, logit_shift: as in `logits_at`.
        measure: what is asked of each prediction; targets or anchor are in the order of `rows.nonzero()`.

    Returns:
        Figures of the N tokens.
    """
    inputs = (model, input_ids, attention_mask, rows, logit_shift)
    figures = _inside(*inputs, lambda projection: torch.stack(measure(projection), dim=1))
    if figures is None:
        return measure(logits_at(model, input_ids, attention_mask, rows, logit_shift=logit_shift))
    return TokenValues(figures[:, 0], figures[:, 1].detach())


@torch.no_grad()
def hidden_at(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, rows: Tensor, *, logit_shift: bool = False
) -> Prediction:
    """Predictions of the selected tokens as the head's input, or as logits where the head cannot be fused.

    The weights are left out: a wrapper may hold them only during its forward.
    """
    hidden = _inside(model, input_ids, attention_mask, rows, logit_shift, lambda projection: projection.hidden)
    if hidden is None:
        return logits_at(model, input_ids, attention_mask, rows, logit_shift=logit_shift)
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
    if head_way(model) is not Way.INSIDE:
        return None
    output, computed = _in_place_of_head(model, input_ids, attention_mask, *_source(rows, logit_shift), compute)
    # a wrapper in mixed precision rounds its output, so it adds nothing but its place in the graph: wrappers prepare
    # their backward pass where the gradient reaches their output
    return computed + 0 * output if output.requires_grad else computed


def _in_place_of_head(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    batch_index: Tensor,
    position: Tensor,
    compute: Callable[[Projection], Tensor],
) -> tuple[Tensor, Tensor]:
    """What the model returns when its head returns what `compute` makes of the selected rows, and that itself."""
    head, keep, computed = _head(model), _keep(batch_index, position), []

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
        output = logits_of(model(input_ids=input_ids, attention_mask=attention_mask))
    return output, computed[0]


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


def head_way(model: nn.Module) -> Way:
    """Which way gives a model's logits, found once for each model and head by trying them on two rows of five tokens.

    Args:
        model: wrapped or not. Where weights are sharded all processes must ask together, as they do for a forward.
    """
    base, head = _base(model), _head(model)
    known_head, way = _WAYS.get(base, (None, None))
    if way is None or known_head is not head:
        way = _try_ways(model if _needs_engine(base) else base, base, head)
        if way is Way.LOGITS:
            logger.warning(
                f"The LM head of {type(base).__name__} cannot be run for the masked tokens alone: the logits of all "
                "tokens are computed, which takes more memory."
            )
        _WAYS[base] = (head, way)
    return Way.ROWS if way is Way.INSIDE and not _is_plain(head) else way


def _try_ways(model: nn.Module, base: nn.Module, head: nn.Module | None) -> Way:
    """The first way that gives the logits of the plain forward."""
    if head is None:
        return Way.LOGITS
    ids = probe_tokens(base)
    mask = torch.ones_like(ids)
    mask[1, -1] = 0
    rows = mask.bool() & (torch.arange(LENGTH, device=ids.device) % 2 == 0)
    inputs = (model, ids, mask, *rows.nonzero(as_tuple=True))
    with probing(model):
        logits = logits_of(model(input_ids=ids, attention_mask=mask))
        expected = logits[rows.to(logits.device).nonzero(as_tuple=True)]  # Perceiver's are longer than the input
        for way, trial in ((Way.INSIDE, _gives_inside), (Way.ROWS, _gives_rows)):
            try:
                if trial(*inputs, expected):
                    return way
            except Exception:  # what is done with a head's output may need its shape: a bias, a view
                logger.debug(f"{type(base).__name__}: {way} does not work.", exc_info=True)
    return Way.LOGITS


def _gives_inside(
    model: nn.Module, ids: Tensor, mask: Tensor, batch: Tensor, position: Tensor, expected: Tensor
) -> bool:
    """Whether hidden @ weight.T + bias are the logits, and nothing is done to what the head returns.

    The latter is seen by giving it another tensor: a bias that is still zero, or a scale of one, may be trained.
    """
    if not _is_plain(_head(model)):
        return False
    seen = []

    def compute(projection: Projection) -> Tensor:
        seen.append(nn.functional.linear(*projection[:3]))
        return torch.arange(2.0 * len(batch), device=expected.device, dtype=expected.dtype).view(-1, 2) + 1

    output, mark = _in_place_of_head(model, ids, mask, batch, position, compute)
    untouched = (
        output.data_ptr() == mark.data_ptr() if output.dtype == mark.dtype else output.equal(mark.to(output.dtype))
    )
    return untouched and output.shape == mark.shape and _is_close(seen[0], expected)


def _gives_rows(
    model: nn.Module, ids: Tensor, mask: Tensor, batch: Tensor, position: Tensor, expected: Tensor
) -> bool:
    return _is_close(_logits_of_rows(model, ids, mask, batch, position), expected)


def _logits_of_rows(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, batch_index: Tensor, position: Tensor
) -> Tensor:
    handle = _head(model).register_forward_pre_hook(_keep(batch_index, position))
    try:
        return logits_of(model(input_ids=input_ids, attention_mask=attention_mask))
    finally:
        handle.remove()


def _base(model: nn.Module) -> nn.Module:
    return extract_model_from_parallel(model, keep_torch_compile=False)


def _needs_engine(base: nn.Module) -> bool:
    """Whether ZeRO-3 holds the weights: its engine has to run the forward."""
    return any(hasattr(p, "ds_id") for p in base.parameters())


def _head(model: nn.Module) -> nn.Module | None:
    base = _base(model)
    return base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None


def _is_plain(head: nn.Module | None) -> bool:
    """Whether the head is `hidden @ weight.T + bias`: not quantised, not adapted, not offloaded."""
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and not head.weight.is_meta


def _is_close(chosen: Tensor, expected: Tensor) -> bool:
    """Whether two computations of the same logits agree but for rounding."""
    if chosen.shape != expected.shape:
        return False
    tolerance = 1e-4 if chosen.dtype == expected.dtype == torch.float32 else 5e-2
    chosen, expected = chosen.float().to(expected.device), expected.float()
    return torch.allclose(chosen, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
