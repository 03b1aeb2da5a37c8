"""Several retain rows with each forget row (`retain_batch_size`)."""

import copy
import math

import pytest
import torch
from formula import LORA, batch_of, trained, weights
from peft import LoraConfig
from transformers import Trainer

from mdu_trainer.masking import forward_process

STEP = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def plain_loss(model, batches, mask_token_id, vocab_size, retain_weight):
    """L of an update at tau = 0, a row at a time."""
    terms = {"forget": [], "retain": []}
    for batch in batches:
        for name, part in batch.items():
            noised = forward_process(part, mask_token_id)
            for i in range(len(part["t"])) if name in terms else ():
                length = int(part["attention_mask"][i].sum())
                masked = noised.masked[i, :length]
                log_p = model(input_ids=noised.input_ids[i : i + 1, :length]).logits[0, masked].log_softmax(-1)
                if name == "forget":
                    terms[name].append((log_p.exp() * log_p).sum(-1).mean() + math.log(vocab_size))
                else:
                    nll = -log_p.gather(1, part["input_ids"][i, :length][masked][:, None]).sum()
                    terms[name].append(nll * noised.weight[i] / part["completion_mask"][i].sum())
    means = {name: sum(values) / len(values) for name, values in terms.items()}
    assert len(terms["retain"]) == 3 * len(terms["forget"])
    return means["forget"] + retain_weight * means["retain"], means


def test_an_update_equals_a_plain_computation(make_trainer, make_model):
    model = make_model().double()
    plain = copy.deepcopy(model).eval()
    trainer = make_trainer(
        model,
        retain_batch_size=12,
        gradient_accumulation_steps=2,
        max_steps=1,
        retain_weight=0.7,
        logging_steps=1,
        **STEP,
    )
    batches = [batch for _, batch in zip(range(2), trainer.get_train_dataloader(), strict=False)]
    loss, means = plain_loss(plain, batches, trainer.backbone.mask_token_id, trainer.backbone.vocab_size, 0.7)
    loss.backward()
    trainer.train()
    for (name, p), q in zip(plain.named_parameters(), trainer.model.parameters(), strict=True):
        assert torch.allclose(q, p - 0.1 * p.grad, rtol=1e-7, atol=1e-9), name
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert logged["retain_loss"] == pytest.approx(means["retain"].item(), rel=1e-5)
    assert logged["forget_loss"] == pytest.approx(means["forget"].item(), rel=1e-5)


@pytest.mark.parametrize(
    ("retain_rows", "count"),
    [(20, 2), (13, 2), (3, 4)],  # they last longer than 8 forget rows, less long, and not for one counter
)
def test_accumulation_does_not_change_the_update(make_trainer, make_model, sets, retain_rows, count):
    ends = []
    for batch_size, steps in ((8, 1), (2, 4), (1, 8)):
        trainer = make_trainer(
            make_model().double(),
            retain=sets[1].select(range(retain_rows)),
            per_device_train_batch_size=batch_size,
            retain_batch_size=count * batch_size,
            gradient_accumulation_steps=steps,
            max_steps=4,
            **STEP,
        )
        assert len(trainer.train_dataset) == max(8, math.ceil(retain_rows / count))
        ends.append(trained(trainer))
    start = weights(make_trainer(make_model().double()))
    assert (ends[0] - start).norm() > 1e-3
    for other in ends[1:]:
        assert (ends[0] - other).norm() / (ends[0] - start).norm() < 1e-6


def test_as_many_as_forget_rows_is_the_default_to_the_last_bit(make_trainer):
    plain, same, more = (trained(make_trainer(tau=0.5, retain_batch_size=rows)) for rows in (None, 4, 8))
    assert torch.equal(plain, same) and not torch.equal(plain, more)


@pytest.mark.parametrize("options", [{"peft_config": LoraConfig(**LORA)}, {"precompute_anchor": True}])
def test_resumed_run_ends_with_the_same_weights(make_trainer, options):
    shared = {"tau": 0.5, "max_steps": 8, "save_strategy": "steps", "save_steps": 3, "retain_batch_size": 12}
    whole, resumed = trained(make_trainer(**shared, **options)), make_trainer(**shared, **options)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-3")
    assert torch.equal(whole, weights(resumed))


def test_precomputed_anchors_end_with_the_weights_of_a_copy(make_trainer):
    ends = [trained(make_trainer(tau=0.5, retain_batch_size=8, precompute_anchor=flag)) for flag in (False, True)]
    assert torch.equal(*ends)


def test_batches_of_like_length(make_trainer, sets):
    trainer = make_trainer(
        train_sampling_strategy="group_by_length", per_device_train_batch_size=2, retain_batch_size=10
    )
    rows = trainer.train_dataset
    lengths = sorted(rows.parts["retain"].lengths)
    found = [
        sorted(rows.parts["retain"].lengths[row["row"]] for i in pair for row in rows[i]["retain"])
        for pair in ((0, 1), (2, 3))
    ]
    assert sorted(found) == [lengths[:10], lengths[10:]]
    trainer.train()


def test_cost_counts_all_rows_and_an_evaluation_has_no_more(make_trainer, sets):
    plain, more = (make_trainer(eval_dataset=sets[0], retain_batch_size=rows) for rows in (None, 8))
    assert more.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    batch = batch_of(more)
    assert len(batch["retain"]["t"]) == 8 == 2 * len(batch["forget"]["t"])
    assert more.floating_point_ops(batch) == sum(Trainer.floating_point_ops(more, part) for part in batch.values())
