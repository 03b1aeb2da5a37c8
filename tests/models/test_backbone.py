"""The facts of a model, and the models that are refused, by name."""

import json

import pytest
import torch
from published import (
    DREAM_IDS,
    LLADA_CONFIG,
    LLADA_IDS,
    LLADA_MOE_IDS,
    LLADA_SPECIAL,
    LLADA_TEMPLATE,
    write_dream,
    write_llada,
    write_llada_moe,
    write_tokenizer_json,
)
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mdu_trainer.models import (
    Backbone,
    LLaDAConfig,
    load_model,
    load_tokenizer,
    resolve_backbone,
)
from mdu_trainer.models.__main__ import main

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 288,
}
GROUPED = TINY | {"num_key_value_heads": 2}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer_json(folder, LLADA_SPECIAL, chat_template=LLADA_TEMPLATE)
    return load_tokenizer(folder, mask_token="<|mdm_mask|>")


# --- the facts ---


def test_backbone_of_each_family(checkpoints):
    known = {name: (load_model(folder), load_tokenizer(folder)) for name, (folder, _) in checkpoints.items()}
    found = {name: resolve_backbone(*pair) for name, pair in known.items()}
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    eot, eos = LLADA_IDS["<|eot_id|>"], LLADA_IDS["<|endoftext|>"]
    mask = LLADA_IDS["<|mdm_mask|>"]
    assert found["llada"] == Backbone("llada", mask, (eot, eos), eos, False, 288, 128, linear, "LlamaDecoderLayer")
    end, eos, mask = DREAM_IDS["<|im_end|>"], DREAM_IDS["<|endoftext|>"], DREAM_IDS["<|mask|>"]
    assert found["dream"] == Backbone("dream", mask, (end, eos), eos, True, 288, 128, linear, "Qwen2DecoderLayer")
    end, eos, mask = (LLADA_MOE_IDS[token] for token in ("<|role_end|>", "<|endoftext|>", "<|mask|>"))
    layer = "Qwen3MoeDecoderLayer"
    assert found["llada_moe"] == Backbone("llada_moe", mask, (end, eos), eos, False, 288, 128, linear[:4], layer)
    for name, (model, tokenizer) in known.items():
        assert resolve_backbone(model.config, tokenizer) == found[name]
        assert found[name].layer_class in {type(module).__name__ for module in model.modules()}


@pytest.mark.parametrize("model_class, config, layer", [
    (BertForMaskedLM, BertConfig(**TINY, pad_token_id=262), "BertLayer"),
    (ModernBertForMaskedLM, ModernBertConfig(**TINY, pad_token_id=262), "ModernBertEncoderLayer"),
    (LlamaForCausalLM, LlamaConfig(**TINY, is_causal=False), "LlamaDecoderLayer"),
    (Qwen3ForCausalLM, Qwen3Config(**GROUPED, is_causal=False, logit_shift=True), "Qwen3DecoderLayer"),
])  # fmt: skip
def test_models_that_transformers_knows(model_class, config, layer, tokenizer, batch, tmp_path):
    from peft import LoraConfig, get_peft_model

    model_class(config).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert type(model) is model_class and model.config.use_cache is False
    backbone = resolve_backbone(model, tokenizer)
    assert backbone == resolve_backbone(AutoConfig.from_pretrained(tmp_path), tokenizer)
    assert backbone.name == ("masked_lm" if "Bert" in layer else "bidirectional")
    assert backbone.layer_class == layer and backbone.logit_shift == (model_class is Qwen3ForCausalLM)
    assert (backbone.mask_token_id, backbone.end_token_ids[0]) == (tokenizer.mask_token_id, LLADA_IDS["<|eot_id|>"])

    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=backbone.lora_target_modules))
    adapted = {name for name, module in wrapped.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) >= 2 * 4
    assert not any("lm_head" in name or "cls" in name or "decoder" in name.split(".")[-1] for name in adapted)
    assert resolve_backbone(wrapped, tokenizer) == backbone

    # A later token changes what is predicted at an earlier one
    input_ids, _ = batch
    changed = input_ids.clone()
    changed[:, -1] = 3
    wrapped.eval()
    assert not torch.allclose(wrapped(input_ids=input_ids).logits[:, 0], wrapped(input_ids=changed).logits[:, 0])


# --- refusals ---


@pytest.mark.parametrize("key, value", [
    ("alibi", True), ("block_type", "sequential"), ("scale_logits", True), ("include_bias", True),
    ("activation_type", "swiglu"), ("layer_norm_type", "default"), ("rope", False), ("is_causal", True),
])  # fmt: skip
def test_llada_of_another_architecture(key, value, tmp_path, capsys):
    write_llada(tmp_path, **{key: value})
    with pytest.raises(ValueError, match=f"{key}={value!r}"):
        load_model(tmp_path)
    assert main([str(tmp_path)]) == 1 and f"{key}={value!r}" in capsys.readouterr().out


def test_llada_moe_of_another_architecture(tmp_path):
    write_llada_moe(tmp_path / "shared", shared_expert_intermediate_size=32)
    with pytest.raises(ValueError, match="shared_expert_intermediate_size=32"):
        load_model(tmp_path / "shared")
    write_llada_moe(tmp_path / "dense", moe_layer_freq=[0, 1])
    with pytest.raises(ValueError, match="dense layers"):
        load_model(tmp_path / "dense")


