"""Evaluation and logs: which loss on which rows, under which name."""

import copy
import math

import pytest
from formula import batch_of, expected_row, perturb
from transformers import TrainerCallback

from mdu_trainer.files import UserError


def test_evaluation_is_exact_and_does_not_depend_on_batch_size(make_trainer, sets):
    results = []
    for batch_size in (3, 3, 8):
        trainer = make_trainer(tau=0.5, eval_dataset={"f": sets[0]}, per_device_eval_batch_size=batch_size)
        perturb(trainer.model)
        first, second = trainer.evaluate(), trainer.evaluate()
        names = ["eval_f_forget_loss", "eval_f_retain_loss", "eval_f_kl", "eval_f_entropy", "eval_f_masked_fraction"]
        assert [first[n] for n in names] == [second[n] for n in names]
        results.append([first[n] for n in names])
    assert results[0] == results[1] and results[2] == pytest.approx(results[0], rel=1e-5)


def test_evaluation_takes_other_sets_and_leaves_training_as_it_was(make_trainer, sets):
    trainer = make_trainer()
    batch = batch_of(trainer)
    before = trainer.compute_loss(trainer.model, batch).item()
    metrics = trainer.evaluate(sets[1])
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_forget_loss"] + metrics["eval_retain_loss"])
    assert trainer.compute_loss(trainer.model, batch).item() == before


def test_best_model_by_an_eval_metric(make_trainer, sets):
    trainer = make_trainer(
        eval_dataset=sets[0],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="forget_loss",
        greater_is_better=False,
    )
    trainer.train()
    assert trainer.state.best_metric == pytest.approx(trainer.evaluate()["eval_forget_loss"])


def test_logs(make_trainer):
    trainer = make_trainer(tau=0.5, logging_steps=2, max_steps=4)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        assert log["loss"] == pytest.approx(log["forget_loss"] + log["retain_loss"], rel=1e-4)
        assert log["forget_loss"] == pytest.approx(log["kl"], rel=1e-5)
        assert 0 < log["entropy"] < math.log(512) and 0 < log["masked_fraction"] <= 1
    other = make_trainer(loss_type="npo", logging_steps=1, max_steps=1)
    other.train()
    log = other.state.log_history[0]
    assert log["kl"] == pytest.approx(math.log(512) - log["entropy"], rel=1e-5)


# Names of the losses of eval sets


def expected_eval(trainer, initial, name, part, loss_type):
    """The mean loss of a constructor's eval set, row by row from the formula."""
    rows = trainer.eval_dataset[name]
    batch = trainer.data_collator([rows[i] for i in range(len(rows))])
    found = [expected_row(trainer, initial, part, batch, i, loss_type)[0] for i in range(len(rows))]
    return (sum(found) / len(found)).item()


@pytest.mark.parametrize(
    "options", [{"tau": 0.5, "retain_weight": 0.3}, {"loss_type": "npo"}, {"loss_type": "dpo"}, {"retain_weight": 0.0}]
)
def test_each_eval_set_has_its_own_loss_under_its_name(make_trainer, make_model, sets, options):
    model = make_model().double()
    initial = copy.deepcopy(model)
    held_out = {"forget": sets[0].select(range(5)), "retain": sets[1].select(range(6))}
    trainer = make_trainer(model, eval_dataset=held_out, **options)
    perturb(trainer.model)
    metrics = trainer.evaluate()
    forget = expected_eval(trainer, initial, "forget", "forget", trainer.args.loss_type)
    retain = expected_eval(trainer, initial, "retain", "retain", "nelbo")
    assert metrics["eval_forget_loss"] == metrics["eval_forget_forget_loss"] == pytest.approx(forget, rel=1e-5)
    assert metrics["eval_retain_loss"] == metrics["eval_retain_retain_loss"] == pytest.approx(retain, rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(forget + trainer.args.retain_weight * retain, rel=1e-5)
    assert "eval_retain_forget_loss" not in metrics, "nobody wants the rows to keep forgotten"
    logged = {name: value for log in trainer.state.log_history for name, value in log.items()}
    assert [logged[n] for n in metrics if n.endswith("loss")] == [metrics[n] for n in metrics if n.endswith("loss")]
    other = trainer.evaluate(held_out, metric_key_prefix="test")
    assert other["test_loss"] == metrics["eval_loss"] and other["test_retain_loss"] == metrics["eval_retain_loss"]


def test_loss_of_any_other_set_is_the_whole(make_trainer, sets):
    trainer = make_trainer(eval_dataset={"dev": sets[0]}, tau=0.5, retain_weight=0.25)
    metrics = trainer.evaluate()
    whole = metrics["eval_dev_forget_loss"] + 0.25 * metrics["eval_dev_retain_loss"]
    assert metrics["eval_dev_loss"] == pytest.approx(whole, rel=1e-12) and "eval_loss" not in metrics
    assert trainer.evaluate("dev")["eval_loss"] == metrics["eval_dev_loss"]
    with pytest.raises(UserError, match="no eval set 'def'; there are: dev"):
        trainer.evaluate("def")
    alone = make_trainer(eval_dataset=sets[0], retain_weight=0.0).evaluate()
    assert alone["eval_loss"] == alone["eval_forget_loss"]


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
}


