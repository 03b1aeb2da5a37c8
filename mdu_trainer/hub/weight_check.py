"""Whether the weights of a checkpoint are whole: every tensor that its config asks for is there, and finite."""

from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..files import UserError
from ..models.backbone import backbone_name
from ..models.loading import check_tensors, load_config
from .files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, WEIGHTS_INDEX, Source, read_json

logger = logging.get_logger(__name__)

ADVICE = "Nothing was sent. Save the model again, or go back to an earlier checkpoint."
SHOWN = 3  # names of tensors in a message
EMBEDDINGS = (
    "embed_tokens.weight",
    "lm_head.weight",
    "embeddings.weight",
    "decoder.weight",
)  # PEFT may save them, too


def check_weights(folder: Path, files: dict[str, Source]) -> None:
    """Refuse weights that are not whole: tensors that are missing, of another shape than the config says, or NaN.

    Raises:
        ValueError: such weights; the message names file and tensor.
    """
    weight_map = read_json(folder / WEIGHTS_INDEX)["weight_map"] if WEIGHTS_INDEX in files else None
    check_finite([source for name, source in files.items() if name.endswith(".safetensors")], weight_map)
    if ADAPTER_CONFIG in files:
        check_adapter_complete(folder)
    else:
        check_complete(folder)


def check_finite(files: list[Path], weight_map: dict[str, str] | None = None) -> None:
    """Read every tensor of safetensors files.

    Args:
        files: to read.
        weight_map: tensor -> file, as the index says, or None without one.

    Raises:
        ValueError: a tensor has NaN or infinite values, or is not where the index says; the message names it.
    """
    for path in files:
        try:
            with safe_open(path, "pt") as tensors:
                names = set(tensors.keys())
                _check_names(path, names, weight_map)
                for name in names:
                    tensor = tensors.get_tensor(name)
                    if not torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor).all():
                        raise UserError(
                            f"{path}: {name} has NaN or infinite values. Nothing was sent. Go back to an earlier "
                            "checkpoint, or train with a lower learning rate."
                        )
        except SafetensorError:
            raise UserError(f"{path} is no safetensors file, or was cut short. {ADVICE}") from None


def _check_names(path: Path, names: set[str], weight_map: dict[str, str] | None) -> None:
    if not names:
        raise UserError(f"{path} holds no tensors. {ADVICE}")
    if weight_map is None:
        return
    expected = {tensor for tensor, file in weight_map.items() if file == path.name}
    for wrong, words in ((expected - names, "lacks"), (names - expected, "holds, and the index does not name,")):
        if wrong:
            raise UserError(f"{path} {words} {_some(wrong)}. {ADVICE}")


def check_complete(folder: Path) -> None:
    """Compare the names and shapes of a model's weights with what its config asks for. No weight is read.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape.
    """
    if not _built_here(folder):
        logger.warning(f"{folder}: whether tensors are missing is not checked, for no code here builds the model.")
        return
    try:
        check_tensors(str(folder))
    except UserError as error:
        raise UserError(f"{error} Nothing was sent.") from None


def _built_here(folder: Path) -> bool:
    """Whether a model is built without code of its own, and without a quantiser."""
    raw, _ = PreTrainedConfig.get_config_dict(str(folder))
    return raw.get("model_type") in CONFIG_MAPPING and not raw.get("quantization_config")


def check_adapter_complete(folder: Path) -> None:
    """Compare the names and shapes of an adapter's weights with what its config asks for, on the base's config.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
        adapted = get_peft_model(_without_weights(config), config, low_cpu_mem_usage=True)
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except (OSError, ValueError, TypeError, KeyError, NotImplementedError, AttributeError) as error:
        logger.warning(
            f"{folder}: whether tensors of the adapter are missing is not checked, for its base cannot be built from "
            f"its config ({type(error).__name__})."
        )
        return
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as tensors:
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    further = {name for name in shapes.keys() - expected.keys() if not name.endswith(EMBEDDINGS)}
    _refuse(folder, expected.keys() - shapes.keys(), further)
    wrong = {name for name, tensor in expected.items() if tuple(tensor.shape) != shapes[name]}
    if wrong:
        raise UserError(f"{folder}: {_some(wrong)} have other shapes than adapter_config.json asks for. {ADVICE}")


def _without_weights(adapter: PeftConfig) -> PreTrainedModel:
    config = load_config(adapter.base_model_name_or_path, revision=adapter.revision or "main")
    auto_class = AutoModelForCausalLM if backbone_name(config) == "bidirectional" else AutoModelForMaskedLM
    with torch.device("meta"):
        return auto_class.from_config(config)


def _refuse(folder: Path, missing: set[str], unexpected: set[str]) -> None:
    for names, words in ((missing, "lacks"), (unexpected, "holds, and its config does not ask for,")):
        if names:
            raise UserError(f"{folder} {words} {_some(names)}. {ADVICE}")


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more tensors"
