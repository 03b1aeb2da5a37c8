"""Which tokens of rows to forget are masked: what the masks say, what the model generates, and what is kept of it."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from formula import batch_of, own_tokens, trained, weights

from mdu_trainer import MDUConfig
from mdu_trainer.data.forget_masks import ForgetMasks
from mdu_trainer.files import UserError
from mdu_trainer.masking import forward_process
from mdu_trainer.trainer import rollouts
from mdu_trainer.trainer.checkpoints import CheckpointError
from mdu_trainer.trainer.rollouts import FOLDER, IN_CHECKPOINT

GENERATED = {"tau": 0.5, "forget_masking": "generated"}
EVERY = GENERATED | {"rollout_every": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
EPOCH = 3  # updates: 20 retain rows in batches of 8


def masked(kind, ids, t=0.4, generated=()):
    """The masked positions of one row: 1 and 2 are a prompt, 9 ends the response, 0 pads."""
    ids, noise = torch.tensor([ids]), torch.tensor([[0.0, 0.9, 0.71, 0.05, 0.32, 0.0]])
    attention_mask = (ids != 0).long()
    response = attention_mask * (torch.arange(6) > 1)
    masks = ForgetMasks(kind, (0, 9), (generated,))
    parts = masks.apply(torch.tensor([0]), ids, response, torch.tensor([t]), noise)
    batch = {"input_ids": ids, "attention_mask": attention_mask, "completion_mask": response} | parts
    noised = forward_process(batch, mask_token_id=8)
    assert (noised.anchor_ids[0, :2] == 8).all() and (noised.input_ids[0, :2] == ids[0, :2]).all()
    return noised.masked[0].nonzero()[:, 0].tolist(), noised.weight.item(), noised.num_response.item()


ROW = [1, 2, 5, 6, 9, 0]


@pytest.mark.parametrize(
    "kind, generated, expected",
    [
        ("random", (), ([3], 2.5, 2)),
        ("content", (), ([2, 3], 1, 2)),
        ("generated", (6, 7, 9), ([3], 2, 2)),
        ("generated", (5, 6), ([2, 3], 1, 2)),
        ("generated", (2, 9), ([2, 3], 1, 2)),
        ("generated", (), ([2, 3], 1, 2)),
    ],
)
def test_what_is_masked(kind, generated, expected):
    assert masked(kind, ROW, generated=generated) == expected


def test_a_draw_that_masks_nothing_masks_no_special_token():
    assert masked("random", ROW, t=0.01) == ([3], 0.0, 2)


def test_a_response_of_special_tokens_alone():
    assert masked("content", [1, 2, 9, 9, 0, 0]) == ([2, 3], 1, 2)


def test_special_tokens_stay_visible_and_rows_to_keep_are_masked_at_random(make_trainer):
    trainer = make_trainer(tau=0.5, forget_masking="content")
    batch = batch_of(trainer)
    forget, end = batch["forget"], trainer.backbone.end_token_ids[0]
    noised = forward_process(forget, trainer.backbone.mask_token_id)
    ends = (forget["input_ids"] == end) & forget["completion_mask"].bool()
    assert ends.sum() == 4 and torch.equal(noised.masked, forget["completion_mask"].bool() & ~ends)
    plain = batch_of(make_trainer(tau=0.5))
    assert all(torch.equal(batch["retain"][name], plain["retain"][name]) for name in plain["retain"])


# What the model generates


def test_tokens_are_those_that_the_model_generates(make_trainer, make_speaker):
    tokens = []
    for batch_size in (3, 8):
        trainer = make_trainer(make_speaker().double(), per_device_eval_batch_size=batch_size, **GENERATED)
        rollouts.set_masks(trainer, trainer.train_dataset)
        tokens.append(trainer._rollout.tokens)
    prompts = trainer.train_dataset.parts["forget"].prompt_ids
    assert tokens[0] == tokens[1] == [sorted(own_tokens(trainer, prompt)) for prompt in prompts]


def count_rollouts(monkeypatch):
    calls, generate = [], rollouts.generate_ids
    monkeypatch.setattr(rollouts, "generate_ids", lambda *args, **kwargs: calls.append(1) or generate(*args, **kwargs))
    return calls


def test_a_second_run_reads_the_file_of_the_first(make_trainer, make_speaker, monkeypatch, tmp_path, sets, seen):
    calls, path = count_rollouts(monkeypatch), tmp_path / FOLDER / "train.json"
    first = trained(make_trainer(make_speaker(), **GENERATED))
    assert path.stat().st_mode & 0o077 == 0 and path.parent.parent == tmp_path
    content = json.loads(path.read_text())
    assert content.keys() == {"schema", "fingerprint", "epoch", "tokens"}
    assert len(content["tokens"]) == 8 and all(isinstance(i, int) for row in content["tokens"] for i in row)
    assert torch.equal(first, trained(make_trainer(make_speaker(), **GENERATED))) and len(calls) == 1
    for damage in ("{", json.dumps(content | {"fingerprint": "other"})):
        path.write_text(damage)
        trained(make_trainer(make_speaker(), max_steps=1, **GENERATED))
        assert json.loads(path.read_text()) == content
    assert len(calls) == 3 and "generated anew" in seen.text
    trained(make_trainer(make_speaker(seed=5), max_steps=1, **GENERATED))
    assert len(calls) == 4


def test_rows_without_a_generated_token_are_counted(make_trainer, monkeypatch, seen):
    trainer = make_trainer(**GENERATED)
    content = trainer.train_dataset.parts["forget"].completion_ids[0][:-1]
    monkeypatch.setattr(rollouts, "generate_ids", lambda *args, **kwargs: [content[:1]] + [[]] * 7)
    rollouts.set_masks(trainer, trainer.train_dataset)
    assert "of 8 rows to forget, 7 have no token" in seen.text


def test_no_room_to_generate(make_trainer, make_model, sets):
    lengths = [len(p) + len(r) for p, r in zip(*rows_of(make_trainer()), strict=True)]
    model = make_model(max_position_embeddings=max(lengths))
    trainer = make_trainer(model, **GENERATED)
    with pytest.raises(UserError, match=r"of 8 prompts leave no room .* context of \d+\. Lower max_length"):
        trainer.train()
    make_trainer(model, tau=0.5, forget_masking="content").train()


def rows_of(trainer):
    rows = trainer.train_dataset.parts["forget"]
    return rows.prompt_ids, rows.completion_ids


def test_eval_sets_are_masked_alike(make_trainer, make_speaker, sets):
    trainer = make_trainer(make_speaker(), eval_dataset={"forget": sets[0], "retain": sets[1]}, **GENERATED)
    before = trainer.evaluate()["eval_forget_masked_fraction"]
    rows = batch_of(make_trainer(make_speaker(), per_device_train_batch_size=8, **GENERATED))["forget"]
    assert before == pytest.approx(rows["t"].mean().item()) and 0 < rows["t"].min() < rows["t"].max() == 1
    trainer.train()
    assert trainer.evaluate()["eval_forget_masked_fraction"] == before
    assert trainer.evaluate(sets[0])["eval_forget_loss"] > 0


# Generated anew


def test_later_weights_generate_other_tokens_and_a_resumed_run_has_the_same(
    make_trainer, make_speaker, tmp_path, monkeypatch
):
    options = EVERY | {"max_steps": 2 * EPOCH + 2, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(make_speaker(), **options)
    tokens, renew = [], rollouts.NewRollouts.on_epoch_begin

    def note(self, *args, **kwargs):
        renew(self, *args, **kwargs)
        tokens.append(self.trainer._rollout.tokens)

    with monkeypatch.context() as patched:
        patched.setattr(rollouts.NewRollouts, "on_epoch_begin", note)
        whole.train()
    assert len(tokens) == 3 and tokens[0] != tokens[1] != tokens[2]
    end = weights(whole)
    assert not torch.equal(
        end, trained(make_trainer(make_speaker(), **options | {"rollout_every": 5, "save_strategy": "no"}))
    )
    assert (tmp_path / "checkpoint-4" / IN_CHECKPOINT).stat().st_mode & 0o077 == 0
    for step in (2, 4, 6):  # amid an epoch, amid a later one, at an epoch's end
        resumed = make_trainer(make_speaker(), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert torch.equal(weights(resumed), end), step


def test_a_checkpoint_without_the_tokens(make_trainer, tmp_path):
    options = EVERY | {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    make_trainer(**options).train()
    with pytest.raises(CheckpointError, match="checkpoint-1 has no tokens .* save_only_model=False"):
        make_trainer(**options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_run_that_generated_once_resumes_to_the_same_masks(make_trainer, make_speaker, tmp_path):
    options = GENERATED | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    end = trained(make_trainer(make_speaker(), **options))
    shutil.rmtree(tmp_path / FOLDER)
    resumed = make_trainer(make_speaker(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(resumed), end)


# Options


@pytest.mark.parametrize(
    "options, words",
    [
        ({"forget_masking": "all"}, "forget_masking 'all' is unknown; choose one of random, content, generated"),
        ({"forget_masking": "generated", "loss_type": "dpo"}, "Take 'content' or 'random'"),
        ({"rollout_every": 2}, "which is not set. Leave it out"),
        (GENERATED | {"rollout_every": 0}, "a whole number of epochs from 1, got 0"),
        (GENERATED | {"rollout_every": 1, "precompute_anchor": True}, "does not go with precompute_anchor"),
        (
            GENERATED | {"rollout_every": 1, "dataloader_persistent_workers": True, "dataloader_num_workers": 1},
            "does not go with dataloader_persistent_workers",
        ),
    ],
)
def test_options_that_contradict_each_other(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        MDUConfig(str(tmp_path), **options)


def test_facts_say_how_rows_were_masked(make_trainer):
    for options, expected in (
        ({}, {}),
        (GENERATED, {"forget_masking": "generated", "mask_special_tokens": True}),
        ({"mask_special_tokens": False}, {"forget_masking": "random", "mask_special_tokens": False}),
    ):
        trainer = make_trainer(**options)
        facts = trainer.provenance.facts(trainer._run())
        names = ("forget_masking", "mask_special_tokens", "rollout_every")
        assert {name: facts.options[name] for name in names if name in facts.options} == expected


def test_a_row_to_forget_alone(make_trainer, sets):
    rows = Dataset.from_list([sets[0][0]])
    trainer = make_trainer(forget=rows, max_steps=1, **GENERATED)
    start = weights(trainer).clone()
    assert not torch.equal(start, trained(trainer)) and len(trainer._rollout.tokens) == 1
