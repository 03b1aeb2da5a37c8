"""Pictures of a comparison: forget against retain, and the losses. One function each, same style."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..evaluation.report import Run

# Okabe and Ito (2008): tells apart for colour-blind readers; markers tell apart in grey print
COLOURS = {"base": "#000000", "mdu": "#0072B2", "ga": "#D55E00", "npo": "#009E73"}
COLOURS |= {"simnpo": "#CC79A7", "wga": "#E69F00", "dpo": "#56B4E9", "retain model": "#999999"}
MARKERS = {"base": "*", "mdu": "o", "ga": "v", "npo": "s", "simnpo": "D", "wga": "^", "dpo": "P"}
MARKERS |= {"retain model": "X"}


def plot_tradeoff(runs: Sequence["Run"], path: str | Path) -> None:
    """ROUGE-L recall on forget against retain rows, a point a run, MDU's joined in the order of tau.

    The best corner is at the top left: everything forgotten, nothing else lost.

    Args:
        runs: the base and the unlearned models.
        path: of the PNG or SVG to write.
    """
    figure, axes = _figure()
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
    _save(figure, path)


def plot_losses(histories: dict[str, list[dict[str, Any]]], path: str | Path) -> None:
    """The forget and retain losses of each run along its steps.

    Args:
        histories: name of the run -> `trainer.state.log_history`.
        path: of the PNG or SVG to write.
    """
    figure, (top, bottom) = _figure(rows=2)
    for axes, key in ((top, "forget_loss"), (bottom, "retain_loss")):
        for i, (name, history) in enumerate(histories.items()):
            logs = [entry for entry in history if key in entry]
            method = name.split()[0]
            axes.plot(
                [entry["step"] for entry in logs],
                [entry[key] for entry in logs],
                label=name,
                color=COLOURS[method],
                linestyle=("-", "--", ":", "-.")[i % 4],
            )
        axes.set(ylabel=key.replace("_", " "))
    # losses of different methods differ by orders of magnitude and in sign
    top.set_yscale("symlog")
    bottom.set(xlabel="update step", ylim=(0, None))
    top.legend(fontsize=8, ncols=2)
    _save(figure, path)


def _points(runs: Sequence["Run"]) -> tuple[list[float], list[float]]:
    points = [_point(run) for run in runs]
    return [x for x, _ in points], [y for _, y in points]


def _point(run: "Run") -> tuple[float, float]:
    return run.scores["forget"]["rougeL_recall"].value, run.scores["retain"]["rougeL_recall"].value


def _figure(rows: int = 1) -> tuple["Figure", Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install mdu-trainer[plot]") from error
    figure = Figure(figsize=(6.4, 4.8 if rows == 1 else 6.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, sharex=rows > 1)
    for ax in [axes] if rows == 1 else axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: "Figure", path: str | Path) -> None:
    from matplotlib import rc_context

    # no date, version or random ids in the file: the same figures give the same bytes
    with rc_context({"svg.hashsalt": "mdu_trainer"}):
        figure.savefig(path, metadata={"Software": None} if Path(path).suffix == ".png" else {"Date": None})
