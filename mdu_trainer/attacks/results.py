"""How much of what a model was made to forget comes back under attack.

    recovery = run_attacks({"mdu tau=0": load_unlearned}, load_base, load_never, rows, settings, choose_attacks(...))
    print(recovery.text())

Of each attack, recovery is (unlearned - never trained) / (base - never trained), of mean scores under the attack: 0 is
what the attack gets out of a model that never saw the rows, 1 what it gets out of the model before unlearning.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from datasets import Dataset
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..evaluation.metrics import bootstrap_interval
from ..evaluation.progress import SCORING, ProgressFile
from ..evaluation.results import Estimate, markdown_table
from ..evaluation.scoring import digest
from ..files import Record, UserError, typed
from ..models import weights_fingerprint
from .base import AttackScores, AttackSettings, Target, check_answers
from .registry import ADAPTER, Attack

BASE, NEVER = "base", "never trained"  # what tables call the two ends of the scale
NO_ATTACK = "none"
COLUMNS = ("question", "answer", "paraphrased_question")  # what attacks read of a row

Loader = Callable[[], tuple[nn.Module, PreTrainedTokenizerBase]]


@dataclass(frozen=True)
class Outcome:
    """What an attack got out of one model, as means over rows with intervals.

    Attributes:
        before, after: score of the rows with no attack, and under it.
        recovery: None for the base and a model that never saw the rows, without such a model, and where the two cannot
            be told apart under the attack.
        path: what was measured along the way, as name -> mean score.
    """

    before: Estimate
    after: Estimate
    recovery: Estimate | None = None
    path: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AttackOutcome:
    """What an attack got out of every model.

    Attributes:
        words: what it does.
        rows: how many were scored.
        models: name -> outcome; "base", "never trained" if there is one, and the unlearned models.
    """

    words: str
    rows: int
    models: dict[str, Outcome]


@dataclass(frozen=True)
class Recovery(Record):
    """Attacks on one or more unlearned models, beside the base and a model that never saw the rows. Figures only.

    Attributes:
        dataset: what the rows are called.
        settings: how hard the attacks tried, and the seed.
        attacks: name -> outcome; "none" first, the plain question.
    """

    kind: ClassVar[str] = "recovery file"
    remedy: ClassVar[str] = "repeat the attacks"

    dataset: str
    settings: dict[str, Any]
    attacks: dict[str, AttackOutcome]

    @property
    def models(self) -> list[str]:
        """Names of the unlearned models."""
        return [name for name in next(iter(self.attacks.values())).models if name not in (BASE, NEVER)]

    @property
    def has_floor(self) -> bool:
        """Whether a model that never saw the rows was attacked too."""
        return NEVER in next(iter(self.attacks.values())).models

    def check(self) -> None:
        """Refuse attacks that are not all on the same models, the base among them."""
        models = [list(outcome.models) for outcome in self.attacks.values()]
        if not models or any(names != models[0] for names in models):
            raise ValueError("its attacks are not all on the same models")
        if BASE not in models[0] or not self.models:
            raise ValueError(f"it lacks {BASE!r} or an unlearned model")

    def recoveries(self) -> dict[str, dict[str, Estimate]]:
        """Name of an unlearned model -> name of an attack -> recovery, where any is defined."""
        found = {
            name: {
                attack: outcome.models[name].recovery
                for attack, outcome in self.attacks.items()
                if outcome.models[name].recovery is not None
            }
            for name in self.models
        }
        return {name: of_model for name, of_model in found.items() if of_model}

    def table(self) -> str:
        """The cells of `table_cells` as a Markdown table."""
        return markdown_table(self.table_cells())

    def table_cells(self) -> list[list[str]]:
        """The attacks, one a row, under a header: mean scores under the attack, and recoveries with intervals."""
        ends = [BASE, NEVER] if self.has_floor else [BASE]
        header = ["attack", *ends]
        for name in self.models:
            header += [name, "recovery"] if self.has_floor else [name]
        rows = [header]
        for attack, outcome in self.attacks.items():
            cells = [f"{outcome.models[name].after.value:.3f}" for name in ends]
            for name in self.models:
                one = outcome.models[name]
                cells.append(f"{one.after.value:.3f}")
                if self.has_floor:
                    cells.append("" if one.recovery is None else _short(one.recovery))
            rows.append([attack, *cells])
        return rows

    def text(self) -> str:
        """The table, and what its figures mean."""
        parts = [self.table(), "Scores are means over rows, higher where more came back."]
        if self.has_floor:
            parts[1] += (
                " Recovery is (unlearned - never trained) / (base - never trained), with its 95 % interval: 0 is a "
                "model that never saw the rows, 1 the model before unlearning."
            )
        else:
            parts.append(
                "No model that never saw the rows was attacked. So it is not known how much of a score is guessing or "
                "relearning that works on any model, and no recovery is given."
            )
        undefined = self.has_floor and [
            name
            for name, outcome in self.attacks.items()
            if all(one.recovery is None for one in outcome.models.values())
        ]
        if undefined:
            parts.append(
                f"No recovery under {', '.join(undefined)}: the base and a model that never saw the rows cannot "
                "be told apart there."
            )
        if any(one.low == one.high for found in self.recoveries().values() for one in found.values()):
            rows = max(outcome.rows for outcome in self.attacks.values())
            parts.append(
                f"An interval without width is not certainty: all rows agreed, and there are {rows} of them. What one "
                f"row in {max(1, rows // 3)} gives away can be missed so."
            )
        return "\n\n".join(parts)


class _Finished(NamedTuple):
    """A finished attack on one model, or why it cannot be made."""

    model: str
    weights: str
    attack: str
    scores: AttackScores | ValueError


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

    One model is in memory at a time. An attack that needs an adapter leaves models without one as they are: with no
    attack and under it their scores are the same.

    Args:
        unlearned: name -> what loads the model and its tokenizer.
        base: loads the model before unlearning.
        never: loads a model that was trained alike, but never on the rows; None leaves recoveries out.
        rows: the forget rows: `question`, `answer`, and where the data has it `paraphrased_question`.
        settings: how answers are decoded, and how hard attacks try.
        attacks: as `choose_attacks` returns them.
        dataset: what to call the rows.
        seed: of the attacks.
        progress_path: file that keeps finished attacks, as figures only. Given again after a kill, it saves repeating
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
    said = _settings(settings)
    content = [list(rows[column]) for column in COLUMNS if column in rows.column_names]
    header = {
        "progress": "attacks 1",
        "scoring": SCORING,
        "rows": digest(content),
        "settings": said | _digests(settings),
        "seed": seed,
    }
    scores: dict[tuple[str, str], AttackScores] = {}
    bar = tqdm(total=len(models) * len(attacks), unit="attack", disable=not show_progress)
    with ProgressFile(progress_path, "attack") as progress, bar:
        done = {(one.model, one.attack): one for one in progress.resume(header, _finished)}
        for name, load in models.items():
            for one, seconds in _attack(name, load, rows, settings, attacks, seed, done, progress_path):
                bar.update()
                if isinstance(one.scores, ValueError):
                    attacks = _without(attacks, one, left_out)
                    continue
                scores[name, one.attack] = one.scores
                if (name, one.attack) not in done:
                    progress.append([one._asdict() | {"scores": asdict(one.scores), "seconds": seconds}])
    outcomes = {
        name: _compare(attack.words, {model: scores[model, name] for model in models}, name)
        for name, attack in attacks.items()
    }
    return Recovery(dataset, said | {"seed": seed}, outcomes)


def recovery_of(unlearned: Sequence[float], never: Sequence[float], base: Sequence[float]) -> Estimate | None:
    """(unlearned - never) / (base - never) of mean scores, with its 95 % interval.

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
    low, high = bootstrap_interval(rows, ratio)
    return Estimate(value, low, high) if math.isfinite(low) and math.isfinite(high) else None


