"""How the pictures look: one figure, one set of colours and markers, files that are the same for the same figures."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito (2008): tells apart for colour-blind readers; markers tell apart in grey print
COLOURS = {"base": "#000000", "mdu": "#0072B2", "ga": "#D55E00", "npo": "#009E73"}
COLOURS |= {"simnpo": "#CC79A7", "wga": "#E69F00", "dpo": "#56B4E9", "retain model": "#999999"}
MARKERS = {"base": "*", "mdu": "o", "ga": "v", "npo": "s", "simnpo": "D", "wga": "^", "dpo": "P"}
MARKERS |= {"retain model": "X"}
LINE_STYLES = ("-", "--", ":", "-.")
ROLE_COLOURS = {"stored": "#D55E00", "in_context": "#0072B2", "structural": "#666666"}  # of tokens, see token_roles
ROLE_MARKERS = {"stored": "o", "in_context": "s", "structural": "^"}
ROLE_HATCHES = {"stored": "///", "in_context": "...", "structural": ""}


def new_figure(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float] | None = None, **subplots: Any
) -> tuple["Figure", Any]:
    """A figure and its axes, as `matplotlib` returns them for so many rows and columns.

    Args:
        rows, columns: of axes.
        size: width and height in inches; for one column 6.4 x 4.8, or 6.4 x 6.4 with more rows, unless given.
        **subplots: further arguments of `Figure.subplots`.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install mdu-trainer[plot]") from error
    figure = Figure(figsize=size or (6.4 * columns, 4.8 if rows == 1 else 6.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, **subplots)
    for one in figure.axes:
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write PNG or SVG, as the suffix says, without date or random ids: the same figures give the same bytes."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "mdu_trainer"}):
        figure.savefig(path, metadata={"Software": None} if Path(path).suffix == ".png" else {"Date": None})
