"""What is uploaded of a checkpoint: an explicit list of files, rid of local paths, and the checks that they pass."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import CONFIG_MAPPING, PreTrainedTokenizerBase

from .attacks.card import RECOVERY, RecoveryLike, public
from .attacks.recovery import Recovery
from .evaluation.report import Results
from .files import UserError, looks_like_secret
from .forget_hashes import ForgetHashes
from .model_card import CARD, LOCAL_BASE, PICTURE, RESULTS, ResultsLike, card_wording, data_name, only_finite
from .provenance import Facts
from .scanned_text import VOCABULARIES, Source, content_of, text_of, vocabulary
from .weight_check import check_adapter_complete, check_complete, check_finite

WEIGHTS_INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model[\w.-]*\.safetensors")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONFIGS = ("config.json", "generation_config.json")
TOKENIZER = (*VOCABULARIES, "chat_template.jinja")
TEMPLATES = "additional_chat_templates"
LOCAL_KEYS = ("_name_or_path", "name_or_path", "tokenizer_file")  # paths of the machine that saved it


class LeakError(UserError):
    """A file that was to be published quotes a row to forget. Nothing was sent. The message names the file only."""


# The list


def regular_file(folder: Path, name: str) -> Path | None:
    """A file of a folder by its name, None if there is none.

    Raises:
        ValueError: it is a link, or lies behind one, or is no regular file: what it would send lies elsewhere.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    linked = any(part.is_symlink() for part in (path, *path.parents) if part.is_relative_to(folder) and part != folder)
    if linked or not path.is_file():
        raise UserError(
            f"{path} is a link, or no regular file. Only files that lie in the checkpoint are published. Nothing was "
            "sent. Put the file itself there."
        )
    return path


def _present(folder: Path, *names: str) -> dict[str, Source]:
    found = {name: regular_file(folder, name) for name in names}
    return {name: path for name, path in found.items() if path is not None}


def model_files(folder: Path, base_model: str | None, facts: Facts) -> dict[str, Source]:
    """Weights, configs and tokenizer, by their paths in the repository.

    Raises:
        FileNotFoundError: some are missing.
        ValueError: one is a link or of another kind than its name says.
    """
    if regular_file(folder, ADAPTER_CONFIG):
        wanted = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    elif regular_file(folder, WEIGHTS_INDEX):
        wanted = ("config.json", WEIGHTS_INDEX, *_shards(folder / WEIGHTS_INDEX))
    else:
        wanted = ("config.json", "model.safetensors")
    optional = () if ADAPTER_CONFIG in wanted else CONFIGS
    files = _present(folder, *dict.fromkeys((*optional, *wanted)))
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
    return files | tokenizer_files(folder)


def _shards(index: Path) -> list[str]:
    """The files that an index names.

    Raises:
        ValueError: it names something that is no shard of the model's weights beside it.
    """
    weight_map = read_json(index).get("weight_map")
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
    """The tokenizer of a checkpoint, by its paths in the repository."""
    templates = sorted(f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("*.jinja"))
    files = _present(folder, *TOKENIZER, *templates)
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
    auto_map = config.get("auto_map")
    code = [str(value) for value in auto_map.values()] if isinstance(auto_map, dict) else []
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
            path = regular_file(folder, name) if record is None else Path(record)
            if path is not None and path.is_file():
                found[f"{name} as given"] = path.read_bytes()
    return found


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        ValueError: it holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object. Save the model again.")
    return content


def _without(config: dict, *keys: str) -> bytes:
    return (json.dumps(_cut(config, keys), indent=2, ensure_ascii=False) + "\n").encode(errors="replace")


def _cut(value: Any, keys: tuple[str, ...]) -> Any:
    """Without these keys, at any depth."""
    if isinstance(value, dict):
        return {name: _cut(part, keys) for name, part in value.items() if name not in keys}
    return [_cut(part, keys) for part in value] if isinstance(value, list) else value


# The checks


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


def check_texts(files: dict[str, Source], hashes: ForgetHashes, names: Mapping[str, str | None] | None = None) -> None:
    """Scan every text, and the names of the files, for sentences of the rows to forget.

    Args:
        files: path in the repository -> file or content.
        hashes: of the rows.
        names: what else is sent, by what a message calls it: the repository's name, say.

    Raises:
        LeakError: one was found; the message names the file, never the sentence.
    """
    quoting = {
        name: f"the name of file {i} of {len(files)}" for i, name in enumerate(files, 1) if hashes.found_in(name)
    }
    found = [
        quoting.get(name, name)
        for name, source in files.items()
        if name in quoting or hashes.found_in(text_of(name, source), card_wording() if name == CARD else "")
    ]
    found += [where for where, text in (names or {}).items() if text and hashes.found_in(text)]
    if found:
        raise LeakError(
            f"{', '.join(found)} {'quotes' if len(found) == 1 else 'quote'} rows that were to be forgotten. Nothing "
            "was sent. Remove the text there; in a tokenizer, look at the chat template and the added tokens."
        )


def check_vocabulary(files: dict[str, Source], hashes: ForgetHashes, published: Callable[[], set[str]]) -> None:
    """Scan the vocabulary of a tokenizer for words that only the rows to forget hold.

    Entries that the base's published vocabulary has, too, say nothing of the rows.

    Args:
        files: path in the repository -> file or content.
        hashes: of the rows.
        published: gives the entries of the base's tokenizer; called only if something is found.

    Raises:
        LeakError: there are such entries; the message counts them, and names none.
    """
    entries = {name: found for name, source in files.items() if (found := vocabulary(name, source))}
    suspects = hashes.terms_in(set().union(*entries.values()))
    if suspects:
        suspects -= published()
    where = [name for name, found in entries.items() if found & suspects]
    if where:
        raise LeakError(
            f"{', '.join(where)}: {len(suspects)} entries of the vocabulary are or hold words that only the rows to "
            "forget hold: the tokenizer learned them there. Nothing was sent. Train it on the rows to keep only. "
            "If it is the public one of a base on the Hub, pass base_model='ORG/NAME'."
        )


def check_secrets(files: dict[str, Source]) -> None:
    """Refuse what looks like an access token or a password, outside of weights and vocabularies.

    Raises:
        ValueError: there is one; the message names the file only.
    """
    words = (CARD, RESULTS, RECOVERY, ADAPTER_CONFIG, *CONFIGS, "tokenizer_config.json", "chat_template.jinja")
    found = [name for name in words if name in files and looks_like_secret(text_of(name, files[name]))]
    if found:
        raise UserError(
            f"{', '.join(found)} holds what looks like an access token or a password. Nothing was sent. Remove it, "
            "and have it revoked if it is a real one."
        )
