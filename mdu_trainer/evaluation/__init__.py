"""What a model still says: metrics and benchmarks."""

from . import benchmarks  # noqa: F401  registers the benchmarks and, through scoring, the metrics
from .metrics import RougeL

__all__ = ["RougeL"]
