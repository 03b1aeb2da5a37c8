"""Decoding and likelihood against the published code: how many rows agree to the token, and within which error.

    python examples/benchmarks/agreement.py
    python examples/benchmarks/agreement.py --model_name_or_path outputs/demo/base

The published loops stand here in plain torch, one row at a time, with the full logits of each pass and the dtypes that
were published: LLaDA's `generate.py` and `get_log_likelihood.py`, dllm's `MDLMSampler`, Dream's `_sample`. [MASK] and
padding are forbidden on both sides, and what is random is drawn alike. Without a model's name, the model is the
embedded tiny one, untrained.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdu_trainer import (
    Backbone,
    DiffusionGenerationConfig,
    load_model,
    load_tokenizer,
    resolve_backbone,
    response_likelihood,
)
from mdu_trainer.data.rows import TokenizedRows, question_answer_rows, tokenize_rows
from mdu_trainer.evaluation.results import markdown_table
from mdu_trainer.evaluation.sources import spread
from mdu_trainer.inference.generation import generate_ids
from mdu_trainer.inference.sampling import POSITIONS, uniform
from mdu_trainer.testing import dataset_texts, fictional_authors, tiny_mdlm, train_tokenizer

SCRIPT_BATCH = 16  # draws of LLaDA's script that are made together

Noise = Callable[[int], Tensor]  # step -> what stands for torch.rand, `[L]`


def logits_of(model: nn.Module, x: Tensor, backbone: Backbone, start: int, cfg_scale: float = 0.0) -> Tensor:
    """The logits of `x` `[1, L]` at each position `[L, V]`, guided, with [MASK] and padding forbidden."""
    if cfg_scale > 0:
        un_x = x.clone()
        un_x[:, :start] = backbone.mask_token_id
        logits, un_logits = torch.chunk(model(input_ids=torch.cat([x, un_x])).logits, 2)
        logits = un_logits + (cfg_scale + 1) * (logits - un_logits)
    else:
        logits = model(input_ids=x).logits
    if backbone.logit_shift:
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    logits[:, :, list({backbone.mask_token_id, backbone.pad_token_id} - set(backbone.end_token_ids))] = -torch.inf
    return logits[0]


def llada_counts(num_masked: int, steps: int) -> list[int]:
    """LLaDA's `get_num_transfer_tokens`."""
    counts = torch.zeros(steps, dtype=torch.int64) + num_masked // steps
    counts[: num_masked % steps] += 1
    return counts.tolist()


def dllm_counts(num_masked: int, steps: int) -> list[int]:
    """dllm's `get_num_transfer_tokens`, with its linear scheduler in float32."""
    counts = []
    for t in range(steps, 0, -1):
        s_rate, t_rate = (1 - (1 - torch.tensor(i / steps, dtype=torch.float32)) for i in (t - 1, t))
        share = 1 - (s_rate / t_rate).item()
        counts.append(min(int(torch.round(torch.tensor(num_masked, dtype=torch.float64) * share)), num_masked))
        num_masked -= counts[-1]
    return counts


@torch.no_grad()
def semi_autoregressive(
    model: nn.Module,
    prompt: list[int],
    backbone: Backbone,
    noise: Noise,
    *,
    length: int,
    steps: int,
    block_length: int,
    get_counts: Callable[[int, int], list[int]] = llada_counts,
    remasking: str = "low_confidence",
    cfg_scale: float = 0.0,
) -> list[int]:
    """The loop of LLaDA's `generate` and of dllm's `MDLMSampler`, which differ in their counts."""
    mask, start = backbone.mask_token_id, len(prompt)
    x = torch.tensor([prompt + [mask] * length], device=model.device)
    num_blocks = math.ceil(length / block_length)
    block_steps = math.ceil(steps / num_blocks)
    for block in range(num_blocks):
        stop = min(start + (block + 1) * block_length, x.shape[1])
        counts = get_counts(stop - start - block * block_length, block_steps)
        for i, count in enumerate(counts):
            logits = logits_of(model, x, backbone, start, cfg_scale)
            x0 = logits.argmax(dim=-1)
            if remasking == "low_confidence":
                x0_p = F.softmax(logits, dim=-1).gather(-1, x0[:, None])[:, 0]
            else:
                x0_p = noise(block * block_steps + i)
            x0_p[stop:] = -torch.inf
            confidence = torch.where(x[0] == mask, x0_p, -torch.inf)
            chosen = confidence.topk(count).indices
            x[0, chosen] = x0[chosen]
    return x[0, start:].tolist()


