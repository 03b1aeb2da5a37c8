"""Pictures of what attacks bring back, on their own or as a panel of another."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..evaluation.results import Estimate
from ..files import UserError
from .style import PictureFile, new_figure, reach, run_styles, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Recoveries = Mapping[str, Mapping[str, Estimate]]  # name of a model -> name of an attack -> recovery

OUTSIDE = 0.3  # how far beyond the points the axis follows their intervals
MARGIN = 0.08
BAND = 0.7  # share of a row's height that its points take


def plot_recovery(recoveries: Recoveries, file: PictureFile) -> None:
    """Draw recovery by attack and model with intervals, a row an attack, between never trained (0) and the base (1).

    The recoveries are as `Recovery.recoveries` returns them; without any, a ValueError is raised. Intervals that leave
    the picture are cut.
    """
    attacks = attacks_in(recoveries)
    if not attacks:
        raise UserError(
            "No recovery is defined, so there is nothing to show: it needs a model that never saw the rows."
        )
    figure, axes = new_figure(size=(6.4, 1.3 + len(attacks) * (0.2 + 0.09 * len(recoveries))))
    draw_recovery(axes, recoveries, attacks)
    figure.legend(loc="outside lower center", ncols=min(3, len(recoveries)), frameon=False)
    save_figure(figure, file)


def attacks_in(recoveries: Recoveries) -> list[str]:
    """Return the attacks under which some model has a recovery."""
    return list(dict.fromkeys(attack for of_model in recoveries.values() for attack in of_model))


def strongest(recoveries: Recoveries, count: int) -> list[str]:
    """Return the attacks that bring back most from any of the models, in the order in which they were made."""
    attacks = attacks_in(recoveries)
    most = {a: max(of_model[a].value for of_model in recoveries.values() if a in of_model) for a in attacks}
    chosen = sorted(attacks, key=lambda attack: -most[attack])[:count]
    return [attack for attack in attacks if attack in chosen]


def draw_recovery(axes: "Axes", recoveries: Recoveries, attacks: list[str]) -> None:
    """Draw the recoveries under some attacks, a row an attack and a point a model."""
    for row in range(0, len(attacks), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#000000", alpha=0.05, linewidth=0)
    for end in (0, 1):
        axes.axvline(end, color="#000000", linewidth=1, linestyle="--" if end == 0 else "-", zorder=1)
    step, styles = BAND / len(recoveries), run_styles(recoveries)
    for i, (name, of_model) in enumerate(recoveries.items()):
        shown = [
            (row + (i + 0.5) * step - BAND / 2, of_model[attack])
            for row, attack in enumerate(attacks)
            if attack in of_model
        ]
        x, y = [e.value for _, e in shown], [place for place, _ in shown]
        widths = [[reach(e)[side] for _, e in shown] for side in (0, 1)]
        style = styles[name]
        look = {"fmt": style.marker, "color": style.colour, "markerfacecolor": style.face, "markersize": 5}
        axes.errorbar(x, y, xerr=widths, label=name, capsize=2, linewidth=1, zorder=2, **look)
    axes.set(xlim=_limits([of[attack] for of in recoveries.values() for attack in attacks if attack in of]))
    axes.set(ylim=(len(attacks) - 0.5, -0.5))
    axes.set_yticks(range(len(attacks)), attacks)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("recovery (0: no more than a model that never saw the rows)")
    top = axes.secondary_xaxis("top")
    top.set_xticks([0, 1], ["never trained", "base"])
    top.tick_params(length=0)
    top.spines["top"].set_visible(False)


def _limits(estimates: list[Estimate]) -> tuple[float, float]:
    """Return limits that hold the scale's two ends, all points, and their intervals unless they are very wide."""
    values = [0.0, 1.0, *(e.value for e in estimates)]
    low = max(min(values) - OUTSIDE, min(e.low for e in estimates))
    high = min(max(values) + OUTSIDE, max(e.high for e in estimates))
    return min(*values, low) - MARGIN, max(*values, high) + MARGIN
