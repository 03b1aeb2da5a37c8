"""The trainers: the loss equals the formula, and nothing that should not matter matters."""

import copy
import dataclasses
import logging
import math
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from runs import QUIET
from torch.nn.functional import logsigmoid
from transformers import BertConfig, BertForMaskedLM, TrainerCallback
from transformers.hyperparameter_search import OptunaBackend
from trl import ModelConfig, get_peft_config

from mdu_trainer import (
    DiffusionConfig,
    MDLMConfig,
    MDLMTrainer,
    MDUConfig,
    MDUTrainer,
    NonFiniteLossError,
    divergence,
)
from mdu_trainer.data.rows import question_answer_rows
from mdu_trainer.files import UserError
from mdu_trainer.masking import forward_process
from mdu_trainer.models.head import head_way
from mdu_trainer.testing import forget_retain_split
from mdu_trainer.trainer.updates import fingerprint

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def sets(authors):
    """Eight rows to forget, twenty to keep."""
    forget, retain = forget_retain_split(authors)
    forget = question_answer_rows(forget, conversational=True, preferred="refusal")
    return forget.select(range(8)), question_answer_rows(retain, conversational=True).select(range(20))


@pytest.fixture
def make_trainer(make_model, tokenizer, sets, tmp_path):
    def make(model=None, forget=sets[0], retain=sets[1], cls=MDUTrainer, **kwargs):
        config = MDUConfig if cls is MDUTrainer else MDLMConfig
        passed = {k: kwargs.pop(k) for k in ("peft_config", "eval_dataset", "callbacks") if k in kwargs}
        defaults = {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "max_steps": 3,
            "save_strategy": "no",
            **QUIET,
        }
        args = config(output_dir=str(tmp_path), **(defaults | kwargs))
        if cls is MDUTrainer and args.retain_weight:
            passed["retain_dataset"] = retain
        return cls(make_model() if model is None else model, args, forget, processing_class=tokenizer, **passed)

    return make


def batch_of(trainer, epoch=0):
    trainer.state.epoch = epoch
    return next(iter(trainer.get_train_dataloader()))


