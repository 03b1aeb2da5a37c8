"""Block-wise models: the published forward in each form of attention, the router, the cache, the block size."""

import json

import pytest
import torch
from published import write_dream, write_llada
from published_blocks import CONFIGS, FAST_DLLM_IDS, LLADA2_IDS, SDAR_IDS, WRITE_BLOCKS, write_llada2, write_sdar
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, DynamicCache

from mdu_trainer.files import UserError
from mdu_trainer.models import (
    Backbone,
    block_causal_mask,
    full_mask,
    load_model,
    load_tokenizer,
    logits_at,
    noisy_clean_mask,
    resolve_backbone,
)
from mdu_trainer.models.__main__ import main

SIZE = 4  # of a block


# --- the published models, from their description, in plain torch ---


def rms_norm(x, weight, eps=1e-6):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x, positions, theta, share):
    """Rotary embedding of the first `share` of each head, rotate-half form; x [B, H, L, D], positions [B, L]."""
    half = int(x.shape[-1] * share) // 2
    angle = positions[:, None, :, None] * theta ** (-torch.arange(half) / half)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
    return torch.cat([*turned, rest], -1)


def published_forward(family, tensors, input_ids, mask, positions=None, without=()):
    """Logits [B, L, V] of a published model; mask [B, 1, L, L] tells who sees whom.

    Args:
        without: parts of the router to leave out, which must change the logits.
    """
    config = CONFIGS[family]
    if positions is None:
        positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)

    def linear(x, name):
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def swiglu(x, path):
        return linear(F.silu(linear(x, f"{path}.gate_proj")) * linear(x, f"{path}.up_proj"), f"{path}.down_proj")

    def attention(x, block):
        if family == "llada2":
            norms, out = ("attention.query_layernorm", "attention.key_layernorm"), "attention.dense"
            q, k, v = linear(x, f"{block}.attention.query_key_value").split([64, 32, 32], dim=-1)
        else:
            norms, out = ("self_attn.q_norm", "self_attn.k_norm"), "self_attn.o_proj"
            q, k, v = (linear(x, f"{block}.self_attn.{letter}_proj") for letter in "qkv")
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part, heads in ((q, 4), (k, 2), (v, 2)))
        if family != "fast_dllm":
            q, k = (rms_norm(x, tensors[f"{block}.{norm}.weight"]) for x, norm in zip((q, k), norms, strict=True))
        share = config.get("partial_rotary_factor", 1)
        q, k = (rotate(part, positions, config["rope_theta"], share) for part in (q, k))
        k, v = (part.repeat_interleave(2, dim=1) for part in (k, v))
        scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
        return linear((scores.softmax(-1).nan_to_num() @ v).transpose(1, 2).flatten(2), f"{block}.{out}")

    def experts(x, path):
        scores = torch.sigmoid(linear(x, f"{path}.gate"))
        choice = scores if "bias" in without else scores + tensors[f"{path}.gate.expert_bias"]
        groups = choice.unflatten(-1, (4, 4))
        kept = groups.topk(2).values.sum(-1).topk(2).indices
        outside = torch.ones(groups.shape[:-1], dtype=torch.bool).scatter(-1, kept, False)
        if "groups" not in without:
            choice = groups.masked_fill(outside[..., None], -torch.inf).flatten(-2)
        chosen = choice.topk(3).indices
        weights = (choice if "weights without bias" in without else scores).gather(-1, chosen)
        weights = 2.5 * weights / weights.sum(-1, keepdim=True)
        weight_of = torch.zeros_like(scores).scatter(-1, chosen, weights)
        routed = sum(weight_of[..., e, None] * swiglu(x, f"{path}.experts.{e}") for e in range(16))
        return routed if "shared" in without else routed + swiglu(x, f"{path}.shared_experts")

    embedding = tensors.get("model.embed_tokens.weight", tensors.get("model.word_embeddings.weight"))
    x = embedding[input_ids]
    for layer in range(2):
        block = f"model.layers.{layer}"
        x = x + attention(rms_norm(x, tensors[f"{block}.input_layernorm.weight"]), block)
        mlp = experts if f"{block}.mlp.gate.weight" in tensors else swiglu
        x = x + mlp(rms_norm(x, tensors[f"{block}.post_attention_layernorm.weight"]), f"{block}.mlp")
    return F.linear(rms_norm(x, tensors["model.norm.weight"]), tensors.get("lm_head.weight", embedding))


