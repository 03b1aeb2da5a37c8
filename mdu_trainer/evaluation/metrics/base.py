"""The base of the metrics: columns that are checked without being quoted, kept in memory, averaged over rows."""

import inspect
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from statistics import fmean
from typing import Any, ClassVar, NamedTuple

import datasets
import evaluate
from transformers.utils import logging

from ...files import UserError
from ..registry import RowScores

logger = logging.get_logger(__name__)

FOR_ALL = """

All metrics:
    use_aggregator: if False, a score a row, None where it cannot be measured, instead of the mean over rows; not for
        metrics of all rows together. Defaults to True.
    ValueError: for no rows, columns of different lengths, values that are not what a column holds, an option that does
        not exist, or a mean over rows of which none can be measured.
"""


class Kind(NamedTuple):
    """A kind of values in a column of a metric."""

    items: str  # values of it, in words
    fits: Callable[[Any], bool]
    feature: Any


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return not isinstance(value, str) and hasattr(value, "__len__") and all(fits(item) for item in value)


_NUMBER, _TEXT, _ID = datasets.Value("float64"), datasets.Value("string"), datasets.Value("int64")

KINDS = {
    "text": Kind("texts", lambda value: isinstance(value, str), _TEXT),
    "number": Kind("finite numbers", _is_number, _NUMBER),
    "count": Kind("counts", lambda value: isinstance(value, Integral) and value >= 0, _ID),
    "flag": Kind("0 or 1", lambda value: isinstance(value, Integral) and value in (0, 1), _ID),
    "numbers": Kind(
        "non-empty lists of finite numbers",
        lambda value: _is_list(value, _is_number) and len(value) > 0,
        datasets.List(_NUMBER),
    ),
    "ids": Kind(
        "lists of token ids",
        lambda value: _is_list(value, lambda item: isinstance(item, Integral)),
        datasets.List(_ID),
    ),
}


class RowMetric(evaluate.Metric):
    """A metric of columns with a value a row, which downloads nothing and writes nothing.

    Values stay in memory, where `evaluate` would write them to its cache, and no error message quotes texts or ids. A
    subclass names its columns and implements `_rows`, the scores of each row, or `_compute` if its score is no mean
    over rows. Options and errors of all metrics stand in `FOR_ALL`.

    Attributes:
        inputs: name of a column -> name of what it holds, in `KINDS`.
        source: the paper that defines the metric.
        url: of the paper.
    """

    inputs: ClassVar[dict[str, str]]
    source: ClassVar[str]
    url: ClassVar[str]

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        owner = self._rows if "_rows" in vars(type(self)) else self._compute
        return evaluate.MetricInfo(
            description=inspect.getdoc(type(self)),
            citation=self.source,
            inputs_description="\n\n" + inspect.getdoc(owner) + FOR_ALL,
            features=datasets.Features({name: KINDS[kind].feature for name, kind in self.inputs.items()}),
            reference_urls=[self.url],
        )

    def compute(self, **kwargs: Any) -> dict[str, Any] | None:
        """Score these rows, and those added before."""
        columns = {name: kwargs.pop(name, None) for name in self.inputs}
        for name in {"predictions", "references"} & kwargs.keys():  # which `evaluate` would leave out without a word
            raise UserError(f"{type(self).__name__} takes the columns {', '.join(self.inputs)}, not {name}.")
        if all(column is None for column in columns.values()) and len(self) == 0:
            raise UserError(f"There is nothing to score: no {' or '.join(self.inputs)} were given or added.")
        return super().compute(**columns, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **columns: Any) -> None:
        """Add one row to score later."""
        row = {"predictions": prediction, "references": reference} | columns
        self.add_batch(**{name: [value] for name, value in row.items() if name in self.inputs or value is not None})

    def add_batch(self, **columns: Any) -> None:
        """Add rows to score later."""
        columns = {name: value for name, value in columns.items() if name in self.inputs or value is not None}
        if columns.keys() != self.inputs.keys():
            raise UserError(
                f"{type(self).__name__} takes the columns {', '.join(self.inputs)}, and got "
                f"{', '.join(columns) or 'none'}."
            )
        for name, kind in self.inputs.items():
            _check_column(name, columns[name], KINDS[kind])
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            counts = " and ".join(f"{length} {name}" for name, length in lengths.items())
            raise UserError(f"There must be one value of each column a row, got {counts}.")
        if not any(lengths.values()):
            raise UserError(f"There is nothing to score: {' and '.join(columns)} are empty.")
        super().add_batch(**{name: list(column) for name, column in columns.items()})

    def _compute(self, use_aggregator: bool = True, **kwargs: Any) -> dict[str, float] | RowScores:
        rows = self._rows(**kwargs)
        return {name: fmean(self._measured(values)) for name, values in rows.items()} if use_aggregator else rows

    def _measured(self, values: list[float | None]) -> list[float]:
        measured = [value for value in values if value is not None]
        name, missing = type(self).__name__, len(values) - len(measured)
        if not measured:
            raise UserError(f"{name} can be measured on none of the {missing} rows: they hold no word to compare.")
        if missing:
            logger.warning(f"{name} cannot be measured on {missing} of {len(values)} rows, which hold no word.")
        return measured

    def _rows(self, **kwargs: Any) -> RowScores:
        raise NotImplementedError


def one_of(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse an option that is none of the choices."""
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def _check_column(name: str, column: Any, kind: Kind) -> None:
    """Refuse what does not fit, before `evaluate` does, whose messages quote the values."""
    if column is None or isinstance(column, str) or not hasattr(column, "__len__"):
        raise UserError(f"{name} must be a list of {kind.items}, got {type(column).__name__}.")
    for row, value in enumerate(column):
        if not kind.fits(value):
            raise UserError(f"{name} must be {kind.items}, but row {row} is {_describe(value)}.")


def _describe(value: Any) -> str:
    """The type of a value, and no more than that, unless it is a number."""
    if isinstance(value, Real):
        return str(value)
    return f"{type(value).__name__} of length {len(value)}" if hasattr(value, "__len__") else type(value).__name__
