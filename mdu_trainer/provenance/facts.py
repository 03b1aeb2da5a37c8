"""What a checkpoint keeps about its unlearning: the facts of its card, and hashes that recognise a leak.

Two files lie beside the weights. Neither is ever uploaded:

- `unlearning.json`, the `Facts`: method, options, names and fingerprints of the data, versions. No text of any row.
- `forget_hashes.json`, the `ForgetHashes`: keyed hashes of the word sequences that only the forget rows hold. The
  facts note their number and checksum: a file that was emptied or cut short is not taken for one that finds nothing.
"""

import hashlib
import json
import secrets
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from huggingface_hub import try_to_load_from_cache
from transformers.utils import logging

from .. import __version__
from ..files import UserError, decode, read_record, without_secrets, write_whole
from .forget_hashes import FORGET_COLUMNS, HASHES_FILE, MARKUP, SHORTEST_ROW_WORDS, ForgetHashes, row_texts, row_turns

if TYPE_CHECKING:
    from ..trainer.mdu import MDUTrainer

logger = logging.get_logger(__name__)

FACTS_FILE = "unlearning.json"
SCHEMA, UNSEALED = 2, 1  # the earlier schema has fingerprints without a key, and no seal of the hashes
PACKAGES = ("transformers", "torch", "peft", "trl", "accelerate", "datasets", "huggingface-hub")

TRAINING_OPTIONS = (
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "warmup_steps",
    "max_length",
    "t_min",
    "t_max",
    "time_epsilon",
    "seed",
)


@dataclass(frozen=True)
class SetFacts:
    """Which rows were used, without what they say.

    Attributes:
        rows: how many.
        fingerprint: of their texts, 32 hexadecimal digits, under the key in `forget_hashes.json`; without
            that file it confirms no guess. None of an earlier version's checkpoint, whose fingerprint had no key.
        name, config, split: as `datasets` knows them, None for rows made in memory.
    """

    rows: int
    fingerprint: str | None
    name: str | None = None
    config: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        """What a reader calls the set: "tofu, forget10, train"."""
        return ", ".join(part for part in (self.name, self.config, self.split) if part) or "an unnamed data set"


@dataclass(frozen=True)
class Seal:
    """What the file of hashes that belongs to the facts holds.

    Attributes:
        requests, count: how many requests' hashes, and how many hashes.
        sha256: of the file.
    """

    requests: int
    count: int
    sha256: str

    @classmethod
    def of(cls, hashes: ForgetHashes) -> "Seal":
        """The seal of hashes as they are saved."""
        return cls(len(hashes.requests), hashes.count, hashlib.sha256(hashes.text().encode()).hexdigest())


@dataclass(frozen=True)
class Facts:
    """What a card says about a checkpoint beyond its figures.

    Attributes:
        method, tau: as in `evaluation.report.Run`; tau is None for methods other than MDU.
        options: the method's own constants, and those of the retain loss.
        backbone: see `mdu_trainer.models.Backbone`.
        base_model, base_revision: Hub id of the model at the start and its commit, None for a local one.
        base_path: folder of a local model at the start. Never published.
        adapter: PEFT's type and the rank, None where all weights were trained.
        forget, retain: the rows; `retain` is None where there were none.
        description: the user's own line on what was to be forgotten.
        training: optimisation and precision, by name.
        versions: of the packages involved.
        earlier: the rows that the model at the start had been made to forget, request by request.
        hashes: of the file of hashes beside the facts, None if an earlier version wrote it.
    """

    method: str
    tau: float | None
    options: dict[str, Any]
    backbone: str
    base_model: str | None
    base_revision: str | None
    base_path: str | None
    adapter: dict[str, Any] | None
    forget: SetFacts
    retain: SetFacts | None
    description: str | None
    training: dict[str, Any]
    versions: dict[str, str]
    earlier: list[SetFacts] = field(default_factory=list)
    hashes: Seal | None = None

    @property
    def name(self) -> str:
        """What tables and pictures call the model, as `Run.name` does."""
        return self.method if self.tau is None else f"{self.method} tau={self.tau:g}"

    def save(self, folder: str | Path) -> None:
        """Write `unlearning.json`, whole or not at all, readable by its owner alone."""
        content = asdict(self)
        content |= {name: without_secrets(content[name]) for name in ("options", "adapter", "training", "description")}
        write_whole(Path(folder) / FACTS_FILE, json.dumps({"schema": SCHEMA} | content, indent=2) + "\n", private=True)

    @classmethod
    def load(cls, folder: str | Path) -> "Facts":
        """Read what `save` wrote, or what an earlier version wrote, of which the fingerprints are dropped.

        Raises:
            FileNotFoundError: the folder was not written by `MDUTrainer`.
            ValueError: the file is not readable, or of another schema.
        """
        path = Path(folder) / FACTS_FILE
        schema, content = read_record(path, (UNSEALED, SCHEMA))
        if schema == UNSEALED and isinstance(content.get("earlier", []), list):  # its fingerprints had no key
            sets = [content.get("forget"), content.get("retain"), *content.get("earlier", [])]
            for facts in filter(lambda one: isinstance(one, dict), sets):
                facts["fingerprint"] = None
        return decode(cls, content, path, "a file of facts", "save the model with the trainer again")


