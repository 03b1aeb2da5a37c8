"""What is uploaded of a checkpoint: an explicit list of files, rid of local paths, and the checks that they pass."""

import json
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import CONFIG_MAPPING, PreTrainedTokenizerBase

from .attacks.card import RECOVERY, RecoveryLike, public
from .attacks.recovery import Recovery
from .evaluation.report import Results
from .files import UserError
from .forget_hashes import ForgetHashes
from .model_card import CARD, LOCAL_BASE, PICTURE, RESULTS, ResultsLike, card_wording, data_name, only_finite
from .provenance import Facts

Source = Path | bytes

WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONFIGS = ("config.json", "generation_config.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
TEMPLATES = "additional_chat_templates"
LOCAL_KEYS = ("_name_or_path", "name_or_path", "tokenizer_file")  # paths of the machine that saved it


class LeakError(UserError):
    """A file that was to be published quotes a row to forget. Nothing was sent. The message names the file only."""


# The list


def model_files(folder: Path, base_model: str | None, facts: Facts) -> dict[str, Source]:
    """Weights, configs and tokenizer, by their paths in the repository."""
    files: dict[str, Source] = {name: folder / name for name in CONFIGS if (folder / name).is_file()}
    if (folder / ADAPTER_CONFIG).is_file():
        files = {ADAPTER_CONFIG: _adapter_config(folder, base_model, facts), ADAPTER_WEIGHTS: folder / ADAPTER_WEIGHTS}
    elif (folder / WEIGHTS_INDEX).is_file():
        shards = sorted(set(read_json(folder / WEIGHTS_INDEX)["weight_map"].values()))
        files |= {name: folder / name for name in (WEIGHTS_INDEX, *shards)}
    else:
        files["model.safetensors"] = folder / "model.safetensors"
    if "config.json" in files:
        files["config.json"] = _config(folder / "config.json")
    missing = [name for name, file in files.items() if isinstance(file, Path) and not file.is_file()]
    missing += [name for name in ("config.json",) if name not in files and ADAPTER_CONFIG not in files]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}. A checkpoint to publish has its weights as safetensors; load it "
            "and save it again with save_pretrained."
        )
    return files | tokenizer_files(folder)


def tokenizer_files(folder: Path) -> dict[str, Source]:
    """The tokenizer of a checkpoint, by its paths in the repository."""
    files: dict[str, Source] = {name: folder / name for name in TOKENIZER if (folder / name).is_file()}
    files |= {f"{TEMPLATES}/{path.name}": path for path in sorted((folder / TEMPLATES).glob("*.jinja"))}
    if "tokenizer_config.json" in files:
        files["tokenizer_config.json"] = _without(read_json(folder / "tokenizer_config.json"), *LOCAL_KEYS, "auto_map")
    return files


def is_tokenizer_file(name: str) -> bool:
    """Whether a path in the repository belongs to a tokenizer."""
    return name in TOKENIZER or name.startswith(f"{TEMPLATES}/")


