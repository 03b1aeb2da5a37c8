"""Pictures of a comparison: trade-off, frontier, training curves. Each function writes one into a file."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from ..evaluation.frontier import DOMINATED, FRONT, WITHIN, frontier, place_of, value_of
from ..evaluation.protocol import ROUGE_WORDS
from ..evaluation.results import Estimate, Run, common, level_of
from ..files import UserError
from .recovery_plots import Recoveries, draw_recovery, strongest
from .style import PictureFile, RunStyle, label_points, new_figure, reach, run_styles, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORGET = "forget"  # the score on the axis from left to right
TO_LEVEL = "forget {} (best on the line)"  # instead of AXES where a never-trained model was scored
LEVEL_LOOK = {"color": "#666666", "linestyle": "--", "linewidth": 1.2, "zorder": 0.5}
AXES = {  # score -> words beside its axis; {} is what rL stands for
    FORGET: "forget {} (lower is better)",
    "retain": "retain {} (higher is better)",
    "utility": "model utility (higher is better)",
}
CURVES = {  # what a training logs -> title
    "forget_loss": "forget loss",
    "retain_loss": "retain loss",
    "kl": "KL to the anchor, or to uniform without one (nats)",
    "entropy": "entropy, forget rows (nats)",
}
NO_CURVES = ("runtime", "per_second", "model_preparation_time")  # what an evaluation logs of itself
WIDE = 10  # values beyond it are drawn on a logarithmic scale
PALE = 0.35  # opacity of a run that is clearly dominated
WORDS = {FRONT: "on the front", WITHIN: "dominated within intervals", DOMINATED: "dominated"}
LONG_LEGEND = 8  # runs that a legend beside the points holds
PANEL_ATTACKS = 6


def plot_tradeoff(runs: Sequence[Run], file: PictureFile, recoveries: Recoveries | None = None) -> None:
    """Draw ROUGE-L on forget against retain rows, a point a run, MDU's joined in the order of tau.

    A never-trained model's forget score is drawn as a line, with its interval as a band: the best place is the top of
    the line. Without such a model it is the top left.

    Args:
        runs: the base and the unlearned models, and a never-trained one if there is one.
        recoveries: what attacks bring back, as `Recovery.recoveries` returns it: a second panel shows the attacks that
            bring back most.
    """
    figure, panels = new_figure(columns=2 if recoveries else 1, size=(11.5, 4.8) if recoveries else None)
    axes, beside = panels if recoveries else (panels, None)
    of_tau = sorted((run for run in runs if run.tau is not None and not run.settings), key=lambda run: run.tau)
    level = level_of(runs, place_of(FORGET))
    axes.set(xlabel=_axis(FORGET, runs), ylabel=_axis("retain", runs), xlim=(0, 1), ylim=(0, 1.05))
    named = [run for run in runs if run.settings.keys() == {"preset"}]
    is_path = not any(run.settings for run in runs if run not in named)  # and no sweep over more than tau
    if is_path:
        axes.plot(*_points(of_tau), color=run_styles(["mdu"])["mdu"].colour, linewidth=1, alpha=0.5, zorder=1)
    methods = list(dict.fromkeys(run.method for run in runs))
    for method, style in run_styles(methods).items():
        x, y = _points([run for run in runs if run.method == method])
        size = 160 if method == "base" else 60
        axes.scatter(x, y, label=method, zorder=2, clip_on=False, color=style.colour, marker=style.marker, s=size)
    if level is not None:
        _draw_level(axes, level)
    axes.legend(loc="lower right", framealpha=1, fontsize=9 if len(methods) > LONG_LEGEND else None)
    if beside is not None:
        draw_recovery(beside, recoveries, strongest(recoveries, PANEL_ATTACKS))
        beside.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8.5, frameon=False)
    if is_path:  # last, where all has found its place
        others = [_point(run) for run in runs if run.tau is None]
        texts = [f"\u03c4={run.tau:g}" for run in of_tau] + [run.settings["preset"] for run in named]
        label_points(axes, [_point(run) for run in [*of_tau, *named]], texts, others)
    save_figure(figure, file)


def plot_frontier(
    runs: Sequence[Run],
    file: PictureFile,
    *,
    keep: str = "retain",
    selected: Run | None = None,
) -> None:
    """Draw forgetting against what is kept, with 95 % intervals and the Pareto front, a point a run.

    Runs on the front are numbered from the left, and named beside the picture; the others are pale. A never-trained
    model's forget score is drawn as a line; the front is then the best that is kept at each distance from it, the same
    to both sides.

    Args:
        runs: of one comparison. The base and a retain model are drawn to compare with.
        keep: name of the score of what is kept, see `mdu_trainer.evaluation.frontier.place_of`.
        selected: the run to draw a ring around.

    Raises:
        ValueError: for a score that does not exist or that no run has.
    """
    drawn = [run for run in runs if not math.isnan(value_of(run, FORGET) + value_of(run, keep))]
    if not drawn:
        raise UserError(f"No run has both figures, {FORGET} and {keep}.")
    figure, axes = new_figure(size=(9.2, 4.8))
    status = {mark.run.name: mark.status for mark in frontier(runs, FORGET, keep)}
    front = sorted((run for run in drawn if status.get(run.name) == FRONT), key=lambda run: value_of(run, FORGET))
    points = [(value_of(run, FORGET), value_of(run, keep)) for run in front]
    level = level_of(runs, place_of(FORGET))
    _draw_front(axes, points, level)
    styles = run_styles(run.method for run in drawn)
    for run in drawn:
        _point_with_intervals(axes, run, (FORGET, keep), styles[run.method], status.get(run.name, FRONT))
    axes.set(xlabel=_axis(FORGET, runs), ylabel=_axis(keep, runs))
    axes.set(xlim=_limits(drawn, FORGET, level), ylim=_limits(drawn, keep))
    label_points(axes, points, [str(i) for i in range(1, len(points) + 1)])
    ring = {"marker": "o", "color": "none", "markeredgecolor": "black", "markersize": 17, "clip_on": False}
    if selected is not None:
        axes.plot(value_of(selected, FORGET), value_of(selected, keep), **ring)
    handles = _frontier_key(styles, set(status.values()), front, selected is not None)
    if level is not None:
        handles.append(_draw_level(axes, level))
    figure.legend(handles=handles, loc="outside right upper", fontsize=8.5, frameon=False)
    save_figure(figure, file)


def plot_losses(histories: Mapping[str, Sequence[Mapping[str, Any]]], file: PictureFile) -> None:
    """Draw what the runs logged along their steps, a panel each: losses, KL, entropy, and scores of evaluations.

    `histories` are by the names of the runs, each a `trainer.state.log_history`.
    """
    logged = dict.fromkeys(key for history in histories.values() for entry in history for key in entry)
    curves = {key: title for key, title in CURVES.items() if key in logged}
    curves |= {
        key: f"{key.removeprefix('eval_').replace('_', ' ')} (evaluated)"
        for key in logged
        if key.startswith("eval_") and not key.endswith(NO_CURVES)
    }
    rows = max(1, math.ceil(len(curves) / 2))
    columns = max(1, min(len(histories), 130 // (8 + max(map(len, histories), default=0))))  # of the legend
    height = 0.5 + 2.9 * rows + 0.2 * math.ceil(len(histories) / columns)
    figure, panels = new_figure(rows, 2, size=(10, height), sharex=True, squeeze=False)
    styles = run_styles(histories)
    for axes, (key, title) in zip(panels.flat, curves.items(), strict=False):
        for name, history in histories.items():
            logs = [entry for entry in history if key in entry]
            values = [entry[key] for entry in logs]
            style = styles[name]
            marker = style.marker if key.startswith("eval_") else None  # which are few
            axes.plot(
                [entry["step"] for entry in logs],
                values,
                label=name,
                **{"color": style.colour, "linestyle": style.line, "marker": marker, "markersize": 4},
            )
        axes.set_title(title, fontsize=10, loc="left")
        low, high = axes.get_ylim()
        if low < -WIDE or high > WIDE:  # forget losses of different methods differ by orders of magnitude and in sign
            axes.set_yscale("symlog")
    for axes in panels.flat[len(curves) :]:
        axes.remove()
    for axes in panels.flat[max(0, len(curves) - 2) : len(curves)]:
        axes.set_xlabel("update step")
        axes.tick_params(labelbottom=True)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=8.5, ncols=columns, frameon=False)
    save_figure(figure, file)


def _point_with_intervals(axes: "Axes", run: Run, names: tuple[str, str], style: RunStyle, status: str) -> None:
    """Draw one run of a frontier: filled on the front, hollow if dominated, pale if clearly so."""
    x, y = (_score(run, name) for name in names)
    on_front = status == FRONT
    axes.errorbar(
        *(x.value, y.value),
        xerr=[[side] for side in reach(x)],
        yerr=[[side] for side in reach(y)],
        **{"fmt": style.marker, "color": style.colour, "markersize": 13 if run.method == "base" else 7},
        **{"markerfacecolor": style.colour if on_front else "white", "alpha": PALE if status == DOMINATED else 1},
        **{"elinewidth": 0.8, "zorder": 3 if on_front else 2, "clip_on": False},
    )


def _frontier_key(
    styles: Mapping[str, RunStyle], found: set[str], front: Sequence[Run], has_selected: bool
) -> list[Any]:
    """Return the legend of a frontier: methods, looks, and the numbers of the runs on the front."""
    looks = {FRONT: ("#333333", 1), WITHIN: ("white", 1), DOMINATED: ("white", PALE)}
    return [
        *(_handle(style.marker, style.colour, label=method) for method, style in styles.items()),
        *(
            _handle("o", "#333333", label=WORDS[status], markerfacecolor=face, alpha=alpha)
            for status, (face, alpha) in looks.items()
            if status in found
        ),
        *([_handle("o", "none", label="selected", markeredgecolor="black", markersize=11)] if has_selected else []),
        *(_handle(f"${i}$", "black", label=run.name) for i, run in enumerate(front, 1)),
    ]


def _draw_level(axes: "Axes", level: Estimate) -> Any:
    """Draw a never-trained model's forget score as a line, with its interval; return the line, for a legend."""
    below, above = reach(level)
    axes.axvspan(level.value - below, level.value + above, color="#000000", alpha=0.07, linewidth=0, zorder=0.4)
    return axes.axvline(level.value, label="never-trained level", **LEVEL_LOOK)


