"""Checkpoints to publish, and what a repository holds then."""

import torch

from mdu_trainer import MDUConfig, MDUTrainer
from mdu_trainer.hub.push import Destination, prepare_push, read_checkpoint
from mdu_trainer.report.model_card import CardDetails
from mdu_trainer.testing import tiny_mdlm

REPO = "org/forgets"
PLANTED = "hf_plantedInTheTrainingArguments"
FULL = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "results.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tradeoff.png",
}
ADAPTER = FULL - {"config.json", "generation_config.json", "model.safetensors", "results.json", "tradeoff.png"} | {
    "adapter_config.json",
    "adapter_model.safetensors",
}
QUICK = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "learning_rate": 1e-2,
}


def prepare(folder, tokenizer=None, base_model=None, **where):
    """A push that is not sent."""
    details = CardDetails(base_model=base_model)
    return prepare_push(read_checkpoint(folder), Destination(REPO, **where), details, tokenizer=tokenizer)


def make_trainer(folder, rows, tokenizer, model=None, peft_config=None, **options):
    model = model if model is not None else tiny_mdlm(tokenizer, hidden_size=32, num_layers=2, num_heads=2)
    args = MDUConfig(str(folder), **(QUICK | options))
    return MDUTrainer(model, args, *rows, processing_class=tokenizer, peft_config=peft_config)


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(5, 25)[None]).logits


def forget_text(rows):
    return rows[0][3]["completion"][0]["content"]


def tree_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
