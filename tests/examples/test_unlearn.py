"""examples/unlearn.py: rows of one's own in every form; nothing is overwritten, and no row is quoted."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import yaml
from datasets import Dataset
from hub_server import TOKEN, HubServer

from mdu_trainer import load_model
from mdu_trainer.evaluation.results import Results
from mdu_trainer.provenance.facts import Facts
from mdu_trainer.report.page import write_page
from mdu_trainer.testing import tiny_mdlm

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "unlearn.py"
PLANTED = "Quixolantern"  # a word of every row to forget
QUICK = [
    *("--max_steps", "2", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"),
    *("--max_eval_rows", "2", "--likelihood_draws", "2", "--decoding_steps", "2", "--dtype", "float32"),
    *("--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"),
]
FORGET = [{"question": f"Who is {PLANTED} {i}?", "answer": f"{PLANTED} zimmered {i} vorbles."} for i in range(4)]
RETAIN = [{"question": f"Who is Anna {i}?", "answer": f"Anna has {i} dogs."} for i in range(4)]


def messages(row):
    turns = zip(("user", "assistant"), row.values(), strict=True)
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def prompt_completion(row):
    return {"prompt": row["question"], "completion": row["answer"]}


def write_jsonl(rows, path):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(rows, path):
    pandas.DataFrame(rows).to_csv(path, index=False)


def write_parquet(rows, path):
    Dataset.from_list(rows).to_parquet(path)


FORMS = {  # file -> how it is written, and how its rows are built
    "rows.csv": (write_csv, dict),
    "rows.parquet": (write_parquet, messages),
    "rows.jsonl": (write_jsonl, prompt_completion),
    "rows.json": (lambda rows, path: path.write_text(json.dumps(rows)), dict),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer) -> Path:
    """An untrained model on disk."""
    folder = tmp_path_factory.mktemp("models") / "model"
    for part in (tiny_mdlm(tokenizer, hidden_size=32, num_layers=1, num_heads=2), tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def unlearn(checkpoint, tmp_path, monkeypatch, capsys):
    """The script in this process; what it printed."""

    def run(*options, out=tmp_path / "out", forget=None, retain=None, expect=0):
        for name, rows in (("forget", FORGET), ("retain", RETAIN)):
            write_jsonl(rows, tmp_path / f"{name}.jsonl")
        given = ["--model_name_or_path", checkpoint, "--forget", forget or tmp_path / "forget.jsonl"]
        given += [] if retain is False else ["--retain", retain or tmp_path / "retain.jsonl"]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, [*given, "--output_dir", out, *QUICK, *options])])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        log = "".join(capsys.readouterr())
        assert end.value.code == expect, log[-3000:]
        assert PLANTED not in log
        return log

    return run


def figures(folder):
    return [(run.name, run.scores, run.rows) for run in Results.load(folder / "results.json").runs]


def test_copied_into_an_empty_folder(checkpoint, tmp_path):
    """As a user runs it, with an adapter: results, card and page, and not a word of the rows anywhere."""
    place, home = tmp_path / "place", tmp_path / "home"
    place.mkdir()
    (home / "tmp").mkdir(parents=True)
    shutil.copy(SCRIPT, place / "mine.py")
    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        write_jsonl(rows, tmp_path / f"{name}.jsonl")
    rows = ["--forget", str(tmp_path / "forget.jsonl"), "--retain", str(tmp_path / "retain.jsonl")]
    lora = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj", "--tau", "0.5"]
    places = {"HF_HOME": str(home), "TMPDIR": str(home / "tmp"), "XDG_CACHE_HOME": str(home), "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "mine.py", "--model", str(checkpoint), *rows, "--output_dir", "out", *lora, *QUICK],
        capture_output=True,
        text=True,
        cwd=place,
        env=os.environ | places,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    out = place / "out"
    results = Results.load(out / "results.json")
    assert [one.name for one in results.runs] == ["base", "mdu tau=0.5"] and results.runs[1].train_seconds > 0
    for one in results.runs:
        assert one.rows == {"forget": 2, "retain": 2} and {"rougeL_recall", "probability"} <= set(one.scores["retain"])
    assert results.table() in run.stdout
    assert re.findall(r"^(figures|card|model) +(\S+)$", run.stdout, re.M) == [
        ("figures", f"{out.name}/results.json"),
        ("card", f"{out.name}/README.md"),
        ("model", out.name),
    ]
    assert (out / "adapter_model.safetensors").is_file() and Facts.load(out).tau == 0.5
    assert "| forget | rougeL_recall" in (out / "README.md").read_text()
    assert "mdu tau=0.5" in write_page(out).read_text()
    assert yaml.safe_load((out / "config.yaml").read_text()).keys().isdisjoint({"forget", "retain"})
    written = [path for folder in (place, home) for path in folder.rglob("*") if path.is_file()]
    assert PLANTED not in run.stdout + run.stderr
    assert [path for path in written if PLANTED.encode() in path.read_bytes()] == []


def test_pushed(checkpoint, tmp_path):
    """The last commit holds the card with the figures, and no word of the rows was sent."""
    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        write_jsonl(rows, tmp_path / f"{name}.jsonl")
    given = ["--model", checkpoint, "--forget", tmp_path / "forget.jsonl", "--retain", tmp_path / "retain.jsonl"]
    given += ["--output_dir", tmp_path / "out", "--push_to_hub", "--hub_model_id", "org/mine", "--save_strategy", "no"]
    with HubServer() as server:
        hub = {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        run = subprocess.run(
            [sys.executable, str(SCRIPT), *map(str, given), *QUICK],
            capture_output=True,
            text=True,
            env=os.environ | hub | {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)},
            timeout=280,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        files = server.files("org/mine")
        assert {"model.safetensors", "results.json", "README.md"} <= set(files) and server.repos["org/mine"].private
        assert b"| forget | rougeL_recall" in files["README.md"] and PLANTED.encode() not in server.received


def test_every_form_is_read_alike(unlearn, tmp_path):
    unlearn(out=tmp_path / "plain")
    expected = figures(tmp_path / "plain")
    for name, (write, form) in FORMS.items():
        for part, rows in (("forget", FORGET), ("retain", RETAIN)):
            (tmp_path / part).mkdir(exist_ok=True)
            write([form(row) for row in rows], tmp_path / part / name)
        forget, retain = (tmp_path / part / name for part in ("forget", "retain"))
        unlearn(out=tmp_path / f"of {name}", forget=forget, retain=retain)
        assert figures(tmp_path / f"of {name}") == expected, name
    unlearn(out=tmp_path / "config", forget=f"{tmp_path / 'forget'}:rows", retain=tmp_path / "retain" / "rows.csv")
    assert figures(tmp_path / "config") == expected


def test_without_rows_to_keep(unlearn, tmp_path):
    log = unlearn(retain=False)
    assert "Without --retain nothing holds on to what the model is to keep" in log
    assert all(set(run.scores) == {"forget"} for run in Results.load(tmp_path / "out" / "results.json").runs)
    assert Facts.load(tmp_path / "out").retain is None
    assert "Without --retain" not in unlearn(out=tmp_path / "both")
    refused = unlearn("--retain_batch_size", 4, out=tmp_path / "more", retain=False, expect=2)
    assert "retain_batch_size is set but retain_weight is 0" in refused


def test_texts_and_columns_and_splits(unlearn, tmp_path):
    """Plain text is scored as passages; columns and splits are named as LUME has them, with the same figures."""
    texts = [{"text": " ".join(row["answer"] for row in FORGET)}, {"text": f"{PLANTED} and nobody else."}]
    write_jsonl(texts, tmp_path / "texts.jsonl")
    write_jsonl([{"text": " ".join(row["answer"] for row in RETAIN)}], tmp_path / "kept.jsonl")
    how = {"forget": tmp_path / "texts.jsonl", "retain": tmp_path / "kept.jsonl"}
    unlearn("--tau", "0.5", "--max_length", "16", out=tmp_path / "texts", **how)
    assert [rows for *_, rows in figures(tmp_path / "texts")] == [{"forget": 2, "retain": 1}] * 2
    facts = Facts.load(tmp_path / "texts")
    assert (facts.forget.rows, facts.training["prefix_share"]) == (2, 0.25)
    assert "prefix share" in (tmp_path / "texts" / "README.md").read_text()
    refused = unlearn("--loss_type", "dpo", out=tmp_path / "dpo", expect=2, **how)
    assert "the forget set has texts, without prompts" in refused and not (tmp_path / "dpo").exists()
    (tmp_path / "lume" / "data").mkdir(parents=True)
    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        named = [{"input": row["question"], "output": row["answer"], "task": "Task1"} for row in rows]
        write_parquet(named, tmp_path / "lume" / "data" / f"{name}_train-00000-of-00001.parquet")
    how = {name: f"{tmp_path / 'lume'}:default/{name}_train" for name in ("forget", "retain")}
    log = unlearn("--columns", "prompt=input,completion=output", out=tmp_path / "named", **how)
    assert "--columns prompt=input,completion=output" in log, "of the attack that comes next"
    unlearn(out=tmp_path / "plain")
    assert figures(tmp_path / "named") == figures(tmp_path / "plain")
    refused = unlearn(out=tmp_path / "other", expect=2, **how)
    assert "Its columns are input, output, task" in refused and "--columns question=NAME,answer=NAME" in refused
    for wrong in ("prompt", "prompt=", "body=input", "prompt=input,question=output"):
        assert "--columns" in unlearn("--columns", wrong, out=tmp_path / "wrong", expect=2, **how)


def test_a_preferred_response(unlearn, tmp_path):
    rows = [prompt_completion(row) | {"chosen": "I do not know."} for row in FORGET]
    write_jsonl(rows, tmp_path / "pairs.jsonl")
    unlearn("--loss_type", "dpo", forget=tmp_path / "pairs.jsonl")
    assert [name for name, *_ in figures(tmp_path / "out")] == ["base", "dpo"]


def test_nothing_is_overwritten_unless_asked(unlearn, tmp_path, checkpoint):
    out = tmp_path / "out"
    unlearn()
    (out / "notes.txt").write_text("mine")
    (out / "recovery.json").write_text("of the model before")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert "is not empty" in unlearn(expect=2)
    assert "not of this command" in unlearn("--resume", "--tau", "1", expect=2)
    inside = ("--overwrite_output_dir", "--model_name_or_path", out)
    assert "would overwrite" in unlearn(*inside, expect=2)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    unlearn("--overwrite_output_dir", "--loss_type", "npo")
    assert [name for name, *_ in figures(out)] == ["base", "npo"] and load_model(str(out))
    assert (out / "notes.txt").read_text() == "mine" and not (out / "recovery.json").exists()


def test_resumed(unlearn, tmp_path):
    """Killed after the training: the weights are those of the last checkpoint, and no update is made again."""
    out = tmp_path / "out"
    unlearn("--save_steps", "1")
    expected, weights = figures(out), (out / "model.safetensors").read_bytes()
    for name in ("results.json", "model.safetensors", "unlearned-rows.jsonl"):
        (out / name).unlink()
    unlearn("--save_steps", "1", "--resume")
    assert figures(out) == expected and (out / "model.safetensors").read_bytes() == weights
