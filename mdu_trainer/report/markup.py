"""Text that stays text in Markdown and HTML: names and descriptions are others' words, never markup of ours."""

import re
import unicodedata
from typing import Any

# Marks that change the direction of what stands around them; the joiners of scripts and emoji are left alone
_DIRECTIONS = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_SPECIAL = {character: f"\\{character}" for character in "\\`*[]#~"}
_SPECIAL |= {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "$": "&#36;", "@": "&#64;", "^": "&#94;"}
_OUTER_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")  # inside of a word it is no emphasis
_LINK = re.compile(r":(?=//)|(?<=www)\.", re.IGNORECASE)  # what GitHub's Markdown makes a link of
_START = re.compile(r"^(\d{0,9})([-+=.)])(?=[-=\s]|$)")  # of a list or a line under a heading


def seen_text(value: Any) -> str:
    """Return a text without control characters, and without marks that turn the direction of what is around it."""
    text = _DIRECTIONS.sub("", str(value))
    return "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs"))


def plain_text(value: Any) -> str:
    """Return `seen_text` in one line."""
    return " ".join(seen_text(value).split())


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