@torch.no_grad()
def dream(
    model: nn.Module, prompt: list[int], backbone: Backbone, noise: Noise, *, length: int, steps: int, alg: str
) -> list[int]:
    """The loop of Dream's `_sample` at temperature 0."""
    mask, start = backbone.mask_token_id, len(prompt)
    x = torch.tensor([prompt + [mask] * length], device=model.device)
    timesteps = torch.linspace(1, 1e-3, steps + 1, device=model.device)
    for i in range(steps):
        mask_index = x[0] == mask
        t, s, last = timesteps[i], timesteps[i + 1], i == steps - 1
        probs = logits_of(model, x, backbone, start)[mask_index].softmax(dim=-1)
        confidence, x0 = probs.max(dim=-1)
        if alg == "origin":
            transferred = noise(i)[mask_index] < (1.0 if last else 1 - s / t)
            x[0, mask_index.nonzero()[:, 0][transferred]] = x0[transferred]
            continue
        if alg == "topk_margin":
            ordered = probs.sort(dim=-1, descending=True).values
            confidence = ordered[:, 0] - ordered[:, 1]
        elif alg == "entropy":
            confidence = (probs * (probs + 1e-10).log()).sum(dim=-1)
        count = int(mask_index.sum()) if last else int(mask_index.sum() * (1 - s / t))
        chosen = confidence.topk(count).indices
        x[0, mask_index.nonzero()[:, 0][chosen]] = x0[chosen]
    return x[0, start:].tolist()


