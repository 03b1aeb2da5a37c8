"""Checkpoints are whole or not there, and a killed run ends with the weights of one that was left alone."""

import json
import logging
import os
import shutil
import signal

import pytest
from runs import KINDS, PLACES, draw, make_trainer, run, weights

from mdu_trainer import CheckpointError, checkpoints
from mdu_trainer.checkpoints import (
    MANIFEST,
    choose,
    complete_checkpoints,
    damage,
    newest_intact,
    rotate,
    write_manifest,
)

KILLS = 18


@pytest.fixture(autouse=True)
def seen(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mdu_trainer"), "propagate", True)
    return caplog


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
