"""Attacks that try to bring back what a model was made to forget.

settings = AttackSettings(decoding=DiffusionGenerationConfig(max_new_tokens=32))
scores = ATTACKS["relearn-related"].run(Target(model, tokenizer, rows, settings), seed=0)
"""

from typing import Any

from .registry import ATTACKS, Attack, choose_attacks

__all__ = ["ATTACKS", "Attack", "AttackScores", "AttackSettings", "Target", "choose_attacks"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import base

    return getattr(base, name)
