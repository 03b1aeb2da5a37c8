"""What a checkpoint keeps about its unlearning: the facts of its card, and hashes that recognise a leak.

Two files lie beside the weights. Neither is ever uploaded:

- `unlearning.json`, the `Facts`: method, options, names and fingerprints of the data, versions. No text of any row.
- `forget_hashes.json`, the `ForgetHashes`: keyed hashes of the word sequences that only the forget rows hold. The
  facts note their number and checksum: a file that was emptied or cut short is not taken for one that finds nothing.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.utils import logging

from ..files import UserError, decode, read_record, without_secrets, write_whole
from .forget_hashes import FORGET_COLUMNS, HASHES_FILE, ForgetHashes

logger = logging.get_logger(__name__)

FACTS_FILE = "unlearning.json"
SCHEMA, UNSEALED = 2, 1  # the earlier schema has fingerprints without a key, and no seal of the hashes


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

    def revision_of(self, base: str | None) -> str | None:
        """Return the commit of a base on the Hub, None unless it is the one on record."""
        return self.base_revision if base == self.base_model else None

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
        "save the model with the trainer again. To publish without the scan, pass leak_scan=False (--no_leak_scan)."
    )


def _readable(path: Path) -> ForgetHashes | None:
    try:
        return ForgetHashes.load(path.parent)
    except ValueError:
        return None


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
