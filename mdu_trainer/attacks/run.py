"""Attack several models, and compare how much of what they were made to forget comes back.

recovery = run_attacks({"mdu tau=0": load_unlearned}, load_base, load_never, rows, settings, choose_attacks(...))
print(recovery.text())
"""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..evaluation.metrics import bootstrap_interval
from ..evaluation.progress import SCORING, ProgressFile
from ..evaluation.results import Estimate
from ..evaluation.runner import from_main, processes
from ..evaluation.scoring import digest
from ..files import UserError, typed
from ..models import weights_fingerprint
from ..terminal import Bar
from .base import AttackScores, AttackSettings, Target, check_answers
from .membership import beside_never_trained
from .registry import ADAPTER, Attack
from .results import BASE, NEVER, NO_ATTACK, AttackOutcome, Outcome, Recovery, WeightPath
from .sharing import Sharing
from .weights import weight_path, weights_of

COLUMNS = ("question", "answer", "paraphrased_question")  # what attacks read of a row

Loader = Callable[[], tuple[nn.Module, PreTrainedTokenizerBase]]


class _Finished(NamedTuple):
    """A finished attack on one model."""

    model: str
    weights: str
    attack: str
    scores: AttackScores


def run_attacks(
    unlearned: Mapping[str, Loader],
    base: Loader,
    never: Loader | None,
    rows: Dataset,
    settings: AttackSettings,
    attacks: Mapping[str, Attack],
    *,
    dataset: str = "",
    seed: int = 0,
    progress_path: str | Path | None = None,
    show_progress: bool = False,
    left_out: Callable[[str, ValueError], None] | None = None,
) -> Recovery:
    """Attack every model, and compare.

    One model is in memory at a time, beside it the weights of the base on the CPU. An attack that needs an adapter
    leaves models without one as they are: with no attack and under it their scores are the same. Every process of an
    accelerate launch must call this: each loads the models, attacks a part of the rows, and returns the whole. The
    figures are those of one process, since rows are put together without regard to who attacks them.

    Args:
        unlearned: name -> what loads the model and its tokenizer.
        base: loads the model before unlearning.
        never: loads a model that was trained alike, but never on the rows; None leaves recoveries out.
        rows: the forget rows: `question`, `answer`, and where the data has it `paraphrased_question`.
        settings: how answers are decoded, and how hard attacks try.
        attacks: as `choose_attacks` returns them.
        dataset: what to call the rows.
        seed: of the attacks.
        progress_path: file that keeps finished attacks, as numbers only. Given again after a kill, it saves repeating
            them.
        show_progress: show a progress bar over attacks and models.
        left_out: called with the name of an attack that refuses the rows, and why; the attack is then left out. If not
            given, the error is raised.

    Raises:
        ValueError: for no unlearned model or one of a reserved name, rows that cannot be asked, an attack that refuses
            them, or a progress file of other models, rows or settings.
    """
    check_answers(rows)
    reserved = [name for name in (BASE, NEVER) if name in unlearned]
    if reserved or not unlearned:
        raise UserError(f"Name at least one unlearned model, none of them {BASE!r} or {NEVER!r}.")
    models = {BASE: base} | ({} if never is None else {NEVER: never}) | dict(unlearned)
    attacks = {NO_ATTACK: Attack(_no_attack, "ask the plain question")} | dict(attacks)
    scores, paths = _attack_all(models, rows, settings, attacks, seed, progress_path, show_progress, left_out)
    outcomes = {
        name: _compare(attack.words, beside_never_trained({model: scores[model, name] for model in models}), name)
        for name, attack in attacks.items()
        if all((model, name) in scores for model in models)
    }
    return Recovery(dataset, _settings(settings) | {"seed": seed}, outcomes, paths)


def recovery_of(unlearned: Sequence[float], never: Sequence[float], base: Sequence[float]) -> Estimate | None:
    """Return (unlearned - never) / (base - never) of mean scores, with its 95 % interval.

    The interval is of a paired bootstrap: a resample draws the same rows of all three models.

    Args:
        unlearned, never, base: scores of the same rows.

    Returns:
        The recovery; None where the interval of base - never reaches down to 0, for then nothing was there to recover.
    """
    columns = np.asarray([unlearned, never, base], dtype=np.float64)
    told_apart, _ = bootstrap_interval(columns[2] - columns[1])
    if told_apart is None or told_apart <= 0:
        return None

    def ratio(rows: np.ndarray, axis: int) -> np.ndarray:
        one, floor, top = columns[:, rows.astype(int)].mean(axis=axis)
        with np.errstate(divide="ignore", invalid="ignore"):
            # a resample in which the base knows no more has no ratio: it goes to the end that its numerator points to
            return np.where(top > floor, (one - floor) / (top - floor), np.copysign(np.inf, one - floor))

    rows = np.arange(columns.shape[1])
    value = float(ratio(rows, axis=-1))
    with np.errstate(invalid="ignore"):  # the spread of infinite ratios, which nobody asks for
        low, high = bootstrap_interval(rows, ratio)
    known = low is not None and high is not None and math.isfinite(high - low)
    return Estimate(value, low, high) if known else None


