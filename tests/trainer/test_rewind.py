"""The weights are set back towards the checkpoint before fine-tuning: once, before training, by the formula."""

import copy
import json
from pathlib import Path

import pytest
import torch
from formula import LORA, batch_of, expected_loss, perturb, trained, weights
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from mdu_trainer import MDUTrainer, load_model
from mdu_trainer.files import UserError
from mdu_trainer.trainer import rewind

PLAIN = {"rewind_share": 0.3, "tau": 0.5}
ADAPTER = LoraConfig(**LORA, modules_to_save=["lm_head"])


@pytest.fixture
def before(make_model, tokenizer, tmp_path):
    """The folder of the model before fine-tuning."""

    def save(model=None, name="before", dtype=None):
        folder = tmp_path / name
        (model or make_model()).to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture
def tuned(before):
    """`tuned(folder)`: the model that fine-tuning made of a checkpoint, here by moving its weights."""

    def load(folder, adapter=None, scale=0.05, **kwargs):
        model = load_model(folder, **{"dtype": torch.float32} | kwargs)
        if adapter is not None:
            torch.manual_seed(0)  # the adapter's first weights are drawn, whatever ran before
            model = get_peft_model(model, copy.copy(adapter))  # which PEFT changes
        perturb(model, scale)
        return model

    return load


def values(model):
    return {name: p.detach().double().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_equal_the_formula_in_float64(make_trainer, make_model, before, tuned, share, dtype, monkeypatch):
    monkeypatch.setattr(rewind, "CHUNK", 100)  # weights are read in pieces, the last one smaller
    folder = before(make_model(tie_word_embeddings=True), dtype=dtype)
    start, model = values(load_model(folder)), tuned(folder)
    given = values(model)
    assert "lm_head.weight" not in given, "tied"
    trainer = make_trainer(model, rewind_to=folder, rewind_share=share)
    trainer._begin()
    for name, p in trainer.model.named_parameters():
        expected = start[name] + (1 - share) * (given[name] - start[name])
        assert torch.equal(p, expected.float()), name
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_adapter_is_scaled(make_trainer, before, tuned):
    folder = before()
    model = tuned(folder, ADAPTER)
    start, given = values(load_model(folder)), values(copy.deepcopy(model).merge_and_unload())
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = make_trainer(model, rewind_to=folder, **PLAIN)
    trainer._begin()
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)
    changed = 0
    for name, p in values(copy.deepcopy(trainer.model).merge_and_unload()).items():
        expected = start[name] + 0.7 * (given[name] - start[name])
        assert torch.allclose(p, expected, rtol=0, atol=1e-6), name
        changed += not torch.equal(given[name], start[name])
    assert changed == 1 + 2 * 3, "the head, and three matrices of each layer"


@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_anchor_stays_that_of_the_model_as_it_was_given(make_trainer, before, tuned, adapter):
    folder = before()
    model = tuned(folder, adapter).double()
    initial = copy.deepcopy(model).eval()
    trainer = make_trainer(model, rewind_to=folder, **PLAIN)
    trainer._begin()
    batch = batch_of(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(expected_loss(trainer, initial, batch).item(), rel=1e-6)
    assert loss.item() != pytest.approx(expected_loss(trainer, trainer.model, batch).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("adapter", "options"), [(None, {}), (None, {"precompute_anchor": True}), (ADAPTER, {}), (None, {"tau": 0.0})]
)
def test_resumed_run_ends_with_the_same_weights(make_trainer, before, tuned, monkeypatch, adapter, options):
    folder = before()
    shared = PLAIN | {"rewind_to": folder, "max_steps": 5, "save_strategy": "steps", "save_steps": 2} | options
    whole = trained(make_trainer(tuned(folder, adapter), **shared))
    assert not torch.equal(whole, trained(make_trainer(tuned(folder, adapter), **shared | {"rewind_share": 0.1})))
    whole_again = make_trainer(tuned(folder, adapter), **shared)
    assert torch.equal(whole, trained(whole_again))
    resumed = make_trainer(tuned(folder, adapter), **shared)
    monkeypatch.setattr(rewind, "load_model", lambda *args, **kwargs: pytest.fail("a resumed run is set back already"))
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-2")
    assert torch.equal(whole, weights(resumed))


def test_once_a_model(make_trainer, make_model, before, tuned, sets, tokenizer, monkeypatch):
    folder, calls = before(), []
    load = rewind.load_model
    monkeypatch.setattr(rewind, "load_model", lambda *args, **kwargs: calls.append(1) or load(*args, **kwargs))
    trainer = make_trainer(tuned(folder), rewind_to=folder, **PLAIN)
    trainer.train()
    trainer.train()
    assert len(calls) == 1
    anew = MDUTrainer(None, trainer.args, *sets, None, tokenizer, model_init=lambda: tuned(folder))
    end = trained(anew)
    assert torch.equal(end, trained(anew)) and len(calls) == 3, "a new model for each run"


def test_rewinding_alone_is_no_training(make_trainer, before, tuned):
    folder = before()
    never = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1000, "max_steps": 1}
    with pytest.raises(UserError, match="no trained tensor differs"):
        make_trainer(tuned(folder), rewind_to=folder, **PLAIN, **never).train()


