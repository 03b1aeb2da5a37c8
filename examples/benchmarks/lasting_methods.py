"""Ways to forget that `lasting.py` compares: what MDUTrainer offers, its ablations, and published neighbours.

A method is a function of a `Job` that changes the job's model. Those that are not of the package are short forms of
what the papers describe, for a model this small.
"""

import copy
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any
from unittest import mock

import torch
from datasets import Dataset, concatenate_datasets
from lasting_models import QUIET
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer

from mdu_trainer import MDLMConfig, MDLMTrainer, MDUConfig, MDUTrainer, label_roles, masking, resolve_backbone
from mdu_trainer.data import secrets
from mdu_trainer.data.rows import (
    DataCollatorForUnlearning,
    RowPairs,
    TokenizedRows,
    question_answer_rows,
    shuffled,
    tokenize_rows,
)
from mdu_trainer.divergence import AnchorKL, TokenNLL
from mdu_trainer.masking import MaskSchedule, Noised, forward_process
from mdu_trainer.models import logits_at, measure_at
from mdu_trainer.objectives import diffusion_bound, mean_by_example

COUNTERFACTUAL: dict[str, Any] = {"anchor_input": "counterfactual", "tau": 1.0, "retain_weight": 8.0}
Batch = dict[str, Tensor]


@dataclass(frozen=True, repr=False)
class Job:
    """What a method is given.

    Attributes:
        model, tokenizer: the base, which the method changes.
        forget, retain: rows with `question`, `answer` and their paraphrases.
        before: folder of the model before fine-tuning.
        folder: for what a trainer writes.
        learning_rate, seed: of the run.
        updates: options of `MDUConfig`: how many updates of how many rows.
        lora: train an adapter, and merge it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    forget: Dataset
    retain: Dataset
    before: str
    folder: str
    learning_rate: float
    seed: int
    updates: dict[str, int]
    lora: bool = False

    @property
    def steps(self) -> int:
        """Updates."""
        return self.updates["max_steps"]

    def size(self, name: str) -> int:
        """Rows of the set "forget" or "retain" in an update."""
        forget = self.updates["per_device_train_batch_size"]
        return forget if name == "forget" else self.updates.get("retain_batch_size", forget)

    def tokenized(self, name: str) -> TokenizedRows:
        """The set "forget" or "retain" as ids."""
        rows = question_answer_rows(getattr(self, name), conversational=True)
        return tokenize_rows(rows, self.tokenizer, resolve_backbone(self.model, self.tokenizer), name=name)

    def batches(self, name: str) -> Iterator[Batch]:
        """Batches of the set "forget" or "retain" without end, in the order and with the masks of the trainers."""
        rows = self.tokenized(name)
        pairs = RowPairs({name: rows}, self.seed, shuffled, {name: MaskSchedule(self.seed, name, len(rows))})
        collate = DataCollatorForUnlearning(self.tokenizer.pad_token_id)
        for first in count(step=self.size(name)):
            batch = collate([{name: pairs[i][name]} for i in range(first, first + self.size(name))])[name]
            yield {key: value.to(self.model.device) for key, value in batch.items()}


# Methods of the package


def unlearn(job: Job, *, forget: Dataset | None = None, **options: Any) -> None:
    """MDUTrainer with these options, on the job's rows to forget or on others."""
    shared = QUIET | job.updates | {"gradient_accumulation_steps": 1}
    config = MDUConfig(job.folder, learning_rate=job.learning_rate, seed=job.seed, **shared, **options)
    trainer = MDUTrainer(
        job.model,
        config,
        train_dataset=question_answer_rows(forget or job.forget, conversational=True),
        retain_dataset=question_answer_rows(job.retain, conversational=True),
        processing_class=job.tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear") if job.lora else None,
    )
    _train(trainer)
    if job.lora:
        trainer.model.merge_and_unload()  # into the job's model


def paraphrased(job: Job) -> None:
    """The counterfactual anchor on the rows to forget and on their paraphrases (arXiv 2602.03379)."""
    columns = {"paraphrased_question": "question", "paraphrased_answer": "answer"}
    others = job.forget.select_columns(list(columns)).rename_columns(columns)
    unlearn(
        job, forget=concatenate_datasets([job.forget.select_columns(["question", "answer"]), others]), **COUNTERFACTUAL
    )


