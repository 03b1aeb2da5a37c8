"""Tiny checkpoints in the layouts of the published ones: config keys, tensor names, tokenizer files, remote code.

The remote code raises when it is imported, so a checkpoint that loads has loaded without it. Every function writes one
folder and returns the tensors it wrote, by their published names.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

POISON = "raise RuntimeError('the remote code of a checkpoint was imported')\n"
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "a"), ("i", "n"), ("Ġ", "the")]

# The turns as published, which start the assistant's turn even when they are not asked to
LLADA_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
DREAM_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLADA_SPECIAL = [
    "<|startoftext|>",
    "<|endoftext|>",
    "[CLS]",
    "<|mdm_mask|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
DREAM_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
LLADA_MOE_SPECIAL = ["<|startoftext|>", "<|endoftext|>", "<|role_end|>", "<|mask|>"]


def byte_vocabulary() -> dict[str, int]:
    """Every byte and a few merges, as a byte-level BPE numbers them."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(merge) for merge in MERGES]
    return {token: index for index, token in enumerate(tokens)}


def special_ids(tokens: list[str]) -> dict[str, int]:
    return {token: len(byte_vocabulary()) + index for index, token in enumerate(tokens)}


LLADA_IDS, DREAM_IDS, LLADA_MOE_IDS = map(special_ids, (LLADA_SPECIAL, DREAM_SPECIAL, LLADA_MOE_SPECIAL))
ROWS = 288

LLADA_CONFIG = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        "AutoModel": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 32,
    "embedding_dropout": 0.0,
    "embedding_size": ROWS,
    "eos_token_id": LLADA_IDS["<|endoftext|>"],
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": LLADA_IDS["<|mdm_mask|>"],
    "max_sequence_length": 128,
    "mlp_hidden_size": 48,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "pad_token_id": LLADA_IDS["<|endoftext|>"],
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": ROWS,
    "weight_tying": False,
}

DREAM_CONFIG = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": DREAM_IDS["<|endoftext|>"],
    "eos_token_id": DREAM_IDS["<|endoftext|>"],
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "mask_token_id": DREAM_IDS["<|mask|>"],
    "max_position_embeddings": 128,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": DREAM_IDS["<|endoftext|>"],
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": ROWS,
}

LLADA_MOE_CONFIG = {
    "architectures": ["LLaDAMoEModelLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_lladamoe.LLaDAConfig",
        "AutoModel": "modeling_lladamoe.LLaDAMoEModelLM",
        "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM",
    },
    "clip_qkv": None,
    "dense_intermediate_size": 64,
    "eos_token_id": LLADA_MOE_IDS["<|endoftext|>"],
    "expert_intermediate_size": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "max_position_embeddings": 128,
    "model_type": "llada",
    "moe_layer_freq": [1, 1],
    "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax",
    "norm_topk_prob": None,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "pad_token_id": LLADA_MOE_IDS["<|endoftext|>"],
    "partial_rotary_factor": 1,
    "qk_layernorm": True,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000,
    "routed_scaling_factor": 1,
    "router_aux_loss_coef": 0.01,
    "shared_expert_intermediate_size": None,
    "tie_word_embeddings": False,
    "use_cache": False,
    "vocab_size": ROWS,
}


def write_llada(folder: Path, *, shards: int = 1, dtype: torch.dtype = torch.float32, **config) -> dict[str, Tensor]:
    """A LLaDA-8B-Instruct of 2 layers; `config` overrides keys of config.json."""
    shapes = {
        "model.transformer.wte.weight": (ROWS, 32),
        "model.transformer.ln_f.weight": (32,),
        "model.transformer.ff_out.weight": (ROWS, 32),
    }
    for layer in range(2):
        block = f"model.transformer.blocks.{layer}"
        shapes |= {f"{block}.{name}.weight": (32, 32) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
        shapes |= {f"{block}.{name}.weight": (48, 32) for name in ("ff_proj", "up_proj")}
        shapes |= {f"{block}.ff_out.weight": (32, 48)}
        shapes |= {f"{block}.{name}.weight": (32,) for name in ("attn_norm", "ff_norm")}
    tensors = draw(shapes, dtype)
    write(folder, LLADA_CONFIG | config, tensors, shards, ("configuration_llada", "modeling_llada"))
    write_tokenizer_json(folder, LLADA_SPECIAL, chat_template=LLADA_TEMPLATE, cls_token="[CLS]")
    return tensors


def write_dream(folder: Path, *, shards: int = 1, dtype: torch.dtype = torch.float32, **config) -> dict[str, Tensor]:
    """A Dream-v0-Instruct-7B of 2 layers; `config` overrides keys of config.json."""
    shapes = {"model.embed_tokens.weight": (ROWS, 32), "model.norm.weight": (32,), "lm_head.weight": (ROWS, 32)}
    for layer in range(2):
        block = f"model.layers.{layer}"
        for name, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16)):
            shapes |= {f"{block}.self_attn.{name}.weight": (rows, 32), f"{block}.self_attn.{name}.bias": (rows,)}
        shapes |= {f"{block}.self_attn.o_proj.weight": (32, 32), f"{block}.mlp.down_proj.weight": (32, 48)}
        shapes |= {f"{block}.mlp.{name}.weight": (48, 32) for name in ("gate_proj", "up_proj")}
        shapes |= {f"{block}.{name}.weight": (32,) for name in ("input_layernorm", "post_attention_layernorm")}
    tensors = draw(shapes, dtype)
    write(
        folder, DREAM_CONFIG | config, tensors, shards, ("configuration_dream", "modeling_dream", "tokenization_dream")
    )
    write_dream_tokenizer(folder)
    return tensors


