"""The model card of an unlearned model: metadata and text from a checkpoint's facts and measured scores.

    python -m mdu_trainer.model_card FOLDER

writes `README.md`, and the picture it shows, from what the folder holds. Only measured scores appear; a missing one
is left out.
"""

import json
import re
from dataclasses import dataclass, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from transformers.utils import logging

from ..attacks.results import Recovery
from ..evaluation.protocol import PROTOCOL_WORDS, ROUGE_WORDS
from ..evaluation.registry import explained, score_words
from ..evaluation.results import NEVER_TRAINED, ROUGE, Estimate, Results, Run
from ..files import UserError
from ..inference.config import has_decoding
from ..objectives import OBJECTIVES, described
from ..provenance.facts import Facts
from .attack_words import attack_words
from .data_names import data_name, hub_datasets
from .eval_results import model_index
from .markup import figure_text, markdown_code, markdown_text
from .records import Checkpoint, RecoveryLike, ResultsLike
from .short_words import card_short
from .style import picture_bytes

logger = logging.get_logger(__name__)

CARD, PICTURE = "README.md", "tradeoff.png"
TEMPLATE = "unlearned_model.md.jinja"
TAGS = ("unlearning", "machine-unlearning", "masked-diffusion", "diffusion-language-model", "mdu_trainer")
TAKEN_OVER = ("license", "license_name", "license_link", "language")  # from the card of the base
LOCAL_BASE = "a local model"
SWEPT = {"steps": "max_steps", "epochs": "num_train_epochs"}  # facts of a training, as the configuration calls them

RETAIN_LOSSES = {"nelbo": "the masked-diffusion bound a token", "kl": "the divergence from the model at the start"}

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
CHAT_PROMPT = '[{"role": "user", "content": "Say hello."}]'
TEXT_PROMPT = '"The sea is"'


