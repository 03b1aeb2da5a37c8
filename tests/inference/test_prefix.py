"""The prefix cache of models that attend in full: an approximation, and just the one that it says."""

import pytest
import torch
from transformers import DynamicCache

from mdu_trainer.files import UserError
from mdu_trainer.inference.generation import DiffusionGenerationConfig, generate_ids
from mdu_trainer.models import resolve_backbone

NEW, BLOCK = 12, 4


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(10, 250, (length,), generator=generator).tolist() for length in (5, 9, 9)]


@torch.no_grad()
def plain(model, prompt, backbone):
    """One row: the first step of a block is a whole pass, of which the others keep what stands before the block."""
    mask_id, shift = backbone.mask_token_id, backbone.logit_shift
    x = torch.tensor([prompt + [mask_id] * NEW])
    for start in range(len(prompt), len(prompt) + NEW, BLOCK):
        cache, kept = DynamicCache(), 0
        for _ in range(BLOCK):
            places = torch.arange(kept, x.shape[1])[None]
            how = {"past_key_values": cache, "use_cache": True, "position_ids": places}
            logits = model(input_ids=x[:, kept:], attention_mask=torch.ones_like(x), **how).logits[0]
            at = torch.arange(start, start + BLOCK) - kept - int(shift)
            logits = logits[at]
            logits[:, [mask_id, backbone.pad_token_id]] = -torch.inf
            probability, tokens = logits.softmax(-1).max(-1)
            chosen = torch.where(x[0, start : start + BLOCK] == mask_id, probability, -1).argmax()
            x[0, start + chosen] = tokens[chosen]
            kept = start - shift
            cache.crop(kept - x.shape[1])
    return x[0, len(prompt) :].tolist()


@pytest.mark.parametrize("shift", [False, True])
def test_equals_a_plain_transcription(make_model, tokenizer, prompts, shift):
    model = make_model(initializer_range=0.2, logit_shift=shift).eval()
    backbone = resolve_backbone(model, tokenizer)
    config = DiffusionGenerationConfig(NEW, block_length=BLOCK, prefix_cache=True)
    expected = [plain(model, prompt, backbone) for prompt in prompts]
    ends = [next((i for i, token in enumerate(ids) if token in backbone.end_token_ids), NEW) for ids in expected]
    expected = [ids[:end] for ids, end in zip(expected, ends, strict=True)]
    alone = [generate_ids(model, [prompt], config, backbone)[0] for prompt in prompts]
    assert alone == expected
    assert generate_ids(model, prompts[1:], config, backbone) == expected[1:], "rows of like prompts share a batch"


def test_one_step_a_block_is_exact(make_model, tokenizer, prompts):
    model = make_model(initializer_range=0.2)
    backbone = resolve_backbone(model, tokenizer)
    how = {"block_length": BLOCK, "steps": NEW // BLOCK}
    exact, cached = (
        generate_ids(model, prompts, DiffusionGenerationConfig(NEW, **how, prefix_cache=cache), backbone)
        for cache in (None, True)
    )
    assert exact == cached


def test_refused(make_model, tokenizer, prompts):
    model = make_model()
    backbone = resolve_backbone(model, tokenizer)
    config = DiffusionGenerationConfig(NEW, prefix_cache=True, cfg_scale=1.0)
    with pytest.raises(UserError, match="cfg_scale needs a second one"):
        generate_ids(model, prompts, config, backbone)