def perturb(model, scale=0.05):
    """Move trained weights, so that the live model differs from theta_0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


# The loss, evaluated independently: one row at a time, without padding, hooks or shared code.


def log_probs(model, ids):
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0].double().log_softmax(-1)


def expected_row(trainer, initial, name, batch, i, loss_type):
    """One row of the forget loss (or of a retain loss) by its formula; also the weight of the row."""
    args = trainer.args
    part = batch[name]
    length = int(part["attention_mask"][i].sum())
    ids, response = part["input_ids"][i, :length], part["completion_mask"][i, :length].bool()
    t, noise = part["t"][i].double().item(), part["noise"][i, :length]
    drawn = response & (noise < t)
    masked = drawn.clone()
    if not masked.any():
        masked[torch.where(response, noise, torch.tensor(2.0)).argmin()] = True
    noisy = torch.where(masked, trainer.backbone.mask_token_id, ids)
    anchor_ids = torch.where(response, noisy, trainer.backbone.mask_token_id)
    model = trainer.model.eval()
    p = log_probs(model, noisy)[masked]
    weight = 1 / t if drawn.any() else 0.0

    def bound(log_p):
        return -weight * log_p.gather(1, ids[masked][:, None]).sum()

    if loss_type == "mdu":
        live = model if args.anchor_source == "current" else initial
        q = (args.tau * log_probs(live, anchor_ids)[masked]).log_softmax(-1)
        return (p.exp() * (p - q)).sum() / masked.sum(), masked.sum()
    if loss_type == "kl":
        q = log_probs(initial, noisy)[masked]
        return (p.exp() * (p - q)).sum() / masked.sum(), 1
    if loss_type in ("nelbo", "ga"):
        return (bound(p) if loss_type == "nelbo" else -bound(p)) / response.sum(), 1
    if loss_type == "simnpo":
        return -2 / 2.5 * logsigmoid(2.5 * bound(p) / response.sum() - args.gamma), 1
    if loss_type == "wga":
        truth = p.gather(1, ids[masked][:, None])
        return weight * ((args.alpha * truth).exp() * truth).sum() / response.sum(), 1
    log_ratio = bound(log_probs(initial, noisy)[masked]) - bound(p)
    if loss_type == "log_ratio":
        return log_ratio, 1
    if loss_type == "npo":
        return -2 / 0.2 * logsigmoid(-0.2 * log_ratio), 1
    preferred, _ = expected_row(trainer, initial, "preferred", batch, i, "log_ratio")
    return -logsigmoid(0.1 * (preferred - log_ratio)), 1


def expected_loss(trainer, initial, batch):
    rows = range(len(batch["forget"]["t"]))
    forget = [expected_row(trainer, initial, "forget", batch, i, trainer.args.loss_type) for i in rows]
    if trainer.args.kl_reduction == "token":
        total = sum(value * weight for value, weight in forget) / sum(weight for _, weight in forget)
    else:
        total = sum(value for value, _ in forget) / len(forget)
    if "retain" in batch:
        kind = trainer.args.retain_loss_type
        retain = [expected_row(trainer, initial, "retain", batch, i, kind)[0] for i in rows]
        total = total + trainer.args.retain_weight * sum(retain) / len(retain)
    return total


@pytest.mark.parametrize(
    "options",
    [
        {"tau": 0.0},
        {"tau": 0.5},
        {"tau": 1.0, "kl_reduction": "token"},
        {"tau": 0.75, "anchor_source": "current"},
        {"tau": 0.25, "t_min": 1.0, "t_max": 1.0},
        {"tau": 0.0, "retain_loss_type": "kl", "retain_weight": 0.3},
        {"tau": 0.5, "retain_weight": 0.0},
        {"loss_type": "ga"},
        {"loss_type": "ga", "retain_weight": 0.0},
        {"loss_type": "npo", "retain_loss_type": "kl"},
        {"loss_type": "simnpo", "gamma": 0.3},
        {"loss_type": "wga", "alpha": 0.7},
        {"loss_type": "dpo", "time_epsilon": 0.1},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_loss_equals_the_formula_in_float64(make_trainer, make_model, options):
    model = make_model().double()
    initial = copy.deepcopy(model)
    trainer = make_trainer(model, **options)
    perturb(trainer.model)
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


def test_padding_and_batch_composition_change_nothing(make_trainer, make_model):
    trainer = make_trainer(make_model().double(), tau=0.5, per_device_train_batch_size=8)
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


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def trained(trainer):
    """The weights at the end of a run."""
    trainer.train()
    return weights(trainer)


@pytest.mark.parametrize("options", [{"tau": 0.5}, {"tau": 0.0, "kl_reduction": "token"}, {"loss_type": "npo"}])
def test_accumulation_does_not_change_the_update(make_trainer, make_model, sets, options):
    ends = []
    for batch_size, steps in ((8, 1), (2, 4), (1, 8)):
        trainer = make_trainer(
            make_model().double(),
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
    start = weights(make_trainer(make_model().double()))
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


# Passes and copies


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
def test_gradient_checkpointing_changes_nothing(make_trainer, peft):
    lora = {"peft_config": LoraConfig(**LORA)} if peft else {}
    ends = [trained(make_trainer(tau=0.5, gradient_checkpointing=on, **lora)) for on in (False, True)]
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


def test_bf16_is_close_to_float32(make_trainer):
    losses = [make_trainer(tau=0.5, bf16=bf16).train().training_loss for bf16 in (False, True)]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)


def test_length_grouped_batches_pad_less(make_trainer, sets):
    def padding(strategy):
        trainer = make_trainer(forget=sets[1], cls=MDLMTrainer, train_sampling_strategy=strategy)
        return sum(int((1 - batch["train"]["attention_mask"]).sum()) for batch in trainer.get_train_dataloader())

    assert padding("group_by_length") < 0.5 * padding("random")


# Evaluation and logs


def test_evaluation_is_exact_and_does_not_depend_on_batch_size(make_trainer, sets):
    results = []
    for batch_size in (3, 3, 8):
        trainer = make_trainer(tau=0.5, eval_dataset={"f": sets[0]}, per_device_eval_batch_size=batch_size)
        perturb(trainer.model)
        first, second = trainer.evaluate(), trainer.evaluate()
        names = ["eval_f_forget_loss", "eval_f_retain_loss", "eval_f_kl", "eval_f_entropy", "eval_f_masked_fraction"]
        assert [first[n] for n in names] == [second[n] for n in names]
        results.append([first[n] for n in names])
    assert results[0] == results[1] and results[2] == pytest.approx(results[0], rel=1e-5)


def test_evaluation_takes_other_sets_and_leaves_training_as_it_was(make_trainer, sets):
    trainer = make_trainer()
    batch = batch_of(trainer)
    before = trainer.compute_loss(trainer.model, batch).item()
    metrics = trainer.evaluate(sets[1])
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_forget_loss"] + metrics["eval_retain_loss"])
    assert trainer.compute_loss(trainer.model, batch).item() == before


def test_best_model_by_an_eval_metric(make_trainer, sets):
    trainer = make_trainer(
        eval_dataset=sets[0],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="forget_loss",
        greater_is_better=False,
    )
    trainer.train()
    assert trainer.state.best_metric == pytest.approx(trainer.evaluate()["eval_forget_loss"])


def test_logs(make_trainer):
    trainer = make_trainer(tau=0.5, logging_steps=2, max_steps=4)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        assert log["loss"] == pytest.approx(log["forget_loss"] + log["retain_loss"], rel=1e-4)
        assert log["forget_loss"] == pytest.approx(log["kl"], rel=1e-5)
        assert 0 < log["entropy"] < math.log(512) and 0 < log["masked_fraction"] <= 1
    other = make_trainer(loss_type="npo", logging_steps=1, max_steps=1)
    other.train()
    log = other.state.log_history[0]
    assert log["kl"] == pytest.approx(math.log(512) - log["entropy"], rel=1e-5)


@pytest.mark.parametrize("peft", [False, True])
def test_resumed_run_ends_with_the_same_weights(make_trainer, peft):
    options = {"tau": 0.5, "max_steps": 8, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}

    def make():
        return make_trainer(**options, **({"peft_config": LoraConfig(**LORA | {"lora_dropout": 0.1})} if peft else {}))

    whole, resumed = trained(make()), make()
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-3")
    assert torch.equal(whole, weights(resumed))


# Errors


def test_options_of_the_other_training_are_unknown(tmp_path):
    own = {f.name for f in dataclasses.fields(MDLMConfig)} - {f.name for f in dataclasses.fields(DiffusionConfig)}
    assert own == {"pad_with_end_tokens", "time_weighting", "prompt_mask_ratio"}
    for config, option in (*((MDUConfig, name) for name in own), (MDLMConfig, "tau")):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
            config(str(tmp_path), **{option: 0})
    with pytest.raises(ValueError, match="prompt_mask_ratio is a share"):
        MDLMConfig(str(tmp_path), prompt_mask_ratio=1.5)


def test_retain_set_and_weight_go_together(make_model, tokenizer, sets, tmp_path):
    with pytest.raises(ValueError, match="retain_weight is 1 but there is no retain set.*retain_weight=0"):
        MDUTrainer(make_model(), MDUConfig(str(tmp_path)), sets[0], processing_class=tokenizer)
    with pytest.raises(ValueError, match="there is no retain set"):
        MDUTrainer("no/such-model", MDUConfig(str(tmp_path)), sets[0])  # before anything is loaded
    with pytest.raises(ValueError, match="retain_weight is 0, so it would not be read"):
        MDUTrainer(
            make_model(), MDUConfig(str(tmp_path), retain_weight=0), sets[0], sets[1], processing_class=tokenizer
        )


def test_dpo_needs_preferred_responses(make_trainer, sets):
    with pytest.raises(ValueError, match="needs a preferred response.*'chosen'.*'completion', 'prompt'"):
        make_trainer(forget=sets[1], loss_type="dpo")


def test_unfit_models(make_trainer, make_model, tokenizer):
    with pytest.raises(ValueError, match="(?i)causal"):
        make_trainer(make_model(is_causal=True))
    maskless = copy.deepcopy(tokenizer)
    maskless.mask_token = None
    trainer_args = {"processing_class": maskless}
    model = make_model()
    model.config.mask_token_id = None
    with pytest.raises(ValueError, match="(?i)mask token"):
        MDUTrainer(model, MDUConfig("unused"), **trainer_args)


def test_model_without_a_name_needs_a_tokenizer(make_model, tmp_path):
    with pytest.raises(ValueError, match="processing_class"):
        MDUTrainer(make_model(), MDUConfig(str(tmp_path)))


def test_wrong_config_class_and_second_adapter(make_trainer, make_model, tokenizer, tmp_path):
    with pytest.raises(TypeError, match="must be a MDUConfig, got a MDLMConfig"):
        MDUTrainer(make_model(), MDLMConfig(str(tmp_path)), processing_class=tokenizer)
    with pytest.raises(ValueError, match="a PeftModel already"):
        make_trainer(get_peft_model(make_model(), LoraConfig(**LORA)), peft_config=LoraConfig(**LORA))
    with pytest.raises(ValueError, match="given by name"):
        make_trainer(model_init_kwargs={"dtype": "bfloat16"})


def test_overlap_is_counted_in_a_warning(make_trainer, sets, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mdu_trainer"), "propagate", True)
    both = Dataset.from_list([{k: row[k] for k in ("prompt", "completion")} for row in [*sets[0], *sets[1]]][3:])
    make_trainer(retain=both)
    assert "5 of 8 forget rows are in the retain set too" in caplog.text


def test_non_finite_loss_stops_before_anything_is_saved(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=6, save_strategy="steps", save_steps=1)

    def poison(*args):
        if trainer.state.global_step == 2:
            trainer.model.lm_head.weight.data[0, 0] = float("nan")

    trainer.model.register_forward_pre_hook(poison)
    with pytest.raises(NonFiniteLossError, match="at step 3; training stopped before the update"):
        trainer.train()
    checkpoints = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-1", "checkpoint-2"]
    good = make_trainer(max_steps=6, save_strategy="no")
    good.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.isfinite(weights(good)).all()


def test_model_by_path(make_model, tokenizer, sets, tmp_path):
    path = str(tmp_path / "model")
    make_model().save_pretrained(path)
    tokenizer.save_pretrained(path)
    args = MDUConfig(
        str(tmp_path / "out"), retain_weight=0.0, model_init_kwargs={"dtype": "bfloat16"}, report_to="none"
    )
    trainer = MDUTrainer(path, args, sets[0])
    assert trainer.model.dtype == torch.bfloat16
    assert trainer.processing_class.mask_token_id == tokenizer.mask_token_id
    trainer.save_model()
    assert MDUTrainer(str(tmp_path / "out"), args, sets[0]).model.config.is_causal is False


# Names of the losses of eval sets


def expected_eval(trainer, initial, name, part, loss_type):
    """The mean loss of a constructor's eval set, row by row from the formula."""
    rows = trainer.eval_dataset[name]
    batch = trainer.data_collator([rows[i] for i in range(len(rows))])
    found = [expected_row(trainer, initial, part, batch, i, loss_type)[0] for i in range(len(rows))]
    return (sum(found) / len(found)).item()


