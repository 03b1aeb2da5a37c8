"""What several processes do together: each does its share of the tasks, and all have the whole result."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate.utils import gather_object

from ..evaluation.runner import processes
from .base import one_by_one


class Sharing:
    """Does tasks over the processes of a launch while it is `shared`, and in this process alone otherwise."""

    def __init__(self) -> None:
        self._together = False

    def __call__(self, tasks: Sequence[Callable[[], Any]]) -> list[Any]:
        """Do the tasks, and return their results in order. Their errors are those of every process."""
        return over_processes(tasks) if self._together else one_by_one(tasks)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Do tasks over all processes, which must all come here."""
        self._together = True
        try:
            yield
        finally:
            self._together = False


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