def pairs(attention_mask, may_see, halves=1):
    """The mask [B, 1, L, L] of a rule for (half of q, block of q, half of k, block of k), by loops over the tokens."""
    rows, length = attention_mask.shape
    mask = torch.zeros(rows, 1, halves * length, halves * length, dtype=torch.bool)
    for b, row in enumerate(attention_mask.tolist()):
        first = row.index(1)
        for q in range(halves * length):
            for k in range(halves * length):
                blocks = [max(i % length - first, 0) // SIZE for i in (q, k)]
                mask[b, 0, q, k] = row[k % length] and may_see(q // length, blocks[0], k // length, blocks[1])
    return mask


RULES = {
    "full": (1, lambda hq, q, hk, k: True),
    "block": (1, lambda hq, q, hk, k: q >= k),
    "noisy_clean": (
        2,
        lambda hq, q, hk, k: (hq == hk and q == k) or (hq == 0 and hk == 1 and q > k) or (hq == hk == 1 and q >= k),
    ),
}
MASKS = {
    "full": full_mask,
    "block": lambda mask: block_causal_mask(SIZE, mask),
    "noisy_clean": lambda mask: noisy_clean_mask(SIZE, mask),
}


@pytest.fixture
def padded():
    """Three rows of 11 tokens: whole, padded on the right, padded on the left."""
    attention_mask = torch.ones(3, 11, dtype=torch.long)
    attention_mask[1, 7:] = attention_mask[2, :3] = 0
    return torch.randint(0, 260, (3, 11), generator=torch.Generator().manual_seed(1)), attention_mask


@pytest.mark.parametrize("form", RULES)
def test_masks_follow_the_published_rules(form, padded):
    halves, rule = RULES[form]
    mask = MASKS[form](padded[1])
    assert mask.dtype == torch.bool and torch.equal(mask, pairs(padded[1], rule, halves))


@pytest.mark.parametrize("family", WRITE_BLOCKS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_those_of_the_published_model(family, attention, checkpoints, padded):
    folder, tensors = checkpoints[family]
    input_ids, attention_mask = padded
    model = AutoModelForMaskedLM.from_pretrained(
        folder, attn_implementation=attention, dtype=torch.float32, block_size=SIZE
    ).eval()
    for form, (halves, rule) in RULES.items():
        for mask in (torch.ones_like(attention_mask), attention_mask):
            ids, real = input_ids.repeat(1, halves), mask.repeat(1, halves).bool()
            ids[:, : 11 * (halves - 1)] = ids[:, : 11 * (halves - 1)].flip(0)  # the noisy half is another text
            positions = torch.arange(11).repeat(halves).expand_as(ids)
            with torch.no_grad():
                expected = published_forward(family, tensors, ids, pairs(mask, rule, halves), positions)
                logits = model(input_ids=ids, attention_mask=MASKS[form](mask), position_ids=positions).logits
                torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=1e-5)
                if form == "block":  # as a padding mask says, too
                    plain = model(input_ids=ids, attention_mask=mask).logits
                    torch.testing.assert_close(plain[real], expected[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("left_out", ["bias", "groups", "weights without bias", "shared"])
def test_every_part_of_the_router_matters(left_out, checkpoints, padded):
    folder, tensors = checkpoints["llada2"]
    input_ids, attention_mask = padded
    mask, real = pairs(attention_mask, RULES["block"][1]), attention_mask.bool()
    model = load_model(folder, block_size=SIZE).eval()
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[real]
        whole = published_forward("llada2", tensors, input_ids, mask)[real]
        lacking = published_forward("llada2", tensors, input_ids, mask, without=(left_out,))[real]
    assert (logits - whole).abs().max() < 1e-5 < 1e-2 < (logits - lacking).abs().max()


@pytest.mark.parametrize("model_type", ["llada2_moe", "llada21_moe"])
def test_llada2_goes_by_two_names(model_type, tmp_path):
    write_llada2(tmp_path / "in", model_type=model_type)
    model = load_model(tmp_path / "in")
    model.save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == model_type and config["architectures"] == ["LLaDA2MoeModelLM"]
    assert resolve_backbone(model, load_tokenizer(tmp_path / "in")).name == "llada2"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_of_the_router_stays_exact(dtype, tmp_path):
    from safetensors.torch import load_file, save_file

    name = "model.layers.1.mlp.gate.expert_bias"
    tensors = write_llada2(tmp_path / "in", dtype=torch.bfloat16)
    tensors[name] = torch.linspace(-0.1, 0.3, 16).to(dtype)
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    model = load_model(tmp_path / "in")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.layers[1].mlp.gate.e_score_correction_bias, tensors[name].float())
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], tensors[name])


# --- the cache ---


@pytest.mark.parametrize("family", WRITE_BLOCKS)
@pytest.mark.parametrize("side", ["none", "left"])
def test_a_cache_of_finished_blocks_changes_nothing(family, side, checkpoints):
    folder, _ = checkpoints[family]
    model = load_model(folder, block_size=SIZE).eval()
    input_ids = torch.randint(0, 260, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(input_ids)
    if side == "left":  # the first row's blocks end elsewhere than the second's, so both pass the window by blocks
        mask[0, :SIZE] = 0
    with torch.no_grad():
        whole = model(input_ids=input_ids, attention_mask=mask).logits
        cache = DynamicCache(config=model.config)
        for start in (0, 4, 8):
            rows, seen = input_ids[:, start : start + 4], mask[:, : start + 4]
            noisy = model(input_ids=rows.flip(0), attention_mask=seen, past_key_values=cache, use_cache=True)
            assert noisy.past_key_values is cache
            cache.crop(-SIZE)  # a step that is not the last of its block leaves nothing
            logits = model(input_ids=rows, attention_mask=seen, past_key_values=cache, use_cache=True).logits
            real = seen[:, start:].bool()
            torch.testing.assert_close(logits[real], whole[:, start : start + 4][real], atol=1e-5, rtol=1e-5)
        if side == "none":  # no mask at all, and embeddings instead of tokens
            cache.crop(-SIZE)
            embedded = model.get_input_embeddings()(input_ids[:, 8:])
            logits = model(inputs_embeds=embedded, past_key_values=cache).logits
            torch.testing.assert_close(logits, whole[:, 8:], atol=1e-5, rtol=1e-5)
            assert model(input_ids=input_ids[:, :4], use_cache=True).past_key_values.get_seq_length() == 4


def test_a_mask_that_leaves_out_the_cache_is_refused(checkpoints):
    model = load_model(checkpoints["sdar"][0]).eval()
    cache = model(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=True).past_key_values
    with pytest.raises(UserError, match=r"mask is \[1, 4\], for 1 rows of 4 cached and 4 new tokens.*\[1, 8\]"):
        ids = torch.ones(1, 4, dtype=torch.long)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache)


@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 1, 4, 5), (3, 1, 4, 4), (2, 1, 3, 4)])
def test_masks_of_another_shape_are_refused(shape, checkpoints):
    model = load_model(checkpoints["sdar"][0])
    ids = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(UserError, match=r"must be \[2, 4\], or \[2, 1, 4, 4\] and true where"):
        model(input_ids=ids, attention_mask=torch.ones(shape, dtype=torch.bool))


