"""What a model still knows of question-answer pairs, as TOFU asks it (Maini et al., 2024, arXiv 2401.06121)."""

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data import question_answer_rows, tokenize_rows
from ..generation import DiffusionGenerationConfig, generate_ids
from ..likelihood import response_likelihood
from ..models import Backbone, resolve_backbone
from .metrics import RougeL
from .report import Estimate, Scores


def score_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    generation_config: DiffusionGenerationConfig | None = None,
    *,
    backbone: Backbone | None = None,
    num_draws: int = 8,
    show_progress: bool = False,
) -> Scores:
    """Decode an answer to each question and estimate the likelihood of the true one.

    Args:
        model: a masked diffusion language model.
        tokenizer: the model's; questions become chat turns if it has a chat template.
        dataset: columns `question` and `answer`.
        generation_config: of the decoding; its batch size and seed serve the likelihood too.
        backbone: of the model; resolved if not given.
        num_draws: passes a row for the likelihood.
        show_progress: show progress bars.

    Returns:
        Means over rows of ROUGE-L recall and F1 (stemmed) and of the probability a token.
    """
    config = generation_config or DiffusionGenerationConfig()
    backbone = backbone or resolve_backbone(model, tokenizer)
    rows = tokenize_rows(
        question_answer_rows(dataset, conversational=bool(tokenizer.chat_template)), tokenizer, backbone, name="eval"
    )
    answers = generate_ids(model, rows.prompts, config, backbone, show_progress=show_progress)
    rouge = RougeL().compute(
        predictions=tokenizer.batch_decode(answers, skip_special_tokens=True), references=dataset["answer"]
    )
    likelihood = response_likelihood(
        model,
        rows.prompts,
        rows.responses,
        backbone,
        num_draws=num_draws,
        batch_size=config.batch_size,
        seed=config.seed,
        show_progress=show_progress,
    )
    figures = rouge | {"probability": float(likelihood.probability.mean())}
    return {name: Estimate(value) for name, value in figures.items()}
