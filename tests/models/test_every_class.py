"""Every class of transformers that has a language-model head, tiny: what is probed of it is what it does."""

import pytest
import torch
from every_class import sees_later_tokens, tiny_model
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from mdu_trainer.divergence import TokenNLL
from mdu_trainer.files import UserError
from mdu_trainer.models import hidden_at, logits_at, measure_at
from mdu_trainer.models.probe import attends_both_ways, logits_of, probe_tokens

CAUSAL, MASKED = MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
# What a config class does not say of itself
CHANGES = {
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"per_layer_config": None},
    "esm": {"vocab_size": 64, "mask_token_id": 5, "token_dropout": False},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_rope_head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "neomme": {"head_dim": 16},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "layer_types": ["mamba", "hybrid"],
        "layers_block_type": ["mamba", "hybrid"],
        "mamba_headdim": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}
NOT_TINY = {
    "blt": "reads bytes in patches, through models of their own",
    "dbrx": "reads rope_theta, which its config class does not have",
    "gemma3n": "needs timm; gemma3n_text is its text model",
    "gemma4_assistant": "reads the cache of another model",
    "gemma4_unified_assistant": "reads the cache of another model",
    "mimo_v2_flash": "its sliding layers have sizes that its config class does not name",
    "musicgen": "predicts audio in four codebooks at once",
    "musicgen_melody": "predicts audio in four codebooks at once",
    "zamba": "ties the weights of three layers or more",
}
REFUSED = {"mpt": CAUSAL, "nystromformer": MASKED}  # a short text fails: no mask to cast; a fixed length
BLIND = ("mra",)  # without its CUDA kernel no token sees any other
NO_GRADIENT = ("reformer",)  # reversible layers: in training mode alone, at multiples of a length
CAUSAL_THOUGH_THEY_SAY_OTHERWISE = {  # attention; the recurrent ones are not listed
    "gpt_neo", "nemotron", "openai-gpt", "stablelm",
}  # fmt: skip


def make(model_type, mapping, **extra):
    model_class = mapping[CONFIG_MAPPING[model_type]]
    return tiny_model(model_class, CHANGES.get(model_type, {}) | extra)


def without(mapping, *left_out):
    return [name for name in mapping._model_mapping if name not in left_out]


@pytest.mark.parametrize("model_type", without(CAUSAL, *NOT_TINY, *REFUSED))
def test_the_direction_of_every_decoder_that_says_it_is_not_causal(model_type):
    extra = {"is_decoder": True} if model_type == "reformer" else {}
    model = make(model_type, CAUSAL, is_causal=False, **extra)
    seen = sees_later_tokens(model, probe_tokens(model)[:1])
    assert attends_both_ways(model) is seen
    if model_type in CAUSAL_THOUGH_THEY_SAY_OTHERWISE:
        assert not seen


@pytest.mark.parametrize("model_type, mapping", REFUSED.items())
def test_classes_that_read_no_short_text_are_refused_by_name(model_type, mapping):
    model = make(model_type, mapping, is_causal=False)
    with pytest.raises(UserError, match=f"{type(model).__name__} cannot be run on a short text"):
        attends_both_ways(model)


@pytest.mark.parametrize("model_type", without(MASKED, *REFUSED))
def test_every_masked_lm_gives_the_figures_of_its_plain_forward(model_type):
    model = make(model_type, MASKED)
    seen = sees_later_tokens(model, probe_tokens(model)[:1])
    assert attends_both_ways(model) is (None if model_type in BLIND else seen)
    assert seen or model_type in BLIND
    with torch.no_grad():  # a bias that is zero at first must be seen, too
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.add_(torch.linspace(-0.5, 0.5, p.numel()).view_as(p))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 60, (2, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    rows = (torch.rand(2, 8, generator=generator) < 0.5) & mask.bool()
    targets = ids[rows]

    expected = logits_of(model(input_ids=ids, attention_mask=mask))[rows.nonzero(as_tuple=True)]
    logits = logits_at(model, ids, mask, rows)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    prediction = hidden_at(model, ids, mask, rows)
    if not isinstance(prediction, torch.Tensor):
        head = model.get_output_embeddings()
        prediction = torch.nn.functional.linear(prediction.hidden, head.weight, head.bias)
    torch.testing.assert_close(prediction, expected, rtol=1e-5, atol=1e-5)

    if model_type in NO_GRADIENT:
        return
    plain = gradients(model, TokenNLL(targets)(expected).value)
    figures = measure_at(model, ids, mask, rows, TokenNLL(targets))
    torch.testing.assert_close(figures.value, TokenNLL(targets)(expected).value, rtol=1e-5, atol=1e-5)
    found = gradients(model, figures.value)
    assert found.keys() == plain.keys() and any(gradient.any() for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def gradients(model, values):
    model.zero_grad()
    values.mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
