"""What the trainers refuse, how they resume, and models made for each run."""

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
from formula import LORA, trained, weights
from peft import LoraConfig, get_peft_model
from transformers.hyperparameter_search import OptunaBackend

from mdu_trainer import DiffusionConfig, MDLMConfig, MDUConfig, MDUTrainer, NonFiniteLossError
from mdu_trainer.files import UserError


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
            eval_dataset=dict(zip(("forget", "retain"), sets, strict=True)),
            **{name: choices[number] for name, choices in space.items()},
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