def whole_hashes(folder: str | Path, facts: Facts) -> ForgetHashes:
    """The hashes beside the facts of a checkpoint, as the trainer wrote them.

    Raises:
        ValueError: they are missing, cut short or changed, so that a scan would find less than it should.
    """
    path, seal = Path(folder) / HASHES_FILE, facts.hashes
    hashes = None
    if seal is None:
        problem = f"an earlier version wrote {FACTS_FILE}, without noting what {HASHES_FILE} must hold"
    elif not path.is_file():
        problem = f"{HASHES_FILE} is missing"
    elif (hashes := _readable(path)) is None:
        problem = f"{HASHES_FILE} cannot be read"
    elif hashes.count != seal.count:
        problem = f"{HASHES_FILE} holds {hashes.count} hashes instead of {seal.count}"
    elif Seal.of(hashes) != seal:
        problem = f"{HASHES_FILE} is not what was written with {FACTS_FILE}"
    elif seal.requests < 1 + len(facts.earlier):
        problem = f"{HASHES_FILE} lacks the hashes of {1 + len(facts.earlier) - seal.requests} earlier requests"
    else:
        return hashes
    raise UserError(
        f"{folder} cannot be scanned for rows to forget: {problem}. Copy the file from where the model was saved, or "
        "save the model with the trainer again. To publish without the scan, pass leak_scan=False (--no-leak-scan)."
    )


def _readable(path: Path) -> ForgetHashes | None:
    try:
        return ForgetHashes.load(path.parent)
    except ValueError:
        return None


