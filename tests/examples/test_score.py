"""examples/score.py as a user runs it: batches, processes, kills, adapters, refusals."""

import json
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import warm
from peft import LoraConfig, get_peft_model

from mdu_trainer import load_model
from mdu_trainer.evaluation.results import Results
from mdu_trainer.token_roles.path_results import PathScores

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "score.py"
SMALL = ("--max_eval_rows", "6", "--likelihood_draws", "2", "--max_new_tokens", "8", "--dtype", "float32")


def command(model, output, *arguments):
    return [sys.executable, SCRIPT, "--model_name_or_path", model, "--output_dir", output, *SMALL, *arguments]


def evaluate(model, output, *arguments, run=warm.run, expect=0):
    ended = run(command(model, output, *arguments), cwd=ROOT, timeout=280)
    assert ended.returncode == expect, ended.stderr[-3000:]
    return ended.stdout + ended.stderr


def figures(folder):
    (run,) = Results.load(folder / "results.json").runs
    return replace(run, eval_seconds=0.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """An untrained model on disk, sharp enough that no two choices are as close as rounding."""
    from mdu_trainer.testing import tiny_mdlm

    folder = tmp_path_factory.mktemp("models") / "model"
    model = tiny_mdlm(tokenizer, hidden_size=32, num_layers=2, num_heads=2, initializer_range=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scored(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    return folder, evaluate(checkpoint, folder)


def test_output(scored, authors):
    folder, log = scored
    assert {path.name for path in folder.iterdir()} == {"results.json", "rows.jsonl", "truth_ratios.json"}
    run = figures(folder)
    assert run.name == "model" and run.rows == {"forget": 6, "retain": 6}
    assert "| forget | truth_ratio" in log and re.search(r"rows? in [\d.]+ s", log)
    written = log + "".join(path.read_text() for path in folder.iterdir())
    names = {name for row in authors.select(range(0, 96, 8)) for name in row["answer"].split()[:2]}
    assert len(names) == 24 and not any(name in written for name in names)


def test_batch_size_does_not_matter(checkpoint, scored, tmp_path):
    evaluate(checkpoint, tmp_path, "--batch_size", "1")
    many, one = figures(scored[0]), figures(tmp_path)
    for name, scores in many.scores.items():
        assert scores.keys() == one.scores[name].keys()
        for metric, estimate in scores.items():
            assert one.scores[name][metric].value == pytest.approx(estimate.value, rel=1e-4), (name, metric)


def test_two_processes_give_the_file_of_one(checkpoint, scored, tmp_path):
    evaluate(checkpoint, tmp_path / "one", "--batch_size", "2")
    evaluate(checkpoint, tmp_path / "two", "--batch_size", "2", run=warm.run_together)
    assert figures(tmp_path / "one") == figures(tmp_path / "two"), "to the last bit"
    lines = [json.loads(line) for line in (tmp_path / "two" / "rows.jsonl").read_text().splitlines()[1:]]
    assert len({(line["set"], line["row"]) for line in lines}) == len(lines) == 12


def test_killed_and_started_again(checkpoint, tmp_path):
    """SIGKILL as soon as some rows are finished; the rest is scored by two processes, for a change."""
    options = ("--batch_size", "2", "--max_eval_rows", "16", "--likelihood_draws", "32")
    evaluate(checkpoint, tmp_path / "undisturbed", *options)
    rows, kept = tmp_path / "killed" / "rows.jsonl", []
    for number in (1, 2):
        words, log = command(checkpoint, tmp_path / "killed", *options), tmp_path / "log.txt"
        with warm.started(words, log, cwd=ROOT, number=number) as processes:
            deadline = time.monotonic() + 200
            while not rows.is_file() or rows.read_bytes().count(b"\n") < len(kept) + 3:
                assert all(one.is_alive() for one in processes), log.read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.002)
        assert [one.exitcode for one in processes] == [-signal.SIGKILL] * number
        kept = rows.read_text().splitlines()[: rows.read_bytes().count(b"\n")]
        assert 3 <= len(kept) <= 32, "it was killed in the middle"
    evaluate(checkpoint, tmp_path / "killed", *options)
    lines = rows.read_text().splitlines()
    assert lines[: len(kept)] == kept and len(lines) == 33
    assert figures(tmp_path / "killed") == figures(tmp_path / "undisturbed"), "to the last bit"


def test_baseline_and_adapter(checkpoint, scored, tmp_path, tokenizer):
    model = get_peft_model(
        load_model(str(checkpoint)), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    model.peft_config["default"].base_model_name_or_path = str(checkpoint)
    model.save_pretrained(tmp_path / "adapter")
    log = evaluate(tmp_path / "adapter", tmp_path / "out", "--baseline", scored[0] / "results.json")
    base, adapted = (figures(folder).scores["forget"]["probability"].value for folder in (scored[0], tmp_path / "out"))
    assert f"{adapted - base:+.3f}" in log and "Change from model of" in log and adapted != base
    log = evaluate(checkpoint, tmp_path / "same", "--retain_log", scored[0] / "truth_ratios.json")
    assert figures(tmp_path / "same").summary["forget_quality"].value == 1


def test_along_the_path(checkpoint, scored, tmp_path, authors):
    """The baseline's lines stand beside the model's; what is written holds no word of a row."""
    short = ("--along_path", "2", "--max_eval_rows", "2", "--metrics", "rougeL", "probability")
    evaluate(checkpoint, tmp_path / "base", *short)
    log = evaluate(checkpoint, tmp_path / "out", *short, "--baseline", tmp_path / "base" / "results.json")
    names = {"along_path.json", "along_path.png", "along_path.svg", "path_rows.jsonl", "results.json", "rows.jsonl"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    scores = PathScores.load(tmp_path / "out" / "along_path.json")
    first, second = scores.runs
    assert [run.name for run in scores.runs] == ["model (baseline)", "model"] and scores.num_steps == 2
    assert first.scores == second.scores and second.rows == {"forget": 2, "retain": 2}
    (run,) = Results.load(tmp_path / "out" / "results.json").runs
    assert second.scores["forget"]["rougeL_recall"].fixed == run.scores["forget"]["rougeL_recall"]
    assert "| at fixing |" in log and "model: retain" in log and "along_path.png" in log
    written = log + "".join(path.read_text() for path in (tmp_path / "out").glob("*.[js][sv][og]*"))
    assert not any(name in written for row in authors for name in row["answer"].split()[:2] if len(name) > 4)


def test_refusals_come_before_a_model(scored, tmp_path, tofu_path):
    nothing = tmp_path / "no model here"  # but a config, so that the mistakes below are what is wrong
    nothing.mkdir()
    (nothing / "config.json").write_text("{}")
    refused = {
        ("--benchmark", "tofu"): "needs --dataset_name: locuslab/TOFU",
        ("--benchmark", "tofu", "--dataset_name", tofu_path, "--forget_split", "forget02"): "no config 'forget02'",
        ("--retain_log", scored[0] / "truth_ratios.json", "--max_eval_rows", "5"): "other questions",
        ("--retain_log", scored[0] / "results.json"): "not a log of truth ratios",
        ("--baseline", scored[0] / "rows.jsonl"): "not a results file",
        ("--baseline", scored[0] / "results.json", "--protocol", "release"): "has figures by the protocol 'ours'",
        ("--retain_log", scored[0] / "truth_ratios.json", "--protocol", "release"): "do not compare with those by",
        ("--choices", "generated"): "choices is for the multiple choice of RWKU",
        ("--rouge", "precision"): "invalid choice",
        ("--metrics", "bleu"): "Unknown metrics: bleu",
        ("--along_path", "0"): "--along_path must be at least 1, got 0",
        ("--along_path", "4", "--metrics", "extraction_strength"): "'extraction_strength' decodes by itself",
        ("--along_path", "4", "--benchmark", "rwku", "--dataset_name", "a/b"): "rwku is not scored along the path",
    }
    for arguments, message in refused.items():
        assert message in evaluate(nothing, tmp_path / "out", *arguments, expect=2), arguments
    assert not (tmp_path / "out").exists()


def test_tofu_from_a_folder(checkpoint, tofu_path, tmp_path):
    split = ("--benchmark", "tofu", "--dataset_name", tofu_path, "--forget_split", "forget01", "--max_eval_rows", "2")
    log = evaluate(checkpoint, tmp_path, *split, "--retain_split", "retain99")
    run = figures(tmp_path)
    assert run.rows == {"forget": 2, "retain": 2, "real_authors": 2, "world_facts": 2}
    assert "model_utility" in run.summary and "Basil" not in log
