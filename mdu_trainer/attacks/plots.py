"""A picture of what attacks bring back."""

from pathlib import Path

from ..analysis.style import new_figure, run_styles, save_figure
from ..evaluation.report import Estimate
from .recovery import Recovery

OUTSIDE = 0.3  # how far beyond the points the axis follows their intervals
MARGIN = 0.08
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
    figure, axes = new_figure(size=(6.4, 1.3 + len(attacks) * (0.2 + 0.09 * len(figures))))
    for row in range(0, len(attacks), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#000000", alpha=0.05, linewidth=0)
    for end in (0, 1):
        axes.axvline(end, color="#000000", linewidth=1, linestyle="--" if end == 0 else "-", zorder=1)
    step, styles = BAND / len(figures), run_styles(figures)
    for i, (name, one) in enumerate(figures.items()):
        shown = [
            (row + (i + 0.5) * step - BAND / 2, one[attack]) for row, attack in enumerate(attacks) if attack in one
        ]
        x, y, widths = [e.value for _, e in shown], [place for place, _ in shown], _widths([e for _, e in shown])
        style = styles[name]
        look = {"fmt": style.marker, "color": style.colour, "markerfacecolor": style.face, "markersize": 5}
        axes.errorbar(x, y, xerr=widths, label=name, capsize=2, linewidth=1, zorder=2, **look)
    axes.set(xlim=_limits([estimate for one in figures.values() for estimate in one.values()]))
    axes.set(ylim=(len(attacks) - 0.5, -0.5))
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


def _limits(estimates: list[Estimate]) -> tuple[float, float]:
    """The scale's two ends, all points, and their intervals unless they are very wide."""
    values = [0.0, 1.0, *(e.value for e in estimates)]
    low = max(min(values) - OUTSIDE, min(e.low for e in estimates))
    high = min(max(values) + OUTSIDE, max(e.high for e in estimates))
    return min(*values, low) - MARGIN, max(*values, high) + MARGIN
