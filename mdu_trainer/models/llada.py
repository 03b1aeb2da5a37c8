"""LLaDA-8B (Nie et al., 2025, arXiv 2502.09992) on transformers' Llama.

The published model is a Llama that attends in both directions, under other names: no biases, RMSNorm before attention
and MLP, rotary embeddings in the rotate-half form, SwiGLU. Position i predicts token i. Config keys and tensor names
are translated on the way in and back on the way out, so a checkpoint saved here is still in the published layout.
"""

import re
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from .published import (
    PublishedConfigMixin,
    PublishedModelMixin,
    PublishedTokenizerMixin,
    refuse_values,
    register_model,
)

MASK_TOKEN = "<|mdm_mask|>"
# The published template starts the assistant's turn unasked, so a finished conversation would end in an empty one
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# Options of the published code, and their values that a Llama can follow
REQUIRED = {
    "is_causal": (False,),
    "block_type": ("llama",),
    "block_group_size": (1,),
    "activation_type": ("silu",),
    "alibi": (False,),
    "rope": (True,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "bias_for_layer_norm": (False, None),
    "attention_layer_norm": (False,),
    "input_emb_norm": (False,),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "multi_query_attention": (False, None),
    "scale_logits": (False,),
    "residual_dropout": (0.0,),
    "embedding_dropout": (0.0,),
}

# Names of tensors, published and Llama's: from the root, or, with a dot in front, within a layer. In this order on
# load, undone in the opposite order on save. The head must go first: layers have an ff_out, too
NAMES = {
    "model.transformer.ff_out": "lm_head",
    "model.transformer.wte": "model.embed_tokens",
    "model.transformer.ln_f": "model.norm",
    "model.transformer.blocks": "model.layers",
    **{f".{letter}_proj": f".self_attn.{letter}_proj" for letter in "qkv"},
    ".attn_out": ".self_attn.o_proj",
    ".ff_proj": ".mlp.gate_proj",
    ".up_proj": ".mlp.up_proj",
    ".ff_out": ".mlp.down_proj",
    ".attn_norm": ".input_layernorm",
    ".ff_norm": ".post_attention_layernorm",
}


def _pattern(name: str) -> str:
    return ("" if name.startswith(".") else "^") + re.escape(f"{name}.")


@strict
class LLaDAConfig(PublishedConfigMixin, LlamaConfig):
    """A LLaDA config.json, read into Llama's attributes and written back under the published keys.

    Both names work as attributes (`config.d_model`, `config.hidden_size`). `embedding_size`, when set, is the number
    of rows of the embedding and the head. Keys that only the published code reads are kept as they came.

    Raises:
        ValueError: a value asks for another architecture (alibi, another block type, biases, ...).
    """

    model_type = "llada"
    is_causal: ClassVar[bool] = False
    not_published = ("is_causal", "head_dim", "hidden_act", "pretraining_tp", "attention_bias", "mlp_bias")
    attribute_map = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "mlp_hidden_size": "intermediate_size",
        "max_sequence_length": "max_position_embeddings",
        "weight_tying": "tie_word_embeddings",
        "init_std": "initializer_range",
    }

    vocab_size: int = 126464
    intermediate_size: int = 12288
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    use_cache: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    mask_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_values("LLaDA", REQUIRED, kwargs)
        for name in self.attribute_map:
            if kwargs.get(name) is not None:
                setattr(self, name, kwargs[name])
            elif name == "mlp_hidden_size" and kwargs.get("mlp_ratio") is not None:
                self.intermediate_size = kwargs["mlp_ratio"] * self.hidden_size
            kwargs.pop(name, None)
        # The published code sizes both the embedding and the head by this when it is set
        self.vocab_size = kwargs.get("embedding_size") or self.vocab_size
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "LLaDAConfig":
        """LLaDA-MoE publishes the same model_type: its architecture tells it apart."""
        from .llada_moe import LLaDAMoEConfig, is_llada_moe

        owner = LLaDAMoEConfig if is_llada_moe(config_dict) else super()
        return owner.from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The config under the published keys."""
        config = super().to_dict()
        if config.get("embedding_size") is not None:  # follows resize_token_embeddings
            config["embedding_size"] = self.vocab_size
        return config


class LLaDAModelLM(PublishedModelMixin, LlamaForCausalLM):
    """LLaDA-8B Base, Instruct and 1.5, and whatever was trained from them.

    `forward(input_ids, attention_mask)` gives logits `[B, L, V]`, in which position i predicts token i.
    """

    config_class = LLaDAConfig


class LLaDATokenizer(PublishedTokenizerMixin, PreTrainedTokenizerFast):
    """The published tokenizer, saved as it was published."""

    published_class = "PreTrainedTokenizerFast"


AutoConfig.register("llada", LLaDAConfig)
register_model(LLaDAConfig, LLaDAModelLM)
register_checkpoint_conversion_mapping(
    "LLaDAModelLM", [WeightRenaming(_pattern(old), _pattern(new)) for old, new in NAMES.items()], overwrite=True
)
