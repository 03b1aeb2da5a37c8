"""The picture of metrics along the denoising path: a panel a score, a line a model and set."""

import math

import numpy as np

from ..evaluation.results import Estimate
from ..files import UserError
from ..token_roles.path_results import FIXED, PathCurve, PathScores
from .style import COLOURS, PictureFile, RunStyle, new_figure, reach, run_styles, save_figure

DRAWN = {"forget": "-", "retain": "--"}  # sets -> lines; the others are in the tables
ALONE = {
    "forget": RunStyle(COLOURS["ga"], "o", "-", COLOURS["ga"]),
    "retain": RunStyle(COLOURS["mdu"], "s", "--", "white"),
}
COLUMNS = 3


def plot_along_path(scores: PathScores, file: PictureFile) -> None:
    """Draw each score of the rows to forget and to keep along the path, with 95 % bands, and on the right at fixing.

    One model has a colour a set; several have one each, with a dashed line for the rows to keep.

    Raises:
        ValueError: there is nothing of these sets to draw.
    """
    lines = _lines(scores)
    names = list(dict.fromkeys(name for *_, of_set in lines for name in of_set))
    if not names:
        raise UserError(f"The record holds no score of {' or '.join(DRAWN)}, so there is nothing to show.")
    rows, columns = math.ceil(len(names) / COLUMNS), min(COLUMNS, len(names))
    size = (0.6 + 3.0 * columns, 0.9 + 2.3 * rows)
    figure, grid = new_figure(rows, columns, size=size, sharex=True, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        for label, style, of_set in lines:
            if name in of_set:
                _draw(axes, of_set[name], label, style)
        axes.set(ylabel=name.replace("_", " "), xlim=(-0.04, 1.06))
        axes.set_ylim(bottom=0)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", FIXED.replace(" ", "\n")])
        axes.tick_params(labelbottom=True)
    for place, axes in enumerate(grid.flat):
        axes.set_visible(place < len(names))
        if place + columns >= len(names):  # the lowest of its column
            axes.set_xlabel("share of the answer revealed", fontsize=8)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=9, frameon=False)
    save_figure(figure, file)


def _lines(scores: PathScores) -> list[tuple[str, RunStyle, dict[str, PathCurve]]]:
    """The label, the style and the curves of each line."""
    styles, several = run_styles(run.name for run in scores.runs), len(scores.runs) > 1
    found = []
    for run in scores.runs:
        for name, line in DRAWN.items():
            if name not in run.scores:
                continue
            style = styles[run.name]._replace(line=line, face="white") if several else ALONE[name]
            if several and name == "forget":
                style = style._replace(face=style.colour)
            found.append((f"{run.name}: {name}" if several else name, style, run.scores[name]))
    return found


def _draw(axes, curve: PathCurve, label: str, style: RunStyle) -> None:
    """Draw the steps as a line with a band, and the value at fixing as a point."""
    share = np.arange(len(curve.steps)) / len(curve.steps)
    look = {"color": style.colour, "marker": style.marker, "markerfacecolor": style.face, "markersize": 3.5}
    middle, low, high = (
        np.array([_part(one, name) for one in curve.steps], dtype=float) for name in ("value", "low", "high")
    )
    axes.plot(share, middle, label=label, linestyle=style.line, linewidth=1.2, **look)
    axes.fill_between(share, low, high, color=style.colour, alpha=0.13, linewidth=0)
    if curve.fixed is not None:
        ends = [[side] for side in reach(curve.fixed)]
        axes.errorbar(1, curve.fixed.value, yerr=ends, capsize=2, linewidth=1, **(look | {"markersize": 5}))


def _part(estimate: Estimate | None, name: str) -> float:
    value = None if estimate is None else getattr(estimate, name)
    return math.nan if value is None else value
