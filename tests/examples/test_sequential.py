"""One request after the other: what the next model knows of the earlier ones, and the script that scores them all."""

import json
import logging
import sys
from pathlib import Path

import pytest
import warm
from datasets import concatenate_datasets

from mdu_trainer import MDUConfig, MDUTrainer, load_model, question_answer_rows
from mdu_trainer.provenance.facts import Facts, set_facts
from mdu_trainer.provenance.forget_hashes import ForgetHashes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def requests(authors):
    """The rows of three authors, and those of the others."""
    rows = question_answer_rows(authors, conversational=True)
    return [rows.select(range(start, start + 8)) for start in (72, 80, 88)], rows.select(range(72))


@pytest.fixture
def unlearn(tokenizer, tmp_path):
    def unlearn(model, forget, retain, name):
        folder = tmp_path / name
        shared = {"per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
        config = MDUConfig(str(folder), max_steps=1, save_strategy="steps", save_steps=1, **shared)
        trainer = MDUTrainer(model, config, forget, retain, processing_class=tokenizer)
        trainer.train()
        trainer.save_model()
        return folder

    return unlearn


def test_each_model_records_the_requests_before(make_model, requests, unlearn):
    rows, kept = requests
    model = make_model()
    for number, forget in enumerate(rows):
        folder = unlearn(model, forget, kept, f"request{number}")
        for written in (folder, folder / "checkpoint-1"):
            facts = Facts.load(written)
            requests_then = ForgetHashes.load(written).requests  # the newest first
            keys = [request.key for request in reversed(requests_then)]
            assert len(keys) == number + 1 and facts.forget == set_facts(forget, keys[-1])
            assert facts.earlier == [set_facts(*pair) for pair in zip(rows[:number], keys[:-1], strict=True)]
            text = (written / "unlearning.json").read_text()
            assert all(turn["content"] not in text for row in forget for turn in row["completion"])
        model = load_model(str(folder))


def test_rows_that_would_teach_it_again_are_counted(make_model, requests, unlearn, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mdu_trainer"), "propagate", True)
    rows, kept = requests
    first = unlearn(make_model(), rows[0], kept, "first")
    assert "earlier request" not in caplog.text
    unlearn(load_model(str(first)), rows[1], kept, "second")
    assert "earlier request" not in caplog.text
    both = concatenate_datasets([rows[0].select(range(5)), kept])
    unlearn(load_model(str(first)), rows[1], both, "third")
    assert f"5 of {len(both)} rows to keep quote what an earlier request made the model forget" in caplog.text


def script(*arguments):
    quick = ["--finetune_epochs", "1", "--hidden_size", "32", "--num_layers", "1", "--max_steps", "2"]
    quick += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--decoding_steps", "2"]
    quick += ["--max_eval_rows", "2", "--likelihood_draws", "1", "--report_to", "none", "--use_cpu", "true"]
    command = [sys.executable, str(ROOT / "examples" / "sequential.py"), *quick, *map(str, arguments)]
    return warm.run(command, cwd=ROOT)


def test_script_scores_all_earlier_requests(tmp_path):
    folder = tmp_path / "out"
    options = ("--output_dir", folder, "--num_requests", "2", "--repeat_earlier", "true", "--save_strategy", "no")
    run = script(*options)
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads((folder / "results.json").read_text())
    assert [(run["method"], sorted(run["scores"])) for run in results["runs"]] == [
        ("base", ["request1", "request2", "retain"]),
        ("after request1", ["request1", "retain"]),
        ("after request2", ["request1", "request2", "retain"]),
    ]
    facts = Facts.load(folder / "request2")
    assert (facts.forget.rows, [earlier.rows for earlier in facts.earlier]) == (16, [8])
    again = script(*options)
    assert again.returncode != 0 and "is not empty" in again.stderr
    resumed = script(*options, "--resume", "true")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    after = json.loads((folder / "results.json").read_text())
    assert [run["scores"] for run in after["runs"]] == [run["scores"] for run in results["runs"]]


def test_script_takes_texts_of_splits(authors, tmp_path):
    """Requests as MUSE publishes them: texts, a split each."""
    for name, rows in {"sust/forget_1": (0, 8), "sust/forget_2": (8, 16), "raw/retain1": (16, 40)}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        texts = [{"text": " ".join(authors["answer"][i : i + 4])} for i in range(*rows, 4)]
        (tmp_path / f"{name}.json").write_text(json.dumps(texts))
    names = ("--requests", "sust/forget_1", "sust/forget_2", "--retain_split", "raw/retain1")
    how = ("--max_length", "64", "--save_strategy", "no", "--finetune_epochs", "2", "--finetune_batch_size", "4")
    run = script("--dataset_name", tmp_path, *names, "--output_dir", tmp_path / "out", *how)
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert sorted(results["runs"][2]["scores"]) == ["request1", "request2", "retain"]
    facts = Facts.load(tmp_path / "out" / "request2")
    assert (facts.forget.rows, [earlier.rows for earlier in facts.earlier]) == (2, [2])
    assert facts.training["rows_to_forget"] == "chunks of text"
    hashes, quote = ForgetHashes.load(tmp_path / "out" / "request2"), authors["answer"][9]
    assert hashes.found_in(quote) and hashes.found_in(authors["answer"][1])
    assert authors["answer"][1] not in run.stdout + run.stderr


def test_script_refuses_before_anything_is_loaded():
    assert "--dataset_name needs --requests and --retain_split" in script("--dataset_name", "x").stderr
    assert "--num_requests must be from 1 to 11" in script("--num_requests", "12").stderr
