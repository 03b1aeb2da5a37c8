"""Whose prediction the anchor is: the moving average and another checkpoint, what they keep, and what is refused."""

import json

import pytest
import torch
from formula import LORA, averaged, batch_of, perturb, trained, weights
from peft import LoraConfig, get_peft_model

from mdu_trainer import MDUConfig
from mdu_trainer.files import UserError
from mdu_trainer.masking import forward_process
from mdu_trainer.testing import train_tokenizer
from mdu_trainer.trainer.anchors import predict_anchor
from mdu_trainer.trainer.average import IN_CHECKPOINT
from mdu_trainer.trainer.checkpoints import CheckpointError

EMA = {"tau": 0.5, "anchor_source": "ema", "anchor_ema_decay": 0.5}
SAVED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def predictions(trainer):
    """The anchor's logits of a batch."""
    batch = trainer._prepare_inputs(batch_of(trainer))["forget"]
    noised = forward_process(batch, trainer.backbone.mask_token_id)
    trainer.model.eval()
    prediction = predict_anchor(trainer, trainer.model, batch, noised)
    if isinstance(prediction, torch.Tensor):
        return prediction
    weight = trainer.model.get_output_embeddings().weight if prediction.weight is None else prediction.weight
    return prediction.hidden @ weight.detach().T


def own_logits(trainer, model):
    batch = batch_of(trainer)["forget"]
    noised = forward_process(batch, trainer.backbone.mask_token_id)
    with torch.no_grad():
        return model.eval()(noised.anchor_ids, attention_mask=noised.attention_mask).logits[noised.masked]


# The moving average


def test_average_of_a_run(make_trainer, make_model):
    """Three updates, one after the other: a <- d a + (1 - d) theta."""
    trainer = make_trainer(**EMA)
    assert trainer.reference is None
    average, update = make_model(), trainer.anchor.update

    def follow(model):
        nonlocal average
        update(model)
        average = averaged(average, trainer.model, 0.5)

    trainer.anchor.update = follow
    trainer.train()
    torch.testing.assert_close(predictions(trainer), own_logits(trainer, average), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(predictions(trainer), own_logits(trainer, trainer.model), atol=1e-4)


@pytest.mark.parametrize("adapter", [None, "new", "trained"])
def test_average_resumes_bit_equal(make_trainer, make_model, tmp_path, adapter, seen):
    def model():
        model = make_model()
        if adapter == "trained":
            torch.manual_seed(0)  # the first weights of an adapter are drawn, whatever ran before
            model = get_peft_model(model, LoraConfig(**LORA))
            perturb(model)
        return model

    options = EMA | SAVED | ({"peft_config": LoraConfig(**LORA)} if adapter == "new" else {})
    whole = make_trainer(model(), **options)
    whole.train()
    assert "anchor_source='ema': a further copy of all weights that are trained is kept, 0.00 GiB, on cpu" in seen.text
    resumed = make_trainer(model(), **options)
    assert (resumed.anchor.frozen is None) == (adapter is not None)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(resumed), weights(whole))
    for name, mean in whole.anchor.average.items():
        assert torch.equal(mean, resumed.anchor.average[name])
    assert not torch.equal(weights(whole), trained(make_trainer(model(), **options | {"anchor_ema_decay": 0.9})))


def test_adapters_average_is_that_of_their_weights(make_trainer, make_model):
    trainer = make_trainer(peft_config=LoraConfig(**LORA), **EMA)
    start = predictions(trainer)
    perturb(trainer.model)
    live = weights(trainer)
    torch.testing.assert_close(predictions(trainer), start)
    trainer.anchor.update(trainer.model)
    assert not torch.allclose(predictions(trainer), start, atol=1e-5)
    assert torch.equal(weights(trainer), live) and not torch.allclose(
        predictions(trainer), own_logits(trainer, trainer.model), atol=1e-5
    )


def test_a_checkpoint_without_the_average(make_trainer, tmp_path):
    make_trainer(**EMA | SAVED, save_only_model=True).train()
    with pytest.raises(CheckpointError, match=f"has no {IN_CHECKPOINT}, .* save_only_model=False"):
        make_trainer(**EMA | SAVED).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# Another checkpoint


def test_another_checkpoint_is_asked_and_stays_as_it_is(make_trainer, save_other, make_model, seen):
    trainer = make_trainer(tau=0.5, anchor_source=str(save_other()))
    expected = own_logits(trainer, make_model(seed=7))
    trainer.train()
    torch.testing.assert_close(predictions(trainer), expected)
    assert not any(p.requires_grad for p in trainer.anchor.frozen.parameters())
    assert trainer.reference is None and "a further model is kept, 0.00 GiB, on cpu" in seen.text


def test_the_model_itself_as_a_checkpoint_gives_the_same_weights(make_trainer, save_other):
    source = str(save_other(seed=0))
    plain = trained(make_trainer(tau=0.5))
    assert torch.equal(plain, trained(make_trainer(tau=0.5, anchor_source=source)))
    on_cpu = make_trainer(tau=0.5, anchor_source=source, reference_device="cpu", peft_config=LoraConfig(**LORA))
    assert torch.equal(trained(on_cpu), trained(make_trainer(tau=0.5, peft_config=LoraConfig(**LORA))))


