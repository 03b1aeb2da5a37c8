"""Metrics and benchmarks of what a model still says."""

from . import benchmarks  # noqa: F401  registers the benchmarks and, through scoring, the metrics
from .metrics import RougeL

__all__ = ["RougeL"]
