"""Forward passes for a given standard error: `response_likelihood` against the published estimators.

    python examples/benchmarks/likelihood.py
    python examples/benchmarks/likelihood.py --model_name_or_path outputs/demo/base

All are measured in one run: independent draws of (l, S) as LLaDA's paper has them (arXiv 2502.09992, appendix B),
whose error falls with the square root of their number; the draws of its script `get_log_likelihood.py`, spread evenly
over 1..L within batches of 16; and the spread of `response_likelihood` over seeds. The columns "i.i.d. passes" and
"even passes" say how many of the two kinds have the standard error of ours. Answers are what TOFU's truth ratio and
probability score on the embedded default: those that the model has learned by heart, the same in other words, and
wrong ones. Errors are the root of the mean square over answers, in nats. Without a model's name, a tiny one learns the
answers first.
"""

import argparse
import math
import tempfile
import time
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from mdu_trainer import (
    Backbone,
    MDLMConfig,
    MDLMTrainer,
    load_model,
    load_tokenizer,
    resolve_backbone,
    response_likelihood,
)
from mdu_trainer.data.rows import TokenizedRows, question_answer_rows, tokenize_rows
from mdu_trainer.evaluation.results import markdown_table
from mdu_trainer.models import logits_at
from mdu_trainer.testing import dataset_texts, fictional_authors, tiny_mdlm, train_tokenizer

PASSES = (8, 16, 32, 64, 128)
EVEN_BATCH = 16  # draws of LLaDA's script that are made together
COLUMNS = "answers,passes,standard error,i.i.d. error,i.i.d. passes,ratio,even error,even passes,ratio,claimed"


@torch.no_grad()
def published_draws(
    model: nn.Module, prompt: list[int], response: list[int], backbone: Backbone, size: np.ndarray, seed: int
) -> np.ndarray:
    """L/l * sum of log p over l masked positions, uniformly drawn, for each l of `size`, `[draws]`."""
    rng = np.random.default_rng(seed)
    length = len(response)
    ids = torch.tensor(prompt + response).repeat(len(size), 1)
    masked = torch.zeros_like(ids, dtype=torch.bool)
    masked[:, len(prompt) :] = torch.from_numpy(rng.random((len(size), length)).argsort(axis=1) < size[:, None])
    estimates = []
    for x, m in zip(ids.split(128), masked.split(128), strict=True):
        x, m = x.to(model.device), m.to(model.device)
        noisy = x.masked_fill(m, backbone.mask_token_id)
        logits = logits_at(model, noisy, torch.ones_like(x), m, logit_shift=backbone.logit_shift)
        log_p = logits.float().log_softmax(dim=-1).gather(1, x[m][:, None])[:, 0].double()
        estimates.append(torch.zeros(len(x), dtype=torch.float64).index_add(0, m.nonzero()[:, 0].cpu(), log_p.cpu()))
    return torch.cat(estimates).numpy() * length / size