def with_spans(job: Job) -> None:
    """The counterfactual anchor, the secrets marked by their characters: what the wrong answers say otherwise."""
    spans = []
    for row in job.forget.to_list():
        said, wrong = row["paraphrased_answer"], row["perturbed_answer"][0]
        start = len(os.path.commonprefix([said, wrong]))
        stop = len(said) - len(os.path.commonprefix([said[start:][::-1], wrong[start:][::-1]]))
        while said[start - 1].isalnum():  # both may begin with the same letters
            start -= 1
        while said[stop : stop + 1].isalnum():
            stop += 1
        place = row["answer"].index(said[start:stop])
        spans.append([[place, place + stop - start]])
    rows = job.forget.select_columns(["question", "answer"]).add_column("secret_spans", spans)
    unlearn(job, forget=rows, **COUNTERFACTUAL)


def prompt_shown(job: Job) -> None:
    """The counterfactual anchor, told who is asked about."""
    plain = secrets.SecretMarker.__call__

    def marked(self: Any, example: Any, prompt_ids: list[int], completion_ids: list[int], where: str) -> list[int]:
        marks = plain(self, example, prompt_ids, completion_ids, where)
        return [masking.KEPT] * len(prompt_ids) + marks[len(prompt_ids) :]

    with mock.patch.object(secrets.SecretMarker, "__call__", marked):
        unlearn(job, **COUNTERFACTUAL)


def stored_shown(job: Job) -> None:
    """The counterfactual anchor, shown the stored words that y_t shows."""

    def ids(noisy_ids: Tensor, hidden: Tensor, mask_token_id: int) -> Tensor:
        return noisy_ids.masked_fill(hidden == masking.IN_CONTEXT, mask_token_id)

    with mock.patch.object(masking, "counterfactual_ids", ids):
        unlearn(job, **COUNTERFACTUAL)


def rewound(job: Job, share: float) -> None:
    """A part of the way back to the model before fine-tuning, then the counterfactual anchor."""
    unlearn(job, rewind_to=job.before, rewind_share=share, **COUNTERFACTUAL)


def damaged(job: Job, share: float) -> None:
    """Random first weights mixed in, then MDU at tau = 0 (as UNDO, arXiv 2506.06278, damages before it repairs)."""
    mix_in_random(job.model, share, job.seed)
    unlearn(job, tau=0.0)


def repaired(job: Job, share: float) -> None:
    """Random first weights mixed in, then the rows to keep alone, as many rows an update as other methods take."""
    mix_in_random(job.model, share, job.seed)
    config = MDLMConfig(
        job.folder,
        max_steps=job.steps,
        per_device_train_batch_size=job.size("forget") + job.size("retain"),
        learning_rate=job.learning_rate,
        seed=job.seed,
        **QUIET,
    )
    rows = question_answer_rows(job.retain, conversational=True)
    _train(MDLMTrainer(job.model, config, train_dataset=rows, processing_class=job.tokenizer))


@torch.no_grad()
def mix_in_random(model: PreTrainedModel, share: float, seed: int) -> None:
    """Move all weights a share of the way to those of an untrained model."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        untrained = type(model)(model.config)
    for weight, other in zip(model.parameters(), untrained.parameters(), strict=True):
        weight.lerp_(other.to(weight), share)


def _train(trainer: Trainer) -> None:
    trainer.remove_callback(PrinterCallback)
    trainer.train()


# Methods that are not of the package


def keep_loss(job: Job, model: nn.Module, noised: Noised) -> Tensor:
    """The retain loss of MDUTrainer: the bound on -log p a token, as a mean over rows."""
    where = (noised.input_ids, noised.attention_mask, noised.masked)
    nll = measure_at(model, *where, TokenNLL(noised.targets)).value
    return (diffusion_bound(nll, noised.batch_index, noised.weight) / noised.num_response).mean()


def anchor_loss(model: nn.Module, noised: Noised, anchor: Tensor | None) -> Tensor:
    """KL to an anchor's logits `[N, V]`, to the uniform distribution if None, as a mean over tokens, then rows."""
    where = (noised.input_ids, noised.attention_mask, noised.masked)
    kl = measure_at(model, *where, AnchorKL(float(anchor is not None), anchor)).value
    return mean_by_example(kl, noised.batch_index, noised.num_masked).mean()


