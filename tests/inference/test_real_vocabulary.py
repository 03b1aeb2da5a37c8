"""Decoding of flat predictions over LLaDA's vocabulary, against a transcription of the published loop."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mdu_trainer.inference.generation import DiffusionGenerationConfig, generate_ids
from mdu_trainer.inference.sampling import POSITIONS, uniform
from mdu_trainer.models import Backbone

VOCABULARY, MASK, END = 126464, 126336, 126081
LENGTH, SEED = 8, 0
PROMPTS = [[20, 21, 22], [30], [40, 41, 42, 43, 44, 45, 46]]
BACKBONE = Backbone("flat", MASK, (END,), END, False, VOCABULARY, None, [], None)


@pytest.fixture(scope="module")
def flat_model() -> LlamaForCausalLM:
    """A tiny model that gives its most probable token about 1e-5, as models do after unlearning with tau = 0."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        is_causal=False,
        use_cache=False,
        tie_word_embeddings=False,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data *= 0.02
    return model


@torch.no_grad()
def published_decode(model, row: int, remasking: str, cfg_scale: float, block_length: int, steps: int):
    """LLaDA's loop for one prompt, [MASK] forbidden, scores in float64: positions by step, and the tokens."""
    prompt = torch.tensor([PROMPTS[row]])
    start = prompt.shape[1]
    x = torch.cat([prompt, torch.full((1, LENGTH), MASK)], dim=1)
    num_blocks, order = LENGTH // block_length, []
    steps_a_block = steps // num_blocks
    for num_block in range(num_blocks):
        for i in range(steps_a_block):
            logits = model(input_ids=x).logits
            if cfg_scale > 0:
                un_x = x.clone()
                un_x[:, :start] = MASK
                un_logits = model(input_ids=un_x).logits
                logits = un_logits + (cfg_scale + 1) * (logits - un_logits)
            logits[:, :, MASK] = -torch.inf
            p = logits[0].double().softmax(dim=-1)
            x0, (first, second) = p.argmax(dim=-1), p.topk(2, dim=-1).values.T
            x0_p = {
                "low_confidence": first,
                "margin": first - second,
                "entropy": -torch.special.entr(p).sum(dim=-1),
                "random": drawn_for(row, num_block * steps_a_block + i, start),
            }[remasking]
            x0_p[start + (num_block + 1) * block_length :] = -torch.inf
            confidence = torch.where(x[0] == MASK, x0_p, -torch.inf)
            chosen = confidence.topk(block_length // steps_a_block).indices
            x[0, chosen] = x0[chosen]
            order.append(sorted((chosen - start).tolist()))
    return order, x[0, start:].tolist()


def drawn_for(row: int, step: int, start: int) -> torch.Tensor:
    """The numbers by which a step of random remasking reveals, in place of torch.rand: `[start + LENGTH]`."""
    noise = uniform(SEED, POSITIONS, torch.tensor([row]), step, torch.arange(LENGTH))
    return torch.cat([torch.zeros(start, dtype=noise.dtype), noise])


def decode(model, config: DiffusionGenerationConfig):
    """What `published_decode` returns, of each prompt."""
    orders = [[] for _ in PROMPTS]

    def note(revealed):
        for row in revealed.place.unique().tolist():
            orders[row].append(revealed.position[revealed.place == row].tolist())

    return list(zip(orders, generate_ids(model, PROMPTS, config, BACKBONE, on_reveal=note), strict=True))


@pytest.mark.parametrize("cfg_scale", [0.0, 0.5])
@pytest.mark.parametrize("remasking", ["low_confidence", "margin", "entropy", "random"])
def test_flat_predictions_are_revealed_as_published_in_any_batch(flat_model, remasking, cfg_scale):
    shape = {"block_length": 4, "steps": 4} if remasking == "random" else {"block_length": 8, "steps": 8}
    expected = [published_decode(flat_model, row, remasking, cfg_scale, **shape) for row in range(len(PROMPTS))]
    config = DiffusionGenerationConfig(LENGTH, remasking=remasking, cfg_scale=cfg_scale, seed=SEED, **shape)
    assert decode(flat_model, config) == expected
    assert decode(flat_model, replace(config, batch_size=1)) == expected
