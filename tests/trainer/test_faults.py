"""Bad days, for real where that is possible: a clear message, a whole checkpoint, a status that says so."""

import errno
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_from_disk
from runs import make_trainer, run, train
from transformers import Trainer, TrainerCallback
from warm import PROCESSES

from mdu_trainer import CheckpointError, MDLMConfig, MDLMTrainer, NonFiniteLossError, TrainingInterrupted
from mdu_trainer.data.reading import whole_cache
from mdu_trainer.data.rows import tokenize_rows
from mdu_trainer.evaluation.sources import load_split
from mdu_trainer.trainer.checkpoints import WRITING, complete_checkpoints, damage, newest_intact

ROOT = Path(__file__).resolve().parents[2]
KIND = "LoRA with dropout"
FORGET = "full, frozen copy"


def last_step(folder):
    return int(newest_intact(folder).name.removeprefix("checkpoint-"))


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


# Signals


def train_and_signal(folder, signum, **options):
    action = At(4 if "save_steps" not in options else 5, lambda: os.kill(os.getpid(), signum))
    train(folder, KIND, callbacks=[action], **options)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_ends_a_run_with_a_checkpoint_and_a_status(tmp_path, signum, status):
    process = PROCESSES.Process(target=train_and_signal, args=(tmp_path, signum))
    process.start()
    process.join(60)
    assert process.exitcode == status
    assert last_step(tmp_path) == 5, "the step in hand when the signal came"
    assert not (tmp_path / "final").exists(), "the script stopped"


@pytest.mark.parametrize("step", [4, 5, 7, 9])
def test_stopped_and_resumed_run_ends_with_the_same_weights(tmp_path, seen, step):
    """Amid an epoch, at its end (after step 8), and where evaluation picks the best checkpoint."""
    rows = make_trainer(tmp_path / "rows", KIND).train_dataset
    options = {"eval_dataset": rows, "eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": 12}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "retain_loss", "save_total_limit": 1}
    whole = make_trainer(tmp_path / "whole", KIND, **options)
    whole.train()
    stopped = make_trainer(tmp_path / "out", KIND, **options)
    stopped.add_callback(At(step, lambda: signal.raise_signal(signal.SIGTERM)))
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted) as ended:
        stopped.train()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert ended.value.code == 143 and ended.value.step == step + 1 == last_step(tmp_path / "out")
    assert f"SIGTERM: training stops after step {step + 1} with a checkpoint" in seen.text
    resumed = make_trainer(tmp_path / "out", KIND, **options)
    resumed.train(resume_from_checkpoint=True)
    for (name, p), (_, q) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    metrics = [
        [(log["step"], log["eval_loss"]) for log in trainer.state.log_history if "eval_loss" in log]
        for trainer in (whole, resumed)
    ]
    assert metrics[0] == metrics[1]


