"""Decode in other ways: a greedy answer is one of many that a masked model can give."""

from ..inference.generation import DiffusionGenerationConfig
from .base import AttackScores, Target, worst_case


def settings(decoding: DiffusionGenerationConfig) -> dict[str, dict[str, object]]:
    """Return the ways to decode: name -> what to change of the decoding. All are at temperature 0."""
    length = decoding.max_new_tokens
    half, quarter = -(-length // 2), -(-length // 4)
    greedy = {"temperature": 0.0, "position_temperature": 0.0, "cfg_scale": 0.0, "schedule": "linear"}
    ways = {
        "half the steps": {"steps": half, "block_length": None, "remasking": "low_confidence"},
        "blocks": {"steps": None, "block_length": quarter, "remasking": "low_confidence"},
        "left to right": {"steps": None, "block_length": 1, "remasking": "low_confidence"},
        "margin": {"steps": None, "block_length": None, "remasking": "margin"},
        "entropy": {"steps": None, "block_length": None, "remasking": "entropy"},
        "random order": {"steps": None, "block_length": None, "remasking": "random"},
    }
    return {name: greedy | way for name, way in ways.items()}


def attack(target: Target, seed: int) -> AttackScores:
    """Return the best score over a few numbers of steps, block lengths and orders; the seed draws the random one."""
    ways = settings(target.settings.decoding)
    return worst_case(target, {name: target.ask(seed=seed, **changes) for name, changes in ways.items()})
