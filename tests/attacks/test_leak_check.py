"""The leak check: exit statuses, figures, the order of an audit, kills, wrong inputs, and texts that stay private."""

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import warm
from datasets import Dataset
from runs import die_at, status

from mdu_trainer import MDLMConfig, MDLMTrainer, question_answer_rows
from mdu_trainer.attacks import Attack, AttackScores, Target
from mdu_trainer.attacks import leak_check as measuring
from mdu_trainer.attacks.leak_check import CHECKS, Leak
from mdu_trainer.commands import leak_check
from mdu_trainer.commands.leak_check import main
from mdu_trainer.evaluation import progress
from mdu_trainer.evaluation.own_rows import load_questions
from mdu_trainer.testing import dataset_texts, fictional_authors, tiny_mdlm, train_tokenizer

PLANTED = "Zanzibarquux"  # a word of one answer
MOMENTS = {
    "in a check": (Target, "decode", 2),
    "between checks": (Target, "score", 3),
    "the file not renamed yet": (progress.os, "replace", 1),
}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Two authors, one row of whom holds the planted word."""
    columns = ("question", "answer", "paraphrased_question")
    rows = [{column: row[column] for column in columns} for row in fictional_authors(2)]
    rows[9]["answer"] = f"The town of {PLANTED}."
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rows) -> Path:
    """A model that holds the second author's rows only, one that holds nothing, and the rows."""
    folder = tmp_path_factory.mktemp("leak")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "held.json").write_text(json.dumps(rows[8:]))
    tokenizer = train_tokenizer(dataset_texts(Dataset.from_list(rows)), vocab_size=400)
    model = tiny_mdlm(tokenizer, hidden_size=64, num_layers=2)
    for name in ("empty", "full"):
        if name == "full":
            args = MDLMConfig(
                str(folder / "run"),
                max_steps=150,
                per_device_train_batch_size=8,
                learning_rate=3e-3,
                time_weighting=False,
                pad_with_end_tokens=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            )
            train = question_answer_rows(Dataset.from_list(rows[8:]), conversational=True)
            MDLMTrainer(model, args, train_dataset=train, processing_class=tokenizer).train()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def check(folder: Path, model: str, rows: str, *options) -> list[str]:
    return ["--model", str(folder / model), "--forget", str(folder / rows), *map(str, options)]


def test_exit_status_and_figures(folder, capsys):
    assert main(check(folder, "empty", "held.json", "--max-leak", 0.3)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    clean = json.loads(lines[0])
    assert clean["passed"] is True and clean["rows"] == 8 and clean["leak"] <= clean["high"] <= 0.3
    assert set(clean["checks"]) == {"plain", *CHECKS} and "audit" not in clean
    assert main(check(folder, "full", "held.json", "--max-leak", 0.3)) == 1
    leaking = json.loads(capsys.readouterr().out)
    assert leaking["passed"] is False and leaking["leak"] > 0.9 and leaking["max_leak"] == 0.3
    assert leaking["leak"] >= max(leaking["checks"].values()), "the worst of the checks, row by row"
    assert main(check(folder, "full", "held.json", "--max-leak", 1)) == 0


def test_leak_of_a_row_is_the_worst_and_the_upper_end_is_compared():
    leak = Leak({"plain": {0: 0.0, 1: 0.5, 2: 0.2, 3: 0.0}, "a": {0: 0.1, 1: 0.4, 3: 0.0}})
    assert leak.rows == [0.1, 0.5, 0.2, 0.0] and leak.estimate.value == pytest.approx(0.2)
    draw = np.random.default_rng(1)
    means = [draw.choice(leak.rows, 4).mean() for _ in range(20_000)]
    assert leak.upper == pytest.approx(np.percentile(means, 97.5), abs=0.02)
    assert leak.summary()["checks"] == {"plain": pytest.approx(0.175), "a": pytest.approx(0.5 / 3)}
    assert Leak({"plain": {0: 0.4}}).upper == 0.4 and Leak({"plain": {0: 0.4}}).summary()["high"] is None


def test_gate_compares_the_upper_end(folder, capsys, monkeypatch):
    leak = Leak({"plain": {0: 0.0, 1: 0.2, 2: 0.1, 3: 0.1}})
    monkeypatch.setattr(leak_check, "measure_leak", lambda *_, **__: leak)
    assert leak.estimate.value == pytest.approx(0.1) and leak.upper > 0.12
    assert main(check(folder, "empty", "held.json", "--max-leak", 0.11)) == 1
    assert main(check(folder, "empty", "held.json", "--max-leak", leak.upper)) == 0


def test_audit_puts_what_is_held_first(folder, capsys):
    assert main(check(folder, "full", "rows.jsonl", "--audit")) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["row"] for one in found["audit"][:8]} == set(range(8, 16))
    leaks = [one["leak"] for one in found["audit"]]
    assert leaks == sorted(leaks, reverse=True) and leaks[0] == 1 and leaks[-1] < 0.7 and len(leaks) == 16
    assert all(one["leak"] == max(one["checks"].values()) for one in found["audit"])
    assert found["leak"] == pytest.approx(np.mean(leaks)) and "passed" not in found


