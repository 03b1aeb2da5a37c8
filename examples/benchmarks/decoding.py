"""Seconds to decode a long response with a block-wise model, with what is kept of the finished blocks and without.

    python examples/benchmarks/decoding.py

Weights are random and nothing ends a response early: all tokens are decoded, by default one a step. Both take turns,
and must decode the same tokens. Reported are medians.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from mdu_trainer import DiffusionGenerationConfig
from mdu_trainer.inference.generation import generate_ids
from mdu_trainer.models import resolve_backbone
from mdu_trainer.testing import dataset_texts, fictional_authors, tiny_mdlm, train_tokenizer

VARIANTS = {"with a cache": True, "without": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, help="passes over a response; one a token if not given")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--block_size", type=int, default=32)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()

    tokenizer = train_tokenizer(dataset_texts(fictional_authors()))
    length = args.prompt_tokens + args.new_tokens + args.block_size
    size = {"hidden_size": args.hidden_size, "num_layers": args.num_layers, "max_position_embeddings": length}
    model = tiny_mdlm(tokenizer, block_size=args.block_size, **size)
    backbone = resolve_backbone(model, tokenizer)
    backbone = replace(backbone, end_token_ids=(-1,))  # no response ends early
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(10, len(tokenizer), (args.rows, args.prompt_tokens), generator=generator).tolist()
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    decoded = {}
    for _ in range(args.repeats):
        for name, cache in VARIANTS.items():
            config = DiffusionGenerationConfig(args.new_tokens, steps=args.steps, prefix_cache=cache)
            start = time.perf_counter()
            decoded[name] = generate_ids(model, prompts, config, backbone)
            seconds[name].append(time.perf_counter() - start)
    same = decoded["with a cache"] == decoded["without"]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"{args.rows} responses of {args.new_tokens} tokens in blocks of {args.block_size}; the same tokens: {same}\n"
    )
    print("| variant | seconds |\n|---|--:|")
    for name, median in medians.items():
        print(f"| {name} | {median:.2f} |")
    ratio = medians["without"] / medians["with a cache"]
    print(f"\n{'cache_speed':20} {ratio:.2f}")
    if args.json:
        figures = {"seconds": medians, "ratios": {"cache_speed": ratio}, "same_tokens": same}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
