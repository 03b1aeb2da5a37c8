"""The scores of a run as the Hub reads them: `.eval_results/*.yaml`, and `model-index`, its legacy form.

The Hub shows the entries of `.eval_results` on the model's page. It ranks them where the data set itself defines a
task of that name (huggingface.co/docs/hub/eval-results).
"""

import re
from collections.abc import Iterator

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from ..evaluation.results import Estimate, Results, Run
from .data_names import data_name, hub_datasets

EVAL_RESULTS = ".eval_results/mdu_trainer.yaml"
DIGITS = 6


def eval_result_entries(
    results: Results, run: Run, repo_id: str, revision: str | None = None
) -> list[EvalResultEntry]:
    """Return every score of a run on a data set that has a name on the Hub; none of other data.

    A task is the data set's config, the set and the metric, as `forget10_retain_rougeL_recall`. The source is the
    `results.json` that lies in the repository of the model, at the revision.
    """
    of_config = data_name(results).partition(" ")[2]
    source = f"https://huggingface.co/{repo_id}/blob/{revision or 'main'}/results.json"
    return [
        EvalResultEntry(
            dataset_id=dataset,
            task_id="_".join(re.findall(r"\w+", " ".join([of_config, name or "", metric]))),
            value=round(score.value, DIGITS),
            date=results.date,
            source_url=source,
            source_name="results.json",
            notes=_notes(run, name, score),
        )
        for dataset in hub_datasets(results)
        for name, metric, score in _scores(run)
    ]


def eval_results_file(entries: list[EvalResultEntry]) -> bytes:
    """Return the content of `.eval_results/*.yaml`."""
    return yaml.safe_dump(
        eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True, width=10_000
    ).encode()


def model_index(run: Run, data: str) -> list[EvalResult]:
    """Return every score of a run, for the card's model-index."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=data.split(" ")[0] if "/" in data else re.sub(r"\W+", "-", data).strip("-").lower(),
            dataset_name=data,
            dataset_split=name,
            metric_type=metric,
            metric_name=metric if name is None else f"{metric} ({name})",
            metric_value=round(score.value, DIGITS),
        )
        for name, metric, score in _scores(run)
    ]


def _scores(run: Run) -> Iterator[tuple[str | None, str, Estimate]]:
    for name, metric in run.places():
        if score := run.figure(name, metric):
            yield name, metric, score


def _notes(run: Run, name: str | None, score: Estimate) -> str:
    parts = [run.name]
    if score.low is not None and score.high is not None:
        parts.append(f"95 % interval [{round(score.low, DIGITS):g}, {round(score.high, DIGITS):g}]")
    if name in run.rows:
        parts.append(f"{run.rows[name]} rows")
    return ", ".join(parts)
