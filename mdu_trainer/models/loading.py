"""Load any supported model and its tokenizer by name or path, or say in one line why not."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError
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
from . import dream, fast_dllm, llada, llada2, llada_moe
from .backbone import backbone_name, resolve_backbone
from .block_attention import set_block_size
from .checks import INTACT, check_complete, check_files, check_finite, some
from .head import head_way
from .probe import is_runnable
from .refusals import refuse_adapter, refuse_split, refuse_unsupported

if TYPE_CHECKING:  # imported where it is used, for it takes a second
    from peft import PeftConfig, PeftModel

T = TypeVar("T")

FAMILIES = {  # of the classes here, by model_type
    "llada": "llada",
    "Dream": "dream",
    "sdar": "sdar",
    "llada2_moe": "llada2",
    "llada21_moe": "llada2",
    "Fast_dLLM_Qwen": "fast_dllm",
}
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MASK_TOKENS = {
    "llada": llada.MASK_TOKEN,
    "llada_moe": llada_moe.MASK_TOKEN,
    "llada2": llada2.MASK_TOKEN,
    "dream": dream.MASK_TOKEN,
    "fast_dllm": fast_dllm.MASK_TOKEN,
}
TOKENIZERS = {
    "llada": llada.LLaDATokenizer,
    "llada_moe": llada.LLaDATokenizer,
    "llada2": llada.LLaDATokenizer,
    "dream": dream.DreamTokenizer,
}


def load_model(
    name_or_path: str, *, trust_remote_code: bool = False, block_size: int | None = None, **from_pretrained_kwargs: Any
) -> PreTrainedModel:
    """Load a masked diffusion language model of any supported kind.

    LLaDA, LLaDA-MoE, LLaDA2, Dream, SDAR and Fast-dLLM load as the native classes, a *ForMaskedLM as itself, a decoder
    whose config says `is_causal=False` with its language-model head. Anything else needs the code shipped with the
    checkpoint.

    What was loaded is checked: no tensor is missing or left over, all weights are finite, and a token in the middle of
    a short text changes what is predicted before it.

    Args:
        name_or_path: a Hub id or a directory.
        trust_remote_code: run the checkpoint's own code, where no class here or in transformers knows the model.
        block_size: of a block-wise model that was trained with another one than its config says, or with none that it
            says. It stands in the config, and in what is saved, from then on.
        **from_pretrained_kwargs: `dtype`, `device_map`, `attn_implementation`, `quantization_config`, `revision`, ...;
            also `load_in_8bit` or `load_in_4bit`.

    Raises:
        ValueError: the model is causal, refused by name, needs `trust_remote_code=True`, is to be split by layer over
            devices, or its checkpoint is damaged.
        ImportError: 8- or 4-bit loading without bitsandbytes.
    """
    refuse_split(from_pretrained_kwargs)
    from_pretrained_kwargs = _quantization(from_pretrained_kwargs)
    where = {"trust_remote_code": trust_remote_code, **_hub_arguments(from_pretrained_kwargs)}
    config = from_pretrained_kwargs.pop("config", None) or load_config(name_or_path, **where)
    if block_size is not None:
        set_block_size(config, block_size)
    model = _whole_model(name_or_path, config, trust_remote_code, **from_pretrained_kwargs)
    model.config.use_cache = False
    check_finite(model, str(name_or_path))
    backbone_name(model.config, model)
    if is_runnable(model):
        head_way(model)
    return model


def check_tensors(folder: str) -> None:
    """Refuse a model's folder in which tensors are missing or left over. Reads names and shapes only.

    What only code shipped with a checkpoint knows is not checked: that code is not run here.

    Raises:
        ValueError: as in `load_model`.
    """
    if _raw_config(folder).get("model_type") not in CONFIG_MAPPING:
        return
    config = load_config(folder)
    _whole_model(folder, config, trust_remote_code=False, device_map="meta")


def _whole_model(
    name_or_path: str, config: PreTrainedConfig, trust_remote_code: bool, **from_pretrained_kwargs: Any
) -> PreTrainedModel:
    auto_class, remote = _auto_class(config, trust_remote_code)
    check_files(str(name_or_path), **_hub_arguments(from_pretrained_kwargs))
    try:
        loaded = auto_class.from_pretrained(
            name_or_path,
            config=config,
            trust_remote_code=remote,
            output_loading_info=True,
            **from_pretrained_kwargs | {"ignore_mismatched_sizes": True},  # they are refused below, by name
        )
    except SafetensorError as error:
        raise UserError(f"The weights of {name_or_path} cannot be read: {error}. Load an intact checkpoint.") from None
    # code shipped with a checkpoint may have a from_pretrained of its own
    model, info = loaded if isinstance(loaded, tuple) else (loaded, {})
    check_complete(model, info, str(name_or_path))
    return model


def load_tokenizer(
    name_or_path: str, *, trust_remote_code: bool = False, **from_pretrained_kwargs: Any
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a masked diffusion language model.

    Those of the native models need no remote code. What they leave unset is set: the mask token, and a chat template
    that renders the published turns and starts the assistant's only when asked to.

    Args:
        name_or_path: a Hub id or a directory.
        trust_remote_code: run the tokenizer code shipped with the checkpoint, of models that are not native.
        **from_pretrained_kwargs: as `AutoTokenizer.from_pretrained` takes them.

    Raises:
        ValueError: its files cannot be read.
    """
    try:
        raw = _raw_config(name_or_path, **_hub_arguments(from_pretrained_kwargs))
    except OSError:  # a directory that holds a tokenizer alone
        raw = {}
    family = _native_family(raw)
    tokenizer_class = TOKENIZERS.get(family, AutoTokenizer)
    if tokenizer_class is AutoTokenizer:
        from_pretrained_kwargs = from_pretrained_kwargs | {"trust_remote_code": trust_remote_code and not family}
    tokenizer = _explained(
        f"The tokenizer of {name_or_path}",
        lambda: tokenizer_class.from_pretrained(name_or_path, **from_pretrained_kwargs),
    )
    _complete(tokenizer, family, raw.get("mask_token_id"))
    return tokenizer


