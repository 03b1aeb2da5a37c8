"""Attacks that try to bring back what a model was made to forget.

settings = AttackSettings(decoding=DiffusionGenerationConfig(max_new_tokens=32))
scores = ATTACKS["relearn-related"].run(Target(model, tokenizer, rows, settings), seed=0)
"""

from .base import AttackScores, AttackSettings, Target
from .registry import ATTACKS, Attack, choose_attacks, register_attack

__all__ = ["ATTACKS", "Attack", "AttackScores", "AttackSettings", "Target", "choose_attacks", "register_attack"]
