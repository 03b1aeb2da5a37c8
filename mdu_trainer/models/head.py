"""Predictions where they are needed: the LM head runs for selected positions only, or not at all.

With a vocabulary of 126,464 the head dominates memory, and a diffusion step reads it at masked positions alone. Hooks
on the output embedding keep only those hidden states, so all of this happens inside any wrapper's forward (DDP, FSDP,
DeepSpeed, PEFT, autocast).

Not every model lets its head be run so. Each is tried on a few tokens first, and a `Way` chosen that gives its logits.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple, TypeGuard, cast
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..divergence import (
    BLOCK_ELEMENTS,
    CHUNK_ELEMENTS,
    GPU_CHUNK_ELEMENTS,
    Measure,
    Prediction,
    Projection,
    TokenValues,
)
from .block_attention import noisy_clean_mask
from .probe import LENGTH, logits_of, probe_tokens, probing

logger = logging.get_logger(__name__)


class Way(Enum):
    """How a model's predictions of selected tokens are computed."""

    INSIDE = "in place of the head, which is last: hidden @ weight.T + bias are the logits"
    ROWS = "by the head for the selected tokens alone, and by whatever follows it (soft-capping, a bias)"
    LOGITS = "for all tokens, of which the selected are kept"


# Of each model the head for which its way was found, and the way
_WAYS: WeakKeyDictionary[nn.Module, tuple[nn.Module | None, Way]] = WeakKeyDictionary()
ReadLogits = Callable[[list[Tensor], slice], Tensor]  # as `scan_logits_at` has it


class Clean(NamedTuple):
    """x_0, which a block-wise model is shown behind the noisy tokens: a block sees the clean ones before it."""

    ids: Tensor  # [B, L], as the noisy ones but for what is masked in them
    block_size: int
    opens: bool = (
        False  # with a logit shift, the last clean token before a block predicts its first, not the noisy one
    )

    def to(self, device: torch.device) -> "Clean":
        """The same on a device."""
        return self._replace(ids=self.ids.to(device))


def logits_at(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    selected: Tensor,
    *,
    logit_shift: bool = False,
    **inputs: Any,
) -> Tensor:
    """Return the logits that predict the selected tokens, computed for these alone where the model's head allows it.

    Args:
        model: any model whose forward takes `input_ids` and `attention_mask` and returns `logits`.
        input_ids: `[B, L]`.
        attention_mask: `[B, L]`, 1 for tokens and 0 for padding; or whatever else the model takes.
        selected: bool `[B, L]`, the N positions to predict.
        logit_shift: the model predicts token i at position i - 1 (Dream) instead of i (LLaDA).
        inputs: what else the model's forward is given: positions, a cache.

    Returns:
        `[N, V]`, in the order of `selected.nonzero()`.
    """
    return _logits(_Wanted(model, input_ids, attention_mask, selected, logit_shift, inputs))


def measure_at(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    selected: Tensor,
    measure: Measure,
    *,
    logit_shift: bool = False,
    clean: Clean | None = None,
) -> TokenValues:
    """Measure the predictions of the selected tokens, fused with the head where the logits are the head's alone.

    Args:
        model, input_ids, attention_mask, selected, logit_shift: as in `logits_at`.
        measure: what is asked of each prediction; targets or anchor are in the order of `selected.nonzero()`, as are
            the values returned.
        clean: what a block-wise model sees of the blocks before; without it, these are the noisy ones.
    """
    wanted = _wanted(model, input_ids, attention_mask, selected, logit_shift, clean)
    values = _inside(wanted, lambda projection: torch.stack(measure(projection), dim=1))
    return measure(_logits(wanted)) if values is None else TokenValues(values[:, 0], values[:, 1].detach())


