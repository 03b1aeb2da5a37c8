"""What a run shows while it works: one progress bar on a terminal, plain lines elsewhere. All of it goes to stderr."""

import os
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from tqdm import tqdm


class Bar(tqdm):
    """A progress bar with what is being done, the rate and the time left.

    Where the output is no terminal it is two plain lines instead, one at the start and one at the end. The bar leaves
    the second one behind, too. Of bars within one another only the outermost is shown. Use it in a `with`.

    Args:
        doing: what is being done, e.g. "scoring base". No text of rows.
        iterable: what to go through, if the bar is iterated.
        total, unit, initial: as in `tqdm`.
        show: whether to show anything.
        plain: whether a terminal gets plain lines, too.
    """

    open: ClassVar["Bar | None"] = None  # the one that is shown
    _is_shown = False

    def __init__(
        self,
        doing: str,
        iterable: Iterable | None = None,
        *,
        total: int | None = None,
        unit: str = "it",
        initial: int = 0,
        show: bool = True,
        plain: bool = False,
    ):
        show = show and Bar.open is None
        plain = plain or not sys.stderr.isatty()
        self._doing, self._start = doing, time.perf_counter()
        super().__init__(
            iterable,
            doing,
            total,
            leave=False,
            unit=unit,
            initial=initial,
            dynamic_ncols=True,
            disable=plain or not show,
        )
        if self.disable:  # then tqdm leaves out what it would show
            self.desc = doing
        self._amount = f"{total} {_plural(unit)}" if total != 1 else f"1 {unit}"
        if show:
            Bar.open, self._is_shown = self, True
            if plain:
                say(f"{doing}: {self._amount}" + (f", {initial} of them done before" if initial else ""))

    def __iter__(self) -> Iterator:
        with self:
            for one in self.iterable:
                yield one
                self.update()

    def finish(self, words: str = "") -> None:
        """Close the bar, all being done, and leave a line with the seconds that it took.

        Args:
            words: what else the line says.
        """
        shown, seconds = self._is_shown, time.perf_counter() - self._start
        self.close()
        if shown:
            say(f"{self._doing}: {self._amount} in {seconds:.1f} s{words}")

    def close(self) -> None:
        """Close the bar without a word, as after a failure."""
        super().close()
        if self._is_shown:
            Bar.open, self._is_shown = None, False

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self.finish() if kind is None else self.close()


def say(line: str) -> None:
    """Show one line above the bar, cut to the width of the terminal."""
    room = columns()
    tqdm.write(line if room is None else line[:room], file=sys.stderr)
    sys.stderr.flush()


def columns(stream: Any = None) -> int | None:
    """How many characters fit into a line of the terminal behind a stream, stderr unless given; None if none is."""
    stream = stream or sys.stderr
    if not stream.isatty():
        return None
    try:
        return (os.get_terminal_size(stream.fileno()).columns or 80) - 1  # the last one may start a new line
    except (OSError, AttributeError):
        return 79


def folded(text: str, stream: Any = None) -> str:
    """Return a sentence in as many lines as the terminal behind a stream, stdout unless given, asks for.

    It is unchanged where there is no terminal.
    """
    room = columns(stream or sys.stdout)
    return text if room is None else textwrap.fill(text, room)


def _plural(unit: str) -> str:
    return unit + ("es" if unit.endswith(("s", "ch")) else "s")
