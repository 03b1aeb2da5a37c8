"""Dream-7B, Dream-Coder and DiffuCoder (Ye et al., 2025, arXiv 2508.15487) on transformers' Qwen2.

The published model is a Qwen2 that attends in both directions, under Qwen2's own tensor names. It was adapted from a
causal model and still predicts token i at position i - 1.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from .published import (
    PublishedConfigMixin,
    PublishedModelMixin,
    PublishedTokenizerMixin,
    refuse_values,
    register_model,
)

MASK_TOKEN = "<|mask|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REQUIRED = {
    "is_causal": (False,),
    "use_mrope": (False, None),
    "hidden_act": ("silu",),
    "use_sliding_window": (False, None),
}


@strict
class DreamConfig(PublishedConfigMixin, Qwen2Config):
    """A Dream config.json: Qwen2's keys and a mask token.

    Raises:
        ValueError: a value asks for another architecture (a sliding window, multimodal rotary embeddings, ...).
    """

    model_type = "Dream"
    is_causal: ClassVar[bool] = False
    not_published = ("is_causal", "layer_types")
    published_as_null = ("rope_scaling",)

    vocab_size: int = 152064
    use_cache: bool = False
    mask_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        chosen = {"hidden_act": self.hidden_act, "use_sliding_window": self.use_sliding_window}
        refuse_values("Dream", REQUIRED, kwargs | chosen)
        super().__post_init__(**kwargs)


class DreamModel(PublishedModelMixin, Qwen2ForCausalLM):
    """Dream-v0 Base and Instruct, Dream-Coder and DiffuCoder, and whatever was trained from them.

    `forward(input_ids, attention_mask)` gives logits `[B, L, V]` as the published model does: token i is predicted at
    position i - 1, which `Backbone.logit_shift` tells the rest of the package.
    """

    config_class = DreamConfig


class DreamTokenizer(PublishedTokenizerMixin, Qwen2Tokenizer):
    """The published tokenizer without its remote code, which is Qwen2's over the same vocabulary and merges."""

    published_class = "DreamTokenizer"
    published_vocabulary = True


AutoConfig.register("Dream", DreamConfig)
register_model(DreamConfig, DreamModel)
AutoTokenizer.register(DreamConfig, tokenizer_class=DreamTokenizer)