@torch.no_grad()
def hidden_at(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    selected: Tensor,
    *,
    logit_shift: bool = False,
    clean: Clean | None = None,
    position_ids: Tensor | None = None,
) -> Prediction:
    """Return the predictions of the selected tokens as the head's input, or as logits where it cannot be fused.

    The weights are left out: a wrapper may hold them only during its forward.

    Args:
        model, input_ids, attention_mask, selected, logit_shift: as in `logits_at`.
        clean: as in `measure_at`.
        position_ids: `[B, L]`, where the model counts positions by what attention sees, and is not to.
    """
    wanted = _wanted(model, input_ids, attention_mask, selected, logit_shift, clean, position_ids)
    hidden = _inside(wanted, lambda projection: projection.hidden)
    return _logits(wanted) if hidden is None else Projection(hidden)


@torch.no_grad()
def scan_logits_at(
    model: nn.Module,
    inputs: Sequence[Tensor],
    attention_mask: Tensor,
    selected: Tensor,
    read: ReadLogits,
    *,
    logit_shift: bool = False,
    **forward: Any,
) -> Tensor:
    """Read the logits of the selected tokens, a few at a time: where the head allows it, no more exist at once.

    Args:
        model, attention_mask, selected, logit_shift: as in `logits_at`.
        inputs: ids to run the model on, `[B, L]` each.
        read: `(logits, rows) -> [C, ...]`. The logits are float32 `[C, V]`, of each input, and may be overwritten;
            `rows` says which of the N they are.
        forward: as `inputs` of `logits_at`, for the first of the inputs.

    Returns:
        What was read, `[N, ...]`.
    """
    wanted = _Wanted(model, inputs[0], attention_mask, selected, logit_shift, forward)
    others = [hidden_at(model, ids, attention_mask, selected, logit_shift=logit_shift) for ids in inputs[1:]]
    found = _inside(wanted, lambda head: _scan([head, *others], read))
    return _scan([_logits(wanted), *others], read) if found is None else found


class _Wanted(NamedTuple):
    """A forward pass, and the N tokens of which its predictions are wanted; fields as the arguments of `logits_at`."""

    model: nn.Module
    input_ids: Tensor
    attention_mask: Tensor
    selected: Tensor
    logit_shift: bool
    inputs: Mapping[str, Any] = MappingProxyType({})
    opens: int | None = None  # block size, where what opens a block is predicted behind the selected half

    def run(self) -> Tensor:
        """The logits that the forward returns, or what the hooks have put in their place."""
        return logits_of(self.model(input_ids=self.input_ids, attention_mask=self.attention_mask, **self.inputs))

    def keep(self, states: Tensor) -> Tensor:
        """The wanted of `[B, L, ...]` states: `[N, ...]`. What is behind them (Perceiver's, clean tokens) is left."""
        batch_index, position = self.selected.to(states.device).nonzero(as_tuple=True)
        place = (position - 1).clamp(min=0) if self.logit_shift else position
        if self.opens is not None and self.logit_shift:
            place = torch.where((position % self.opens == 0) & (position > 0), place + self.selected.shape[1], place)
        return states[batch_index, place]


def _wanted(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    selected: Tensor,
    logit_shift: bool,
    clean: Clean | None,
    position_ids: Tensor | None = None,
) -> _Wanted:
    """The pass over the tokens or, with the clean ones, over [x_t ; x_0]; its mask is made here, for all layers.

    x_t    the block itself, in both directions     the clean blocks before it
    x_0    nothing                                  the clean blocks up to its own

    Both halves stand at positions 0 ... L - 1, and the predictions are read in the first.
    """
    if clean is None:
        inputs = {} if position_ids is None else {"position_ids": position_ids}
        return _Wanted(model, input_ids, attention_mask, selected, logit_shift, inputs)
    length = input_ids.shape[1]
    places = torch.arange(length, device=input_ids.device).expand_as(input_ids)
    mask = noisy_clean_mask(clean.block_size, attention_mask, places)
    mask = mask | torch.eye(
        2 * length, dtype=torch.bool, device=mask.device
    )  # a hidden token sees itself, not nothing
    ids = torch.cat([input_ids, clean.ids], dim=1)
    opens = clean.block_size if clean.opens else None
    return _Wanted(model, ids, mask, selected, logit_shift, {"position_ids": places.repeat(1, 2)}, opens)