def _attack_all(
    models: Mapping[str, Loader],
    rows: Dataset,
    settings: AttackSettings,
    attacks: dict[str, Attack],
    seed: int,
    progress_path: str | Path | None,
    show_progress: bool,
    left_out: Callable[[str, ValueError], None] | None,
) -> tuple[dict[tuple[str, str], AttackScores], dict[str, WeightPath]]:
    """Return the scores of every model under every attack, (model, attack) -> scores, and the weights of the models.

    What is done is not repeated. Attacks that refuse the rows are taken out of `attacks`.
    """
    main, sharing = processes().is_main_process, Sharing()
    header = {
        "progress": "attacks 3",
        "scoring": SCORING,
        "rows": _rows_digest(rows),
        "settings": _settings(settings, _rows_digest),
        "seed": seed,
    }
    scores: dict[tuple[str, str], AttackScores] = {}
    paths: dict[str, WeightPath | None] = {}
    bar = Bar("attacking", total=len(models) * len(attacks), unit="attack", show=show_progress and main)
    with ProgressFile(progress_path if main else None, "attack") as progress, bar:
        finished = from_main(lambda: progress.resume(header, _finished))
        base: dict[str, Tensor] = {}
        for name, load in models.items():
            target = Target(*load(), rows, settings, sharing)
            weights = weights_fingerprint(target.model)
            done = _done([one for one in finished if one.model == name], weights, progress_path)
            bar.update(len(done.keys() & attacks.keys()))
            for attack in [attack for attack in attacks if attack not in done]:
                bar.set_description_str(f"attacking {name}: {attack}")
                start = time.perf_counter()
                try:
                    found = _run(attacks[attack], target, seed)
                except ValueError as refusal:  # it cannot be made on these rows
                    if left_out is None:
                        raise
                    if main:
                        left_out(attack, refusal)
                    del attacks[attack]
                else:
                    done[attack] = found
                    line = _Finished(name, weights, attack, found)._asdict()
                    progress.append([line | {"scores": asdict(found), "seconds": time.perf_counter() - start}])
                bar.update()
            scores |= {(name, attack): found for attack, found in done.items()}
            if name == BASE:
                base = weights_of(target.model)
            else:
                paths[name] = weight_path(target, base, seed)
            del target  # before the next model is loaded
            gc.collect()
    return scores, {name: path for name, path in paths.items() if path is not None}


def _done(finished: Sequence[_Finished], weights: str, path: str | Path | None) -> dict[str, AttackScores]:
    """Return the finished attacks on a model by name.

    Raises:
        UserError: they are on other weights.
    """
    for one in finished:
        if one.weights != weights:
            raise UserError(
                f"{path} holds attacks on other weights under the name {one.model!r}. Choose another file, or delete "
                "this one to start anew."
            )
    return {one.attack: one.scores for one in finished}


def _run(attack: Attack, target: Target, seed: int) -> AttackScores:
    """Make an attack; one on an adapter leaves a model without one as it is."""
    needs_adapter = ADAPTER in attack.needs and not hasattr(target.model, "disable_adapter")
    return _no_attack(target, seed) if needs_adapter else attack.run(target, seed)


def _no_attack(target: Target, seed: int) -> AttackScores:
    return AttackScores(list(range(len(target.rows))), target.plain, target.plain)


def _compare(words: str, scores: Mapping[str, AttackScores], attack: str) -> AttackOutcome:
    """Return the outcome of one attack, from the scores of each model."""
    rows = scores[BASE].rows
    outcomes = {}
    for name, one in scores.items():
        if one.rows != rows:
            raise UserError(f"{attack} scored other rows of {name} than of {BASE}: they cannot be compared.")
        recovery = None
        if NEVER in scores and name not in (BASE, NEVER):
            recovery = recovery_of(one.after, scores[NEVER].after, scores[BASE].after)
        outcomes[name] = Outcome(_mean(one.before), _mean(one.after), recovery, one.path, one.reached_by)
    return AttackOutcome(words, len(rows), outcomes)


def _mean(values: Sequence[float]) -> Estimate:
    return Estimate(math.fsum(values) / len(values), *bootstrap_interval(values))


def _settings(settings: AttackSettings, of_rows: Callable[[Dataset], Any] = len) -> dict[str, Any]:
    """Return the settings, and of rows how many. The batch size of decoding is left out: it changes nothing."""
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    decoding = {name: value for name, value in asdict(values.pop("decoding")).items() if name != "batch_size"}
    shown = {name: of_rows(value) if isinstance(value, Dataset) else value for name, value in values.items()}
    return {"decoding": decoding} | shown


def _rows_digest(rows: Dataset) -> str:
    return digest([list(rows[column]) for column in COLUMNS if column in rows.column_names])


def _finished(line: dict[str, Any]) -> _Finished:
    scores = typed(AttackScores, line["scores"])
    model, weights, attack = (typed(str, line[name]) for name in ("model", "weights", "attack"))
    return _Finished(model, weights, attack, scores)
