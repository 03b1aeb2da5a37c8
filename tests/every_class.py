"""A tiny model of any class that transformers knows, made from its config class alone."""

import copy
import dataclasses

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

VOCABULARY = 64
SIZES = {
    # width of the residual stream
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("true_hidden_size", "intra_bottleneck_size", "d_embed", "entity_emb_size", "d_latents"), 32),
    **dict.fromkeys(("embedding_dim", "dim", "rotary_dim_total", "input_embedding_size"), 32),
    # layers
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "first_k_dense_replace"), 1),
    # heads
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "num_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "d_head", "attention_head_size", "qk_nope_head_dim", "v_head_dim", "dim_head"), 8),
    **dict.fromkeys(
        ("linear_key_head_dim", "linear_value_head_dim", "index_head_dim", "swa_head_dim", "swa_v_head_dim"), 8
    ),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "embedding_size_per_head"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_attention_heads", "swa_num_key_value_heads"), 4),
    # the rest
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "rel_extent", "ssm_state_size", "hc_lowrank"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
}
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "dff", "d_ff", "dim_ff", "d_inner", "ffn_hidden_size")
LARGEST = 64  # of any other number that sizes a tensor


def tiny_config(config_class: type, **overrides: object) -> PreTrainedConfig:
    """A config of few, small layers. What is nested is made small, too."""
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    names = fields.keys() | getattr(config_class, "attribute_map", {}).keys()
    values = {"use_cache": False} | {name: size for name, size in SIZES.items() if name in names}
    subs = _sub_configs(config_class)
    for name, field in fields.items():
        default = None if field.default is dataclasses.MISSING else field.default
        if name in subs:
            values[name] = tiny_config(subs[name])
        elif name.endswith(("token_id", "token_index")):
            values[name] = {"pad": 0, "bos": 1, "eos": 2}.get(name.split("_")[0], 3)
        elif name in values or not isinstance(default, int) or isinstance(default, bool):
            continue
        elif "vocab" in name:
            values[name] = VOCABULARY
        elif name.endswith(WIDTHS):
            values[name] = 48
        elif default > LARGEST:
            values[name] = LARGEST
    return config_class(**{**values, **overrides})


def _sub_configs(config_class: type) -> dict[str, type]:
    specs = getattr(config_class, "sub_configs_defaults", None) or {}
    classes = {name: spec.config_class for name, spec in specs.items()} | getattr(config_class, "sub_configs", {})
    named = {name: CONFIG_MAPPING[spec.model_type] for name, spec in specs.items() if spec.config_class is AutoConfig}
    return {name: found for name, found in (classes | named).items() if dataclasses.is_dataclass(found)}


def tiny_model(model_class: type, changes: dict[str, object]) -> PreTrainedModel:
    """A model of the class in evaluation mode, its weights drawn wide enough that each token matters."""
    with torch.device("meta"):  # nothing large is made by mistake
        size = sum(p.numel() for p in model_class(tiny_config(model_class.config_class, **changes)).parameters())
    assert size < 1_500_000, f"{size} weights: shrink its config"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = model_class(tiny_config(model_class.config_class, **changes)).eval()
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


def sees_later_tokens(model: PreTrainedModel, input_ids: torch.Tensor) -> bool:
    """Whether the gradient of the logits at position 0 reaches the embedding of a later token.

    Where a model cannot be differentiated so, whether its logits in float64 move when the last token changes.
    """
    embedded = []

    def keep(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()

    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Module):  # Perceiver's are a parameter
        return _moves_in_float64(copy.deepcopy(model), input_ids)
    handle = embedding.register_forward_hook(keep)
    try:
        logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits
        (gradient,) = torch.autograd.grad(logits[0, 0].float().square().sum(), embedded[:1])
        return bool(gradient.reshape(-1, input_ids.shape[1], gradient.shape[-1])[:, 1:].any())
    except Exception:
        handle.remove()
        return _moves_in_float64(copy.deepcopy(model), input_ids)
    finally:
        handle.remove()


@torch.no_grad()
def _moves_in_float64(model: PreTrainedModel, input_ids: torch.Tensor) -> bool:
    other = input_ids.clone()
    other[0, -1] = input_ids[0, 0]
    model = model.double()
    first, second = (model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for ids in (input_ids, other))
    return bool((first[0, 0] - second[0, 0]).abs().max() > 1e-9)
