"""Ask again and again: the best of k samples."""

from dataclasses import replace

from .base import AttackScores, Target, worst_case


def attack(target: Target, seed: int) -> AttackScores:
    """Return the best score over `settings.samples` samples at `settings.temperature`; `path` has the mean by sample.

    Source: Reisizadeh et al. (arXiv 2511.04934), leak@k.
    """
    samples, temperature = target.settings.samples, target.settings.temperature
    tries = {str(k + 1): target.ask(temperature=temperature, seed=seed * samples + k) for k in range(samples)}
    return replace(worst_case(target, tries), reached_by="")  # which of the samples says nothing
