"""Batched evaluation against one example at a time: the same figures, and how much sooner.

    python examples/benchmarks/evaluation.py
    python examples/benchmarks/evaluation.py --model_name_or_path outputs/demo/base

Rows are those of the embedded default; without a model's name, the model is its tiny one, untrained. Both sides run
the same code in one process and by turns; one example at a time is a batch of one sequence, for decoding as for the
likelihood. "elsewhere" is what is no forward pass of the model: masks, revealing, metrics.
"""

import argparse
import time

import torch

from mdu_trainer import DiffusionGenerationConfig, load_model, load_tokenizer, resolve_backbone
from mdu_trainer.evaluation.report import markdown_table
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
    length = longest_answer(sets, tokenizer)
    rows = [["part", "batch", "seconds", "passes", "elsewhere s", "rows/s", "times faster", "largest difference"]]
    for part, metrics in PARTS.items():
        first = None
        for size in (1, args.batch_size):
            config = DiffusionGenerationConfig(max_new_tokens=length, batch_size=size)
            questions = tofu_questions(sets, tokenizer, backbone, config, metrics, args.num_draws)
            timer = ForwardTimer(model)
            scored = score_questions(model, tokenizer, questions, backbone=backbone)
            figures = [value for values in scored.figures["forget"].values() for value in values]
            first = first or (scored.seconds, figures)
            difference = max(abs(a - b) for a, b in zip(figures, first[1], strict=True))
            rows.append(
                [part, str(size), f"{scored.seconds:.2f}", str(timer.passes), f"{scored.seconds - timer.seconds:.2f}"]
                + [f"{args.num_rows / scored.seconds:.1f}", f"{first[0] / scored.seconds:.1f}", f"{difference:.0e}"]
            )
    total = {size: sum(float(row[2]) for row in rows[1:] if row[1] == str(size)) for size in (1, args.batch_size)}
    print(markdown_table(rows))
    print(
        f"\nIn all {total[1]:.1f} s against {total[args.batch_size]:.1f} s: {total[1] / total[args.batch_size]:.1f}x"
    )


if __name__ == "__main__":
    main()
