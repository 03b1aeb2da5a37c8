"""The `mdu` command: its list, its subcommands under their own names, and what it answers to a wrong one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import warm

from mdu_trainer.commands import mdu
from mdu_trainer.evaluation.results import Results
from mdu_trainer.testing import tiny_mdlm

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {  # that have the same name wherever they are -> names that they had
    "model_name_or_path": (),
    "dataset_name": (),
    "output_dir": (),
    "batch_size": ("eval_rows_a_batch",),
    "max_eval_rows": ("max_rows",),
    "retain_model": ("never_trained",),
    "forget": ("intros",),
    "forget_description": ("description",),
}


@pytest.fixture
def call(monkeypatch, capsys):
    """Status, standard output and standard error of `mdu`."""

    def call(*words):
        monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
        monkeypatch.setattr(sys, "argv", ["/usr/bin/mdu", *map(str, words)])
        try:
            status = mdu.main()
        except SystemExit as end:
            status = end.code
        return status or 0, *capsys.readouterr()

    return call


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_the_list(call, words):
    status, out, err = call(*words)
    assert (status, err) == (0, "")
    assert all(re.search(rf"^  {name} +\S", out, re.M) for name in mdu.COMMANDS)


def test_the_list_is_quick():
    code = "import sys, mdu; mdu.main(); sys.exit('torch' in sys.modules or 'mdu_trainer' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "mdu_trainer" / "commands")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and run.stdout.startswith("usage: mdu COMMAND"), run.stderr


def test_every_example_has_a_name():
    files = {target for target, _ in mdu.COMMANDS.values() if target.endswith(".py")}
    assert files == {path.name for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.parametrize("wrong, near", [("scor", "score"), ("leak_check", "leak-check"), ("tofu", "unlearn")])
def test_an_unknown_one(call, wrong, near):
    status, out, err = call(wrong, "--help")
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert f"there is no command '{wrong}'" in err and near in err


@pytest.mark.parametrize("name", mdu.COMMANDS)
def test_help(call, name):
    status, out, err = call(name, "--help")
    assert (status, err) == (0, "") and out.startswith(f"usage: mdu {name} ")
    assert "python " not in out and "launch examples" not in out
    options = set(re.findall(r"^  (?:-h, )?--(\w+)", out, re.M))
    assert not options & {old for names in OPTIONS.values() for old in names}
    assert "model_name_or_path" not in options or "--model_name_or_path, --model " in out


def test_topics_of_the_help(call):
    out = call("unlearn", "--help")[1]
    topics = re.findall(r"^(\w.*):$", out, re.M)
    assert topics == [
        "options",
        "what to do",
        "unlearning (MDUConfig)",
        "model, adapter and quantization (TRL's ModelConfig)",
        "training (transformers' TrainingArguments)",
    ]
    parts = dict(zip(topics, re.split(r"^\w.*:$", out, flags=re.M)[1:], strict=True))
    for topic, option in zip(topics[1:], ("forget", "tau", "use_peft", "learning_rate"), strict=True):
        assert f"--{option} " in parts[topic]
    assert "--max-steps" not in out and "--resume " in parts["what to do"], "one spelling"


def test_mistakes_are_under_its_name(call, tmp_path):
    for words, message in (
        (("score",), "mdu score: error: Which model?"),
        (("score", "--model", tmp_path / "no"), "mdu score: error: --model_name_or_path: there is no folder"),
        (("leak-check", "--model", "x"), "mdu leak-check: error: the following arguments are required: --forget"),
        (("audit", "--model", "x", "--forget", tmp_path / "x.jsonl"), "mdu audit: error: There is no file"),
        (("card", tmp_path), "mdu card: error: "),
        (("publish", tmp_path), "mdu publish: error: the following arguments are required: repo_id"),
    ):
        status, out, err = call(*words)
        assert (status, out) == (2, "") and err.startswith(message) and err.count("\n") == 1, err


def test_from_end_to_end(tmp_path, tokenizer):
    """In a process of its own, in a folder that holds nothing."""
    for part in (tiny_mdlm(tokenizer, hidden_size=16, num_layers=1, num_heads=2), tokenizer):
        part.save_pretrained(tmp_path / "model")
    quick = ["--max_eval_rows", "2", "--likelihood_draws", "1", "--decoding-steps", "1", "--dtype=float32"]
    command = ["-m", "mdu_trainer.mdu", "score", "--model", "model", "--output_dir", "scored", *quick]
    run = warm.run([sys.executable, *command], cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    results = Results.load(tmp_path / "scored" / "results.json")
    assert results.details() in run.stdout and results.runs[0].rows == {"forget": 2, "retain": 2}


def test_the_others_run(call, tmp_path, make_model, tokenizer):
    make_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    status, out, _ = call("models", tmp_path)
    assert status == 0 and "supported            yes" in out
