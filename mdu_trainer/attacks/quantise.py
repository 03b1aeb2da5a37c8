"""Round the weights to few bits: an update smaller than the rounding step is undone (Zhang et al., arXiv 2410.16454).

Weights are rounded to nearest, symmetrically, with a step an output channel, which is what bitsandbytes stores in 8
bits; in 4 bits also to bitsandbytes' NF4 (Dettmers et al., arXiv 2305.14314), where it is installed. They stay in
their data type: the arithmetic is that of weight-only quantisation, without its speed. The linear layers are rounded
but the head, as bitsandbytes does it; embeddings and norms are not. Adapters are merged first, as they are before a
model is quantised to be served.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers.utils import is_bitsandbytes_available

from ..files import UserError
from .base import AttackScores, Target, worst_case
from .changes import linear_layers, merged_adapters, restored

Rounding = Callable[[Tensor], Tensor]


def attack(target: Target, seed: int, bits: int) -> AttackScores:
    """Return the best score under weights of so many bits, over the ways to round. Nothing is random.

    Raises:
        ValueError: if there are no linear layers with floating-point weights: the model is quantised already.
    """
    tries = {}
    for name, rounding in roundings(bits).items():
        with quantised(target.model, rounding):
            tries[name] = target.ask()
    return worst_case(target, tries)


def roundings(bits: int) -> dict[str, Rounding]:
    """Return the ways to round a weight `[out, in]` to so many bits, by name."""
    ways: dict[str, Rounding] = {"nearest": partial(round_to_nearest, bits=bits)}
    if bits == 4 and is_bitsandbytes_available():
        ways["nf4"] = _nf4
    return ways


@contextmanager
def quantised(model: nn.Module, rounding: Rounding) -> Iterator[None]:
    """Round the weights of the linear layers."""
    weights = [layer.weight for layer in linear_layers(model) if layer.weight.is_floating_point()]
    if not weights:
        raise UserError("The model has no linear layers with floating-point weights: load it unquantised.")
    with merged_adapters(model), restored(weights), torch.no_grad():
        for weight in weights:
            weight.copy_(rounding(weight))
        yield


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """Return the nearest of 2^bits - 1 values, evenly spaced about 0 up to the largest of each row: `[out, in]`."""
    largest = 2 ** (bits - 1) - 1
    step = weight.abs().amax(dim=1, keepdim=True) / largest
    step = torch.where(step > 0, step, 1)  # a row of zeros stays as it is
    return (weight / step).round().clamp(-largest, largest) * step


def _nf4(weight: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(*quantize_4bit(weight, quant_type="nf4")).reshape(weight.shape).to(weight.dtype)
