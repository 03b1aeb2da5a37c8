"""Where theta_0's predictions come from: a copy, adapters switched off, or a file made before training."""

import json
import os
import signal
import sys

import pytest
import torch
import warm
from peft import LoraConfig
from runs import QUIET
from torch._dynamo.utils import counters

from mdu_trainer import MDUConfig, MDUTrainer
from mdu_trainer.data.rows import question_answer_rows
from mdu_trainer.divergence import AnchorKL, TokenNLL
from mdu_trainer.masking import forward_process
from mdu_trainer.models import hidden_at, logits_at, measure_at
from mdu_trainer.testing import forget_retain_split
from mdu_trainer.trainer.anchor_cache import FOLDER

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def sets(authors):
    """Eleven rows to forget, so that batches of four do not divide them, and twenty to keep."""
    forget, retain = (question_answer_rows(rows, conversational=True) for rows in forget_retain_split(authors))
    return forget.select(range(11)), retain.select(range(20))


@pytest.fixture
def make_trainer(make_model, tokenizer, sets, tmp_path):
    def make(output="run", model=None, peft_config=None, eval_dataset=None, **kwargs):
        defaults = {
            "tau": 0.5,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "max_steps": 12,
            "save_strategy": "no",
            **QUIET,
        }
        return MDUTrainer(
            make_model() if model is None else model,
            MDUConfig(output_dir=str(tmp_path / output), **(defaults | kwargs)),
            sets[0],
            sets[1],
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return make


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


# Precomputed anchors


@pytest.mark.parametrize("peft_config", [None, LORA])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl_reduction": "token", "gradient_accumulation_steps": 2},
        {"train_sampling_strategy": "group_by_length"},
        {"max_steps": -1, "num_train_epochs": 1.4},
        {"tau": 1.0, "anchor_input": "counterfactual"},
        {"forget_masking": "generated"},
    ],
)
def test_precomputed_anchors_end_with_the_weights_of_a_copy(make_trainer, peft_config, options):
    plain = make_trainer("plain", peft_config=peft_config, **options)
    start = weights(plain)
    plain.train()
    trainer = make_trainer("precomputed", peft_config=peft_config, precompute_anchor=True, **options)
    assert trainer.reference is None or trainer.reference.frozen is None
    trainer.train()
    assert same(weights(plain), weights(trainer)) and not same(start, weights(trainer))


def test_no_second_model_while_training(make_trainer):
    trainer = make_trainer(precompute_anchor=True)
    trainer.train()
    assert trainer.reference is None
    head = trainer._anchor_head
    assert head.weight.shape == trainer.model.lm_head.weight.shape and not head.weight.requires_grad
    assert not torch.equal(head.weight, trainer.model.lm_head.weight)  # theta_0's, while the live one has moved


def count_predictions(trainer, monkeypatch):
    calls, reference = [], trainer.reference
    predict = reference.projection
    monkeypatch.setattr(reference, "projection", lambda *args, **kwargs: calls.append(1) or predict(*args, **kwargs))
    return calls


def test_a_second_run_reads_the_file_of_the_first(make_trainer, monkeypatch, tmp_path):
    make_trainer(precompute_anchor=True).train()
    files = list((tmp_path / "run" / FOLDER / "train").iterdir())
    assert {file.name for file in files} == {"hidden.bin", "header.json"}
    again = make_trainer(precompute_anchor=True)
    calls = count_predictions(again, monkeypatch)
    again.train()
    assert not calls


def cut_short(folder):
    (folder / "header.json").unlink()


def truncated(folder):
    data = folder / "hidden.bin"
    os.truncate(data, data.stat().st_size - 4)


def unreadable(folder):
    (folder / "header.json").write_text("{")


def untouched(folder):
    pass


@pytest.mark.parametrize(
    ("damage", "options", "reason"),
    [
        (cut_short, {}, "cut short"),
        (truncated, {}, "not complete"),
        (unreadable, {}, "cannot be read"),
        (untouched, {"seed": 7}, "another model"),
        (untouched, {"max_steps": 20}, "another model"),
        (untouched, {"t_min": 0.5}, "another model"),
    ],
)
def test_a_stale_or_damaged_file_is_made_anew(make_trainer, tmp_path, monkeypatch, damage, options, reason):
    make_trainer(precompute_anchor=True).train()
    damage(tmp_path / "run" / FOLDER / "train")
    again, messages = make_trainer(precompute_anchor=True, **options), []
    monkeypatch.setattr("mdu_trainer.trainer.anchor_cache.logger.warning", messages.append)
    again.train()
    assert len(messages) == 1 and "computed anew" in messages[0] and reason in messages[0]
    plain = make_trainer("plain", **options)
    plain.train()
    assert same(weights(plain), weights(again))


