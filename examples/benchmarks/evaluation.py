"""Evaluation against that of the release, a row at a time: the same figures, and how much sooner.

    python examples/benchmarks/evaluation.py --model_name_or_path outputs/demo/base
    python examples/benchmarks/evaluation.py --dataset_name locuslab/TOFU --parts decoding

Three sides answer the same questions in one process, and are timed part by part:

- release: as the code released with the MDU paper goes about it, in plain torch and with what `agreement.py` has of
  LLaDA's: decoding a row at a time in as many steps as tokens, always all of them, and for each of four answers of a
  row (the true one and three wrong ones) the 128 draws of LLaDA's script, in batches of 16.
- exact: `evaluate_tofu` as it is. The same tokens, and 16 passes an answer, which say as much as its 128 draws
  (`likelihood.py`).
- fast: `evaluate_tofu(..., decoding="fast")`, which measures its own error, at the cost of decoding 16 rows exactly.

Seconds are the process's own on a CPU, so that a busy machine changes little, and of the clock on a GPU. Without a
data set, rows are those of the embedded default; without a model, it is the embedded one, untrained and hence sure of
nothing: fast decoding gains little. On a CPU under Linux, glibc gives the buffers of a batch back to the kernel after
an operation and fetches them anew. This keeps them:

    export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_TOP_PAD_=67108864
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from agreement import log_likelihoods, semi_autoregressive
from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer
from torch import nn
from transformers import PreTrainedTokenizerBase

from mdu_trainer import Backbone, DiffusionGenerationConfig, load_model, load_tokenizer, resolve_backbone
from mdu_trainer.evaluation.results import markdown_table
from mdu_trainer.evaluation.sources import spread
from mdu_trainer.evaluation.tofu import evaluate_tofu, load_tofu, tofu_questions
from mdu_trainer.testing import dataset_texts, fictional_authors, tiny_mdlm, train_tokenizer

PARTS = {"decoding": ["rougeL"], "likelihood": ["probability", "truth_ratio"]}
SIDES = ("release", "exact", "fast")
WRONG_ANSWERS = 3
SCRIPT_DRAWS = 128


class Passes:
    """Counts the sequences that a model is run on."""

    def __init__(self, model: nn.Module):
        self.sequences = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.sequences += len(kwargs["input_ids"])


def released(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, backbone: Backbone, rows: Dataset, part: str, length: int
) -> float:
    """One part of the release's evaluation of some rows. Returns its ROUGE-L recall or probability, the mean."""
    questions = tofu_questions({"forget": rows}, tokenizer, backbone, metrics=PARTS[part])[0].questions
    scorer, found = RougeScorer(["rougeL"], use_stemmer=True), []
    for question in questions:
        if part == "decoding":
            shape = {"length": length, "steps": length, "block_length": length}
            ids = semi_autoregressive(model, question.prompt, backbone, torch.rand, **shape)
            ends = [i for i, token in enumerate(ids) if token in backbone.end_token_ids]
            text = tokenizer.decode(ids[: ends[0]] if ends else ids, skip_special_tokens=True)
            found.append(scorer.score(question.references[0], text)["rougeL"].recall)
        else:
            answers = [question.answers["answer"][0], *question.answers["perturbed"]]
            values = [
                log_likelihoods(model, question.prompt, ids, backbone, SCRIPT_DRAWS).mean() / len(ids)
                for ids in answers
            ]
            found.append(float(values[0].exp()))
    return sum(found) / len(found)


def ours(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    part: str,
    config: DiffusionGenerationConfig,
    decoding: str,
) -> tuple[float, str]:
    """The same by `evaluate_tofu`, and what it says of its approximation."""
    scores = evaluate_tofu(model, tokenizer, {"forget": rows}, config, metrics=PARTS[part], decoding=decoding)
    found = scores.run.scores["forget"]
    agreement, error = found.get("fast_token_agreement"), found.get("fast_rougeL_error")
    told = "" if agreement is None else f"{agreement.value:.3f} of tokens, rL +- {error.value:.3f}"
    return found["rougeL_recall" if part == "decoding" else "probability"].value, told


