"""Folders of runs: what an earlier run left is replaced only once the new one has started."""

from pathlib import Path

import pytest

from mdu_trainer.commands.folders import ASIDE, RunArguments, output_folder, starting
from mdu_trainer.files import UserError


@pytest.fixture
def folder(tmp_path):
    """The output of an earlier run, and a file that is none of its."""
    folder = tmp_path / "out"
    (folder / "base").mkdir(parents=True)
    (folder / "base" / "weights").write_text("old")
    (folder / "results.json").write_text("old")
    (folder / "notes.txt").write_text("mine")
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def start(folder, *, fail=None, inputs=(), **options):
    options = {"resume": False, "overwrite": True} | options
    with starting(folder, [folder / name for name in ("base", "new", "results.json")], inputs, **options):
        for name in ("base", "new"):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / "weights").write_text("new")
        if fail is not None:
            raise fail


def test_what_was_there_goes_when_the_run_has_started(folder):
    start(folder)
    assert contents(folder) == {"base/weights": "new", "new/weights": "new", "notes.txt": "mine"}
    assert not (folder / ASIDE).exists()


def test_analyses_go_with_the_models_that_they_are_of(folder):
    for name in ("recovery.json", "roles.json", "heatmap.png", "report.html"):
        (folder / name).write_text("of the models before")
    with output_folder(folder, [folder / "base"], [], RunArguments(overwrite_output_dir=True), {"seed": 1}):
        pass
    assert contents(folder) == {"notes.txt": "mine", "config.yaml": "seed: 1\n"}


@pytest.mark.parametrize("error", [OSError("disk full"), UserError("no such model"), TypeError()])
def test_what_was_there_comes_back_when_the_start_fails(folder, error):
    before = contents(folder)
    with pytest.raises(type(error)):
        start(folder, fail=error)
    assert contents(folder) == before and not (folder / ASIDE).exists() and not (folder / "new").exists()


def test_an_interrupted_start(folder):
    """Killed, or stopped by the user: both contents are there, and whatever the user then chooses is done."""
    before = contents(folder)
    for _ in range(2):  # interrupted twice
        with pytest.raises(KeyboardInterrupt):
            start(folder, fail=KeyboardInterrupt())
        assert contents(folder)[f"{ASIDE}/base/weights"] == "old" and contents(folder)["base/weights"] == "new"
    with pytest.raises(UserError, match="What an interrupted start was to replace lies in"):
        start(folder, overwrite=False)
    with pytest.raises(OSError):  # started anew, it fails: the content before all of it is back
        start(folder, fail=OSError())
    assert contents(folder) == before
    with pytest.raises(KeyboardInterrupt):
        start(folder, fail=KeyboardInterrupt())
    with pytest.raises(OSError):  # resumed, it fails: what was begun is kept
        start(folder, fail=OSError(), resume=True, overwrite=False)
    assert contents(folder)["base/weights"] == "new"
    start(folder, resume=True, overwrite=False)
    assert not (folder / ASIDE).exists() and contents(folder)["notes.txt"] == "mine"


def test_a_folder_that_a_failed_start_made_is_gone(tmp_path):
    with pytest.raises(OSError):
        start(tmp_path / "fresh", fail=OSError())
    assert not (tmp_path / "fresh").exists()


def test_inputs_are_not_deleted(folder, tmp_path):
    before = contents(folder)
    (tmp_path / "link").symlink_to(folder / "base")
    for one in (folder / "base", folder / "base" / "weights", tmp_path / "link", folder / "x" / ".." / "base"):
        if one.exists():
            with pytest.raises(UserError, match="is read, and this run would overwrite it"):
                start(folder, inputs=[None, "org/name", str(one)])
    with pytest.raises(UserError, match="is not empty"):
        start(folder, overwrite=False)
    assert contents(folder) == before
    start(folder, inputs=[str(folder / "notes.txt"), str(folder)])


def test_a_move_that_fails_is_undone(folder, monkeypatch):
    before, rename = contents(folder), Path.rename

    def once(path, new):
        if path.name == "results.json" and ASIDE in str(new):
            raise OSError("not permitted")
        return rename(path, new)

    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(OSError, match="not permitted"):
        start(folder)
    assert {name: text for name, text in contents(folder).items() if text} == before
