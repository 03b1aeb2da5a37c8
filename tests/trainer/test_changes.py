"""Runs that change nothing are errors, and those that change something change what they should."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from formula import LORA, batch_of, expected_loss, perturb, weights
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from mdu_trainer.files import UserError
from mdu_trainer.trainer.updates import fingerprint


def adapted(model, frozen=True):
    model = get_peft_model(model, LoraConfig(**LORA))
    perturb(model)
    return model.requires_grad_(not frozen)


@pytest.mark.parametrize("options", [{"tau": 0.0}, {"tau": 0.5}, {"tau": 0.5, "precompute_anchor": True}])
def test_nothing_trainable(make_trainer, make_model, options):
    for model in (adapted(make_model()), make_model().requires_grad_(False)):
        trainer = make_trainer(model, **options)
        with pytest.raises(UserError, match="No tensor of the model is trainable.*is_trainable=True"):
            trainer.train()


def test_columns_removed_behind_the_config(make_trainer):
    trainer = make_trainer()
    trainer.args.remove_unused_columns = True  # a batch of nothing ends the epoch before it begins
    with pytest.raises(UserError, match="No update was made.*the data loader gave no batch"):
        trainer.train()


class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_stopped_before_the_first_update(make_trainer):
    with pytest.raises(UserError, match="No update was made.*a callback stopped it"):
        make_trainer(callbacks=[Stop()], gradient_accumulation_steps=2).train()


@pytest.mark.parametrize("anchor_source", ["initial", "current"])
def test_an_anchor_that_equals_the_prediction(make_trainer, sets, tokenizer, anchor_source):
    rows = Dataset.from_list([{"prompt": "", "completion": row["completion"][0]["content"]} for row in sets[0]])
    trainer = make_trainer(forget=rows, tau=1.0, anchor_source=anchor_source)
    with pytest.raises(UserError, match="8 of 8 forget rows have an empty prompt. At tau = 1"):
        trainer.train()
    make_trainer(forget=rows, tau=0.5, anchor_source=anchor_source).train()


def test_gradients_that_are_all_zero(make_trainer):
    trainer = make_trainer(weight_decay=0.1)  # which moves weights all the same
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: 0 * compute(*args, **kwargs)
    with pytest.raises(UserError, match="3 updates were made, but every gradient was zero"):
        trainer.train()


def test_updates_that_round_away(make_trainer, make_model):
    model = make_model().to(torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.where(p >= 0, 1.0, -1.0))  # nothing near 0, where bfloat16 is fine
    trainer = make_trainer(model, learning_rate=1e-6)
    with pytest.raises(UserError, match="no trained tensor differs.*half precision.*load them in float32"):
        trainer.train()


def test_a_schedule_without_a_rate(make_trainer):
    trainer = make_trainer(lr_scheduler_type="constant_with_warmup", warmup_steps=1000, max_steps=1)
    with pytest.raises(UserError, match="An update was made, but no trained tensor differs.*Raise the learning rate"):
        trainer.train()


class Unfreeze(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.requires_grad_(True)


def test_tensors_that_became_trainable_too_late(make_trainer, make_model):
    model = make_model().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    trainer = make_trainer(model, callbacks=[Unfreeze()])
    with pytest.raises(UserError, match="model.embed_tokens.weight and .* other tensors became trainable after"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_frozen_adapter_stays_frozen_through_the_anchors_pass(make_trainer, make_model):
    """PEFT marks every adapter as trained when it switches them on again."""
    model = get_peft_model(make_model(), LoraConfig(**LORA))
    frozen = [p for name, p in model.named_parameters() if "layers.0" in name and "lora_" in name]
    for p in frozen:
        p.requires_grad_(False)
    trainer = make_trainer(model, tau=0.5)
    assert trainer.reference.first_adapter == {}
    trainer.train()
    assert not any(p.requires_grad for p in frozen)


def test_a_frozen_adapter_below_a_new_one_is_part_of_theta_0(make_trainer, make_model):
    model = get_peft_model(make_model().double(), LoraConfig(**LORA))
    perturb(model)
    model.add_adapter("new", LoraConfig(**LORA))
    model.base_model.set_adapter(["default", "new"])
    for name, p in model.double().named_parameters():
        p.requires_grad_(".new." in name)
    initial = copy.deepcopy(model).eval()
    trainer = make_trainer(model, tau=0.5)
    perturb(trainer.model)
    batch = batch_of(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(expected_loss(trainer, initial, batch).item(), rel=1e-6)


def test_a_run_resumed_at_its_end_is_no_error(make_trainer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mdu_trainer"), "propagate", True)
    options = {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "epoch"}
    whole = make_trainer(**options)
    whole.train()
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(whole), weights(resumed))
    assert "no update was left to make" in caplog.text
    config = make_trainer(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-5", **options)
    config.train()
    assert config.state.global_step == 5 and torch.equal(weights(whole), weights(config))


def test_an_optimizer_of_the_user_may_train_a_part(make_trainer, make_model):
    model = make_model()
    optimizer = torch.optim.SGD(model.lm_head.parameters(), lr=0.1)
    trainer = make_trainer(model)
    trainer.optimizer = optimizer
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    assert [n for n, p in model.named_parameters() if not torch.equal(p, before[n])] == ["lm_head.weight"]


def test_fingerprint_sees_any_change():
    tensor = torch.randn(1000).to(torch.bfloat16)
    swapped = tensor.clone()
    swapped[[0, 1]] = tensor[[1, 0]]
    nudged = tensor.clone()
    nudged.view(torch.int16)[500] += 1
    assert len({fingerprint(t) for t in (tensor, tensor.clone(), swapped, nudged)}) == 3


def test_rows_that_drop_last_leaves_out(make_trainer):
    with pytest.raises(UserError, match="dataloader_drop_last leaves out all 20 rows: a batch takes 32"):
        make_trainer(dataloader_drop_last=True, per_device_train_batch_size=32).train()
