"""Several processes attack as one does, and share what can be shared."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import PROCESSES
from test_recovery import SETTINGS, attack, fakes

from mdu_trainer.attacks import ATTACKS, AttackSettings, sharing
from mdu_trainer.attacks.results import Recovery
from mdu_trainer.attacks.sharing import Sharing, over_processes
from mdu_trainer.evaluation.runner import processes

QUICK = AttackSettings(decoding=SETTINGS.decoding, relearn_steps=1)


def attacked(folder: Path, save: bool = True) -> None:
    """Attack with some that one process makes alone, and one that all make together."""
    folder.mkdir(exist_ok=True)
    attacks = fakes() | {name: ATTACKS[name] for name in ("relearn-lora", "prefix")}
    recovery = attack(folder, settings=QUICK, attacks=attacks)
    if save:
        recovery.save(folder / "recovery.json")


def one_of_two(rank: int, port: int, folder: Path) -> None:
    """What a process of a launch on two does."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    attacked(folder, save=rank == 1)  # not the one that keeps the progress
    processes().wait_for_everyone()
    processes().destroy_process_group()


def test_two_processes_find_what_one_finds(tmp_path):
    attacked(tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [PROCESSES.Process(target=one_of_two, args=(rank, port, tmp_path / "two")) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    one, two = (Recovery.load(tmp_path / folder / "recovery.json") for folder in ("one", "two"))
    assert list(two.attacks) == list(one.attacks) == ["none", "one", "second", "relearn-lora", "prefix"]
    for name, outcome in one.attacks.items():
        for model, found in outcome.models.items():
            assert two.attacks[name].models[model].after.value == pytest.approx(found.after.value), (name, model)
    assert two.weights.keys() == one.weights.keys()
    for name, path in one.weights.items():
        assert two.weights[name].losses == pytest.approx(path.losses)
    lines = [(tmp_path / folder / "attacks.jsonl").read_text().splitlines() for folder in ("one", "two")]
    assert len(lines[0]) == len(lines[1]) == 1 + 4 * 5


def test_tasks_are_dealt_and_an_error_is_everybodys(monkeypatch):
    done, sent = [], []

    def task(number: int):
        done.append(number)
        if number == 3:
            raise ValueError("the fourth")
        return number

    def gather(own):  # of the other process first
        sent.append(own)
        return [pair for part in sent for pair in part]

    def as_process(rank: int, tasks):
        monkeypatch.setattr(sharing, "processes", lambda: SimpleNamespace(process_index=rank, num_processes=2))
        return over_processes(tasks)

    monkeypatch.setattr(sharing, "gather_object", gather)
    tasks = [lambda number=number: task(number) for number in range(3)]
    with pytest.raises(KeyError):
        as_process(1, tasks)  # nobody else has sent anything yet
    assert done == [1] and as_process(0, tasks) == [0, 1, 2] and done == [1, 0, 2]
    sent.clear()
    failing = [lambda number=number: task(number) for number in range(4)]
    for rank in (1, 0):
        with pytest.raises((ValueError, KeyError), match="the fourth" if rank == 0 else ""):
            as_process(rank, failing)
    done.clear()
    together = Sharing()
    assert together(tasks) == [0, 1, 2] and done == [0, 1, 2], "alone unless it is said otherwise"
