"""A record of an unlearning on one page, for the files of whoever has to show that a deletion was done.

    write_certificate("outputs/model", request_id="A-17", request_date="2026-05-01")

It says what the card says in short, with the checksums of the weights, in one HTML file that needs nothing else; a
browser prints it. It holds no row, and is not published.
"""

import hashlib
from pathlib import Path
from typing import Any

from ..evaluation.results import today
from ..files import UserError, write_whole
from ..objectives import described
from ..provenance.facts import whole_hashes
from ..provenance.forget_hashes import HASHES_FILE
from .markup import html_template
from .model_card import LOCAL_BASE, CardDetails, chosen_run, template_path
from .records import Checkpoint, RecoveryLike, ResultsLike
from .short_words import in_short

CERTIFICATE, TEMPLATE = "certificate.html", "certificate.html.jinja"
CHUNK = 1 << 24  # bytes of a file that are read at a time
MOST_ATTACKS = 6  # that the page has room for: those under which most comes back


def write_certificate(
    folder: str | Path,
    results: ResultsLike = None,
    recovery: RecoveryLike = None,
    *,
    issued: str | None = None,
    **details: Any,
) -> Path:
    """Write `certificate.html` into a checkpoint, and return its path.

    Args:
        folder, results, recovery: as in `Checkpoint.read`.
        issued: day of the record, by default today.
        **details: the fields of `CardDetails`.

    Raises:
        ValueError: the folder has no weights, or what is written would quote rows to forget. Nothing was written.
        TypeError: for a keyword that is no detail of a card.
    """
    checkpoint, said = Checkpoint.read(folder, results, recovery), CardDetails.of(**details)
    text = certificate(checkpoint, said, issued or today(), weight_digests(checkpoint.folder))
    if (checkpoint.folder / HASHES_FILE).is_file():
        hashes = whole_hashes(checkpoint.folder, checkpoint.facts)
        if hashes.found_in(text, template_path().with_name(TEMPLATE).read_text(encoding="utf-8")):
            raise UserError(
                f"{CERTIFICATE} would quote rows that were to be forgotten. It was not written. Choose another "
                "description or request id."
            )
    write_whole(checkpoint.folder / CERTIFICATE, text)
    return checkpoint.folder / CERTIFICATE


def certificate(checkpoint: Checkpoint, details: CardDetails, issued: str, weights: dict[str, str]) -> str:
    """Return the page. `weights` are file names and checksums."""
    facts, recovery = checkpoint.facts, checkpoint.recovery
    results = checkpoint.results and checkpoint.results.finite()
    run = results and chosen_run(results, facts)
    base = details.base_model or facts.base_model or LOCAL_BASE
    revision = facts.revision_of(base)
    return html_template(template_path().with_name(TEMPLATE)).render(
        title=details.title,
        request_id=details.request_id,
        request_date=details.request_date,
        issued=issued,
        forget=(details.description or facts.description or str(facts.forget)).rstrip("."),
        facts=facts,
        method=described(facts.method, facts.options),
        base=f"{base} at {revision}" if revision else base,
        short=in_short(facts, results, run, recovery),
        recovery=_strongest(checkpoint),
        weights=weights,
    )


def weight_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of weights in a folder, by its name."""
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not files:
        raise UserError(f"{folder} has no weights (*.safetensors), of which a certificate gives the checksums.")
    digests = {}
    for path in files:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while part := file.read(CHUNK):
                digest.update(part)
        digests[path.name] = digest.hexdigest()
    return digests


def _strongest(checkpoint: Checkpoint) -> list[list[str]] | None:
    """Return the scores under the attacks that bring back most, a row each, under a header; None without attacks."""
    recovery, name = checkpoint.recovery, checkpoint.facts.name
    if recovery is None or name not in recovery.models:
        return None
    ends = [model for model in next(iter(recovery.attacks.values())).models if model not in recovery.models]
    order = sorted(recovery.attacks, key=lambda attack: -recovery.attacks[attack].models[name].after.value)
    rows = [[attack, *(str(recovery.attacks[attack].models[one].after) for one in (*ends, name))] for attack in order]
    return [["attack", *ends, "this model"], *rows[:MOST_ATTACKS]]
