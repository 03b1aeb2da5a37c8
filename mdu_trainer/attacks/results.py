"""The outcome of attacks on several models: how much of what they were made to forget comes back. Numbers only.

Recovery is (unlearned - never trained) / (base - never trained), of mean scores under an attack: 0 is what the attack
gets out of a model that never saw the rows, 1 what it gets out of the model before unlearning.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..evaluation.results import Estimate, markdown_table
from ..files import Record

BASE, NEVER = "base", "never trained"  # what tables call the two ends of the scale
NO_ATTACK = "none"
WEIGHT_WORDS = (
    "Distance is that of the weights from the base, as a share of the base's norm; losses are those of the forget "
    "rows on the straight line to the base, in nats a token. A small distance without a barrier goes with knowledge "
    "that fine-tuning brings back (arXiv 2505.22310)."
)
TWO_SIDED, REFERENCE, PRIVACY = "two_sided", "reference", "privacy"  # in the path of `membership`
MEMBERSHIP_WORDS = {  # in the path of `membership` -> a sentence that its figures end
    TWO_SIDED: "Membership, where rows that became too unlikely tell as well (0.5 is a guess)",
    REFERENCE: "The same for whoever takes off the log-likelihoods of the model that never saw the rows",
    PRIVACY: "Privacy score, by likelihoods (1: they tell no more than those of the model that never saw the rows)",
}


@dataclass(frozen=True)
class Outcome:
    """The outcome of an attack on one model, as means over rows with intervals.

    Attributes:
        before, after: score of the rows with no attack, and under it.
        recovery: None for the base and a model that never saw the rows, without such a model, and where the two cannot
            be told apart under the attack.
        path: what was measured along the way, as name -> mean score.
        reached_by: the one of the path that brought back most by itself, where several were tried; "" if none did
            better than the others.
    """

    before: Estimate
    after: Estimate
    recovery: Estimate | None = None
    path: dict[str, float] = field(default_factory=dict)
    reached_by: str = ""


@dataclass(frozen=True)
class AttackOutcome:
    """The outcome of an attack on every model.

    Attributes:
        words: what it does.
        rows: how many were scored.
        models: name -> outcome; "base", "never trained" if there is one, and the unlearned models.
    """

    words: str
    rows: int
    models: dict[str, Outcome]


@dataclass(frozen=True)
class WeightPath:
    """How far a model is from the base, and the forget loss on the straight line between the two.

    Attributes:
        distance: L2 norm of the difference of all weights, over that of the base's weights.
        losses: share of the way to the base -> mean cross-entropy of the forget rows' masked tokens, in nats.
    """

    distance: float
    losses: dict[str, float]

    @property
    def barrier(self) -> float:
        """The most by which the loss rises above the straight line between its two ends, in nats; 0 if it does not."""
        points = {float(at): loss for at, loss in self.losses.items()}
        first, last = points[min(points)], points[max(points)]
        return max(0.0, *(loss - (first + at * (last - first)) for at, loss in points.items()))


@dataclass(frozen=True)
class Recovery(Record):
    """Attacks on one or more unlearned models, beside the base and a model that never saw the rows. Numbers only.

    Attributes:
        dataset: what the rows are called.
        settings: how hard the attacks tried, and the seed.
        attacks: name -> outcome; "none" first, the plain question.
        weights: name of a model -> the way from its weights to the base's, where they can be compared.
    """

    kind: ClassVar[str] = "recovery file"
    remedy: ClassVar[str] = "repeat the attacks"

    dataset: str
    settings: dict[str, Any]
    attacks: dict[str, AttackOutcome]
    weights: dict[str, WeightPath] = field(default_factory=dict)

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
        """Return the recoveries that are defined: name of an unlearned model -> name of an attack -> recovery."""
        found = {
            name: {attack: r for attack, one in self.attacks.items() if (r := one.models[name].recovery) is not None}
            for name in self.models
        }
        return {name: of_model for name, of_model in found.items() if of_model}

    def two_sided(self) -> dict[str, float]:
        """Return the area under the curve of `membership` on each model, in whichever direction tells most.

        None of the table: there rows that became too unlikely, from which nothing comes back, count as no leak.
        """
        return self._membership(TWO_SIDED)

    def _membership(self, figure: str) -> dict[str, float]:
        """Return what `membership` has measured along the way, of each model where it has."""
        outcome = self.attacks.get("membership")
        models = {} if outcome is None else outcome.models
        return {name: one.path[figure] for name, one in models.items() if figure in one.path}

    def membership_words(self, titles: Mapping[str, str] | None = None) -> str:
        """Return a sentence on each of `MEMBERSHIP_WORDS` that was measured.

        Args:
            titles: name of a model -> what to call it; all models by their names unless given.
        """
        sentences = []
        for figure, words in MEMBERSHIP_WORDS.items():
            found = self._membership(figure)
            titled = dict(zip(found, found, strict=True)) if titles is None else titles
            listed = ", ".join(f"{title} {found[name]:.3f}" for name, title in titled.items() if name in found)
            sentences += [f"{words}: {listed}."] if listed else []
        return " ".join(sentences)

    def table(self) -> str:
        """Return the cells of `table_cells` as a Markdown table."""
        return markdown_table(self.table_cells())

    def table_cells(self) -> list[list[str]]:
        """Return the attacks, one a row, under a header: mean scores under the attack, and recoveries."""
        ends = [BASE, NEVER] if self.has_floor else [BASE]
        header = ["attack", *ends]
        for name in self.models:
            header += [name, "recovery"] if self.has_floor else [name]
        rows = [header]
        for attack, outcome in self.attacks.items():
            cells = [f"{outcome.models[name].after.value:.3f}" for name in ends]
            for one in (outcome.models[name] for name in self.models):
                cells.append(f"{one.after.value:.3f}")
                if self.has_floor:
                    cells.append("" if one.recovery is None else _short(one.recovery))
            rows.append([attack, *cells])
        return rows

    def way_cells(self) -> list[list[str]]:
        """Return the way by which each attack got most out of each model, one attack a row, under a header."""
        rows = [["attack", *self.models]]
        for attack, outcome in self.attacks.items():
            ways = [outcome.models[name].reached_by for name in self.models]
            if any(ways):
                rows.append([attack, *ways])
        return rows

    def weight_cells(self) -> list[list[str]]:
        """Return the weights' distances, losses and barriers, one model a row, under a header."""
        points = list(next(iter(self.weights.values())).losses)
        rows = [["weights", "distance", *(f"loss at {at}" for at in points), "barrier"]]
        for name, path in self.weights.items():
            losses = [f"{path.losses[at]:.2f}" for at in points]
            rows.append([name, f"{path.distance:.3f}", *losses, f"{path.barrier:.2f}"])
        return rows

    def text(self) -> str:
        """Return the table, and what its numbers mean."""
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
        if len(ways := self.way_cells()) > 1:
            table = markdown_table(ways, text_columns=len(ways[0]))
            parts.append(f"Where several ways were tried, the one that brought back most:\n\n{table}")
        if words := self.membership_words():
            parts.append(words)
        if self.weights:
            parts += [markdown_table(self.weight_cells()), WEIGHT_WORDS]
        if any(one.low == one.high for found in self.recoveries().values() for one in found.values()):
            rows = max(outcome.rows for outcome in self.attacks.values())
            parts.append(
                f"An interval without width is not certainty: all rows agreed, and there are {rows} of them. What one "
                f"row in {max(1, rows // 3)} gives away can be missed so."
            )
        return "\n\n".join(parts)


def _short(estimate: Estimate) -> str:
    """Return an estimate with two decimals: a ratio of differences has no more to say."""
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
