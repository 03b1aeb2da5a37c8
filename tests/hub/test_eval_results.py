"""Scores as the Hub reads them: written for public data alone, read back by huggingface_hub's own reader."""

import re
from dataclasses import replace

import pytest
import yaml
from hub_checkpoints import REPO
from huggingface_hub import HfApi, ModelCard, parse_eval_result_entries

from mdu_trainer.evaluation.results import Estimate
from mdu_trainer.hub.push import LeakError, push_unlearned_model
from mdu_trainer.report.eval_results import EVAL_RESULTS


@pytest.fixture
def measured(results):
    """On a set of TOFU, with a score of the model as a whole, and one that could not be measured."""
    runs = [
        replace(
            run,
            summary={"model_utility": Estimate(0.5)},
            scores=run.scores | {"retain": run.scores["retain"] | {"truth_ratio": Estimate(float("nan"))}},
        )
        for run in results.runs
    ]
    return replace(results, dataset="locuslab/TOFU forget10", runs=runs, date="2026-05-01")


def test_entries_are_read_back_by_the_hub(hub, checkpoint, measured):
    hub.datasets["locuslab/TOFU"] = False
    push_unlearned_model(checkpoint, REPO, results=measured, revision="tau0")
    written = yaml.safe_load(hub.files(REPO, "tau0")[EVAL_RESULTS])
    entries = parse_eval_result_entries(written)
    assert {entry.dataset_id for entry in entries} == {"locuslab/TOFU"}
    assert {entry.task_id: entry.value for entry in entries} == {
        "forget10_forget_rougeL_recall": 0.2,
        "forget10_retain_rougeL_recall": 0.8,
        "forget10_model_utility": 0.5,
    }
    first, whole = entries[0], entries[-1]
    assert first.notes == "mdu tau=0, 95 % interval [0.1, 0.25], 16 rows" and whole.notes == "mdu tau=0"
    assert first.date == "2026-05-01" and first.source_name == "results.json"
    assert first.source_url == f"https://huggingface.co/{REPO}/blob/tau0/results.json"
    legacy = ModelCard(hub.files(REPO, "tau0")["README.md"].decode()).data.eval_results
    assert sorted(one.metric_value for one in legacy) == sorted(entry.value for entry in entries), "both forms"


def test_the_page_of_the_model_has_them(hub, checkpoint, measured):
    hub.datasets["locuslab/TOFU"] = False
    push_unlearned_model(checkpoint, REPO, results=measured)
    shown = HfApi().model_info(REPO, expand=["evalResults"]).eval_results
    assert [entry.value for entry in shown] == [0.2, 0.8, 0.5]
    push_unlearned_model(checkpoint, REPO, results=False)
    assert EVAL_RESULTS not in hub.files(REPO), "scores of earlier weights do not stay"


@pytest.mark.parametrize(
    "dataset", ["fictional authors", "org/private forget10", "org/nowhere forget10", "/home/somebody/rows forget10"]
)
def test_nothing_of_data_that_not_everybody_can_see(hub, checkpoint, measured, dataset):
    hub.datasets["org/private"] = True
    push_unlearned_model(checkpoint, REPO, results=replace(measured, dataset=dataset))
    assert EVAL_RESULTS not in hub.files(REPO) and "results.json" in hub.files(REPO)


def test_they_are_scanned_as_every_text(hub, checkpoint, measured, rows):
    hub.datasets["locuslab/TOFU"] = False
    quote = rows[0][3]["completion"][0]["content"]
    runs = [replace(run, summary={quote: Estimate(0.5)}) for run in measured.runs]
    with pytest.raises(LeakError, match=re.escape(EVAL_RESULTS)):
        push_unlearned_model(checkpoint, REPO, results=replace(measured, runs=runs))
    assert not hub.repos, "nothing was sent"


def test_markup_in_a_name_stays_text(hub, checkpoint, measured):
    hub.datasets["locuslab/TOFU"] = False
    poison = 'x: &a {"b": 1}\n- "c" # <b>'
    runs = [replace(run, summary={poison: Estimate(0.5)}) for run in measured.runs]
    push_unlearned_model(checkpoint, REPO, results=replace(measured, runs=runs))
    entries = parse_eval_result_entries(yaml.safe_load(hub.files(REPO)[EVAL_RESULTS]))
    assert [entry.task_id for entry in entries][-1] == "forget10_x_a_b_1_c_b" and len(entries) == 3
