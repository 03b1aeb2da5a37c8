"""The loss equals the formula, and nothing that should not matter matters."""

import copy

import pytest
import torch
from datasets import Dataset
from formula import LORA, averaged, batch_of, expected_loss, log_probs, perturb, trained, weights
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from mdu_trainer import MDLMTrainer
from mdu_trainer.masking import forward_process

OTHER = {"tau": 0.5, "anchor_source": "other"}
COUNTERFACTUAL = {"tau": 1.0, "anchor_input": "counterfactual"}
HIDDEN = {"tau": 0.5, "anchor_input": "hidden_prompt"}
CONTENT, GENERATED = ({"tau": 0.5, "forget_masking": kind} for kind in ("content", "generated"))


@pytest.mark.parametrize(
    "options",
    [
        {"tau": 0.0},
        {"tau": 0.5},
        {"tau": 1.0, "kl_reduction": "token"},
        {"tau": 0.75, "anchor_source": "current"},
        {"tau": 0.25, "t_min": 1.0, "t_max": 1.0},
        {"tau": 0.0, "kl_direction": "forward"},
        {"tau": 0.5, "kl_direction": "forward", "kl_reduction": "token"},
        {"tau": 0.5, "kl_direction": "js"},
        COUNTERFACTUAL,
        COUNTERFACTUAL | {"tau": 0.5, "kl_direction": "forward"},
        COUNTERFACTUAL | {"strike_quantile": 0.0, "anchor_source": "current"},
        COUNTERFACTUAL | {"strike_quantile": None, "kl_reduction": "token", "t_min": 1.0},
        {"tau": 0.0, "retain_loss_type": "kl", "retain_weight": 0.3},
        {"tau": 0.5, "retain_weight": 0.0},
        {"tau": 0.5, "retain_batch_size": 8},
        {"loss_type": "ga"},
        {"loss_type": "ga", "retain_weight": 0.0},
        {"loss_type": "bounded_ga", "loss_options": {"cap": 4.0}},
        {"loss_type": "npo", "retain_loss_type": "kl"},
        {"loss_type": "simnpo", "gamma": 0.3},
        {"loss_type": "wga", "alpha": 0.7},
        {"loss_type": "dpo", "time_epsilon": 0.1},
        {"loss_type": "dpo", "retain_loss_type": "kl", "retain_batch_size": 12},
        {"tau": 0.5, "anchor_input": "hidden_prompt", "retain_loss_type": "kl"},
        {"tau": 0.5, "anchor_input": "hidden_prompt", "anchor_source": "current"},
        {"tau": 0.25, "anchor_source": "ema", "anchor_ema_decay": 0.3},
        OTHER,
        OTHER | {"anchor_input": "prompt", "retain_loss_type": "kl"},
        OTHER | {"anchor_input": "hidden_prompt"},
        {"tau": 0.5, "mask_special_tokens": False},
        {"tau": 0.5, "forget_masking": "content"},
        {"tau": 0.25, "forget_masking": "generated", "kl_reduction": "token"},
        {"loss_type": "npo", "forget_masking": "generated"},
        {"loss_type": "simnpo", "mask_special_tokens": False},
        {"loss_type": "dpo", "forget_masking": "content"},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_loss_equals_the_formula_in_float64(make_trainer, make_model, make_speaker, save_other, options):
    model = (make_speaker if options.get("forget_masking") == "generated" else make_model)().double()
    initial = copy.deepcopy(model)
    if options.get("anchor_source") == "other":
        options = options | {"anchor_source": str(save_other(dtype=torch.float64))}
    trainer = make_trainer(model, **options)
    perturb(trainer.model)
    trainer.expected_source = None
    if options.get("anchor_source") == "ema":
        trainer.anchor.update(trainer.model)
        trainer.expected_source = averaged(initial, trainer.model, 0.3)
    elif trainer.args.anchor_checkpoint is not None:
        trainer.expected_source = AutoModelForCausalLM.from_pretrained(trainer.args.anchor_source)
    for epoch in range(3):
        batch = batch_of(trainer, epoch)
        loss = trainer.compute_loss(trainer.model, batch)
        assert loss.dtype == torch.float64
        assert loss.item() == pytest.approx(expected_loss(trainer, initial, batch).item(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("time_weighting", [True, False])
def test_fine_tuning_loss_equals_the_formula(make_trainer, make_model, sets, time_weighting):
    trainer = make_trainer(make_model().double(), forget=sets[1], cls=MDLMTrainer, time_weighting=time_weighting)
    part = batch_of(trainer)["train"]
    noised = forward_process(part, trainer.backbone.mask_token_id)
    trainer.model.eval()
    rows = []
    for i in range(4):
        masked, length = noised.masked[i], int(part["attention_mask"][i].sum())
        log_p = log_probs(trainer.model, noised.input_ids[i, :length])
        nll = -log_p[masked[:length]].gather(1, part["input_ids"][i][masked][:, None]).sum()
        scale = noised.weight[i] / part["completion_mask"][i].sum() if time_weighting else 1 / masked.sum()
        rows.append(nll * scale)
    loss = trainer.compute_loss(trainer.model, {"train": part})
    assert loss.item() == pytest.approx(torch.stack(rows).mean().item(), rel=1e-6)


def test_prompt_masking_and_end_padding(make_trainer, sets):
    trainer = make_trainer(
        forget=sets[1],
        cls=MDLMTrainer,
        prompt_mask_ratio=0.5,
        pad_with_end_tokens=True,
        per_device_train_batch_size=20,
    )
    part = batch_of(trainer)["train"]
    assert part["attention_mask"].min() == 1, "the padding is response now"
    takes_prompt = part["completion_mask"][:, 0].bool()
    assert 3 <= takes_prompt.sum() <= 17
    assert part["completion_mask"][takes_prompt].all(), "the whole prompt takes part, or none of it"


@pytest.mark.parametrize("options", [{"tau": 0.5}, COUNTERFACTUAL, CONTENT, GENERATED, HIDDEN])
def test_padding_and_batch_composition_change_nothing(make_trainer, make_speaker, options):
    trainer = make_trainer(make_speaker().double(), per_device_train_batch_size=8, **options)
    perturb(trainer.model)
    trainer.model.eval()
    batch = batch_of(trainer)
    _, figures = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    for i in range(8):
        alone = {}
        for name, part in batch.items():
            if name != "preferred":
                length = int(part["attention_mask"][i].sum())
                alone[name] = {k: v[i : i + 1, :length] if v.ndim == 2 else v[i : i + 1] for k, v in part.items()}
        _, single = trainer.compute_loss(trainer.model, alone, return_outputs=True)
        for name, figure in figures.items():
            assert single[name].value.item() == pytest.approx(figure.value[i].item(), rel=1e-6), name


@pytest.mark.parametrize(
    "options",
    [
        {"tau": 0.5},
        {"tau": 0.0, "kl_reduction": "token"},
        {"loss_type": "npo"},
        COUNTERFACTUAL,
        CONTENT | {"kl_reduction": "token"},
        GENERATED,
        HIDDEN,
    ],
)
def test_accumulation_does_not_change_the_update(make_trainer, make_speaker, sets, options):
    ends = []
    for batch_size, steps in ((8, 1), (2, 4), (1, 8)):
        trainer = make_trainer(
            make_speaker().double(),
            retain=sets[1].select(range(13)),  # the last update of an epoch is smaller: 5 rows
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=0.1,
            max_steps=4,
            max_grad_norm=0.0,
            **options,
        )
        ends.append(trained(trainer))
    start = weights(make_trainer(make_speaker().double()))
    assert (ends[0] - start).norm() > 1e-3
    for other in ends[1:]:
        assert (ends[0] - other).norm() / (ends[0] - start).norm() < 1e-6


@pytest.mark.parametrize("peft", [False, True])
def test_same_seed_same_weights_and_another_seed_others(make_trainer, peft):
    runs = []
    for seed in (1, 1, 2):
        torch.rand(3)  # whatever was drawn before
        lora = {"peft_config": LoraConfig(**LORA)} if peft else {}
        runs.append(trained(make_trainer(tau=0.5, seed=seed, **lora)))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_every_weight_moves(make_trainer):
    trainer = make_trainer()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])] == []


def test_mdu_flattens_forget_rows_and_keeps_the_rest(make_trainer, make_model, sets):
    model = make_model(hidden_size=64)
    both = Dataset.from_list([{k: row[k] for k in ("prompt", "completion")} for rows in sets for row in rows])
    shared = {"per_device_train_batch_size": 28, "learning_rate": 3e-3}
    make_trainer(model, forget=both, cls=MDLMTrainer, max_steps=150, time_weighting=False, **shared).train()
    trainer = make_trainer(model, max_steps=40, eval_dataset={"forget": sets[0], "retain": sets[1]}, **shared)
    before, _, after = trainer.evaluate(), trainer.train(), trainer.evaluate()
    assert after["eval_forget_kl"] < 0.3 * before["eval_forget_kl"]
    assert after["eval_forget_retain_loss"] > before["eval_forget_retain_loss"] + 1, "the answers are less likely"
    assert after["eval_retain_retain_loss"] < before["eval_retain_retain_loss"] + 0.5
