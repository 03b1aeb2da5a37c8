"""Checkpoints are whole or not there, and a killed run ends with the weights of one that was left alone."""

import json
import os
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from runs import KINDS, PLACES, draw, make_trainer, run, weights

from mdu_trainer import CheckpointError
from mdu_trainer.trainer import checkpoints
from mdu_trainer.trainer.checkpoints import (
    MANIFEST,
    choose,
    clear_leftovers,
    complete_checkpoints,
    damage,
    newest_intact,
    rotate,
    write_manifest,
)
from mdu_trainer.trainer.run_lock import LOCK, sole_run

KILLS = 18


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a finished run of each kind."""
    folders = {kind: tmp_path_factory.mktemp("whole") for kind in KINDS}
    for kind, folder in folders.items():
        assert run(folder, kind) == 0
    return folders


@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_run_ends_with_the_same_weights(undisturbed, tmp_path, seed):
    kind, kill = draw(seed)
    assert run(tmp_path, kind, kill=kill) == -signal.SIGKILL, kill
    assert all(damage(checkpoint) is None for checkpoint in tmp_path.glob("checkpoint-*")), kill
    assert run(tmp_path, kind, resume=True) == 0
    assert weights(tmp_path) == weights(undisturbed[kind]), (kind, kill)
    assert not (tmp_path / checkpoints.WRITING).exists()
    assert len(complete_checkpoints(tmp_path)) == 2


def test_kills_cover_every_place_and_kind():
    drawn = [draw(seed) for seed in range(KILLS)]
    assert {kind for kind, _ in drawn} == set(KINDS) and {place for _, (place, _) in drawn} == set(PLACES)


def test_run_that_is_killed_again_and_again(undisturbed, tmp_path):
    kind = "LoRA with dropout"
    for micro_batches in (9, 5, 3, 11):
        run(tmp_path, kind, kill=("in a micro-batch", micro_batches), resume=True)
    assert run(tmp_path, kind, resume=True) == 0
    assert weights(tmp_path) == weights(undisturbed[kind])


@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize("kind", ["full, frozen copy", "LoRA with dropout"])
def test_run_that_had_made_all_its_updates_makes_no_more(tmp_path, seen, kind, schedule):
    """Killed between the name of the last checkpoint and the end of the script, amid an epoch."""
    options = {"lr_scheduler_type": schedule, "gradient_accumulation_steps": 1}
    whole = make_trainer(tmp_path, kind, **options)
    whole.train()
    resumed = make_trainer(tmp_path, kind, **options)
    result = resumed.train(resume_from_checkpoint=True)
    assert result.global_step == 10 and "All 10 updates are made already" in seen.text
    for (name, p), (_, q) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert newest_intact(tmp_path).name == "checkpoint-10"


# What is on the disk at each moment


class Killed(BaseException):
    """What a process did until a kill: nothing is written, renamed or deleted from then on."""


class Operations:
    """Counts what a process writes, renames and deletes in a folder, and ends it before the n-th.

    Python announces each operation to its audit hooks. `torch.save` writes in C++, so it announces itself here.
    """

    CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate")

    def __init__(self):
        self.folder, self.count, self.last = None, 0, None
        self.trees = []  # folders deleted file by file
        sys.addaudithook(self)

    def __call__(self, event, args):
        if self.folder is None:
            return
        if event == "shutil.rmtree":
            self.trees.append(Path(args[0]))
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        below = isinstance(args[0], str | os.PathLike) and str(args[0]).startswith(self.folder) if args else False
        relative = event in ("os.remove", "os.rmdir") and args[-1] != -1  # to an open folder
        if (writes and below) or (event in self.CHANGES and (below or relative)):
            self.announce()

    def announce(self):
        self.count += 1
        if self.last is not None and self.count >= self.last:
            raise Killed

    @contextmanager
    def until(self, last, folder):
        """Run until the n-th change in a folder; whether it was reached is in `count`."""
        self.folder, self.count, self.last, self.trees = str(folder), 0, last, []
        try:
            yield
        except Killed:
            pass
        finally:
            self.folder = None


OPERATIONS = Operations()


@pytest.fixture
def torch_save_announced(monkeypatch):
    save = torch.save

    def announced(content, path, *args, **kwargs):
        save(content, path, *args, **kwargs)
        if OPERATIONS.folder is not None and OPERATIONS.count + 1 == OPERATIONS.last:
            os.truncate(path, os.path.getsize(path) // 2)
        OPERATIONS.announce() if OPERATIONS.folder is not None else None

    monkeypatch.setattr(torch, "save", announced)


def save_at(trainer, folder, step):
    trainer.args.output_dir, trainer._written, trainer.state.global_step = str(folder), None, step
    trainer._save_checkpoint(trainer.model)


def start(folder):
    """What a next start does before it loads anything."""
    with sole_run(folder):
        clear_leftovers(folder)
        return choose(folder, True)


def assert_all_whole(folder, moment):
    named = list(folder.glob("checkpoint-*"))
    assert named, moment
    for checkpoint in named:
        assert damage(checkpoint) is None, (moment, checkpoint.name, damage(checkpoint))


@pytest.mark.usefixtures("torch_save_announced")
@pytest.mark.parametrize("kind", ["full, frozen copy", "LoRA with dropout"])
def test_checkpoint_that_has_its_name_is_whole_at_every_moment(tmp_path, kind):
    """A kill before every file operation of a save, its rename, the deletion of others, and of the start after it.

    The save replaces checkpoint-9 of an earlier run, and deletes checkpoint-12, which is of that run, too.
    """
    trainer = make_trainer(tmp_path / "run", kind, max_steps=1, save_strategy="no")
    trainer.train()
    before = tmp_path / "before"
    for step in (12, 9, 6):
        save_at(trainer, before, step)
        os.utime(before / f"checkpoint-{step}" / MANIFEST, (13 - step, 13 - step))
        trainer.args.save_total_limit = None
    trainer.args.save_total_limit = 2
    last, ends = 0, []
    while not ends or ends[-1] == last:
        last += 1
        folder = tmp_path / f"kill-{last}"
        shutil.copytree(before, folder, copy_function=os.link)
        with OPERATIONS.until(last, folder):
            save_at(trainer, folder, 9)
        ends.append(OPERATIONS.count)
        assert_all_whole(folder, f"save, {last}")
        for again in range(1, 99) if last % 8 == 0 else ():
            copy = tmp_path / "again"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder, copy, copy_function=os.link)
            with OPERATIONS.until(again, copy):
                start(copy)
            assert_all_whole(copy, f"save, {last}; start, {again}")
            if OPERATIONS.count < again:
                break
        assert start(folder) == str(newest_intact(folder))
        left = {path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-")}
        assert left <= {LOCK}, last
        shutil.rmtree(folder)
    assert last > 40, "operations of a save"


@pytest.mark.parametrize("load", [True, False])
def test_last_checkpoint_goes_at_once_where_the_best_one_is_kept(tmp_path, load):
    """At a limit of one the Trainer would delete it file by file."""
    kind = "LoRA with dropout"
    rows = make_trainer(tmp_path, kind).train_dataset
    options = {"eval_dataset": rows, "eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": load}
    options |= {"metric_for_best_model": "forget_loss", "greater_is_better": True, "save_total_limit": 1}
    trainer = make_trainer(tmp_path, kind, **options, max_steps=6)
    with OPERATIONS.until(None, tmp_path):
        trainer.train()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-3"]
    assert not [path for path in OPERATIONS.trees if path.name.startswith("checkpoint-")]


# Which one is resumed from


@pytest.fixture
def finished(undisturbed, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(undisturbed["LoRA with dropout"], folder)
    return folder


DAMAGES = {
    "has 7 bytes instead of": lambda folder: os.truncate(folder / "optimizer.pt", 7),
    "optimizer.pt is missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "adapter_model.safetensors is not what was written": lambda folder: flip(folder / "adapter_model.safetensors"),
    "it has no manifest.json: its writing was cut short": lambda folder: (folder / MANIFEST).unlink(),
    "its manifest.json cannot be read": lambda folder: os.truncate(folder / MANIFEST, 20),
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("problem", DAMAGES)
def test_damaged_checkpoint_is_skipped_or_refused(undisturbed, finished, seen, problem):
    kind = "LoRA with dropout"
    last, before = finished / "checkpoint-10", finished / "checkpoint-9"
    DAMAGES[problem](last)
    trainer = make_trainer(finished, kind)
    with pytest.raises(CheckpointError, match=f"checkpoint-10 cannot be resumed from: .*{problem}.*Name another"):
        trainer.train(resume_from_checkpoint=str(last))
    assert newest_intact(finished) == before
    assert "checkpoint-10 is skipped" in seen.text and problem in seen.text
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(str(finished / "final"))
    assert weights(finished) == weights(undisturbed[kind])
    assert damage(last) is None, "it is written anew"


def test_nothing_to_resume_from(finished, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint to resume from in .*Train without"):
        choose(tmp_path / "none", True)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        choose(tmp_path, str(tmp_path / "checkpoint-5"))
    for checkpoint in complete_checkpoints(finished):
        (checkpoint / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"not whole: checkpoint-10 \(it has no manifest.*checkpoint-9 \("):
        choose(finished, True)
    assert choose(finished, None) is None and choose(finished, False) is None


def test_limit_keeps_the_last_whole_one(tmp_path):
    for step in (3, 6, 9, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_text("w")
    for step in (3, 6, 9):
        write_manifest(tmp_path / f"checkpoint-{step}")
        os.utime(tmp_path / f"checkpoint-{step}" / MANIFEST, (step, step))
    rotate(tmp_path, None, set())
    assert len(list(tmp_path.iterdir())) == 4
    rotate(tmp_path, 2, {"checkpoint-9", "checkpoint-3"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-9"], "12 was cut short"
    rotate(tmp_path, 1, {"checkpoint-9", ""})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-9"]


def test_best_checkpoint_is_kept_and_loaded(tmp_path):
    kind = "LoRA with dropout"
    rows = make_trainer(tmp_path, kind).train_dataset
    options = {"eval_dataset": rows, "eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    options |= {
        "metric_for_best_model": "forget_loss",
        "greater_is_better": True,
        "save_total_limit": 1,
        "max_steps": 9,
    }
    trainer = make_trainer(tmp_path, kind, **options)  # the first is the best: forgetting lowers the figure
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / "checkpoint-3") and damage(tmp_path / "checkpoint-3") is None
    assert json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["best_model_checkpoint"] == best
    flip(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="is not what was written"):
        trainer._load_best_model()