def test_wording_that_rows_to_keep_share_is_no_leak(folder, rows, capsys):
    """The model holds another author, and so the wording of all."""
    others = fictional_authors(12).select(range(16, 96)).select_columns(["question", "answer"])
    (folder / "others.json").write_text(json.dumps(list(others)))
    (folder / "first.json").write_text(json.dumps(rows[:8]))
    found = []
    for retain in ((), ("--retain", folder / "others.json")):
        main(check(folder, "full", "first.json", "--audit", *retain))
        found.append(json.loads(capsys.readouterr().out)["leak"])
    assert found[1] < found[0] / 2
    main(check(folder, "full", "held.json", "--audit", "--retain", folder / "others.json"))
    assert json.loads(capsys.readouterr().out)["leak"] > 0.9, "what it holds still counts"


def test_same_command_same_figures(folder, capsys, monkeypatch):
    lines = []
    for _ in range(2):
        main(check(folder, "full", "rows.jsonl", "--audit"))
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1]

    def seeded(target, seed):
        return AttackScores([0], [0.0], [float(np.random.default_rng(seed).random())])

    monkeypatch.setitem(measuring.ATTACKS, "leak-at-k", Attack(seeded, ""))
    main(check(folder, "empty", "held.json", "--audit", "--seed", 7))
    found = json.loads(capsys.readouterr().out)
    assert found["seed"] == 7 and found["checks"]["leak-at-k"] == float(np.random.default_rng(7).random())


def test_text_is_shown_on_request_only(folder, tmp_path):
    """As a schedule runs it."""
    for flag in ((), ("--show-forget-text",)):
        output = tmp_path / "leak.json"
        arguments = check(folder, "full", "rows.jsonl", "--max-leak", 0.5, "--output", output, *flag)
        run = warm.run([sys.executable, "-m", "mdu_trainer.leak_check", *arguments], cwd=tmp_path, timeout=200)
        assert run.returncode == 1, run.stderr[-2000:]
        assert output.read_text() == run.stdout and len(run.stdout.splitlines()) == 1
        assert (PLANTED in run.stdout) == bool(flag) and PLANTED not in run.stderr
        names = {word for row in fictional_authors(2) for word in row["answer"].split()[:1]} - {"The"}
        assert names and any(name in run.stdout + run.stderr for name in names) == bool(flag)
    assert [path.name for path in tmp_path.iterdir()] == ["leak.json"]
    shown = {one["row"]: one for one in json.loads(run.stdout)["audit"]}
    assert PLANTED in shown[9]["answer"] and shown[9]["question"] == fictional_authors(2)[9]["question"]


def gate(folder: Path, out: Path, kill: str | None = None) -> None:
    """In a process of its own, with its standard output in a file."""
    if kill is not None:
        die_at(*MOMENTS[kill])
    with (out / "stdout").open("w") as sys.stdout:
        main(check(folder, "full", "held.json", "--max-leak", 1, "--output", out / "leak.json"))


@pytest.mark.parametrize("kill", MOMENTS)
def test_killed_in_the_middle(folder, tmp_path, kill):
    (tmp_path / "leak.json").write_text("of the time before\n")
    assert status(gate, folder, tmp_path, kill=kill) == -signal.SIGKILL
    assert (tmp_path / "stdout").read_text() == "" and (tmp_path / "leak.json").read_text() == "of the time before\n"
    assert status(gate, folder, tmp_path) == 0
    assert (tmp_path / "leak.json").read_text() == (tmp_path / "stdout").read_text() != ""