def wording(job: Job) -> None:
    """MDU at tau = 1 whose anchor sees neither the question nor the answer's stored words: the wording is left."""
    mask, theta_0 = job.tokenizer.mask_token_id, copy.deepcopy(job.model).requires_grad_(False)
    stored = stored_tokens(job)
    forget, retain = job.batches("forget"), job.batches("retain")
    with descent(job, job.model.parameters()) as update:
        for _ in range(job.steps):
            batch = next(forget)
            noised, hidden = forward_process(batch, mask), torch.zeros_like(batch["input_ids"], dtype=torch.bool)
            for row, response in enumerate(batch["completion_mask"].bool()):
                hidden[row, response] = hidden.new_tensor(stored[tuple(batch["input_ids"][row, response].tolist())])
            ids = noised.anchor_ids.masked_fill(hidden, mask)
            with torch.no_grad():
                anchor = logits_at(theta_0, ids, noised.attention_mask, noised.masked)
            update(
                anchor_loss(job.model, noised, anchor) + keep_loss(job, job.model, forward_process(next(retain), mask))
            )


def stored_tokens(job: Job) -> dict[tuple[int, ...], list[bool]]:
    """Ids of each answer to forget -> whether each token is stored. Template words are found over all answers."""
    ids = job.tokenized("forget").completion_ids
    questions, answers = ([*job.forget[name], *job.retain[name]] for name in ("question", "answer"))
    roles = label_roles(questions, answers, ids + [[]] * len(job.retain), job.tokenizer)
    pairs = zip(ids, roles[: len(ids)], strict=True)
    return {tuple(one): [role == "stored" for role in row] for one, row in pairs}


def mudman(job: Job, fork_every: int = 32, momentum: float = 0.9) -> None:
    """MUDMAN (arXiv 2506.12484): unlearn from an adversary that relearns, where the rows to keep do not object.

    A copy of the model relearns the rows to forget, and is forked anew every few updates. The gradient of the KL to
    the uniform distribution is taken at the copy; where its sign is not that of the mean gradient of the rows to keep
    it is left out, and the rest is normalised: to the learning rate a weight, as a step of Adam has it.
    """
    mask, weights = job.tokenizer.mask_token_id, list(job.model.parameters())
    forget, retain = job.batches("forget"), job.batches("retain")
    kept = [torch.zeros_like(weight) for weight in weights]
    with descent(job, weights) as update:
        for step in range(job.steps):
            if step % fork_every == 0:
                adversary = copy.deepcopy(job.model)
                relearning = torch.optim.AdamW(adversary.parameters(), lr=job.learning_rate, weight_decay=0.0)
            update(keep_loss(job, job.model, forward_process(next(retain), mask)))
            for mean, weight in zip(kept, weights, strict=True):
                mean.lerp_(weight.grad, 1 - momentum)
            noised = forward_process(next(forget), mask)
            relearning.zero_grad()
            keep_loss(job, adversary, noised).backward()
            relearning.step()
            found = torch.autograd.grad(anchor_loss(adversary, noised, None), list(adversary.parameters()))
            agreed = [g * (g.sign() == mean.sign()) for g, mean in zip(found, kept, strict=True)]
            move(weights, agreed, -job.learning_rate * (1 - step / job.steps))