def trainer_facts(trainer: "MDUTrainer", forget: SetFacts, retain: SetFacts | None) -> Facts:
    """The facts of a trainer's model as it is now."""
    args, state = trainer.args, trainer.state
    model = trainer.accelerator.unwrap_model(trainer.model)
    config = model.config
    name = getattr(config, "_name_or_path", None) or None
    is_local = name is None or Path(name).exists()
    options = {name: getattr(args, name) for name in trainer.forget_objective.settings} | trainer.loss_options
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
    return Facts(
        method=args.loss_type,
        tau=args.tau if args.loss_type == "mdu" else None,
        options=options,
        backbone=trainer.backbone.name,
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


def _cached_commit(name: str, revision: str | None) -> str | None:
    """The commit that a Hub model was loaded from, as far as the cache tells: transformers does not keep it."""
    path = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(path, str):
        return None
    snapshot = Path(path).parent
    loaded_is_known = revision is not None or len(list(snapshot.parent.iterdir())) == 1
    return snapshot.name if loaded_is_known else None


def set_facts(dataset: Dataset, key: bytes) -> SetFacts:
    """Names, size and fingerprint of a data set.

    Args:
        dataset: the rows.
        key: of the fingerprint, that of the request's hashes.
    """
    digest = hashlib.blake2b(key=key, digest_size=16)
    for row in dataset:
        digest.update(json.dumps([row.get(column) for column in FORGET_COLUMNS], default=str).encode())
    info = getattr(dataset, "info", None)
    split = getattr(dataset, "split", None)
    return SetFacts(
        rows=len(dataset),
        fingerprint=digest.hexdigest(),
        name=getattr(info, "dataset_name", None),
        config=getattr(info, "config_name", None),
        split=None if split is None else str(split),
    )


def _adapter(model: Any) -> dict[str, Any] | None:
    config = next(iter(getattr(model, "peft_config", {}).values()), None)
    if config is None:
        return None
    values = {name: getattr(config, name, None) for name in ("r", "lora_alpha", "lora_dropout")}
    return {"type": str(getattr(config.peft_type, "value", config.peft_type))} | {
        name: value for name, value in values.items() if value is not None
    }


class Provenance:
    """The facts and hashes of a trainer's checkpoints. Data is read once, when the first of them is saved.

    Args:
        forget: the rows to forget.
        retain: the rows to keep, if any.
    """

    def __init__(self, forget: Dataset | None, retain: Dataset | None):
        self._rows = forget, retain
        self._key = secrets.token_bytes(16)
        self._sets: tuple[SetFacts, SetFacts | None] | None = None
        self._hashes: ForgetHashes | None = None
        self._earlier: tuple[list[SetFacts], ForgetHashes] | None = None

    def facts(self, trainer: "MDUTrainer") -> Facts | None:
        """The facts of the trainer's model as it is now; None for a trainer without rows to forget."""
        forget, retain = self._rows
        if forget is None:
            return None
        if self._sets is None:
            self._sets = set_facts(forget, self._key), None if retain is None else set_facts(retain, self._key)
        facts = trainer_facts(trainer, *self._sets)
        seal = Seal.of(self.hashes(trainer))
        return replace(facts, earlier=self._requests_before(trainer)[0], hashes=seal)

    def hashes(self, trainer: "MDUTrainer") -> ForgetHashes:
        """The hashes of the rows to forget, and of those that the model at the start had been made to forget."""
        if self._hashes is None:
            forget, retain = self._rows
            tokens = getattr(trainer.processing_class, "all_special_tokens", [])
            hashes = ForgetHashes.of(
                row_turns(forget),
                () if retain is None else row_turns(retain),
                key=self._key,
                control_tokens=[token for token in tokens if MARKUP.fullmatch(token)],
            )
            if hashes.too_short:
                logger.warning(
                    f"{hashes.too_short} texts of the forget set have fewer than {SHORTEST_ROW_WORDS} words, the "
                    "question before them included. The scan before publishing cannot look for them."
                )
            earlier = self._requests_before(trainer)[1]
            self._hashes = ForgetHashes(hashes.requests + earlier.requests, hashes.too_short + earlier.too_short)
        return self._hashes

    def warn_of_relearning(self, trainer: "MDUTrainer") -> None:
        """Count the rows to keep that quote what the model was made to forget before: they would teach it again."""
        _, hashes = self._requests_before(trainer)
        retain = self._rows[1]
        if retain is None or not hashes.requests:
            return
        quoting = sum(any(hashes.found_in(text) for text in row_texts([row])) for row in retain)
        if quoting:
            logger.warning(
                f"{quoting} of {len(retain)} rows to keep quote what an earlier request made the model forget, and "
                "would teach it again. Remove them from the retain set."
            )

    def _requests_before(self, trainer: "MDUTrainer") -> tuple[list[SetFacts], ForgetHashes]:
        """Facts and hashes of the requests that made the model at the start, from its folder."""
        if self._earlier is None:
            model = trainer.accelerator.unwrap_model(trainer.model)
            folder = Path(getattr(model.config, "_name_or_path", None) or "")
            facts = Facts.load(folder) if folder.name and (folder / FACTS_FILE).is_file() else None
            earlier = [*facts.earlier, facts.forget] if facts else []
            self._earlier = earlier, self._hashes_before(folder, facts)
        return self._earlier

    def _hashes_before(self, folder: Path, facts: Facts | None) -> ForgetHashes:
        if facts is None:
            return ForgetHashes.load(folder) if folder.name and (folder / HASHES_FILE).is_file() else ForgetHashes()
        try:
            return whole_hashes(folder, facts)
        except UserError as error:
            logger.warning(
                f"What {folder} was made to forget before is not known here: rows to keep are not compared with it, "
                f"and the new model is not published with a scan. {error}"
            )
            return ForgetHashes()

    def save(self, trainer: "MDUTrainer", folder: str | Path) -> None:
        """Write both files into a checkpoint."""
        facts = self.facts(trainer)
        if facts is not None:
            self.hashes(trainer).save(folder)
            facts.save(folder)
