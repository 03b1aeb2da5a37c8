"""Commands: a mistake of the user ends in one line and status 2, before a model is loaded or a file is touched."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import warm
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from mdu_trainer import commands
from mdu_trainer.commands import explain, loading, run, task
from mdu_trainer.files import UserError

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "tests" / "demo_card"
SECRET = "Zanzibar Quillfeather"


# One class, one line


def call(main, capsys, *arguments, monkeypatch, program="tool.py"):
    """Status and stderr of a command."""
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    status = run(main)
    return status, capsys.readouterr().err


def failing(error):
    def main():
        raise error

    return main


def test_a_mistake_is_one_line(capsys, monkeypatch):
    status, err = call(failing(UserError("No rows.\nAdd some.")), capsys, monkeypatch=monkeypatch)
    assert (status, err.count("\n")) == (2, 1) and "error: No rows. Add some. (--traceback shows where)" in err
    status, err = call(failing(UserError("No rows.")), capsys, "--traceback", monkeypatch=monkeypatch)
    assert status == 2 and "Traceback" in err and "failing" not in sys.argv and sys.argv == ["tool.py"]
    assert call(lambda: 1, capsys, monkeypatch=monkeypatch) == (1, "")
    assert call(lambda: None, capsys, monkeypatch=monkeypatch) == (0, "")


def test_a_fault_of_ours_shows_where_and_quotes_nothing(capsys, monkeypatch):
    status, err = call(failing(KeyError(SECRET)), capsys, monkeypatch=monkeypatch)
    assert status == 1 and "in main" in err and "KeyError: a fault of the program" in err and SECRET not in err
    status, err = call(failing(ValueError(SECRET)), capsys, "--traceback", monkeypatch=monkeypatch)
    assert status == 1 and SECRET in err


def test_interruptions_say_how_to_go_on(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tool.py"])
    assert run(failing(KeyboardInterrupt()), again="Pass --resume") == 130
    assert capsys.readouterr().err.endswith("interrupted. Pass --resume.\n")
    with pytest.raises(SystemExit) as end:  # of a training that a signal stopped
        run(failing(SystemExit(143)), again="Pass --resume")
    assert end.value.code == 143 and "stopped. Pass --resume." in capsys.readouterr().err


def test_of_several_processes_the_main_one_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert call(failing(UserError("No rows.")), capsys, monkeypatch=monkeypatch) == (2, "")
    status, err = call(failing(MemoryError()), capsys, monkeypatch=monkeypatch)
    assert status == 2 and "(process 1): error: out of memory" in err
    status, err = call(failing(TypeError()), capsys, monkeypatch=monkeypatch)
    assert status == 1 and "(process 1)" in err


def test_what_libraries_say_of_what_a_user_gave(tmp_path, make_model):
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(b"no header")

    def wrong_modules():
        get_peft_model(make_model(), LoraConfig(target_modules=["no_such_module"]))

    def broken_config():
        from transformers import AutoConfig

        (tmp_path / "config.json").write_text("{")
        AutoConfig.from_pretrained(tmp_path)

    def no_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    for action, words in {
        lambda: safe_open(broken, "pt"): "loading X: SafetensorError: Error while deserializing header",
        lambda: (tmp_path / "nothing").read_text(): "nothing: No such file or directory",
        wrong_modules: "no_such_module",
        broken_config: "loading X: ",
        no_memory: "out of memory while loading X",
    }.items():
        with pytest.raises(Exception) as error, task("loading X"):
            action()
        assert words in explain(error.value) and "\n" not in explain(error.value)
    with pytest.raises(ValueError) as error:  # without a task, too: it is always the user's
        wrong_modules()
    assert "no_such_module" in explain(error.value)


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), RuntimeError("x"), AssertionError()])
def test_our_own_errors_are_not_taken_for_mistakes(error):
    with pytest.raises(type(error)) as raised, task("loading X"):
        raise error
    assert explain(raised.value) is None


# Every script


@pytest.fixture(scope="module")
def given(tmp_path_factory, tokenizer):
    """What wrong command lines name: a model, an adapter on it, data, files, and the output of an earlier run."""
    from mdu_trainer.testing import tiny_mdlm

    folder = tmp_path_factory.mktemp("given")
    earlier = folder / "earlier"
    for name in ("model", "earlier/base", "earlier/retain"):
        tiny_mdlm(tokenizer, 16, 1, 2).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(earlier / "base")})
    )
    (earlier / "results.json").write_text((DEMO / "results.json").read_text())
    (earlier / "config.yaml").write_text("loss_type: [npo]\n")
    (folder / "data").mkdir()
    for name in ("forget", "keep"):
        (folder / "data" / f"{name}.json").write_text(json.dumps([{"question": "Q?", "answer": SECRET}]))
    (folder / "intros.jsonl").write_text(json.dumps({"question": "Q?", "answer": SECRET}))
    talk = [{"role": role, "content": SECRET} for role in ("user", "assistant") * 2]
    (folder / "talk.jsonl").write_text(json.dumps({"messages": talk}))
    files = {
        "text.yaml": "a: b: c",
        "list.yaml": "[1, 2]",
        "unknown.yaml": "no_such_key: 1\n",
        "type.yaml": "max_steps: many\n",
        "nested.yaml": "max_steps: [1, 2]\n",
        "null.yaml": "likelihood_draws: null\n",
        "choice.yaml": "dtype: float7\n",
        "latin.yaml": "é: 1\n".encode("latin-1"),
        "empty_list.yaml": "subjects: []\n",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


MODEL = "--model_name_or_path={}/model"
OVERWRITE = "--output_dir={}/earlier --overwrite_output_dir"
BOTH = "--base={}/model --model={}/model"
RWKU = f"{MODEL} --forget={{}}/intros.jsonl --dataset_name={{}}/data"
WRONG = {  # script and options -> part of the line
    "tofu --no_such_option 1": "There is no option --no_such_option",
    "tofu --max_step 5": "There is no option --max_step",
    "tofu stray words": "2 words on the command line belong to no option",
    "tofu --config": "--config needs a file",
    "tofu --config={}/nothing.yaml": "nothing.yaml: No such file",
    "tofu --config {}/text.yaml": "text.yaml is not YAML, line 1",
    "tofu --config {}/list.yaml": "must contain a YAML mapping",
    "tofu --config {}/latin.yaml": "latin.yaml is not YAML",
    "tofu --config {}/unknown.yaml": "There is no option --no_such_key",
    "tofu --config {}/type.yaml": "invalid int value: 'many'",
    "tofu --config {}/nested.yaml": "max_steps has no value, or one of another type",
    "tofu --config {}/null.yaml": "likelihood_draws has no value",
    "tofu --config {}/choice.yaml": "invalid choice: 'float7'",
    "tofu --dtype float7": "invalid choice: 'float7'",
    "tofu --load_in_8bit --load_in_4bit": "8 bit and 4 bit",
    "tofu --max_eval_rows 0": "--max_eval_rows must be at least 1, got 0",
    "tofu --likelihood_draws -1": "--likelihood_draws must be at least 1",
    "tofu --max_new_tokens 0": "--max_new_tokens must be at least 1",
    "tofu --decoding_steps 0": "--decoding_steps must be at least 1",
    "tofu --batch_size 0": "--batch_size must be at least 1",
    "tofu --tau 0 0.5 0": "--tau names value 3 twice",
    "tofu --loss_type ga ga": "--loss_type names value 2 twice",
    "tofu --loss_type unlearn": "loss_type 'unlearn' is unknown",
    "tofu --metrics bleu": "Unknown metrics: bleu",
    "tofu --lr_scheduler_type nonsense": "invalid choice: 'nonsense'|not a valid SchedulerType",
    "tofu --optim nonsense": "invalid choice: 'nonsense'|not a valid OptimizerNames",
    "tofu --hidden_size 30": "--hidden_size must be a multiple of 8",
    "tofu --finetune_learning_rate nan": "--finetune_learning_rate must be above 0",
    "tofu --output_dir=": "--output_dir is empty",
    "tofu --output_dir /": "your home or the root",
    "tofu --output_dir ~": "your home or the root",
    "tofu --output_dir {}/intros.jsonl/out": "intros.jsonl is a file",
    "tofu --resume --overwrite_output_dir": "pass one",
    "tofu --model_name_or_path ../..": "holds no model",
    "tofu --model_name_or_path a//b": "there is no folder a//b",
    "tofu --model_name_or_path a---b": "'a---b' is neither a folder nor OWNER/NAME",
    "tofu --model_name_or_path {}/no/model": "there is no folder",
    "tofu --model_name_or_path {}/intros.jsonl": "is a file",
    f"tofu {MODEL} --model_revision a..b": "--model_revision 'a..b' is no name of a branch",
    "tofu --dataset_name {}/no/data": "there is no folder",
    f"tofu {OVERWRITE} --model_name_or_path={{}}/earlier/base": "is read, and this run would overwrite it",
    f"tofu {OVERWRITE} --model_name_or_path={{}}/adapter": "is read, and this run would overwrite it",
    f"tofu {OVERWRITE} {MODEL} --retain_model={{}}/earlier/retain": "is read, and this run would overwrite it",
    f"tofu {MODEL} --output_dir={{}}/earlier": "is not empty",
    f"tofu {MODEL} --output_dir={{}}/earlier --resume": "is not of this command",
    "sweep --select=retain>0.9": "--select: 'retain>0.9' is no condition",
    "sweep --select=retain.exact_memorization>=1": "is not measured here",
    "sweep --learning_rate 1e-4 1e-4": "--learning_rate names value 2 twice",
    "sequential --num_requests 12": "--num_requests must be from 1 to 11",
    "sequential --dataset_name {}/data": "needs --requests and --retain_split",
    f"sequential {OVERWRITE} --model_name_or_path={{}}/earlier/base": "is read, and this run would overwrite it",
    "rwku": "Which model? Pass --model_name_or_path",
    f"rwku {MODEL}": "Pass --forget",
    f"rwku {RWKU} --config {{}}/empty_list.yaml": "subjects has no value",
    f"rwku {RWKU} --subjects  ": "--subjects: expected at least one argument",
    f"rwku {RWKU} --max_eval_rows 0": "--max_eval_rows must be at least 1",
    "score": "Which model?",
    f"score {MODEL} --benchmark own": "Pass --forget FILE",
    f"score {MODEL} --benchmark tofu --forget {{}}/intros.jsonl": "leave one out",
    f"attack {BOTH} --forget {{}}/intros.jsonl --dataset_name {{}}/data": "both name the rows: pass one",
    f"roles {BOTH} --retain {{}}/intros.jsonl": "--retain goes with --forget",
    f"score {MODEL} --seed -1": "--seed must be at least 0",
    f"score {MODEL} --benchmark tofu": "needs --dataset_name",
    f"score {MODEL} --batch_size 0": "--batch_size must be at least 1",
    f"score {MODEL} --baseline={{}}/earlier/results.json --output_dir={{}}/earlier": "is read, and this run would",
    f"score {MODEL} --baseline={{}}/intros.jsonl": "is not a results file|has no schema",
    f"attack {BOTH} --attacks bleu": "Unknown attacks: bleu",
    f"attack {BOTH} --attacks prefix prefix": "--attacks names value 2 twice",
    f"attack {BOTH} --relearn_steps 0": "--relearn_steps must be at least 1",
    "roles --base {}/model --model {}/model {}/model": "--model_name_or_path names value 2 twice",
    f"roles {BOTH} --num_steps 0": "num_steps must be at least 1",
    "roles --base {}/model": "Which models? Pass --model_name_or_path",
    "unlearn": "Which model? Pass --model_name_or_path",
    f"unlearn {MODEL}": "Which rows are to be forgotten? Pass --forget",
    f"unlearn {MODEL} --forget {{}}/no.jsonl": "There is no file",
    f"unlearn {MODEL} --forget {{}}/no/rows": "There is no file or folder",
    f"unlearn {MODEL} --forget {{}}/data": "has the configs forget, keep: choose one",
    f"unlearn {MODEL} --forget {{}}/talk.jsonl": "Row 0 of|is not one turn of the user",
    f"unlearn {MODEL} --forget {{}}/text.yaml": "text.yaml, line 1, is not JSON",
    f"unlearn {MODEL} --forget {{}}/intros.jsonl --batch_size 0": "--batch_size must be at least 1",
    f"unlearn {MODEL} --forget {{}}/intros.jsonl --tau -1": "tau must be finite",
    f"unlearn {MODEL} --forget {{}}/intros.jsonl --output_dir={{}}/earlier": "is not empty",
    f"unlearn {OVERWRITE} --model={{}}/earlier/base --forget {{}}/intros.jsonl": "is read, and this run would",
    f"unlearn {OVERWRITE} --model={{}}/adapter --forget {{}}/intros.jsonl": "is read, and this run would",
    f"unlearn {MODEL} --forget {{}}/intros.jsonl --resume --overwrite_output_dir": "pass one",
    "report": "the following arguments are required: FOLDER",
    "report {}/data": "holds nothing to show",
    "publish {}/model ../..": "neither a folder nor OWNER/NAME",
    "publish {}/model a//b": "neither a folder nor OWNER/NAME",
    "publish {}/model org/name --revision a..b": "--revision 'a..b' is no name",
    "publish {}/nothing org/name": "There is no folder",
}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")
    }


@pytest.mark.parametrize("line", WRONG)
def test_wrong_command_lines(line, given, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_checkpoint", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    script, *options = line.format(*[given] * line.count("{}")).split()
    before = snapshot(given)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "examples" / f"{script}.py"), *options])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(sys.argv[0], run_name="__main__")
    out, err = capsys.readouterr()
    assert end.value.code == 2, err
    (said,) = err.splitlines()
    assert said.startswith(f"{script}.py: error: ") and "Traceback" not in out + err and SECRET not in out + err
    assert any(words in said for words in WRONG[line].split("|")), said
    assert snapshot(given) == before and not list(tmp_path.iterdir()), "nothing is written or deleted"


def test_modules_end_as_scripts_do(tmp_path, monkeypatch, capsys):
    for module, arguments, message in (
        ("leak_check", ["--model", "x"], "the following arguments are required: --forget"),
        ("models", [], "the following arguments are required: name_or_path"),
        ("model_card", [str(tmp_path)], "holds no unlearning.json"),
        ("model_card", [], "the following arguments are required: folder"),
        ("convert", ["rwku", str(tmp_path), "--output", "rows.jsonl"], "neither a file of JSON lines, nor a folder"),
    ):
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        name = f"mdu_trainer.{module}"
        for loaded in (name, f"{name}.__main__"):
            if loaded in sys.modules and not hasattr(sys.modules[loaded], "__path__"):
                monkeypatch.delitem(sys.modules, loaded)
        with pytest.raises(SystemExit) as end:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        (said,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and said.startswith(f"python -m {name}: error: ") and message in said


def shell(*command):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=200)


def test_in_a_process_of_its_own(given):
    ended = shell(sys.executable, "examples/score.py", "--model_name_or_path", "a---b")
    assert ended.returncode == 2 and ended.stdout == ""
    (said,) = ended.stderr.splitlines()
    assert said.startswith("score.py: error: --model_name_or_path: 'a---b' is neither a folder nor OWNER/NAME")


def test_interrupted_in_a_process_of_its_own(tmp_path):
    """Ctrl-C while a model from scratch is taught: status 130, no traceback, a word on how to go on."""
    arguments = ["--output_dir", str(tmp_path / "out"), "--finetune_epochs", "5000", "--hidden_size", "16"]
    words = [sys.executable, "-c", INTERRUPTIBLE, "examples/tofu.py", *arguments, "--use_cpu", "--report_to", "none"]
    with warm.started(words, tmp_path / "log.txt", cwd=ROOT) as (process,):
        while "fine-tuning" not in (log := (tmp_path / "log.txt").read_text()):
            assert process.is_alive(), log
            time.sleep(0.01)
        time.sleep(1)
        os.kill(process.pid, signal.SIGINT)
        process.join(200)
        log = (tmp_path / "log.txt").read_text()
        assert process.exitcode == 130 and "Traceback" not in log, log[-2000:]
    assert "tofu.py: stopped. To go on from what is finished, give the same command again with --resume." in log


INTERRUPTIBLE = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_messages_are_cut(monkeypatch):
    assert len(explain(OSError("x" * 5000))) < commands.LONGEST_MESSAGE + 10
