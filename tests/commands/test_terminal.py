"""What the terminal shows: one bar at a time, aligned lines, where to look at the end; plain lines in a file."""

import logging
import re
import sys
import warnings
from pathlib import Path

import pytest
import warm
from transformers import PrinterCallback, ProgressCallback

from mdu_trainer import MDUConfig, MDUTrainer, question_answer_rows
from mdu_trainer.commands import quiet
from mdu_trainer.commands.summary import summary
from mdu_trainer.report.page import PAGE
from mdu_trainer.terminal import Bar, say
from mdu_trainer.testing import fictional_authors, forget_retain_split
from mdu_trainer.trainer.progress import TrainingProgress, log_line

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = [
    *(
        "--config",
        EXAMPLES / "configs" / "demo.yaml",
        "--finetune_epochs",
        "1",
        "--max_steps",
        "3",
        "--use_cpu",
        "true",
    ),
    *("--hidden_size", "32", "--num_layers", "1", "--max_eval_rows", "2", "--likelihood_draws", "1"),
    *(
        "--decoding_steps",
        "1",
        "--loss_type",
        "mdu",
        "--tau",
        "0",
        "--preset",
        "none",
        "--logging_steps",
        "1",
        "--output_dir",
        "out",
    ),
]
LOGS = {"loss": 10.387, "grad_norm": 27.9, "learning_rate": 3e-4, "kl": 1.985, "forget_loss": 1.985}
LOGS |= {"retain_loss": 8.402, "entropy": 4.2, "masked_fraction": 0.53, "epoch": 0.2}


class Terminal:
    """Stands for stderr, as a terminal of no file."""

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.fixture(scope="module", params=[80, 120, None], ids=["80 columns", "120 columns", "file"])
def shown(request, tmp_path_factory):
    """The columns of a terminal, None for a file; what a comparison shows there, and where it ran."""
    place = tmp_path_factory.mktemp("shown")
    run = warm.run([sys.executable, EXAMPLES / "tofu.py", *TINY], cwd=place, columns=request.param)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    log = run.stderr + run.stdout
    return request.param, log.replace("\r\n", "\n"), place


def test_what_is_shown(shown):
    columns, log, _ = shown
    lines = log.split("\n")
    assert all(
        re.search(rf"^{line}$", re.sub(".*\r", "", log), re.M)
        for line in (
            r"fine-tuning base: 2 steps in \d+\.\d s, mean loss [\d.]+",
            r"scoring retain: 4 rows in \d+\.\d s",
            r"unlearning mdu-tau0: 3 steps in \d+\.\d s, mean loss [\d.]+",
            r"scoring mdu-tau0: 4 rows in \d+\.\d s",
        )
    ), log
    logged = [line.rpartition("\r")[2] for line in lines if re.search(r"(^|\r)step \d+/3 ", line)]
    assert len(logged) == 3 and len({line.index("lr") for line in logged}) == 1
    for line in logged:
        assert re.match(r"step \d/3  loss +\S+  forget +\S+  retain +\S+  lr +\S+", line)
    assert "{" not in log and "'" not in log and '"' not in log
    assert "warning" not in log.lower() and "Traceback" not in log
    for row in forget_retain_split(fictional_authors())[0]:
        assert row["question"] not in log and row["answer"] not in log


def test_bars(shown):
    columns, log, _ = shown
    if columns is None:
        assert "\r" not in log and "%" not in log and "\x1b" not in log
        for start in ("fine-tuning base: 2 steps", "scoring base: 4 rows", "unlearning mdu-tau0: 3 steps"):
            assert f"{start}\n" in log
        return
    assert "\x1b[A" not in log and "\n\n\n" not in log, "a bar below another moves the cursor"
    assert "The target of forgetting is" in log
    parts = [part for line in log.split("\n") for part in line.split("\r") if not part.startswith("|")]
    assert max(map(len, parts)) < columns, max(parts, key=len)
    bars = [part for part in parts if re.search(r"\d%\|", part)]
    for doing in ("fine-tuning base", "scoring base", "unlearning mdu-tau0", "Loading weights"):
        assert any(part.startswith(doing) for part in bars)
    whole = r"unlearning mdu-tau0: +\d+%\|.*\| [123]/3 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+(step/s|s/step)\]"
    assert any(re.fullmatch(whole, part) for part in bars), bars
    for line in log.split("\n"):  # nothing of a bar is left in what stays
        assert "%|" not in line.rpartition("\r")[2]


def test_the_end_says_where_to_look(shown):
    columns, log, place = shown
    end = log.rstrip().rpartition("\n\n")[2] + "\n"
    files = dict(re.findall(r"^(figures|picture|card|page) +(\S+)$", end, re.M))
    assert {"figures", "picture", "card"} <= set(files) and all((place / path).is_file() for path in files.values())
    assert ("page" in files) == (place / "out" / PAGE).exists()
    command = re.search(r"^next +(?:python -m )?\S*mdu (attack .*?)\n\Z", end, re.M | re.S)[1].replace("\\\n", " ")
    assert command.split() == [
        *("attack", "--model", "out/mdu-tau0", "--base", "out/base", "--retain_model", "out/retain")
    ]
    assert end.count("\n") <= 7