def test_positions_decide_where_blocks_begin(checkpoints, padded):
    model = load_model(checkpoints["sdar"][0]).eval()
    input_ids, attention_mask = padded
    with torch.no_grad():
        counted = (attention_mask.cumsum(1) - 1).clamp(min=0)
        expected = model(input_ids=input_ids, attention_mask=attention_mask).logits
        told = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=counted).logits
        real = attention_mask.bool()
        torch.testing.assert_close(told[real], expected[real], atol=1e-5, rtol=1e-5)
        # a prompt that is hidden, not padding: the tokens after it stay in their blocks
        places = torch.arange(11).expand_as(input_ids)
        hidden = torch.ones_like(attention_mask)
        hidden[:, :3] = 0
        logits = model(input_ids=input_ids, attention_mask=hidden, position_ids=places).logits
        mask = block_causal_mask(SIZE, torch.ones_like(hidden)) & hidden.bool()[:, None, None, :]
        by_hand = model(input_ids=input_ids, attention_mask=mask, position_ids=places).logits
    torch.testing.assert_close(logits[:, 3:], by_hand[:, 3:], atol=1e-5, rtol=1e-5)


def test_rows_of_padding_alone_are_numbers(checkpoints):
    for attention in ("sdpa", "eager"):
        model = load_model(checkpoints["sdar"][0], attn_implementation=attention)
        ids = torch.ones(1, 6, dtype=torch.long)
        assert model(input_ids=ids, attention_mask=torch.zeros_like(ids)).logits.isfinite().all()


