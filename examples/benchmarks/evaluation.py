"""Batched evaluation against one example at a time: the same figures, and how much sooner.

    python examples/benchmarks/evaluation.py
    python examples/benchmarks/evaluation.py --model_name_or_path outputs/demo/base

Rows are those of the embedded default; without a model's name, the model is its tiny one, untrained. Both sides run
the same code in one process and by turns; one example at a time is a batch of one sequence, for decoding as for the
likelihood. Reported are medians. "elsewhere" is what is no forward pass of the model: masks, revealing, metrics.

On a CPU under Linux, glibc gives the buffers of a batch back to the kernel after an operation and fetches them anew,
which costs batches a few percent on a quiet machine and up to a quarter on a busy one. This keeps them:

    export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_TOP_PAD_=67108864
"""

import argparse
import statistics
import time
from collections import defaultdict

import torch

from mdu_trainer import DiffusionGenerationConfig, load_model, load_tokenizer, resolve_backbone
from mdu_trainer.evaluation.results import markdown_table
from mdu_trainer.evaluation.runner import score_questions
from mdu_trainer.evaluation.sources import spread
from mdu_trainer.evaluation.tofu import longest_answer, tofu_questions
from mdu_trainer.testing import dataset_texts, fictional_authors, tiny_mdlm, train_tokenizer

PARTS = {"decoding": ["rougeL"], "likelihood": ["probability", "truth_ratio"]}


class ForwardTimer:
    """Seconds and number of a model's forward passes."""

    def __init__(self, model: torch.nn.Module):
        self.seconds = self.passes = 0
        model.register_forward_pre_hook(self._start)
        model.register_forward_hook(self._stop)

    def _start(self, *_) -> None:
        self._began = time.perf_counter()

    def _stop(self, model: torch.nn.Module, *_) -> None:
        if next(model.parameters()).is_cuda:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._began
        self.passes += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="score this model; an untrained tiny one if not given")
    parser.add_argument("--num_rows", type=int, default=48, help="questions")
    parser.add_argument("--batch_size", type=int, default=48, help="sequences a forward pass of the batched side")
    parser.add_argument("--num_draws", type=int, default=8, help="forward passes for the likelihood of an answer")
    parser.add_argument("--turns", type=int, default=5, help="times that each side is run; medians are reported")
    args = parser.parse_args()

    authors = fictional_authors()
    if args.model_name_or_path:
        model, tokenizer = load_model(args.model_name_or_path), load_tokenizer(args.model_name_or_path)
        model.to(torch.accelerator.current_accelerator() or "cpu")
    else:
        tokenizer = train_tokenizer(dataset_texts(authors))
        model = tiny_mdlm(tokenizer, initializer_range=0.2)  # sharp: no two choices are as close as rounding
    backbone = resolve_backbone(model, tokenizer)
    sets = {"forget": spread(authors, args.num_rows)}
    length, timer = longest_answer(sets, tokenizer), ForwardTimer(model)
    sizes = (1, args.batch_size)
    figures, seconds, elsewhere, passes = {}, defaultdict(list), defaultdict(list), {}
    for turn in range(args.turns + 1):  # the first warms up
        for part, metrics in PARTS.items():
            for size in sizes:
                config = DiffusionGenerationConfig(max_new_tokens=length, batch_size=size)
                questions = tofu_questions(sets, tokenizer, backbone, config, metrics, args.num_draws)
                timer.seconds = timer.passes = 0
                scored = score_questions(model, tokenizer, questions, backbone=backbone)
                figures[part, size] = [value for values in scored.scores["forget"].values() for value in values]
                passes[part, size] = timer.passes
                if turn:
                    seconds[part, size].append(scored.seconds)
                    elsewhere[part, size].append(scored.seconds - timer.seconds)
    rows = [["part", "batch", "seconds", "passes", "elsewhere s", "rows/s", "times faster", "largest difference"]]
    took = {key: statistics.median(values) for key, values in seconds.items()}
    for part in PARTS:
        for size in sizes:
            difference = max(abs(a - b) for a, b in zip(figures[part, size], figures[part, 1], strict=True))
            rows.append(
                [part, str(size), f"{took[part, size]:.2f}", str(passes[part, size])]
                + [f"{statistics.median(elsewhere[part, size]):.2f}", f"{args.num_rows / took[part, size]:.1f}"]
                + [f"{took[part, 1] / took[part, size]:.1f}", f"{difference:.0e}"]
            )
    one, many = (sum(took[part, size] for part in PARTS) for size in sizes)
    print(markdown_table(rows))
    print(f"\nIn all {one:.2f} s against {many:.2f} s: {one / many:.2f}x")


if __name__ == "__main__":
    main()
