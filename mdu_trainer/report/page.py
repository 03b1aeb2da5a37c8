"""One page that shows a whole run: what was done, tables, pictures, in a single HTML file that needs nothing else.

    write_page("outputs/demo")

It holds no script and asks for nothing outside of itself, and it quotes no row unless it is given rows to show.
"""

import base64
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from transformers import PreTrainedTokenizerBase

from ..attacks.leak_history import LEAK_HISTORY, load_history
from ..attacks.results import Recovery
from ..data.roles import label_roles
from ..evaluation.frontier import candidates, frontier_cells, place_of, reading, select, value_of
from ..evaluation.protocol import PROTOCOL_WORDS, ROUGE_WORDS
from ..evaluation.registry import explained
from ..evaluation.results import Results, Run, common, level_of
from ..files import UserError, without_secrets, write_whole
from ..objectives import described
from ..provenance.facts import FACTS_FILE, Facts
from ..token_roles.path_results import ALONG_PATH, PathScores
from ..token_roles.results import RoleReport
from .data_names import data_name
from .first_screen import first_screen
from .leak_plot import leak_cells, plot_leaks
from .markup import figure_text, html_template
from .model_card import CARD, chosen_run, drawn_recoveries, template_path
from .plots import plot_frontier, plot_losses, plot_tradeoff
from .records import RECOVERY, RESULTS, load_record
from .recovery_plots import Recoveries
from .role_text import audit_html
from .style import picture_bytes

PAGE, TEMPLATE = "report.html", "report.html.jinja"
ROLES, STATE = "roles.json", "trainer_state.json"
TYPES = {".svg": "image/svg+xml", ".png": "image/png"}
PICTURES = {  # found in the folder: name -> (section, alternative text)
    "roles": ("roles", "Divergence by role of the token, for each model."),
    "path": ("roles", "Divergence along the denoising path of the true answers, by role of the token."),
    "decoding": ("roles", "Divergence along what each model decodes, by role of the token."),
    "along_path": ("along", "Metrics along the denoising path, for the rows to forget and to keep."),
    "recovery": ("recovery", "What each attack brings back of what was forgotten, for each model."),
}
# with words of rows
PRIVATE_PICTURES = {"heatmap": ("roles", "Divergence of each token of an answer along the denoising path.")}
# what the analyses of the models in a folder leave beside the comparison
ANALYSES = (
    ROLES,
    RECOVERY,
    ALONG_PATH,
    *(f"{name}{suffix}" for name in (*PICTURES, *PRIVATE_PICTURES) for suffix in TYPES),
)
MOST_COLUMNS = 8  # runs side by side
TRAINING = {  # facts of a training -> column
    "steps": "steps",
    "epochs": "epochs",
    "learning_rate": "learning rate",
    "forget_rows_an_update": "rows an update",
    "seed": "seed",
}

BEST = (  # place in the trade-off
    "Best is the top of the dashed line: what a model says that never saw the rows, and nothing else lost. To the "
    "left of it is over-forgotten, to the right still known."
)
BEST_WITHOUT = "Best is the top left: everything forgotten, nothing else lost."

TREND = "The leak of each check along time, with its interval and the limit."
TREND_CAPTION = (
    "What each leak check found, with its 95 % interval. A check passes if the upper end of that is at most the limit "
    "and every row was measured."
)

Pairs = list[tuple[str, str]]  # question, answer


class Picture(NamedTuple):
    """A picture in the page: a data URI, words for those who cannot see it, and what to look for."""

    source: str
    alt: str
    caption: str = ""


class Model(NamedTuple):
    """A trained model in a folder beside the results, under the name of its run, or of the folder without one."""

    name: str
    folder: Path
    facts: Facts


