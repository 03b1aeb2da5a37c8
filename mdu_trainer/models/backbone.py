"""The facts of a masked diffusion language model that the rest of the package asks for and never guesses."""

import copy
import re
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from ..files import UserError
from .block_attention import BLOCK_SIZE_KEYS, BlockConfigMixin, block_size_of
from .dream import DreamConfig
from .fast_dllm import Fast_dLLM_QwenConfig
from .head import Clean
from .llada import LLaDAConfig
from .llada2 import LLaDA2MoeConfig
from .llada_moe import LLaDAMoEConfig
from .probe import attends_both_ways
from .refusals import refuse_adapter, refuse_blocks, refuse_unsupported
from .sdar import SDARConfig

END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|role_end|>")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LINEAR = (nn.Linear, Conv1D)  # what PEFT knows of both; GPT-2 has the latter
# The classes here, the name of each, and its layers. Experts are stacked tensors, not linear layers
NATIVE: dict[type, tuple[str, list[str], str]] = {
    LLaDAMoEConfig: ("llada_moe", ATTENTION, "Qwen3MoeDecoderLayer"),
    LLaDAConfig: ("llada", ATTENTION + MLP, "LlamaDecoderLayer"),
    DreamConfig: ("dream", ATTENTION + MLP, "Qwen2DecoderLayer"),
    SDARConfig: ("sdar", ATTENTION + MLP, "Qwen3DecoderLayer"),
    LLaDA2MoeConfig: ("llada2", ATTENTION + MLP, "Glm4MoeDecoderLayer"),
    Fast_dLLM_QwenConfig: ("fast_dllm", ATTENTION + MLP, "Qwen2DecoderLayer"),
}
SHIFTED = ("dream", "fast_dllm")  # token i is predicted at position i - 1
LOAD_TOGETHER = "One belongs to another checkpoint: load both from the same place, or correct the wrong one."
MASKED_LM = frozenset(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())  # XLM's and FlauBERT's names do not say so


@dataclass(frozen=True)
class Backbone:
    """The facts of a checkpoint, as its config and tokenizer say.

    Attributes:
        name: "llada", "llada_moe", "dream", "sdar", "llada2", "fast_dllm", "masked_lm" (a *ForMaskedLM),
            "bidirectional" (a decoder that attends in both directions, as its config says by `is_causal=False`) or
            "remote" (code shipped with the checkpoint).
        mask_token_id: the token that stands for a token to predict.
        end_token_ids: tokens that end a response; the first is the one appended in training.
        pad_token_id: fills a batch; always hidden by the attention mask.
        logit_shift: True if token i is predicted at position i - 1 (Dream, Fast-dLLM), False if at position i.
        vocab_size: rows of the embedding; ids in a batch are smaller.
        context_length: the longest sequence the model was made for, None if neither config nor tokenizer says.
        lora_target_modules: for `peft.LoraConfig(target_modules=...)`: the linear layers of attention and MLP, never
            the LM head. None if there are none that PEFT knows.
        layer_class: name of the decoder or encoder layer's class, for FSDP wrapping; None if unknown.
        block_size: tokens of a block, of a model that attends between blocks and in both directions within one; None
            if every token sees every other.
    """

    name: str
    mask_token_id: int
    end_token_ids: tuple[int, ...]
    pad_token_id: int
    logit_shift: bool
    vocab_size: int
    context_length: int | None
    lora_target_modules: str | list[str] | None
    layer_class: str | None
    block_size: int | None = None

    def form(self, clean_ids: torch.Tensor) -> dict[str, Any]:
        """What `measure_at` and `hidden_at` are told of a pass over noisy tokens: the form in which the model learns.

        Args:
            clean_ids: `[B, L]`, x_0, which a block-wise model is shown beside x_t; no other model reads it.
        """
        clean = None if self.block_size is None else Clean(clean_ids, self.block_size)
        return {"logit_shift": self.logit_shift, "clean": clean}


