"""Forward passes, copies of the model, and adapters: as few as the loss needs."""

import copy

import pytest
import torch
from formula import LORA, batch_of, expected_loss, perturb, trained, weights
from peft import LoraConfig, PeftModel, get_peft_model
from runs import CHECKPOINTING
from transformers import BertConfig, BertForMaskedLM
from trl import ModelConfig, get_peft_config

from mdu_trainer import MDLMTrainer, MDUConfig, divergence
from mdu_trainer.masking import forward_process
from mdu_trainer.models.head import head_way


class PassCounter:
    def __init__(self, model):
        self.count = 0
        head_way(model)  # tried once for each model, on five tokens
        model.get_base_model().register_forward_hook(self) if isinstance(
            model, PeftModel
        ) else model.register_forward_hook(self)

    def __call__(self, *args):
        self.count += 1


@pytest.mark.parametrize(
    "options, live, frozen", [({"tau": 0.0}, 1, 0), ({"tau": 0.5}, 1, 1), ({"loss_type": "ga"}, 1, 0)]
)
def test_passes_a_forget_batch(make_trainer, options, live, frozen):
    trainer = make_trainer(retain_weight=0.0, **options)
    counter = PassCounter(trainer.model)
    copy_counter = PassCounter(trainer.reference.frozen) if trainer.reference else None
    trainer.compute_loss(trainer.model, batch_of(trainer)).backward()
    assert counter.count == live
    assert (copy_counter.count if copy_counter else 0) == frozen


@pytest.mark.parametrize(
    "options", [{"tau": 0.0}, {"loss_type": "npo", "retain_loss_type": "kl"}, {"loss_type": "dpo"}]
)
def test_all_rows_share_a_forward(make_trainer, options):
    trainer = make_trainer(**options)
    counter = PassCounter(trainer.model)
    trainer.compute_loss(trainer.model, batch_of(trainer)).backward()
    assert counter.count == 1


@pytest.mark.parametrize(("tau", "projections"), [(0.0, 1), (0.5, 2)])
def test_head_projects_masked_positions_only(make_trainer, monkeypatch, tau, projections):
    trainer = make_trainer(retain_weight=0.0, tau=tau)
    rows, project = [], divergence._project

    def counted(hidden, *head, **kwargs):
        rows.append(len(hidden))
        return project(hidden, *head, **kwargs)

    monkeypatch.setattr(divergence, "_project", counted)
    batch = batch_of(trainer)
    trainer.compute_loss(trainer.model, batch)
    masked = forward_process(batch["forget"], trainer.backbone.mask_token_id).masked
    assert rows == [int(masked.sum())] * projections


@pytest.mark.parametrize("options", [{"tau": 0.5}, {"loss_type": "npo", "retain_loss_type": "kl"}])
def test_lora_holds_one_copy_and_answers_for_theta_0(make_trainer, make_model, options):
    model = make_model().double()
    initial = copy.deepcopy(model)
    trainer = make_trainer(model, peft_config=LoraConfig(**LORA), **options)
    assert isinstance(trainer.model, PeftModel)
    assert trainer.reference.frozen is None and trainer.reference.first_adapter == {}
    perturb(trainer.model)
    batch = batch_of(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(expected_loss(trainer, initial, batch).item(), rel=1e-6)


def test_trained_adapter_is_part_of_theta_0(make_trainer, make_model):
    model = get_peft_model(make_model(), LoraConfig(**LORA)).double()
    perturb(model)
    initial = copy.deepcopy(model)
    trainer = make_trainer(model, tau=0.5)
    perturb(trainer.model)
    moved = weights(trainer)
    batch = batch_of(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(expected_loss(trainer, initial.eval(), batch).item(), rel=1e-6)
    assert torch.equal(weights(trainer), moved), "the live adapter is back after the pass"


def test_lora_trains_adapters_only_and_takes_the_backbones_targets(make_trainer):
    trainer = make_trainer(peft_config=LoraConfig(r=2), tau=0.5)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert not any("lm_head" in name for name in moved)


def test_lora_on_a_masked_lm_with_trls_defaults(make_trainer, tokenizer):
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **size)
    peft_config = get_peft_config(ModelConfig(use_peft=True))
    trainer = make_trainer(BertForMaskedLM(config), peft_config=peft_config, tau=0.5)
    before = weights(trainer)
    assert trainer.backbone.name == "masked_lm" and not torch.equal(trained(trainer), before)
    assert peft_config.target_modules is None, "the caller's config is left alone"


@pytest.mark.parametrize("peft", [False, True])
def test_activation_checkpointing_changes_nothing(make_trainer, peft):
    lora = {"peft_config": LoraConfig(**LORA)} if peft else {}
    trainers = [make_trainer(tau=0.5, **{CHECKPOINTING: on}, **lora) for on in (False, True)]
    torch.testing.assert_close(*map(trained, trainers), rtol=1e-4, atol=1e-6)
    recomputed = [
        [layer for layer in trainer.model.modules() if getattr(layer, "gradient_checkpointing", False)]
        for trainer in trainers
    ]
    assert not recomputed[0] and recomputed[1], "and it is done"


@pytest.mark.skipif(CHECKPOINTING == "gradient_checkpointing", reason="transformers before 5.23 has no new name")
def test_checkpointing_under_its_old_name(tmp_path):
    with pytest.warns(FutureWarning, match="Use `activation_checkpointing`"):
        old = MDUConfig(str(tmp_path), gradient_checkpointing=True, use_cpu=True)
    new = MDUConfig(str(tmp_path), activation_checkpointing=True, use_cpu=True)
    assert old.activation_checkpointing and old.gradient_checkpointing and new.gradient_checkpointing


def test_a_compiled_run_ends_as_another(make_trainer):
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainers = [make_trainer(tau=0.0, max_steps=1, **options) for options in ({}, compiled)]
    ends = [trained(trainer) for trainer in trainers]
    assert trainers[1].model_wrapped is not trainers[1].model, "it was compiled"
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


def test_bf16_is_close_to_float32(make_trainer):
    losses = [make_trainer(tau=0.5, bf16=bf16).train().training_loss for bf16 in (False, True)]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)


def test_length_grouped_batches_pad_less(make_trainer, sets):
    def padding(strategy):
        trainer = make_trainer(forget=sets[1], cls=MDLMTrainer, train_sampling_strategy=strategy)
        return sum(int((1 - batch["train"]["attention_mask"]).sum()) for batch in trainer.get_train_dataloader())

    assert padding("group_by_length") < 0.5 * padding("random")


# Anchors computed before training


@pytest.mark.parametrize("steps", [{"max_steps": 9}, {"max_steps": -1, "num_train_epochs": 1.5}])
def test_precomputed_anchors_of_whole_batches_only(make_trainer, steps):
    options = {"dataloader_drop_last": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    ends = [trained(make_trainer(tau=0.5, precompute_anchor=on, **options | steps)) for on in (False, True)]
    assert torch.equal(*ends)


def test_precomputed_anchors_of_another_order_are_made_anew(make_trainer):
    make_trainer(tau=0.5, precompute_anchor=True, max_steps=5).train()
    for options in ({"train_sampling_strategy": "sequential"}, {"data_seed": 3}):
        ends = [trained(make_trainer(tau=0.5, precompute_anchor=on, max_steps=5, **options)) for on in (True, False)]
        assert torch.equal(*ends)
