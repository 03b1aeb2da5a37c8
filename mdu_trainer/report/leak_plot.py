"""The trend of the leak checks of a model, as a picture and a table."""

from collections.abc import Sequence

from ..attacks.leak_history import PastCheck
from ..evaluation.results import Estimate
from .style import PictureFile, new_figure, reach, save_figure

PASSED, LEAKS, OPEN = "#009E73", "#D55E00", "#666666"
WORDS = {True: "passed", False: "not passed", None: "no limit"}
LOOKS = {True: (PASSED, "o"), False: (LEAKS, "X"), None: (OPEN, "s")}


def plot_leaks(checks: Sequence[PastCheck], file: PictureFile) -> None:
    """Draw the leak of each check along time, with its 95 % interval and the limit that it had to keep."""
    figure, axes = new_figure(size=(8, 3.6))
    moments = [check.moment for check in checks]
    axes.plot(moments, [check.leak for check in checks], color="#bbbbbb", linewidth=1, zorder=1)
    for passed, (colour, marker) in LOOKS.items():
        shown = [check for check in checks if check.passed is passed]
        estimates = [Estimate(check.leak, check.low, check.high) for check in shown]
        if shown:
            axes.errorbar(
                [check.moment for check in shown],
                [one.value for one in estimates],
                yerr=[[reach(one)[side] for one in estimates] for side in (0, 1)],
                **{"fmt": marker, "color": colour, "label": WORDS[passed], "markersize": 8, "capsize": 3, "zorder": 2},
            )
    limited = [(check.moment, check.max_leak) for check in checks if check.max_leak is not None]
    if limited:
        times, limits = zip(*limited, strict=True)
        axes.step(times, limits, where="post", color="black", linestyle="--", linewidth=1, label="limit")
        axes.plot(times[-1:], limits[-1:], color="black", marker="_", markersize=14)  # a single check has no line
    top = max(max(check.high or check.leak, check.max_leak or 0.0) for check in checks)
    axes.set(ylabel="leak, 0 to 1 (lower is better)", ylim=(-0.03 * top - 0.005, 1.1 * top + 0.01))
    figure.autofmt_xdate()
    figure.legend(loc="outside upper right", ncols=4, frameon=False, fontsize=8.5)
    save_figure(figure, file)


def leak_cells(checks: Sequence[PastCheck]) -> list[list[str]]:
    """Return the checks, one a row, the latest first, under a header."""
    rows = [["checked (UTC)", "leak", "limit", "verdict", "rows", "not measured"]]
    for check in reversed(checks):
        limit = "" if check.max_leak is None else f"{check.max_leak:g}"
        counts = [str(check.rows), str(check.not_measured)]
        leak = str(Estimate(check.leak, check.low, check.high))
        rows.append([f"{check.moment:%Y-%m-%d %H:%M}", leak, limit, WORDS[check.passed], *counts])
    return rows
