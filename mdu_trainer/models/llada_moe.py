"""LLaDA-MoE (inclusionAI/LLaDA-MoE-7B-A1B) on transformers' Qwen3-MoE.

The published model is a Qwen3-MoE that attends in both directions: RMSNorm on each head's queries and keys, a softmax
router whose top weights are not renormalized, no shared expert, no biases. Tensor names are the same.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from ..files import UserError
from .published import PublishedConfigMixin, PublishedModelMixin, refuse_values, register_model

MASK_TOKEN = "<|mask|>"
ARCHITECTURES = ("LLaDAMoEModelLM", "LLaDAMoEModel")

# Options of the published code, and their values that a Qwen3-MoE can follow
REQUIRED = {
    "is_causal": (False,),
    "qk_layernorm": (True,),
    "shared_expert_intermediate_size": (None,),
    "moe_router_enable_expert_bias": (False, None),
    "moe_router_score_function": ("softmax", None),
    "partial_rotary_factor": (1, 1.0),
    "clip_qkv": (None,),
    "norm_topk_prob": (False, None),
}


def is_llada_moe(config: dict[str, Any]) -> bool:
    """Whether a config.json with `model_type: "llada"` is the mixture of experts."""
    return any(name in ARCHITECTURES for name in config.get("architectures") or ())


@strict
class LLaDAMoEConfig(PublishedConfigMixin, Qwen3MoeConfig):
    """A LLaDA-MoE config.json, read into Qwen3-MoE's attributes and written back under the published keys.

    Raises:
        ValueError: a value asks for another architecture (a shared expert, dense layers, an expert bias, ...).
    """

    model_type = "llada"
    is_causal: ClassVar[bool] = False
    not_published = (
        "is_causal",
        "decoder_sparse_step",
        "intermediate_size",
        "mlp_only_layers",
        "sliding_window",
        "use_sliding_window",
    )
    published_as_null = ("rope_scaling",)
    attribute_map = {"num_experts": "num_local_experts", "expert_intermediate_size": "moe_intermediate_size"}

    vocab_size: int = 157184
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    use_cache: bool = False
    moe_intermediate_size: int = 1024
    num_experts: int = 64
    norm_topk_prob: bool | None = None
    mask_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_values("LLaDA-MoE", REQUIRED, kwargs | {"norm_topk_prob": self.norm_topk_prob})
        sparse = kwargs.get("moe_layer_freq") or ()
        if any(flag != 1 for flag in sparse):
            raise UserError(
                f"This LLaDA-MoE config has dense layers, which are not supported: moe_layer_freq={sparse}."
            )
        if kwargs.get("expert_intermediate_size") is not None:
            self.moe_intermediate_size = kwargs.pop("expert_intermediate_size")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.architectures = self.architectures or list(ARCHITECTURES[:1])
        super().__post_init__(**kwargs)


class LLaDAMoEModelLM(PublishedModelMixin, Qwen3MoeForCausalLM):
    """LLaDA-MoE Base and Instruct. Logits `[B, L, V]`, in which position i predicts token i."""

    config_class = LLaDAMoEConfig


# AutoConfig knows one class a model_type: LLaDAConfig.from_dict hands these configs over
register_model(LLaDAMoEConfig, LLaDAMoEModelLM)
register_checkpoint_conversion_mapping(
    "LLaDAMoEModelLM", get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True
)
