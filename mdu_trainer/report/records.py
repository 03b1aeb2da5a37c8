"""The records of an unlearned model, read once: its facts, the hashes of the rows, its scores, the attacks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from ..attacks.results import Recovery
from ..evaluation.results import Results
from ..files import Record
from ..provenance.facts import Facts, whole_hashes
from ..provenance.forget_hashes import ForgetHashes

RESULTS, RECOVERY = "results.json", "recovery.json"

ResultsLike = Results | str | Path | Literal[False] | None
RecoveryLike = Recovery | str | Path | Literal[False] | None

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Checkpoint:
    """An unlearned model's folder, as far as cards and pushes read it.

    Attributes:
        folder: where the records lie.
        facts: of the unlearning.
        hashes: of the rows to forget, None where nothing is to be scanned for them.
        results: the comparison that holds the model's scores, None without one.
        recovery: the attacks on the model, None without any.
    """

    folder: Path
    facts: Facts
    hashes: ForgetHashes | None
    results: Results | None
    recovery: Recovery | None

    @classmethod
    def read(
        cls,
        folder: str | Path,
        results: ResultsLike = None,
        recovery: RecoveryLike = None,
        *,
        facts: Facts | None = None,
        scan: bool = False,
    ) -> "Checkpoint":
        """Read a folder.

        Args:
            folder: of a checkpoint of `MDUTrainer`.
            results, recovery: the record, or its file; by default `results.json` and `recovery.json` in the folder,
                False for none.
            facts: by default those of the folder.
            scan: read the hashes, too.

        Raises:
            FileNotFoundError: there are no facts, or a file that was named is not there.
            ValueError: a file is not what its name says, or the hashes are not those that the trainer wrote.
        """
        folder = Path(folder)
        facts = facts or Facts.load(folder)
        hashes = whole_hashes(folder, facts) if scan else None
        return cls(
            folder, facts, hashes, load_record(Results, folder, results), load_record(Recovery, folder, recovery)
        )


def load_record(kind: type[R], folder: Path, given: R | str | Path | Literal[False] | None = None) -> R | None:
    """Return the record that `given` names: itself, a file, the folder's own if it has one (None), or none (False)."""
    own = folder / (RESULTS if kind is Results else RECOVERY)
    if given is None:
        given = own if own.is_file() else False
    if given is False or isinstance(given, kind):
        return given or None
    if not Path(given).is_file():
        raise FileNotFoundError(f"There is no {kind.kind} {given}.")
    return kind.load(given)
