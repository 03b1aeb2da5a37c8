"""The study of lasting forgetting, run as a user runs it, with models that learn nothing."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import warm

from mdu_trainer.evaluation.results import Estimate
from mdu_trainer.files import UserError
from mdu_trainer.models import load_checkpoint
from mdu_trainer.testing import fictional_authors, forget_retain_split, unseen_answers

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "benchmarks"
METHODS = ("mdu-0", "npo")


def lasting(folder, *arguments, expect=0):
    options = ["--scales", "tiny", "--output_dir", folder, "--seeds", "0", *arguments]
    run = warm.run([sys.executable, FOLDER / "lasting.py", *options], cwd=ROOT, timeout=280)
    assert run.returncode == expect, run.stderr[-3000:]
    return run.stdout + run.stderr


def progress(log):
    return re.findall(r"^(tiny\S*) (\S+) lr (\S+) seed 0: forget rL", log, re.M)


def table(log):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in log.splitlines() if line.startswith("|")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a study, and its log."""
    folder = tmp_path_factory.mktemp("lasting")
    return folder, lasting(folder, "--methods", *METHODS, "--learning_rates", "1e-3")


def test_every_run_has_its_figures(finished):
    folder, log = finished
    assert progress(log) == [("tiny", method, "0.001") for method in METHODS]
    header, _, *rows = table(log)
    assert [row[0] for row in rows] == ["base", "never trained", *METHODS]
    cost = dict(zip((row[0] for row in rows), (row[header.index("cost / base")] for row in rows), strict=True))
    rows_an_update, updates, rows_of_base = 4 + 4, 2, 2 * 4 * 8
    assert cost["mdu-0"] == f"{rows_an_update * updates / rows_of_base:.3f}"
    forwards = (
        (rows_an_update + 4 / 3) * updates / rows_of_base
    )  # by theta_0, whose head is tried on a few rows before
    assert forwards - 1e-3 < float(cost["npo"]) < forwards + 0.05
    for path in folder.glob("tiny/runs/*.json"):
        assert set(json.loads(path.read_text())["membership"]) == {"base", "never trained", "unlearned"}


def test_what_is_finished_is_not_repeated(finished):
    folder, log = finished
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = lasting(folder, "--methods", *METHODS, "--learning_rates", "1e-3")
    assert progress(again) == [] and table(again) == table(log)
    changed = [path.name for path, time in made.items() if path.stat().st_mtime_ns != time]
    assert changed == []


