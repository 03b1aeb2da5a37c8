"""Tiny checkpoints of the block-wise models in the layouts of the published ones, as `published` writes the others."""

import json
from pathlib import Path

import torch
from published import (
    LLADA_MOE_SPECIAL,
    MERGES,
    ROWS,
    added_tokens_decoder,
    byte_vocabulary,
    draw,
    special_ids,
    write,
    write_tokenizer_json,
)
from torch import Tensor

SDAR_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"]
FAST_DLLM_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "|<MASK>|"]
SDAR_IDS, FAST_DLLM_IDS, LLADA2_IDS = map(special_ids, (SDAR_SPECIAL, FAST_DLLM_SPECIAL, LLADA_MOE_SPECIAL))
QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SDAR_CONFIG = {
    "architectures": ["SDARForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_sdar.SDARConfig",
        "AutoModel": "modeling_sdar.SDARForCausalLM",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
    "block_size": 4,
    "bos_token_id": SDAR_IDS["<|endoftext|>"],
    "debug": False,
    "eos_token_id": SDAR_IDS["<|endoftext|>"],
    "fuse_cross_entropy": True,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "mask_token_id": SDAR_IDS["<|MASK|>"],
    "max_position_embeddings": 128,
    "max_window_layers": 28,
    "model_type": "sdar",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": SDAR_IDS["<|endoftext|>"],
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.52.3",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": ROWS,
}

LLADA2_CONFIG = {
    "architectures": ["LLaDA2MoeModelLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
        "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
        "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
    },
    "embedding_dropout": 0.0,
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "max_window_layers": 28,
    "model_type": "llada2_moe",
    "moe_intermediate_size": 16,
    "moe_router_enable_expert_bias": True,
    "n_group": 4,
    "norm_head": False,
    "norm_topk_prob": False,  # which the published code does not read
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "output_router_logits": False,
    "pad_token_id": LLADA2_IDS["<|endoftext|>"],
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 600000,
    "rotary_dim": 8,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "topk_group": 2,
    "transformers_version": "4.52.3",
    "use_bias": False,
    "use_cache": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_sliding_window": False,
    "vocab_size": ROWS,
}

FAST_DLLM_CONFIG = {
    "architectures": ["Fast_dLLM_QwenForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
        "AutoModel": "modeling.Fast_dLLM_QwenModel",
        "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
    },
    "bd_size": 4,
    "bos_token_id": FAST_DLLM_IDS["<|endoftext|>"],
    "eos_token_id": FAST_DLLM_IDS["<|im_end|>"],
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "layer_types": ["full_attention", "full_attention"],
    "max_position_embeddings": 128,
    "max_window_layers": 21,
    "model_type": "Fast_dLLM_Qwen",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "transformers_version": "4.53.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": ROWS,
}

CONFIGS = {"sdar": SDAR_CONFIG, "llada2": LLADA2_CONFIG, "fast_dllm": FAST_DLLM_CONFIG}


def write_sdar(folder: Path, *, shards: int = 1, dtype: torch.dtype = torch.float32, **config) -> dict[str, Tensor]:
    """An SDAR-Chat of 2 layers and blocks of 4; `config` overrides keys of config.json."""
    shapes = {"model.embed_tokens.weight": (ROWS, 32), "model.norm.weight": (32,), "lm_head.weight": (ROWS, 32)}
    for layer in range(2):
        block = f"model.layers.{layer}"
        for name, rows in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32)):
            shapes |= {f"{block}.self_attn.{name}.weight": (rows, 32)}
        shapes |= {f"{block}.self_attn.{name}_norm.weight": (16,) for name in "qk"}
        shapes |= {f"{block}.self_attn.o_proj.weight": (32, 64)} | mlp(f"{block}.mlp", 48)
        shapes |= {f"{block}.{name}.weight": (32,) for name in ("input_layernorm", "post_attention_layernorm")}
    tensors = draw(shapes, dtype)
    write(folder, SDAR_CONFIG | config, tensors, shards, ("configuration_sdar", "modeling_sdar", "tokenization_qwen2"))
    remote = {"auto_map": {"AutoTokenizer": ["tokenization_qwen2.Qwen2Tokenizer", None]}}
    write_qwen_tokenizer(folder, SDAR_SPECIAL, eos_token="<|endoftext|>", **remote)
    return tensors


