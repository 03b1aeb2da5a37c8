"""Trains small models, the same ones whatever the number of processes, and writes down their last weights.

torchrun --standalone --nproc_per_node 2 tests/distributed_worker.py FOLDER BACKEND CASE...
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor

from mdu_trainer import MDUConfig, MDUTrainer
from mdu_trainer.data.rows import question_answer_rows
from mdu_trainer.testing import dataset_texts, fictional_authors, forget_retain_split, tiny_mdlm, train_tokenizer

GLOBAL_BATCH = 8
# An epoch is 21 rows: the second process has one row in the last batch, or none at batches of two
CASES = {
    "mdu tau=0": {"tau": 0.0},
    "mdu tau=.5": {"tau": 0.5},
    "mdu pooled": {
        "tau": 0.5,
        "anchor_input": "counterfactual",
        "kl_reduction": "token",
        "gradient_accumulation_steps": 2,
    },
    "mdu by length": {"tau": 0.5, "train_sampling_strategy": "group_by_length"},
    "mdu precomputed": {"tau": 0.5, "precompute_anchor": True},
    "mdu more retain rows": {"tau": 0.5, "retain_batch_size": 8},  # two with each forget row: an epoch is 11 pairs
    "mdu own tokens": {
        "tau": 0.5,
        "forget_masking": "generated",
        "rollout_every": 1,  # the second time with weights that may be sharded
        "anchor_input": "hidden_prompt",
    },
    "npo": {"loss_type": "npo"},
    "retain kl": {"loss_type": "ga", "retain_loss_type": "kl"},
}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def use_fsdp2() -> None:
    """accelerate offers FSDP on accelerators only, but all that it does then, gloo does too."""
    Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}


def make_trainer(folder: Path, backend: str, case: str) -> MDUTrainer:
    method, _, adapter = case.partition(" + ")
    authors = fictional_authors()
    tokenizer = train_tokenizer(dataset_texts(authors))
    forget, retain = (question_answer_rows(rows, conversational=True) for rows in forget_retain_split(authors))
    args = MDUConfig(
        output_dir=str(folder / "run" / backend / case.replace(" ", "_")),
        **({"gradient_accumulation_steps": 1, "optim": "sgd", "learning_rate": 0.1} | CASES[method]),
        max_steps=4,
        logging_steps=4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    args.per_device_train_batch_size = GLOBAL_BATCH // args.gradient_accumulation_steps // args.world_size
    if args.retain_batch_size is not None:
        args.retain_batch_size = 2 * args.per_device_train_batch_size
    args.per_device_eval_batch_size = 4 // args.world_size
    if backend == "fsdp2":
        use_fsdp2()
    model = tiny_mdlm(tokenizer, hidden_size=32, num_layers=2, num_heads=2, initializer_range=0.1)
    if args.forget_masking == "generated":  # so that it generates words of the answers
        words = tokenizer(" ".join(authors["answer"][:8]))["input_ids"]
        with torch.no_grad():
            model.lm_head.weight[sorted({*words})[::2]] *= 10
    adapter = LORA if adapter else None
    few: Dataset = retain.select(range(7))
    return MDUTrainer(model, args, forget.select(range(11)), retain.select(range(21)), few, tokenizer, adapter)


def run(folder: Path, backend: str, case: str) -> dict:
    """Last weights, logged figures and metrics of a run."""
    trainer = make_trainer(folder, backend, case)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    metrics = trainer.evaluate()
    weights = {}
    for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if name in start:
            whole = p.full_tensor() if isinstance(p, DTensor) else trainer.distributed.whole(p)
            weights[name] = whole.detach().clone()
    logs = {
        k: v for k, v in trainer.state.log_history[0].items() if "loss" in k or k in ("kl", "entropy", "grad_norm")
    }
    metrics = {k: v for k, v in metrics.items() if "second" not in k and "runtime" not in k}
    sharded = sum(isinstance(p, DTensor) for p in trainer.model.parameters())
    return {"start": start, "weights": weights, "logs": logs, "metrics": metrics, "sharded": sharded}


def main() -> None:
    folder, backend, *cases = sys.argv[1:]
    for case in cases:
        result = run(Path(folder), backend, case)
        if PartialState().is_main_process:
            torch.save(result, Path(folder) / f"{backend} {case}.pt")
            print(json.dumps(result["logs"]), flush=True)


if __name__ == "__main__":
    main()