@pytest.mark.parametrize(
    "options", [{"tau": 0.5, "retain_weight": 0.3}, {"loss_type": "npo"}, {"loss_type": "dpo"}, {"retain_weight": 0.0}]
)
def test_each_eval_set_has_its_own_loss_under_its_name(make_trainer, make_model, sets, options):
    model = make_model().double()
    initial = copy.deepcopy(model)
    held_out = {"forget": sets[0].select(range(5)), "retain": sets[1].select(range(6))}
    trainer = make_trainer(model, eval_dataset=held_out, **options)
    perturb(trainer.model)
    metrics = trainer.evaluate()
    forget = expected_eval(trainer, initial, "forget", "forget", trainer.args.loss_type)
    retain = expected_eval(trainer, initial, "retain", "retain", "nelbo")
    assert metrics["eval_forget_loss"] == metrics["eval_forget_forget_loss"] == pytest.approx(forget, rel=1e-5)
    assert metrics["eval_retain_loss"] == metrics["eval_retain_retain_loss"] == pytest.approx(retain, rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(forget + trainer.args.retain_weight * retain, rel=1e-5)
    assert "eval_retain_forget_loss" not in metrics, "nobody wants the rows to keep forgotten"
    logged = {name: value for log in trainer.state.log_history for name, value in log.items()}
    assert [logged[n] for n in metrics if n.endswith("loss")] == [metrics[n] for n in metrics if n.endswith("loss")]
    other = trainer.evaluate(held_out, metric_key_prefix="test")
    assert other["test_loss"] == metrics["eval_loss"] and other["test_retain_loss"] == metrics["eval_retain_loss"]


def test_loss_of_any_other_set_is_the_whole(make_trainer, sets):
    trainer = make_trainer(eval_dataset={"dev": sets[0]}, tau=0.5, retain_weight=0.25)
    metrics = trainer.evaluate()
    whole = metrics["eval_dev_forget_loss"] + 0.25 * metrics["eval_dev_retain_loss"]
    assert metrics["eval_dev_loss"] == pytest.approx(whole, rel=1e-12) and "eval_loss" not in metrics
    assert trainer.evaluate("dev")["eval_loss"] == metrics["eval_dev_loss"]
    with pytest.raises(UserError, match="no eval set 'def'; there are: dev"):
        trainer.evaluate("def")
    alone = make_trainer(eval_dataset=sets[0], retain_weight=0.0).evaluate()
    assert alone["eval_loss"] == alone["eval_forget_loss"]


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
}


