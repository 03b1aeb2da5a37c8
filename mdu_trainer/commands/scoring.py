"""Score models on questions and answers, as a command line asks for it. Finished rows are kept, as figures only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..evaluation.protocol import Protocol, Rouge
from ..evaluation.tofu import TofuResult, TruthRatios, evaluate_tofu, longest_answer
from ..inference.config import DECODING_HELP, Decoding, DiffusionGenerationConfig, decoded_as
from .checks import check_least


@dataclass
class ScoringArguments:
    """How many rows are scored, and how their answers are decoded."""

    max_eval_rows: int | None = field(default=400, metadata={"help": "Score N evenly spaced rows of each set."})
    batch_size: int = field(default=32, metadata={"help": "Sequences a forward pass when scoring."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Decoded tokens; the longest answer if unset."})
    decoding_steps: int | None = field(default=None, metadata={"help": "Decoding steps; one a token if unset."})
    decoding: Decoding = field(default="exact", metadata={"help": DECODING_HELP})
    likelihood_draws: int = field(default=16, metadata={"help": "Passes a row for the probability."})
    protocol: Protocol = field(
        default="ours", metadata={"help": "Ask and score as we do, or as the release of the MDU paper does."}
    )
    rouge: Rouge = field(default="recall", metadata={"help": "What tables and pictures show as rL of ROUGE-L."})


def check_scoring(args: ScoringArguments) -> None:
    """Refuse numbers that are too small."""
    check_least(args, max_eval_rows=1, batch_size=1, max_new_tokens=1, decoding_steps=1, likelihood_draws=1)


class Scorer:
    """Score one model after the other on the same sets.

    Args:
        sets: name of a set -> `question` and `answer`, and what the metrics need.
        args: how they are scored.
        metrics: names in `mdu_trainer.evaluation.registry.METRICS`.

    Attributes:
        retain_log: truth ratios of a model that never saw the forget rows; once set, they give the models that follow
            their forget quality.
    """

    def __init__(
        self,
        sets: Mapping[str, Dataset],
        args: ScoringArguments,
        metrics: Sequence[str] = ("rougeL", "probability"),
    ):
        self.sets, self.args, self.metrics = sets, args, metrics
        self.retain_log: TruthRatios | None = None

    def __call__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        method: str,
        progress_path: Path,
        sets: Mapping[str, Dataset] | None = None,
        name: str | None = None,
    ) -> TofuResult:
        """Score a model. Every process of a launch must call this.

        Args:
            model, tokenizer: what answers.
            method: what the run is called.
            progress_path: file that keeps finished rows, to continue a killed run.
            sets: other sets than all; answers are decoded to the longest of all sets.
            name: what the progress bar calls the model; the method unless given.
        """
        result = evaluate_tofu(
            model,
            tokenizer,
            self.sets if sets is None else sets,
            self.decoding(tokenizer),
            decoding=self.args.decoding,
            metrics=self.metrics,
            retain_log=self.retain_log,
            method=method,
            num_draws=self.args.likelihood_draws,
            progress_path=progress_path,
            show_progress=name or method,
            protocol=self.args.protocol,
        )
        return replace(result, run=replace(result.run, rouge=self.args.rouge))

    def decoding(self, tokenizer: PreTrainedTokenizerBase) -> DiffusionGenerationConfig:
        """Return how answers are decoded, which is kept beside the models that are scored."""
        config = DiffusionGenerationConfig(
            max_new_tokens=self.args.max_new_tokens or longest_answer(self.sets, tokenizer),
            steps=self.args.decoding_steps,
            batch_size=self.args.batch_size,
        )
        return decoded_as(config, self.args.decoding)
