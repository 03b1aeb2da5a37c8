"""A published model decodes with the options that it was measured with."""

import pytest
from hub_checkpoints import FULL, REPO, make_trainer
from huggingface_hub.errors import RepositoryNotFoundError
from peft import LoraConfig

from mdu_trainer import DiffusionGenerationConfig, generate, load_model, load_tokenizer
from mdu_trainer.hub.files import model_files
from mdu_trainer.hub.push import push_unlearned_model
from mdu_trainer.provenance.facts import Facts

CONFIG = DiffusionGenerationConfig(max_new_tokens=9, steps=3, remasking="random", temperature=0.7, seed=5)


def test_it_is_published_and_the_snippet_uses_it(hub, checkpoint, capsys):
    CONFIG.save_pretrained(checkpoint)
    push_unlearned_model(checkpoint, REPO, revision="tau0")
    assert set(hub.files(REPO, "tau0")) == FULL - {"results.json", "tradeoff.png"}
    assert DiffusionGenerationConfig.from_pretrained(REPO, revision="tau0") == CONFIG
    with pytest.raises(FileNotFoundError, match="says nothing of how"):
        DiffusionGenerationConfig.from_pretrained(REPO)
    with pytest.raises(RepositoryNotFoundError):
        DiffusionGenerationConfig.from_pretrained("org/nowhere")
    snippet = hub.files(REPO, "tau0")["README.md"].decode().partition("```python\n")[2].partition("```")[0]
    assert f'DiffusionGenerationConfig.from_pretrained("{REPO}", revision="tau0")' in snippet
    capsys.readouterr()
    exec(snippet, {})
    prompt = [{"role": "user", "content": "Say hello."}]
    (expected,) = generate(load_model(str(checkpoint)), load_tokenizer(str(checkpoint)), [prompt], CONFIG)
    assert capsys.readouterr().out == f"{expected}\n"


def test_adapters_carry_it_kept_or_merged(hub, rows, tokenizer, checkpoint, tmp_path):
    trainer = make_trainer(tmp_path / "out", rows, tokenizer, str(checkpoint), LoraConfig(r=4))
    trainer.train()
    trainer.save_model()
    CONFIG.save_pretrained(tmp_path / "out")
    assert "generation_config.json" in model_files(tmp_path / "out", Facts.load(tmp_path / "out"), "org/base")
    push_unlearned_model(tmp_path / "out", REPO, adapter="merge")
    assert DiffusionGenerationConfig.from_pretrained(REPO) == CONFIG