def _attack(
    name: str,
    load: Loader,
    rows: Dataset,
    settings: AttackSettings,
    attacks: Mapping[str, Attack],
    seed: int,
    done: Mapping[tuple[str, str], _Finished],
    progress_path: str | Path | None,
) -> Iterator[tuple[_Finished, float]]:
    """Every attack on one model, with its seconds; those that are done are not repeated."""
    gc.collect()  # the model before
    target = Target(*load(), rows, settings)
    weights = weights_fingerprint(target.model)
    for attack, entry in attacks.items():
        before, start = done.get((name, attack)), time.perf_counter()
        if before is not None and before.weights != weights:
            raise UserError(
                f"{progress_path} holds attacks on other weights under the name {name!r}. Choose another file, or "
                "delete this one to start anew."
            )
        if before is None:
            run = _no_attack if ADAPTER in entry.needs and not hasattr(target.model, "disable_adapter") else entry.run
            try:
                before = _Finished(name, weights, attack, run(target, seed))
            except ValueError as error:  # it cannot be made on these rows
                before = _Finished(name, weights, attack, error)
        yield before, time.perf_counter() - start


def _without(
    attacks: Mapping[str, Attack], refused: _Finished, left_out: Callable[[str, ValueError], None] | None
) -> dict[str, Attack]:
    """The other attacks, once it is said why this one is left out."""
    if left_out is None:
        raise refused.scores
    left_out(refused.attack, refused.scores)
    return {name: attack for name, attack in attacks.items() if name != refused.attack}


def _no_attack(target: Target, seed: int) -> AttackScores:
    return AttackScores(list(range(len(target.rows))), target.plain, target.plain)


def _compare(words: str, scores: Mapping[str, AttackScores], attack: str) -> AttackOutcome:
    """The outcome of one attack, from the scores of each model."""
    rows = scores[BASE].rows
    outcomes = {}
    for name, one in scores.items():
        if one.rows != rows:
            raise UserError(f"{attack} scored other rows of {name} than of {BASE}: they cannot be compared.")
        recovery = None
        if NEVER in scores and name not in (BASE, NEVER):
            recovery = recovery_of(one.after, scores[NEVER].after, scores[BASE].after)
        outcomes[name] = Outcome(_mean(one.before), _mean(one.after), recovery, one.path)
    return AttackOutcome(words, len(rows), outcomes)


def _mean(values: Sequence[float]) -> Estimate:
    return Estimate(math.fsum(values) / len(values), *bootstrap_interval(values))


def _settings(settings: AttackSettings) -> dict[str, Any]:
    """Every setting as a figure; of rows, how many. The batch size of decoding is left out: it changes nothing."""
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    decoding = {name: value for name, value in asdict(values.pop("decoding")).items() if name != "batch_size"}
    counted = {name: len(value) if isinstance(value, Dataset) else value for name, value in values.items()}
    return {"decoding": decoding} | counted


def _digests(settings: AttackSettings) -> dict[str, str]:
    """The rows among the settings, as hashes."""
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    return {
        name: digest([list(value[column]) for column in COLUMNS if column in value.column_names])
        for name, value in values.items()
        if isinstance(value, Dataset)
    }


def _finished(line: dict[str, Any]) -> _Finished:
    scores = typed(AttackScores, line["scores"])
    if not len(scores.rows) == len(scores.before) == len(scores.after) > 0:
        raise ValueError("not a score for every row")
    return _Finished(*(typed(str, line[name]) for name in ("model", "weights", "attack")), scores)


def _short(estimate: Estimate) -> str:
    """Two decimals: a ratio of differences has no more to say."""
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
