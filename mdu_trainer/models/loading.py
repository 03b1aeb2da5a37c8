"""Load any supported model and its tokenizer by name or path."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..files import UserError
from . import dream, llada, llada_moe
from .backbone import backbone_name
from .refusals import refuse_unsupported

if TYPE_CHECKING:  # imported where it is used, for it takes a second
    from peft import PeftModel

NATIVE = ("llada", "Dream")
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
MASK_TOKENS = {"llada": llada.MASK_TOKEN, "llada_moe": llada_moe.MASK_TOKEN, "dream": dream.MASK_TOKEN}


def load_model(
    name_or_path: str, *, trust_remote_code: bool = False, **from_pretrained_kwargs: Any
) -> PreTrainedModel:
    """Load a masked diffusion language model of any supported kind.

    LLaDA, LLaDA-MoE and Dream load as the native classes, a *ForMaskedLM as itself, a decoder whose config says
    `is_causal=False` with its language-model head. Anything else needs the code shipped with the checkpoint.

    Args:
        name_or_path: a Hub id or a directory.
        trust_remote_code: run the checkpoint's own code, where no class here or in transformers knows the model.
        **from_pretrained_kwargs: `dtype`, `device_map`, `attn_implementation`, `quantization_config`, `revision`, ...;
            also `load_in_8bit` or `load_in_4bit`.

    Raises:
        ValueError: the model is causal, refused by name, or needs `trust_remote_code=True`.
        ImportError: 8- or 4-bit loading without bitsandbytes.
    """
    from_pretrained_kwargs = _quantization(from_pretrained_kwargs)
    hub_arguments = {name: from_pretrained_kwargs[name] for name in HUB_ARGUMENTS if name in from_pretrained_kwargs}
    config = from_pretrained_kwargs.pop("config", None)
    config = config or load_config(name_or_path, trust_remote_code=trust_remote_code, **hub_arguments)
    auto_class, remote = _auto_class(config, trust_remote_code)
    model = auto_class.from_pretrained(name_or_path, config=config, trust_remote_code=remote, **from_pretrained_kwargs)
    model.config.use_cache = False
    return model


def load_tokenizer(
    name_or_path: str, *, trust_remote_code: bool = False, **from_pretrained_kwargs: Any
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a masked diffusion language model.

    LLaDA's and Dream's need no remote code. What they leave unset is set: the mask token, and a chat template that
    renders the published turns and starts the assistant's only when asked to.

    Args:
        name_or_path: a Hub id or a directory.
        trust_remote_code: run the tokenizer code shipped with the checkpoint, of models that are not native.
        **from_pretrained_kwargs: as `AutoTokenizer.from_pretrained` takes them.
    """
    hub_arguments = {name: from_pretrained_kwargs[name] for name in HUB_ARGUMENTS if name in from_pretrained_kwargs}
    try:
        raw, _ = PreTrainedConfig.get_config_dict(name_or_path, **hub_arguments)
    except OSError:  # a directory that holds a tokenizer alone
        raw = {}
    family = _native_family(raw)
    if family in ("llada", "llada_moe"):
        tokenizer = llada.LLaDATokenizer.from_pretrained(name_or_path, **from_pretrained_kwargs)
    elif family == "dream":
        tokenizer = dream.DreamTokenizer.from_pretrained(name_or_path, **from_pretrained_kwargs)
    else:
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_path, trust_remote_code=trust_remote_code, **from_pretrained_kwargs
        )
    _complete(tokenizer, family, raw.get("mask_token_id"))
    return tokenizer


def load_checkpoint(
    name_or_path: str, *, trust_remote_code: bool = False, revision: str | None = None, **from_pretrained_kwargs: Any
) -> tuple["PreTrainedModel | PeftModel", PreTrainedTokenizerBase]:
    """Load a model and its tokenizer. A folder that holds an adapter loads with its base.

    Args:
        name_or_path: a Hub id, or a directory of a model or an adapter.
        trust_remote_code: as in `load_model` and `load_tokenizer`.
        revision: of a model on the Hub; of an adapter's base.
        **from_pretrained_kwargs: for `load_model`.
    """
    name = base_of(name_or_path)
    shared = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    model = load_model(name, **shared, **from_pretrained_kwargs)
    if name != name_or_path:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, name_or_path)
    return model, load_tokenizer(name, **shared)


