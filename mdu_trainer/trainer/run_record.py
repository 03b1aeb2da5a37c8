"""The record of a run, kept in its checkpoints: a run that goes on from one must be the same run.

`run.json` holds every setting that can change the weights, a digest of each data set, and one of the model at the
start. The data sets' digests are keyed, and each is of the whole set: it says whether the rows are the same ones in
the same order, and nothing of a single row. The key lies beside them, so whoever has the file can confirm a guess of
the whole set. The file is readable by its owner alone and is never uploaded.
"""

import dataclasses
import hashlib
import json
import math
import secrets
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import nn

from ..config import DiffusionConfig, MDLMConfig, MDUConfig
from ..data.rows import RowPairs, TokenizedRows
from ..files import Record
from ..objectives import OBJECTIVES
from .distributed import is_partitioned

RUN_FILE = "run.json"
ROWS_AN_UPDATE = "rows an update (per_device_train_batch_size x gradient_accumulation_steps x processes)"
RETAIN_ROWS = "retain rows with each forget row (retain_batch_size / per_device_train_batch_size)"

# Fields of the configuration that change no weight. All others are compared, those of later versions too
UNCOMPARED = frozenset(
    """
    output_dir run_name preset project trackio_space_id trackio_bucket_id trackio_static_space_id report_to
    do_train do_eval do_predict resume_from_checkpoint force_resume restore_callback_states_from_checkpoint
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level
    log_level_replica disable_tqdm include_num_input_tokens_seen skip_memory_metrics debug
    per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object
    eval_accumulation_steps include_for_metrics batch_eval_metrics bf16_full_eval fp16_full_eval label_names
    save_only_model save_on_each_node save_total_limit enable_jit_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context remove_unused_columns length_column_name
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_empty_cache_steps use_cache use_cpu reference_device precompute_anchor
    local_rank ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
    ddp_timeout fsdp fsdp_config deepspeed parallelism_config accelerator_config average_tokens_across_devices
    model_init_kwargs trust_remote_code forget_description
    """.split()
)
# Those that are compared as what they come to: the rows of an update, and the updates
DERIVED = frozenset(
    """
    per_device_train_batch_size retain_batch_size gradient_accumulation_steps max_steps num_train_epochs beta
    loss_options
    """.split()
)
# Those that decide which weights are kept, where the best ones are loaded at the end
SELECTION = frozenset(
    ("eval_strategy", "eval_steps", "eval_delay", "save_strategy", "save_steps")
    + ("metric_for_best_model", "greater_is_better")
)
# Those of the forget losses, each of which reads some
OF_OBJECTIVES = frozenset(
    ("tau", "kl_reduction", "kl_direction", "anchor_source", "anchor_ema_decay", "anchor_input", "strike_quantile")
    + ("beta", "gamma", "alpha")
)
# Learning rates that do not depend on how many updates there are in all
STEADY = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")
WATCHES_METRICS = ("reduce_lr_on_plateau", "greedy")
NOT_OF_AN_ADAPTER = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")


@dataclass(frozen=True)
class RunRecord(Record):
    """The settings and data that decide the weights of a run.

    Attributes:
        settings: values by name, as JSON has them.
        updates: how many there are in all.
        data: of each data set, the number of its rows and their keyed digest.
        start: digest of the weights at the start that are read again when the run goes on, or None if it is not known:
            frozen ones, and all where the model at the start is compared with.
        key: of the data sets' digests, hexadecimal.
        ended: why a callback had ended training when the checkpoint was written, None if it goes on.
    """

    kind: ClassVar[str] = "record of a run"
    remedy: ClassVar[str] = "resume from another checkpoint"
    private: ClassVar[bool] = True  # it has a digest of the rows

    settings: dict[str, Any]
    updates: int
    data: dict[str, dict[str, Any]]
    start: str | None
    key: str
    ended: str | None = None

    @classmethod
    def of(
        cls,
        args: DiffusionConfig,
        model: nn.Module,
        sets: Mapping[str, RowPairs | None],
        loss_options: dict[str, Any],
        start: str | None,
        key: str | None = None,
    ) -> "RunRecord":
        """Return the record of a run that is about to train.

        Args:
            args: its configuration.
            model: the model in training, unwrapped.
            sets: "train" -> the rows that it learns from, and those that it is evaluated on, by name. They count where
                evaluations have a say in the weights.
            loss_options: what the loss reads beside the configuration's own fields.
            start: see `start_digest`.
            key: of the record that this one is compared with; a new one if None.
        """
        key = key or secrets.token_hex(16)
        data = {}
        for stage in sets if _selects(args) else ["train"]:
            dataset = sets[stage]
            for name, rows in dataset.parts.items() if isinstance(dataset, RowPairs) else ():
                name = name if stage == "train" else f"{stage} {name}"
                data[name] = {"rows": len(rows), "digest": rows_digest(rows, key)}
        return cls(_settings(args, model, loss_options), _updates(args, len(sets["train"] or ())), data, start, key)

    @classmethod
    def of_checkpoint(cls, folder: str | Path) -> "RunRecord | None":
        """The record in a checkpoint, None in one without.

        Raises:
            UserError: the file is not readable, or of another schema.
        """
        path = Path(folder) / RUN_FILE
        return cls.load(path) if path.is_file() else None

    def differences(self, now: "RunRecord", step: int) -> list[str]:
        """Return what differs from another run, each difference with its two values. No text of any row.

        Args:
            now: the run that is to go on, its digests under this record's key.
            step: the updates that were made already.
        """
        both = [name for name in self.settings if name in now.settings]
        found = [
            f"{name} (was {_shown(self.settings[name])}, now {_shown(now.settings[name])})"
            for name in both
            if self.settings[name] != now.settings[name]
        ]
        for name in sorted(self.data.keys() | now.data.keys()):
            was, is_now = self.data.get(name), now.data.get(name)
            if was != is_now:
                counts = [part["rows"] if part else 0 for part in (was, is_now)]
                other = "was {} rows, now {}".format(*counts) if counts[0] != counts[1] else "other rows or order"
                found.append(f"the {name} set ({other})")
        if None not in (self.start, now.start) and self.start != now.start:
            found.append("the model at the start (other weights)")
        return found + self._other_length(now, step)

    def _other_length(self, now: "RunRecord", step: int) -> list[str]:
        name, was = "max_steps or num_train_epochs", f"was {self.updates} updates in all, now {now.updates}"
        if step > now.updates:
            return [f"{name} ({was}, of which {step} are made already)"]
        schedule = now.settings["lr_scheduler_type"]
        warms_up_by_share = 0 < now.settings["warmup_steps"] < 1
        if self.updates == now.updates or schedule in STEADY and not warms_up_by_share:
            return []
        return [
            f"{name} ({was}; a '{schedule}' learning rate is spread over all updates, so those made already would "
            "have had other rates; only 'constant', 'constant_with_warmup' and 'inverse_sqrt' can be prolonged)"
        ]