def write_llada_moe(
    folder: Path, *, shards: int = 1, dtype: torch.dtype = torch.float32, **config
) -> dict[str, Tensor]:
    """A LLaDA-MoE-7B-A1B of 2 layers and 4 experts; `config` overrides keys of config.json."""
    shapes = {"model.embed_tokens.weight": (ROWS, 32), "model.norm.weight": (32,), "lm_head.weight": (ROWS, 32)}
    for layer in range(2):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{name}_proj.weight": (32, 32) for name in "qkvo"}
        shapes |= {f"{block}.self_attn.{name}_norm.weight": (8,) for name in "qk"}
        shapes |= {f"{block}.mlp.gate.weight": (4, 32)}
        for expert in range(4):
            path = f"{block}.mlp.experts.{expert}"
            shapes |= {f"{path}.gate_proj.weight": (16, 32), f"{path}.up_proj.weight": (16, 32)}
            shapes |= {f"{path}.down_proj.weight": (32, 16)}
        shapes |= {f"{block}.{name}.weight": (32,) for name in ("input_layernorm", "post_attention_layernorm")}
    tensors = draw(shapes, dtype)
    write(folder, LLADA_MOE_CONFIG | config, tensors, shards, ("configuration_lladamoe", "modeling_lladamoe"))
    write_tokenizer_json(folder, LLADA_MOE_SPECIAL, chat_template=None)
    return tensors


def draw(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights large enough that attention and experts are far from uniform; norms around one."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in sorted(shapes.items()):
        value = torch.randn(shape, generator=generator)
        is_norm = "norm" in name or "ln_f" in name
        tensors[name] = (1 + 0.1 * value if is_norm else 0.2 * value).to(dtype)
    return tensors


def write(folder: Path, config: dict, tensors: dict[str, Tensor], shards: int, modules: tuple[str, ...]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"torch_dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch.")} | config
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for module in modules:
        (folder / f"{module}.py").write_text(POISON)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    files = {name: f"model-{index % shards + 1:05d}-of-{shards:05d}.safetensors" for index, name in enumerate(tensors)}
    for file in sorted(set(files.values())):
        part = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_tokenizer_json(folder: Path, special: list[str], *, chat_template: str | None, **settings) -> None:
    """tokenizer.json and tokenizer_config.json as LLaDA ships them, without a mask token."""
    tokenizer = Tokenizer(models.BPE(vocab=byte_vocabulary(), merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings |= {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": added_tokens_decoder(special),
        "bos_token": special[0],
        "eos_token": special[1],
        "pad_token": special[1],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "trust_remote_code": True,
    }
    if chat_template:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def write_dream_tokenizer(folder: Path) -> None:
    """vocab.json, merges.txt and tokenizer_config.json as Dream ships them; the tokenizer class is remote code."""
    (folder / "vocab.json").write_text(json.dumps(byte_vocabulary(), ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added_tokens_decoder(DREAM_SPECIAL),
        "additional_special_tokens": DREAM_SPECIAL[1:],
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": "<|beginoftext|>",
        "chat_template": DREAM_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "mask_token": "<|mask|>",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "DreamTokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def added_tokens_decoder(special: list[str]) -> dict[str, dict]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {str(index): {"content": token, **flags} for token, index in special_ids(special).items()}


WRITE = {"llada": write_llada, "dream": write_dream, "llada_moe": write_llada_moe}


class Shifted(nn.Module):
    """A model that predicts token i from position i - 1, as Dream does, with the logits of another."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask):
        logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
        return (torch.cat([logits[:, 1:], logits[:, -1:]], dim=1),)
