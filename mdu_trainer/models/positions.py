"""Take the prompt out of attention and leave every token where it stands, for models that let one do so."""

from weakref import WeakKeyDictionary

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from ..files import UserError
from .probe import LENGTH, is_runnable, logits_of, probe_tokens, probing

HIDDEN = 2  # tokens of a probe that are hidden
REMEDY = "Take anchor_input='masked_prompt' for this model."

_FIRST: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # models that were tried, and their first position


def position_ids(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The positions `[B, L]` at which a model sees tokens when it is not told any, whatever attention hides.

    Args:
        model: wrapped or not. It is tried once, on two rows of five tokens; where its weights are sharded it cannot be
            tried, and positions are counted from 0.
        input_ids: `[B, L]`, padded on the right.

    Raises:
        UserError: the model takes no positions, counts them otherwise, or does not hide what it is told to.
    """
    base = extract_model_from_parallel(model, keep_torch_compile=False)
    if base not in _FIRST:
        _FIRST[base] = _first_position(base) if is_runnable(base) else 0
    return (_FIRST[base] + torch.arange(input_ids.shape[1], device=input_ids.device)).expand_as(input_ids)


def _first_position(model: nn.Module) -> int:
    """0, or what RoBERTa and its kin count from: the position after that of the padding token."""
    name, ids = type(getattr(model, "get_base_model", lambda: model)()).__name__, probe_tokens(model)
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    with probing(model):
        plain = _logits(model, ids)
        for first in [0] if padding is None else [0, padding + 1]:
            places = (first + torch.arange(LENGTH, device=ids.device)).expand_as(ids)
            try:
                told = _logits(model, ids, position_ids=places)
                moved = _logits(model, ids, position_ids=places.flip(1))
            except Exception as error:  # a table that is too short, among others
                cause = " ".join(str(error).split())[:200]
                refusal = f"takes no positions ({type(error).__name__}: {cause})"
                continue
            if _same(plain, told) and not _same(told, moved):
                return _checked(model, name, ids, places, first)
            refusal = "does not see tokens at the positions that it is told"
    raise UserError(f"anchor_input='hidden_prompt': {name} {refusal}, so hidden ones could move the others. {REMEDY}")


def _checked(model: nn.Module, name: str, ids: Tensor, places: Tensor, first: int) -> int:
    """Return the first position, once hidden tokens are seen to change no prediction of the others."""
    mask = torch.ones_like(ids)
    mask[:, :HIDDEN] = 0
    changed = ids.clone()
    changed[:, :HIDDEN] = ids[:, :HIDDEN].flip(0)
    one, other = (_logits(model, x, attention_mask=mask, position_ids=places)[:, HIDDEN:] for x in (ids, changed))
    if not _same(one, other):
        raise UserError(
            f"anchor_input='hidden_prompt': {name} predicts other tokens by what its attention mask hides, so a "
            f"prompt cannot be hidden from it. {REMEDY}"
        )
    return first


def _logits(model: nn.Module, ids: Tensor, **inputs: Tensor) -> Tensor:
    return logits_of(model(**{"input_ids": ids, "attention_mask": torch.ones_like(ids)} | inputs)).float()


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether predictions agree but for rounding, measured by how far they reach."""
    return bool((one - other).abs().max() <= 1e-4 * one.abs().max())