def rows_digest(rows: TokenizedRows, key: str) -> str:
    """A keyed digest of all token ids of a data set, in order."""
    digest = hashlib.blake2b(key=bytes.fromhex(key), digest_size=16)
    for column in (rows.prompt_ids, rows.completion_ids, rows.preferred):
        digest.update(len(column).to_bytes(8, "little"))
        for ids in column:
            digest.update(len(ids).to_bytes(8, "little") + array("q", ids).tobytes())
    return digest.hexdigest()


def start_digest(model: nn.Module, reference: Any = None) -> str | None:
    """Return a digest of the weights at the start that a resumed run reads again, None if they are not whole here.

    Others are overwritten by the checkpoint's. Each weight counts with the sum of its bits, taken as integers: that
    costs no more than reading it.

    Args:
        model: the model in training.
        reference: the `ReferenceModel` that the loss compares with, if there is one.
    """
    everything = reference is not None and not (isinstance(model, PeftModel) and not reference.first_adapter)
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in model.named_parameters():
        if weight.requires_grad and not everything:
            continue
        wraps_others = hasattr(weight, "__tensor_flatten__")  # shards of FSDP2, quantised weights of torchao
        if weight.is_meta or is_partitioned(weight) or wraps_others:
            return None
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} {_sum_of_bits(weight)}".encode())
    return digest.hexdigest()


def _sum_of_bits(weight: nn.Parameter) -> int:
    bits = weight.detach().flatten().view(torch.uint8)
    if len(bits) % 8 == 0 and bits.data_ptr() % 8 == 0:
        bits = bits.view(torch.int64)
    return int(bits.sum(dtype=torch.int64))


def _selects(args: Any) -> bool:
    """Whether evaluations have a say in the weights."""
    best = _plain(args.save_strategy) == "best"
    return args.load_best_model_at_end or best or _plain(args.lr_scheduler_type) in WATCHES_METRICS


def _settings(args: DiffusionConfig, model: nn.Module, loss_options: dict[str, Any]) -> dict[str, Any]:
    unread = _unread_options(args)
    left_out = UNCOMPARED | DERIVED | unread | (frozenset() if _selects(args) else SELECTION)
    settings = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name not in left_out}
    micro_batch = args.train_batch_size * args.world_size
    settings[ROWS_AN_UPDATE] = micro_batch * args.gradient_accumulation_steps
    if isinstance(args, MDUConfig) and args.retain_weight:
        settings[RETAIN_ROWS] = args.rows_a_counter.get("retain", 1)
    if args.train_sampling_strategy == "group_by_length" or args.dataloader_drop_last:
        settings["rows a micro-batch (per_device_train_batch_size x processes)"] = micro_batch
    if isinstance(args, MDLMConfig) and args.pad_with_end_tokens:  # a row's loss depends on the rows beside it
        settings["per_device_train_batch_size"] = args.train_batch_size
    settings |= loss_options
    settings["precision of the weights"] = str(model.dtype)
    settings["number of trained tensors"] = sum(p.requires_grad for p in model.parameters())
    adapters = getattr(model, "peft_config", {})
    settings["adapter"] = sorted(str(_plain(config.peft_type)) for config in adapters.values()) or None
    for adapter, config in adapters.items():
        prefix = "adapter" if adapter == "default" else f"adapter {adapter}"
        values = {name: value for name, value in config.to_dict().items() if name not in NOT_OF_AN_ADAPTER}
        settings |= {f"{prefix} {name}": value for name, value in values.items()}
    return json.loads(json.dumps({name: _plain(value) for name, value in settings.items()}))


def _unread_options(args: DiffusionConfig) -> frozenset[str]:
    """Options that the forget and retain losses of this run do not read."""
    if not isinstance(args, MDUConfig):
        return frozenset()
    objective = OBJECTIVES[args.loss_type]
    unread = OF_OBJECTIVES - {*objective.options, *objective.settings, *(["tau"] if objective.anchor else [])}
    return unread | (frozenset() if args.retain_weight else {"retain_loss_type"})


def _updates(args: DiffusionConfig, size: int) -> int:
    batches = size / (args.train_batch_size * args.world_size)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    an_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * an_epoch)


def _plain(value: Any) -> Any:
    """A value as JSON can hold it, the same for equal values."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_plain(entry) for entry in value), key=str)
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, str | int | float | bool) else type(value).__name__


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