def timed(work: Callable[[], Any], passes: Passes, on_cpu: bool) -> tuple[float, int, Any]:
    """The seconds that work takes, its sequences, and its result."""
    clock, before = time.process_time if on_cpu else time.perf_counter, passes.sequences
    start = clock()
    result = work()
    return clock() - start, passes.sequences - before, result


def load(args: argparse.Namespace) -> tuple[nn.Module, PreTrainedTokenizerBase, Dataset]:
    """The model, its tokenizer, and rows with an answer and three wrong ones."""
    rows = load_tofu(args.dataset_name)["forget"] if args.dataset_name else fictional_authors()
    if args.model_name_or_path:
        model, tokenizer = load_model(args.model_name_or_path), load_tokenizer(args.model_name_or_path)
        model.to(torch.accelerator.current_accelerator() or "cpu")
    else:
        tokenizer = train_tokenizer(dataset_texts(rows))
        shape = {"vocab_size": args.vocab_size or len(tokenizer), "max_position_embeddings": 1024}
        model = tiny_mdlm(tokenizer, initializer_range=0.2, **shape)
    some = spread(rows, args.num_rows).to_list()
    kept = [{name: row[name] for name in ("question", "answer", "perturbed_answer")} for row in some]
    return (
        model.eval(),
        tokenizer,
        Dataset.from_list([row | {"perturbed_answer": row["perturbed_answer"][:WRONG_ANSWERS]} for row in kept]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="score this model; an untrained tiny one if not given")
    parser.add_argument("--dataset_name", help="TOFU: a Hub name or a folder; embedded rows if not given")
    parser.add_argument("--vocab_size", type=int, help="of the tiny model, such as LLaDA's 126464")
    parser.add_argument("--num_rows", type=int, default=32, help="questions")
    parser.add_argument(
        "--release_rows", type=int, help="questions to the release, whose rows cost the same each; all if not given"
    )
    parser.add_argument("--max_new_tokens", type=int, default=128, help="decoded tokens, and steps")
    parser.add_argument("--batch_size", type=int, default=32, help="sequences a forward pass of ours")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is timed")
    args = parser.parse_args()

    model, tokenizer, rows = load(args)
    backbone, passes = resolve_backbone(model, tokenizer), Passes(model)
    config = DiffusionGenerationConfig(args.max_new_tokens, batch_size=args.batch_size)
    on_cpu = next(model.parameters()).device.type == "cpu"
    ours(model, tokenizer, rows.select(range(1)), "decoding", DiffusionGenerationConfig(2), "exact")  # warms up
    few = spread(rows, args.release_rows)
    table = [["part", "side", "s / 100 rows", "passes / row", "times faster", "score", "of exact decoding"]]
    seconds: dict[str, dict[str, float]] = {}
    for part in args.parts:
        sides = {
            "release": lambda part: (released(model, tokenizer, backbone, few, part, args.max_new_tokens), ""),
            "exact": lambda part: ours(model, tokenizer, rows, part, config, "exact"),
            "fast": lambda part: ours(model, tokenizer, rows, part, config, "fast"),
        }
        if part == "likelihood":  # it decodes nothing
            sides.pop("fast")
        took = seconds[part] = {}
        for name, side in sides.items():
            seconds_taken, count, (score, told) = timed(partial(side, part), passes, on_cpu)
            asked = len(few if name == "release" else rows)
            took[name] = 100 * seconds_taken / asked
            speed = [f"{took[name]:.1f}", f"{count / asked:.0f}"]
            table.append([part, name, *speed, f"{took['release'] / took[name]:.1f}", f"{score:.3f}", told])
    whole = {name: sum(took.get(name, took["exact"]) for took in seconds.values()) for name in SIDES}
    for name in SIDES:
        times = f"{whole['release'] / whole[name]:.1f}"
        table.append(["whole", name, f"{whole[name]:.1f}", "", times, "", ""])
    print(markdown_table(table, text_columns=2))


if __name__ == "__main__":
    main()
