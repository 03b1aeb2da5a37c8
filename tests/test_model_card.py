"""The card: whole against a golden file, its metadata, what is left out, and its picture."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from mdu_trainer.attacks.recovery import AttackOutcome, Outcome, Recovery
from mdu_trainer.commands import run
from mdu_trainer.descriptions import METHODS
from mdu_trainer.evaluation.report import Estimate, Results, Run
from mdu_trainer.files import UserError
from mdu_trainer.model_card import (
    chosen_run,
    draw_picture,
    main,
    template_path,
    unlearned_model_card,
    write_model_card,
)
from mdu_trainer.objectives import OBJECTIVES
from mdu_trainer.provenance import Facts

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "tests" / "demo_card"  # facts and figures of the demo's run at tau = 0
GOLDEN = ROOT / "model_cards" / "mdu-demo.md"


@pytest.fixture
def facts():
    return Facts.load(DEMO)


@pytest.fixture
def results():
    return Results.load(DEMO / "results.json")


def metadata(card):
    """The YAML at the top, read as the Hub reads it."""
    return yaml.safe_load(str(card).split("---\n")[1])


def test_card_of_the_demo_is_the_golden_one(facts, results):
    """After a change that is meant: MDU_WRITE_CARD=1 pytest tests/test_model_card.py"""
    card = unlearned_model_card(
        facts,
        results,
        recovery=Recovery.load(DEMO / "recovery.json"),
        repo_id="ORG/mdu-demo",
        language="en",
        license="mit",
        picture="mdu-demo_tradeoff.png",
    )
    picture = GOLDEN.with_name("mdu-demo_tradeoff.png")
    if os.environ.get("MDU_WRITE_CARD"):
        card.save(GOLDEN)
        picture.write_bytes(draw_picture(results, Recovery.load(DEMO / "recovery.json")))
    assert str(card) == GOLDEN.read_text(encoding="utf-8")
    assert picture.read_bytes().startswith(b"\x89PNG") and f"]({picture.name})" in str(card)


def test_metadata(facts, results):
    facts = replace(facts, base_model="org/base", base_revision="f" * 40)
    card = unlearned_model_card(
        facts,
        replace(results, dataset="org/data forget10"),
        repo_id="org/name",
        license="mit",
        language="en",
        tags="x",
    )
    data = metadata(card)
    assert data["base_model"] == "org/base" and data["base_model_relation"] == "finetune"
    assert (data["license"], data["language"], data["datasets"]) == ("mit", "en", ["org/data"])
    assert {"unlearning", "machine-unlearning", "masked-diffusion", "mdu", "x"} <= set(data["tags"])
    run = chosen_run(results, facts)
    index = data["model-index"][0]
    values = {(r["dataset"].get("split"), m["type"]): m["value"] for r in index["results"] for m in r["metrics"]}
    assert set(values) == set(run.places())
    assert values["forget", "rougeL_recall"] == pytest.approx(run.figure("forget", "rougeL_recall").value, abs=1e-6)
    read = ModelCard(str(card)).data.eval_results
    assert len(read) == len(values) and {result.dataset_type for result in read} == {"org/data"}


def test_only_measured_figures(facts):
    scores = {"forget": {"rougeL_recall": Estimate(0.25), "probability": Estimate(float("nan"))}}
    results = Results("m", "d", {}, [Run("mdu", 0.0, scores, {"forget": 4})])
    card = unlearned_model_card(facts, results)
    types = [m["type"] for r in metadata(card)["model-index"][0]["results"] for m in r["metrics"]]
    assert types == ["rougeL_recall"]
    assert (
        "0.250" in card.text
        and "| nan" not in card.text
        and "| 0.000 " not in card.text
        and "truth_ratio" not in card.text
    )
    assert "What was kept was not measured." in card.text and "base |" not in card.text
    without = unlearned_model_card(facts)
    assert "model-index" not in metadata(without) and "nothing is known here" in without.text


@pytest.fixture
def recovery():
    def of(base, never, one):
        ends = {
            name: Outcome(Estimate(0.5), Estimate(end)) for name, end in (("base", base), ("never trained", never))
        }
        recovery = None if one is None else Estimate(one, one - 0.1, one + 0.1)
        return AttackOutcome("what it does", 16, ends | {"mdu tau=0": Outcome(Estimate(0.0), Estimate(0.3), recovery)})

    attacks = {"none": of(1.0, 0.0, 0.9), "prefix": of(0.9, 0.1, 0.25), "sampling": of(0.8, 0.1, 0.125)}
    return Recovery("d", {}, attacks | {"flat": of(0.5, 0.5, None)})


def test_attacks_are_in_the_limits(facts, results, recovery):
    limits = unlearned_model_card(facts, results, recovery=recovery).text.partition("## Limits")[2]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in limits.splitlines() if line[:1] == "|"]
    assert lines[0] == ["attack", "what it does", "base", "never trained", "this model", "recovery"]
    assert lines[3] == ["prefix", "what it does", "0.900", "0.100", "0.300", "0.250 [0.150, 0.350]"]
    assert lines[5][-1] == "", "what is undefined is left out"
    assert "the strongest here, prefix, reached 0.250 [0.150, 0.350]." in limits
    assert "What was tried is in the table of attacks below" in limits and "none of these was tried" not in limits


def test_attacks_without_a_model_that_never_saw_the_rows(facts, recovery):
    def without(outcome):
        models = {name: replace(one, recovery=None) for name, one in outcome.models.items() if name != "never trained"}
        return replace(outcome, models=models)

    recovery = replace(recovery, attacks={name: without(outcome) for name, outcome in recovery.attacks.items()})
    limits = unlearned_model_card(facts, recovery=recovery).text.partition("## Limits")[2]
    assert "| this model |" in limits and "| recovery |" not in limits and "strongest" not in limits
    assert "No model that never saw the rows was attacked beside it" in limits


def test_attacks_on_other_models(facts, recovery):
    with pytest.raises(ValueError, match="The checkpoint is npo, and the attacks were on mdu tau=0"):
        unlearned_model_card(replace(facts, method="npo", tau=None), recovery=recovery)


def test_attacks_of_the_folder(facts, results, recovery, tmp_path):
    folder = Path(shutil.copytree(DEMO, tmp_path / "run"))
    recovery.save(folder / "recovery.json")
    assert "### Attacks" in write_model_card(folder).text
    beside = (folder / "tradeoff.png").read_bytes()
    assert "### Attacks" not in write_model_card(folder, recovery=False).text
    assert beside != (folder / "tradeoff.png").read_bytes(), "attacks are drawn beside the trade-off"
    with pytest.raises(FileNotFoundError, match="no recovery file"):
        write_model_card(folder, recovery=folder / "nothing.json")
    with pytest.raises(UserError, match="repeat the attacks"):
        main([str(folder), "--recovery", str(folder / "results.json")])


def test_a_model_that_never_saw_the_rows_has_its_column(facts, results):
    others = [run for run in results.runs if run.method != "retain model"]
    assert len(others) == len(results.runs) - 1
    absent = unlearned_model_card(facts, replace(results, runs=others)).text
    present = unlearned_model_card(facts, results).text
    assert "No model that never saw the rows" in absent and "retain model |" not in absent
    assert "No model that never saw the rows" not in present and "retain model |" in present


@pytest.mark.parametrize("method", OBJECTIVES)
def test_every_objective_has_its_words(facts, method):
    tau = 0.5 if method == "mdu" else None
    card = unlearned_model_card(replace(facts, method=method, tau=tau, retain=None, options={"retain_weight": 0.0}))
    assert METHODS[method].title in card.text and f"arXiv {METHODS[method].arxiv}" in card.text
    assert ("tau = 0.5" in card.text) == (method == "mdu")
    assert "no rows were trained to be kept" in card.text and "None" not in card.text and "{{" not in card.text


def test_paths_of_the_machine_are_not_shown(facts, results, tmp_path):
    facts = replace(facts, base_path=str(tmp_path))
    for name in (f"{tmp_path} forget01", "../shared/data forget01", "~/data forget01"):
        text = str(unlearned_model_card(facts, replace(results, dataset=name, model=str(tmp_path))))
        assert str(tmp_path) not in text and "shared" not in text and "~/data" not in text
        assert "a local data set forget01" in text and "datasets:" not in text


def test_results_of_another_model(facts, results):
    with pytest.raises(ValueError, match="mdu tau=0.25, of which the results have 0 runs"):
        unlearned_model_card(replace(facts, tau=0.25), results)


def test_command_line(tmp_path, capsys):
    shutil.copytree(DEMO, tmp_path / "run")
    assert main([str(tmp_path / "run"), "--license", "mit"]) == 0
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.license == "mit" and (tmp_path / "run" / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    assert "](tradeoff.png)" in card.text and "| forget | rougeL_recall " in card.text
    assert run(lambda: main([str(tmp_path)])) == 2
    assert "holds no unlearning.json" in capsys.readouterr().err


def test_card_needs_no_matplotlib(facts, results, monkeypatch):
    monkeypatch.setattr("mdu_trainer.model_card.find_spec", lambda name: None)
    assert draw_picture(results) is None


def test_template_of_an_installed_package(tmp_path):
    """Inside the package, where a wheel puts it."""
    package = tmp_path / "mdu_trainer"
    shutil.copytree(ROOT / "mdu_trainer", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "model_cards", package / "model_cards")
    code = "from mdu_trainer.model_card import template_path; print(template_path())"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(package / "model_cards" / template_path().name)


def test_facts_hold_no_path_that_is_published(facts):
    assert "path" not in json.dumps(metadata(unlearned_model_card(facts)))
