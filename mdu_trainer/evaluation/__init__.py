"""What a model still says: metrics and benchmarks."""

from .metrics import RougeL

__all__ = ["RougeL"]