def test_another_checkpoint_in_8_bit(make_trainer, save_other):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    source = {"tau": 0.5, "anchor_source": str(save_other())}
    small, full = (make_trainer(reference_precision=precision, **source) for precision in ("8bit", "full"))
    assert small.anchor.frozen.model.layers[0].self_attn.q_proj.weight.dtype == torch.int8
    distance = (predictions(small) - predictions(full)).norm() / predictions(full).norm()
    assert 0 < distance < 0.1
    small.train()


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("anchor_input", ["prompt", "hidden_prompt"])
def test_anchors_of_a_checkpoint_are_computed_before_training(make_trainer, save_other, adapted, anchor_input):
    options = {"tau": 0.5, "anchor_source": str(save_other(hidden_size=48)), "anchor_input": anchor_input}
    options |= {"peft_config": LoraConfig(**LORA)} if adapted else {}
    plain = trained(make_trainer(**options))
    for _ in range(2):  # the second reads the file
        trainer = make_trainer(precompute_anchor=True, **options)
        assert torch.equal(trained(trainer), plain) and trainer.anchor is None


def test_another_input_makes_the_file_stale(make_trainer, seen):
    for anchor_input in ("masked_prompt", "hidden_prompt"):
        trained(make_trainer(tau=0.5, precompute_anchor=True, anchor_input=anchor_input))
    assert "are computed anew: they are of another model, data set or configuration" in seen.text


def test_an_adapter_as_a_checkpoint(make_trainer, make_model, save_other, tmp_path):
    base = save_other(seed=0)
    adapted = get_peft_model(make_model(), LoraConfig(**LORA))
    perturb(adapted)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    trainer = make_trainer(tau=0.5, anchor_source=str(tmp_path / "adapter"))
    torch.testing.assert_close(predictions(trainer), own_logits(trainer, adapted), rtol=1e-4, atol=1e-5)


def other_vocabulary(save, authors):
    return save(vocab_size=700)


def other_tokenizer(save, authors):
    tokenizer = train_tokenizer([row["question"] for row in authors][:20], vocab_size=290)
    return save(processing_class=tokenizer)


def other_mask(save, authors):
    folder = save()
    for name, value in (("tokenizer_config.json", "<|system|>"), ("config.json", None)):
        content = json.loads((folder / name).read_text())
        content.pop("mask_token_id", None)
        (folder / name).write_text(json.dumps(content | ({"mask_token": value} if value else {})))
    return folder


def other_shift(save, authors):
    folder = save()
    config = json.loads((folder / "config.json").read_text()) | {"logit_shift": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def not_there(save, authors):
    return save().parent / "nowhere"


@pytest.mark.parametrize(
    "make, words",
    [
        (other_vocabulary, "has a vocabulary of 700 tokens, the model in training"),
        (other_tokenizer, "has another tokenizer"),
        (other_mask, r"has another mask token id: \d+, the model in training \d+"),
        (other_shift, "has another logit shift: True, the model in training False"),
        (not_there, "is none of initial, current and ema, and no checkpoint that can be read"),
    ],
)
def test_checkpoints_that_do_not_fit(make_trainer, save_other, authors, make, words):
    with pytest.raises(UserError, match=f"anchor_source.*{words}.*Name a checkpoint of the same family"):
        make_trainer(tau=0.5, anchor_source=str(make(save_other, authors)))


# Options


@pytest.mark.parametrize(
    "options, words",
    [
        ({"anchor_input": "prompt"}, "the KL would be zero, .* Name another checkpoint as anchor_source"),
        ({"anchor_input": "prompt", "anchor_source": "ema"}, "anchor_source='ema' asks the model for its own"),
        ({"anchor_source": ""}, "initial, current, ema, or a checkpoint's name or path"),
        ({"anchor_ema_decay": 0.9}, "which is not set. Leave it out"),
        (EMA | {"anchor_ema_decay": 1.0}, "must be smaller than 1, got 1.0"),
        (EMA | {"anchor_ema_decay": 0.0}, "anchor_ema_decay must be finite and larger than 0"),
        (EMA | {"reference_precision": "8bit"}, "of a copy that does not change"),
        (EMA | {"precompute_anchor": True}, "an anchor_source that does not change"),
    ],
)
def test_options_that_contradict_each_other(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        MDUConfig(str(tmp_path), **{"tau": 1.0} | options)


def test_no_anchor_is_loaded_where_none_is_read(make_trainer):
    for options in ({"tau": 0.0}, {"loss_type": "npo"}):
        assert make_trainer(anchor_source="no-such/checkpoint", **options).anchor is None


def test_facts_name_a_checkpoint_and_no_path(make_trainer, save_other):
    for options, expected in (
        ({"anchor_source": str(save_other())}, {"anchor_source": "a local model"}),
        (EMA, {"anchor_source": "ema", "anchor_ema_decay": 0.5}),
        ({"tau": 0.0, "anchor_source": "some-org/some-model"}, {"anchor_source": "some-org/some-model"}),
    ):
        trainer = make_trainer(**{"tau": 0.5} | options)
        found = trainer.provenance.facts(trainer._run()).options
        assert {name: found[name] for name in ("anchor_source", "anchor_ema_decay") if name in found} == expected


def test_a_trial_of_a_search_leaves_nothing_to_the_next(make_trainer, make_model, tmp_path):
    trainer = make_trainer(**EMA, forget_masking="generated", rollout_every=1, max_steps=8)
    trainer.train()
    for name, value in {"anchor_source": "current", "anchor_ema_decay": 0.999, "rollout_every": None}.items():
        setattr(trainer.args, name, value)
    trainer._start_over()
    assert trainer.anchor is None
    trainer.train()
    kinds = {type(callback).__name__ for callback in trainer.callback_handler.callbacks}
    assert kinds.isdisjoint({"UpdateAverage", "NewRollouts"})