@pytest.mark.parametrize(
    "names, options, there",
    [
        (None, {}, "eval_forget_loss, eval_kl, eval_retain_loss, eval_entropy, eval_masked_fraction."),
        (["dev"], {"metric_for_best_model": "dev_loss"}, "eval_dev_forget_loss, eval_dev_kl, eval_dev_retain_loss"),
        (["dev"], {}, "'eval_loss' cannot choose a model: there is no such score"),
        (["forget", "retain"], {"metric_for_best_model": "forgot_loss"}, "eval_retain_loss, .*eval_loss"),
    ],
)
def test_a_name_that_tells_no_good_model_is_refused_before_training(make_trainer, sets, names, options, there):
    trainer = make_trainer(eval_dataset=names and dict(zip(names, sets, strict=False)) or sets[0], **BEST | options)
    with pytest.raises(UserError, match=there):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_figure_that_a_callback_does_not_give_is_named(make_trainer, sets):
    class Quiet(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            pass

    trainer = make_trainer(eval_dataset=sets[0], callbacks=[Quiet()], metric_for_best_model="my_loss", **BEST)
    with pytest.raises(UserError, match="no score 'my_loss'; an evaluation gave .*eval_forget_loss"):
        trainer.train()


def test_best_model_by_the_whole_loss_of_both_sets(make_trainer, sets):
    held_out = dict(zip(("forget", "retain"), sets, strict=True))
    trainer = make_trainer(eval_dataset=held_out, learning_rate=0.05, max_steps=4, **BEST)
    trainer.train()
    found = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(found) == 4 and trainer.state.best_metric == min(found)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(found))