@pytest.mark.parametrize("model_type, architecture, reason", [
    ("llada2_moe_veomni", "LLaDA2MoeModelLM", "block-wise"),
    ("llada22_moe", "LLaDA22MoeModelLM", "deletes and inserts"),
    ("sdar_moe", "SDARMoeForCausalLM", "block-wise"),
    ("Fast_dLLM_Qwen3_5", "Fast_dLLM_Qwen3_5ForCausalLM", "block-wise"),
    ("diffusion_gemma", "DiffusionGemmaForBlockDiffusion", "without a mask token"),
])  # fmt: skip
def test_kinds_refused_by_name(model_type, architecture, reason, tmp_path, capsys):
    config = {"model_type": model_type, "architectures": [architecture], "auto_map": {"AutoModel": "modeling.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for trust_remote_code in (False, True):
        with pytest.raises(ValueError, match=f"{model_type}.*{reason}"):
            load_model(tmp_path, trust_remote_code=trust_remote_code)
    assert main([str(tmp_path)]) == 1 and reason in capsys.readouterr().out


def test_unknown_model_needs_its_own_code(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "novel", "auto_map": {"AutoModel": "m.M"}}))
    with pytest.raises(ValueError, match="'novel'.*trust_remote_code=True"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "novel"}))
    with pytest.raises(ValueError, match="ships none"):
        load_model(tmp_path)


def test_remote_code_runs_when_it_is_asked_for(tmp_path, tokenizer):
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path)
    auto_map = {"AutoConfig": "modeling_novel.NovelConfig", "AutoModelForMaskedLM": "modeling_novel.NovelForDiffusion"}
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "novel", "architectures": ["NovelForDiffusion"], "auto_map": auto_map}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_novel.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class NovelConfig(LlamaConfig):\n    model_type = 'novel'\n    is_causal: bool = False\n"
        "class NovelForDiffusion(LlamaForCausalLM):\n    config_class = NovelConfig\n"
    )
    model = load_model(tmp_path, trust_remote_code=True)
    backbone = resolve_backbone(model, tokenizer)
    assert type(model).__name__ == "NovelForDiffusion" and backbone.name == "remote"
    assert backbone.lora_target_modules == "all-linear" and backbone.layer_class == "LlamaDecoderLayer"


def test_causal_model_is_refused(tokenizer, tmp_path):
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LlamaForCausalLM.*is_causal"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="causal language model"):
        resolve_backbone(BertConfig(**TINY, is_decoder=True, architectures=["BertLMHeadModel"]), tokenizer)


def test_recurrent_layers_stay_causal(tokenizer):
    for config in (
        MambaConfig(is_causal=False),
        Lfm2Config(**TINY, layer_types=["conv", "full_attention"], is_causal=False),
    ):
        with pytest.raises(ValueError, match="stay causal"):
            resolve_backbone(config, tokenizer)


def test_mask_token_contradictions(checkpoints, tokenizer, tmp_path):
    config = LlamaConfig(**TINY, is_causal=False)
    plain = load_tokenizer(tokenizer.name_or_path)
    with pytest.raises(ValueError, match="no mask token"):
        resolve_backbone(config, plain)
    small = LlamaConfig(**TINY | {"vocab_size": 263}, is_causal=False)
    with pytest.raises(ValueError, match="mask token id 264 is outside the embedding, which has 263 rows"):
        resolve_backbone(small, tokenizer)
    other = LLaDAConfig(**LLADA_CONFIG | {"mask_token_id": 7})
    with pytest.raises(ValueError, match=r"mask_token_id=7, the tokenizer says 264 \('<\|mdm_mask\|>'\)"):
        resolve_backbone(other, tokenizer)


def test_pad_and_end_token_contradictions(tokenizer):
    with pytest.raises(ValueError, match="pad_token_id=9, the tokenizer says 262"):
        resolve_backbone(LLaDAConfig(**LLADA_CONFIG | {"pad_token_id": 9}), tokenizer)
    with pytest.raises(ValueError, match="eos_token_id=9, the tokenizer says 262"):
        resolve_backbone(LLaDAConfig(**LLADA_CONFIG | {"eos_token_id": 9}), tokenizer)
    # RoBERTa counts positions from the pad id: there the config's must be the tokenizer's
    with pytest.raises(ValueError, match="pad_token_id=0, the tokenizer says 262"):
        resolve_backbone(BertConfig(**TINY), tokenizer)


def test_diffucoder_pads_with_a_token_of_its_own(tmp_path):
    write_dream(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<|im_start|>"}))
    backbone = resolve_backbone(load_model(tmp_path), load_tokenizer(tmp_path))
    assert backbone.pad_token_id == DREAM_IDS["<|im_start|>"] and DREAM_IDS["<|endoftext|>"] in backbone.end_token_ids


def test_a_response_needs_an_end(tokenizer):
    endless = AutoTokenizer.from_pretrained(tokenizer.name_or_path, mask_token="[CLS]", pad_token="[CLS]")
    endless.eos_token = None
    endless.get_vocab = lambda: {}
    with pytest.raises(ValueError, match="nothing can end a response"):
        resolve_backbone(LlamaConfig(**TINY, is_causal=False), endless)
    endless.sep_token = "<|endoftext|>"
    assert resolve_backbone(LlamaConfig(**TINY, is_causal=False), endless).end_token_ids == (262,)


def test_command_reads_no_weights(tmp_path, capsys):
    write_llada(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "supported            yes" in printed and "mask_token_id        264" in printed
    assert main([str(tmp_path / "nowhere")]) == 1
