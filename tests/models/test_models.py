"""Backbones: the published layouts in and out, the same numbers as the published description, and the refusals."""

import json

import pytest
import torch
from published import (
    DREAM_IDS,
    LLADA_IDS,
    LLADA_MOE_IDS,
    LLADA_TEMPLATE,
    WRITE,
    write_dream,
    write_llada,
)
from published_blocks import WRITE_BLOCKS
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
)

from mdu_trainer.models import (
    DreamModel,
    Fast_dLLM_QwenForCausalLM,
    LLaDA2MoeModelLM,
    LLaDAModelLM,
    LLaDAMoEModelLM,
    SDARForCausalLM,
    load_model,
    load_tokenizer,
    logits_at,
    resolve_backbone,
)

EVERY = WRITE | WRITE_BLOCKS
CLASSES = {
    "llada": LLaDAModelLM,
    "dream": DreamModel,
    "llada_moe": LLaDAMoEModelLM,
    "sdar": SDARForCausalLM,
    "llada2": LLaDA2MoeModelLM,
    "fast_dllm": Fast_dLLM_QwenForCausalLM,
}


# --- the published model, from its description, in plain torch ---

LLADA_NAMES = {
    "embedding": "model.transformer.wte",
    "final_norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
    "block": "model.transformer.blocks",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "attn_out",
    "gate": "ff_proj",
    "up": "up_proj",
    "down": "ff_out",
    "norm_1": "attn_norm",
    "norm_2": "ff_norm",
}
QWEN_NAMES = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "block": "model.layers",
    **{letter: f"self_attn.{letter}_proj" for letter in "qkvo"},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
}


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x, theta):
    """Rotary embedding, rotate-half form; x [B, H, L, D]."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2])[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def published_forward(tensors, names, input_ids, attention_mask, *, heads=4, theta, eps):
    """Logits of the published model. Which parts there are (biases, head norms, experts), the tensors tell."""

    def linear(x, name):
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def attention(x, block):
        q, k, v = (linear(x, f"{block}.{names[letter]}").unflatten(-1, (-1, 32 // heads)) for letter in "qkv")
        if f"{block}.self_attn.q_norm.weight" in tensors:
            q = rms_norm(q, tensors[f"{block}.self_attn.q_norm.weight"], eps)
            k = rms_norm(k, tensors[f"{block}.self_attn.k_norm.weight"], eps)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        k, v = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (k, v))
        scores = rotate(q, theta) @ rotate(k, theta).transpose(2, 3) / (32 // heads) ** 0.5
        scores = scores.masked_fill(attention_mask[:, None, None, :] == 0, -torch.inf)
        return linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{block}.{names['o']}")

    def swiglu(x, gate, up, down):
        return linear(F.silu(linear(x, gate)) * linear(x, up), down)

    def mlp(x, block):
        if f"{block}.mlp.gate.weight" not in tensors:
            return swiglu(x, *(f"{block}.{names[part]}" for part in ("gate", "up", "down")))
        weights, chosen = linear(x, f"{block}.mlp.gate").softmax(-1).topk(2)
        weight_of = torch.zeros(*x.shape[:2], 4).scatter(-1, chosen, weights)
        experts = [f"{block}.mlp.experts.{index}" for index in range(4)]
        parts = [swiglu(x, *(f"{expert}.{part}_proj" for part in ("gate", "up", "down"))) for expert in experts]
        return sum(weight_of[..., index, None] * part for index, part in enumerate(parts))

    x = tensors[f"{names['embedding']}.weight"][input_ids]
    for layer in range(2):
        block = f"{names['block']}.{layer}"
        x = x + attention(rms_norm(x, tensors[f"{block}.{names['norm_1']}.weight"], eps), block)
        x = x + mlp(rms_norm(x, tensors[f"{block}.{names['norm_2']}.weight"], eps), block)
    return linear(rms_norm(x, tensors[f"{names['final_norm']}.weight"], eps), names["head"])


SETTINGS = {
    "llada": (LLADA_NAMES, {"theta": 5e5, "eps": 1e-5}),
    "dream": (QWEN_NAMES, {"theta": 1e6, "eps": 1e-6}),
    "llada_moe": (QWEN_NAMES, {"theta": 5e4, "eps": 1e-5}),
}


@pytest.mark.parametrize("family", WRITE)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_those_of_the_published_model(family, attention, checkpoints, batch):
    folder, tensors = checkpoints[family]
    input_ids, attention_mask = batch
    model = load_model(folder, attn_implementation=attention, dtype=torch.float32).eval()
    names, settings = SETTINGS[family]
    with torch.no_grad():
        full = published_forward(tensors, names, input_ids, torch.ones_like(input_ids), **settings)
        torch.testing.assert_close(model(input_ids=input_ids).logits, full, atol=1e-5, rtol=1e-5)
        padded = published_forward(tensors, names, input_ids, attention_mask, **settings)
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        real = attention_mask.bool()
        torch.testing.assert_close(logits[real], padded[real], atol=1e-5, rtol=1e-5)
        alone = model(input_ids=input_ids[1:, :7]).logits
        torch.testing.assert_close(logits[1:, :7], alone, atol=1e-5, rtol=1e-5)


def test_dream_reads_a_token_one_position_earlier(checkpoints, batch):
    folder, _ = checkpoints["dream"]
    model, tokenizer = load_model(folder).eval(), load_tokenizer(folder)
    input_ids, attention_mask = batch
    shift = resolve_backbone(model, tokenizer).logit_shift
    rows = torch.zeros_like(input_ids, dtype=torch.bool)
    rows[:, 0] = rows[:, 4] = True
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        published = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        chosen = logits_at(model, input_ids, attention_mask, rows, logit_shift=shift)
    torch.testing.assert_close(chosen, published[rows])


# --- in and out ---


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("shards", [1, 3])
def test_round_trip_is_bit_equal(family, shards, tmp_path):
    tensors = EVERY[family](tmp_path / "in", shards=shards, dtype=torch.bfloat16)
    model = load_model(tmp_path / "in")
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "out", max_shard_size="100MB" if shards == 1 else "20KB")
    load_tokenizer(tmp_path / "in").save_pretrained(tmp_path / "out")

    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) == 1) == (shards == 1) and not list((tmp_path / "out").glob("*.bin"))
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensors[name]) for name in tensors)
    if shards > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors.keys()

    again = load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", EVERY)
def test_saved_config_keeps_the_published_keys(family, checkpoints, tmp_path):
    folder, _ = checkpoints[family]
    load_model(folder).save_pretrained(tmp_path)
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path))
    for written_anew in ("transformers_version", "use_cache"):
        before.pop(written_anew, None)
    assert {key: after.get(key, "missing") for key in before} == before
    invented = {"hidden_size", "rope_parameters", "dtype", "is_causal", "layer_types", "head_dim"} - before.keys()
    assert not invented & after.keys()
    again, first = (AutoConfig.from_pretrained(place).to_diff_dict() for place in (tmp_path, folder))
    assert again == first | {"use_cache": False}


@pytest.mark.parametrize("family", EVERY)
def test_auto_classes_need_no_remote_code(family, checkpoints):
    folder, tensors = checkpoints[family]
    for auto_class in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
        assert type(auto_class.from_pretrained(folder)) is CLASSES[family]
    # Even asked for, it is not imported: it raises when it is
    assert type(AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)) is CLASSES[family]
    assert type(load_model(folder, trust_remote_code=True)) is CLASSES[family]
    load_tokenizer(folder, trust_remote_code=True)
    assert len(AutoTokenizer.from_pretrained(folder)("the").input_ids) == 1


@pytest.mark.parametrize("family", ["llada", "dream", *WRITE_BLOCKS])
def test_lora_spares_the_head_and_merges_into_the_published_layout(family, checkpoints, batch, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    folder, tensors = checkpoints[family]
    base, tokenizer = load_model(folder), load_tokenizer(folder)
    backbone = resolve_backbone(base, tokenizer)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=backbone.lora_target_modules, init_lora_weights=False)
    model = get_peft_model(base, lora)
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == 2 * 7 and not any("lm_head" in name for name in adapted)
    assert resolve_backbone(model, tokenizer) == backbone

    input_ids, attention_mask = batch
    model.eval()
    expected = model(input_ids=input_ids, attention_mask=attention_mask).logits
    model.save_pretrained(tmp_path / "adapter")
    resumed = PeftModel.from_pretrained(load_model(folder), tmp_path / "adapter").eval()
    torch.testing.assert_close(resumed(input_ids=input_ids, attention_mask=attention_mask).logits, expected)

    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    reloaded = load_model(tmp_path / "merged").eval()
    logits = reloaded(input_ids=input_ids, attention_mask=attention_mask).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", EVERY)
def test_activation_checkpointing_changes_no_gradient(family, checkpoints, batch):
    folder, _ = checkpoints[family]
    input_ids, attention_mask = batch
    gradients = []
    for checkpointing in (False, True):
        model = load_model(folder).train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(input_ids=input_ids, attention_mask=attention_mask).logits.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("family", [name for name in EVERY if name != "fast_dllm"])  # which pads with another
def test_the_end_token_trains_though_it_pads(family, checkpoints):
    folder, _ = checkpoints[family]
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    model(input_ids=torch.tensor([[5, tokenizer.eos_token_id, 7]])).logits.square().mean().backward()
    assert model.get_input_embeddings().weight.grad[tokenizer.eos_token_id].abs().sum() > 0


def test_device_map_and_resizing(checkpoints, tmp_path):
    folder, _ = checkpoints["llada"]
    placed, model = load_model(folder, device_map="auto"), load_model(folder)
    input_ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(placed(input_ids=input_ids.to(placed.device)).logits.cpu(), model(input_ids).logits)
    model.resize_token_embeddings(300, mean_resizing=False)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["embedding_size"] == config["vocab_size"] == 300
    assert load_model(tmp_path).lm_head.weight.shape == (300, 32)


def test_embedding_size_is_what_the_tensors_have(tmp_path):
    write_llada(tmp_path, vocab_size=280)
    assert resolve_backbone(load_model(tmp_path), load_tokenizer(tmp_path)).vocab_size == 288


def test_quantized_loading_names_what_is_missing(checkpoints, monkeypatch):
    monkeypatch.setattr("mdu_trainer.models.loading.find_spec", lambda name: None)
    for bits in ("load_in_4bit", "load_in_8bit"):
        with pytest.raises(ImportError, match=r"pip install mdu-trainer\[quantization\]"):
            load_model(checkpoints["llada"][0], **{bits: True})


def test_generate_is_refused(checkpoints):
    with pytest.raises(NotImplementedError, match="mdu_trainer.inference.generation"):
        load_model(checkpoints["dream"][0]).generate(torch.tensor([[1]]))


# --- tokenizers ---


@pytest.mark.parametrize("family, text, ids", [
    ("llada", "a the<|mdm_mask|><|eot_id|>", LLADA_IDS),
    ("dream", "a the<|mask|><|im_end|>", DREAM_IDS),
    ("llada_moe", "a the<|mask|><|role_end|>", LLADA_MOE_IDS),
    ("llada2", "a the<|mask|><|role_end|>", LLADA_MOE_IDS),
])  # fmt: skip
def test_tokenizer_round_trip(family, text, ids, checkpoints, tmp_path):
    tokenizer = load_tokenizer(checkpoints[family][0])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((checkpoints[family][0] / "config.json").read_text())
    again = load_tokenizer(tmp_path)
    encoded = tokenizer(text).input_ids
    assert len(encoded) == 4 and encoded[-2] == tokenizer.mask_token_id == ids[tokenizer.mask_token]
    assert again(text).input_ids == encoded and again.decode(encoded) == text
    assert again.get_vocab() == tokenizer.get_vocab() and again.special_tokens_map == tokenizer.special_tokens_map
    assert again.chat_template == tokenizer.chat_template

    # What transformers 4 and the published tokenizer code read
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    published = json.loads((checkpoints[family][0] / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == published["tokenizer_class"]
    assert settings.get("auto_map") == published.get("auto_map")
    assert settings["added_tokens_decoder"].keys() == published["added_tokens_decoder"].keys()
    assert settings.get("chat_template") == tokenizer.chat_template and not (tmp_path / "chat_template.jinja").exists()
    assert settings.get("additional_special_tokens", []) == published.get("additional_special_tokens", [])


def test_dream_saves_the_files_its_published_tokenizer_reads(checkpoints, tmp_path):
    folder, _ = checkpoints["dream"]
    load_tokenizer(folder).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "vocab.json").read_text()) == json.loads((folder / "vocab.json").read_text())
    merges = [line for line in (folder / "merges.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in (tmp_path / "merges.txt").read_text().splitlines() if not line.startswith("#")] == merges


def test_llada_turns(checkpoints):
    tokenizer = load_tokenizer(checkpoints["llada"][0])
    prompt = [{"role": "user", "content": " the a "}]
    asked = (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nthe a<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) == asked
    answered = [*prompt, {"role": "assistant", "content": "a"}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == asked + "a<|eot_id|>"
    # The published template renders the same prompt
    published = tokenizer.apply_chat_template(prompt, tokenize=False, chat_template=LLADA_TEMPLATE)
    assert published == asked


def test_dream_turns(tmp_path):
    write_dream(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    turns = [{"role": "user", "content": "the"}]
    for template in (settings.pop("chat_template"), None):  # a base model may ship none
        tokenizer = load_tokenizer(tmp_path)
        assert template is None or tokenizer.chat_template == template
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert rendered == "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))


def test_a_template_that_can_be_asked_is_kept(tmp_path):
    write_llada(tmp_path)
    own = "{% if add_generation_prompt %}{{ 'mine' }}{% endif %}"
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": own}))
    assert load_tokenizer(tmp_path).chat_template == own