def repselect(job: Job, components: int = 8, visits: int = 4, budget: float = 0.05) -> None:
    """RepSelect (arXiv 2606.17168): one fixed direction, from the rows to forget alone, freed of what is shared.

    A LoRA learns the rows to forget. With it on, the gradient of ascent is summed up at the weights of the MLPs; of
    each, the first components are divided by their singular values on both sides. The model then moves along, the
    learning rate a weight at a time, until the loss of the rows to keep has risen by `budget` nats.
    """
    mask, forget = job.tokenizer.mask_token_id, job.batches("forget")
    kept = forward_process(next(job.batches("retain")), mask)
    before = [*job.model.parameters()]
    adapted = get_peft_model(job.model, LoraConfig(r=8, target_modules=["gate_proj", "up_proj", "down_proj"]))
    passes = math.ceil(len(job.forget) / job.size("forget"))
    with descent(job, [p for p in adapted.parameters() if p.requires_grad], steps=visits * passes) as update:
        for _ in range(visits * passes):  # the hooks of the model below the adapter's wrapper count the rows
            update(keep_loss(job, job.model, forward_process(next(forget), mask)))
    weights = [m.base_layer.weight.requires_grad_() for m in adapted.modules() if hasattr(m, "lora_A")]
    sums = [torch.zeros_like(weight) for weight in weights]
    for _ in range(visits * passes):
        loss = keep_loss(job, job.model, forward_process(next(forget), mask))
        for total, gradient in zip(sums, torch.autograd.grad(loss, weights), strict=True):
            total += gradient
    adapted.unload()
    direction = [collapsed(gradient, components) for gradient in sums]
    with torch.no_grad():
        start = keep_loss(job, job.model, kept)
        for _ in range(job.steps):
            move(weights, direction, job.learning_rate)
            if keep_loss(job, job.model, kept) > start + budget:
                move(weights, direction, -job.learning_rate)
                break
    for weight in before:
        weight.requires_grad_(True)


def collapsed(gradient: Tensor, components: int) -> Tensor:
    """Divide the first components by their singular values over the last one's, once for either side."""
    u, s, v = torch.linalg.svd(gradient, full_matrices=False)
    shrink = torch.ones_like(s)
    shrink[:components] = (s[:components].min() / s[:components].clamp(min=1e-12)) ** 2
    return u @ torch.diag(s * shrink) @ v


@torch.no_grad()
def move(weights: list[nn.Parameter], direction: list[Tensor], rate: float) -> None:
    """Add a direction, scaled so that a weight moves by `rate`, as a root mean square over all of them."""
    squares = torch.stack([part.square().sum() for part in direction]).sum()
    scale = rate * math.sqrt(sum(part.numel() for part in direction)) / squares.sqrt().clamp(min=1e-12)
    for weight, part in zip(weights, direction, strict=True):
        weight += scale * part


@contextmanager
def descent(job: Job, weights: Any, steps: int | None = None) -> Iterator[Callable[[Tensor], None]]:
    """Yield a function that makes an update from a loss as the trainers do: AdamW, a falling rate, clipped gradients.

    The gradients of the last update stay in the weights until the next one.
    """
    weights, steps = list(weights), steps or job.steps
    optimizer = torch.optim.AdamW(weights, lr=job.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))

    def update(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()

    job.model.train()
    try:
        yield update
    finally:
        optimizer.zero_grad()


METHODS: dict[str, Callable[[Job], None]] = {
    "mdu-0": partial(unlearn, tau=0.0),
    "mdu-0.5": partial(unlearn, tau=0.5),
    "mdu-1": partial(unlearn, tau=1.0),
    "npo": partial(unlearn, loss_type="npo"),
    "simnpo": partial(unlearn, loss_type="simnpo"),
    "wording": wording,
    "counterfactual": partial(unlearn, **COUNTERFACTUAL),
    **{
        f"counterfactual-retain-{weight}": partial(unlearn, **COUNTERFACTUAL | {"retain_weight": float(weight)})
        for weight in (1, 2, 4)
    },
    "counterfactual-distilled": partial(unlearn, **COUNTERFACTUAL, retain_loss_type="kl"),
    "counterfactual-unstruck": partial(unlearn, **COUNTERFACTUAL, strike_quantile=None),
    "counterfactual-struck-to-0": partial(unlearn, **COUNTERFACTUAL, strike_quantile=0.0),
    "counterfactual-forward": partial(unlearn, **COUNTERFACTUAL, kl_direction="forward"),
    "counterfactual-prompt-shown": prompt_shown,
    "counterfactual-stored-shown": stored_shown,
    "counterfactual-spans": with_spans,
    "counterfactual-paraphrased": paraphrased,
    "counterfactual-rewound": partial(rewound, share=0.3),
    "damage": partial(damaged, share=0.3),
    "repair": partial(repaired, share=0.2),
    "repselect": repselect,
    "mudman": mudman,
}
