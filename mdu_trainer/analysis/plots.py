"""Pictures of a comparison: forget against retain, and the losses. One function each, same style."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .style import COLOURS, LINE_STYLES, MARKERS, new_figure, save_figure

if TYPE_CHECKING:
    from ..evaluation.report import Run


def plot_tradeoff(runs: Sequence["Run"], path: str | Path) -> None:
    """ROUGE-L recall on forget against retain rows, a point a run, MDU's joined in the order of tau.

    The best corner is at the top left: everything forgotten, nothing else lost.

    Args:
        runs: the base and the unlearned models.
        path: of the PNG or SVG to write.
    """
    figure, axes = new_figure()
    path_of_tau = sorted((run for run in runs if run.tau is not None), key=lambda run: run.tau)
    axes.plot(*_points(path_of_tau), color=COLOURS["mdu"], linewidth=1, alpha=0.5, zorder=1)
    for i, run in enumerate(path_of_tau):  # above and below in turn, for points that lie close
        place = {"xytext": (0, -15 if i % 2 else 9), "textcoords": "offset points", "ha": "center", "fontsize": 9}
        axes.annotate(f"\u03c4={run.tau:g}", _point(run), **place)
    for method in dict.fromkeys(run.method for run in runs):
        x, y = _points([run for run in runs if run.method == method])
        size = 160 if method == "base" else 60
        marker = {"color": COLOURS[method], "marker": MARKERS[method], "s": size}
        axes.scatter(x, y, label=method, zorder=2, clip_on=False, **marker)
    axes.legend(loc="lower right", framealpha=1)
    axes.set(xlabel="forget ROUGE-L recall (lower is better)", ylabel="retain ROUGE-L recall (higher is better)")
    axes.set(xlim=(0, 1), ylim=(0, 1.05))
    save_figure(figure, path)


def plot_losses(histories: dict[str, list[dict[str, Any]]], path: str | Path) -> None:
    """The forget and retain losses of each run along its steps.

    Args:
        histories: name of the run -> `trainer.state.log_history`.
        path: of the PNG or SVG to write.
    """
    figure, (top, bottom) = new_figure(rows=2, sharex=True)
    for axes, key in ((top, "forget_loss"), (bottom, "retain_loss")):
        for i, (name, history) in enumerate(histories.items()):
            logs = [entry for entry in history if key in entry]
            method = name.split()[0]
            axes.plot(
                [entry["step"] for entry in logs],
                [entry[key] for entry in logs],
                label=name,
                color=COLOURS[method],
                linestyle=LINE_STYLES[i % 4],
            )
        axes.set(ylabel=key.replace("_", " "))
    # losses of different methods differ by orders of magnitude and in sign
    top.set_yscale("symlog")
    bottom.set(xlabel="update step", ylim=(0, None))
    top.legend(fontsize=8, ncols=2)
    save_figure(figure, path)


def _points(runs: Sequence["Run"]) -> tuple[list[float], list[float]]:
    points = [_point(run) for run in runs]
    return [x for x, _ in points], [y for _, y in points]


def _point(run: "Run") -> tuple[float, float]:
    return run.scores["forget"]["rougeL_recall"].value, run.scores["retain"]["rougeL_recall"].value
