"""Check a checkpoint: its files lie in its folder, no tensor is missing, all weights are numbers; and hash them."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME, cached_file

from ..files import UserError

INDICES = {SAFE_WEIGHTS_INDEX_NAME: ".safetensors", WEIGHTS_INDEX_NAME: ".bin"}
POOLING = re.compile(r"(^|[._])pool(er|ing)?([._]|$)")
SHOWN = 3  # names in a message
INTACT = "Load an intact checkpoint; nothing was measured or trained with this one."


def check_files(name_or_path: str, **hub_arguments: Any) -> None:
    """Refuse a checkpoint that would read what is not its own.

    Raises:
        ValueError: an index of shards names anything but shards in the folder, or a symlink leads out of it. In the
            Hub's cache, where files are symlinks, they may lead to the blobs of the same repository.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        folder = folder / (hub_arguments.get("subfolder") or "")
        for path in sorted(folder.glob("*")):
            if path.is_symlink() and not path.is_dir() and not _is_inside(path, folder):
                raise UserError(
                    f"{path} is a symlink that leads out of its folder. Copy the file itself there, or load the "
                    "folder where it lies."
                )
    for name, suffix in INDICES.items():
        index = folder / name if folder.is_dir() else _cached(name_or_path, name, hub_arguments)
        if index is not None and index.is_file():
            _check_index(index, folder if folder.is_dir() else None, suffix)


def _is_inside(path: Path, folder: Path) -> bool:
    owners = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        owners.append(folder.resolve().parent.parent / "blobs")
    return any(path.resolve().is_relative_to(owner) for owner in owners)


def _cached(name: str, file: str, hub_arguments: dict[str, Any]) -> Path | None:
    flags = {f"_raise_exceptions_for_{case}": False for case in ("gated_repo", "missing_entries", "connection_errors")}
    path = cached_file(name, file, **hub_arguments, **flags)
    return None if path is None else Path(path)


def _check_index(index: Path, folder: Path | None, suffix: str) -> None:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        entries = sorted(set(weight_map.values()))
        if not all(isinstance(entry, str) for entry in entries):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is not an index of shards. {INTACT}") from None
    for entry in entries:
        plain = entry.endswith(suffix) and not Path(entry).is_absolute() and ".." not in Path(entry).parts
        if not plain or (folder is not None and not _is_inside(folder / entry, folder)):
            raise UserError(
                f"{index} names {entry!r}, which is no {suffix} file inside the folder: it is not read. {INTACT}"
            )
        if folder is not None and not (folder / entry).is_file():
            raise UserError(f"{index} names {entry!r}, which is not there. Copy the missing shard to {folder}.")


def check_complete(model: PreTrainedModel, info: dict[str, Collection], source: str) -> None:
    """Refuse a model of which tensors are missing in the checkpoint, or whose checkpoint holds tensors of another.

    Known exceptions: poolers and heads of other tasks that the checkpoint holds and the model does not have; tied
    weights and buffers that transformers computes. A missing LM head is none: it would be drawn at random.

    Args:
        model: as it was loaded.
        info: what `from_pretrained(..., output_loading_info=True)` says.
        source: what the message calls the checkpoint.

    Raises:
        ValueError: the message names the first tensors.
    """
    floating = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    everything = model.state_dict().keys()
    missing = [name for name in info.get("missing_keys", ()) if name in floating or name not in everything]
    if missing:
        raise UserError(
            f"{source} lacks tensors of its {type(model).__name__}, which would be drawn at random: "
            f"{some(missing)}. Its config.json may name more layers than it holds, or another class. {INTACT}"
        )
    mismatched = [
        f"{name} {tuple(saved)} instead of {tuple(own)}" for name, saved, own in info.get("mismatched_keys", ())
    ]
    if mismatched:
        raise UserError(
            f"{source} holds tensors of other shapes than its config.json says: {some(mismatched)}. {INTACT}"
        )
    modules, prefix = {name for name, _ in model.named_modules()}, model.base_model_prefix
    unexpected = [
        name
        for name in info.get("unexpected_keys", ())
        if (prefix and name.startswith(f"{prefix}.") or name.rpartition(".")[0] in modules)
        and not POOLING.search(name)
    ]
    if unexpected:
        raise UserError(
            f"{source} holds tensors that its {type(model).__name__} does not have: {some(unexpected)}. Its "
            f"config.json may name fewer layers than it holds, or another class. {INTACT}"
        )


def check_finite(model: nn.Module, source: str, known: Iterable[Tensor] = ()) -> None:
    """Refuse weights that are NaN or infinite. One pass over all floating weights, some seconds for 8B parameters.

    Args:
        model: loaded. Weights that accelerate keeps elsewhere are brought in, module by module.
        source: what the message calls the checkpoint.
        known: weights that have been looked at already.

    Raises:
        ValueError: the message names the first tensors.
    """
    seen = {id(tensor) for tensor in known}
    wrong = []
    for path, module in model.named_modules():
        brought_in = has_offloaded_params(module)  # for this moment only: the next one's may have the same id
        with align_module_device(module):
            for name, tensor in _own_tensors(module):
                if (brought_in or id(tensor) not in seen) and not _is_finite(tensor):
                    wrong.append(f"{path}.{name}".lstrip("."))
                if not brought_in:
                    seen.add(id(tensor))
    if wrong:
        raise UserError(f"{source} has weights that are NaN or infinite: {some(wrong)}. {INTACT}")


def _own_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite; of a quantised weight, its scales."""
    scales = getattr(tensor, "SCB", None)
    if scales is None:
        scales = getattr(getattr(tensor, "quant_state", None), "absmax", None)
    tensor = (tensor if scales is None else scales).detach()
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:  # float8 has no reductions
        tensor = tensor.float()
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))  # both are NaN if one number is


def some(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes and bits of all weights, 32 hexadecimal digits. Some seconds for 8B parameters.

    Weights that are not in memory (offloaded ones) count with their names and shapes only.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