FILES = {
    "empty.jsonl": "",
    "none.json": "[]",
    "half.json": f'[{{"question": "Q?", "answer": "{PLANTED}',
    "half.jsonl": f'{{"question": "Q?", "answer": "A"}}\n{{"question": "Q?", "answer": "{PLANTED}',
    "columns.jsonl": f'{{"prompt": "Q?", "answer": "{PLANTED}"}}',
    "later.jsonl": f'{{"question": "Q?", "answer": "A"}}\n{{"question": "{PLANTED}"}}',
    "number.json": f'[{{"question": "{PLANTED}", "answer": 3}}]',
    "blank.json": f'[{{"question": "{PLANTED}", "answer": " "}}]',
    "list.json": f'["{PLANTED}"]',
    "silent.json": '[{"question": "Q?", "answer": "..."}]',
    "latin.jsonl": b'{"question": "Q?", "answer": "\xe9"}',
}
WRONG = {
    ("--forget", "nowhere.jsonl"): "There is no file {}nowhere.jsonl.",
    ("--forget", "empty.jsonl"): "{}empty.jsonl is empty: it has no rows.",
    ("--forget", "none.json"): "{}none.json is empty: it has no rows.",
    ("--forget", "half.json"): "{}half.json, line 1, is not JSON.",
    ("--forget", "half.jsonl"): "{}half.jsonl, line 2, is not JSON.",
    ("--forget", "columns.jsonl"): "Row 0 of {}columns.jsonl has no question.",
    ("--forget", "later.jsonl"): "Row 1 of {}later.jsonl has no answer.",
    ("--forget", "number.json"): "Row 0 of {}number.json: answer must be a text.",
    ("--forget", "blank.json"): "Row 0 of the forget set: answer is blank",
    ("--forget", "silent.json"): "None of the 1 rows can be scored: their answers hold no word",
    ("--forget", "list.json"): "Row 0 of {}list.json is not an object with a value for each column.",
    ("--forget", "latin.jsonl"): "{}latin.jsonl is not UTF-8 text.",
    ("--forget", "data"): "{}data has the configs one, two: choose one, as {}data:CONFIG.",
    ("--forget", "data:three"): "{}data has no config 'three'; it has one, two.",
    ("--forget", "nothing:one"): "There is no folder {}nothing.",
    ("--retain", "number.json"): "Row 0 of {}number.json: answer must be a text.",
    ("--retain", "blank.json"): "Row 0 of the retain set: answer is blank",
    ("--model", "nowhere"): "nowhere",
    ("--max-leak", "1.5"): "--max_leak must be from 0 to 1, got 1.5",
    ("--max-leak", "nan"): "--max_leak must be from 0 to 1, got nan",
    ("--max-leak", "few"): "invalid float value",
    ("--dtype", "int4"): "invalid choice",
    ("--output", "data"): "--output {}data is a folder: name a file.",
    ("--audit",): "not allowed with argument",
}


@pytest.mark.parametrize("wrong", WRONG, ids=" ".join)
def test_wrong_inputs_end_with_2_before_a_model_is_loaded(folder, tmp_path, capfd, monkeypatch, wrong):
    monkeypatch.setattr(leak_check, "load_checkpoint", lambda *_, **__: pytest.fail("a model was loaded"))
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "data").mkdir()
    for name in ("one", "two"):
        (tmp_path / "data" / f"{name}.jsonl").write_text(f'{{"question": "Q?", "answer": "{PLANTED}"}}\n')
    name, *value = wrong
    if name in ("--forget", "--retain", "--model", "--output"):
        value = [str(tmp_path / value[0])]
    options = {"--model": str(folder / "empty"), "--forget": str(folder / "held.json"), "--max-leak": "0.5"}
    with pytest.raises(SystemExit) as stopped:
        main([part for pair in (options | dict.fromkeys([name], *value)).items() for part in pair if part is not None])
    out, err = capfd.readouterr()
    assert stopped.value.code == 2 and out == "" and PLANTED not in err
    assert WRONG[wrong].format(*[f"{tmp_path}/"] * 2) in err


def test_options_of_loading(folder, capsys, monkeypatch):
    given = []
    load = leak_check.load_checkpoint
    monkeypatch.setattr(leak_check, "load_checkpoint", lambda *args, **how: given.append(how) or load(*args, **how))
    main(check(folder, "empty", "held.json", "--max-leak", 1, "--dtype", "bfloat16", "--model_revision", "v2"))
    assert given == [{"dtype": "bfloat16", "revision": "v2"}] and json.loads(capsys.readouterr().out)["rows"] == 8


def test_one_of_two_modes(folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(check(folder, "empty", "held.json"))
    assert stopped.value.code == 2 and "--max_leak --audit is required" in capsys.readouterr().err


def test_a_failure_is_not_a_leak(folder, capsys, monkeypatch):
    def fail(*_, **__):
        raise KeyError(PLANTED)

    monkeypatch.setattr(leak_check, "measure_leak", fail)
    with pytest.raises(SystemExit) as stopped:
        main(check(folder, "empty", "held.json", "--max-leak", 1))
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and "KeyError: nothing was measured" in err and PLANTED not in err


def test_rows_of_a_data_set(tmp_path, rows):
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(load_questions(str(tmp_path))) == len(load_questions(f"{tmp_path}:one")) == 16
    loaded = load_questions(str(tmp_path / "one.jsonl"))
    assert loaded["paraphrased_question"] == [row["paraphrased_question"] for row in rows]