def write_page(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    forget_rows: Iterable[Mapping[str, Any]] | None = None,
    retain_rows: Iterable[Mapping[str, Any]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write the page of a folder that a comparison was written to.

    First comes, for a reader in a hurry, what was to be forgotten and whether it worked. Then comes what is there:
    `results.json`, `roles.json`, `along_path.json`, `recovery.json`, `leak_history.jsonl`, the models' folders with
    their training curves and cards, and the pictures `roles`, `path`, `decoding`, `heatmap`, `along_path` and
    `recovery` (SVG or PNG).

    Args:
        folder: of the comparison.
        output: the file to write, by default `report.html` in the folder.
        forget_rows: rows with columns `question` and `answer` to show. The page is then as private as they are, and
            only its owner may read it. By default no row is quoted.
        retain_rows: further such rows, not shown: words that their answers share are wording, not knowledge.
        tokenizer: of the models, to colour the tokens of `forget_rows` by role where `roles.json` is there.

    Returns:
        The path of the page.

    Raises:
        ValueError: for a folder with nothing to show, or a file in it that cannot be read.
        ImportError: without matplotlib.
    """
    folder = Path(folder)
    output = Path(output) if output is not None else folder / PAGE
    results = load_record(Results, folder)
    results = results and results.finite()
    shown = (RESULTS, ROLES, RECOVERY, ALONG_PATH, LEAK_HISTORY)
    found = [name for name in shown if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder} holds nothing to show: none of {', '.join(shown)}.")
    models = find_models(folder, results)
    recovery = load_record(Recovery, folder)
    leaks = load_history(folder / LEAK_HISTORY) if LEAK_HISTORY in found else []
    roles = RoleReport.load(folder / ROLES) if ROLES in found else None
    rows = None if forget_rows is None else [(row["question"], row["answer"]) for row in forget_rows]
    others = [(row["question"], row["answer"]) for row in retain_rows or ()]
    comparison = _comparison(results, recovery)
    text = html_template(template_path().with_name(TEMPLATE)).render(
        title="Unlearning report",
        **first_screen(results, recovery, [model.facts for model in models], comparison.get("selected")),
        **comparison,
        **_trained(models, output.parent),
        roles=None if roles is None else roles.details_cells(),
        **_analysed(folder, recovery),
        leaks=leak_cells(leaks) if leaks else None,
        trend=leaks and _draw(plot_leaks, leaks, alt=TREND, caption=TREND_CAPTION),
        pictures=_pictures(folder, private=rows is not None),
        rows=rows,
        audit=None if roles is None or rows is None or tokenizer is None else _audit(rows, others, tokenizer),
    )
    write_whole(output, text, private=rows is not None)
    return output


def find_models(folder: Path, results: Results | None) -> list[Model]:
    """Return the unlearned models in a folder, in the order of the results; or the folder itself, if it is one."""
    models = []
    for path in [*folder.glob(FACTS_FILE)] or sorted(folder.glob(f"*/{FACTS_FILE}")):
        name, facts = path.parent.name, Facts.load(path.parent)
        if results is not None:
            with suppress(ValueError):  # of no run, or of a run of another name
                name = chosen_run(results, facts).name
        models.append(Model(name, path.parent, facts))
    order = {run.name: i for i, run in enumerate(results.runs if results else [])}
    return sorted(models, key=lambda model: order.get(model.name, len(order)))


def _comparison(results: Results | None, recovery: Recovery | None) -> dict[str, Any]:
    """Return the template's words on the results, with what attacks bring back beside the trade-off."""
    if results is None:
        return {"results": None, "drawn": []}
    selected, problem = _selected(results)
    measured = dict.fromkeys(metric for run in results.runs for _, metric in run.places())
    return {
        "results": results,
        "data": data_name(results),
        "model": Path(results.model).name if Path(results.model).is_absolute() else results.model,
        "settings": [
            (name, _shown(value)) for name, value in without_secrets(results.settings).items() if value is not None
        ],
        "protocol": PROTOCOL_WORDS[results.protocol],
        "rouge": ROUGE_WORDS[results.rouge],
        "table": frontier_cells(results, selected),
        "details": _details(results),
        "selected": selected,
        "problem": problem,
        "reading": reading(results.runs),
        "has_level": level_of(results.runs, place_of("forget")) is not None,
        "metrics": {name: text.replace("`", "") for name, text in explained(measured).items()},
        "drawn": _drawn(results.runs, selected, None if recovery is None else drawn_recoveries(recovery)),
    }


def _details(results: Results) -> list[list[str]]:
    """Return every score: the runs are the columns, or the rows if they are many."""
    cells = results.details_cells()
    if len(results.runs) <= MOST_COLUMNS:
        return cells
    columns = [[" ".join(row[:2]), *row[3:]] for row in cells]
    return [list(row) for row in zip(*[["run", *columns[0][1:]], *columns[1:]], strict=True)]


def _selected(results: Results) -> tuple[Run | None, str]:
    """Return the run that the settings select, or why there is none."""
    conditions = results.settings.get("select")
    if not conditions:
        return None, ""
    try:
        return select(results.runs, conditions), ""
    except ValueError as error:
        return None, str(error)


def _drawn(runs: list[Run], selected: Run | None, recoveries: Recoveries | None) -> list[Picture]:
    """Draw forgetting against retention, and against utility."""
    runs, selected = [run.renamed(figure_text) for run in runs], selected and selected.renamed(figure_text)
    pictures, has_level = [], level_of(runs, place_of("forget")) is not None
    rouge = ROUGE_WORDS[common(runs, "rouge")]
    kept = {"retain": "what is retained", "utility": "model utility"}
    for keep, words in kept.items():
        chosen = [run for run in runs if not math.isnan(value_of(run, "forget") + value_of(run, keep))]
        if not candidates(chosen):
            continue
        if keep == "retain":
            alt = f"Forget {rouge} against retain {rouge} on full axes, a point a run."
            caption = "The whole range. " + (BEST if has_level else BEST_WITHOUT)
            if recoveries:
                alt += " Beside it what the strongest attacks bring back from each model."
                caption += " On the right the attacks that bring back most."
            plot = partial(plot_tradeoff, recoveries=recoveries)
            pictures.append(_draw(plot, chosen, alt=alt, caption=caption))
        pictures.append(
            _draw(
                partial(plot_frontier, keep=keep, selected=selected),
                runs,
                alt=f"Forget {rouge} against {words}, with intervals and the Pareto front, a point a run.",
                caption=f"Forgetting against {words}, with 95 % bootstrap intervals. No other run is better than one "
                f"on the front in both{', forgetting being better nearer to the dashed line' if has_level else ''}.",
            )
        )
    return pictures


def _trained(models: list[Model], beside: Path) -> dict[str, Any]:
    """Return the template's words on the trainings, with curves, and cards linked from a page in `beside`."""
    histories = {figure_text(model.name): _history(model.folder) for model in models}
    histories = {name: history for name, history in histories.items() if any("step" in entry for entry in history)}
    runs = [
        {
            "name": model.name,
            "folder": model.folder.name,
            "options": ", ".join(f"{name}={_shown(value)}" for name, value in model.facts.options.items()),
            "training": [_shown(model.facts.training.get(key, "")) for key in TRAINING],
            "card": _link(model.folder / CARD, beside),
        }
        for model in models
    ]
    methods = {one.title: one for one in (described(model.facts.method, model.facts.options) for model in models)}
    curves = histories and _draw(
        plot_losses,
        histories,
        alt="Losses, KL and entropy of each run along its update steps.",
        caption="What each run logged along its steps; the forget losses of different methods are not comparable.",
    )
    return {"runs": runs, "methods": list(methods.values()), "training": list(TRAINING.values()), "curves": curves}


def _analysed(folder: Path, recovery: Recovery | None) -> dict[str, Any]:
    """Return what is shown of scores along the path, by title, and of attacks; None for what is not there."""
    along = PathScores.load(folder / ALONG_PATH).tables() if (folder / ALONG_PATH).is_file() else None
    told = recovery and recovery.membership_words()
    return {"along": along, "recovery": recovery and recovery.table_cells(), "membership": told}


def _audit(rows: Pairs, others: Pairs, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the answers with their tokens coloured by role, as HTML."""
    questions, answers = (list(texts) for texts in zip(*rows, *others, strict=True))
    ids = [tokenizer(answer, add_special_tokens=False).input_ids for answer in answers]
    roles, n = label_roles(questions, answers, ids, tokenizer), len(rows)
    return audit_html(answers[:n], ids[:n], roles[:n], tokenizer)


def _pictures(folder: Path, private: bool) -> dict[str, list[Picture]]:
    """Return the pictures that lie in a folder, by section; those with words of rows only for a private page."""
    sections: dict[str, list[Picture]] = {"roles": [], "along": [], "recovery": []}
    for name, (section, alt) in (PICTURES | (PRIVATE_PICTURES if private else {})).items():
        path = next((path for suffix in TYPES if (path := folder / f"{name}{suffix}").is_file()), None)
        if path is not None:
            sections[section].append(Picture(_data_uri(path.suffix, path.read_bytes()), alt))
    return sections


def _draw(plot: Callable[..., None], content: Any, alt: str, caption: str) -> Picture:
    return Picture(_data_uri(".svg", picture_bytes(partial(plot, content), "picture.svg")), alt, caption)


def _data_uri(suffix: str, content: bytes) -> str:
    return f"data:{TYPES[suffix]};base64,{base64.b64encode(content).decode()}"


def _history(folder: Path) -> list[dict[str, Any]]:
    """Return the logs of a training; none if they were cut short."""
    try:
        return json.loads((folder / STATE).read_text())["log_history"]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _link(path: Path, start: Path) -> str | None:
    return quote(Path(os.path.relpath(path, start)).as_posix()) if path.is_file() else None


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
