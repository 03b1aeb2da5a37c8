"""The leak check that the Hub repeats: its request as recorded, without a token and without a row."""

import json

import pytest
from hub_server import TOKEN

from mdu_trainer.commands.leak_check import _parser, main

PACKAGE = "mdu-trainer @ git+https://github.com/owner/mdu_trainer"
CHECK = ["--model", "org/forgets", "--forget", "org/rows:forget10", "--retain", "org/kept", "--max_leak", "0.1"]
JOB = [*CHECK, "--every", "day", "--jobs", "--package", PACKAGE]
PLANTED = "Zanzibarquux"


def test_it_is_printed_and_nothing_is_asked(hub, capsys):
    assert main(JOB) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["schedule"] == "@daily" and shown["dependencies"] == [PACKAGE] and shown["flavor"] == "cpu-basic"
    assert shown["script"] == "mdu" and shown["script_args"][0] == "leak-check"
    check = _parser().parse_args(shown["script_args"][1:])
    assert (check.model_name_or_path, check.forget, check.retain) == ("/model", "/forget:forget10", "/retain")
    assert (check.max_leak, check.seed, check.dtype) == (0.1, 0, "auto")
    mounted = {volume["mountPath"]: (volume["type"], volume["source"]) for volume in shown["volumes"]}
    assert mounted == {
        "/model": ("model", "org/forgets"),
        "/forget": ("dataset", "org/rows"),
        "/retain": ("dataset", "org/kept"),
    }
    assert hub.requests == []


def test_the_request_as_recorded(hub, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(PLANTED)
    hub.datasets["org/rows"] = True
    assert main([*JOB, "--submit", "--model_revision", "tau0", "--flavor", "l4x1"]) == 0
    (job,) = hub.jobs
    assert job["schedule"] == "@daily" and "secrets" not in job["jobSpec"] and job["jobSpec"]["environment"] == {}
    spec = job["jobSpec"]
    assert spec["command"][:5] == ["uv", "run", "--with", PACKAGE, "mdu"] and spec["timeoutSeconds"] == 7200
    assert spec["flavor"] == "l4x1" and spec["labels"] == {"name": "mdu-leak-check"}
    assert spec["volumes"][0]["revision"] == "tau0"
    sent = b"".join(hub.bodies)
    assert TOKEN.encode() not in sent and PLANTED.encode() not in sent and hub.repos == {}
    assert "Made: job1." in capsys.readouterr().out
    main([*CHECK, "--every", "week", "--jobs", "--package", PACKAGE, "--submit"])
    assert hub.jobs[1]["schedule"] == "@weekly"


def refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    return capsys.readouterr().err


def test_rows_that_everybody_can_see(hub, capsys):
    hub.datasets["org/rows"] = False
    assert "everybody can see org/rows" in refused([*JOB, "--submit"], capsys) and hub.jobs == []
    hub.datasets.clear()
    assert "the Hub answered 404" in refused([*JOB, "--submit"], capsys)
    hub.datasets["org/rows"] = True
    hub.fail("POST", "/api/scheduled-jobs/", 402)
    assert "the Hub answered 402" in refused([*JOB, "--submit"], capsys) and hub.jobs == []


def test_no_file_of_the_folder_goes_along(hub, capsys, tmp_path, monkeypatch):
    hub.datasets["org/rows"] = True
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mdu").write_text(PLANTED)
    assert "a file mdu lies here" in refused([*JOB, "--submit"], capsys)
    assert hub.jobs == [] and PLANTED.encode() not in hub.received


@pytest.mark.parametrize(
    "change, message",
    [
        (["--audit"], "--audit is not for --jobs"),
        (["--show_forget_text"], "--show_forget_text is not for --jobs: the Hub keeps a Job's log"),
        (["--output", "x"], "--output is not for --jobs"),
        (["--history", "x"], "--history is not for --jobs"),
        (["--forget", "rows.jsonl"], "--forget is a file or folder of this machine"),
        (["--retain", "../rows.csv"], "--retain is a file or folder of this machine"),
        (["--forget", "/data/rows"], "neither a folder nor OWNER/NAME"),
        (["--model", "."], "--model is a folder of this machine"),
        (["--model", "a b"], "neither a folder nor OWNER/NAME"),
        (["--package", "git+https://me:hf_plantedInThePackage1@x.invalid/p"], "password or a token"),
        (["--max_leak", "7"], "--max_leak must be from 0 to 1"),
    ],
)
def test_what_no_job_can_do(hub, capsys, change, message):
    arguments = JOB if change != ["--audit"] else [word for word in JOB if word not in ("--max_leak", "0.1")]
    assert message in refused([*arguments, *change], capsys) and hub.requests == []


@pytest.mark.parametrize("words", [["--jobs"], ["--every", "day"], ["--submit"], ["--package", PACKAGE]])
def test_half_a_schedule(hub, capsys, words):
    assert "needs both --jobs and --every" in refused([*CHECK, *words], capsys)
    assert "--jobs needs --package" in refused([*CHECK, "--every", "day", "--jobs"], capsys)
