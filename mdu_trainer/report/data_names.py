"""The name of the data as it is published: no path of this machine."""

from pathlib import Path

from ..attacks.results import Recovery
from ..evaluation.results import Results


def data_name(results: Results | Recovery) -> str:
    """Return the name of the data for a card, which is no name if it is a path of this machine."""
    first, _, rest = results.dataset.partition(" ")
    is_path = first.startswith((".", "/", "~")) or first.count("/") > 1 or "\\" in first or Path(first).is_dir()
    return f"a local data set {rest}".rstrip() if is_path else results.dataset


def hub_datasets(results: Results | None) -> list[str]:
    """Return the Hub ids of the data that a comparison names."""
    first = "" if results is None else data_name(results).split(" ")[0]
    return [first] if first.count("/") == 1 else []
