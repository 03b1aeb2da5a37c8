"""A picture of what attacks bring back."""

from pathlib import Path
from typing import Any

from ..analysis.style import COLOURS, MARKERS, new_figure, save_figure
from ..evaluation.report import Estimate
from .recovery import Recovery

FILLS = ("full", "none", "left", "top")  # tells apart models of one method
OUTSIDE = 0.25  # how far the axis reaches beyond the points and the scale's two ends
BAND = 0.7  # share of a row's height that its points take


def plot_recovery(recovery: Recovery, path: str | Path) -> None:
    """Recovery by attack and model with intervals, a row an attack, between never trained (0) and the base (1).

    Attacks under which no model has a recovery are left out. Intervals that leave the picture are cut.

    Args:
        recovery: with a model that never saw the rows.
        path: of the PNG or SVG to write.

    Raises:
        ValueError: no recovery is defined.
    """
    figures = recovery.recoveries()
    attacks = [name for name in recovery.attacks if any(name in one for one in figures.values())]
    if not attacks:
        raise ValueError(
            "No recovery is defined, so there is nothing to show: it needs a model that never saw the rows."
        )
    figure, axes = new_figure(size=(6.4, 1.4 + len(attacks) * (0.25 + 0.13 * len(figures))))
    for row in range(0, len(attacks), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#000000", alpha=0.05, linewidth=0)
    for end in (0, 1):
        axes.axvline(end, color="#000000", linewidth=1, linestyle="--" if end == 0 else "-", zorder=1)
    step = BAND / len(figures)
    for i, (name, one) in enumerate(figures.items()):
        shown = [
            (row + (i + 0.5) * step - BAND / 2, one[attack]) for row, attack in enumerate(attacks) if attack in one
        ]
        x, y, widths = [e.value for _, e in shown], [place for place, _ in shown], _widths([e for _, e in shown])
        axes.errorbar(x, y, xerr=widths, label=name, linestyle="none", **_look(name, list(figures)))
    values = [estimate.value for one in figures.values() for estimate in one.values()]
    axes.set(xlim=(min(0, *values) - OUTSIDE, max(1, *values) + OUTSIDE), ylim=(len(attacks) - 0.5, -0.5))
    axes.set_yticks(range(len(attacks)), attacks)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("recovery (0: no more than a model that never saw the rows)")
    top = axes.secondary_xaxis("top")
    top.set_xticks([0, 1], ["never trained", "base"])
    top.tick_params(length=0)
    top.spines["top"].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(3, len(figures)), frameon=False)
    save_figure(figure, path)


def _widths(estimates: list[Estimate]) -> list[list[float]]:
    """Lengths of the error bars to the left and to the right; a value can lie beside a percentile interval."""
    return [[max(0.0, e.value - e.low) for e in estimates], [max(0.0, e.high - e.value) for e in estimates]]


def _look(name: str, names: list[str]) -> dict[str, Any]:
    """Colour and marker of the model's method, filled as its number among the models of that method."""
    method = _method(name)
    others = [other for other in names if _method(other) == method]
    known = method if method in MARKERS else list(MARKERS)[names.index(name) % len(MARKERS)]
    return {
        "color": COLOURS[known],
        "marker": MARKERS[known],
        "fillstyle": FILLS[others.index(name) % len(FILLS)],
        "markersize": 6,
        "capsize": 2,
        "linewidth": 1,
        "zorder": 2,
    }


def _method(name: str) -> str:
    return name.split(" tau=")[0]
