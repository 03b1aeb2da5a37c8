"""How far a model's weights are from the base's, and the forget loss on the straight line between the two.

Published work finds that both predict how easily relearning brings back what was forgotten (Siddiqui et al., arXiv
2505.22310): a model close to the base, with no barrier of the loss on the way back, hides what it knows. Adapters
count as merged.
"""

from functools import partial

import torch
from torch import Tensor, nn

from .base import Target
from .changes import merged_adapters, restored
from .membership import masked_log_p
from .results import WeightPath

POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the way from the unlearned model to the base


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's weights on the CPU, adapters merged, by their names without adapters.

    There are none of a model that holds some in whole numbers.
    """
    if not _is_floating(model):
        return {}
    with merged_adapters(model):
        return {name: p.detach().to("cpu", copy=True) for name, p in _parameters(model).items()}


def weight_path(target: Target, base: dict[str, Tensor], seed: int) -> WeightPath | None:
    """Return the distance and the losses, the model left as it was.

    Args:
        target: the unlearned model and its rows.
        base: as `weights_of` returns it.
        seed: of the masks.

    Returns:
        None where the two models do not have the same weights, as after pruning, or hold some in whole numbers.
    """
    own = _parameters(target.model)
    same = own.keys() == base.keys() and all(own[name].shape == base[name].shape for name in own)
    if not same or not _is_floating(target.model):
        return None
    with merged_adapters(target.model):
        moved = sum(float((p.detach().cpu().double() - base[name].double()).square().sum()) for name, p in own.items())
        whole = sum(float(value.double().square().sum()) for value in base.values())
        losses = target.share([partial(_loss_at, target, base, at, seed) for at in POINTS])
    return WeightPath((moved / whole) ** 0.5, {f"{at:g}": loss for at, loss in zip(POINTS, losses, strict=True)})


def _loss_at(target: Target, base: dict[str, Tensor], at: float, seed: int) -> float:
    """Return the mean loss a masked token of the forget rows, in nats, so far on the way to the base."""
    own = _parameters(target.model)
    with restored(list(own.values())):
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(p.float().lerp(base[name].to(p.device).float(), at))
        return -float(masked_log_p(target, target.questions, seed, draws=1).mean())


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by the names that they have without PEFT, and without those of adapters."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for name, p in model.named_parameters()
        if "lora_" not in name
    }


def _is_floating(model: nn.Module) -> bool:
    """Whether no weight is quantised, which would be lost in merging and moving."""
    return all(p.is_floating_point() for p in model.parameters())
