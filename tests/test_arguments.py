"""Every argument of transformers is honoured, refused, or named in a warning: none is dropped without a word."""

import dataclasses
import json
import logging

import pytest
import torch
from runs import QUIET
from transformers import TrainingArguments
from transformers.utils.logging import warning_once

from mdu_trainer import MDLMConfig, MDUConfig, MDUTrainer
from mdu_trainer.config.arguments import IGNORED, REFUSED
from mdu_trainer.data.rows import question_answer_rows
from mdu_trainer.files import UserError
from mdu_trainer.testing import forget_retain_split, tiny_mdlm

EPOCH = {"max_steps": -1, "num_train_epochs": 1}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
BEST = EVALUATED | SAVED | {"metric_for_best_model": "forget_loss", "load_best_model_at_end": True}

# field: value, what is observed of a run, options of the run with the value and of that without
ALTERS = {
    "output_dir": ("elsewhere", "files", SAVED),
    "per_device_train_batch_size": (2, "weights", {}),
    "num_train_epochs": (2, "steps", EPOCH),
    "max_steps": (1, "steps", {}),
    "learning_rate": (5e-3, "weights", {}),
    "lr_scheduler_type": ("constant", "weights", {}),
    "lr_scheduler_kwargs": ({"num_cycles": 2}, "weights", {"lr_scheduler_type": "cosine", "max_steps": 3}),
    "warmup_steps": (2, "weights", {}),
    "optim": ("sgd", "weights", {}),
    "weight_decay": (0.5, "weights", {}),
    "adam_beta1": (0.1, "weights", {}),
    "adam_beta2": (0.1, "weights", {}),
    "adam_epsilon": (1.0, "weights", {}),
    "gradient_accumulation_steps": (2, "weights", {}),
    "max_grad_norm": (1e-3, "weights", {"optim": "sgd"}),
    "bf16": (True, "weights", {}),
    "neftune_noise_alpha": (5.0, "weights", {}),
    "logging_strategy": ("epoch", "logs", EPOCH | {"logging_steps": 1}),
    "logging_steps": (1, "logs", {}),
    "logging_first_step": (True, "logs", {}),
    "include_num_input_tokens_seen": ("all", "logs", {"logging_steps": 1}),
    "eval_strategy": ("epoch", "logs", EPOCH),
    "eval_steps": (2, "logs", EVALUATED),
    "eval_delay": (3, "logs", EVALUATED),
    "eval_on_start": (True, "logs", {"eval_strategy": "epoch"}),
    "save_only_model": (True, "files", SAVED),
    "save_strategy": ("steps", "files", {"save_steps": 1}),
    "save_steps": (2, "files", SAVED),
    "save_total_limit": (1, "files", SAVED),
    "load_best_model_at_end": (True, "weights", BEST | {"load_best_model_at_end": False, "greater_is_better": True}),
    "metric_for_best_model": ("retain_loss", "best", BEST | {"greater_is_better": False}),
    "greater_is_better": (True, "best", BEST | {"greater_is_better": False}),
    "skip_memory_metrics": (False, "logs", {}),
    "seed": (1, "weights", {}),
    "data_seed": (1, "weights", {}),
    "dataloader_drop_last": (True, "steps", EPOCH),
    "train_sampling_strategy": ("sequential", "weights", {}),
}
# field: value, options of both runs. The weights and the figures of an evaluation stay what they are.
KEEPS = {
    "activation_checkpointing": (True, {}),
    "activation_checkpointing_kwargs": ({"use_reentrant": False}, {"activation_checkpointing": True}),
    "gradient_checkpointing": (True, {}),
    "gradient_checkpointing_kwargs": ({"use_reentrant": False}, {"gradient_checkpointing": True}),
    "torch_empty_cache_steps": (1, {}),
    "full_determinism": (True, {}),
    "per_device_eval_batch_size": (3, {}),
    "eval_do_concat_batches": (False, {"per_device_eval_batch_size": 3}),
    "eval_accumulation_steps": (1, {"per_device_eval_batch_size": 3}),
    "dataloader_num_workers": (1, {}),
    "dataloader_persistent_workers": (True, {"dataloader_num_workers": 1}),
    "dataloader_prefetch_factor": (3, {"dataloader_num_workers": 1}),
    "dataloader_multiprocessing_context": ("fork", {"dataloader_num_workers": 1}),
    "dataloader_pin_memory": (True, {}),
    "disable_tqdm": (False, {}),
    "log_level": ("error", {}),
}
# Read by parts of transformers and accelerate that nothing here stands in front of: devices, launchers, the Hub,
# trackers, resumption. Tests of their own: test_anchors (torch_compile), test_distributed (ddp, fsdp), test_push,
# test_checkpoints (resume_from_checkpoint).
LEFT_TO_TRANSFORMERS = {
    *("fp16", "tf32", "use_cpu", "accelerator_config", "deepspeed", "fsdp", "fsdp_config"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend"),
    *("ddp_timeout", "log_on_each_node", "log_level_replica", "save_on_each_node"),
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
    *("optim_args", "optim_target_modules", "hub_revision", "report_to", "run_name", "project"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("ignore_data_skip", "restore_callback_states_from_checkpoint", "resume_from_checkpoint"),
    "logging_nan_inf_filter",
    "do_eval",  # set by eval_strategy; alone it is named in a warning
}
OTHER_VALUES = {  # of arguments whose default is not a truth value
    "label_smoothing_factor": 0.1,
    "liger_kernel_config": {"rope": True},
    "include_for_metrics": ["inputs"],
    "parallelism_config": object(),
    "label_names": ["labels"],
    "length_column_name": "n",
    "local_rank": 0,
    "debug": "underflow_overflow",
}


def test_no_argument_is_without_a_place():
    places = [ALTERS.keys(), KEEPS.keys(), LEFT_TO_TRANSFORMERS, REFUSED.keys(), IGNORED.keys()]
    known = [name for place in places for name in place]
    assert len(known) == len(set(known)), "in one place each"
    assert {f.name for f in dataclasses.fields(TrainingArguments)} - set(known) == set()


def other_value(name):
    default = {f.name: f.default for f in dataclasses.fields(MDLMConfig)}[name]
    return OTHER_VALUES[name] if name in OTHER_VALUES else not default


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_with_what_to_do(tmp_path, name):
    with pytest.raises(UserError, match=f"{name} = .* is not supported: .*Leave {name} out"):
        MDLMConfig(str(tmp_path), use_cpu=True, **{name: other_value(name)})


@pytest.mark.parametrize("name", [*IGNORED, "do_eval"])
def test_named_in_a_warning(tmp_path, caplog, monkeypatch, name):
    monkeypatch.setattr(logging.getLogger("mdu_trainer"), "propagate", True)
    warning_once.cache_clear()
    MDLMConfig(str(tmp_path), use_cpu=True)
    assert not caplog.records
    MDLMConfig(str(tmp_path), use_cpu=True, **{name: other_value(name)})
    assert f"{name} = " in caplog.text and "does nothing" in caplog.text


@pytest.fixture(scope="module")
def rows(authors):
    """Eleven rows to forget, so that batches of four do not divide them, and ten to keep."""
    forget, retain = (question_answer_rows(rows, conversational=True) for rows in forget_retain_split(authors))
    return forget.select(range(11)), retain.select(range(10))


@pytest.fixture(scope="module")
def observe(rows, tokenizer, tmp_path_factory):
    """`observe(what, options)`: what a run ends with. A run of the same options is made once."""
    seen = {}

    def run(options):
        folder = tmp_path_factory.mktemp("run")
        folder = folder / options.pop("output_dir", "out")
        defaults = {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "max_steps": 2,
            "save_strategy": "no",
            **QUIET,
        }
        config = MDUConfig(str(folder), tau=0.5, **(defaults | options))
        model = tiny_mdlm(tokenizer, hidden_size=16, num_layers=1, num_heads=2)
        trainer = MDUTrainer(model, config, *rows, eval_dataset=rows[0], processing_class=tokenizer)
        trainer.train()
        logs = trainer.state.log_history
        return {
            "weights": torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).tolist(),
            "figures": [
                value
                for log in logs
                for name, value in log.items()
                if name.startswith("eval_") and name[-4:] != "time" and "_per_second" not in name
            ],
            "steps": trainer.state.global_step,
            "logs": [(log["step"], {k for k in log if not k.endswith("time")}) for log in logs],
            "files": sorted(str(path.relative_to(folder.parent)) for path in folder.rglob("*")),
            "best": trainer.state.best_metric,
        }

    def observed(what, options):
        key = json.dumps(options, sort_keys=True)
        if key not in seen:
            seen[key] = run(dict(options))
        return seen[key][what]

    return observed


@pytest.mark.parametrize("name", ALTERS)
def test_honoured(observe, name):
    value, what, options = ALTERS[name]
    assert observe(what, options | {name: value}) != observe(what, options)


@pytest.mark.parametrize("name", KEEPS)
def test_honoured_without_another_result(observe, name):
    value, options = KEEPS[name]
    options = options | {"eval_strategy": "steps", "eval_steps": 2}
    for what in ("weights", "figures"):
        other, usual = (observe(what, o) for o in (options | {name: value}, options))
        assert usual and other == pytest.approx(usual, rel=1e-5, abs=1e-6), what


def test_data_seed_orders_the_rows_and_leaves_the_masks(rows, make_model, tokenizer, tmp_path):
    def make(**options):
        config = MDUConfig(str(tmp_path), use_cpu=True, report_to="none", **options)
        return MDUTrainer(make_model(), config, *rows, processing_class=tokenizer)

    def order(trainer):
        return [trainer.train_dataset[i]["forget"]["row"] for i in range(11)]

    usual, other, same = make(), make(data_seed=7), make(data_seed=42)
    assert order(usual) == order(same) != order(other)
    visit, row = torch.zeros(11, dtype=torch.long), torch.arange(11)
    assert torch.equal(
        usual.train_dataset.schedules["forget"].times(visit, row),
        other.train_dataset.schedules["forget"].times(visit, row),
    )


@pytest.mark.parametrize("kind", ["all", "non_padding"])
def test_tokens_of_every_part_are_counted(rows, make_model, tokenizer, tmp_path, kind):
    config = MDUConfig(
        str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=4,
        include_num_input_tokens_seen=kind,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = MDUTrainer(make_model(), config, *rows, processing_class=tokenizer)
    trainer.train()
    lengths = [
        [len(item[part]["prompt_ids"]) + len(item[part]["completion_ids"]) for part in ("forget", "retain")]
        for item in (trainer.train_dataset[i] for i in range(11))
    ]
    lengths = torch.tensor(lengths)
    padded = sum(int(len(batch) * batch.max(dim=0).values.sum()) for batch in lengths.split(4))
    expected = padded if kind == "all" else int(lengths.sum())
    assert trainer.state.num_input_tokens_seen == expected
    assert trainer.state.log_history[-1]["num_input_tokens_seen"] == expected


@pytest.mark.parametrize(
    "options, message",
    [
        ({"output_dir": ""}, "output_dir is empty"),
        ({"output_dir": "  "}, "output_dir is empty"),
        ({"max_steps": 0}, "max_steps must be a whole number from 1, or -1 .*, got 0"),
        ({"max_steps": -7}, "max_steps .* got -7"),
        ({"max_steps": 2.5}, "max_steps .* got 2.5"),
        ({"num_train_epochs": 0}, "num_train_epochs must be finite and larger than 0, got 0"),
        ({"num_train_epochs": float("nan")}, "num_train_epochs must be finite"),
        ({"learning_rate": -1e-5}, "learning_rate must be finite and larger than 0, got -1e-05"),
        ({"learning_rate": 0.0}, "learning_rate must be finite and larger than 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite"),
        ({"learning_rate": "1e-5"}, "learning_rate must be finite"),
        ({"learning_rate": None}, "learning_rate must be finite"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and at least 0"),
        ({"adam_beta2": 1.0}, "adam_beta2 must be smaller than 1"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be finite"),
        ({"warmup_steps": float("nan")}, "warmup_steps must be finite"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be a whole number and at least 1"),
        ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps must be a whole number"),
        ({"logging_steps": 0}, "logging.steps"),
        ({"logging_steps": float("nan")}, "logging_steps must be finite"),
        ({"save_steps": 0}, "save_steps must be larger than 0"),
        ({"save_steps": -5}, "save_steps must be finite and at least 0, got -5"),
        ({"save_total_limit": 0}, "save_total_limit must be a whole number and at least 1"),
        ({"eval_steps": -1}, "eval_steps must be finite"),
        ({"seed": -1}, "seed must be a whole number and at least 0"),
        ({"seed": 2**32}, "seed must be smaller"),
        ({"tau": float("nan")}, "tau must be finite and at least 0, got nan"),
        ({"tau": "0.5"}, "tau must be finite"),
        ({"gamma": float("inf")}, "gamma must be finite"),
        ({"alpha": float("nan")}, "alpha must be finite"),
        ({"beta": float("nan")}, "beta must be finite and larger than 0"),
        ({"retain_weight": float("nan")}, "retain_weight must be finite"),
        ({"t_min": float("nan")}, "t_min must be a number"),
        ({"max_length": 10.5}, "max_length = 10.5 leaves no room"),
        ({"reference_device": "gpu"}, "reference_device 'gpu' is no device"),
        ({"optim": "adamv"}, "adamv is not a valid OptimizerNames"),
        ({"lr_scheduler_kwargs": "power=2"}, "lr_scheduler_kwargs must be a dict or a JSON object"),
        ({"model_init_kwargs": "{dtype: bf16}"}, "a JSON object cannot be read"),
        ({"report_to": "wandbb"}, "report_to 'wandbb' is unknown"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches is not supported"),
        ({"accelerator_config": {"even": True}}, "unexpected keyword argument 'even'"),
        ({"tau": -0.5}, "tau must be finite and at least 0"),
        ({"tau": float("inf")}, "tau must be finite"),
        ({"t_min": 0.8, "t_max": 0.5}, "t_min = 0.8 is larger than t_max = 0.5"),
        ({"t_max": 1.5}, r"must lie in \[0, 1\]"),
        ({"time_epsilon": 0.0}, "time_epsilon must lie between 0 and 1"),
        ({"loss_type": "mud"}, "loss_type 'mud' is unknown; choose one of mdu, ga"),
        ({"retain_loss_type": "ce"}, "retain_loss_type 'ce' is unknown"),
        ({"retain_weight": -1.0}, "retain_weight must be finite and at least 0"),
        ({"beta": 0.0}, "beta must be finite and larger than 0"),
        ({"retain_batch_size": 6}, "must be a multiple of per_device_train_batch_size = 4, got 6: .* Take 4 or 8"),
        ({"retain_batch_size": 2}, "must be a multiple of per_device_train_batch_size = 4, got 2"),
        ({"retain_batch_size": 0}, "retain_batch_size must be a multiple"),
        ({"retain_batch_size": 8.0}, "retain_batch_size must be a multiple"),
        ({"retain_batch_size": 8, "retain_weight": 0.0}, "retain_weight is 0, so no retain row would be read"),
        ({"rewind_to": "a/model"}, "go together: .* got 'a/model' and None"),
        ({"rewind_share": 0.5}, "go together: .* got None and 0.5"),
        ({"rewind_to": "", "rewind_share": 0.5}, "go together"),
        ({"rewind_to": "a/model", "rewind_share": 0.0}, "rewind_share must be finite and larger than 0, got 0.0"),
        ({"rewind_to": "a/model", "rewind_share": float("nan")}, "rewind_share must be finite and larger than 0"),
        ({"rewind_to": "a/model", "rewind_share": 1.5}, "rewind_share .* at most 1, got 1.5"),
        ({"max_length": 1}, "max_length = 1"),
        ({"train_sampling_strategy": "batch_rebalance"}, "'batch_rebalance' is not supported"),
        ({"metric_for_best_model": "kl"}, "Is more or less of metric_for_best_model = 'kl' better"),
        ({"metric_for_best_model": "eval_forget_retain_loss"}, "Is more or less"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_values_that_make_no_sense(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        MDUConfig(**({"output_dir": str(tmp_path), "use_cpu": True} | options))


def test_steps_that_nothing_reads_may_be_0(tmp_path):
    assert MDUConfig(str(tmp_path), save_strategy="no", save_steps=0, use_cpu=True).save_steps == 0
