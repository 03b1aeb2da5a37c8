"""The files of a checkpoint that are uploaded: an explicit list, rid of local paths."""

import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedTokenizerBase

from ..files import UserError, read_json
from ..inference.config import GENERATION_CONFIG
from ..provenance.facts import Facts
from ..report.attack_words import public
from ..report.data_names import data_name
from ..report.eval_results import EVAL_RESULTS, eval_result_entries, eval_results_file
from ..report.model_card import CARD, LOCAL_BASE, PICTURE, CardDetails, checkpoint_card, chosen_run
from ..report.records import RECOVERY, RESULTS, Checkpoint

Source = Path | bytes

WEIGHTS_INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model[\w.-]*\.safetensors")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONFIGS = ("config.json", GENERATION_CONFIG)
VOCABULARIES = (
    *("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
TOKENIZER = (*VOCABULARIES, "chat_template.jinja")
TEMPLATES = "additional_chat_templates"
LOCAL_KEYS = ("_name_or_path", "name_or_path", "tokenizer_file")  # paths of the machine that saved it


def regular_files(folder: Path, *names: str) -> dict[str, Source]:
    """Return the files of a folder by their names, without those that it does not have.

    Raises:
        ValueError: one is a link, or lies behind one, or is no regular file: what it would send lies elsewhere.
    """
    found: dict[str, Source] = {name: folder / name for name in names if os.path.lexists(folder / name)}
    for name in found:
        path = folder / name
        inside = [path, *(part for part in path.parents if part.is_relative_to(folder) and part != folder)]
        if any(part.is_symlink() for part in inside) or not path.is_file():
            raise UserError(
                f"{path} is a link, or no regular file. Only files that lie in the checkpoint are published. Nothing "
                "was sent. Put the file itself there."
            )
    return found


def content_of(source: Source) -> bytes:
    """Return the bytes of a file or content."""
    return source if isinstance(source, bytes) else source.read_bytes()


def model_files(
    folder: Path, facts: Facts, base_model: str | None, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Source]:
    """Return weights, configs and tokenizer of a folder, by their paths in the repository.

    An adapter's config gets the base's id on the Hub. The tokenizer may be another one than the folder's.

    Raises:
        FileNotFoundError: some are missing.
        ValueError: one is a link or of another kind than its name says.
    """
    if regular_files(folder, ADAPTER_CONFIG):
        wanted = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    elif regular_files(folder, WEIGHTS_INDEX):
        wanted = ("config.json", WEIGHTS_INDEX, *_shards(folder / WEIGHTS_INDEX))
    else:
        wanted = ("config.json", "model.safetensors")
    optional = (GENERATION_CONFIG,) if ADAPTER_CONFIG in wanted else CONFIGS
    files = regular_files(folder, *dict.fromkeys((*optional, *wanted)))
    missing = [name for name in wanted if name not in files]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}. A checkpoint to publish has its weights as safetensors; load it "
            "and save it again with save_pretrained."
        )
    if ADAPTER_CONFIG in files:
        files[ADAPTER_CONFIG] = _adapter_config(folder, base_model, facts)
    else:
        files["config.json"] = _config(folder / "config.json")
    return files | (tokenizer_files(folder) if tokenizer is None else saved_tokenizer(tokenizer))


