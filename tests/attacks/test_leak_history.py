"""The history of leak checks: figures only, one line a check, in the order of their dates."""

import json

import pytest

from mdu_trainer.attacks.leak_check import Leak
from mdu_trainer.attacks.leak_history import LEAK_HISTORY, PastCheck, add_to_history, load_history
from mdu_trainer.commands import leak_check
from mdu_trainer.commands.leak_check import main
from mdu_trainer.files import UserError

ANSWER = Leak({"plain": {0: 0.0, 1: 0.2}}).summary() | {"seed": 3, "max_leak": 0.5, "passed": True}
PLANTED = "Zanzibarquux"


def test_what_is_added_comes_back_in_order(tmp_path):
    file = tmp_path / LEAK_HISTORY
    private = {"audit": [{"row": 0, "answer": PLANTED}], "question": PLANTED}
    add_to_history(file, ANSWER | private, "2026-05-02T04:00:00+02:00")
    add_to_history(file, ANSWER | {"passed": False, "max_leak": 0.1}, "2026-05-01T04:00:00+00:00")
    add_to_history(file, Leak({"plain": {0: 0.25}}).summary() | {"seed": 0})
    first, second, audit = load_history(file)
    assert (first.passed, second.passed, audit.passed) == (False, True, None)
    assert second == PastCheck(date="2026-05-02T04:00:00+02:00", **ANSWER) and second.moment.hour == 2
    assert audit.leak == 0.25 and audit.high is None and audit.date.endswith("+00:00")
    assert PLANTED not in file.read_text() and len(file.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "line", ["[]", "{}", '{"leak": "high"}', json.dumps(ANSWER | {"date": "yesterday"}), json.dumps({"note": PLANTED})]
)
def test_a_line_that_is_no_check(tmp_path, line):
    add_to_history(tmp_path / "h", ANSWER)
    with open(tmp_path / "h", "a") as file:
        file.write(f"{line}\n" if line != "[]" else '{"date": 1}\n')
    with pytest.raises(UserError, match="h, check 2, is none of a leak check") as failure:
        load_history(tmp_path / "h")
    assert PLANTED not in str(failure.value)


@pytest.fixture
def measured(monkeypatch, tmp_path, make_model, tokenizer):
    """Options of a check whose figures are given, not measured."""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "Who?", "answer": f"The town of {PLANTED}."}))
    monkeypatch.setattr(leak_check, "measure_leak", lambda *_, **__: Leak({"plain": {0: 0.2}}))
    options = ["--model", str(tmp_path / "model"), "--forget", str(tmp_path / "rows.jsonl")]
    return [*options, "--history", str(tmp_path / "folder" / LEAK_HISTORY)]


def test_a_check_adds_its_figures(measured, tmp_path, capsys):
    statuses = [main([*measured, "--max_leak", limit, "--show_forget_text"]) for limit in ("0.5", "0.1")]
    assert statuses == [0, 1] and PLANTED in capsys.readouterr().out
    history = tmp_path / "folder" / LEAK_HISTORY
    assert [(one.leak, one.max_leak, one.passed) for one in load_history(history)] == [
        (0.2, 0.5, True),
        (0.2, 0.1, False),
    ]
    assert PLANTED not in history.read_text()


def test_a_history_that_is_none_is_left_alone(measured, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(leak_check, "measure_leak", lambda *_, **__: pytest.fail("nothing is measured in vain"))
    history = tmp_path / "folder" / LEAK_HISTORY
    history.parent.mkdir()
    history.write_text("# notes\n")
    with pytest.raises(SystemExit, match="2"):
        main([*measured, "--max_leak", "0.5"])
    assert "is not JSON" in capsys.readouterr().err and history.read_text() == "# notes\n"
    history.unlink()
    history.mkdir()
    with pytest.raises(SystemExit, match="2"):
        main([*measured, "--max_leak", "0.5"])
    assert "--history" in (said := capsys.readouterr().err) and "is a folder" in said