def _draw_front(axes: "Axes", points: Sequence[tuple[float, float]], level: Estimate | None) -> None:
    """Draw the stairs of a front: by the score, or by the distance to a level, once to each side of it."""
    start, sides = (0.0, [1]) if level is None else (level.value, [-1, 1])
    stairs = sorted((abs(x - start), y) for x, y in points)
    for side in sides:
        x, y = [start + side * distance for distance, _ in stairs], [y for _, y in stairs]
        axes.step(x, y, where="post", color="#555555", linewidth=1, zorder=1)


def _axis(name: str, runs: Sequence[Run]) -> str:
    """Return the words beside the axis of a score."""
    words = TO_LEVEL if name == FORGET and level_of(runs, place_of(FORGET)) else AXES.get(name, name)
    return words.format(ROUGE_WORDS[common(runs, "rouge")])


def _score(run: Run, name: str) -> Estimate:
    return cast(Estimate, run.figure(*place_of(name)))


def _limits(runs: Sequence[Run], name: str, level: Estimate | None = None) -> tuple[float, float]:
    """Return the limits of an axis that shows all intervals, and the level if there is one."""
    scores = [*(_score(run, name) for run in runs), *([] if level is None else [level])]
    low, high = min(one.value - reach(one)[0] for one in scores), max(one.value + reach(one)[1] for one in scores)
    margin = 0.06 * (high - low) or 0.05
    return low - margin, high + margin


def _handle(marker: str, colour: str, **look: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none", marker=marker, color=colour, **({"markersize": 7} | look))


def _points(runs: Sequence[Run]) -> tuple[list[float], list[float]]:
    points = [_point(run) for run in runs]
    return [x for x, _ in points], [y for _, y in points]


def _point(run: Run) -> tuple[float, float]:
    return _score(run, FORGET).value, _score(run, "retain").value