def base_of(name_or_path: str) -> str:
    """The base of a folder that holds an adapter; otherwise the name or path as it is."""
    if not is_adapter(name_or_path):
        return name_or_path
    from peft import PeftConfig

    return PeftConfig.from_pretrained(name_or_path).base_model_name_or_path


def is_adapter(name_or_path: str) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(name_or_path) / "adapter_config.json").is_file()


def _native_family(raw_config: dict[str, Any]) -> str | None:
    if raw_config.get("model_type") == "llada":
        return "llada_moe" if llada_moe.is_llada_moe(raw_config) else "llada"
    return "dream" if raw_config.get("model_type") == "Dream" else None


def _complete(tokenizer: PreTrainedTokenizerBase, family: str | None, mask_token_id: int | None) -> None:
    vocabulary = tokenizer.get_vocab()
    if tokenizer.mask_token is None:
        by_id = None if mask_token_id is None else tokenizer.convert_ids_to_tokens(mask_token_id)
        mask_token = by_id or MASK_TOKENS.get(family)
        if mask_token in vocabulary:
            tokenizer.mask_token = mask_token
    template = tokenizer.chat_template
    if family == "llada" and "<|start_header_id|>" in vocabulary and "add_generation_prompt" not in str(template):
        tokenizer.chat_template = llada.CHAT_TEMPLATE
    if family == "dream" and "<|im_start|>" in vocabulary and template is None:
        tokenizer.chat_template = dream.CHAT_TEMPLATE


def load_config(name_or_path: str, *, trust_remote_code: bool = False, **hub_arguments: Any) -> PreTrainedConfig:
    """The config of a checkpoint, after the refusals that need no more than its config.json.

    Raises:
        ValueError: the model is refused by name, or needs `trust_remote_code=True`.
    """
    raw, _ = PreTrainedConfig.get_config_dict(name_or_path, **hub_arguments)
    model_type = raw.get("model_type")
    refuse_unsupported(model_type, raw.get("architectures"))
    if model_type not in CONFIG_MAPPING and not trust_remote_code:
        advice = (
            "The checkpoint ships its own, which trust_remote_code=True would run"
            if raw.get("auto_map")
            else "The checkpoint ships none either"
        )
        raise UserError(f"{name_or_path}: no code here or in transformers knows model_type {model_type!r}. {advice}.")
    return AutoConfig.from_pretrained(
        name_or_path, trust_remote_code=trust_remote_code and model_type not in NATIVE, **hub_arguments
    )


def _auto_class(config: PreTrainedConfig, trust_remote_code: bool) -> tuple[type, bool]:
    """The auto class that loads a config's model, and whether it runs remote code."""
    auto_map = getattr(config, "auto_map", None) or {}
    if trust_remote_code and config.model_type not in NATIVE:
        for auto_class in (AutoModelForMaskedLM, AutoModelForCausalLM, AutoModel):
            if auto_class.__name__ in auto_map:
                return auto_class, True
    return AutoModelForCausalLM if backbone_name(config) == "bidirectional" else AutoModelForMaskedLM, False


def _quantization(arguments: dict[str, Any]) -> dict[str, Any]:
    """`load_in_8bit` and `load_in_4bit` as the quantization config that transformers takes."""
    arguments = dict(arguments)
    bits = {name: True for name in ("load_in_8bit", "load_in_4bit") if arguments.pop(name, None)}
    if bits or isinstance(arguments.get("quantization_config"), BitsAndBytesConfig):
        if find_spec("bitsandbytes") is None:
            raise ImportError(
                "Loading in 8 or 4 bits needs bitsandbytes, which is not installed: "
                "pip install mdu-trainer[quantization], or load the model in bfloat16 (dtype='bfloat16')."
            )
    if bits:
        arguments["quantization_config"] = BitsAndBytesConfig(**bits)
    return arguments