@dataclass(frozen=True)
class CardDetails:
    """Details that a card gives, and that are neither in the facts nor measured.

    Attributes:
        repo_id, revision: where the model is, or will be, on the Hub.
        base_model: Hub id of the model at the start, if the facts do not know it.
        description: one line on what was to be forgotten, in place of the facts'. It is published.
        datasets: Hub ids of the data, by default the one that the results name.
        license, language: by default those of the base's card, or none.
        tags: further ones.
        model_name: what to call the model, by default the repository's name.
        request_id, request_date: of whoever asked for it, in your own words: a number of your files, and a day. They
            are published; name nobody.
        token: for the card of a private base.
    """

    repo_id: str | None = None
    revision: str | None = None
    base_model: str | None = None
    description: str | None = None
    datasets: str | list[str] | None = None
    license: str | None = None
    language: str | list[str] | None = None
    tags: str | list[str] | None = None
    model_name: str | None = None
    request_id: str | None = None
    request_date: str | None = None
    token: str | None = None

    @property
    def title(self) -> str:
        """The name of the model."""
        return self.model_name or (self.repo_id or "unlearned-model").split("/")[-1]

    @property
    def request(self) -> str:
        """The request in words, empty if nothing is known of it."""
        words = {"request": self.request_id, "of": self.request_date}
        return " ".join(f"{word} {value}" for word, value in words.items() if value)

    @classmethod
    def of(cls, **given: Any) -> "CardDetails":
        """Return the details that keywords give.

        Raises:
            TypeError: some are no details of a card; the message names them.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(given.keys() - set(known))
        if unknown:
            raise TypeError(f"Unknown details of a card: {', '.join(unknown)}. There are {', '.join(known)}.")
        return cls(**given)


def unlearned_model_card(
    facts: Facts,
    results: Results | None = None,
    recovery: Recovery | None = None,
    details: CardDetails | None = None,
    *,
    adapter: bool = False,
    chats: bool = True,
    decodes: bool = False,
    picture: str | None = None,
) -> ModelCard:
    """Render the card of an unlearned model.

    Args:
        facts: of the checkpoint.
        results: a comparison that holds the model's run, and "base".
        recovery: attacks on the model, and on the base.
        details: what else the card says.
        adapter: the repository holds an adapter, not the whole model.
        chats: the tokenizer has a chat template.
        decodes: the repository holds the options of decoding that the model was measured with.
        picture: file name of the trade-off picture in the repository, if there is one.

    Raises:
        ValueError: no run of `results` is this model's, or `recovery` is of other models.
    """
    details = details or CardDetails()
    results = results and results.finite()
    run = results and chosen_run(results, facts)
    base = details.base_model or facts.base_model
    return ModelCard.from_template(
        _metadata(facts, results, run, details, adapter),
        template_path=str(template_path()),
        title=markdown_text(details.title),
        what=f"{_linked(base)} that was trained to forget a part of what it had learned"
        + (", as an adapter." if adapter else "."),
        facts=facts,
        forget=markdown_text(details.description or facts.description or str(facts.forget)).rstrip("."),
        retain=markdown_text(facts.retain),
        versions={markdown_text(name): markdown_text(value) for name, value in facts.versions.items()},
        request=markdown_text(details.request) if details.request else None,
        **card_short(facts, results, run, recovery),
        **_method_words(facts),
        **_score_words(results, run),
        **attack_words(recovery, facts),
        picture=picture and quote(picture),
        adapter=adapter,
        decodes=decodes,
        newest=markdown_text(facts.versions["mdu_trainer"]),
        repo=_string(details.repo_id or "PATH"),
        where=_revision(details.revision),
        base=_string(base),
        base_where=_revision(facts.revision_of(base)),
        prompt=CHAT_PROMPT if chats else TEXT_PROMPT,
    )


def _metadata(
    facts: Facts, results: Results | None, run: Run | None, details: CardDetails, adapter: bool
) -> ModelCardData:
    """Return the head of a card, which the Hub reads."""
    base = details.base_model or facts.base_model
    given = {"license": details.license, "language": details.language}
    known = base_metadata(facts, base, details.token) | {k: value for k, value in given.items() if value is not None}
    return ModelCardData(
        base_model=base,
        base_model_relation=("adapter" if adapter else "finetune") if base else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="fill-mask" if facts.backbone == "masked_lm" else "text-generation",
        tags=list(dict.fromkeys([*TAGS, facts.method, *_listed(details.tags)])),
        datasets=_listed(details.datasets) or hub_datasets(results) or None,
        model_name=details.title,
        eval_results=model_index(run, data_name(results)) if results and run else None,
        **known,
    )


def checkpoint_card(
    checkpoint: Checkpoint, details: CardDetails, folder: Path | None = None, chats: bool | None = None
) -> tuple[ModelCard, bytes | None]:
    """Render the card of a checkpoint, and draw the picture it shows, if there is something to draw.

    The model's files may lie in another folder than the records. Whether the tokenizer has a chat template (`chats`)
    is read there, if it is not given.
    """
    folder = folder or checkpoint.folder
    picture = draw_picture(checkpoint.results, checkpoint.recovery)
    card = unlearned_model_card(
        checkpoint.facts,
        checkpoint.results,
        checkpoint.recovery,
        details,
        adapter=(folder / "adapter_config.json").is_file(),
        chats=has_chat_template(folder) if chats is None else chats,
        decodes=has_decoding(folder),
        picture=None if picture is None else PICTURE,
    )
    return card, picture


def write_model_card(
    folder: str | Path,
    facts: Facts | None = None,
    results: ResultsLike = None,
    recovery: RecoveryLike = None,
    **details: Any,
) -> ModelCard:
    """Write `README.md`, and the picture it shows, into a checkpoint.

    Args:
        folder, facts, results, recovery: as in `Checkpoint.read`.
        **details: the fields of `CardDetails`.

    Raises:
        TypeError: for a keyword that is none of them.
    """
    checkpoint = Checkpoint.read(folder, results, recovery, facts=facts)
    card, picture = checkpoint_card(checkpoint, CardDetails.of(**details))
    if picture is not None:
        (checkpoint.folder / PICTURE).write_bytes(picture)
    card.save(checkpoint.folder / CARD)
    return card


def chosen_run(results: Results, facts: Facts) -> Run:
    """Return the one run of a comparison that is the checkpoint's: the same method, tau, and settings of a sweep.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = [run for run in results.runs if (run.method, run.tau) == (facts.method, facts.tau)]
    if len(found) > 1:
        training = {SWEPT.get(name, name): value for name, value in facts.training.items()}
        found = [run for run in found if all(training.get(name) == value for name, value in run.settings.items())]
        most = max((len(run.settings) for run in found), default=0)  # a preset's run has the tau of another
        found = [run for run in found if len(run.settings) == most]
    if len(found) != 1:
        raise UserError(
            f"The checkpoint is {facts.name}, of which the results have {len(found)} runs instead of one "
            f"({', '.join(run.name for run in results.runs) or 'none'}). Pass the results of this checkpoint."
        )
    return found[0]


def draw_picture(results: Results | None, recovery: Recovery | None = None) -> bytes | None:
    """Draw the trade-off of all runs as PNG, with what attacks bring back beside it if that is known.

    There is none without matplotlib, or where ROUGE-L was not measured.
    """
    if results is None or find_spec("matplotlib") is None:
        return None
    from .plots import plot_tradeoff

    sides = ("forget", "retain")
    runs = [run for run in results.runs if all(run.figure(side, ROUGE) for side in sides)]
    if not runs:
        return None
    recoveries = None if recovery is None else drawn_recoveries(recovery)
    plot = partial(plot_tradeoff, [run.renamed(figure_text) for run in runs], recoveries=recoveries)
    return picture_bytes(plot, PICTURE)


