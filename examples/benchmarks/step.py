"""Seconds and memory of a step: the textbook MDU step, ours, and plain fine-tuning, all weights trained and with LoRA.

    python examples/benchmarks/step.py                                      # on a CPU
    python examples/benchmarks/step.py --shape llada-8b --json step.json    # on a GPU
    python examples/benchmarks/step.py --block_size 32                      # a block-wise model, by block and in full

A step is the loss and its gradients on one batch of forget rows, without the optimiser. The textbook step makes the
logits of all positions in both passes and keeps a frozen copy of the model. Each variant runs in a process of its own.
A block-wise model learns from the noisy tokens beside the clean ones, twice the tokens of a pass in full.
On a CPU all are ready before the first is timed, and they take turns; a GPU has no room for all of them, so there they
run one after the other. Reported are medians, and the peak of memory above the weights of the model in training.
"""

import argparse
import copy
import gc
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.nn.functional import kl_div
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mdu_trainer import MDLMConfig, MDLMTrainer, MDUConfig, MDUTrainer, corrupt
from mdu_trainer.masking import MaskSchedule
from mdu_trainer.models import SDARConfig, SDARForCausalLM
from mdu_trainer.testing import dataset_texts, fictional_authors, train_tokenizer

TAU = 0.5
METHODS = ("textbook", "mdu tau=0.5", "mdu tau=0", "fine-tuning")
RATIOS = {  # numerator / denominator, of the LoRA variants
    "speed_vs_textbook": ("textbook", "mdu tau=0.5", "seconds"),
    "memory_vs_textbook": ("textbook", "mdu tau=0.5", "peak_mb"),
    "tau0_vs_sft": ("mdu tau=0", "fine-tuning", "seconds"),
    "tau_vs_sft": ("mdu tau=0.5", "fine-tuning", "seconds"),
}
BY_BLOCK = ("mdu tau=0.5 in full", "mdu tau=0.5 by block", "fine-tuning in full", "fine-tuning by block")
RATIOS_BY_BLOCK = {
    "block_vs_full": ("mdu tau=0.5 by block", "mdu tau=0.5 in full", "seconds"),
    "block_vs_full_sft": ("fine-tuning by block", "fine-tuning in full", "seconds"),
}
Step = Callable[[int], Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of model and batch."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    batch: int
    prompt: int
    response: int
    vocabulary: int = 126464
    dtype: str = "float32"
    device: str = "cpu"
    block_size: int | None = None  # of a block-wise model

    @property
    def tokens(self) -> int:
        return self.batch * (self.prompt + self.response)


LLADA_8B = Shape(4096, 32, 32, 12288, batch=4, prompt=128, response=128, dtype="bfloat16", device="cuda")
SHAPES = {
    "cpu": Shape(512, 4, 8, 1024, batch=8, prompt=64, response=64),
    "llada-8b": LLADA_8B,
    "llada-8b-16": replace(LLADA_8B, batch=16),
    "llada-8b-long": replace(LLADA_8B, prompt=512, response=512),
    "tiny": Shape(32, 1, 2, 64, batch=2, prompt=8, response=8, vocabulary=1024),
}


def make_model(shape: Shape) -> PreTrainedModel:
    """A model of this shape with random weights, made where it stays."""
    fields = dict(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=max(shape.prompt + shape.response, shape.block_size or 0),
        use_cache=False,
        tie_word_embeddings=False,
        mask_token_id=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, shape.dtype))
    with torch.device(shape.device):
        if shape.block_size is None:
            return LlamaForCausalLM(LlamaConfig(is_causal=False, **fields))
        head_dim = shape.hidden // shape.heads
        return SDARForCausalLM(SDARConfig(head_dim=head_dim, block_size=shape.block_size, **fields))


