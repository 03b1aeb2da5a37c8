"""Intervals of scores over rows: how sure a score is, given the rows it was measured on."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from scipy.stats import bootstrap, hmean

from ...files import UserError

ROWS_A_BATCH = 1 << 22  # values that are resampled at a time

STATISTICS: dict[str, Callable] = {"mean": np.mean, "median": np.median, "hmean": hmean}


def bootstrap_interval(
    values: Sequence[float],
    statistic: Literal["mean", "median", "hmean"] | Callable = "mean",
    *,
    seed: int = 0,
    num_resamples: int = 2000,
    confidence: float = 0.95,
) -> tuple[float, float] | tuple[None, None]:
    """Percentile bootstrap interval of a statistic over rows.

    It says how the score would vary with other rows of the same kind, not with other seeds of training.

    Args:
        values: a score a row.
        statistic: a name, or a function `(values, axis) -> statistic`.
        seed: of the resampling.
        num_resamples: how often rows are drawn with replacement.
        confidence: that the interval covers the score of all rows there could be.

    Returns:
        The ends of the interval; (None, None) if there is a single row, of whose spread nothing is known.

    Raises:
        ValueError: for no values, values that are not finite, an unknown statistic, or a confidence out of (0, 1).

    Example:

        low, high = bootstrap_interval(RougeL().compute(..., use_aggregator=False)["rougeL_recall"])

    Source: Efron (1979), percentile method, as `scipy.stats.bootstrap` has it.
    """
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 1 or not len(rows) or not np.isfinite(rows).all():
        raise UserError(f"values must be finite numbers, one a row and at least one, got shape {rows.shape}.")
    if isinstance(statistic, str) and statistic not in STATISTICS:
        raise UserError(f"statistic must be one of {', '.join(STATISTICS)} or a function, got {statistic!r}.")
    if not 0 < confidence < 1:
        raise UserError(f"confidence must be above 0 and below 1, got {confidence}.")
    if len(rows) == 1:
        return None, None
    if (rows == rows[0]).all():  # scipy warns of a degenerate distribution, and rounds
        value = float((STATISTICS.get(statistic, statistic))(rows[None], axis=-1)[0])
        return value, value
    interval = bootstrap(
        (rows,),
        STATISTICS.get(statistic, statistic),
        n_resamples=num_resamples,
        batch=max(1, ROWS_A_BATCH // len(rows)),
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)
