"""The facts of a masked diffusion language model that the rest of the package asks for and never guesses."""

import copy
import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..files import UserError
from .dream import DreamConfig
from .llada import LLaDAConfig
from .llada_moe import LLaDAMoEConfig
from .refusals import refuse_unsupported

END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|role_end|>")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LOAD_TOGETHER = "One belongs to another checkpoint: load both from the same place, or correct the wrong one."


@dataclass(frozen=True)
class Backbone:
    """What a checkpoint is, as its config and tokenizer say.

    Attributes:
        name: "llada", "llada_moe", "dream", "masked_lm" (a *ForMaskedLM), "bidirectional" (a decoder whose config says
            `is_causal=False`) or "remote" (code shipped with the checkpoint).
        mask_token_id: the token that stands for a token to predict.
        end_token_ids: tokens that end a response; the first is the one appended in training.
        pad_token_id: fills a batch; always hidden by the attention mask.
        logit_shift: True if token i is predicted at position i - 1 (Dream), False if at position i.
        vocab_size: rows of the embedding; ids in a batch are smaller.
        context_length: the longest sequence the model was made for, None if neither config nor tokenizer says.
        lora_target_modules: for `peft.LoraConfig(target_modules=...)`: the linear layers of attention and MLP, never
            the LM head.
        layer_class: name of the decoder or encoder layer's class, for FSDP wrapping; None if unknown.
    """

    name: str
    mask_token_id: int
    end_token_ids: tuple[int, ...]
    pad_token_id: int
    logit_shift: bool
    vocab_size: int
    context_length: int | None
    lora_target_modules: str | list[str]
    layer_class: str | None


def resolve_backbone(
    model_or_config: PreTrainedModel | PreTrainedConfig | nn.Module, tokenizer: PreTrainedTokenizerBase
) -> Backbone:
    """The `Backbone` of a model or config and its tokenizer.

    Both must agree on the mask token and the pad token; what ends a response, the tokenizer decides. One difference is
    known and harmless: a config that pads with eos beside a tokenizer with a pad token of its own (DiffuCoder), for
    padding is never attended to. A config may say `logit_shift: true` of a model that predicts as Dream does.

    Args:
        model_or_config: a transformers model, a PEFT model around one, or a config.
        tokenizer: the tokenizer that goes with it.

    Raises:
        ValueError: the model is causal, of an unsupported kind, or contradicts its tokenizer; the message says what
            disagrees and what to do.
    """
    model = model_or_config if isinstance(model_or_config, nn.Module) else None
    if model is not None and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    config = model_or_config if model is None else model.config
    name = backbone_name(config, type(model) if model is not None else None)
    vocab_size = _vocab_size(config, model)
    end_token_ids = _end_token_ids(config, tokenizer, native=name in ("llada", "llada_moe", "dream"))
    lora_target_modules, layer_class = _anatomy(name, config, model)
    return Backbone(
        name=name,
        mask_token_id=_mask_token_id(config, tokenizer, vocab_size),
        end_token_ids=end_token_ids,
        pad_token_id=_pad_token_id(name, config, tokenizer, end_token_ids, vocab_size),
        logit_shift=name == "dream" or bool(getattr(config, "logit_shift", False)),
        vocab_size=vocab_size,
        context_length=_context_length(name, config, tokenizer),
        lora_target_modules=lora_target_modules,
        layer_class=layer_class,
    )


def backbone_name(config: PreTrainedConfig, model_class: type | None = None) -> str:
    """Which kind of masked diffusion model a config (and the class built from it) describes.

    Raises:
        ValueError: it is causal, or of a kind that is refused by name.
    """
    for config_class, name in ((LLaDAMoEConfig, "llada_moe"), (LLaDAConfig, "llada"), (DreamConfig, "dream")):
        if isinstance(config, config_class):
            return name
    architectures = [model_class.__name__] if model_class else list(getattr(config, "architectures", None) or [])
    refuse_unsupported(config.model_type, architectures)
    if any(_is_remote(owner) for owner in (type(config), model_class)):
        return "remote"
    bidirectional_class = any(name.endswith("ForMaskedLM") for name in architectures) or (
        not architectures and type(config) in MODEL_FOR_MASKED_LM_MAPPING
    )
    if bidirectional_class and not getattr(config, "is_decoder", False):
        return "masked_lm"
    if getattr(config, "is_causal", True) is False:
        _refuse_recurrent(config)
        return "bidirectional"
    raise UserError(
        f"{', '.join(architectures) or type(config).__name__} (model_type {config.model_type!r}) is a causal language "
        "model: its config does not say is_causal=False, so a masked token would not see the tokens after it. Load a "
        "masked diffusion model (LLaDA, Dream, a *ForMaskedLM), or, if this checkpoint was adapted to attend in both "
        'directions, write "is_causal": false into its config.json.'
    )


