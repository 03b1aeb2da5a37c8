"""Messages of other libraries that a user can do nothing about are left out: each by its logger or its words."""

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

from ..terminal import Bar, columns

LOGGED = {  # logger -> how its message begins
    # at import, on CPUs with AVX-512 BF16: 4-bit models run there all the same
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
}
WARNED = (  # how the message begins, of what category
    # bitsandbytes is written so
    (r"`torch\.jit\.script(_method)?` is deprecated", DeprecationWarning),
)


def silence() -> None:
    """Leave those messages out. It is to be called before the libraries are imported."""
    for name, beginning in LOGGED.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _LeftOut) for known in logger.filters):
            logger.addFilter(_LeftOut(beginning))
    for message, category in WARNED:
        warnings.filterwarnings("ignore", message, category)


def tidy_bars() -> None:
    """Let the bars of other libraries vanish at their end, and show none amid ours or without a terminal."""
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_tqdm_hook(_tidy)
    if columns() is None:
        if "datasets" in sys.modules:
            sys.modules["datasets"].disable_progress_bars()
        if "huggingface_hub" in sys.modules:
            sys.modules["huggingface_hub"].utils.disable_progress_bars()


class _LeftOut(logging.Filter):
    """Drops messages that begin so, before their arguments are filled in."""

    def __init__(self, beginning: str):
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginning)


def _tidy(factory: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """A bar of transformers: loading weights, writing shards."""
    hidden = kwargs.get("disable") or Bar.open is not None or columns() is None
    return factory(*args, **kwargs | {"disable": hidden, "leave": False, "dynamic_ncols": True})
