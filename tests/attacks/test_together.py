"""Several processes attack as one does, and share the rows."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import PROCESSES
from test_recovery import SETTINGS, attack, loader

from mdu_trainer.attacks import ATTACKS, Attack, AttackScores, AttackSettings, Target, base, sharing
from mdu_trainer.attacks.base import worst_case
from mdu_trainer.attacks.results import Recovery
from mdu_trainer.attacks.sharing import Sharing, one_by_one, over_processes, parts
from mdu_trainer.evaluation.runner import processes
from mdu_trainer.testing import fictional_authors, unseen_answers

QUICK = AttackSettings(
    decoding=SETTINGS.decoding, relearn_steps=1, num_draws=2, unseen=unseen_answers(fictional_authors(1), 1)
)
NAMES = ("relearn-lora", "prefix", "context", "membership")


def outside(target: Target, seed: int) -> AttackScores:
    """An attack of somebody's own, which knows of no processes."""
    return worst_case(target, {"1": target.ask(), "2": target.score(target.decode(target.prompts[::-1]))})


def attacked(folder: Path, save: bool = True) -> None:
    """Attack, and note how many rows this process decodes."""
    folder.mkdir(exist_ok=True)
    attacks = {name: ATTACKS[name] for name in NAMES} | {"outside": Attack(outside, "")}
    decode, decoded = base.generate_ids, []

    def counted(model, prompt_ids, *args, **options):
        decoded.append(len(prompt_ids))
        return decode(model, prompt_ids, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "generate_ids", counted)
        patch.setattr(sharing, "ROWS", 2)  # three parts of the six rows
        recovery = attack(folder, settings=QUICK, attacks=attacks, unlearned={"npo": loader(3)})
    (folder / f"decoded{processes().process_index}").write_text(str(sum(decoded)))
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
    assert list(two.attacks) == list(one.attacks) == ["none", *NAMES, "outside"]
    for name, outcome in one.attacks.items():
        for model, found in outcome.models.items():
            assert two.attacks[name].models[model].after.value == pytest.approx(found.after.value), (name, model)
    assert two.weights.keys() == one.weights.keys()
    for name, path in one.weights.items():
        assert two.weights[name].losses == pytest.approx(path.losses)
    lines = [(tmp_path / folder / "attacks.jsonl").read_text().splitlines() for folder in ("one", "two")]
    assert len(lines[0]) == len(lines[1]) == 1 + 3 * (2 + len(NAMES))
    whole, *shares = (int((tmp_path / at).read_text()) for at in ("one/decoded0", "two/decoded0", "two/decoded1"))
    assert sum(shares) == whole and min(shares) >= whole / 4, "the rows are shared, of any attack"


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


def test_within_a_task_nothing_waits_for_others(monkeypatch):
    together, dealt = Sharing(), []

    def deal(tasks):
        dealt.append(len(tasks))
        return one_by_one(tasks)

    def outer(number: int):
        if number == 2:
            raise RuntimeError("out of memory")
        return together([lambda: number, lambda: -number])

    monkeypatch.setattr(sharing, "over_processes", deal)
    tasks = [lambda number=number: outer(number) for number in range(3)]
    assert together(tasks[:2]) == [[0, 0], [1, -1]] and dealt == [2]
    with pytest.raises(RuntimeError):
        together(tasks)
    assert together(tasks[:1]) == [[0, 0]] and dealt == [2, 3, 1], "and what comes after a failure is shared again"


@pytest.mark.parametrize(
    ("rows", "most", "sizes"),
    [(0, 32, [0]), (1, 32, [1]), (8, 32, [8]), (16, 32, [8, 8]), (20, 32, [6, 7, 7]), (400, 32, 13), (256, 8, 32)],
)
def test_parts_are_even_and_hold_each_row_once(rows, most, sizes):
    lengths = [(7 * row) % 11 for row in range(rows)]
    dealt = parts(lengths, most)
    assert sorted(row for part in dealt for row in part) == list(range(rows))
    found = [len(part) for part in dealt]
    assert found == sizes or len(found) == sizes
    assert max(found) <= most and max(found) - min(found) <= 1
    assert [lengths[row] for part in dealt for row in part] == sorted(lengths), "rows of like length together"