def _refuse_recurrent(config: PreTrainedConfig) -> None:
    """`is_causal` switches attention alone: state-space and convolution layers still read from left to right."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or not hasattr(config, "num_attention_heads"):
        raise UserError(
            f"The config (model_type {config.model_type!r}) says is_causal=False, but its layers that are not "
            f"plain attention ({', '.join(sorted(kinds)) or 'here all'}) stay causal. Such models are not supported."
        )


def _is_remote(owner: type | None) -> bool:
    return owner is not None and owner.__module__.split(".")[0] == "transformers_modules"


def _vocab_size(config: PreTrainedConfig, model: nn.Module | None) -> int:
    embedding = model.get_input_embeddings() if model is not None else None
    return getattr(embedding, "num_embeddings", None) or config.get_text_config().vocab_size


def _mask_token_id(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    in_config = getattr(config, "mask_token_id", None)
    in_tokenizer = tokenizer.mask_token_id
    if in_config is None and in_tokenizer is None:
        raise UserError(
            f"The tokenizer ({type(tokenizer).__name__}, {tokenizer.name_or_path!r}) has no mask token and the config "
            "no mask_token_id. A masked diffusion model needs the one it was trained with: set tokenizer.mask_token."
        )
    if None not in (in_config, in_tokenizer) and in_config != in_tokenizer:
        raise UserError(
            f"The config says mask_token_id={in_config}, the tokenizer says {in_tokenizer} "
            f"({tokenizer.mask_token!r}). {LOAD_TOGETHER}"
        )
    mask_token_id = in_config if in_tokenizer is None else in_tokenizer
    if not 0 <= mask_token_id < vocab_size:
        raise UserError(
            f"The mask token id {mask_token_id} is outside the embedding, which has {vocab_size} rows. The tokenizer "
            "does not fit the model; after adding a token, call model.resize_token_embeddings and train the new row."
        )
    return mask_token_id


def _end_token_ids(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, native: bool) -> tuple[int, ...]:
    vocabulary = tokenizer.get_vocab()
    in_config = getattr(config, "eos_token_id", None)
    in_config = [] if in_config is None else [in_config] if isinstance(in_config, int) else list(in_config)
    eos = tokenizer.eos_token_id
    # Native configs have no default for eos. Elsewhere the value may be transformers' own, not the model's
    if native and eos is not None and in_config and eos not in in_config:
        raise UserError(
            f"The config says eos_token_id={in_config[0]}, the tokenizer says {eos} ({tokenizer.eos_token!r}). "
            f"{LOAD_TOGETHER}"
        )
    turns = [token for token in END_OF_TURN if token in vocabulary]
    turns = [token for token in turns if token in str(tokenizer.chat_template)] or turns
    ends = [vocabulary[token] for token in turns[:1]]
    if eos is not None:
        ends.append(eos)
    elif native:
        ends.extend(in_config)
    if not ends and tokenizer.sep_token_id is not None:
        ends.append(tokenizer.sep_token_id)
    if not ends:
        raise UserError(
            f"The tokenizer ({type(tokenizer).__name__}, {tokenizer.name_or_path!r}) has no end-of-turn, eos or sep "
            "token, so nothing can end a response: set tokenizer.eos_token."
        )
    return tuple(dict.fromkeys(ends))


def _pad_token_id(
    name: str,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: tuple[int, ...],
    vocab_size: int,
) -> int:
    in_config = getattr(config, "pad_token_id", None)
    in_tokenizer = tokenizer.pad_token_id
    if in_tokenizer is None:
        return end_token_ids[-1] if in_config is None else in_config
    if in_tokenizer >= vocab_size:
        raise UserError(
            f"The tokenizer's pad token id {in_tokenizer} ({tokenizer.pad_token!r}) is outside the embedding, which "
            f"has {vocab_size} rows: set tokenizer.pad_token to a token that the model knows."
        )
    if in_config is None or in_config == in_tokenizer:
        return in_tokenizer
    # DiffuCoder: the config pads with eos, the tokenizer has gained a pad token. Both are hidden by the attention mask
    if name != "masked_lm" and in_config in end_token_ids and in_tokenizer not in end_token_ids:
        return in_tokenizer
    raise UserError(
        f"The config says pad_token_id={in_config}, the tokenizer says {in_tokenizer} ({tokenizer.pad_token!r}). "
        f"{LOAD_TOGETHER}"
    )


def _context_length(name: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    # RoBERTa's table has two rows that no token can use; its tokenizer knows. Unset, model_max_length is 1e30
    if name == "masked_lm" and tokenizer.model_max_length < 1e9:
        length = min(filter(None, (length, tokenizer.model_max_length)))
    return length


def _anatomy(name: str, config: PreTrainedConfig, model: nn.Module | None) -> tuple[str | list[str], str | None]:
    if name in ("llada", "dream"):
        return ATTENTION + MLP, "LlamaDecoderLayer" if name == "llada" else "Qwen2DecoderLayer"
    if name == "llada_moe":  # its experts are stacked tensors, not linear layers
        return ATTENTION, "Qwen3MoeDecoderLayer"
    if name == "remote":
        no_split = getattr(model, "_no_split_modules", None)
        return "all-linear", next(iter(no_split), None) if no_split else None
    mapping = MODEL_FOR_MASKED_LM_MAPPING if name == "masked_lm" else MODEL_FOR_CAUSAL_LM_MAPPING
    model_class = type(model) if model is not None else mapping[type(config)]
    # A skeleton without memory: the live model's linear layers may already be wrapped by adapters or quantization
    with torch.device("meta"):
        skeleton = model_class(copy.deepcopy(config))
    path, layers = next(
        (path, module)
        for path, module in skeleton.named_modules()
        if isinstance(module, nn.ModuleList) and any(isinstance(part, nn.Linear) for part in module.modules())
    )
    leaves = dict.fromkeys(
        key.rpartition(".")[2] for key, part in layers.named_modules() if isinstance(part, nn.Linear)
    )
    return rf"{re.escape(path)}\.\d+\.(?:.*\.)?(?:{'|'.join(leaves)})", type(layers[0]).__name__