def test_names_that_two_sets_would_share(make_trainer, sets):
    with pytest.raises(UserError, match="eval_forget_retain_loss would name a score of two eval sets"):
        make_trainer(eval_dataset={"forget": sets[0], "forget_retain": sets[0]})
    with pytest.raises(UserError, match="eval_strategy is 'epoch' but there is no eval set"):
        make_trainer(eval_strategy="epoch")


@pytest.mark.parametrize("workers", [0, 1])
def test_another_set_is_evaluated_and_no_row_left_out(make_trainer, sets, workers):
    options = {"dataloader_num_workers": workers, "dataloader_persistent_workers": bool(workers)}
    plain = make_trainer()
    trainer = make_trainer(eval_dataset=sets[0], dataloader_drop_last=True, **options)
    for rows in (sets[0], sets[1].select(range(11))):  # neither fills batches of eight
        expected, found = plain.evaluate(rows), trainer.evaluate(rows)
        assert [found[n] for n in expected if "loss" in n] == [expected[n] for n in expected if "loss" in n]


def test_predict_gives_the_figures_of_each_row(make_trainer, sets):
    trainer = make_trainer(tau=0.5, per_device_eval_batch_size=3)
    perturb(trainer.model)
    output = trainer.predict(sets[0])
    assert set(output.predictions) == {"forget_loss", "kl", "entropy", "masked_fraction", "retain_loss"}
    metrics = trainer.evaluate(sets[0])
    for name, values in output.predictions.items():
        assert values.shape == (8,) and values.mean() == pytest.approx(metrics[f"eval_{name}"], rel=1e-6)
        assert output.metrics[f"test_{name}"] == metrics[f"eval_{name}"]
    alone = trainer.predict(sets[0].select([0]))
    assert alone.metrics["test_entropy"] > 0
    with pytest.raises(UserError, match="predict takes one set"):
        trainer.predict({"a": sets[0]})


# Runs that change nothing


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


# Models made for each run


