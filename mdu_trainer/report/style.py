"""How the pictures look: one figure, one set of colours and markers, files that are the same for the same figures."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
OTHER_COLOURS = ("#332288", "#882255", "#999933", "#44AA99", "#AA4499", "#661100")  # Tol (2021), muted
OTHER_MARKERS = ("h", "<", ">", "p", "d", "H")
PALEST = 0.55  # how far the last of several runs of one method is mixed with white


PictureFile = str | Path | BinaryIO  # of a file object, the `name` ends in .png or .svg


class RunStyle(NamedTuple):
    """How a run is drawn, in every picture alike.

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
    """The method of a run, from its name: the name without tau and settings."""
    return " ".join(word for word in name.split() if "=" not in word)


def run_styles(names: Iterable[str]) -> dict[str, RunStyle]:
    """A style for each run. Methods that have no colour of their own get one by their order.

    Args:
        names: of the runs (`Run.name`), or of their methods.
    """
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
    """Writes a text beside each point, where it covers neither a point nor another text, as far as there is room.

    Args:
        axes: with their limits set.
        points: in data coordinates.
        texts: one a point.
        others: further points that are not to be covered.
    """
    axes.figure.draw_without_rendering()  # so that sizes are known
    inside, radius = axes.get_window_extent(), 4 * axes.figure.dpi / 72
    places = [axes.transData.transform(point) for point in [*points, *others]]
    taken = [_around(place, radius) for place in places]
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


def _around(point: Sequence[float], radius: float) -> Any:
    from matplotlib.transforms import Bbox

    x, y = point
    return Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)


def _distance(point: Sequence[float], box: Any) -> float:
    """From a point to the nearest of a box."""
    x, y = point
    return math.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1))


def _shared_area(one: Any, other: Any) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(0.0, width) * max(0.0, height)


def _paler(colour: str, share: float) -> str:
    """A colour mixed with white."""
    if share == 0:
        return colour
    channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(c + (255 - c) * share):02x}" for c in channels)


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


def save_figure(figure: "Figure", file: PictureFile) -> None:
    """Write PNG or SVG, without date or random ids: the same figures give the same bytes.

    Args:
        figure: what to write.
        file: a path, or a binary file with a name. The suffix says what to write.
    """
    from matplotlib import rc_context

    suffix = Path(file if isinstance(file, str | Path) else file.name).suffix
    with rc_context({"svg.hashsalt": "mdu_trainer"}):
        figure.savefig(
            file, format=suffix[1:] or None, metadata={"Software": None} if suffix == ".png" else {"Date": None}
        )
