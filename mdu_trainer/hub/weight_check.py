"""Check that the weights of a checkpoint are whole: every tensor that its config asks for is there, and finite."""

from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..files import UserError
from ..models.backbone import backbone_name
from ..models.loading import check_tensors, load_config
from .files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, WEIGHTS_INDEX, Source, read_object

logger = logging.get_logger(__name__)

ADVICE = "Nothing was sent. Save the model again, or go back to an earlier checkpoint."
SHOWN = 3  # names of tensors in a message
# PEFT may save them, too
EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight", "embeddings.weight", "decoder.weight")


def check_weights(folder: Path, files: dict[str, Source]) -> None:
    """Refuse weights that are not whole: tensors that are missing, of another shape than the config says, or NaN.

    Raises:
        ValueError: such weights; the message names file and tensor.
    """
    weight_map = read_object(folder / WEIGHTS_INDEX)["weight_map"] if WEIGHTS_INDEX in files else None
    for name, source in files.items():
        if name.endswith(".safetensors"):
            check_finite(source, weight_map)
    if ADAPTER_CONFIG in files:
        check_adapter_complete(folder)
    else:
        check_complete(folder)


def check_finite(path: Path, weight_map: dict[str, str] | None = None) -> None:
    """Read every tensor of a safetensors file.

    Refused are NaN and infinite values, and a tensor that is not where the index says (`weight_map`, tensor -> file).
    """
    try:
        with safe_open(path, "pt") as tensors:
            names = set(tensors.keys())
            if not names:
                raise UserError(f"{path} holds no tensors. {ADVICE}")
            if weight_map is not None:
                expected = {tensor for tensor, file in weight_map.items() if file == path.name}
                _refuse(path, expected - names, names - expected, "the index does not name")
            for name in names:
                tensor = tensors.get_tensor(name)
                if not torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor).all():
                    raise UserError(
                        f"{path}: {name} has NaN or infinite values. Nothing was sent. Go back to an earlier "
                        "checkpoint, or train with a lower learning rate."
                    )
    except SafetensorError:
        raise UserError(f"{path} is no safetensors file, or was cut short. {ADVICE}") from None


def check_complete(folder: Path) -> None:
    """Compare the names and shapes of a model's weights with what its config asks for. No weight is read."""
    raw, _ = PreTrainedConfig.get_config_dict(str(folder))
    if raw.get("model_type") not in CONFIG_MAPPING or raw.get("quantization_config"):
        logger.warning(f"{folder}: whether tensors are missing is not checked, for no code here builds the model.")
        return
    try:
        check_tensors(str(folder))
    except UserError as error:
        raise UserError(f"{error} Nothing was sent.") from None


def check_adapter_complete(folder: Path) -> None:
    """Compare the names and shapes of an adapter's weights with what its config asks for, on the base's config."""
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
    _refuse(folder, expected.keys() - shapes.keys(), further, "its config does not ask for")
    wrong = {name for name, tensor in expected.items() if tuple(tensor.shape) != shapes[name]}
    if wrong:
        raise UserError(f"{folder}: {_some(wrong)} have other shapes than adapter_config.json asks for. {ADVICE}")


def _without_weights(adapter: PeftConfig) -> PreTrainedModel:
    config = load_config(adapter.base_model_name_or_path, revision=adapter.revision or "main")
    auto_class = AutoModelForCausalLM if backbone_name(config) == "bidirectional" else AutoModelForMaskedLM
    with torch.device("meta"):
        return auto_class.from_config(config)


def _refuse(path: Path, missing: set[str], unexpected: set[str], why: str) -> None:
    for names, words in ((missing, "lacks"), (unexpected, f"holds, and {why},")):
        if names:
            raise UserError(f"{path} {words} {_some(names)}. {ADVICE}")


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more tensors"
