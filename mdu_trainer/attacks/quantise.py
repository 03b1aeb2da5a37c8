"""Round the weights to few bits: an update smaller than the rounding step is undone (Zhang et al., arXiv 2410.16454).

Weights are rounded to nearest, symmetrically, with a step an output channel, and stay in their data type: the
arithmetic is that of weight-only quantisation, without its speed. The linear layers are rounded but the head, as
bitsandbytes does it; embeddings and norms are not. Adapters are merged first, as they are before a model is quantised
to be served.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .base import AttackScores, Target, is_merged, mean, restored


def attack(target: Target, seed: int, bits: int) -> AttackScores:
    """Score the rows under weights of so many bits. Nothing is random. `path` has the mean relative rounding error.

    Raises:
        ValueError: if there are no linear layers with floating-point weights: the model is quantised already.
    """
    with quantised(target.model, bits) as error:
        after = target.score(target.decode(target.prompts))
    return AttackScores(list(range(len(after))), target.plain, after, {"relative error": error})


@contextmanager
def quantised(model: nn.Module, bits: int) -> Iterator[float]:
    """Round the weights of the linear layers; yields the mean of |rounded - weight| / |weight| in Frobenius norms."""
    head = model.get_output_embeddings()
    weights = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and "lora_" not in name
        and module.weight.is_floating_point()
    ]
    if not weights:
        raise ValueError("The model has no linear layers with floating-point weights: load it unquantised.")
    merge = None if is_merged(model) else getattr(model, "merge_adapter", None)
    with restored(weights), torch.no_grad():
        if merge is not None:
            merge()
        try:
            errors = []
            for weight in weights:
                rounded = round_to_nearest(weight, bits)
                errors.append(float((rounded - weight).norm() / weight.norm()))
                weight.copy_(rounded)
            yield mean(errors)
        finally:
            if merge is not None:
                model.unmerge_adapter()


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """The nearest of 2^bits - 1 values, evenly spaced about 0 up to the largest magnitude of each row: `[out, in]`."""
    largest = 2 ** (bits - 1) - 1
    step = weight.abs().amax(dim=1, keepdim=True) / largest
    step = torch.where(step > 0, step, 1)  # a row of zeros stays as it is
    return (weight / step).round().clamp(-largest, largest) * step
