"""Block-wise models: the loss of [x_t ; x_0] equals the formula, block by block; options work or are refused."""

import copy

import pytest
import torch
from formula import LORA, batch_of, perturb, trained, weights
from peft import LoraConfig
from torch.nn.functional import logsigmoid
from transformers import AutoConfig

from mdu_trainer import MDLMTrainer
from mdu_trainer.files import UserError
from mdu_trainer.masking import MaskSchedule, forward_process
from mdu_trainer.models import load_model, resolve_backbone
from mdu_trainer.trainer.anchors import predict_anchor

SIZE = 4


def by_block(model, noisy, clean, shift=False):
    """log p of each position of a row: each block is run alone, noisy behind the clean ones before it."""
    found = []
    for start in range(0, len(noisy), SIZE):
        ids = torch.cat([clean[:start], noisy[start : start + SIZE]])
        mask = [[[[k // SIZE <= q // SIZE for k in range(len(ids))] for q in range(len(ids))]]]
        places = torch.arange(len(ids))[None]
        with torch.no_grad():
            logits = model(input_ids=ids[None], attention_mask=torch.tensor(mask), position_ids=places).logits[0]
        found.append(logits[start:].double().log_softmax(-1))
    log_p = torch.cat(found)
    return torch.cat([log_p[:1], log_p[:-1]]) if shift else log_p


def expected(trainer, initial, batch, shift):
    """The loss of a batch of MDU or NPO with a retain set, a row at a time and without padding."""
    args, mask_id, model = trainer.args, trainer.backbone.mask_token_id, trainer.model
    rows = {"forget": [], "retain": []}
    for name, part in batch.items():
        for i in range(len(part["t"])):
            length = int(part["attention_mask"][i].sum())
            ids, response = part["input_ids"][i, :length], part["completion_mask"][i, :length].bool()
            t, noise = part["t"][i].double().item(), part["noise"][i, :length]
            masked = response & (noise < t)
            weight = 1 / t if masked.any() else 0.0
            if not masked.any():
                masked[torch.where(response, noise, torch.tensor(2.0)).argmin()] = True
            noisy, hidden = ids.clone(), ids.clone()
            noisy[masked] = mask_id
            hidden[~response] = mask_id
            p = by_block(model, noisy, ids, shift)[masked]
            bound = -weight * p.gather(1, ids[masked][:, None]).sum()
            if name == "retain":
                rows[name].append(bound / response.sum())
            elif args.loss_type == "npo":
                p_0 = by_block(initial, noisy, ids, shift)[masked]
                bound_0 = -weight * p_0.gather(1, ids[masked][:, None]).sum()
                rows[name].append(-2 / 0.2 * logsigmoid(-0.2 * (bound_0 - bound)))
            else:
                anchor = by_block(initial, torch.where(masked, mask_id, hidden), hidden, shift)[masked]
                q = (args.tau * anchor).log_softmax(-1)
                rows[name].append((p.exp() * (p - q)).sum() / masked.sum())
    return sum(sum(values) / len(values) for values in rows.values())


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("options", [{"tau": 0.0}, {"tau": 0.5}, {"loss_type": "npo"}], ids=str)
def test_loss_equals_the_formula_in_float64(make_trainer, make_model, options, shift):
    model = make_model(block_size=SIZE, logit_shift=shift).double()
    initial = copy.deepcopy(model)
    trainer = make_trainer(model, **options)
    perturb(trainer.model)
    trainer.model.eval()
    batch = batch_of(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(expected(trainer, initial, batch, shift).item(), rel=1e-6)


@pytest.mark.parametrize("options", [{"tau": 0.5}, {"tau": 1.0, "anchor_input": "hidden_prompt"}], ids=str)
def test_padding_and_batch_composition_change_nothing(make_trainer, make_model, options):
    trainer = make_trainer(make_model(block_size=SIZE).double(), per_device_train_batch_size=8, **options)
    perturb(trainer.model)
    trainer.model.eval()
    batch = batch_of(trainer)
    _, figures = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    for i in range(8):
        alone = {}
        for name, part in batch.items():
            length = int(part["attention_mask"][i].sum())
            alone[name] = {k: v[i : i + 1, :length] if v.ndim == 2 else v[i : i + 1] for k, v in part.items()}
        _, single = trainer.compute_loss(trainer.model, alone, return_outputs=True)
        for name, figure in figures.items():
            assert single[name].value.item() == pytest.approx(figure.value[i].item(), rel=1e-6), name


def test_a_hidden_prompt_says_nothing_in_either_half(make_trainer, make_model):
    """What the prompt was changes no anchor, masked, hidden or counterfactual; an unmasked one would."""
    for how, alike in (("masked_prompt", True), ("hidden_prompt", True), ("prompt", False)):
        trainer = make_trainer(make_model(block_size=SIZE), tau=1.0, anchor_source="current", retain_weight=0.0)
        trainer.args.anchor_input = how
        part = batch_of(trainer)["forget"]
        other = part | {"input_ids": torch.where(part["completion_mask"].bool(), part["input_ids"], 300)}
        losses = []
        for one in (part, other):
            noised = forward_process(one, trainer.backbone.mask_token_id)
            losses.append(predict_anchor(trainer, trainer.model, one, noised).hidden)
        assert torch.allclose(*losses, atol=1e-5) == alike, how


def test_each_token_is_masked_once_in_two_copies_with_a_time_for_each_block(make_trainer, make_model, sets):
    trainer = make_trainer(
        make_model(block_size=SIZE), sets[1], cls=MDLMTrainer, noise_per="block", per_device_train_batch_size=8
    )
    part = batch_of(trainer)["train"]
    noised = forward_process(part, trainer.backbone.mask_token_id)
    first, second = noised.masked.split(8)
    drawn = noised.weight > 0
    assert len(drawn) == 16 and (noised.weight[drawn] == 2).all()
    both = drawn[:8] & drawn[8:]
    assert both.sum() >= 6
    response = part["completion_mask"][:8].bool()
    assert ((first ^ second) == response)[both].all()

    # the loss is the mean cross-entropy of the answer's tokens
    trainer.model.eval()
    _, scores = trainer.compute_loss(trainer.model, {"train": part}, return_outputs=True)
    i = int(both.nonzero()[0])
    length = int(part["attention_mask"][i].sum())
    ids, nll = part["input_ids"][i, :length], 0.0
    for masked in (first[i, :length], second[i, :length]):
        noisy = torch.where(masked, trainer.backbone.mask_token_id, ids)
        nll -= by_block(trainer.model, noisy, ids)[masked].gather(1, ids[masked][:, None]).sum()
    value = scores["loss"].value
    assert (value[i] + value[8 + i]).item() / 2 == pytest.approx(nll.item() / response[i].sum().item(), rel=1e-4)


def test_times_of_blocks_are_uniform_and_decide_what_is_masked():
    schedule = MaskSchedule(0, "train", 400, t_min=0.3, t_max=0.8, block_size=8)
    visit, row = torch.zeros(400, dtype=torch.long), torch.arange(400)
    times = schedule.block_times(visit, row, 24)
    assert (times[:, :8] == times[:, :1]).all() and (times[:, 8] != times[:, 0]).any()
    assert times.min() >= 0.3 and times.max() <= 0.8
    assert times.mean().item() == pytest.approx(0.55, abs=0.02)
    t, noise, _ = schedule.draw(visit, row, 24)
    assert torch.equal(noise < t[:, None], schedule.noise(visit, row, 24) < times)
    assert torch.equal(1 - noise < t[:, None], schedule.noise(visit, row, 24) >= times)


def test_an_evaluation_and_masks_that_are_not_random_take_each_row_once(make_trainer, make_model, sets):
    options = {"noise_per": "block", "forget_masking": "content", "eval_dataset": {"retain": sets[1]}, "tau": 0.0}
    trainer = make_trainer(make_model(block_size=SIZE), **options)
    batch = batch_of(trainer)
    assert len(batch["forget"]["t"]) == 4 and len(batch["retain"]["t"]) == 8
    assert len(trainer.predict(sets[1]).predictions["retain_loss"]) == len(sets[1])


def test_end_tokens_fill_up_the_last_block(make_trainer, make_model, sets):
    trainer = make_trainer(make_model(block_size=32), sets[1], cls=MDLMTrainer, pad_with_end_tokens=True)
    part = batch_of(trainer)["train"]
    assert part["input_ids"].shape[1] % 32 == 0
    assert part["attention_mask"].all() and (part["input_ids"][:, -1] == trainer.backbone.end_token_ids[0]).all()


@pytest.mark.parametrize(
    "options",
    [{"precompute_anchor": True}, {"peft_config": LoraConfig(**LORA)}],
    ids=["precomputed", "LoRA"],
)
def test_precomputed_anchors_and_adapters_give_the_same_anchor(make_trainer, make_model, options):
    plain = make_trainer(make_model(block_size=SIZE), tau=0.5)
    other = make_trainer(make_model(block_size=SIZE), tau=0.5, **options)
    losses = []
    for trainer in (plain, other):
        trainer._prepare_training()
        trainer.model.eval()
        losses.append(trainer.compute_loss(trainer.model, batch_of(trainer)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_accumulation_changes_nothing(make_trainer, make_model):
    shares = [(4, 1), (2, 2)]
    ends = [
        trained(
            make_trainer(
                make_model(block_size=SIZE),
                tau=0.5,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=count,
                optim="sgd",
                max_steps=1,
            )
        )
        for size, count in shares
    ]
    assert torch.allclose(*ends, atol=1e-6)


@pytest.mark.parametrize("noise_per", ["row", "block"])
def test_resumed_run_ends_with_the_same_weights(make_trainer, make_model, tmp_path, noise_per):
    options = {"tau": 0.5, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "noise_per": noise_per}
    whole = make_trainer(make_model(block_size=SIZE), **options)
    whole.train()
    again = make_trainer(make_model(block_size=SIZE), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(weights(whole), weights(again))


def test_a_model_trained_in_full_says_so_and_is_run_so(make_trainer, make_model, tokenizer, tmp_path):
    model = make_model(block_size=SIZE)
    ids = torch.arange(10, 20)[None]
    before = model(input_ids=ids).logits
    trainer = make_trainer(model, tau=0.0, attention="full", max_steps=1)
    assert trainer.backbone.block_size is None
    assert not torch.allclose(model(input_ids=ids).logits, before, atol=1e-3), "tokens see those of later blocks now"
    trainer.train()
    trainer.save_model(str(tmp_path / "full"))
    assert AutoConfig.from_pretrained(tmp_path / "full").attention_form == "full"
    loaded = load_model(str(tmp_path / "full"))
    assert resolve_backbone(loaded, tokenizer).block_size is None
    again = make_trainer(loaded, tau=0.0, attention="block")
    assert again.backbone.block_size == SIZE


@pytest.mark.parametrize(
    ("block_size", "options", "message"),
    [
        (None, {"attention": "block"}, "attention='block' is for models that attend between blocks"),
        (None, {"noise_per": "block"}, "noise_per='block' is for models that attend between blocks"),
        (SIZE, {"attention": "full", "peft_config": LoraConfig(**LORA)}, "an adapter has none"),
        (SIZE, {"tau": 0.5, "precompute_anchor": True, "noise_per": "block"}, "each row comes twice"),
        (SIZE, {"attention": "causal"}, "attention must be one of block, full, got 'causal'"),
        (SIZE, {"noise_per": "token"}, "noise_per must be one of row, block, got 'token'"),
    ],
)
def test_refused(make_trainer, make_model, block_size, options, message):
    with pytest.raises(UserError, match=message):
        make_trainer(make_model(block_size=block_size), **options)