def load_checkpoint(
    name_or_path: str,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    is_trainable: bool = False,
    **from_pretrained_kwargs: Any,
) -> tuple["PreTrainedModel | PeftModel", PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, which must fit. A folder that holds an adapter loads with its base.

    Args:
        name_or_path: a Hub id, or a directory of a model or an adapter.
        trust_remote_code: as in `load_model` and `load_tokenizer`.
        revision: of a model on the Hub; of an adapter's base.
        is_trainable: whether an adapter is going to be trained on. Without it its weights are frozen.
        **from_pretrained_kwargs: for `load_model`.

    Raises:
        ValueError: as in `load_model`; the adapter is damaged or refused by name; the tokenizer has no mask token, or
            more tokens than the embedding has rows.
    """
    name = base_of(name_or_path)
    shared = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    model = load_model(name, **shared, **from_pretrained_kwargs)
    if name != name_or_path:
        model = _add_adapter(model, name_or_path, is_trainable)
    tokenizer = load_tokenizer(name, **shared)
    resolve_backbone(model, tokenizer)
    return model, tokenizer


def _add_adapter(model: PreTrainedModel, folder: str, is_trainable: bool) -> "PeftModel":
    from peft import PeftModel
    from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights

    check_files(folder)
    config = adapter_config(folder)
    if not any((Path(folder) / name).is_file() for name in ADAPTER_WEIGHTS):
        raise UserError(f"{folder} has no {' or '.join(ADAPTER_WEIGHTS)}. Copy the adapter's weights there.")
    of_base = list(model.parameters())
    what, options = f"The adapter in {folder}", {"config": config, "is_trainable": is_trainable}
    adapted = _explained(what, lambda: PeftModel.from_pretrained(model, folder, **options))
    saved = load_peft_weights(str(folder), device="cpu").keys()
    own = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    left_over = [name for name in saved - own if name not in adapted.state_dict()]
    faults = {"lacks tensors that its config asks for": own - saved, "holds tensors too many": left_over}
    for fault, names in faults.items():
        if names:
            raise UserError(f"{what} {fault}: {some(names)}. {INTACT}")
    check_finite(adapted, folder, known=of_base)
    return adapted


def base_of(name_or_path: str) -> str:
    """The base of a folder that holds an adapter; otherwise the name or path as it is.

    Raises:
        ValueError: the adapter's config cannot be read, or names no base or another adapter.
    """
    if not is_adapter(name_or_path):
        return name_or_path
    base = adapter_config(name_or_path).base_model_name_or_path
    if not isinstance(base, str) or not base or is_adapter(base):
        raise UserError(
            f"The adapter in {name_or_path} names {base!r} as its base, which is no model. Correct "
            "base_model_name_or_path in its adapter_config.json; an adapter on an adapter has to be merged first."
        )
    return base


def adapter_config(folder: str) -> "PeftConfig":
    """The config of an adapter.

    Raises:
        ValueError: it cannot be read, or the adapter is of a kind that is refused by name.
    """
    from peft import PeftConfig

    config = _explained(f"The adapter_config.json of {folder}", lambda: PeftConfig.from_pretrained(str(folder)))
    refuse_adapter(config)
    return config


def is_adapter(name_or_path: str) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(name_or_path) / "adapter_config.json").is_file()


def _explained(what: str, load: Callable[[], T]) -> T:
    """Return what `load` returns. Whatever a library raises on damaged files becomes one line that names them."""
    try:
        return load()
    except (OSError, ImportError, UserError):
        raise
    except Exception as error:
        cause = " ".join(str(error).split())[:300]
        raise UserError(f"{what} cannot be read: {type(error).__name__}: {cause}") from None


def _native_family(raw_config: dict[str, Any]) -> str:
    """The name of a native family, "" of any other."""
    family = FAMILIES.get(raw_config.get("model_type", ""), "")
    return "llada_moe" if family == "llada" and llada_moe.is_llada_moe(raw_config) else family


def _complete(tokenizer: PreTrainedTokenizerBase, family: str, mask_token_id: int | None) -> None:
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
    raw = _raw_config(name_or_path, **hub_arguments)
    model_type = raw.get("model_type")
    refuse_unsupported(model_type, raw.get("architectures"), str(name_or_path))
    if model_type not in CONFIG_MAPPING and not trust_remote_code:
        code = "its own, which trust_remote_code=True would run" if raw.get("auto_map") else "none either"
        raise UserError(
            f"{name_or_path}: no code here or in transformers knows model_type {model_type!r}. The checkpoint ships "
            f"{code}."
        )
    remote = trust_remote_code and model_type not in FAMILIES
    config = _explained(
        f"The config.json of {name_or_path}",
        lambda: AutoConfig.from_pretrained(name_or_path, trust_remote_code=remote, **hub_arguments),
    )
    _check_numbers(config, str(name_or_path))
    return config


def _raw_config(name_or_path: str, **hub_arguments: Any) -> dict[str, Any]:
    """The content of config.json, in which what is read here has the right type."""
    if Path(name_or_path).is_file():
        raise UserError(f"{name_or_path} is a file. Name the folder of the checkpoint.")
    what = f"The config.json of {name_or_path}"
    raw, _ = _explained(what, lambda: PreTrainedConfig.get_config_dict(name_or_path, **hub_arguments))
    if not isinstance(raw, dict):
        raise UserError(f"{what} cannot be read: it is no JSON object.")
    kinds = {"model_type": str, "architectures": list, "auto_map": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(raw.get(name), kind | None)]
    if wrong or not all(isinstance(name, str) for name in raw.get("architectures") or ()):
        raise UserError(f"{what} cannot be read: {wrong[0] if wrong else 'architectures'} is of the wrong type.")
    _check_sizes({name: raw.get(name) for name in SIZES}, name_or_path)
    return raw


def _check_numbers(config: PreTrainedConfig, name: str) -> None:
    """Refuse sizes that are not positive and token ids that are no numbers, which libraries notice late or never."""
    text = config.get_text_config()
    _check_sizes({size: getattr(text, size, None) for size in SIZES}, name)
    for field in ("mask_token_id", "pad_token_id", "eos_token_id"):
        value = getattr(config, field, None)
        if not all(one is None or _is_whole(one) for one in (value if isinstance(value, list) else [value])):
            raise UserError(f"The config.json of {name} says {field}={value!r}: it must be a whole number.")


def _check_sizes(sizes: dict[str, Any], name: str) -> None:
    for size, value in sizes.items():
        if not (value is None or isinstance(value, list) or _is_whole(value) and value > 0):  # a list is of each layer
            raise UserError(f"The config.json of {name} says {size}={value!r}: it must be a positive whole number.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _hub_arguments(from_pretrained_kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in from_pretrained_kwargs.items() if name in HUB_ARGUMENTS}


def _auto_class(config: PreTrainedConfig, trust_remote_code: bool) -> tuple[type, bool]:
    """The auto class that loads a config's model, and whether it runs remote code."""
    auto_map = getattr(config, "auto_map", None) or {}
    if trust_remote_code and config.model_type not in FAMILIES:
        for auto_class in (AutoModelForMaskedLM, AutoModelForCausalLM, AutoModel):
            if auto_class.__name__ in auto_map:
                return auto_class, True
    return AutoModelForCausalLM if backbone_name(config) == "bidirectional" else AutoModelForMaskedLM, False


def _quantization(arguments: dict[str, Any]) -> dict[str, Any]:
    """`load_in_8bit` and `load_in_4bit` as the quantization config that transformers takes."""
    arguments = dict(arguments)
    bits: dict[str, Any] = {name: True for name in ("load_in_8bit", "load_in_4bit") if arguments.pop(name, None)}
    asked = bits or isinstance(arguments.get("quantization_config"), BitsAndBytesConfig)
    if asked and find_spec("bitsandbytes") is None:
        raise ImportError(
            "Loading in 8 or 4 bits needs bitsandbytes, which is not installed: "
            "pip install mdu-trainer[quantization], or load the model in bfloat16 (dtype='bfloat16')."
        )
    if bits:
        arguments["quantization_config"] = BitsAndBytesConfig(**bits)
    return arguments