def test_flash_attention_is_refused(checkpoints):
    model = load_model(checkpoints["sdar"][0])
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="attends between blocks, which attn_implementation='flash_attention_2'"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


# --- the facts ---


def test_backbone_of_each_family(checkpoints):
    known = {name: (load_model(checkpoints[name][0]), load_tokenizer(checkpoints[name][0])) for name in WRITE_BLOCKS}
    found = {name: resolve_backbone(*pair) for name, pair in known.items()}
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    end, eos, mask = (SDAR_IDS[token] for token in ("<|im_end|>", "<|endoftext|>", "<|MASK|>"))
    assert found["sdar"] == Backbone("sdar", mask, (end, eos), eos, False, 288, 128, linear, "Qwen3DecoderLayer", 4)
    end, eos, mask = (LLADA2_IDS[token] for token in ("<|role_end|>", "<|endoftext|>", "<|mask|>"))
    layer = "Glm4MoeDecoderLayer"
    assert found["llada2"] == Backbone("llada2", mask, (end, eos), eos, False, 288, 128, linear, layer, 32)
    end, pad, mask = (FAST_DLLM_IDS[token] for token in ("<|im_end|>", "<|endoftext|>", "|<MASK>|"))
    layer = "Qwen2DecoderLayer"
    assert found["fast_dllm"] == Backbone("fast_dllm", mask, (end,), pad, True, 288, 128, linear, layer, 4)
    for name, (model, tokenizer) in known.items():
        assert resolve_backbone(model.config, tokenizer) == found[name]
        assert found[name].layer_class in {type(module).__name__ for module in model.modules()}


def test_the_command_names_block_size_and_attention(checkpoints, capsys):
    assert main([str(checkpoints["llada2"][0])]) == 0
    printed = capsys.readouterr().out
    assert "block_size           32\n" in printed and "attention            block or full\n" in printed
    assert main([str(checkpoints["llada"][0])]) == 0
    printed = capsys.readouterr().out
    assert "block_size           None\n" in printed and "attention            full\n" in printed


@pytest.mark.parametrize("family, key", [("sdar", "block_size"), ("llada2", "block_size"), ("fast_dllm", "bd_size")])
def test_a_block_size_of_the_user_wins_and_is_saved(family, key, checkpoints, tmp_path):
    folder, _ = checkpoints[family]
    model, tokenizer = load_model(folder, block_size=2), load_tokenizer(folder)
    assert resolve_backbone(model, tokenizer).block_size == 2
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())[key] == 2
    again = load_model(tmp_path).eval()
    ids = torch.arange(10).view(1, 10)
    mask = block_causal_mask(2, torch.ones_like(ids))
    torch.testing.assert_close(again(input_ids=ids).logits, again(input_ids=ids, attention_mask=mask).logits)