def _shards(index: Path) -> list[str]:
    """Return the files that an index names, or refuse what is no shard of the model's weights beside it."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map. Nothing was sent. Save the model again.")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or SHARD.fullmatch(name) is None:
            raise UserError(
                f"{index}: its entry {tensor[:100]!r} names {str(name)[:100]!r}, which is no file of weights in this "
                "folder. Nothing was sent. Save the model again."
            )
    return sorted(set(weight_map.values()))


def tokenizer_files(folder: Path) -> dict[str, Source]:
    """Return the tokenizer of a checkpoint, by its paths in the repository."""
    templates = sorted(f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("*.jinja"))
    files = regular_files(folder, *TOKENIZER, *templates)
    if "tokenizer_config.json" in files:
        files["tokenizer_config.json"] = _without(
            read_object(folder / "tokenizer_config.json"), *LOCAL_KEYS, "auto_map"
        )
    return files


def saved_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Source]:
    """Return the files of a tokenizer in memory, by their paths in the repository."""
    with tempfile.TemporaryDirectory() as folder:  # `save_pretrained` knows no other place
        tokenizer.save_pretrained(folder)
        return {name: content_of(source) for name, source in tokenizer_files(Path(folder)).items()}


def _config(path: Path) -> bytes:
    """Return config.json without paths, and without `auto_map` where the classes are known here.

    A model that needs code which no repository on the Hub holds is refused.
    """
    config = read_object(path)
    unknown = config.get("model_type") not in CONFIG_MAPPING
    auto_map = config.get("auto_map")
    code = [str(value) for value in auto_map.values()] if isinstance(auto_map, dict) else []
    if unknown and not (code and all("--" in value for value in code)):  # ORG/NAME--module.Class names where it is
        raise UserError(
            f"{path.parent} is a model of type {config.get('model_type')!r}, which needs code that no repository "
            "holds under the name in its config. Such models cannot be published from here."
        )
    return _without(config, *LOCAL_KEYS, *(() if unknown else ("auto_map",)))


def _adapter_config(folder: Path, base_model: str | None, facts: Facts) -> bytes:
    """Return adapter_config.json with the name of the base that others can load, or refuse an adapter without one."""
    config = read_object(folder / ADAPTER_CONFIG)
    if base_model is None:
        raise UserError(
            f"{folder} holds an adapter of {LOCAL_BASE}, which nobody else can load. Publish the merged model "
            "(adapter='merge'), or pass base_model='ORG/NAME' if the base is on the Hub."
        )
    config["base_model_name_or_path"] = base_model
    config["revision"] = facts.revision_of(base_model)
    return _without(config, "auto_mapping")


def card_files(
    checkpoint: Checkpoint,
    details: CardDetails,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    is_public: Callable[[str], bool] = lambda dataset: False,
) -> dict[str, Source]:
    """Return card, picture and records, by their paths in the repository.

    The other arguments are as in `prepare_push`; `is_public` says whether anybody can see a data set on the Hub.
    Scores on others are no evaluation results.
    """
    card, picture = checkpoint_card(
        checkpoint, details, folder, chats=None if tokenizer is None else bool(tokenizer.chat_template)
    )
    files: dict[str, Source] = {CARD: str(card).encode()}
    if picture is not None:
        files[PICTURE] = picture
    if checkpoint.results is not None:
        # The settings of a run can hold paths and names of the machine: only scores are published
        base, data = details.base_model or checkpoint.facts.base_model, data_name(checkpoint.results)
        scores = replace(checkpoint.results, model=base or LOCAL_BASE, dataset=data, settings={})
        files[RESULTS] = scores.to_json().encode()
        run = chosen_run(checkpoint.results.finite(), checkpoint.facts)
        entries = eval_result_entries(scores, run, details.repo_id or "", details.revision)
        if entries and is_public(entries[0].dataset_id):
            files[EVAL_RESULTS] = eval_results_file(entries)
    if checkpoint.recovery is not None:
        files[RECOVERY] = public(checkpoint.recovery, data_name(checkpoint.recovery)).to_json().encode()
    return files


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or refuse the file."""
    content = read_json(path, "a JSON object", "save the model again")
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object. Save the model again.")
    return content


def _without(config: dict, *keys: str) -> bytes:
    return (json.dumps(_cut(config, keys), indent=2, ensure_ascii=False) + "\n").encode(errors="replace")


def _cut(value: Any, keys: tuple[str, ...]) -> Any:
    """Return JSON without these keys, at any depth."""
    if isinstance(value, dict):
        return {name: _cut(part, keys) for name, part in value.items() if name not in keys}
    return [_cut(part, keys) for part in value] if isinstance(value, list) else value