@pytest.fixture
def interruptible():
    """SIGINT interrupts, also where the tests run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_second_signal_acts_at_once(tmp_path):
    trainer = make_trainer(tmp_path, KIND)

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    trainer.add_callback(At(4, twice))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert last_step(tmp_path) == 3


@pytest.mark.usefixtures("interruptible")
def test_signal_after_the_last_step_is_not_swallowed(tmp_path):
    trainer = make_trainer(tmp_path, KIND)
    trainer.add_callback(At(10, lambda: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert last_step(tmp_path) == 10


# Disks


def mounts():
    return os.name == "posix" and os.geteuid() == 0


@contextmanager
def small_disk(folder, size):
    folder.mkdir()
    mounted = (
        mounts()
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("a disk of a given size can be mounted by root alone")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_disk_that_fills_up(tmp_path, seen):
    with small_disk(tmp_path / "disk", "8m") as folder:
        trainer = make_trainer(folder, FORGET, save_total_limit=None)

        def fill():
            free = os.statvfs(folder)
            (folder / "filler").write_bytes(b"x" * max(0, free.f_bavail * free.f_bsize - 60_000))

        trainer.add_callback(At(4, fill))
        with pytest.raises(CheckpointError, match=r"checkpoint-6 could not be written.*free space.*Make room"):
            trainer.train()
        assert complete_checkpoints(folder) == [folder / "checkpoint-3"] and not (folder / WRITING).exists()
        assert "The last complete checkpoint is" in seen.text and "checkpoint-3; train(resume" in seen.text
        (folder / "filler").unlink()
        resumed = make_trainer(folder, FORGET, save_total_limit=None)
        resumed.train(resume_from_checkpoint=True)
        assert last_step(folder) == 10


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("file write failed"), OSError(errno.EIO, "x")],
)
def test_checkpoint_that_cannot_be_written(tmp_path, monkeypatch, error):
    trainer = make_trainer(tmp_path, KIND)
    save = Trainer._save_optimizer_and_scheduler

    def fail(self, folder):
        if self.state.global_step == 6:
            raise error
        save(self, folder)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", fail)
    message = re.escape(str(error))
    with pytest.raises(CheckpointError, match=rf"checkpoint-6 could not be written: {message}.*earlier checkpoints"):
        trainer.train()
    assert last_step(tmp_path) == 3 and not (tmp_path / WRITING).exists()


def test_output_folder_that_cannot_be_written_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    rows = Dataset.from_dict({"prompt": ["a"], "completion": ["b"]})
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="nothing can be written into output_dir.*Choose another.*file"):
        MDLMTrainer("no/such-model", MDLMConfig(str(tmp_path / "file")), rows)

    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "write_bytes", read_only)
    with pytest.raises(OSError, match="Read-only file system: nothing can be written into output_dir"):
        MDLMTrainer("no/such-model", MDLMConfig(str(tmp_path / "out")), rows)


# Numbers


def spoil(trainer, value=float("nan")):
    next(p for p in trainer.model.parameters() if p.requires_grad).data.view(-1)[0] = value


@pytest.mark.parametrize("kind", [KIND, "fine-tuning"])
def test_weights_that_are_not_finite(tmp_path, kind):
    trainer = make_trainer(tmp_path, kind)
    trainer.add_callback(At(5, lambda: spoil(trainer)))
    with pytest.raises(
        NonFiniteLossError, match=r"\w+\.weight holds NaN or infinite values at step 6; training stopped"
    ):
        trainer.train()
    assert last_step(tmp_path) == 3
    with pytest.raises(NonFiniteLossError, match="holds NaN or infinite values before training; no update was made"):
        trainer.train()
    other = make_trainer(tmp_path, kind)
    other.add_callback(At(6, lambda: spoil(other, float("inf"))))  # when a checkpoint is due
    with pytest.raises(
        NonFiniteLossError, match="after step 6; they are not saved, and the last checkpoint is intact"
    ):
        other.train(resume_from_checkpoint=True)
    assert last_step(tmp_path) == 3


def poison_steps(trainer, steps, what="gradient"):
    """NaN in the gradient, or in the loss, of one micro-batch of each of these steps."""
    compute, calls = trainer.compute_loss, []

    def compute_loss(*args, **kwargs):
        loss = compute(*args, **kwargs)
        calls.append(1)
        step, micro_batch = trainer.state.global_step + 1, len(calls) % 2
        if step in steps and micro_batch == 1:
            if what == "loss":
                return loss * float("inf")
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    trainer.compute_loss = compute_loss


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_update_that_is_not_finite_is_skipped_once(tmp_path, seen, what, max_grad_norm):
    trainer = make_trainer(tmp_path, FORGET, max_grad_norm=max_grad_norm, weight_decay=0.1)
    poison_steps(trainer, {4, 7}, what)
    before = []
    state = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.add_callback(At(3, lambda: before.extend(p.detach().clone() for p in state)))
    trainer.add_callback(
        At(4, lambda: before.append(all(torch.equal(p, q) for p, q in zip(state, before, strict=True))))
    )
    trainer.train()
    assert before[-1] is True, "step 4 changed nothing"
    assert "NaN or infinite at step 4: the update is skipped" in seen.text and "at step 7: the update" in seen.text
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert all(
        log["kl"] == log["kl"] and log["loss"] == log["loss"] for log in trainer.state.log_history if "kl" in log
    )


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_second_update_in_a_row_stops(tmp_path, what):
    trainer = make_trainer(tmp_path, FORGET)
    poison_steps(trainer, {5, 6}, what)
    with pytest.raises(NonFiniteLossError, match="at step 5 and again at step 6; training stopped before the update"):
        trainer.train()
    assert last_step(tmp_path) == 3
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


# Data


def test_truncated_cache(tmp_path, make_model, tokenizer):
    rows = Dataset.from_dict({"prompt": ["a very private question"] * 3000, "completion": ["a private answer"] * 3000})
    rows.save_to_disk(tmp_path / "rows")
    (arrow,) = (tmp_path / "rows").glob("*.arrow")
    for size in (arrow.stat().st_size - 20, 1000, 100, 0):
        os.truncate(arrow, size)
        with pytest.raises(ValueError, match="The Arrow file of my rows is cut short.*load the data again") as caught:
            with whole_cache("my rows"):
                load_from_disk(tmp_path / "rows")
        assert "private" not in str(caught.value)


def test_truncated_cache_of_a_benchmark(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"question": ["q"] * 99, "answer": ["a"] * 99}).to_json(tmp_path / "data" / "forget10.json")
    card = "---\nconfigs:\n- config_name: forget10\n  data_files: forget10.json\n---\n"
    (tmp_path / "data" / "README.md").write_text(card)
    load_split(tmp_path / "data", "forget10", keep_dataset_cache=True)
    (arrow,) = (tmp_path / "cache").rglob("*.arrow")
    os.truncate(arrow, arrow.stat().st_size // 2)
    with pytest.raises(ValueError, match="The Arrow file of config 'forget10' of .* is cut short or damaged"):
        load_split(tmp_path / "data", "forget10", keep_dataset_cache=True)


def test_rows_that_cannot_be_read(tokenizer):
    class Damaged(list):
        def __iter__(self):
            yield from super().__iter__()
            raise OSError("Expected to be able to read 99 bytes for message body, got 3")

    rows = Damaged([{"prompt": "a", "completion": "b"}])
    backbone = type("Facts", (), {"end_token_ids": (1,), "context_length": None})
    with pytest.raises(ValueError, match="The Arrow file of the forget set is cut short"):
        tokenize_rows(rows, tokenizer, backbone, name="forget")


# Processes


def test_loader_process_that_dies(tmp_path, seen):
    trainer = make_trainer(tmp_path, KIND, dataloader_num_workers=1, dataloader_prefetch_factor=1)

    def kill():
        loader = next(child for child in active_children() if child.daemon)
        os.kill(loader.pid, signal.SIGKILL)
        loader.join(10)

    trainer.add_callback(At(5, kill))  # amid an epoch: loaders end with theirs
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)"):
        trainer.train()
    assert "RuntimeError after step 5 ended training. The last complete checkpoint is" in seen.text
    assert last_step(tmp_path) == 3
    assert run(tmp_path, KIND, resume=True) == 0


TWO = """
import os, signal, sys
sys.path[:0] = ["tests", "tests/trainer", "."]
import runs, test_faults
folder = sys.argv[1]
def act():
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
callbacks = [test_faults.At(4, act)]
runs.train(runs.Path(folder), "LoRA with dropout", callbacks=callbacks, ddp_backend="gloo")
"""


@pytest.mark.parametrize(
    ("signum", "step", "message"),
    [
        ("SIGKILL", 3, "Signal 9 (SIGKILL) received by PID"),
        ("SIGTERM", 5, "SIGTERM: training stops after step 5 with a checkpoint"),
    ],
)
def test_one_of_two_processes(tmp_path, signum, step, message):
    """Killed, it takes the other along; asked to stop, both stop after the same step, with a checkpoint."""
    script = tmp_path / "two.py"
    script.write_text(TWO)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command = [
        *torchrun,
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
        str(script),
        str(tmp_path / "out"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run([*command, signum], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)
    assert ended.returncode != 0 and message in ended.stderr, ended.stderr[-3000:]
    assert last_step(tmp_path / "out") == step
    assert all(damage(checkpoint) is None for checkpoint in complete_checkpoints(tmp_path / "out"))
