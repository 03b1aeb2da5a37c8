"""The options of decoding, kept beside a model and read from there."""

import json
from dataclasses import asdict

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from mdu_trainer import DiffusionGenerationConfig
from mdu_trainer.files import UserError
from mdu_trainer.inference.config import GENERATION_CONFIG, KEY, has_decoding

CONFIG = DiffusionGenerationConfig(max_new_tokens=24, steps=6, block_length=8, temperature=0.5, top_k=3, seed=7)


def test_they_come_back_as_they_were(tmp_path):
    for config in (CONFIG, DiffusionGenerationConfig()):
        config.save_pretrained(tmp_path)
        assert has_decoding(tmp_path) and DiffusionGenerationConfig.from_pretrained(tmp_path) == config
        assert DiffusionGenerationConfig.from_pretrained(str(tmp_path)) == config


def test_transformers_keeps_them_and_its_own_beside(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    before = GenerationConfig.from_pretrained(tmp_path / "model").to_dict()
    CONFIG.save_pretrained(tmp_path / "model")
    after = GenerationConfig.from_pretrained(tmp_path / "model").to_dict()
    assert after.pop(KEY) == asdict(CONFIG)
    assert {k: v for k, v in after.items() if k[0] != "_"} == {k: v for k, v in before.items() if k[0] != "_"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
    assert DiffusionGenerationConfig.from_pretrained(tmp_path / "again") == CONFIG


def test_a_model_that_says_nothing(make_model, tmp_path):
    for save in (lambda: None, lambda: make_model().save_pretrained(tmp_path)):
        save()
        assert not has_decoding(tmp_path)
        with pytest.raises(FileNotFoundError, match=f"{GENERATION_CONFIG} has no {KEY}. Pass options"):
            DiffusionGenerationConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"max_new_tokens": "many"}, "max_new_tokens is not a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"remasking": "best"}, "remasking is not one of its choices"),
        ({"sharpness": 2}, "has more in it than max_new_tokens"),
        ([1], "its content is not an object"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, content, message):
    (tmp_path / GENERATION_CONFIG).write_text(json.dumps({KEY: content}))
    with pytest.raises(UserError, match=f"{KEY} in {GENERATION_CONFIG} of {tmp_path}: .*{message}"):
        DiffusionGenerationConfig.from_pretrained(tmp_path)
    for broken in ("{", "[1]"):
        (tmp_path / GENERATION_CONFIG).write_text(broken)
        for use in (lambda: CONFIG.save_pretrained(tmp_path), lambda: has_decoding(tmp_path)):
            with pytest.raises(UserError, match="is not a generation config"):
                use()
        assert (tmp_path / GENERATION_CONFIG).read_text() == broken
