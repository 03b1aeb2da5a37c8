"""Prompts and options of decoding that are refused, by name."""

import pytest

from mdu_trainer.files import UserError
from mdu_trainer.inference.generation import DiffusionGenerationConfig, generate, generate_ids


def test_a_prompt_too_long_for_the_context_is_named_by_number(model, tokenizer, backbone):
    with pytest.raises(ValueError, match=r"Prompt 1 has 60 tokens; with max_new_tokens = 5 .* context of 64"):
        generate_ids(model, [[20], [20] * 60], DiffusionGenerationConfig(max_new_tokens=5), backbone)
    with pytest.raises(ValueError, match=r"pass \[prompt\]"):
        generate(model, tokenizer, "Who?")


def test_prompts_that_only_look_like_a_list_of_prompts(model, tokenizer, backbone):
    secret = "Zanthor Quibble"
    conversation = [{"role": "user", "content": secret}]
    batch = tokenizer([secret, secret], return_tensors="pt")
    cases = [
        (conversation, r"a single conversation: pass \[conversation\]"),
        (batch, "a BatchEncoding: pass texts or conversations"),
        (dict(batch), "a dict: pass texts"),
        (batch["input_ids"], "token ids: pass them to generate_ids"),
        (batch["input_ids"].tolist(), "Prompt 0: messages .*int|Prompt 0 has a int among its messages"),
        (batch["input_ids"][0].tolist(), "token ids: pass them to generate_ids"),
        (None, "a NoneType"),
        (["Who?", None], "Prompt 1 is a NoneType: pass a text, or a list of messages"),
        ([conversation, [{"role": "user", "content": None}]], "Prompt 1 has a message whose 'content' is no text"),
        (["Who?", f"{secret} <|mask|>"], r"Prompt 1: it holds '<\|mask\|>'"),
        ([[{"role": "user", "content": f"{secret}<|end|>"}]], r"Prompt 0: it holds '<\|end\|>'"),
    ]
    for prompts, message in cases:
        with pytest.raises(UserError, match=message) as error:
            generate(model, tokenizer, prompts, max_new_tokens=2)
        assert secret not in str(error.value)
    parts = [{"role": "user", "content": [{"type": "text", "text": secret}]}]
    assert generate(model, tokenizer, [parts], max_new_tokens=4) == generate(
        model, tokenizer, [conversation], max_new_tokens=4
    )
    config = DiffusionGenerationConfig(max_new_tokens=2)
    for ids, message in [
        (batch["input_ids"], "a list of ids for each prompt, without padding, got a Tensor"),
        (batch, "got a BatchEncoding"),
        ([[20], batch["input_ids"][0]], "Prompt 1 must be a list of token ids, and is a Tensor"),
        ([[20], [backbone.vocab_size]], f"Prompt 1 has the token id {backbone.vocab_size}, and the model's embedding"),
        ([[-1]], "Prompt 0 has the token id -1"),
    ]:
        with pytest.raises(UserError, match=message):
            generate_ids(model, ids, config, backbone)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number, got True"),
        ({"max_new_tokens": None}, "max_new_tokens must be a whole number, got None"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"batch_size": "8"}, "batch_size must be a whole number, got '8'"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"temperature": float("nan")}, "temperature must be a finite number of at least 0, got nan"),
        ({"temperature": True}, "temperature must be a finite number of at least 0, got True"),
        ({"top_p": float("nan")}, "top_p must be above 0 and at most 1, got nan"),
        ({"top_p": "1"}, "top_p must be above 0 and at most 1, got '1'"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": -1}, "batch_size must be at least 1"),
        ({"temperature": -0.1}, "temperature must be a finite number of at least 0"),
        ({"cfg_scale": float("nan")}, "cfg_scale must be a finite number"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"remasking": "maskgit_plus"}, "remasking must be one of low_confidence, margin, entropy, random"),
        ({"schedule": "cosine"}, "schedule must be one of linear, dllm, dream, got 'cosine'"),
        ({"remasking": "random", "position_temperature": 0.1}, "set it to 0, or choose another remasking"),
        ({"max_new_tokens": 8, "block_length": 9}, r"block_length \(9\) must be at most max_new_tokens \(8\)"),
        (
            {"max_new_tokens": 8, "block_length": 2, "steps": 3},
            r"steps \(3\) must be at least the number of blocks \(4\)",
        ),
    ],
)
def test_a_meaningless_config_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DiffusionGenerationConfig(**fields)
