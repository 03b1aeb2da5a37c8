"""Attacks leave a model as it was, and repeat."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from stand_in import LENGTH, make_settings
from torch import nn

from mdu_trainer import DiffusionGenerationConfig, MDLMConfig, MDLMTrainer, question_answer_rows
from mdu_trainer.attacks import ATTACKS, Target


@pytest.fixture(scope="module")
def learned(tokenizer, rows, unrelated, tmp_path_factory):
    """A small model that has learned half of the rows by heart, and has never seen the others."""
    from mdu_trainer.testing import tiny_mdlm

    model = tiny_mdlm(tokenizer, 48, 2, 2)
    config = MDLMConfig(
        str(tmp_path_factory.mktemp("learned")),
        max_steps=300,
        learning_rate=4e-3,
        per_device_train_batch_size=3,
        time_weighting=False,
        pad_with_end_tokens=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        lr_scheduler_type="cosine",
    )
    data = question_answer_rows(rows.select(range(3)), conversational=True)
    MDLMTrainer(model, config, train_dataset=data, processing_class=tokenizer).train()
    return model.eval()


@pytest.fixture(scope="module")
def adapted(learned, tokenizer):
    """The same with an adapter that has some effect."""
    import copy

    model = get_peft_model(copy.deepcopy(learned), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data = 0.03 * torch.randn(value.shape, generator=generator)
    return model


def snapshot(model: nn.Module) -> dict:
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "trainable": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "scaling": [dict(m.scaling) for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)],
        "disabled": [m.disable_adapters for m in model.modules() if hasattr(m, "disable_adapters")],
        "merged": [m.merged for m in model.modules() if hasattr(m, "merged")],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def assert_same(now: dict, before: dict) -> None:
    assert torch.equal(now.pop("random"), before.pop("random"))
    assert now.pop("weights").keys() == before["weights"].keys()
    assert {key: value for key, value in before.items() if key != "weights"} == now


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ATTACKS)
def test_the_model_is_left_as_it_was(adapted, tokenizer, rows, unrelated, name, fails):
    adapted.train()
    adapted.base_model.model.model.layers[0].eval()
    rows = rows.select(range(4))
    target = Target(adapted, tokenizer, rows, make_settings(unrelated.select(range(8)), rows))
    _ = target.plain, target.completed
    before = snapshot(adapted)
    if fails:
        calls = []

        def fail(*args):
            calls.append(args)
            if len(calls) > 5:
                raise RuntimeError("out of memory")

        handle = adapted.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            ATTACKS[name].run(target, 0)
        handle.remove()
    else:
        ATTACKS[name].run(target, 0)
    after = snapshot(adapted)
    assert all(torch.equal(value, before["weights"][key]) for key, value in after["weights"].items())
    assert_same(after, before)


@pytest.mark.parametrize("name", ATTACKS)
def test_batches_change_nothing_and_seeds_repeat(adapted, tokenizer, rows, unrelated, name):
    rows, found = rows.select(range(4)), []
    for size in (32, 32, 3):
        decoding = DiffusionGenerationConfig(max_new_tokens=LENGTH, batch_size=size)
        settings = make_settings(unrelated.select(range(8)), rows, decoding=decoding)
        found.append(ATTACKS[name].run(Target(adapted, tokenizer, rows, settings), 3))
    assert found[0] == found[1]
    for field in ("rows", "before", "after"):
        assert getattr(found[0], field) == pytest.approx(getattr(found[2], field))
    assert found[0].path == pytest.approx(found[2].path)


def test_the_model_of_these_tests_knows_some_words(adapted, tokenizer, rows, unrelated):
    target = Target(adapted, tokenizer, rows, make_settings(unrelated, rows))
    assert 0 < sum(target.plain) < len(rows)