def resolve_backbone(
    model_or_config: PreTrainedModel | PreTrainedConfig | nn.Module, tokenizer: PreTrainedTokenizerBase
) -> Backbone:
    """Find out the `Backbone` of a model or config and its tokenizer.

    Both must agree on the mask token and the pad token; what ends a response, the tokenizer decides. One difference is
    known and harmless: a config that pads with eos beside a tokenizer with a pad token of its own (DiffuCoder), for
    padding is never attended to. A config may say `logit_shift: true` of a model that predicts as Dream does.

    A model is run on a few tokens, once, to see that it attends in both directions; a config is believed.

    Args:
        model_or_config: a transformers model, a PEFT model around one, or a config.
        tokenizer: the tokenizer that goes with it.

    Raises:
        ValueError: the model is causal, of an unsupported kind (or its adapter is), or contradicts its tokenizer; the
            message says what disagrees and what to do.
    """
    model: Any = model_or_config if isinstance(model_or_config, nn.Module) else None
    if hasattr(model, "get_base_model"):
        for adapter in model.peft_config.values():
            refuse_adapter(adapter)
        model = model.get_base_model()
    config = cast(PreTrainedConfig, model_or_config if model is None else model.config)
    name = backbone_name(config, model)
    vocab_size = _vocab_size(config, model)
    _check_vocabulary(tokenizer, vocab_size)
    end_token_ids = _end_token_ids(config, tokenizer, native=isinstance(config, tuple(NATIVE)))
    lora_target_modules, layer_class = _anatomy(name, config, model)
    return Backbone(
        name=name,
        mask_token_id=_mask_token_id(config, tokenizer, vocab_size),
        end_token_ids=end_token_ids,
        pad_token_id=_pad_token_id(name, config, tokenizer, end_token_ids, vocab_size),
        logit_shift=name in SHIFTED or bool(getattr(config, "logit_shift", False)),
        vocab_size=vocab_size,
        context_length=_context_length(name, config, tokenizer),
        lora_target_modules=lora_target_modules,
        layer_class=layer_class,
        block_size=block_size_of(config),
    )


def backbone_name(config: PreTrainedConfig, model: nn.Module | None = None) -> str:
    """Name the kind of masked diffusion model that a config describes, and check the model built from it, if any.

    Raises:
        ValueError: it is causal, or of a kind that is refused by name.
    """
    architectures = [type(model).__name__] if model is not None else list(getattr(config, "architectures", None) or [])
    if not isinstance(config, tuple(NATIVE)):
        refuse_unsupported(config.model_type, architectures)
    name = _claimed_name(config, model, architectures)
    if name not in ("masked_lm", "remote") and not isinstance(config, BlockConfigMixin):
        refuse_blocks(config, BLOCK_SIZE_KEYS)
    both_ways = None if model is None else attends_both_ways(model)
    described = f"{', '.join(architectures) or type(config).__name__} (model_type {config.model_type!r})"
    if both_ways is False and name is not None:
        raise UserError(
            f"{described} is a causal language model, whatever its config says: when a later token was changed, no "
            "earlier prediction was. Its code does not read is_causal. Load a masked diffusion model (LLaDA, Dream, a "
            "*ForMaskedLM), or a decoder that attends in both directions."
        )
    if name is None and getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{described} is an encoder-decoder, whose decoder writes from left to right. Such models are not "
            "supported: load a masked diffusion model (LLaDA, Dream, a *ForMaskedLM)."
        )
    if name is None and not both_ways:
        raise UserError(
            f"{described} is a causal language model: its config does not say is_causal=False, so a masked token "
            "would not see the tokens after it. Load a masked diffusion model (LLaDA, Dream, a *ForMaskedLM), or, if "
            "this checkpoint was adapted to attend in both directions, write "
            '"is_causal": false into its config.json.'
        )
    name = name or "bidirectional"
    if name == "bidirectional":
        _refuse_recurrent(config)
    return name


def _claimed_name(config: PreTrainedConfig, model: nn.Module | None, architectures: list[str]) -> str | None:
    """The kind by class and config alone; None if these speak of a causal model."""
    for config_class, (name, *_) in NATIVE.items():
        if isinstance(config, config_class):
            return name
    if "transformers_modules" in (owner.__module__.split(".")[0] for owner in (type(config), type(model))):
        return "remote"
    if getattr(config, "is_encoder_decoder", False):
        return None
    masked = [name.endswith("ForMaskedLM") or name in MASKED_LM for name in architectures]
    is_decoder = getattr(config, "is_decoder", False) or getattr(config, "causal", False)  # the latter is XLM's
    if (any(masked) or not masked and type(config) in MODEL_FOR_MASKED_LM_MAPPING) and not is_decoder:
        return "masked_lm"
    return "bidirectional" if getattr(config, "is_causal", True) is False else None


