"""Score sets of questions: in batches, over processes, and on from where a killed run stopped."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..files import UserError, typed
from ..models import Backbone, resolve_backbone, weights_fingerprint
from ..terminal import Bar
from .fast import agreement_if_fast
from .progress import SCORING, ProgressFile
from .protocol import Protocol
from .registry import RowScores
from .results import Run
from .scoring import QuestionBatch, QuestionSet, estimates

Key = tuple[str, int]  # set, row
T = TypeVar("T")


class Line(NamedTuple):
    """A finished row: its scores, which the file of progress calls figures, and the time they took."""

    figures: dict[str, float | None]
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """The scores of every row.

    Attributes:
        scores: name of a set -> name of a score -> a value a row, in the order of the rows.
        seconds: wall-clock time of the scoring, that before a kill included.
    """

    scores: dict[str, RowScores]
    seconds: float


def score_questions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[QuestionSet],
    *,
    backbone: Backbone | None = None,
    progress_path: str | Path | None = None,
    show_progress: bool | str = False,
) -> Evaluation:
    """Compute the metrics of each set.

    Every process of an accelerate launch must call this; each scores its share, and all return the whole. The scores
    are those of one process, since batches are put together without regard to who scores them.

    Args:
        model, tokenizer, backbone: the same on all processes; the backbone is resolved if not given.
        sets: the questions and what to measure.
        progress_path: file that keeps finished rows, scores only. Given again after a kill, they are not scored anew.
        show_progress: show a progress bar over rows, with rate and time left; what is scored, if it is to say that.

    Raises:
        ValueError: for two sets of one name, or a progress file of another model, other data or other settings.
    """
    names = [questions.name for questions in sets]
    if len(set(names)) < len(names):
        raise UserError(f"Each set needs a name of its own, got {names}.")
    backbone = backbone or resolve_backbone(model, tokenizer)
    state = processes()
    with ProgressFile(progress_path if state.is_main_process else None) as progress:
        done: dict[Key, Line] = {}
        if progress_path is not None:
            header = {"progress": 1, "scoring": SCORING, "model": weights_fingerprint(model)}
            header["sets"] = {part.name: part.fingerprint() for part in sets}
            for key, line in from_main(lambda: progress.resume(header, _finished)):
                done.setdefault(key, line)
        # batches with a row that is not done; they are scored whole, so that rounding is that of an undisturbed run
        batches = [(part, rows) for part in sets for rows in part.chunks()]
        left = [(part, rows) for part, rows in batches if any((part.name, row) not in done for row in rows)]
        doing = f"scoring {show_progress}" if isinstance(show_progress, str) else "scoring"
        show, total = bool(show_progress) and state.is_main_process, sum(map(len, sets))
        with Bar(doing, total=total, initial=len(done), unit="row", show=show) as bar:
            for lines in _rounds(model, tokenizer, backbone, left):
                new = {key: line for key, line in lines if key not in done}
                progress.append([{"set": key[0], "row": key[1], **line._asdict()} for key, line in new.items()])
                done |= new
                bar.update(len(new))
    rows = {part.name: [done[part.name, row].figures for row in range(len(part))] for part in sets}
    if any(scores.keys() != of_set[0].keys() for of_set in rows.values() for scores in of_set):
        raise UserError(f"{progress_path} is damaged: rows of one set have other figures. Delete it to start anew.")
    columns = {name: {score: [row[score] for row in of_set] for score in of_set[0]} for name, of_set in rows.items()}
    return Evaluation(columns, sum(line.seconds for line in done.values()))


def score_run(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[QuestionSet],
    method: str,
    *,
    backbone: Backbone,
    progress_path: str | Path | None,
    show_progress: bool | str,
    protocol: Protocol = "ours",
) -> tuple[Run, dict[str, RowScores]]:
    """Compute the metrics of each set, and return their means as a run, and the scores of every row.

    Args:
        method: what the run is called; the progress bar calls the model so unless `show_progress` has another name.
        protocol: by which the sets were asked.
        model, tokenizer, sets, backbone, progress_path, show_progress: as in `score_questions`.
    """
    shown = method if show_progress is True else show_progress
    how: dict[str, Any] = {"backbone": backbone, "progress_path": progress_path, "show_progress": shown}
    scored = score_questions(model, tokenizer, sets, **how)
    scores = {name: estimates(of_set) for name, of_set in scored.scores.items()}
    rows = {part.name: len(part) for part in sets}
    return Run(method, None, scores, rows, {}, 0.0, scored.seconds, protocol=protocol), scored.scores


def _finished(line: dict[str, Any]) -> tuple[Key, Line]:
    scores = line["figures"]  # null where a row cannot be measured, NaN where a model fails
    if not all(isinstance(value, float | int | None) for value in scores.values()):
        raise ValueError("a score is no number")
    return (typed(str, line["set"]), typed(int, line["row"])), Line(scores, typed(float, line["seconds"]))


def processes() -> PartialState:
    """The processes of this launch. Those on the CPU accelerate overlooks unless told so."""
    return PartialState(cpu=not torch.accelerator.is_available())


def _rounds(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    backbone: Backbone,
    batches: Sequence[tuple[QuestionSet, list[int]]],
) -> Iterator[list[tuple[Key, Line]]]:
    """Score one batch a process at a time, and yield what all processes have finished."""
    state = PartialState()
    for first in range(0, len(batches), state.num_processes):
        lines = []
        if first + state.process_index < len(batches):
            questions, rows = batches[first + state.process_index]
            start = time.perf_counter()
            batch = QuestionBatch(model, tokenizer, backbone, questions, rows)
            columns = batch.scores()
            columns |= agreement_if_fast(batch)
            seconds = (time.perf_counter() - start) / len(rows) / min(state.num_processes, len(batches) - first)
            for i, row in enumerate(rows):
                scores = {name: values[i] for name, values in columns.items()}
                scores = {name: None if value is None else float(value) for name, value in scores.items()}
                lines.append(((questions.name, row), Line(scores, seconds)))
        yield gather_object(lines) if state.num_processes > 1 else lines


def from_main(action: Callable[[], T]) -> T:
    """The result of the main process's action on every process; its error, too, so that none waits for another."""
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = action()
        except ValueError as error:
            outcome[1] = error
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return result
