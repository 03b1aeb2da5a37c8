"""Models that look like masked diffusion models and are not, and adapters that do not suit them, refused by name; and
layers that are split over devices."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..files import UserError

if TYPE_CHECKING:
    from peft import PeftConfig

SUPPORTED = {  # of the last of those below, the ones that are native here
    "sdar",
    "sdarforcausallm",
    "llada2moe",
    "llada21moe",
    "llada2moemodellm",
    "fastdllmqwen",
    "fastdllmqwenforcausallm",
}
EDITS = (
    "deletes and inserts tokens while it decodes. Here each token keeps its place, in training and in scores, so edit "
    "operations are not supported"
)
# Beginnings of model types and architectures, without case and punctuation, and why they are refused
REASONS = {
    ("llada22",): EDITS,
    ("llada2", "sdar", "fastdllm", "bd3lm"): (
        "attends causally between blocks and in both directions within one, and is none of the block-wise models that "
        "are known here. A forward of another kind would compute something it was never trained for, so it is not "
        "supported"
    ),
    ("diffusiongemma",): (
        "is a diffusion model without a mask token: there is no masked position to predict, so it is not supported"
    ),
}

SPLITS = ("distributed_config", "tp_plan", "tp_size")  # options of `from_pretrained`


def refuse_unsupported(model_type: str | None, architectures: list[str] | None, source: str = "") -> None:
    """Raise a ValueError that says why, if the model is of a kind that is known and not supported.

    Args:
        model_type, architectures: as its config says.
        source: where it comes from. LLaDA2.2 has the model_type of those before it, and goes by its name.
    """
    if model_type is not None and model_type.startswith("llada2") and re.search(r"llada[-_]?2\.2", source.lower()):
        raise UserError(f"{source} {EDITS}.")
    for name in (model_type or "", *(architectures or [])):
        plain = re.sub(r"[^a-z0-9]", "", name.lower())
        for beginnings, reason in REASONS.items():
            if plain.startswith(beginnings) and plain not in SUPPORTED:
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


def refuse_blocks(config: Any, keys: tuple[str, ...]) -> None:
    """Raise a ValueError if a model whose tokens all see each other names a block size.

    Args:
        config: of a model that has no blocks here.
        keys: names that a block size goes by. Fields of the config's own class stand for something else (BigBird).
    """
    own = getattr(type(config), "__dataclass_fields__", {})
    for key in keys:
        if key not in own and getattr(config, key, None) is not None:
            raise UserError(
                f"The config (model_type {config.model_type!r}) says {key}={getattr(config, key)!r}, so the model was "
                "trained to attend between blocks; here every token of this model_type sees every other. If it has no "
                f"blocks, take {key} out of its config.json; if it is a model of blocks, its model_type is wrong."
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