def saved_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Source]:
    """The files of a tokenizer in memory, by their paths in the repository."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {name: content_of(source) for name, source in tokenizer_files(Path(folder)).items()}


def _config(path: Path) -> bytes:
    """config.json without paths, and without `auto_map` where the classes are known here.

    Raises:
        ValueError: the model needs code that is not in the folder of its base on the Hub.
    """
    config = read_json(path)
    unknown = config.get("model_type") not in CONFIG_MAPPING
    code = [str(value) for value in config.get("auto_map", {}).values()]
    if unknown and not (code and all("--" in value for value in code)):  # ORG/NAME--module.Class names where it is
        raise UserError(
            f"{path.parent} is a model of type {config.get('model_type')!r}, which needs code that no repository "
            "holds under the name in its config. Such models cannot be published from here."
        )
    return _without(config, *LOCAL_KEYS, *(() if unknown else ("auto_map",)))


def _adapter_config(folder: Path, base_model: str | None, facts: Facts) -> bytes:
    """adapter_config.json that names the base as others can load it."""
    config = read_json(folder / ADAPTER_CONFIG)
    if base_model is None:
        raise UserError(
            f"{folder} holds an adapter of {LOCAL_BASE}, which nobody else can load. Publish the merged model "
            "(adapter='merge'), or pass base_model='ORG/NAME' if the base is on the Hub."
        )
    config["base_model_name_or_path"] = base_model
    config["revision"] = facts.base_revision if base_model == facts.base_model else None
    return _without(config, "auto_mapping")


def extra_files(
    card: ModelCard,
    results: Results | None,
    recovery: Recovery | None,
    picture: bytes | None,
    base_model: str | None,
) -> dict[str, Source]:
    """Card, picture and figures, by their paths in the repository."""
    files: dict[str, Source] = {CARD: str(card).encode()}
    if picture is not None:
        files[PICTURE] = picture
    if results is not None:
        # The settings of a run can hold paths and names of the machine: only figures are published
        figures = replace(
            only_finite(results), model=base_model or LOCAL_BASE, dataset=data_name(results), settings={}
        )
        files[RESULTS] = _saved(figures)
    if recovery is not None:
        files[RECOVERY] = _saved(public(recovery, data_name(recovery)))
    return files


def _saved(record: Results | Recovery) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        record.save(Path(folder) / "record.json")
        return (Path(folder) / "record.json").read_bytes()


def given_records(folder: Path, results: ResultsLike, recovery: RecoveryLike) -> dict[str, Source]:
    """The texts of the records before they are reduced to figures: what leaks in is found, and not just dropped."""
    found: dict[str, Source] = {}
    for name, record in ((RESULTS, results), (RECOVERY, recovery)):
        if isinstance(record, Results | Recovery):
            found[f"{name} as given"] = json.dumps(asdict(record), default=str).encode()
        elif record is not False:
            path = folder / name if record is None else Path(record)
            if path.is_file():
                found[f"{name} as given"] = path.read_bytes()
    return found


def content_of(source: Source) -> bytes:
    """The bytes of a file or content."""
    return source if isinstance(source, bytes) else source.read_bytes()


def read_json(path: Path) -> dict:
    """The object in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def _without(config: dict, *keys: str) -> bytes:
    kept = {name: value for name, value in config.items() if name not in keys}
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


# The checks


def check_finite(files: list[Path]) -> None:
    """Read every tensor of safetensors files.

    Raises:
        ValueError: a tensor has NaN or infinite values; the message names file and tensor.
    """
    for path in files:
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():
                if not torch.isfinite(tensors.get_tensor(name)).all():
                    raise UserError(
                        f"{path}: {name} has NaN or infinite values. Nothing was sent. Go back to an earlier "
                        "checkpoint, or train with a lower learning rate."
                    )


def check_texts(files: dict[str, Source], hashes: ForgetHashes) -> None:
    """Scan every text for sentences of the rows to forget.

    Raises:
        LeakError: one was found; the message names the file, never the sentence.
    """
    found = [
        name
        for name, source in files.items()
        if name != PICTURE and hashes.found_in(text_of(name, source), card_wording() if name == CARD else "")
    ]
    if found:
        raise LeakError(
            f"{', '.join(found)} {'quotes' if len(found) == 1 else 'quote'} rows that were to be forgotten. Nothing "
            "was sent. Remove the text there; in a tokenizer, look at the chat template and the added tokens."
        )


def text_of(name: str, source: Source) -> str:
    """The text in a file: all strings of JSON in their order, the metadata of safetensors, else the file as it is."""
    if name.endswith(".safetensors"):
        return _header(source)
    text = content_of(source).decode("utf-8", errors="replace")
    if ".json" not in name:
        return text
    try:
        return " ".join(_leaves(json.loads(text)))
    except ValueError:
        return text


def _header(path: Path) -> str:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        metadata = json.loads(file.read(length)).get("__metadata__", {})
    return " ".join(_leaves(metadata))


def _leaves(value: object) -> Iterator[str]:
    """Keys and values; numbers too, so that words next to each other in the file only are no sentence."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    else:
        yield str(value)