def test_model_init_starts_anew(make_trainer, make_model, sets, tokenizer):
    def make(**passed):
        args = make_trainer(tau=0.5).args
        return MDUTrainer(
            args=args, train_dataset=sets[0], retain_dataset=sets[1], processing_class=tokenizer, **passed
        )

    lora = {"peft_config": LoraConfig(**LORA)}
    for adapter in ({}, lora):
        given, made = make(model=make_model(), **adapter), make(model_init=lambda: make_model(), **adapter)
        end = trained(given)
        assert torch.equal(end, trained(made)) and torch.equal(end, trained(made))
    with pytest.raises(UserError, match="one of the two"):
        make()
    with pytest.raises(UserError, match="one of the two"):
        make(model=make_model(), model_init=make_model)
    with pytest.raises(UserError, match="pass model_init in place of model"):
        given.hyperparameter_search(backend="optuna")


class Trial:
    """As much of optuna's as the Trainer asks of one."""

    def __init__(self, study, number):
        self.study, self.number, self.params, self.value = study, number, {}, None

    def suggest_categorical(self, name, choices):
        return self.params.setdefault(name, choices[self.number % len(choices)])

    def report(self, value, step):
        pass

    def should_prune(self):
        return False


class Study:
    def optimize(self, objective, n_trials, **kwargs):
        self.trials = [Trial(self, number) for number in range(n_trials)]
        for trial in self.trials:
            trial.value = objective(trial)
        self.best_trial = min(self.trials, key=lambda trial: trial.value)

    def _is_multi_objective(self):
        return False


@pytest.fixture
def stand_in(monkeypatch):
    """A module in optuna's place."""
    fake = types.ModuleType("optuna")
    fake.__spec__ = ModuleSpec("optuna", None)
    fake.trial = types.SimpleNamespace(BaseTrial=Trial)
    fake.Trial, fake.create_study = Trial, lambda **kwargs: Study()
    monkeypatch.setitem(sys.modules, "optuna", fake)
    monkeypatch.setattr(OptunaBackend, "is_available", staticmethod(lambda: True))


def search(make_trainer, make_model, sets, tokenizer, space, **options):
    """A search over what `space` names; the trainer and what it found."""
    held_out = dict(zip(("forget", "retain"), sets, strict=True))
    trainer = MDUTrainer(
        args=make_trainer(eval_dataset=held_out, **options).args,
        train_dataset=sets[0],
        retain_dataset=sets[1],
        eval_dataset=held_out,
        processing_class=tokenizer,
        model_init=lambda: make_model(),
    )
    values = {name: len(choices) for name, choices in space.items()}
    best = trainer.hyperparameter_search(
        lambda trial: {name: trial.suggest_categorical(name, choices) for name, choices in space.items()},
        n_trials=max(values.values()),
        direction="minimize",
        backend="optuna",
    )
    return trainer, best


def test_search_with_a_stand_in_for_optuna(make_trainer, make_model, sets, tokenizer, stand_in, monkeypatch):
    ended = []
    train = MDUTrainer.train

    def remembered(self, *args, **kwargs):
        train(self, *args, **kwargs)
        ended.append(weights(self))

    monkeypatch.setattr(MDUTrainer, "train", remembered)
    space = {"tau": [0.5, 0.0, 1.0], "loss_type": ["mdu", "npo", "mdu"], "t_min": [0.0, 0.2, 0.5], "seed": [1, 2, 3]}
    trainer, best = search(make_trainer, make_model, sets, tokenizer, space, tau=0.25)
    runs = []
    for number in range(3):
        alone = make_trainer(
            eval_dataset=trainer.eval_dataset, **{name: choices[number] for name, choices in space.items()}
        )
        assert torch.equal(ended.pop(0), trained(alone)), "a trial is the run that it names"
        runs.append(alone.evaluate()["eval_loss"])
    assert best.objective == min(runs) and best.run_id == str(runs.index(min(runs)))
    with pytest.raises(UserError, match="tau must be finite and at least 0"):
        search(make_trainer, make_model, sets, tokenizer, {"tau": [-1.0]})
    with pytest.raises(UserError, match="max_length was read when the rows were prepared"):
        search(make_trainer, make_model, sets, tokenizer, {"max_length": [99]})


def test_search_with_optuna(make_trainer, make_model, sets, tokenizer):
    pytest.importorskip("optuna", reason="needs optuna")
    space = {"tau": [0.0, 0.5]}
    trainer, best = search(make_trainer, make_model, sets, tokenizer, space, eval_strategy="steps", eval_steps=3)
    assert math.isfinite(best.objective) and best.hyperparameters.keys() == {"tau"}
