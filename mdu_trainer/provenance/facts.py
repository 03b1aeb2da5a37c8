"""Facts of an unlearning, which a checkpoint keeps for its card, beside hashes that recognise a leak.

Two files lie beside the weights. Neither is ever uploaded:

- `unlearning.json`, the `Facts`: method, options, names and fingerprints of the data, versions. No text of any row.
- `forget_hashes.json`, the `ForgetHashes`: keyed hashes of the word sequences that only the forget rows hold. The
  facts note their number and checksum: a file that was emptied or cut short is not taken for one that finds nothing.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset

from ..files import FolderRecord, UserError, typed, without_secrets
from .forget_hashes import HASHES_FILE, ForgetHashes
from .texts import forget_columns

FACTS_FILE = "unlearning.json"
UNSEALED = 1  # the earlier schema, with fingerprints without a key, and no seal of the hashes


@dataclass(frozen=True)
class SetFacts:
    """The rows of a data set that were used, without what they say.

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
        """Return the name for readers: "tofu, forget10, train"."""
        return ", ".join(part for part in (self.name, self.config, self.split) if part) or "an unnamed data set"


@dataclass(frozen=True)
class Seal:
    """The size and checksum of the file of hashes that belongs to the facts.

    Attributes:
        requests, count: how many requests' hashes, and how many hashes.
        sha256: of the file.
    """

    requests: int
    count: int
    sha256: str

    @classmethod
    def of(cls, hashes: ForgetHashes) -> "Seal":
        """Return the seal of hashes as they are saved."""
        return cls(len(hashes.requests), hashes.count, hashlib.sha256(hashes.to_json().encode()).hexdigest())


@dataclass(frozen=True)
class Facts(FolderRecord):
    """Facts that a card tells about a checkpoint, beside its scores.

    Attributes:
        method, tau: as in `evaluation.results.Run`; tau is None for methods other than MDU.
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

    schema: ClassVar[int] = 2
    earlier_schemas: ClassVar[tuple[int, ...]] = (UNSEALED,)
    kind: ClassVar[str] = "file of facts"
    file: ClassVar[str] = FACTS_FILE

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
        """Return the name of the model in tables and pictures, as `Run.name` does."""
        of_preset = f" preset={self.training['preset']}" if self.training.get("preset") else ""
        return (self.method if self.tau is None else f"{self.method} tau={self.tau:g}") + of_preset

    def revision_of(self, base: str | None) -> str | None:
        """Return the commit of a base on the Hub, None unless it is the one on record."""
        return self.base_revision if base == self.base_model else None

    def content(self) -> dict[str, Any]:
        """Return the facts without the secrets that options may hold."""
        content = super().content()
        return content | {
            name: without_secrets(content[name]) for name in ("options", "adapter", "training", "description")
        }

    @classmethod
    def from_content(cls, content: dict[str, Any], schema: int) -> "Facts":
        """Read the facts. The fingerprints of an earlier schema are dropped, for they had no key."""
        if schema == UNSEALED and isinstance(content.get("earlier", []), list):
            for facts in (content.get("forget"), content.get("retain"), *content.get("earlier", [])):
                if isinstance(facts, dict):
                    facts["fingerprint"] = None
        return typed(cls, content)


def whole_hashes(folder: str | Path, facts: Facts) -> ForgetHashes:
    """Return the hashes beside the facts of a checkpoint, as the trainer wrote them.

    Raises:
        ValueError: they are missing, cut short or changed, so that a scan would find less than it should.
    """
    seal, hashes = facts.hashes, None
    with suppress(ValueError, FileNotFoundError):
        hashes = ForgetHashes.load(folder)
    if seal is None:
        problem = f"an earlier version wrote {FACTS_FILE}, without noting what {HASHES_FILE} must hold"
    elif not (Path(folder) / HASHES_FILE).is_file():
        problem = f"{HASHES_FILE} is missing"
    elif hashes is None:
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


def set_facts(dataset: Dataset, key: bytes) -> SetFacts:
    """Return names, size and fingerprint of a data set; the key is that of the request's hashes."""
    digest = hashlib.blake2b(key=key, digest_size=16)
    for row in dataset:
        digest.update(json.dumps([row.get(column) for column in forget_columns(row)], default=str).encode())
    info = getattr(dataset, "info", None)
    split = getattr(dataset, "split", None)
    return SetFacts(
        rows=len(dataset),
        fingerprint=digest.hexdigest(),
        name=getattr(info, "dataset_name", None),
        config=getattr(info, "config_name", None),
        split=None if split is None else str(split),
    )
