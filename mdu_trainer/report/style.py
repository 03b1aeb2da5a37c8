"""The look of the pictures: one figure, one set of colours and markers, the same files for the same numbers."""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..evaluation.results import Estimate

# Okabe and Ito (2008): tells apart for colour-blind readers; markers tell apart in grey print
COLOURS = {"base": "#000000", "mdu": "#0072B2", "ga": "#D55E00", "npo": "#009E73"}
COLOURS |= {"simnpo": "#CC79A7", "wga": "#E69F00", "dpo": "#56B4E9", "bounded_ga": "#8B4513"}
COLOURS |= {"retain model": "#999999"}
MARKERS = {"base": "*", "mdu": "o", "ga": "v", "npo": "s", "simnpo": "D", "wga": "^", "dpo": "P", "bounded_ga": "1"}
MARKERS |= {"retain model": "X"}
LINE_STYLES = ("-", "--", ":", "-.")
ROLE_COLOURS = {"stored": "#D55E00", "in_context": "#0072B2", "structural": "#666666"}  # of tokens, see token_roles
ROLE_MARKERS = {"stored": "o", "in_context": "s", "structural": "^"}
ROLE_HATCHES = {"stored": "///", "in_context": "...", "structural": ""}
OTHER_COLOURS = ("#332288", "#882255", "#999933", "#44AA99", "#AA4499", "#661100")  # Tol (2021), muted
OTHER_MARKERS = ("h", "<", ">", "p", "d", "H")
PALEST = 0.55  # how far the last of several runs of one method is mixed with white

PictureFile = str | Path | BinaryIO  # a PNG or SVG to write; of a file object, the `name` ends in .png or .svg


class RunStyle(NamedTuple):
    """The style of a run, in every picture alike.

    Attributes:
        colour: hex; of several runs of a method the first has the method's own, the others are paler.
        marker, line: matplotlib's names.
        face: what the marker is filled with.
    """

    colour: str
    marker: str
    line: str
    face: str


def method_of(name: str) -> str:
    """Return the method of a run from its name, which is the name without tau and settings."""
    return " ".join(word for word in name.split() if "=" not in word)


def run_styles(names: Iterable[str]) -> dict[str, RunStyle]:
    """Return a style for each name of a run or method. A method without a colour of its own gets one by its order."""
    names = list(dict.fromkeys(names))
    others = list(dict.fromkeys(method for method in map(method_of, names) if method not in COLOURS))
    styles = {}
    for name in names:
        method = method_of(name)
        same = [other for other in names if method_of(other) == method]
        i = same.index(name)
        n = others.index(method) % len(OTHER_COLOURS) if method in others else 0
        colour = _paler(COLOURS.get(method, OTHER_COLOURS[n]), PALEST * i / max(1, len(same) - 1))
        face = "white" if i % 2 else colour
        styles[name] = RunStyle(colour, MARKERS.get(method, OTHER_MARKERS[n]), LINE_STYLES[i % 4], face)
    return styles


def label_points(
    axes: "Axes",
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    others: Iterable[tuple[float, float]] = (),
) -> None:
    """Write a text beside each point, where it covers neither a point nor another text, as far as there is room.

    Args:
        axes: with their limits set.
        points: in data coordinates.
        texts: one a point.
        others: further points that are not to be covered.
    """
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()  # so that sizes are known
    inside, radius = axes.get_window_extent(), 4 * axes.figure.dpi / 72
    places = [axes.transData.transform(point) for point in [*points, *others]]
    taken = [Bbox([place, place]).padded(radius) for place in places]
    offsets = [
        (x * r, y * r) for r in (8, 12, 17, 24) for x, y in ((1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1.3), (0, -1.3))
    ]
    for i, (point, text) in enumerate(zip(points, texts, strict=True)):
        notes = []
        for x, y in offsets:
            place = {"ha": "center" if x == 0 else "left" if x > 0 else "right", "va": "bottom" if y > 0 else "top"}
            note = axes.annotate(text, point, xytext=(x, y), textcoords="offset points", fontsize=8.5, **place)
            box = note.get_window_extent()
            area = box.width * box.height
            cost = area - _shared_area(box, inside) + sum(_shared_area(box, other) for other in taken)
            own, *further = (_distance(place, box) for place in [places[i], *places[:i], *places[i + 1 :]])
            cost += area * (min(further, default=math.inf) <= own)  # it would be read as another's
            notes.append((cost, len(notes), note))
        best = min(notes)
        taken.append(best[2].get_window_extent())
        for note in notes:
            if note is not best:
                note[2].remove()


def _distance(point: Sequence[float], box: Any) -> float:
    """Return the distance from a point to the nearest of a box."""
    x, y = point
    return math.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1))


def _shared_area(one: Any, other: Any) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(0.0, width) * max(0.0, height)


def _paler(colour: str, share: float) -> str:
    """Mix a colour with white."""
    if share == 0:
        return colour
    channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(c + (255 - c) * share):02x}" for c in channels)


def new_figure(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float] | None = None, **subplots: Any
) -> tuple["Figure", Any]:
    """Return a figure and its axes, as `matplotlib` returns them for so many rows and columns of axes.

    The size in inches is by default 6.4 x 4.8 for one column, or 6.4 x 6.4 with more rows; `subplots` are further
    arguments of `Figure.subplots`. Without matplotlib, an ImportError says how to install it.
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


def reach(estimate: "Estimate") -> tuple[float, float]:
    """Return how far an interval reaches below and above its value, which may lie beside it; 0 without one."""
    if estimate.low is None or estimate.high is None:
        return 0.0, 0.0
    return max(0.0, estimate.value - estimate.low), max(0.0, estimate.high - estimate.value)


def save_figure(figure: "Figure", file: PictureFile) -> None:
    """Write PNG or SVG, without date or random ids: the same numbers give the same bytes."""
    from matplotlib import rc_context

    suffix = Path(file if isinstance(file, str | Path) else file.name).suffix
    with rc_context({"svg.hashsalt": "mdu_trainer"}):
        figure.savefig(
            file, format=suffix[1:] or None, metadata={"Software": None} if suffix == ".png" else {"Date": None}
        )


def picture_bytes(plot: Callable[[BinaryIO], None], name: str) -> bytes:
    """Return the content of the file that a plot writes under this name."""
    file = io.BytesIO()
    file.name = name
    plot(file)
    return file.getvalue()