def _logits(wanted: _Wanted) -> Tensor:
    return wanted.keep(wanted.run()) if head_way(wanted.model) is Way.LOGITS else _logits_of_rows(wanted)


def _inside(wanted: _Wanted, compute: Callable[[Projection], Tensor]) -> Tensor | None:
    """Return `compute` of the wanted predictions, in the model's forward; None if they are not the head's alone."""
    if head_way(wanted.model) is not Way.INSIDE:
        return None
    output, computed = _in_place_of_head(wanted, compute)
    # a wrapper in mixed precision rounds its output, so it adds nothing but its place in the graph: wrappers prepare
    # their backward pass where the gradient reaches their output
    return computed + 0 * output if output.requires_grad else computed


def _scan(predictions: Sequence[Prediction], read: ReadLogits) -> Tensor:
    """Read predictions of the same N tokens, all by the head of the first.

    A chunk is one matrix product, which reads the head's weights; a block of it stays in a CPU's cache meanwhile.
    """
    first = predictions[0]
    head = first if isinstance(first, Projection) else Projection(first)  # a head, or logits that are there
    vocabulary = head.hidden.shape[1] if head.weight is None else len(head.weight)
    on_cpu = head.hidden.device.type == "cpu"
    chunk = max(1, (CHUNK_ELEMENTS if on_cpu else GPU_CHUNK_ELEMENTS) // vocabulary)
    block = max(1, BLOCK_ELEMENTS // vocabulary) if on_cpu else chunk
    found = []
    for start in range(0, max(1, len(head.hidden)), chunk):
        rows = slice(start, start + chunk)
        logits = [
            one[rows]
            if isinstance(one, Tensor)
            else nn.functional.linear(one.hidden[rows], cast(Tensor, head.weight), head.bias)
            for one in predictions
        ]
        for at in range(0, max(1, len(logits[0])), block):
            part = [one[at : at + block].float() for one in logits]
            found.append(read(part, slice(start + at, start + at + len(part[0]))))
    return torch.cat(found)


def _in_place_of_head(wanted: _Wanted, compute: Callable[[Projection], Tensor]) -> tuple[Tensor, Tensor]:
    """Run the model with `compute` in place of its head. Returns the model's output, and what was computed.

    decoder       ->  hidden [B, L, H]
    before hook   ->  hidden of the wanted [N, H], and the head's weights  ->  compute  ->  computed [N, ...]
    head          <-  hidden of no token [0, L, H]: it makes no logits
    after hook    ->  computed, as if the head had made it
    wrappers      ->  output: computed, through the forward hooks of FSDP, DDP, autocast, ...
    """
    computed = []

    def before(head: nn.Linear, args: tuple) -> tuple:
        hidden = wanted.keep(args[0]).to(head.weight.device)
        computed.append(compute(Projection(hidden, head.weight, head.bias)))
        return (hidden[:0], *args[1:])

    def after(head: nn.Linear, args: tuple, logits: Tensor) -> Tensor:
        return computed[0]

    with _hooked(wanted.model, before, after):
        output = wanted.run()
    return output, computed[0]


def _logits_of_rows(wanted: _Wanted) -> Tensor:
    """Run the model with a head that is given the wanted tokens alone: `[N, V]`."""
    with _hooked(wanted.model, lambda head, args: (wanted.keep(args[0]), *args[1:])):
        return wanted.run()


@contextmanager
def _hooked(model: nn.Module, before: Callable[..., Any], after: Callable[..., Any] | None = None) -> Iterator[None]:
    """Hook on to the head for one pass. The hooks differ from batch to batch, so `torch.compile` leaves them out."""
    head = _head(model)
    assert head is not None, "a model without a head computes all logits"
    eager = cast("Callable[[Any], Any]", torch.compiler.disable)
    handles = [head.register_forward_pre_hook(eager(before))]
    if after is not None:
        # first of the hooks: FSDP's and DeepSpeed's must see the tensor through which the gradient comes back
        handles.append(head.register_forward_hook(eager(after), prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def head_way(model: nn.Module) -> Way:
    """Find which way gives a model's logits, once for each model and head, by trying them on two rows of five tokens.

    Args:
        model: wrapped or not. Where weights are sharded all processes must ask together, as they do for a forward.
    """
    base, head = _bare(model), _head(model)
    known_head, way = _WAYS.get(base, (None, None))
    if way is None or known_head is not head:
        zero_3 = any(hasattr(p, "ds_id") for p in base.parameters())  # its engine has to run the forward
        way = _try_ways(model if zero_3 else base, base, head)
        if way is Way.LOGITS:
            logger.warning(
                f"The LM head of {type(base).__name__} cannot be run for the masked tokens alone: the logits of all "
                "tokens are computed, which takes more memory."
            )
        _WAYS[base] = (head, way)
    return Way.ROWS if way is Way.INSIDE and not _is_plain(head) else way


def _try_ways(model: nn.Module, base: nn.Module, head: nn.Module | None) -> Way:
    """Return the first way that gives the logits of the plain forward."""
    if head is None:
        return Way.LOGITS
    ids = probe_tokens(base)
    mask = torch.ones_like(ids)
    mask[1, -1] = 0
    selected = mask.bool() & (torch.arange(LENGTH, device=ids.device) % 2 == 0)
    wanted = _Wanted(model, ids, mask, selected, logit_shift=False)
    with probing(model):
        expected = wanted.keep(wanted.run())
        for way, trial in (
            (Way.INSIDE, lambda: _is_plain(head) and _is_last(head, wanted, expected)),
            (Way.ROWS, lambda: _is_close(_logits_of_rows(wanted), expected)),
        ):
            try:
                if trial():
                    return way
            except Exception:  # what is done with a head's output may need its shape: a bias, a view
                logger.debug(f"{type(base).__name__}: {way} does not work.", exc_info=True)
    return Way.LOGITS


def _is_last(head: nn.Linear, wanted: _Wanted, expected: Tensor) -> bool:
    """Whether hidden @ weight.T + bias are the logits, and nothing is done to what the head returns.

    The latter is seen by giving it another tensor: a bias that is still zero, or a scale of one, may be trained.
    """
    seen = []

    def compute(projection: Projection) -> Tensor:
        seen.append(nn.functional.linear(projection.hidden, head.weight, head.bias))
        return torch.arange(2.0 * len(expected), device=expected.device, dtype=expected.dtype).view(-1, 2) + 1

    output, mark = _in_place_of_head(wanted, compute)
    untouched = (
        output.data_ptr() == mark.data_ptr() if output.dtype == mark.dtype else output.equal(mark.to(output.dtype))
    )
    return untouched and output.shape == mark.shape and _is_close(seen[0], expected)


def _bare(model: nn.Module) -> nn.Module:
    """The model without its wrappers."""
    if isinstance(model, PreTrainedModel):  # none: to search for them takes a small model as long as a layer
        return model
    return extract_model_from_parallel(model, keep_torch_compile=False)


def _head(model: nn.Module) -> nn.Module | None:
    base: Any = _bare(model)
    return base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None


def _is_plain(head: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether the head is `hidden @ weight.T + bias`: not quantised, not adapted, not offloaded."""
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and not head.weight.is_meta


def _is_close(chosen: Tensor, expected: Tensor) -> bool:
    """Whether two computations of the same logits agree but for rounding."""
    if chosen.shape != expected.shape:
        return False
    tolerance = 1e-4 if chosen.dtype == expected.dtype == torch.float32 else 5e-2
    chosen, expected = chosen.float().to(expected.device), expected.float()
    return torch.allclose(chosen, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