@pytest.fixture
def script(monkeypatch):
    """The script as a module; its own modules are found beside it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import lasting

    return lasting


def cell(script, rate, retain, recovery):
    found = {"infill-first": Estimate(recovery), "prefix": Estimate(recovery / 2)}
    return script.Cell("mdu-0", rate, 0, {"retain rL": retain}, found, {}, 0.0, 0.0, 0.0)


def test_the_best_rate_keeps_the_rows_to_keep(script):
    cells = [cell(script, *figures) for figures in ((1e-4, 1.0, 0.3), (1e-3, 0.98, 0.1), (1e-2, 0.5, 0.0))]
    assert script.best_rate(cells) == 1e-3
    assert script.best_rate([cells[2], cell(script, 1e-1, 0.4, 0.0)]) == 1e-2, "if none does, what keeps most"


def test_the_learning_rate_is_chosen_on_other_rows(script, monkeypatch, tmp_path):
    splits, tried = [], []

    class Measurer:
        def __init__(self, split):
            splits.append(split)

        def cell(self, method, rate, seed):
            tried.append((method, rate, seed))
            return cell(script, rate, 1.0, abs(rate - 1e-3))

    monkeypatch.setattr(script, "Measurer", Measurer)
    options = ["--scales", "demo", "large", "--methods", "npo", "--seeds", "7", "8", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["lasting.py", *options, "--max_steps", "3"])
    assert script.chosen_rates(script.parse()) == {"npo": 1e-3}
    assert tried == [("npo", rate, 7) for rate in (3e-4, 1e-3, 3e-3)] and len(splits) == 1
    split = splits[0]
    test = replace(split, validation=False)
    assert split.name == "demo" and split.folder != test.folder and split.scale.updates["max_steps"] == 3
    assert set(split.forget["question"]) < set(test.retain["question"]), "none of them is a row of the test"
    assert len(test.forget) == len(split.forget) == 16 and len(test.retain) == len(split.retain) == 80
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--learning_rates", "5e-4"])
    assert script.chosen_rates(script.parse()) == {"npo": 5e-4} and len(splits) == 1


def test_rows_of_a_demo_are_those_of_the_command(script, tmp_path):
    forget, retain = forget_retain_split(fictional_authors())
    split = script.Split(script.SCALES["demo"], "demo", tmp_path)
    assert split.forget.to_list() == forget.to_list() and split.retain.to_list() == retain.to_list()
    large = script.Split(script.SCALES["large"], "large", tmp_path)
    assert (len(large.forget), len(large.retain), len(large.earlier)) == (48, 432, 248)
    unseen = unseen_answers(large.forget)["answer"]
    assert len(unseen) == 5 * 48 and not set(unseen) & set(large.all_rows["answer"])


def test_real_text_is_tofus(script, monkeypatch, tmp_path, tofu_path):
    options = ["--scales", "tofu", "--dataset_name", str(tofu_path), "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["lasting.py", *options, "--learning_rates", "1e-3"])
    args = script.parse()
    script.check(args)
    split = script.split_of("tofu", args)
    assert (len(split.forget), len(split.retain), len(split.earlier)) == (40, 80, 0)
    rows, unseen = split.forget.to_list(), split.unseen
    assert unseen["question"] == [row["question"] for row in rows for _ in row["perturbed_answer"]]
    assert unseen["answer"] == [wrong for row in rows for wrong in row["perturbed_answer"]]
    assert not set(unseen["answer"]) & {*split.forget["answer"], *split.retain["answer"]}
    monkeypatch.setattr(sys, "argv", ["lasting.py", *options])
    with pytest.raises(UserError, match="A rate is chosen on embedded authors: name another scale before tofu"):
        script.check(script.parse())


@pytest.mark.parametrize("method", ["wording", "damage", "repair", "repselect", "mudman"])
def test_methods_that_are_not_of_the_package(script, method, finished, tmp_path):
    """They move the weights of the model that they are given, and leave it as it can be measured and saved."""
    split = script.Split(script.SCALES["tiny"], "tiny", finished[0])
    model, tokenizer = load_checkpoint(str(split.base))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = (split.forget, split.retain)
    script.METHODS[method](
        sys.modules["lasting_methods"].Job(model, tokenizer, *rows, "", str(tmp_path), 1e-3, 0, split.scale.updates)
    )
    after = model.state_dict()
    assert after.keys() == before.keys() and all(value.isfinite().all() for value in after.values())
    moved = [name for name, value in after.items() if not value.equal(before[name])]
    assert moved and (method != "repselect" or all(".mlp." in name for name in moved))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("layout, kind", [("llada", "LLaDAModelLM"), ("dream", "DreamModel")])
def test_an_adapter_on_a_published_layout_is_merged(script, tmp_path, layout, kind):
    scale = replace(script.SCALES["tiny"], earlier_authors=0, layout=layout, lora=True)
    split = script.Split(scale, "tiny", tmp_path)
    split.make_models()
    model, tokenizer = load_checkpoint(str(split.base))
    assert type(model).__name__ == kind and json.loads((split.base / "config.json").read_text())["architectures"] == [
        kind
    ]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    job = (model, tokenizer, split.forget, split.retain, "", str(tmp_path / "out"), 1e-2, 0, scale.updates, scale.lora)
    figures = sys.modules["lasting_figures"]
    with figures.counted(model) as passes:
        script.METHODS["counterfactual"](sys.modules["lasting_methods"].Job(*job))
    assert passes["trained"] == 2 * (4 + 4) and passes["run"] >= 2 * 4  # with theta_0, the adapter switched off
    after = model.state_dict()
    assert after.keys() == before.keys() and all(value.isfinite().all() for value in after.values())
    moved = {name for name, value in after.items() if not value.equal(before[name])}
    assert moved == {name for name in after if "_proj." in name and name.endswith("weight")}


@pytest.mark.parametrize(
    "wrong, message",
    [
        (("--max_steps", "0"), "--max_steps must be above 0, got 0"),
        (("--learning_rates", "-1"), "--learning_rates must be above 0, got -1"),
        (("--max_steps", "3"), "holds runs with .*Choose another --output_dir"),
    ],
)
def test_wrong_options_stop_before_any_work(finished, wrong, message):
    log = lasting(finished[0], *wrong, expect=2)
    assert re.search(message, log) and not progress(log)
