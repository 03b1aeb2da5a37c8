"""What several processes do together: each does its share of the tasks, and all have the whole result."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from accelerate.utils import gather_object

from ..evaluation.runner import processes

PARTS, ROWS = 8, 8  # of few rows: as many parts, for as many processes, as long as each has so many rows


def one_by_one(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """Do some tasks, and return their results."""
    return [task() for task in tasks]


class Sharing:
    """Does tasks over the processes of a launch, which must all come here; within a task, in its own alone."""

    def __init__(self) -> None:
        self._in_task = False

    def __call__(self, tasks: Sequence[Callable[[], Any]]) -> list[Any]:
        """Do the tasks, and return their results in order. Their errors are those of every process."""
        if self._in_task:
            return one_by_one(tasks)
        self._in_task = True
        try:
            return over_processes(tasks)
        finally:
            self._in_task = False


def parts(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Deal rows to even parts, rows of like length together.

    The parts do not depend on the number of processes: a row is computed beside the same others, and rounded alike.

    >>> parts([5, 3, 4], most=2)
    [[1], [2, 0]]

    Args:
        lengths: of each row, in tokens.
        most: rows of a part.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    count = max(1, -(-len(order) // most), min(PARTS, -(-len(order) // ROWS)))
    return [order[start:stop] for start, stop in pairwise(len(order) * cut // count for cut in range(count + 1))]


def over_processes(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """Do every n-th task in each of n processes, and return all results in order on all of them.

    Raises:
        ValueError: that of the first task that raises one, on all processes, so that none waits for another.
    """
    state = processes()
    own = [(i, _result(tasks[i])) for i in range(state.process_index, len(tasks), state.num_processes)]
    found = dict(gather_object(own) if state.num_processes > 1 else own)
    results = [found[i] for i in range(len(tasks))]
    for result in results:
        if isinstance(result, ValueError):
            raise result
    return results


def _result(task: Callable[[], Any]) -> Any:
    try:
        return task()
    except ValueError as error:
        return error