def even_sizes(length: int, num_draws: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers of masked positions as LLaDA's script draws them, batch after batch: `[num_draws]`, whole batches.

    The first of a batch is uniform on 1..L, the others follow at steps of L / 16, rounded, and go on from 1 after L.
    """
    num_batches = num_draws // EVEN_BATCH
    first = rng.integers(1, length + 1, (num_batches, 1))
    size = np.round(first + np.arange(EVEN_BATCH) * length / EVEN_BATCH).astype(np.int64)
    return ((size - 1) % length + 1).ravel()


def learn(rows: Dataset, epochs: int, output_dir: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A tiny model that knows the rows' answers."""
    tokenizer = train_tokenizer(dataset_texts(rows.select_columns(["question", "answer"])))
    config = MDLMConfig(
        output_dir,
        num_train_epochs=epochs,
        per_device_train_batch_size=48,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        pad_with_end_tokens=True,
        time_weighting=False,
        prompt_mask_ratio=0.2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    train_dataset = question_answer_rows(rows, conversational=True)
    trainer = MDLMTrainer(tiny_mdlm(tokenizer), config, train_dataset=train_dataset, processing_class=tokenizer)
    trainer.train()
    return trainer.model, tokenizer


class Published(NamedTuple):
    """Of each answer, `[rows]`: variance of an independent draw; of a batch of evenly spread ones, times their number.

    Over a number of passes, each gives the variance of the mean of as many draws.
    """

    independent: np.ndarray
    even: np.ndarray


class Spread(NamedTuple):
    """Of each answer: variance of the estimate over seeds, mean square of the claimed standard error, and how far its
    mean lies from that of the i.i.d. draws, with the variance of that difference. All `[rows]`."""

    variance: np.ndarray
    claimed: np.ndarray
    difference: np.ndarray
    difference_variance: np.ndarray


def measure(
    model: nn.Module, rows: TokenizedRows, backbone: Backbone, num_seeds: int, num_draws: int
) -> tuple[Published, dict[int, Spread]]:
    """The variance of the published draws, and the spread of ours by the number of passes."""
    num_even = EVEN_BATCH * max(num_draws // EVEN_BATCH, 2)
    draws, even = [], []
    for seed, (prompt, response) in enumerate(zip(rows.prompt_ids, rows.completion_ids, strict=True)):
        rng, length = np.random.default_rng(seed), len(response)
        for found, size in (
            (draws, rng.integers(1, length + 1, num_draws)),
            (even, even_sizes(length, num_even, rng)),
        ):
            found.append(published_draws(model, prompt, response, backbone, size, seed))
    single = np.var(draws, axis=1, ddof=1)
    batches = np.reshape(even, (len(even), -1, EVEN_BATCH)).mean(axis=2)
    ours = {}
    for passes in PASSES:
        scores = [
            response_likelihood(
                model, rows.prompt_ids, rows.completion_ids, backbone, num_draws=passes, batch_size=128, seed=s
            )
            for s in range(num_seeds)
        ]
        values = np.stack([score.log_likelihood for score in scores])
        variance = values.var(axis=0, ddof=1)
        claimed = np.mean([score.standard_error**2 for score in scores], axis=0)
        difference = values.mean(axis=0) - np.mean(draws, axis=1)
        ours[passes] = Spread(variance, claimed, difference, variance / num_seeds + single / num_draws)
    return Published(single, EVEN_BATCH * batches.var(axis=1, ddof=1)), ours


def pooled(kinds: list[tuple[Published, dict[int, Spread]]]) -> tuple[Published, dict[int, Spread]]:
    """The answers of all kinds as one."""
    published, ours = zip(*kinds, strict=True)
    joined = {p: Spread(*(np.concatenate(x) for x in zip(*(one[p] for one in ours), strict=True))) for p in PASSES}
    return Published(*(np.concatenate(x) for x in zip(*published, strict=True))), joined


def lines(name: str, published: Published, ours: dict[int, Spread]) -> list[list[str]]:
    """The figures of one kind of answers, a row of the table for each number of passes."""
    rows = []
    for passes, spread in ours.items():
        variance = spread.variance.mean()
        independent, even = (x.mean() / variance for x in published)  # passes with the same standard error
        distance = spread.difference.sum() / math.sqrt(spread.difference_variance.sum())
        errors = (variance, published.independent.mean() / passes, published.even.mean() / passes)
        ours_error, independent_error, even_error = (f"{math.sqrt(one):.3f}" for one in errors)
        rows.append(
            [name, f"{passes}", ours_error, independent_error, f"{independent:.0f}", f"{independent / passes:.1f}"]
            + [even_error, f"{even:.0f}", f"{even / passes:.1f}", f"{math.sqrt(spread.claimed.mean()):.3f}"]
            + [f"{distance:.1f} se"]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="score this model; a tiny one is trained if not given")
    parser.add_argument("--epochs", type=int, default=300, help="epochs of the tiny model (two steps each)")
    parser.add_argument("--num_rows", type=int, default=6, help="answers of each kind")
    parser.add_argument("--num_seeds", type=int, default=32, help="repetitions of each estimate")
    parser.add_argument("--num_draws", type=int, default=2048, help="draws of each published kind, an answer")
    args = parser.parse_args()

    authors = fictional_authors()
    start = time.perf_counter()
    if args.model_name_or_path:
        model, tokenizer = load_model(args.model_name_or_path), load_tokenizer(args.model_name_or_path)
    else:
        with tempfile.TemporaryDirectory() as output_dir:
            model, tokenizer = learn(authors, args.epochs, output_dir)
    model.eval()
    backbone = resolve_backbone(model, tokenizer)
    print(f"model ready after {time.perf_counter() - start:.0f} s\n")
    some = authors.select(range(0, len(authors), len(authors) // args.num_rows)).select(range(args.num_rows))
    answers = {
        "learned": some["answer"],
        "paraphrased": some["paraphrased_answer"],
        "wrong": [wrong[0] for wrong in some["perturbed_answer"]],
    }
    kinds, table = [], [[*COLUMNS.split(","), "means differ by"]]
    for name, texts in answers.items():
        dataset = Dataset.from_dict({"question": some["question"], "answer": texts})
        dataset = question_answer_rows(dataset, conversational=bool(tokenizer.chat_template))
        rows = tokenize_rows(dataset, tokenizer, backbone, name=name)
        kinds.append(measure(model, rows, backbone, args.num_seeds, args.num_draws))
        table += lines(name, *kinds[-1])
    print(markdown_table(table + lines("all", *pooled(kinds))))
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