def test_facts_say_it_without_a_path(make_trainer, before, tuned):
    folder = before()
    trainer = make_trainer(tuned(folder), rewind_to=folder, retain_batch_size=8, **PLAIN)
    training = trainer.provenance.facts(trainer._run()).training
    assert training["rewound"] == "0.3 of the way to a local model"
    assert (training["forget_rows_an_update"], training["retain_rows_an_update"]) == (4, 8)
    trainer.args.rewind_to = "org/before"
    assert trainer.provenance.facts(trainer._run()).training["rewound"] == "0.3 of the way to org/before"
    plain = make_trainer(tuned(folder))
    assert not {"rewound", "retain_rows_an_update"} & plain.provenance.facts(plain._run()).training.keys()


# Errors


def refused(trainer, message):
    given = weights(trainer).clone()
    with pytest.raises(UserError, match=message):
        trainer.train()
    assert torch.equal(given, weights(trainer)), "no weight was changed"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"hidden_size": 16}, r"other shapes than the model: lm_head.weight \(\d+, 16\) instead of \(\d+, 32\)"),
        ({"num_layers": 1}, r"is another model than the one in training: it lacks model.layers.1"),
        ({"num_layers": 3}, r"is another model than the one in training: it has in addition model.layers.2"),
        ({"tie_word_embeddings": True}, "it lacks lm_head.weight"),
        ({"vocab_size": 1000}, "has a vocabulary of 1000 tokens, the model in training"),
        ({}, "equals .* in every weight, so there is nothing to rewind"),
    ],
)
def test_checkpoints_of_other_models(make_trainer, make_model, before, tuned, other, message):
    folder = before(make_model(**other), "other")
    model = tuned(before()) if other else load_model(folder, dtype=torch.float32)
    refused(make_trainer(model, rewind_to=folder, **PLAIN), message)


def test_equal_but_for_the_precision_is_equal(make_trainer, before):
    model = load_model(before(), dtype=torch.bfloat16)
    refused(make_trainer(model, rewind_to=str(Path(before())), **PLAIN), "nothing to rewind")


def test_folders_that_hold_no_fitting_model(make_trainer, before, tuned, tmp_path):
    folder = before()
    refused(make_trainer(tuned(folder), rewind_to=str(tmp_path / "nowhere"), **PLAIN), "nowhere cannot be read: ")
    adapter = tmp_path / "adapter"
    tuned(folder, ADAPTER).save_pretrained(adapter)
    refused(make_trainer(tuned(folder), rewind_to=str(adapter), **PLAIN), "is an adapter and the model in training")
    path = tmp_path / "before" / "tokenizer.json"
    content = json.loads(path.read_text())
    ids = content["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    path.write_text(json.dumps(content))
    refused(
        make_trainer(tuned(folder), rewind_to=folder, **PLAIN), "another vocabulary: 2 of its .* tokens have other"
    )
    path.unlink()
    path.with_name("tokenizer_config.json").unlink()
    make_trainer(tuned(folder), rewind_to=folder, **PLAIN)._begin()  # comes without a tokenizer


def test_adapters_that_cannot_be_scaled(make_trainer, make_model, before, tuned):
    folder = before()
    for adapter, message in (
        (IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]), "this one has IA3. Merge"),
        (LoraConfig(**LORA, use_dora=True), "LoRA with use_dora=True is no change of the base that can be scaled"),
        (LoraConfig(**LORA, bias="all"), "LoRA with bias='all'"),
        (LoraConfig(**LORA, init_lora_weights="pissa"), "LoRA with init_lora_weights='pissa'"),
    ):
        refused(make_trainer(tuned(folder, adapter), rewind_to=folder, **PLAIN), message)
    refused(make_trainer(tuned(folder, ADAPTER, 0.0), rewind_to=folder, **PLAIN), "nothing to rewind")
    model = tuned(folder, ADAPTER)
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and "layers.0" not in name)
    refused(make_trainer(model, rewind_to=folder, **PLAIN), "of the adapter is not: .*layers.0")
    model = tuned(folder, LoraConfig(**LORA))
    model.add_adapter("second", LoraConfig(**LORA))
    refused(make_trainer(model, rewind_to=folder, **PLAIN), "this one has LORA, LORA")


def test_adapter_on_another_base(make_trainer, make_model, before, tuned, tmp_path):
    other = before(name="other")
    refused(make_trainer(tuned(before(), ADAPTER), rewind_to=other, **PLAIN), "other is not the base of the adapter")
    unnamed = get_peft_model(make_model(), copy.copy(ADAPTER))
    perturb(unnamed)
    refused(make_trainer(unnamed, rewind_to=other, **PLAIN), "which is not known")
    model = tuned(before(), ADAPTER)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load_model(before()), tmp_path / "adapter", is_trainable=True)
    make_trainer(loaded, rewind_to=f"{before()}/../before", **PLAIN)._begin()  # the same folder


def test_sharded_weights(make_trainer, before, tuned):
    folder = before()
    trainer = make_trainer(tuned(folder), rewind_to=folder, **PLAIN)
    trainer.distributed.shards = True
    refused(trainer, "FSDP2, ZeRO-3 and offloading take them apart")