def make_batch(shape: Shape, visit: int) -> dict[str, Tensor]:
    """Random rows, as the collator makes them, with the same masks in every variant."""
    generator = torch.Generator().manual_seed(visit)
    length = shape.prompt + shape.response
    masks = MaskSchedule(0, "benchmark", shape.batch)
    t, noise, _ = masks.draw(torch.full((shape.batch,), visit), torch.arange(shape.batch), length)
    batch = {
        "input_ids": torch.randint(3, shape.vocabulary, (shape.batch, length), generator=generator),
        "attention_mask": torch.ones(shape.batch, length, dtype=torch.long),
        "completion_mask": (torch.arange(length) >= shape.prompt).long().repeat(shape.batch, 1),
        "t": t,
        "noise": noise,
        "weight": torch.ones(shape.batch),
    }
    return {name: x.to(shape.device) for name, x in batch.items()}


def make_step(method: str, model: nn.Module, shape: Shape, lora: bool, folder: str) -> tuple[nn.Module, Step]:
    """The model in training, and a function of the visit that runs the forward passes and returns the loss."""
    rows = fictional_authors().select(range(2)).select_columns(["question", "answer"])
    tokenizer = train_tokenizer(dataset_texts(rows), vocab_size=300)
    tokenizer.mask_token, tokenizer.pad_token, tokenizer.eos_token = (tokenizer.decode([i]) for i in (2, 0, 1))
    rows = Dataset.from_dict({"prompt": rows["question"], "completion": rows["answer"]})
    shared = {"output_dir": folder, "report_to": "none", "max_length": None, "use_cpu": shape.device == "cpu"}
    if shape.block_size is not None:
        shared["attention"] = "block" if method.endswith("by block") else "full"
        model.config.attention_form = shared["attention"]  # an adapter would not keep it
    passed = {"train_dataset": rows, "processing_class": tokenizer, "peft_config": LoraConfig(r=16) if lora else None}
    if method.startswith("fine-tuning"):
        trainer = MDLMTrainer(model, MDLMConfig(**shared), **passed)
        name = "train"
    else:
        tau = 0.0 if method in ("mdu tau=0", "textbook") else TAU  # the textbook step keeps its own copy
        trainer = MDUTrainer(model, MDUConfig(tau=tau, retain_weight=0.0, **shared), **passed)
        name = "forget"
    model = trainer.model.train()
    if method == "textbook":
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        initial = copy.deepcopy(base).requires_grad_(False).eval()
        return model, lambda visit: textbook_loss(model, initial, make_batch(shape, visit))
    return model, lambda visit: trainer.compute_loss(model, {name: make_batch(shape, visit)})