@torch.no_grad()
def log_likelihoods(model: nn.Module, prompt: list[int], answer: list[int], backbone: Backbone, mc_num: int) -> Tensor:
    """LLaDA's `get_log_likelihood`: the estimate of each of its batches, of which it returns the mean, `[batches]`."""
    seq = torch.tensor([prompt + answer], device=model.device).repeat(SCRIPT_BATCH, 1)
    length, found = len(answer), []
    for _ in range(mc_num // SCRIPT_BATCH):
        k = int(torch.randint(1, length + 1, ()))
        x = torch.linspace(k, k + (SCRIPT_BATCH - 1) * (length / SCRIPT_BATCH), steps=SCRIPT_BATCH).round().long()
        x = (x - 1) % length + 1
        is_mask = torch.arange(length).repeat(SCRIPT_BATCH, 1) < x[:, None]
        is_mask = torch.stack([row[torch.randperm(length)] for row in is_mask])
        is_mask = torch.cat([torch.zeros(SCRIPT_BATCH, len(prompt), dtype=torch.bool), is_mask], dim=1).to(seq.device)
        p_mask = (x / length)[:, None].repeat(1, seq.shape[1]).to(seq.device)
        logits = model(input_ids=torch.where(is_mask, backbone.mask_token_id, seq)).logits
        if backbone.logit_shift:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        loss = F.cross_entropy(logits[is_mask].float(), seq[is_mask], reduction="none") / p_mask[is_mask]
        found.append(-loss.sum().item() / SCRIPT_BATCH)
    return torch.tensor(found, dtype=torch.float64)


def cases(length: int) -> list[tuple[str, str, str, Callable[..., list[int]], dict[str, Any]]]:
    """Whose decoder, its rule, its shape in words, the published loop, and our options for it."""
    found = []
    most, block = length // 2, length // 4
    odd = length * 3 // 8  # steps that divide neither a response nor half of it
    shapes = [(length, length), (most, block), (odd, length), (odd, most)]  # steps, and tokens of a block
    for name, get_counts, schedule in (("LLaDA", llada_counts, "linear"), ("dllm", dllm_counts, "dllm")):
        further = [(odd // 2 + 1, block + 2)] if name == "dllm" else []  # blocks that divide nothing
        for remasking, cfg_scale in (("low_confidence", 0.0), ("low_confidence", 0.5), ("random", 0.0)):
            for steps, block_length in shapes + further:
                options = {"steps": steps, "block_length": block_length}
                options |= {"remasking": remasking, "cfg_scale": cfg_scale}
                words = f"{steps} steps, blocks of {block_length}"
                rule = remasking + (f", guidance {cfg_scale}" if cfg_scale else "")
                loop = partial(semi_autoregressive, length=length, get_counts=get_counts, **options)
                found.append((name, rule, words, loop, options | {"schedule": schedule}))
    rules = {"maskgit_plus": "low_confidence", "topk_margin": "margin", "entropy": "entropy", "origin": "random"}
    for alg, remasking in rules.items():
        for steps in (length, odd):
            options = {"steps": steps, "remasking": remasking, "schedule": "dream"}
            found.append(
                ("Dream", alg, f"{steps} steps", partial(dream, length=length, steps=steps, alg=alg), options)
            )
    return found


def decoding_table(model: nn.Module, rows: TokenizedRows, backbone: Backbone, length: int, seed: int) -> str:
    """How many rows of each case decode to the same tokens, up to the first end token."""

    def cut(ids: list[int]) -> list[int]:
        ends = [i for i, token in enumerate(ids) if token in backbone.end_token_ids]
        return ids[: ends[0]] if ends else ids

    def noise_of(row: int, start: int, step: int) -> Tensor:
        drawn = uniform(seed, POSITIONS, torch.tensor([row]), step, torch.arange(length))
        return torch.cat([torch.zeros(start, dtype=drawn.dtype), drawn]).to(model.device)

    table = [["decoder", "rule", "shape", "rows that agree"]]
    for name, rule, words, loop, options in cases(length):
        config = DiffusionGenerationConfig(length, seed=seed, batch_size=16, **options)
        ours = generate_ids(model, rows.prompt_ids, config, backbone)
        same = 0
        for row, prompt in enumerate(rows.prompt_ids):
            same += cut(loop(model, prompt, backbone, partial(noise_of, row, len(prompt)))) == ours[row]
        table.append([name, rule, words, f"{same} of {len(ours)}"])
    return markdown_table(table, text_columns=3)


def likelihood_line(model: nn.Module, rows: TokenizedRows, backbone: Backbone, args: argparse.Namespace) -> str:
    """The sum of all answers' log-likelihoods by both, and how far they lie apart in standard errors."""
    torch.manual_seed(args.seed)
    pairs = zip(rows.prompt_ids, rows.completion_ids, strict=True)
    theirs = torch.stack([log_likelihoods(model, *pair, backbone, args.mc_num) for pair in pairs])
    pairs = rows.prompt_ids, rows.completion_ids
    ours = response_likelihood(model, *pairs, backbone, num_draws=16, batch_size=16, seed=args.seed)
    of_theirs = float((theirs.var(dim=1) / theirs.shape[1]).sum())
    of_ours = float((ours.standard_error**2).sum())
    total, other = float(theirs.mean(dim=1).sum()), float(ours.log_likelihood.sum())
    return (
        f"log p of {len(theirs)} answers: LLaDA's script with {args.mc_num} draws {total:.2f} +- "
        f"{math.sqrt(of_theirs):.2f}, ours with 16 passes {other:.2f} +- {math.sqrt(of_ours):.2f}; they differ by "
        f"{(other - total) / math.sqrt(of_theirs + of_ours):+.1f} standard errors"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="compare with this model; an untrained tiny one if not given")
    parser.add_argument("--num_rows", type=int, default=16, help="prompts, and answers for the likelihood")
    parser.add_argument("--length", type=int, default=32, help="decoded tokens, a multiple of 16")
    parser.add_argument("--mc_num", type=int, default=128, help="draws of LLaDA's script, a multiple of 16 from 32 on")
    parser.add_argument("--seed", type=int, default=0, help="of what is random")
    args = parser.parse_args()

    authors = fictional_authors()
    if args.model_name_or_path:
        model, tokenizer = load_model(args.model_name_or_path), load_tokenizer(args.model_name_or_path)
        model.to(torch.accelerator.current_accelerator() or "cpu")
    else:
        tokenizer = train_tokenizer(dataset_texts(authors))
        model = tiny_mdlm(tokenizer, initializer_range=0.2)
    model.eval()
    backbone = resolve_backbone(model, tokenizer)
    some = question_answer_rows(
        spread(authors, args.num_rows).select_columns(["question", "answer"]),
        conversational=bool(tokenizer.chat_template),
    )
    rows = tokenize_rows(some, tokenizer, backbone, name="benchmark")
    print(decoding_table(model, rows, backbone, args.length, args.seed))
    print(f"\n{likelihood_line(model, rows, backbone, args)}")


if __name__ == "__main__":
    main()