def write_llada2(folder: Path, *, shards: int = 1, dtype: torch.dtype = torch.float32, **config) -> dict[str, Tensor]:
    """A LLaDA2.0-mini of a dense layer and one of 16 experts in 4 groups; `config` overrides keys of config.json."""
    shapes = {"model.word_embeddings.weight": (ROWS, 32), "model.norm.weight": (32,), "lm_head.weight": (ROWS, 32)}
    for layer in range(2):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.attention.query_key_value.weight": (128, 32), f"{block}.attention.dense.weight": (32, 64)}
        shapes |= {f"{block}.attention.{name}_layernorm.weight": (16,) for name in ("query", "key")}
        shapes |= {f"{block}.{name}.weight": (32,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes |= mlp("model.layers.0.mlp", 48) | mlp("model.layers.1.mlp.shared_experts", 16)
    shapes |= {"model.layers.1.mlp.gate.weight": (16, 32), "model.layers.1.mlp.gate.expert_bias": (16,)}
    for expert in range(16):
        shapes |= mlp(f"model.layers.1.mlp.experts.{expert}", 16)
    tensors = draw(shapes, dtype)
    write(folder, LLADA2_CONFIG | config, tensors, shards, ("configuration_llada2_moe", "modeling_llada2_moe"))
    write_tokenizer_json(folder, LLADA_MOE_SPECIAL, chat_template=None)
    return tensors


def write_fast_dllm(
    folder: Path, *, shards: int = 1, dtype: torch.dtype = torch.float32, **config
) -> dict[str, Tensor]:
    """A Fast_dLLM_v2_1.5B of 2 layers, blocks of 4 and no head of its own; `config` overrides keys of config.json."""
    shapes = {"model.embed_tokens.weight": (ROWS, 32), "model.norm.weight": (32,)}
    for layer in range(2):
        block = f"model.layers.{layer}"
        for name, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16)):
            shapes |= {f"{block}.self_attn.{name}.weight": (rows, 32), f"{block}.self_attn.{name}.bias": (rows,)}
        shapes |= {f"{block}.self_attn.o_proj.weight": (32, 32)} | mlp(f"{block}.mlp", 48)
        shapes |= {f"{block}.{name}.weight": (32,) for name in ("input_layernorm", "post_attention_layernorm")}
    tensors = draw(shapes, dtype)
    write(folder, FAST_DLLM_CONFIG | config, tensors, shards, ("configuration", "modeling"))
    write_qwen_tokenizer(folder, FAST_DLLM_SPECIAL, eos_token="<|im_end|>")
    return tensors


def mlp(path: str, width: int) -> dict[str, tuple[int, int]]:
    """Shapes of a SwiGLU."""
    shapes = {f"{path}.{name}.weight": (width, 32) for name in ("gate_proj", "up_proj")}
    return shapes | {f"{path}.down_proj.weight": (32, width)}


def write_qwen_tokenizer(folder: Path, special: list[str], **settings) -> None:
    """vocab.json, merges.txt and tokenizer_config.json as Qwen ships them, without a mask token."""
    (folder / "vocab.json").write_text(json.dumps(byte_vocabulary(), ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings |= {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added_tokens_decoder(special),
        "additional_special_tokens": special[1:3],
        "bos_token": None,
        "chat_template": QWEN_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


WRITE_BLOCKS = {"sdar": write_sdar, "llada2": write_llada2, "fast_dllm": write_fast_dllm}
