"""Decoding of block-wise models: tokens of the published loops, whatever is kept, and the cost of a step."""

from dataclasses import replace

import pytest
import torch

from mdu_trainer.files import UserError
from mdu_trainer.inference.generation import DiffusionGenerationConfig, generate_ids
from mdu_trainer.models import resolve_backbone

SIZE, NEW = 8, 14
LENGTHS = (3, 8, 9, 30)  # prompts that end before, at and behind the end of a block


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(10, 250, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture
def speak(make_model, tokenizer, prompts):
    """`speak(shift, model=None, **options)`: what a model decodes for the prompts."""

    def decode(shift=False, model=None, asked=prompts, name="sdar", backbone=None, given=None, **options):
        model = model or make_model(block_size=SIZE, num_layers=1, initializer_range=0.2, logit_shift=shift)
        backbone = replace(backbone or resolve_backbone(model, tokenizer), name=name)
        config = DiffusionGenerationConfig(**({"max_new_tokens": NEW} | options))
        return generate_ids(model, asked, config, backbone, given=given)

    return decode


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 8, "block_length": 4},
        {"remasking": "low_confidence_dynamic", "confidence_threshold": 0.05},
        {"remasking": "random", "temperature": 1.0},
        {"confidence_threshold": 0.05, "edit_threshold": 0.1},
    ],
    ids=str,
)
def test_cache_and_batch_change_no_token(speak, options, shift):
    decoded = speak(shift, **options)
    assert all(len(ids) <= NEW for ids in decoded)
    assert speak(shift, **options, prefix_cache=False) == decoded
    assert speak(shift, **options, batch_size=3) == decoded