def test_summary_names_what_is_there(tmp_path):
    (tmp_path / "here").touch()
    end = summary({"picture": tmp_path / "here", "page": tmp_path / "not"}, ["attack", "--model", "a b"])
    assert end.startswith(f"picture  {tmp_path / 'here'}\nnext     ") and end.endswith("mdu attack --model 'a b'")
    assert "page" not in end


def test_a_log_is_a_line():
    line = log_line(LOGS, 10, 120)
    assert line.startswith(
        "step  10/120  loss   10.387  forget    1.985  retain    8.402  lr 3.00e-04  gradient   27.9"
    )
    assert line.endswith("kl    1.985  epoch 0.20")
    short = log_line(LOGS, 10, 120, room=79)
    assert line.startswith(short) and short.endswith("lr 3.00e-04")
    assert log_line({"eval_loss": 2.0, "eval_runtime": 3.0, "epoch": 1.0}, 3, 3) == (
        "step 3/3  eval  loss    2.000  epoch 1.00"
    )
    many = {f"eval_forget_probability_{i}": 0.5 for i in range(9)}
    assert len(log_line(many, 3, 3, room=79)) <= 79 and log_line(many, 3, 3, room=79).endswith(" ...")
    assert log_line({"text": "'quoted'"}, 3, 3) == ""
    for value in (float("nan"), float("-inf"), -1e-7, 1e30, 0.0, True, 7):
        assert log_line({"loss": value}, 1, 9).startswith("step 1/9  loss ")


def test_one_bar_at_a_time(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Bar("outer", total=2, unit="row") as bar:
        with Bar("inner", total=1) as inner:
            inner.update()
        say("a line")
        bar.update(2)
    assert "outer" in terminal.text and "inner" not in terminal.text and "a line\n" in terminal.text
    assert re.search(r"\router: 2 rows in \d+\.\d s\n$", terminal.text)


def test_a_bar_that_fails_says_no_end(capsys):
    with pytest.raises(ZeroDivisionError), Bar("failing", total=2):
        1 / 0  # noqa: B018
    with pytest.raises(ZeroDivisionError):
        for _ in Bar("iterated", [1, 2], total=2, unit="batch"):
            1 / 0  # noqa: B018
    assert list(Bar("whole", [1, 2], total=2, unit="pass")) == [1, 2]
    err = capsys.readouterr().err
    assert err.startswith("failing: 2 its\niterated: 2 batches\nwhole: 2 passes\nwhole: 2 passes in ")
    assert err.count("\n") == 4


def test_callbacks_of_a_user_stay(make_model, tokenizer, tmp_path, capsys):
    parts = forget_retain_split(fictional_authors(3), 1)
    forget, retain = (question_answer_rows(part, conversational=True) for part in parts)

    class Mine(ProgressCallback):
        pass

    printer, mine = PrinterCallback(), Mine()
    options = {
        "max_steps": 2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
    }
    trainer = MDUTrainer(
        make_model(),
        MDUConfig(str(tmp_path / "mine"), **options, disable_tqdm=True),
        train_dataset=forget,
        retain_dataset=retain,
        eval_dataset={"forget": forget},
        processing_class=tokenizer,
        callbacks=[printer],
    )
    trainer.add_callback(mine)
    callbacks = trainer.callback_handler.callbacks
    assert printer in callbacks and mine in callbacks
    assert [type(one) for one in callbacks].count(TrainingProgress) == 1
    assert ProgressCallback not in map(type, callbacks)
    trainer.remove_callback(mine)
    trainer.remove_callback(printer)
    trainer.train()
    trainer.evaluate()
    out, err = capsys.readouterr()
    assert "{" not in out + err and "unlearning mine: 2 steps\nstep 1/2  loss " in err
    assert "evaluating mine: " in err and re.search(r"^step 2/2  eval  forget_loss +[\d.]+  ", err, re.M), err
    assert len(re.findall("step 2/2  eval  forget_loss ", err)) == 2, "amid the training, and after it"
    logged = [{"loss", "train_loss", "eval_forget_loss"} & set(log) for log in trainer.state.log_history]
    assert logged == [{"loss"}, {"loss"}, {"eval_forget_loss"}, {"train_loss"}, {"eval_forget_loss"}]
    assert Bar.open is None


def test_only_what_is_known_is_left_out(caplog):
    quiet.silence()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "x")
    logger.warning("something else")
    assert [record.message for record in caplog.records] == ["something else"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet.silence()
        warnings.warn("`torch.jit.script_method` is deprecated. Please switch", DeprecationWarning, stacklevel=1)
        warnings.warn("`torch.jit.script_method` is gone", DeprecationWarning, stacklevel=1)
        warnings.warn("another", UserWarning, stacklevel=1)
    assert [str(one.message) for one in caught] == ["`torch.jit.script_method` is gone", "another"]