def textbook_loss(model: nn.Module, initial: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """MDU as its equation reads: the divergence of whole sequences, of which the masked positions are averaged."""
    ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    draw = {"t": batch["t"], "noise": batch["noise"]}
    noisy_ids, masked, _, anchor_ids = corrupt(ids, batch["completion_mask"], attention_mask, 2, **draw)
    log_p = model(input_ids=noisy_ids, attention_mask=attention_mask).logits.float().log_softmax(dim=-1)
    with torch.no_grad():
        anchor_logits = initial(input_ids=anchor_ids, attention_mask=attention_mask).logits
        log_q = (TAU * anchor_logits.float()).log_softmax(dim=-1)
    kl = kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
    return ((kl * masked).sum(dim=1) / masked.sum(dim=1)).mean()


def run_variant(method: str, lora: bool, shape: Shape, repeats: int, connection: Connection) -> None:
    """Build the variant, tell its peak of memory after a first step, then take a step each time the parent says so."""
    model = make_model(shape)
    gc.collect()
    reset_peak(shape.device)
    weights = memory_now(shape.device)
    with tempfile.TemporaryDirectory() as folder:
        model, step = make_step(method, model, shape, lora, folder)
        loss = step(0)
        loss.backward()
        connection.send(((peak_memory(shape.device) - weights) / 2**20, loss.item()))
        for visit in range(1, repeats + 1):
            model.zero_grad()
            connection.recv()
            synchronize(shape.device)
            start = time.perf_counter()
            step(visit).backward()
            synchronize(shape.device)
            connection.send(time.perf_counter() - start)


def memory_now(device: str) -> int:
    """Bytes in use: allocated on a GPU, resident on a CPU."""
    return torch.cuda.memory_allocated() if device == "cuda" else _status("VmRSS")


def peak_memory(device: str) -> int:
    """The most bytes in use since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the high-water mark of loading


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(shape: Shape, repeats: int) -> dict[str, dict[str, float]]:
    """Figures of every variant."""
    methods = METHODS if shape.block_size is None else BY_BLOCK
    variants = {f"{m}, {'LoRA' if lora else 'full'}": (m, lora) for lora in (True, False) for m in methods}
    spawn = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    peaks = {}
    groups = [list(variants)] if shape.device == "cpu" else [[name] for name in variants]
    for group in groups:
        processes = {}
        for name in group:  # one after the other, so that none is slowed while it is built
            here, there = spawn.Pipe()
            process = spawn.Process(target=run_variant, args=(*variants[name], shape, repeats, there), daemon=True)
            process.start()
            there.close()
            processes[name] = (process, here)
            peaks[name], loss = here.recv()
            print(f"{name:24} ready, loss {loss:.4f}", flush=True)
        for _ in range(repeats):
            for name, (_, connection) in processes.items():
                connection.send(None)
                seconds[name].append(connection.recv())
        for process, _ in processes.values():
            process.join()
    figures = {}
    for name in variants:
        median = statistics.median(seconds[name])
        figures[name] = {"seconds": median, "peak_mb": peaks[name], "tokens_per_s": shape.tokens / median}
    return figures


def matmul_rate(shape: Shape) -> float:
    """FLOP/s of a large matrix product in the shape's precision, the best of ten."""
    n = 8192 if shape.device == "cuda" else 2048
    a = torch.randn(n, n, device=shape.device, dtype=getattr(torch, shape.dtype))
    best = float("inf")
    for _ in range(10):
        synchronize(shape.device)
        start = time.perf_counter()
        a @ a
        synchronize(shape.device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def step_flops(shape: Shape, name: str) -> float:
    """Multiplications and additions that our step needs: weights times tokens, the head on the masked half alone."""
    tokens = 2 * shape.tokens if "by block" in name else shape.tokens
    layers = shape.layers * (4 * shape.hidden**2 + 3 * shape.hidden * shape.mlp) * tokens
    head = shape.vocabulary * shape.hidden * shape.batch * shape.response / 2
    backward = layers + head if name.endswith("LoRA") else 2 * (layers + head)
    anchor = layers + head if "tau=0.5" in name else 0
    return 2 * (layers + head + backward + anchor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "llada-8b" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--shape", choices=SHAPES, default=default)
    parser.add_argument("--block_size", type=int, help="measure a block-wise model, by block and in full")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    shape = replace(SHAPES[args.shape], block_size=args.block_size)
    if shape.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--shape {args.shape} needs a GPU, and none is visible. Use --shape cpu.")

    figures = measure(shape, args.repeats)
    rate = matmul_rate(shape)
    print(
        f"\n{args.shape}: hidden {shape.hidden}, {shape.layers} layers, vocabulary {shape.vocabulary}, batch "
        f"{shape.batch} x {shape.prompt + shape.response}, {shape.dtype}; a matrix product runs at "
        f"{rate / 1e12:.2f} TFLOP/s\n"
    )
    print("| variant | seconds | peak MB | tokens/s | share of matmul rate |\n|---|--:|--:|--:|--:|")
    for name, f in figures.items():
        share = "" if name.startswith("textbook") else f"{step_flops(shape, name) / f['seconds'] / rate:.0%}"
        print(f"| {name} | {f['seconds']:.3f} | {f['peak_mb']:.0f} | {f['tokens_per_s']:.0f} | {share} |")
    ratios = {
        key: figures[f"{a}, LoRA"][figure] / figures[f"{b}, LoRA"][figure]
        for key, (a, b, figure) in (RATIOS if shape.block_size is None else RATIOS_BY_BLOCK).items()
    }
    print()
    for key, ratio in ratios.items():
        print(f"{key:20} {ratio:.2f}")
    if args.json:
        args.json.write_text(json.dumps({"shape": args.shape, "variants": figures, "ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
