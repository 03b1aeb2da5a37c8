"""What trackers are told of a run: no word of the rows to forget, in no name and no setting."""

from typing import Any

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ..config.trackers import check_trackers
from ..files import UserError

# Settings that users name things by, in which a single word of the rows is too much
NAMES = ("run_name", "project", "output_dir", "hub_model_id", "trackio_space_id", "trackio_static_space_id")
NAMES += ("trackio_bucket_id",)


def check_tracked(trainer: Any) -> None:
    """Refuse a run of an `MDUTrainer` whose trackers would be told something of the rows to forget.

    A tracker gets all settings of the run, the config of the model, and scores under the names of the eval sets. They
    are compared with the hashes of the rows, as a push is: every text for sentences, names for words that only rows to
    forget hold. Trackers that were passed as callbacks are looked at as those of `report_to` are.

    Raises:
        UserError: naming the setting, never what it holds.
    """
    callbacks = trainer.callback_handler.callbacks
    used = [name for name, kind in INTEGRATION_TO_CALLBACK.items() if any(isinstance(one, kind) for one in callbacks)]
    if not used:
        return
    check_trackers(trainer.args, used)
    hashes = trainer.provenance.hashes()
    sent = {name: _words(value) for name, value in trainer.args.to_dict().items()}
    names = {name: sent[name] for name in NAMES}
    sent["config of the model"] = _words(trainer.model.config.to_dict())
    names |= {f"name of eval set {i}": name for i, name in enumerate(trainer._named_sets, 1) if name is not None}
    found = [where for where, text in (sent | names).items() if hashes.found_in(text)]
    found += [where for where, text in names.items() if where not in found and hashes.terms_in([text])]
    if found:
        raise UserError(
            f"{', '.join(found)} would tell {', '.join(used)} something of the rows to forget: what only they say "
            "stands there. Choose other words, or leave the trackers out (report_to='none')."
        )


def _words(value: Any) -> str:
    """Return the keys and values at any depth of dicts and lists, as one text."""
    if isinstance(value, dict):
        return " ".join(f"{key} {_words(part)}" for key, part in value.items())
    return " ".join(map(_words, value)) if isinstance(value, list | tuple) else str(value)
