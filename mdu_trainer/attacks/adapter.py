"""Take the adapter off: what LoRA made a model forget, its base still knows, and whoever holds both can have it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..files import UserError
from .base import AttackScores, Target, worst_case
from .changes import is_merged

SCALES = (0.5, 2.0, -1.0)  # of what the adapter adds; -1 subtracts it


def attack(target: Target, seed: int) -> AttackScores:
    """Return the best score with the adapter switched off, scaled, and subtracted. Nothing is random.

    Raises:
        ValueError: for a model without a PEFT adapter, or one that is merged into its weights.
    """
    model = target.model
    if not hasattr(model, "disable_adapter"):
        raise UserError("The attack 'adapter' needs a PEFT model, and this one has no adapter: leave the attack out.")
    if is_merged(model):
        raise UserError("The adapter is merged into the weights: call unmerge_adapter first.")
    tries = {}
    with model.disable_adapter():
        tries["off"] = target.ask()
    for scale in SCALES:
        with _scaled(model, scale):
            tries[f"{scale:g}"] = target.ask()
    return worst_case(target, tries)


@contextmanager
def _scaled(model: nn.Module, scale: float) -> Iterator[None]:
    """Multiply what LoRA adds to each layer."""
    layers = [module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict)]
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update({name: scale * value for name, value in layer.scaling.items()})
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
