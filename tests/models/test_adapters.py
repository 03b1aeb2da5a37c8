"""Adapters: trained on, frozen, switched off for theta_0, on some layers or on all; and those that are refused."""

import pytest
import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)

from mdu_trainer import resolve_backbone
from mdu_trainer.files import UserError
from mdu_trainer.models import load_checkpoint, load_model
from mdu_trainer.trainer.distributed import DistributedBackend
from mdu_trainer.trainer.reference import Reference


def test_an_adapter_is_trainable_when_asked(adapter):
    frozen, _ = load_checkpoint(str(adapter))
    model, _ = load_checkpoint(str(adapter), is_trainable=True)
    assert not any(p.requires_grad for p in frozen.parameters())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("by_name", [True, False])
def test_an_adapter_that_is_unlearned_again_is_its_own_theta_0(adapter, make_trainer, by_name):
    given = str(adapter) if by_name else load_checkpoint(str(adapter), is_trainable=True)[0]
    trainer = make_trainer(given, learning_rate=1e-2)
    ids = torch.arange(20, 30)[None]
    trainer.model.eval()
    start = trainer.model(input_ids=ids).logits.detach()
    before = {n: p.requires_grad for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert {n: p.requires_grad for n, p in trainer.model.named_parameters()} == before
    trainer.model.eval()
    assert not torch.allclose(trainer.model(input_ids=ids).logits, start)
    with trainer.reference._weights(trainer.model) as theta_0:
        torch.testing.assert_close(theta_0(input_ids=ids).logits, start)


def test_a_frozen_adapter_is_part_of_theta_0_and_stays_frozen(adapter, make_model):
    from accelerate import Accelerator

    frozen, _ = load_checkpoint(str(adapter))
    with_fresh, _ = load_checkpoint(str(adapter))
    with_fresh.add_adapter("second", LoraConfig(r=2, target_modules=["k_proj"]))
    with_fresh.base_model.set_adapter(["default", "second"])
    for name, p in with_fresh.named_parameters():
        p.requires_grad_("second" in name)
    ids = torch.arange(20, 30)[None]
    for model in (frozen, with_fresh):
        expected = model.eval()(input_ids=ids).logits.detach()
        flags = [p.requires_grad for p in model.parameters()]
        reference = Reference(model, DistributedBackend(Accelerator(cpu=True)))
        for name, p in model.named_parameters():
            if "second" in name:
                p.data.add_(0.1)
        with reference._weights(model) as theta_0:
            torch.testing.assert_close(theta_0(input_ids=ids).logits, expected)
        assert [p.requires_grad for p in model.parameters()] == flags


def test_frozen_tensors_stay_frozen_when_adapters_are_switched_off(make_model):
    from accelerate import Accelerator

    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, p in model.named_parameters():
        if "layers.0" in name:
            p.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    reference = Reference(model, DistributedBackend(Accelerator(cpu=True)))
    assert reference.switches_off
    with reference._weights(model):
        assert [p.requires_grad for p in model.parameters()] == flags
    assert [p.requires_grad for p in model.parameters()] == flags


KINDS = {
    "lora": LoraConfig(r=2),
    "dora": LoraConfig(r=2, use_dora=True),
    "pissa": LoraConfig(r=2, init_lora_weights="pissa"),
    "olora": LoraConfig(r=2, init_lora_weights="olora"),
    "random": LoraConfig(r=2, init_lora_weights=False),
    "saved": LoraConfig(r=2, modules_to_save=["lm_head"]),
    "adalora": AdaLoraConfig(init_r=2, target_r=1, total_step=10),
    "loha": LoHaConfig(r=2),
    "lokr": LoKrConfig(r=2),
    "vera": VeraConfig(r=2),
    "oft": OFTConfig(oft_block_size=4, r=0),
    "boft": BOFTConfig(boft_block_size=4),
    "ia3": IA3Config(feedforward_modules=["down_proj"]),
    "norms": LNTuningConfig(target_modules=["input_layernorm"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_theta_0_of_every_kind_of_adapter(kind, make_model, make_trainer):
    ids = torch.arange(20, 30)[None]
    trainer = make_trainer(make_model(), peft_config=KINDS[kind])
    model = trainer.model.eval()
    expected = model(input_ids=ids).logits.detach()  # of the model at the start
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.05)
    assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)
    with trainer.reference._weights(model) as theta_0:
        torch.testing.assert_close(theta_0(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


VIRTUAL = {
    "PROMPT_TUNING": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "P_TUNING": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8),
    "PREFIX_TUNING": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens_are_refused(kind, make_model, make_trainer, folder, tokenizer, tmp_path):
    message = f"{kind} puts virtual tokens before each row"
    with pytest.raises(UserError, match=message):
        make_trainer(make_model(), peft_config=VIRTUAL[kind])
    model = get_peft_model(load_model(str(folder)), VIRTUAL[kind])
    with pytest.raises(UserError, match=message):
        make_trainer(model)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=message):
        load_checkpoint(str(tmp_path / "adapter"))


# --- layers ---


def adapted_layers(model):
    names = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    return {int(part) for name in names for part in name.split(".") if part.isdecimal()}, len(names)


@pytest.mark.parametrize("options, layers, count", [
    ({"layers_to_transform": [1]}, {1}, 7),
    ({"layers_to_transform": 0}, {0}, 7),
    ({"layers_to_transform": [0, 2], "layers_pattern": "layers"}, {0, 2}, 14),
    ({"exclude_modules": ["up_proj"]}, {0, 1, 2}, 18),
    ({"rank_pattern": {"q_proj": 4}}, {0, 1, 2}, 21),
])  # fmt: skip
def test_layers_to_transform_with_the_default_targets(
    options, layers, count, make_model, make_trainer, folder, tmp_path
):
    base = make_model(num_layers=3)
    base.save_pretrained(folder)
    trainer = make_trainer(load_model(str(folder)), peft_config=LoraConfig(r=2, **options))
    assert adapted_layers(trainer.model) == (layers, count)
    ranks = {m.r["default"] for n, m in trainer.model.named_modules() if hasattr(m, "lora_A") and "q_proj" in n}
    assert ranks == {4 if "rank_pattern" in options else 2}
    trainer.model.save_pretrained(tmp_path / "adapter")
    assert adapted_layers(load_checkpoint(str(tmp_path / "adapter"))[0]) == (layers, count)


def test_lora_on_layers_that_are_no_linear(tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel, XLMConfig, XLMWithLMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, is_causal=False))
    backbone = resolve_backbone(model, tokenizer)
    assert backbone.layer_class == "GPT2Block"
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=backbone.lora_target_modules))
    assert adapted_layers(adapted) == ({0, 1}, 8)
    xlm = XLMWithLMHeadModel(
        XLMConfig(vocab_size=len(tokenizer), emb_dim=16, n_layers=2, n_heads=2, pad_index=0, pad_token_id=0)
    )
    backbone = resolve_backbone(xlm, tokenizer)
    assert backbone.name == "masked_lm"
    adapted = get_peft_model(xlm, LoraConfig(r=2, target_modules=backbone.lora_target_modules))
    assert adapted_layers(adapted) == ({0, 1}, 2 * (4 + 2))  # attention and MLP
