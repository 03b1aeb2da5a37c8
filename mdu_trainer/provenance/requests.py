"""The facts and hashes that a run leaves beside its weights, of this request to forget and of those before it."""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel, TrainerState
from transformers.utils import logging

from .. import __version__
from ..config import MDUConfig
from ..data.texts import of_text
from ..files import UserError
from ..models import Backbone
from ..objectives import OBJECTIVES
from .facts import FACTS_FILE, Facts, Seal, SetFacts, set_facts, whole_hashes
from .forget_hashes import HASHES_FILE, SHORTEST_ROW_WORDS, ForgetHashes
from .texts import row_texts

logger = logging.get_logger(__name__)

CONTROL_TOKEN = re.compile(r"[<\[].*[>\]]")  # <|user|>, [MASK]
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
PACKAGES = ("transformers", "torch", "peft", "trl", "accelerate", "datasets", "huggingface-hub")
TRAINING_OPTIONS = (
    *("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "max_length", "t_min", "t_max"),
    *("time_epsilon", "seed"),
)


@dataclass(frozen=True)
class Run:
    """A run, as far as facts are read from it.

    Attributes:
        args, state: of the trainer.
        model: in training, without wrappers.
        backbone: its facts.
        loss_options: constants of the forget loss.
    """

    args: MDUConfig
    state: TrainerState
    model: PreTrainedModel
    backbone: Backbone
    loss_options: Mapping[str, float]


class Provenance:
    """The facts and hashes of a run's checkpoints. Data is read once, when the first of them is saved.

    Args:
        forget: the rows to forget.
        retain: the rows to keep, if any.
        start: folder of the model at the start, which may have been made to forget before; None if it has none.
        special_tokens: of the tokenizer, whose control tokens are no words of a row.
    """

    def __init__(
        self, forget: Dataset | None, retain: Dataset | None, start: Path | None, special_tokens: Sequence[str] = ()
    ):
        self._rows, self._start = (forget, retain), start
        self._control_tokens = [token for token in special_tokens if CONTROL_TOKEN.fullmatch(token)]
        self._key = secrets.token_bytes(16)
        self._sets: tuple[SetFacts, SetFacts | None] | None = None
        self._hashes: ForgetHashes | None = None
        self._earlier: tuple[list[SetFacts], ForgetHashes] | None = None

    def facts(self, run: Run) -> Facts | None:
        """Return the facts of the run's model as it is now; None without rows to forget."""
        forget, retain = self._rows
        if forget is None:
            return None
        if self._sets is None:
            self._sets = set_facts(forget, self._key), None if retain is None else set_facts(retain, self._key)
        facts = facts_of_run(run, *self._sets)
        if of_text(forget):
            chunks = {
                "text_stride": run.args.text_stride,
                "prefix_share": run.args.prefix_share if facts.tau else None,
            }
            facts = replace(facts, training=facts.training | {"rows_to_forget": "chunks of text"} | chunks)
        return replace(facts, earlier=self._requests_before()[0], hashes=Seal.of(self.hashes()))

    def hashes(self) -> ForgetHashes:
        """Return the hashes of the rows to forget, and of those that the model at the start was made to forget."""
        if self._hashes is None:
            forget, retain = self._rows
            hashes = ForgetHashes.of(
                row_texts(forget),
                () if retain is None else row_texts(retain),
                key=self._key,
                control_tokens=self._control_tokens,
            )
            if hashes.too_short:
                logger.warning(
                    f"{hashes.too_short} texts of the forget set have fewer than {SHORTEST_ROW_WORDS} words, the "
                    "question before them included. The scan before publishing cannot look for them."
                )
            earlier = self._requests_before()[1]
            self._hashes = ForgetHashes(hashes.requests + earlier.requests, hashes.too_short + earlier.too_short)
        return self._hashes

    def warn_of_relearning(self) -> None:
        """Count the rows to keep that quote what the model was made to forget before: they would teach it again."""
        _, hashes = self._requests_before()
        retain = self._rows[1]
        if retain is None or not hashes.requests:
            return
        quoting = sum(any(map(hashes.found_in, texts)) for texts in row_texts(retain))
        if quoting:
            logger.warning(
                f"{quoting} of {len(retain)} rows to keep quote what an earlier request made the model forget, and "
                "would teach it again. Remove them from the retain set."
            )

    def _requests_before(self) -> tuple[list[SetFacts], ForgetHashes]:
        """Return facts and hashes of the requests that made the model at the start, from its folder."""
        if self._earlier is None:
            folder = self._start
            facts = Facts.load(folder) if folder is not None and (folder / FACTS_FILE).is_file() else None
            earlier = [*facts.earlier, facts.forget] if facts else []
            self._earlier = earlier, self._hashes_before(folder, facts)
        return self._earlier

    def _hashes_before(self, folder: Path | None, facts: Facts | None) -> ForgetHashes:
        if facts is None:
            hashed = folder is not None and (folder / HASHES_FILE).is_file()
            return ForgetHashes.load(folder) if hashed else ForgetHashes()
        try:
            return whole_hashes(folder, facts)
        except UserError as error:
            logger.warning(
                f"What {folder} was made to forget before is not known here: rows to keep are not compared with it, "
                f"and the new model is not published with a scan. {error}"
            )
            return ForgetHashes()

    def save(self, folder: str | Path, run: Run) -> None:
        """Write both files into a checkpoint."""
        facts = self.facts(run)
        if facts is not None:
            self.hashes().save(folder)
            facts.save(folder)


def facts_of_run(run: Run, forget: SetFacts, retain: SetFacts | None) -> Facts:
    """Return the facts of a model as it is now."""
    args, state, model = run.args, run.state, run.model
    name = getattr(model.config, "_name_or_path", None) or None
    is_local = name is None or Path(name).exists()
    options = {name: getattr(args, name) for name in OBJECTIVES[args.loss_type].settings} | run.loss_options
    if not args.counterfactual:  # which alone strikes out
        options.pop("strike_quantile", None)
    if args.anchor_source != "ema":
        options.pop("anchor_ema_decay", None)
    if "anchor_source" in options and args.anchor_checkpoint is not None:
        options["anchor_source"] = _published_name(args.anchor_checkpoint)
    masks = {name: getattr(args, name) for name in ("forget_masking", "mask_special_tokens", "rollout_every")}
    if masks != {"forget_masking": "random", "mask_special_tokens": True, "rollout_every": None}:
        options |= {name: value for name, value in masks.items() if value is not None}
    options["retain_weight"] = args.retain_weight
    if args.retain_weight:
        options["retain_loss_type"] = args.retain_loss_type
    micro_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    training = {
        "steps": state.global_step,
        "epochs": round(state.epoch or 0.0, 3),
        "forget_rows_an_update": micro_batch * args.world_size,
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "lr_scheduler": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        **{option: getattr(args, option) for option in TRAINING_OPTIONS},
        "weights": str(model.dtype).removeprefix("torch."),
        "autocast": "bfloat16" if args.bf16 else "float16" if args.fp16 else "none",
        "processes": args.world_size,
    }
    if args.preset is not None:
        training["preset"] = args.preset
    if args.retain_batch_size is not None and args.retain_weight:
        micro_batch = args.retain_batch_size * args.gradient_accumulation_steps
        training["retain_rows_an_update"] = micro_batch * args.world_size
    if args.rewind_to is not None:
        training["rewound"] = f"{args.rewind_share:g} of the way to {_published_name(args.rewind_to)}"
    return Facts(
        method=args.loss_type,
        tau=args.tau if OBJECTIVES[args.loss_type].anchor else None,
        options=options,
        backbone=run.backbone.name,
        base_model=None if is_local else name,
        base_revision=None if is_local else _cached_commit(name, (args.model_init_kwargs or {}).get("revision")),
        base_path=str(Path(name).resolve()) if is_local and name else None,
        adapter=_adapter(model),
        forget=forget,
        retain=retain,
        description=args.forget_description,
        training=training,
        versions={"mdu_trainer": __version__} | {package: version(package) for package in PACKAGES},
    )


def _published_name(name: str) -> str:
    """A model's name on the Hub; a path tells strangers nothing, and may tell too much."""
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else "a local model"


def _cached_commit(name: str, revision: str | None) -> str | None:
    """Return the commit that a Hub model was loaded from, as far as the cache tells: transformers does not keep it."""
    path = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(path, str):
        return None
    snapshot = Path(path).parent
    loaded_is_known = revision is not None or len(list(snapshot.parent.iterdir())) == 1
    return snapshot.name if loaded_is_known else None


def _adapter(model: Any) -> dict[str, Any] | None:
    config = next(iter(getattr(model, "peft_config", {}).values()), None)
    if config is None:
        return None
    values = {name: getattr(config, name, None) for name in ("r", "lora_alpha", "lora_dropout")}
    return {"type": str(getattr(config.peft_type, "value", config.peft_type))} | {
        name: value for name, value in values.items() if value is not None
    }