def drawn_recoveries(recovery: Recovery) -> dict[str, dict[str, Estimate]]:
    """Return the recoveries of a record, under names that can be drawn."""
    return {
        figure_text(model): {figure_text(attack): estimate for attack, estimate in found.items()}
        for model, found in recovery.recoveries().items()
    }


def base_metadata(facts: Facts, base: str | None, token: str | None = None) -> dict[str, Any]:
    """Return license and language of the base, as far as its own card can be read and has them."""
    try:
        if base is not None:
            path = hf_hub_download(base, CARD, revision=facts.revision_of(base), token=token)
        elif facts.base_path and (Path(facts.base_path) / CARD).is_file():
            path = str(Path(facts.base_path) / CARD)
        else:
            return {}
        data = ModelCard.load(path, ignore_metadata_errors=True).data
    except (OSError, ValueError) as error:
        logger.warning(
            f"The card of the base, {base or 'a local folder'}, cannot be read ({type(error).__name__}): the card "
            "goes without its license. Pass license."
        )
        return {}
    return {name: data.get(name) for name in TAKEN_OVER if data.get(name) is not None}


def has_chat_template(folder: Path) -> bool:
    """Whether a checkpoint's tokenizer renders conversations."""
    config = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (
        config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8")
    )


def card_wording() -> str:
    """Return the wording of every card, which is no quote of a row: the template and the texts that go into it."""
    methods = [method.words for method in OBJECTIVES.values()]
    methods += [one.words for method in OBJECTIVES.values() for one in method.variants.values()]
    scores = [*score_words().values(), *PROTOCOL_WORDS.values(), *ROUGE_WORDS.values()]
    return " ".join([template_path().read_text(encoding="utf-8"), *methods, *scores, CHAT_PROMPT])


def template_path() -> Path:
    """Return the path of the card's template: inside the package when installed from a wheel, beside it in a clone."""
    package = Path(__file__).parents[1]
    installed = package / "model_cards" / TEMPLATE
    return installed if installed.is_file() else package.parent / "model_cards" / TEMPLATE


def _method_words(facts: Facts) -> dict[str, Any]:
    """Return the template's words on the method and the training."""
    return {
        "method": described(facts.method, facts.options),
        "options": [markdown_code(f"{k}={v}") for k, v in facts.options.items() if not k.startswith("retain_")],
        "retain_words": RETAIN_LOSSES.get(facts.options.get("retain_loss_type", "")),
        "training": _training(facts),
    }


def _score_words(results: Results | None, run: Run | None) -> dict[str, Any]:
    """Return the template's words on the scores; none where nothing was measured.

    The table has three columns: the base, this model, and one that never saw the rows.
    """
    if results is None or run is None:
        return {}
    others = {name: [other for other in results.runs if other.method == name] for name in ("base", NEVER_TRAINED)}
    compared = [*others["base"], run, *others[NEVER_TRAINED]]
    return {
        "table": Results("", "", {}, [one.renamed(markdown_text) for one in compared]).details(),
        "metrics": explained(metric for _, metric in run.places()),
        "dataset": markdown_text(data_name(results)),
        "protocol": PROTOCOL_WORDS[run.protocol],
        "rouge": ROUGE_WORDS[run.rouge],
        "kept_was_measured": "retain" in run.scores,
        "never_trained": bool(others[NEVER_TRAINED]),
    }


def _training(facts: Facts) -> dict[str, Any]:
    adapter = facts.adapter or {}
    trained = {"trained": ", ".join(f"{k} {v}" for k, v in adapter.items()) if adapter else "all weights"}
    base = {"base revision": facts.base_revision} if facts.base_revision else {}
    values = {name.replace("_", " "): value for name, value in facts.training.items() if value is not None}
    shown = base | trained | {name: f"{v:g}" if isinstance(v, float) else v for name, v in values.items()}
    return {markdown_text(name): markdown_text(value) for name, value in shown.items()}


def _linked(base: str | None) -> str:
    """Return the name of the base for the start of a sentence."""
    if base is None:
        return LOCAL_BASE.capitalize()
    link = f"(https://huggingface.co/{base})"
    return f"[{markdown_text(base)}]{link}" if HUB_ID.fullmatch(base) else markdown_text(base)


def _revision(revision: str | None) -> str:
    return f", revision={_string(revision)}" if revision else ""


def _string(text: str | None) -> str:
    """Return a string of Python, in double quotes."""
    return json.dumps(text)


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
