"""Models that look like masked diffusion models and are not, and adapters that do not suit them, refused by name; and
layers that are split over devices."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..files import UserError

if TYPE_CHECKING:
    from peft import PeftConfig

# Beginnings of model types and architectures, without case and punctuation, and why they are refused
REASONS = {
    ("llada2", "sdar", "fastdllm"): (
        "attends causally between blocks and in both directions within one. A plain bidirectional forward would "
        "compute something it was never trained for, so block-wise models are not supported"
    ),
    ("diffusiongemma",): (
        "is a diffusion model without a mask token: there is no masked position to predict, so it is not supported"
    ),
}

SPLITS = ("distributed_config", "tp_plan", "tp_size")  # options of `from_pretrained`


def refuse_unsupported(model_type: str | None, architectures: list[str] | None) -> None:
    """Raise a ValueError that says why, if the model is of a kind that is known and not supported."""
    for name in (model_type or "", *(architectures or [])):
        plain = re.sub(r"[^a-z0-9]", "", name.lower())
        for beginnings, reason in REASONS.items():
            if plain.startswith(beginnings):
                raise UserError(f"{name} {reason}.")


def refuse_split(model_or_options: Any) -> None:
    """Raise a ValueError that says why, if each layer of a model is, or is to be, split over several devices.

    A model is given, or the keyword arguments of `from_pretrained`.
    """
    if isinstance(model_or_options, Mapping):
        found = [name for name in SPLITS if model_or_options.get(name) is not None]
    else:
        config = getattr(getattr(model_or_options, "config", None), "distributed_config", None)
        found = (
            ["distributed_config"]
            if config is not None or (getattr(model_or_options, "tp_size", None) or 1) > 1
            else []
        )
    if found:
        raise UserError(
            f"{' and '.join(found)}: a model whose layers are split over devices (tensor parallelism) is not "
            "supported. The loss is computed in the head, on masked positions alone, and needs it whole. Leave "
            "it out; DDP, FSDP2 and DeepSpeed share a model out (accelerate launch), and device_map places layers."
        )


def refuse_adapter(config: "PeftConfig") -> None:
    """Raise a ValueError that says why, if an adapter puts virtual tokens before the text (prompt tuning and its kin).

    They shift every row, so predictions would be read at wrong positions, and the first prompt is random, so that the
    model without it is not the model at the start.
    """
    if config.is_prompt_learning:
        raise UserError(
            f"{config.peft_type.value} puts virtual tokens before each row, which a masked diffusion model was not "
            "trained with and which shift the positions that are predicted. It is not supported: use an adapter "
            "inside the layers (LoRA, IA3, OFT, ...)."
        )