def _refuse_recurrent(config: PreTrainedConfig) -> None:
    """Refuse state-space and convolution layers, which stay causal: `is_causal` switches attention alone."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or not hasattr(config, "num_attention_heads"):
        raise UserError(
            f"The config (model_type {config.model_type!r}) says is_causal=False, but its layers that are not "
            f"plain attention ({', '.join(sorted(kinds)) or 'here all'}) stay causal. Such models are not supported."
        )


def _vocab_size(config: PreTrainedConfig, model: PreTrainedModel | None) -> int:
    embedding = model.get_input_embeddings() if model is not None else None
    return getattr(embedding, "num_embeddings", None) or config.get_text_config().vocab_size


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    last = max(tokenizer.get_vocab().values(), default=0)
    mask_token_id = cast("int | None", tokenizer.mask_token_id)
    if last >= vocab_size and (mask_token_id is None or mask_token_id < vocab_size):  # which has its own message
        raise UserError(
            f"The tokenizer has {last + 1} tokens, the embedding {vocab_size} rows: the last tokens have none. "
            f"{LOAD_TOGETHER} After adding tokens, call model.resize_token_embeddings and train the new rows."
        )


def _mask_token_id(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    in_config, in_tokenizer = getattr(config, "mask_token_id", None), cast("int | None", tokenizer.mask_token_id)
    field = getattr(type(config), "__dataclass_fields__", {}).get("mask_token_id")
    if in_tokenizer is not None and field is not None and in_config == field.default:
        in_config = None  # XLM's and FlauBERT's is transformers' own, not the model's
    found: list[int] = [number for number in (in_tokenizer, in_config) if number is not None]
    if not found:
        raise UserError(
            f"The tokenizer ({type(tokenizer).__name__}, {tokenizer.name_or_path!r}) has no mask token and the config "
            "no mask_token_id. A masked diffusion model needs the one it was trained with: set tokenizer.mask_token."
        )
    if found[0] != found[-1]:
        raise UserError(
            f"The config says mask_token_id={in_config}, the tokenizer says {in_tokenizer} "
            f"({tokenizer.mask_token!r}). {LOAD_TOGETHER}"
        )
    mask_token_id = found[0]
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
    eos, sep = cast("int | None", tokenizer.eos_token_id), cast("int | None", tokenizer.sep_token_id)
    # Native configs have no default for eos. Elsewhere the value may be transformers' own, not the model's
    turn_ends = tokenizer.eos_token in END_OF_TURN  # chat models end a turn before the text ends
    if native and eos is not None and in_config and eos not in in_config and not turn_ends:
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
    if not ends and sep is not None:
        ends.append(sep)
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
    in_config, in_tokenizer = getattr(config, "pad_token_id", None), cast("int | None", tokenizer.pad_token_id)
    if in_tokenizer is None:  # -1 stands for none in old configs
        return in_config if in_config is not None and 0 <= in_config < vocab_size else end_token_ids[-1]
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


def _anatomy(
    name: str, config: PreTrainedConfig, model: nn.Module | None
) -> tuple[str | list[str] | None, str | None]:
    """`lora_target_modules` and `layer_class` of a `Backbone`."""
    for native, targets, layer_class in NATIVE.values():
        if name == native:
            return targets, layer_class
    if name == "remote":
        no_split = getattr(model, "_no_split_modules", None)
        return "all-linear", next(iter(no_split), None) if no_split else None
    mapping = MODEL_FOR_MASKED_LM_MAPPING if name == "masked_lm" else MODEL_FOR_CAUSAL_LM_MAPPING
    model_class = cast("type[PreTrainedModel]", type(model) if model is not None else mapping[type(config)])
    # A skeleton without memory: the live model's linear layers may already be wrapped by adapters or quantization
    try:
        with torch.device("meta"):
            skeleton = model_class(copy.deepcopy(config))
    except Exception as error:
        raise UserError(
            f"No {model_class.__name__} can be built from this config: {' '.join(str(error).split()) or error!r}. "
            "Correct its config.json."
        ) from None
    lists = {
        path: part
        for path, part in skeleton.named_modules()
        if isinstance(part, nn.ModuleList) and any(isinstance(layer, LINEAR) for layer in part.modules())
    }
    if not lists:
        return None, None
    first, parent = next(iter(lists.values())), next(iter(lists)).rpartition(".")[0]
    # XLM keeps attention and MLP in two lists side by side
    beside = {path: part for path, part in lists.items() if path.rpartition(".")[0] == parent}
    patterns = []
    for path, part in beside.items():
        linear = (name.rpartition(".")[2] for name, layer in part.named_modules() if isinstance(layer, LINEAR))
        patterns.append(rf"{re.escape(path)}\.\d+\.(?:.*\.)?(?:{'|'.join(dict.fromkeys(linear))})")
    layer = first[0]
    while isinstance(layer, nn.ModuleList):  # Funnel's layers stand in blocks
        layer = layer[0]
    return "|".join(patterns), type(layer).__name__


def target_modules_of(backbone: Backbone, layers: int | list[int] | None = None) -> str | list[str] | None:
    """`lora_target_modules` for some of the layers.

    PEFT reads `layers_to_transform` beside a list of names only, and refuses to load it beside a pattern. So the
    numbers go into the pattern, and have to leave the config.
    """
    if layers is None or not isinstance(backbone.lora_target_modules, str):
        return backbone.lora_target_modules
    numbers = "|".join(str(number) for number in ([layers] if isinstance(layers, int) else layers))
    return backbone.lora_target_modules.replace(r"\.\d+\.", rf"\.(?:{numbers})\.")
