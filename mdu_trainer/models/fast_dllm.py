"""Fast-dLLM v2 (Efficient-Large-Model/Fast_dLLM_v2_1.5B, _7B, arXiv 2509.26328) on transformers' Qwen2.

The published model is a Qwen2.5 that attends between blocks, under Qwen2's own tensor names. It was adapted from a
causal model and still predicts token i at position i - 1. It decodes a block in sub-blocks of 8 tokens.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from .block_attention import BlockConfigMixin, BlockModelMixin
from .dream import REQUIRED
from .published import refuse_values, register_model

MASK_TOKEN = "|<MASK>|"


@strict
class Fast_dLLM_QwenConfig(BlockConfigMixin, Qwen2Config):
    """A Fast-dLLM v2 config.json: Qwen2's keys and a block size, `bd_size`.

    Raises:
        ValueError: a value asks for another architecture, or the block size is none.
    """

    model_type = "Fast_dLLM_Qwen"
    is_causal: ClassVar[bool] = False
    published_as_null = ("rope_scaling",)
    published_block_size = 32
    attribute_map = {"bd_size": "block_size"}

    use_cache: bool = False
    mask_token_id: int | None = None
    block_size: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        chosen = {"hidden_act": self.hidden_act, "use_sliding_window": self.use_sliding_window}
        refuse_values("Fast-dLLM", REQUIRED, kwargs | chosen)
        self.check_block_size(kwargs)
        super().__post_init__(**kwargs)


class Fast_dLLM_QwenForCausalLM(BlockModelMixin, Qwen2ForCausalLM):
    """Fast-dLLM v2, and whatever was trained from it.

    `forward(input_ids, attention_mask)` gives logits `[B, L, V]` as the published model does: token i is predicted at
    position i - 1, which `Backbone.logit_shift` tells the rest of the package.
    """

    config_class = Fast_dLLM_QwenConfig


AutoConfig.register("Fast_dLLM_Qwen", Fast_dLLM_QwenConfig)
register_model(Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM)
AutoTokenizer.register(Fast_dLLM_QwenConfig, tokenizer_class=Qwen2Tokenizer)