@torch.no_grad()
def published(model, prompt, ids, *, scheduled=1, threshold=None, edit=None, sub=SIZE, shift=False, ends=()):
    """The published loops (SDAR, LLaDA2.x, Fast-dLLM v2) for one prompt at temperature 0, without a cache.

    Sequences grow by whole blocks; the prediction of a block is read off a pass over all up to its end. The mask
    and the padding are never predicted, as here.
    """
    mask_id, banned = ids
    total = -(-(len(prompt) + NEW) // SIZE) * SIZE
    x = torch.tensor(prompt + [mask_id] * (total - len(prompt)))

    def predict(stop):
        block = torch.arange(stop) // SIZE
        mask = (block[:, None] >= block)[None, None]
        logits = model(input_ids=x[None, :stop], attention_mask=mask, position_ids=torch.arange(stop)[None]).logits[0]
        logits[:, banned] = -torch.inf
        return logits.softmax(-1)

    for start in range(len(prompt) // SIZE * SIZE, total, SIZE):
        stop = start + SIZE
        if shift and start and x[start] == mask_id:
            x[start] = predict(start)[-1].argmax()  # by the last token of the block before
        for low in range(start, stop, sub):
            while (x[low : low + sub] == mask_id).any() or edit is not None:
                before = x.clone()
                p = predict(stop)[start:stop]
                p = torch.cat([p[:1], p[:-1]]) if shift else p
                confidence, tokens = p.max(-1)
                at_mask = torch.zeros(SIZE, dtype=torch.bool)
                at_mask[low - start : low - start + sub] = x[low : low + sub] == mask_id
                sure = torch.where(at_mask, confidence, -1.0)
                chosen = torch.zeros(SIZE, dtype=torch.bool)
                high = sure > (2.0 if threshold is None else threshold)
                if high.sum() >= scheduled:
                    chosen = high
                elif at_mask.any():
                    chosen[sure.topk(min(scheduled, int(at_mask.sum()))).indices] = True
                if edit is not None:
                    placed = (x[start:stop] != mask_id) & (torch.arange(start, stop) >= len(prompt))
                    chosen |= placed & (confidence > edit) & (tokens != x[start:stop])
                x[start:stop][chosen] = tokens[chosen]
                if edit is not None and torch.equal(x, before):
                    break
        answer = x[len(prompt) : stop].tolist()
        if any(token in ends for token in answer):
            break
    answer = x[len(prompt) : len(prompt) + NEW].tolist()
    return answer[: min([answer.index(end) for end in ends if end in answer], default=NEW)]


@pytest.mark.parametrize(
    ("name", "options", "loop"),
    [
        ("sdar", {}, {}),
        ("sdar", {"steps": 8}, {"scheduled": 2}),
        ("sdar", {"remasking": "low_confidence_dynamic", "confidence_threshold": 0.05}, {"threshold": 0.05}),
        (
            "llada2",
            {"remasking": "low_confidence_dynamic", "confidence_threshold": 0.06, "steps": 8},
            {"threshold": 0.06, "scheduled": 2},
        ),
        ("llada2", {"confidence_threshold": 0.06, "edit_threshold": 0.2}, {"threshold": 0.06, "edit": 0.2}),
        ("fast_dllm", {"block_length": 4, "confidence_threshold": 0.05}, {"threshold": 0.05, "sub": 4, "shift": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tokens_are_those_of_the_published_loop(make_model, tokenizer, prompts, speak, name, options, loop):
    model = make_model(
        block_size=SIZE, num_layers=1, initializer_range=0.2, logit_shift=loop.get("shift", False)
    ).eval()
    backbone = resolve_backbone(model, tokenizer)
    banned = list({backbone.mask_token_id, backbone.pad_token_id} - {*backbone.end_token_ids})
    ids, ends = (backbone.mask_token_id, banned), backbone.end_token_ids
    expected = [published(model, prompt, ids, ends=ends, **loop) for prompt in prompts]
    assert speak(model=model, name=name, **options) == expected
    first = next(token for answer in expected for token in answer[3:] if token not in answer[:3])
    ended = replace(backbone, end_token_ids=(first,))
    expected = [published(model, prompt, ids, ends=(first,), **loop) for prompt in prompts]
    assert speak(model=model, name=name, backbone=ended, **options) == expected
    assert any(len(answer) < NEW for answer in expected)


def test_published_thresholds_have_names(speak, make_model):
    low = speak(remasking="low_confidence_dynamic", confidence_threshold=0.85)
    assert speak(remasking="low_confidence_dynamic") == low
    wide = make_model(block_size=16, num_layers=1, initializer_range=0.2)
    assert speak(model=wide, name="fast_dllm") == speak(model=wide, block_length=8) != speak(model=wide)
    assert speak(steps=1) == speak(steps=2), "at least one step for each of two blocks"
    with pytest.raises(UserError, match="none was published for this model"):
        speak(name="other", remasking="low_confidence_dynamic")


def test_a_step_with_a_cache_runs_the_tokens_of_its_block_alone(make_model, speak, prompts):
    model, seen = make_model(block_size=SIZE, initializer_range=0.2), []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    speak(model=model, asked=prompts[-1:], name="sdar")
    seen = [length for length in seen if length != 5]  # probes
    assert seen[0] == 24, "the whole blocks of the prompt"
    assert set(seen[1:]) == {SIZE}
    seen.clear()
    speak(model=model, asked=prompts[-1:], prefix_cache=False)
    assert max(seen) == 48, "all blocks up to the one that is decoded"


def test_what_is_given_stays(speak, prompts):
    beginning = [[20, 21, 22, None, 24]] * len(prompts)
    for cache in (True, False):
        decoded = speak(given=beginning, prefix_cache=cache, confidence_threshold=0.05, edit_threshold=0.0)
        assert all(ids[:3] == [20, 21, 22] and ids[4] == 24 for ids in decoded)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cfg_scale": 1.0}, "cfg_scale = 1 needs a pass without the prompt"),
        ({"max_new_tokens": 240}, "exceeds the model's context of 256"),
        ({"edit_threshold": 1.5}, r"edit_threshold must lie in \[0, 1\], got 1.5"),
        ({"confidence_threshold": "high"}, r"confidence_threshold must lie in \[0, 1\], got 'high'"),
        ({"prefix_cache": "yes"}, "prefix_cache must be True or False, got 'yes'"),
    ],
)
def test_refused(speak, options, message):
    with pytest.raises(UserError, match=message):
        speak(**options)


def test_thresholds_of_blocks_are_refused_where_there_are_none(make_model, speak):
    with pytest.raises(UserError, match="edit_threshold is of models that attend between blocks"):
        speak(model=make_model(), edit_threshold=0.9)