def test_other_weights_make_the_file_stale(make_trainer, make_model, monkeypatch):
    make_trainer(precompute_anchor=True).train()
    other = make_trainer(model=make_model(seed=5), precompute_anchor=True)
    calls = count_predictions(other, monkeypatch)
    other.train()
    assert len(calls) == 9 + 3  # the batches of the 12 steps: an epoch of 20 pairs has 5


def test_eval_sets_of_the_constructor_have_anchors_and_others_are_refused(make_trainer, sets):
    plain = make_trainer("plain", eval_dataset={"forget": sets[0]})
    plain.train()
    trainer = make_trainer("precomputed", eval_dataset={"forget": sets[0]}, precompute_anchor=True)
    trainer.train()
    names = ("eval_forget_forget_loss", "eval_forget_kl", "eval_forget_retain_loss")
    expected, found = plain.evaluate(), trainer.evaluate()
    assert [found[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-5)
    with pytest.raises(ValueError, match="Pass it to the constructor"):
        trainer.evaluate(sets[0].select(range(2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, "no anchor is read"),
        ({"loss_type": "npo"}, "no anchor is read"),
        ({"tau": 0.5, "anchor_source": "current"}, "no anchor is read"),
        ({"tau": 0.5, "retain_loss_type": "kl"}, "would not free"),
        ({"tau": 0.5, "reference_device": "cpu"}, "does without"),
    ],
)
def test_options_that_contradict_precomputed_anchors(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        MDUConfig(output_dir=str(tmp_path), precompute_anchor=True, **options)


def test_a_full_disk_is_reported_before_training(make_trainer, monkeypatch):
    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(OSError, match="No space left on device: the precomputed anchors take .* Make room"):
        make_trainer(precompute_anchor=True).train()


KILLED = """
import os, signal, sys
from datasets import load_from_disk
from transformers import Trainer
from mdu_trainer import MDUConfig, MDUTrainer
base, forget, retain, out, kill = sys.argv[1:]
if kill == "before training":
    Trainer.train = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
config = MDUConfig(out, tau=0.5, precompute_anchor=True, max_steps=6, per_device_train_batch_size=4, report_to="none",
                   gradient_accumulation_steps=1, learning_rate=1e-3, save_strategy="no", use_cpu=True)
unlearn = MDUTrainer(base, config, load_from_disk(forget), load_from_disk(retain))
if kill == "while computing":
    predict, calls = unlearn.reference.projection, []
    def die(*args, **kwargs):
        calls.append(1)
        return os.kill(os.getpid(), signal.SIGKILL) if len(calls) > 2 else predict(*args, **kwargs)
    unlearn.reference.projection = die
unlearn.train()
unlearn.save_model()
"""


@pytest.mark.parametrize("kill", ["while computing", "before training"])
def test_survives_a_kill_before_training(make_model, tokenizer, sets, tmp_path, kill):
    base, out = tmp_path / "base", tmp_path / "out"
    make_model().save_pretrained(base)
    tokenizer.save_pretrained(base)
    for name, rows in zip(("forget", "retain"), sets, strict=True):
        rows.save_to_disk(tmp_path / name)
    arguments = [str(base), str(tmp_path / "forget"), str(tmp_path / "retain")]

    def run(folder, kill):
        command = [sys.executable, "-c", KILLED, *arguments, str(folder), kill]
        return warm.run(command)

    assert run(out, kill).returncode == -signal.SIGKILL
    assert (out / FOLDER / "train" / "hidden.bin").exists()
    resumed, undisturbed = run(out, ""), run(tmp_path / "undisturbed", "")
    assert resumed.returncode == undisturbed.returncode == 0, resumed.stderr + undisturbed.stderr
    assert ("computed anew" in resumed.stderr) == (kill == "while computing")
    saved = (out / "model.safetensors").read_bytes()
    assert saved == (tmp_path / "undisturbed" / "model.safetensors").read_bytes()


def test_header_has_figures_only(make_trainer, tmp_path, sets):
    make_trainer(precompute_anchor=True).train()
    header = json.loads((tmp_path / "run" / FOLDER / "train" / "header.json").read_text())
    assert set(header) == {"fingerprint", "width", "dtype"} and len(header["fingerprint"]) == 32
    assert (tmp_path / "run" / FOLDER / "train" / "hidden.bin").stat().st_mode & 0o077 == 0  # its owner's alone


# The copy


def test_a_copy_in_8_bit_is_small_and_close(make_trainer):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    trainer = make_trainer(reference_precision="8bit")
    frozen = trainer.reference.frozen
    assert frozen.model.layers[0].self_attn.q_proj.weight.dtype == torch.int8
    assert frozen.lm_head.weight.dtype == torch.float32
    full = make_trainer("full").reference
    batch = next(iter(trainer.get_train_dataloader()))["forget"]
    noised = forward_process(batch, trainer.backbone.mask_token_id)
    where = (noised.anchor_ids, noised.attention_mask, noised.masked)
    small, exact = (r.projection(trainer.model, *where) for r in (trainer.reference, full))
    distance = (small.hidden.float() - exact.hidden).norm() / exact.hidden.norm()
    assert 0 < distance < 0.1
    trainer.train()


def test_8_bit_without_bitsandbytes(make_trainer, monkeypatch):
    monkeypatch.setattr("mdu_trainer.trainer.reference.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match="mdu-trainer\\[quantization\\]"):
        make_trainer(reference_precision="8bit")


def test_a_copy_on_a_named_device(make_trainer):
    trainer, plain = make_trainer(reference_device="cpu"), make_trainer("plain")
    assert trainer.reference.frozen.device.type == "cpu"
    trainer.train(), plain.train()
    assert same(weights(trainer), weights(plain))


def test_adapters_need_no_copy_and_take_no_options_of_one(make_trainer):
    with pytest.raises(ValueError, match="a PEFT model needs none"):
        make_trainer(peft_config=LORA, reference_device="cpu")


# The head


def passes(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(300, (3, 20), generator=generator)
    rows = torch.rand(3, 20, generator=generator) < 0.5
    return ids, torch.ones_like(ids), rows


def step(model, measure, inputs):
    model.zero_grad()
    figures = measure_at(model, *inputs, measure)
    figures.value.mean().backward()
    return figures, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_soft_capped_logits_take_the_other_path(make_model):
    class Capped(torch.nn.Module):
        def __init__(self, model, cap):
            super().__init__()
            self.model, self.cap = model, cap

        def get_output_embeddings(self):
            return self.model.lm_head

        def forward(self, input_ids, attention_mask):
            output = self.model(input_ids=input_ids, attention_mask=attention_mask)
            output.logits = self.cap * torch.tanh(output.logits / self.cap)
            return output

    model = make_model(initializer_range=0.2)
    inputs = passes(model)
    targets = inputs[0][inputs[2]]
    capped = Capped(model, 30.0)
    for _ in range(2):
        expected = TokenNLL(targets)(logits_at(capped, *inputs)).value
        torch.testing.assert_close(measure_at(capped, *inputs, TokenNLL(targets)).value, expected)
    assert isinstance(hidden_at(capped, *inputs), torch.Tensor)


@pytest.mark.parametrize("tau", [0.0, 0.5])
def test_compiled_models_give_the_same_loss_and_gradients(make_model, tau):
    model = make_model()
    compiled = torch.compile(model, backend="aot_eager")
    graphs = []
    for seed in range(3):  # other rows and other numbers of them than the graph was made with
        inputs = passes(model, seed)
        anchor = hidden_at(model, inputs[0] * 0 + 1, *inputs[1:])
        figures, grads = step(compiled, AnchorKL(tau, anchor), inputs)
        expected, expected_grads = step(model, AnchorKL(tau, anchor), inputs)
        torch.testing.assert_close(figures.value, expected.value)
        assert grads.keys() == {f"_orig_mod.{name}" for name in expected_grads}
        for name, grad in expected_grads.items():
            torch.testing.assert_close(grads[f"_orig_mod.{name}"], grad, rtol=1e-4, atol=1e-6)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[2]  # compiled once
