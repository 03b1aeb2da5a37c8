"""LLaDA2.0 and LLaDA2.1, mini and flash (inclusionAI/LLaDA2.0-mini, arXiv 2512.15745, 2602.08676) on GLM-4's MoE.

The published model is transformers' GLM-4 mixture of experts that attends between blocks, under other names: RMSNorm
on each head's queries and keys, rotary embeddings on half of each head, no biases, dense layers first, then experts
and one that is always used. Position i predicts token i. Queries, keys and values are one tensor in the checkpoint.

The router, in float32, with s = sigmoid(W h) and a bias b that chooses and does not weigh:

    groups   the topk_group of n_group groups whose two best s + b have the largest sum
    experts  the num_experts_per_tok best s + b within them
    weights  s of these over their sum, times routed_scaling_factor
"""

import re
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoConfig, Glm4MoeConfig, Glm4MoeForCausalLM, PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, Split, WeightConverter, WeightRenaming
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

from ..files import UserError
from . import refusals
from .block_attention import BlockConfigMixin, BlockModelMixin
from .published import refuse_values, register_model

MASK_TOKEN = "<|mask|>"

# Options of the published code, and their values that GLM-4's layers can follow. What that code does not read is not
# here: norm_topk_prob, score_function, router_dtype, moe_router_enable_expert_bias, rotary_dim
REQUIRED = {
    "is_causal": (False,),
    "hidden_act": ("silu",),
    "use_bias": (False, None),
    "use_qkv_bias": (False, None),
    "use_qk_norm": (True, None),
    "norm_head": (False, None),
    "use_sliding_window": (False, None),
}
EDITS = re.compile(r"(delete|insert|split)_token|edit_(token|op)|levenshtein")  # keys of LLaDA2.2 and its kin

# Names of tensors, published and GLM-4's
NAMES = {
    r"^model\.word_embeddings\.": "model.embed_tokens.",
    r"\.attention\.query_layernorm\.": ".self_attn.q_norm.",
    r"\.attention\.key_layernorm\.": ".self_attn.k_norm.",
    r"\.attention\.dense\.": ".self_attn.o_proj.",
}


@strict
class LLaDA2MoeConfig(BlockConfigMixin, Glm4MoeConfig):
    """A LLaDA2 config.json, read into GLM-4's attributes and written back under the published keys.

    Both names work as attributes (`config.num_experts`, `config.n_routed_experts`). Keys that are left out have the
    values of the published code.

    Raises:
        ValueError: a value asks for another architecture (biases, edit operations, ...), experts and groups do not
            fit, or the block size is none.
    """

    model_type = "llada2_moe"
    is_causal: ClassVar[bool] = False
    not_published = ("is_causal", "attention_bias", "num_mtp_layers")
    published_as_null = ("rope_scaling",)
    published_block_size = 32  # of every checkpoint; no config says it
    attribute_map = {
        "num_experts": "n_routed_experts",
        "num_shared_experts": "n_shared_experts",
        "num_local_experts": "n_routed_experts",
    }

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    head_dim: int | None = None
    max_position_embeddings: int = 16384
    use_cache: bool = False
    moe_intermediate_size: int = 512
    n_routed_experts: int = 256
    routed_scaling_factor: float = 2.5
    n_group: int = 8
    topk_group: int = 4
    first_k_dense_replace: int = 0
    norm_topk_prob: bool | None = True
    use_qk_norm: bool | None = True
    num_mtp_layers: int = 0
    mask_token_id: int | None = None
    block_size: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        chosen = {"hidden_act": self.hidden_act, "use_qk_norm": self.use_qk_norm}
        refuse_values("LLaDA2", REQUIRED, kwargs | chosen)
        edits = [key for key in kwargs if EDITS.search(key) and kwargs[key] is not None]
        if edits:
            raise UserError(f"This LLaDA2 config names {edits[0]}: the model {refusals.EDITS}.")
        for name in ("num_experts", "num_shared_experts"):
            if kwargs.get(name) is not None:
                setattr(self, name, kwargs[name])
            kwargs.pop(name, None)
        self.use_qk_norm = True
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads  # 0 stands for all of them
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.check_block_size(kwargs)
        self._check_groups()
        super().__post_init__(**kwargs)

    def _check_groups(self) -> None:
        group = self.n_routed_experts // max(self.n_group, 1)
        if self.n_shared_experts < 1 or self.n_group < 1 or self.n_routed_experts % self.n_group or group < 2:
            fault = "experts must fall into n_group groups of two or more, and one must be shared"
        elif not 1 <= self.topk_group <= self.n_group:
            fault = "topk_group must be from 1 to n_group"
        elif not 1 <= self.num_experts_per_tok <= self.topk_group * group:
            fault = "num_experts_per_tok must be from 1 to the experts of topk_group groups"
        else:
            return
        names = ("num_experts", "num_shared_experts", "n_group", "topk_group", "num_experts_per_tok")
        found = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        raise UserError(f"This LLaDA2 config describes no router: {fault} ({found}). Correct its config.json.")

    def to_dict(self) -> dict[str, Any]:
        """The config under the published keys; the block size, which has none, only where it is another."""
        config = super().to_dict()
        if config.get("block_size") == self.published_block_size:
            del config["block_size"]
        return config


class LLaDA21MoeConfig(LLaDA2MoeConfig):
    """The config of a LLaDA2.1 that goes by a model_type of its own."""

    model_type = "llada21_moe"


class LLaDA2MoeModelLM(BlockModelMixin, Glm4MoeForCausalLM):
    """LLaDA2.0 and LLaDA2.1, and whatever was trained from them.

    `forward(input_ids, attention_mask)` gives logits `[B, L, V]`, in which position i predicts token i.
    """

    config_class = LLaDA2MoeConfig
    _keys_to_ignore_on_load_unexpected = None  # GLM-4's, of layers that LLaDA2 may have

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        for module in self.modules():
            if isinstance(module, Glm4MoeTopkRouter):
                module.norm_topk_prob = True  # whatever the config says: the published code does not read it


class Narrowed(ConversionOps):
    """Reads a tensor as it comes, and writes it in the precision of the model where that loses nothing.

    The router's bias stays in float32 while other weights are narrower. Checkpoints hold it in either.
    """

    def __init__(self, narrow: bool = False) -> None:
        self.narrow = narrow

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        tensors = next(iter(input_dict.values()))
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        if self.narrow:
            narrower = tensor.to(model.dtype)
            tensor = narrower if torch.equal(narrower.to(tensor.dtype), tensor) else tensor
        return {target_patterns[0]: tensor}

    @property
    def reverse_op(self) -> ConversionOps:
        """The other direction."""
        return Narrowed(not self.narrow)


for config_class in (LLaDA2MoeConfig, LLaDA21MoeConfig):
    AutoConfig.register(config_class.model_type, config_class)
    register_model(config_class, LLaDA2MoeModelLM)
register_checkpoint_conversion_mapping(
    "LLaDA2MoeModelLM",
    [
        *(WeightRenaming(old, new) for old, new in NAMES.items()),
        WeightConverter(
            ".attention.query_key_value.weight", [f".self_attn.{letter}_proj.weight" for letter in "qkv"], [Split(0)]
        ),
        WeightConverter(".gate.expert_bias", ".gate.e_score_correction_bias", [Narrowed()]),
        *(get_checkpoint_conversion_mapping("glm4_moe") or ()),
    ],
    overwrite=True,
)
