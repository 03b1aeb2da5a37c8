"""Text that stays text in Markdown and HTML: names and descriptions are others' words, never markup of ours."""

import re
import unicodedata
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

# Marks that change the direction of what stands around them; the joiners of scripts and emoji are left alone
_DIRECTIONS = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_SPECIAL = {character: f"\\{character}" for character in "\\`*[]#~"}
_SPECIAL |= {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "$": "&#36;", "@": "&#64;", "^": "&#94;"}
_OUTER_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")  # inside of a word it is no emphasis
_LINK = re.compile(r":(?=//)|(?<=www)\.", re.IGNORECASE)  # what GitHub's Markdown makes a link of
NUMBER = re.compile(r"[-+]?\d[\d.e+-]*( \[.*\])?")
_START = re.compile(r"^(\d{0,9})([-+=.)])(?=[-=\s]|$)")  # of a list or a line under a heading


def seen_text(value: Any) -> str:
    """Return a text without control characters, and without marks that turn the direction of what is around it."""
    text = _DIRECTIONS.sub("", str(value))
    return "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs"))


def plain_text(value: Any) -> str:
    """Return `seen_text` in one line."""
    return " ".join(seen_text(value).split())


def html_template(path: Path) -> Template:
    """Return a template of HTML in which whatever is filled in stays text; cells can be asked for `is figure`."""
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_as_typed,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["figure"] = lambda cell: NUMBER.fullmatch(cell) is not None
    return environment.get_template(path.name)


def _as_typed(value: Any) -> Any:
    return seen_text(value) if type(value) is str else value


def markdown_text(value: Any) -> str:
    """Return a text such that Markdown, and the HTML in it, shows it as it is. It may stand in a table."""
    text = _OUTER_UNDERSCORE.sub(r"\\_", "".join(_SPECIAL.get(c, c) for c in plain_text(value)))
    text = _LINK.sub(lambda found: f"&#{ord(found[0])};", text)
    return _START.sub(r"\1\\\2", text)


def figure_text(value: Any) -> str:
    """Return a text such that matplotlib draws it as it is: dollars stand for no formula."""
    return plain_text(value).replace("$", r"\$")


def markdown_code(value: Any) -> str:
    """Return a text as Markdown's code, in as many backticks as it takes. Not for tables."""
    text = plain_text(value)
    runs = [len(run) for run in re.findall("`+", text)]
    fence = "`" * next(n for n in range(1, len(runs) + 2) if n not in runs)
    padding = " " if text[:1] in ("`", "") or text[-1:] == "`" else ""
    return f"{fence}{padding}{text}{padding}{fence}"
