"""Models that look like masked diffusion models and are not, refused by name."""

import re

from ..files import UserError

BLOCK_WISE = (
    "attends causally between blocks and in both directions within one. A plain bidirectional forward would compute "
    "something it was never trained for, so block-wise models are not supported"
)
NO_MASK_TOKEN = (
    "is a diffusion model without a mask token: there is no masked position to predict, so it is not supported"
)

# Beginnings of model types and architectures, without case and punctuation
REASONS = {
    "llada2": BLOCK_WISE,
    "sdar": BLOCK_WISE,
    "fastdllm": BLOCK_WISE,
    "diffusiongemma": NO_MASK_TOKEN,
}


def refuse_unsupported(model_type: str | None, architectures: list[str] | None) -> None:
    """Raise a ValueError that says why, if the model is of a kind that is known and not supported."""
    for name in (model_type or "", *(architectures or [])):
        plain = re.sub(r"[^a-z0-9]", "", name.lower())
        for beginning, reason in REASONS.items():
            if plain.startswith(beginning):
                raise UserError(f"{name} {reason}.")
