"""Find out what a model does by running it on a few tokens: configs claim more than their models keep."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..files import UserError
from .block_attention import block_size_of

LENGTH = 5  # tokens of a probe
# A changed token moves predictions after and before itself. If the largest move before it is below this share of the
# largest after it, it is rounding: experts and 8-bit layers work on a sequence as a whole. Over the classes of
# transformers: causal models up to 1e-7, others from 0.1
LEAST_SHARE = 1e-2

_BOTH_WAYS: WeakSet[nn.Module] = WeakSet()  # models that were found to attend in both directions


def attends_both_ways(model: nn.Module) -> bool | None:
    """Whether a later token changes what is predicted at an earlier position.

    Two passes of five tokens, which differ in the middle one, or in the last of the first block where that is earlier.
    The model's modes and the random state stay as they are.

    Args:
        model: a model without wrappers, on any device and in any precision.

    Returns:
        None where it cannot be told: the weights are not here (meta, sharded), or no token moves any other.

    Raises:
        ValueError: the forward fails, or the predictions are NaN.
    """
    if model in _BOTH_WAYS:
        return True
    if not is_runnable(model):
        return None
    ids = probe_tokens(model)
    middle = min(LENGTH // 2, (block_size_of(getattr(model, "config", None)) or LENGTH) - 1)  # within the first block
    changed = ids[:1].clone()
    changed[0, middle] = ids[1, middle]
    try:
        with probing(model):
            first, second = (
                logits_of(model(input_ids=x, attention_mask=torch.ones_like(x))).float() for x in (ids[:1], changed)
            )
    except Exception as error:
        cause = " ".join(str(error).split())[:200]
        raise UserError(
            f"{type(model).__name__} cannot be run on a short text without padding ({type(error).__name__}: {cause}). "
            "It is not supported with this config."
        ) from error
    if first.isnan().any():
        raise UserError(
            f"The predictions of this {type(model).__name__} are NaN: its weights are damaged, or too large for their "
            "precision. Load an intact checkpoint, or another dtype."
        )
    moved = (first - second).nan_to_num().abs().amax(dim=-1)[0]
    before, after = moved[:middle].max(), moved[middle + 1 :].max()
    if not before and not after:
        return None
    both_ways = bool(before > LEAST_SHARE * after)
    if both_ways:
        _BOTH_WAYS.add(model)
    return both_ways


def is_runnable(model: nn.Module) -> bool:
    """Whether this process alone can run a forward: all weights are here, or accelerate brings them when asked."""
    weights = list(model.parameters())
    sharded = any(hasattr(p, "ds_id") or isinstance(p, DTensor) for p in weights)
    return not sharded and (hasattr(model, "hf_device_map") or not any(p.is_meta for p in weights))


def probe_tokens(model: nn.Module) -> Tensor:
    """Two rows of plain tokens, `[2, 5]`, that have no token in common, on the device of the embedding."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    config = getattr(model, "config", None)
    rows = getattr(embedding, "num_embeddings", None) or getattr(config, "vocab_size", None)
    weight = getattr(embedding, "weight", next(model.parameters()))
    values = [value for name, value in vars(config or object).items() if name.endswith(("token_id", "token_index"))]
    special = {x for value in values for x in (value if isinstance(value, list) else [value])}
    # far rows may be padding that no token uses
    plain = [token for token in range(min(rows or len(weight), 10_000)) if token not in special]
    tokens = [plain[(2 * k + 1) * len(plain) // (4 * LENGTH)] for k in range(2 * LENGTH)]
    return torch.tensor(tokens).view(LENGTH, 2).T.contiguous().to("cpu" if weight.is_meta else weight.device)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch a model to evaluation mode, and each of its modules back to its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Run a model without gradient and dropout, and leave its modes and the random state as they were."""
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with evaluation_mode(model), torch.no_grad(), torch.random.fork_rng(devices=sorted(devices)):
        yield


def logits_of(output: Any) -> Tensor:
    """The logits among what a model's forward returns."""
    return output.logits if hasattr(output, "logits") else output[0]
