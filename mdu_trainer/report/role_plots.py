"""Pictures of what was forgotten, token by token: scores by role, along the path, and token by token."""

from collections.abc import Sequence

import numpy as np

from ..data.roles import ROLES
from ..files import UserError
from ..token_roles.results import OWN, TRUE, RoleReport, role_words
from .style import ROLE_COLOURS, ROLE_HATCHES, ROLE_MARKERS, PictureFile, new_figure, reach, save_figure

LABELS = {
    "kl": "KL to the prompt-masked\nprediction (nats)",
    "entropy": "entropy (nats)",
    "probability": "probability of the token",
    "shift": "KL to the base (nats)",
}
AXES = {TRUE: "share of the true answer revealed", OWN: "share of the own answer revealed"}


def plot_roles(report: RoleReport, file: PictureFile, score: str = "kl") -> None:
    """Draw a score by role, a bar a model with its 95 % interval, and the change from the base in percent.

    Args:
        report: base and unlearned models.
        score: "kl", "entropy" or "probability", on the ground-truth path.
    """
    base, runs = report.runs[0], report.runs
    roles = [role for role in ROLES if role in base.figures[score]]
    canvas, axes = new_figure(size=(max(6.4, 0.75 * len(roles) * (len(runs) + 1)), 4.8))
    ticks, names = [], []
    for group, role in enumerate(roles):
        colour = ROLE_COLOURS[role]
        for i, run in enumerate(runs):
            at = group * (len(runs) + 1) + i
            found = run.figures[score][role]
            look = {"facecolor": "white" if run is base else colour, "edgecolor": colour if run is base else "white"}
            axes.bar(
                at, found.value, width=0.85, hatch=None if run is base else ROLE_HATCHES[role], linewidth=1, **look
            )
            axes.bar(at, found.value, width=0.85, facecolor="none", edgecolor=colour, linewidth=1.2)
            if found.low is not None and found.high is not None:
                ends = [[side] for side in reach(found)]
                axes.errorbar(at, found.value, yerr=ends, color="black", linewidth=1, capsize=3)
            percent = None if run is base else run.changes[score][role].percent
            if percent is not None:
                place = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "fontsize": 8}
                axes.annotate(f"{percent.value:+.0f} %", (at, found.high or found.value), **place)
            ticks.append(at)
            names.append(run.name)
        middle = group * (len(runs) + 1) + (len(runs) - 1) / 2
        tokens = f"{role_words(role)}\n{report.tokens[role]} tokens"
        axes.annotate(tokens, (middle, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", color=colour)
    axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor")
    axes.grid(visible=False, axis="x")
    axes.set_axisbelow(True)
    axes.set(ylabel=LABELS[score].replace("\n", " "))
    axes.margins(y=0.1)
    save_figure(canvas, file)


def plot_path(
    report: RoleReport, file: PictureFile, kind: str = TRUE, scores: Sequence[str] = ("kl", "entropy", "probability")
) -> None:
    """Draw scores along the denoising steps by role, a column a model, with bands of one standard error over rows.

    Args:
        report: base and unlearned models.
        kind: "true" for the ground-truth path, the same for all models, or "own" for each model's own decoding.
        scores: a row of axes each.
    """
    size = (1.2 + 2.8 * len(report.runs), 0.9 + 2.1 * len(scores))
    canvas, grid = new_figure(len(scores), len(report.runs), size=size, sharex=True, sharey="row", squeeze=False)
    steps = report.settings.num_steps
    share = np.arange(steps) / steps
    for row, score in enumerate(scores):
        for axes, run in zip(grid[row], report.runs, strict=True):
            for role, curve in run.curves[kind].get(score, {}).items():
                mean, error = (np.array(values, dtype=float) for values in (curve.mean, curve.standard_error))
                colour = ROLE_COLOURS[role]
                look = {"marker": ROLE_MARKERS[role], "markersize": 4, "linewidth": 1.2}
                axes.plot(share, mean, label=role_words(role), color=colour, **look)
                axes.fill_between(share, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
            if row == 0:
                axes.set_title(run.name, fontsize=10)
        grid[row][0].set(ylabel=LABELS[score], ylim=(0, 1.02 if score == "probability" else None))
    for axes in grid[-1]:
        axes.set(xlabel=AXES[kind], xlim=(-0.03, 1))
        axes.xaxis.label.set_fontsize(8)
    handles, labels = grid[0][0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    save_figure(canvas, file)


def plot_heatmap(report: RoleReport, file: PictureFile, tokens: Sequence[str] | None = None) -> None:
    """Draw the divergence of every token of one answer at every step of a ground-truth path, a panel a model.

    White is what was revealed already.

    Args:
        report: base and unlearned models.
        tokens: text of each token, for the axis. It shows the answer, which is forget data: without it the axis has
            positions and roles.

    Raises:
        ValueError: if there is not one text a token.
    """
    roles = report.example_roles
    if tokens is not None and len(tokens) != len(roles):
        raise UserError(f"The answer has {len(roles)} tokens, got {len(tokens)} texts.")
    size = (2.2 + 2.5 * len(report.runs), 1.3 + 0.2 * len(roles))
    canvas, grid = new_figure(1, len(report.runs), size=size, sharey=True, squeeze=False)
    tables = [np.array(run.example, dtype=float).T for run in report.runs]
    top = max(np.nanmax(table) for table in tables)
    for axes, run, table in zip(grid[0], report.runs, tables, strict=True):
        image = axes.imshow(
            table, aspect="auto", cmap="cividis", vmin=0, vmax=top, extent=(0, 1, len(roles) - 0.5, -0.5)
        )
        axes.grid(visible=False)
        axes.set_title(run.name, fontsize=10)
        axes.set(xlabel="share revealed", xlim=(0, 1))
    labels = [
        f"{role_words(role)}  {i}" if tokens is None else f"{tokens[i]}  ({role_words(role)})"
        for i, role in enumerate(roles)
    ]
    grid[0][0].set_yticks(range(len(roles)), labels, fontsize=8)
    for label, role in zip(grid[0][0].get_yticklabels(), roles, strict=True):
        label.set_color(ROLE_COLOURS[role])
        label.set_fontweight("bold" if role == "stored" else "normal")
    grid[0][0].set_ylabel("role and position of each token" if tokens is None else "tokens")
    canvas.colorbar(image, ax=list(grid[0]), label=LABELS["kl"].replace("\n", " "), fraction=0.05, pad=0.02)
    save_figure(canvas, file)