@pytest.mark.parametrize("said, reason", [
    ({"block_size": 0}, "block_size=0: it must be a whole number from 2"),
    ({"block_size": 1}, "block_size=1: it must be a whole number from 2"),
    ({"block_size": "4"}, "block_size='4': it must be a whole number"),
    ({"block_size": 2.5}, "block_size=2.5: it must be a whole number"),
    ({"block_size": True}, "block_size=True: it must be a whole number"),
    ({"block_size": 129}, "block_size=129: .*max_position_embeddings=128"),
    ({"bd_size": 8}, "contradicts itself about its block size: bd_size=8, block_size=4"),
])  # fmt: skip
def test_a_config_that_lies_about_its_block_size(said, reason, tmp_path, capsys):
    write_sdar(tmp_path, **said)
    with pytest.raises(UserError, match=reason):
        load_model(tmp_path)
    assert main([str(tmp_path)]) == 1 and "block" in capsys.readouterr().out


@pytest.mark.parametrize("write, key", [(write_llada, "block_size"), (write_dream, "bd_size")])
def test_a_model_without_blocks_that_names_a_block_size(write, key, tmp_path, capsys):
    write(tmp_path, **{key: 4})
    with pytest.raises(UserError, match=f"says {key}=4, so the model was trained to attend between blocks"):
        load_model(tmp_path)
    assert main([str(tmp_path)]) == 1 and f"{key}=4" in capsys.readouterr().out


def test_a_block_size_is_of_block_wise_models(checkpoints):
    with pytest.raises(UserError, match="block_size=8 is for models that attend between blocks"):
        load_model(checkpoints["llada"][0], block_size=8)
    with pytest.raises(UserError, match="block_size=1: it must be a whole number"):
        load_model(checkpoints["sdar"][0], block_size=1)
    with pytest.raises(UserError, match="block_size=1: it must be a whole number"):
        AutoModelForMaskedLM.from_pretrained(checkpoints["fast_dllm"][0], block_size=1)


def test_a_batch_is_predicted_row_by_row(checkpoints, padded):
    folder, _ = checkpoints["fast_dllm"]
    model = load_model(folder).eval()
    input_ids, attention_mask = padded
    selected = attention_mask.bool() & (torch.arange(11) % 3 == 0)
    shift = resolve_backbone(model, load_tokenizer(folder)).logit_shift
    with torch.no_grad():
        chosen = logits_at(model, input_ids, attention_mask, selected, logit_shift=shift)
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    torch.testing.assert_close(chosen, torch.cat([logits[:, :1], logits[:, :-1]], dim=1)[selected])


# --- refusals ---


@pytest.mark.parametrize("change, reason", [
    ({"use_bias": True}, "use_bias=True"),
    ({"use_qkv_bias": True}, "use_qkv_bias=True"),
    ({"delete_token_id": 9, "split_token_id": 10}, "names delete_token_id.*edit operations are not supported"),
    ({"n_group": 5}, "describes no router: experts must fall into n_group groups.*n_group=5"),
    ({"topk_group": 5}, "topk_group must be from 1 to n_group"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok must be from 1"),
    ({"num_shared_experts": 0}, "one must be shared"),
])  # fmt: skip
def test_llada2_of_another_architecture(change, reason, tmp_path):
    write_llada2(tmp_path, **change)
    with pytest.raises(UserError, match=reason):
        load_model(tmp_path)


def test_llada2_2_goes_by_its_name(tmp_path, capsys):
    write_llada2(tmp_path / "LLaDA2.2-mini")
    assert main([str(tmp_path / "LLaDA2.2-mini")]) == 1
    assert "deletes and inserts tokens" in capsys.readouterr().out
