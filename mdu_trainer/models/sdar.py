"""SDAR (JetLM/SDAR-1.7B-Chat, -4B-Chat, -8B-Chat) on transformers' Qwen3.

The published model is a Qwen3 that attends between blocks, under Qwen3's own tensor names. Position i predicts token
i. The block size stands in its config.json, as does the mask token.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoTokenizer, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from .block_attention import BlockConfigMixin, BlockModelMixin
from .published import refuse_values, register_model

REQUIRED = {
    "is_causal": (False,),
    "hidden_act": ("silu",),
    "use_sliding_window": (False, None),
}


@strict
class SDARConfig(BlockConfigMixin, Qwen3Config):
    """An SDAR config.json: Qwen3's keys, a mask token and a block size.

    Raises:
        ValueError: a value asks for another architecture, or the block size is none.
    """

    model_type = "sdar"
    is_causal: ClassVar[bool] = False
    not_published = ("is_causal", "layer_types")
    published_as_null = ("rope_scaling",)
    published_block_size = 4

    use_cache: bool = False
    mask_token_id: int | None = None
    block_size: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        chosen = {"hidden_act": self.hidden_act, "use_sliding_window": self.use_sliding_window}
        refuse_values("SDAR", REQUIRED, kwargs | chosen)
        self.check_block_size(kwargs)
        super().__post_init__(**kwargs)


class SDARForCausalLM(BlockModelMixin, Qwen3ForCausalLM):
    """SDAR Chat, and whatever was trained from it.

    `forward(input_ids, attention_mask)` gives logits `[B, L, V]`, in which position i predicts token i.
    """

    config_class = SDARConfig


AutoConfig.register("sdar", SDARConfig)
register_model(SDARConfig, SDARForCausalLM)
AutoTokenizer.register(SDARConfig, tokenizer_class=Qwen2Tokenizer)
