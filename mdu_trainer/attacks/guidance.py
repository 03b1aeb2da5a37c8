"""Decode with classifier-free guidance, which multiplies what the prompt adds to a prediction: what MDU shrinks."""

from .base import AttackScores, Target, worst_case

SCALES = (0.5, 1.0, 2.0, 4.0)  # l_u + (scale + 1) * (l_c - l_u)


def attack(target: Target, seed: int) -> AttackScores:
    """Return the best score over a few scales. Decoding is greedy, so the seed changes nothing.

    Source of the guidance: Nie et al. (arXiv 2410.18514).
    """
    return worst_case(target, {f"{scale:g}": target.ask(cfg_scale=scale) for scale in SCALES})