@pytest.mark.parametrize(
    "names, options, there",
    [
        (None, {}, "eval_forget_loss, eval_kl, eval_retain_loss, eval_entropy, eval_masked_fraction."),
        (["dev"], {"metric_for_best_model": "dev_loss"}, "eval_dev_forget_loss, eval_dev_kl, eval_dev_retain_loss"),
        (["dev"], {}, "'eval_loss' cannot choose a model: there is no such score"),
        (["forget", "retain"], {"metric_for_best_model": "forgot_loss"}, "eval_retain_loss, .*eval_loss"),
    ],
)
def test_a_name_that_tells_no_good_model_is_refused_before_training(make_trainer, sets, names, options, there):
    trainer = make_trainer(eval_dataset=names and dict(zip(names, sets, strict=False)) or sets[0], **BEST | options)
    with pytest.raises(UserError, match=there):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_figure_that_a_callback_does_not_give_is_named(make_trainer, sets):
    class Quiet(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            pass

    trainer = make_trainer(eval_dataset=sets[0], callbacks=[Quiet()], metric_for_best_model="my_loss", **BEST)
    with pytest.raises(UserError, match="no score 'my_loss'; an evaluation gave .*eval_forget_loss"):
        trainer.train()


def test_best_model_by_the_whole_loss_of_both_sets(make_trainer, sets):
    held_out = dict(zip(("forget", "retain"), sets, strict=True))
    trainer = make_trainer(eval_dataset=held_out, learning_rate=0.05, max_steps=4, **BEST)
    trainer.train()
    found = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(found) == 4 and trainer.state.best_metric == min(found)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(found))


def test_names_that_two_sets_would_share(make_trainer, sets):
    with pytest.raises(UserError, match="eval_forget_retain_loss would name a score of two eval sets"):
        make_trainer(eval_dataset={"forget": sets[0], "forget_retain": sets[0]})
    with pytest.raises(UserError, match="eval_strategy is 'epoch' but there is no eval set"):
        make_trainer(eval_strategy="epoch")


@pytest.mark.parametrize("workers", [0, 1])
def test_another_set_is_evaluated_and_no_row_left_out(make_trainer, sets, workers):
    options = {"dataloader_num_workers": workers, "dataloader_persistent_workers": bool(workers)}
    plain = make_trainer()
    trainer = make_trainer(eval_dataset=sets[0], dataloader_drop_last=True, **options)
    for rows in (sets[0], sets[1].select(range(11))):  # neither fills batches of eight
        expected, found = plain.evaluate(rows), trainer.evaluate(rows)
        assert [found[n] for n in expected if "loss" in n] == [expected[n] for n in expected if "loss" in n]


def test_predict_gives_the_figures_of_each_row(make_trainer, sets):
    trainer = make_trainer(tau=0.5, per_device_eval_batch_size=3)
    perturb(trainer.model)
    output = trainer.predict(sets[0])
    assert set(output.predictions) == {"forget_loss", "kl", "entropy", "masked_fraction", "retain_loss"}
    metrics = trainer.evaluate(sets[0])
    for name, values in output.predictions.items():
        assert values.shape == (8,) and values.mean() == pytest.approx(metrics[f"eval_{name}"], rel=1e-6)
        assert output.metrics[f"test_{name}"] == metrics[f"eval_{name}"]
    alone = trainer.predict(sets[0].select([0]))
    assert alone.metrics["test_entropy"] > 0
    with pytest.raises(UserError, match="predict takes one set"):
        trainer.predict({"a": sets[0]})
