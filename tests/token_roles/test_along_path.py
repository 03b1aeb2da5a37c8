"""TOFU's metrics along the denoising path: against plain loops in float64, and on models whose weakness is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import hmean
from stand_in import StandIn, always, never, shown

from mdu_trainer import DiffusionGenerationConfig
from mdu_trainer.data.rows import question_answer_rows, tokenize_rows
from mdu_trainer.data.texts import passages
from mdu_trainer.evaluation.metrics import RougeL
from mdu_trainer.evaluation.registry import METRICS, Metric
from mdu_trainer.evaluation.results import Estimate
from mdu_trainer.evaluation.tofu import evaluate_tofu
from mdu_trainer.inference.likelihood import masked_log_p
from mdu_trainer.masking import counter_uniform
from mdu_trainer.models import resolve_backbone
from mdu_trainer.report.path_plots import plot_along_path
from mdu_trainer.token_roles.along_path import score_along_path
from mdu_trainer.token_roles.fixing import fixed_log_p
from mdu_trainer.token_roles.path_results import FIXED, PathCurve, PathRun, PathScores

STEPS, LENGTH, SEED = 3, 7, 3
DECODING = DiffusionGenerationConfig(max_new_tokens=LENGTH, batch_size=32, seed=SEED)


@pytest.fixture(scope="module")
def tofu(authors):
    return {"forget": authors.select([0, 9, 18]), "retain": authors.select([40, 51])}


def encoded(rows, answers, tokenizer, backbone):
    pairs = Dataset.from_dict({"question": rows["question"], "answer": answers})
    found = tokenize_rows(question_answer_rows(pairs, conversational=True), tokenizer, backbone, name="test")
    return list(zip(found.prompt_ids, found.completion_ids, strict=True))


def answers_of(rows):
    """The answers of each kind and number, a column each."""
    wrong = [[texts[k] for texts in rows["perturbed_answer"]] for k in range(3)]
    return [rows["answer"][:], rows["paraphrased_answer"][:], *wrong]


@torch.no_grad()
def log_p(model, ids):
    return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)


def masked_by_hand(model, prompt, answer, number, row, step, mask, shift):
    """log p of what is masked once step / STEPS of the answer is revealed in its order, one sequence a pass."""
    noise = [float(counter_uniform(SEED, *map(torch.tensor, (number, row, i)))) for i in range(len(answer))]
    order = sorted(range(len(answer)), key=lambda i: noise[i])
    hidden = sorted(order[math.floor(len(answer) * step / STEPS) :])
    found = log_p(model, prompt + [mask if i in hidden else token for i, token in enumerate(answer)])
    return [found[len(prompt) + i - shift, answer[i]].item() for i in hidden]


def allowed(found, backbone):
    """Predictions without what decoding never says."""
    found = found.clone()
    found[:, [backbone.mask_token_id, backbone.pad_token_id]] = -torch.inf
    return found.log_softmax(dim=-1)


def fix_one(model, prompt, ids, backbone, answer=None, shift=0):
    """Put the token that the model is most confident of, or the answer's in its place; and log p of what was put."""
    found = log_p(model, prompt + ids)[len(prompt) - shift :]
    sure = allowed(found, backbone).max(dim=1)
    best = max((i for i, token in enumerate(ids) if token == backbone.mask_token_id), key=lambda i: sure.values[i])
    token = int(sure.indices[best]) if answer is None else answer[best]
    return [token if i == best else old for i, old in enumerate(ids)], (best, found[best, token].item())


def fixed_by_hand(model, prompt, answer, backbone, shift=0):
    """Decode token by token and put the answer's each time: log p of each."""
    ids, values = [backbone.mask_token_id] * len(answer), {}
    for _ in answer:
        ids, (place, value) = fix_one(model, prompt, ids, backbone, answer, shift)
        values[place] = value
    return ids, [values[i] for i in range(len(answer))]


@pytest.mark.parametrize("shift", [False, True])
def test_likelihoods_equal_plain_loops_in_float64(model, tokenizer, backbone, tofu, shift):
    """Probability and truth ratio at every step and at fixing, a pass a sequence, from all logits."""
    model, backbone = model.double(), replace(backbone, logit_shift=shift)
    how = {"num_steps": STEPS, "metrics": ["probability", "truth_ratio"], "backbone": backbone}
    run = score_along_path(model, tokenizer, tofu, DECODING, **how)
    assert run.rows == {"forget": 3, "retain": 2} and list(run.parts()) == ["forget", "retain", "model"]
    for name, rows in tofu.items():
        columns = [encoded(rows, answers, tokenizer, backbone) for answers in answers_of(rows)]
        for step in range(STEPS + 1):
            per_token = np.zeros((len(columns), len(rows)))
            for number, column in enumerate(columns):
                for row, (prompt, answer) in enumerate(column):
                    if step < STEPS:
                        where = (number, row, step, backbone.mask_token_id, shift)
                        values = masked_by_hand(model, prompt, answer, *where)
                    else:
                        values = fixed_by_hand(model, prompt, answer, backbone, shift)[1]
                    per_token[number, row] = sum(values) / len(values)
            ratio = np.exp(per_token[2:]).mean(axis=0) / np.exp(per_token[1])
            wanted = np.minimum(ratio, 1 / ratio) if name == "forget" else np.maximum(0, 1 - ratio)
            expected = {"probability": np.exp(per_token[0]).mean(), "truth_ratio": wanted.mean()}
            for score, value in expected.items():
                curve = run.scores[name][score]
                found = curve.fixed if step == STEPS else curve.steps[step]
                assert found.value == pytest.approx(value, rel=1e-6), (name, score, step)
                assert found.low <= found.value <= found.high
    utility = run.summary["model_utility"]
    kept = [run.scores["retain"][score] for score in ("probability", "truth_ratio")]
    assert utility.fixed.value == pytest.approx(hmean([curve.fixed.value for curve in kept]))
    assert utility.steps[1].value == pytest.approx(hmean([curve.steps[1].value for curve in kept]))


def test_step_0_is_a_fully_masked_pass(model, tokenizer, backbone, tofu):
    run = score_along_path(model, tokenizer, tofu, DECODING, num_steps=2, metrics=["probability"])
    for name, rows in tofu.items():
        values = []
        for prompt, answer in encoded(rows, rows["answer"], tokenizer, backbone):
            found = log_p(model, prompt + [backbone.mask_token_id] * len(answer))[len(prompt) :]
            values.append(math.exp(found.gather(1, torch.tensor(answer)[:, None]).mean()))
        assert run.scores[name]["probability"].steps[0].value == pytest.approx(np.mean(values), rel=1e-4)


@pytest.fixture
def heard(monkeypatch):
    """A metric from outside, "heard", and the texts that it reads: row of the forget set -> one for each moment."""
    texts: dict[int, list[str]] = {}

    def listen(batch):
        if batch.set.name == "forget":
            for row, text in zip(batch.rows, batch.texts, strict=True):
                texts.setdefault(row, []).append(text)
        return {"length": list(map(len, batch.texts)), "sure": [math.exp(value) for value in batch.first("answer")]}

    monkeypatch.setitem(METRICS, "heard", Metric(listen, ("answer",)))
    return texts


@pytest.mark.parametrize("ends", [False, True])
def test_texts_equal_plain_loops(model, tokenizer, backbone, tofu, heard, ends):
    """What decoding has fixed so far, the rest filled in at once; in the end what it decodes. Some answers end."""
    model, mask = model.double(), backbone.mask_token_id
    rows = encoded(tofu["forget"], tofu["forget"]["answer"], tokenizer, backbone)
    orders = []
    for prompt, _ in rows:
        ids, order = [mask] * LENGTH, [0] * LENGTH
        for step in range(LENGTH):
            before = ids
            ids, _ = fix_one(model, prompt, before, backbone)
            order[next(i for i in range(LENGTH) if ids[i] != before[i])] = step
        orders.append((ids, order))
    if ends:  # what a row says in the middle ends answers
        backbone = replace(backbone, end_token_ids=(*backbone.end_token_ids, orders[0][0][LENGTH // 2]))
    how = {"metrics": ["heard", "rougeL"], "num_steps": STEPS, "backbone": backbone}
    run = score_along_path(model, tokenizer, tofu, DECODING, **how)

    def said(ids):
        end = next((i for i, token in enumerate(ids) if token in backbone.end_token_ids), LENGTH)
        return ids[:end]

    lengths = set()
    for row, ((prompt, _), (ids, order)) in enumerate(zip(rows, orders, strict=True)):
        count = min(len(said(ids)) + 1, LENGTH)
        lengths.add(count)
        expected = []
        for step in range(STEPS):
            limit = sorted(order[:count])[math.floor(count * step / STEPS)]
            shown = [token if order[i] < limit else mask for i, token in enumerate(ids)]
            found = allowed(log_p(model, prompt + shown)[len(prompt) :], backbone).argmax(dim=1).tolist()
            filled = [found[i] if token == mask else token for i, token in enumerate(shown)]
            expected.append(tokenizer.decode(said(filled), skip_special_tokens=True))
        expected.append(tokenizer.decode(said(ids), skip_special_tokens=True))
        assert heard[row] == expected
    assert (min(lengths) < LENGTH) is ends
    values = [
        RougeL().compute(predictions=[heard[row][step] for row in heard], references=tofu["forget"]["answer"][:])
        for step in range(STEPS + 1)
    ]
    curve, length = run.scores["forget"]["rougeL_recall"], run.scores["forget"]["length"]
    assert [one.value for one in (*curve.steps, curve.fixed)] == pytest.approx([v["rougeL_recall"] for v in values])
    assert length.fixed.value == np.mean([len(texts[-1]) for texts in heard.values()])


@pytest.mark.parametrize("how", [{}, {"decoding": "fast"}, {"protocol": "release"}])
def test_the_last_texts_are_those_that_are_scored_without_steps(model, tokenizer, tofu, how):
    metrics = ["rougeL", "degeneracy"]
    run = score_along_path(model, tokenizer, tofu, DECODING, num_steps=2, metrics=metrics, **how)
    scored = evaluate_tofu(model, tokenizer, tofu, DECODING, num_draws=1, metrics=metrics, **how).run
    for name in tofu:
        assert len(run.scores[name]) == 3
        for score, curve in run.scores[name].items():
            assert curve.fixed == scored.scores[name][score]


def test_batch_size_changes_nothing(model, tokenizer, tofu):
    some = {"forget": tofu["forget"]}
    how = {"num_steps": 3, "metrics": ["rougeL", "probability", "degeneracy"]}
    one, many = (
        score_along_path(model, tokenizer, some, replace(DECODING, batch_size=size), **how) for size in (2, 64)
    )
    assert one.scores["forget"].keys() == many.scores["forget"].keys()
    for score, curve in one.scores["forget"].items():
        other = many.scores["forget"][score]
        for a, b in zip((*curve.steps, curve.fixed), (*other.steps, other.fixed), strict=True):
            assert a.value == pytest.approx(b.value, rel=1e-4, abs=1e-6), score


@pytest.fixture
def curves(make_model, tokenizer, tofu):
    """`curves(knows)`: ROUGE-L recall and probability of the forget rows along the path of a stand-in."""

    def run(knows):
        model = make_model()
        model.__class__ = StandIn
        model.prepare(tokenizer, tofu["forget"], knows)
        longest = max(len(answer) for _, answer in model.rows)
        config = DiffusionGenerationConfig(max_new_tokens=longest)
        rows = {"forget": tofu["forget"].select_columns(["question", "answer"])}
        how = {"num_steps": 5, "metrics": ["rougeL", "probability"]}
        scores = score_along_path(model, tokenizer, rows, config, **how).scores["forget"]
        return [[e.value for e in (*c.steps, c.fixed)] for c in (scores["rougeL_recall"], scores["probability"])]

    return run


def test_a_model_that_knows_and_one_that_does_not(curves):
    for values in curves(always):
        assert values == pytest.approx([1.0] * 6, abs=0.02)
    for values in curves(never):
        assert values == pytest.approx([0.0] * 6, abs=0.02)


def test_knowledge_that_comes_out_late(curves):
    """It knows once the answer's first two tokens are seen: no plain question finds it, and the path does."""
    text, probability = curves(shown(0, 1))
    assert text == [0.0] * 6, "its own answer never has these tokens"
    assert probability[0] < 0.01 and probability[-2] > 10 * probability[0]
    assert probability[-1] < 0.9, "its own order begins without them"


@pytest.mark.parametrize("shift", [False, True])
def test_block_wise_models_fix_block_after_block(make_model, tokenizer, shift):
    """Each block alone behind the finished ones, as it is decoded; a shifted model opens a block by the one before."""
    model = make_model(block_size=4, initializer_range=0.2, logit_shift=shift).eval()
    backbone = resolve_backbone(model, tokenizer)
    generator = torch.Generator().manual_seed(0)
    rows = [
        [torch.randint(10, 250, (length,), generator=generator).tolist() for length in lengths]
        for lengths in ((3, 6), (4, 5), (6, 2), (7, 8))
    ]
    found = fixed_log_p(model, *map(list, zip(*rows, strict=True)), backbone, batch_size=3)
    for (prompt, answer), values in zip(rows, found, strict=True):
        ids, expected = prompt + answer, []
        for at in range(len(prompt), len(ids)):
            start = max(at // 4 * 4, len(prompt))
            if at != start:
                continue
            block, first = ids[start : (at // 4 + 1) * 4], []
            if shift and start % 4 == 0:
                first, block = [log_p(model, ids[:start])[-1, block[0]].item()], block[1:]
            _, fixed = fixed_by_hand(model, ids[: start + len(first)], block, backbone, shift=shift)
            expected += first + fixed
        assert values == pytest.approx(expected, rel=1e-4)


def test_block_wise_models_are_weighed_beside_whole_blocks(make_model, tokenizer):
    model = make_model(block_size=4, initializer_range=0.2).eval()
    backbone = resolve_backbone(model, tokenizer)
    prompt, answer, hidden = [11, 12, 13], [21, 22, 23, 24, 25, 26], np.array([True, False, True, False, True, False])
    noisy = [backbone.mask_token_id if masked else token for token, masked in zip(answer, hidden, strict=True)]
    first = log_p(model, [*prompt, noisy[0]])[3, 21].item()
    second = log_p(model, [*prompt, 21, *noisy[1:5]])[[5, 7], [23, 25]]
    (found,) = masked_log_p(model, [(prompt, answer, hidden)], backbone)
    assert found == pytest.approx([first, *second.tolist()], rel=1e-4)


def test_a_killed_run_goes_on(model, tokenizer, tofu, tmp_path, monkeypatch):
    how = {"num_steps": 2, "metrics": ["probability"], "progress_path": tmp_path / "rows.jsonl"}
    whole = score_along_path(model, tokenizer, tofu, DECODING, **how)
    assert not set(tofu["forget"]["answer"]) & set((tmp_path / "rows.jsonl").read_text().split('"'))
    monkeypatch.setattr("mdu_trainer.token_roles.along_path.fixed_log_p", None)  # it asks the model nothing
    assert score_along_path(model, tokenizer, tofu, DECODING, **how) == whole
    with pytest.raises(ValueError, match="progress of another evaluation .*metrics differ"):
        score_along_path(model, tokenizer, tofu, DECODING, **(how | {"num_steps": 3}))


def test_passages_of_running_text(model, tokenizer, backbone, tofu):
    """They are no turns of a chat, and have no end tokens."""
    rows = passages(Dataset.from_dict({"text": [" ".join(tofu["forget"]["answer"])]}), words=12)
    run = score_along_path(model, tokenizer, {"forget": rows}, DECODING, num_steps=2, metrics=["probability"])
    values = []
    for question, answer in zip(rows["question"], rows["answer"], strict=True):
        prompt, both = tokenizer(question)["input_ids"], tokenizer(question + answer)["input_ids"]
        rest = both[len(prompt) :]
        assert both[: len(prompt)] == prompt
        found = log_p(model, prompt + [backbone.mask_token_id] * len(rest))[len(prompt) :]
        values.append(math.exp(found.gather(1, torch.tensor(rest)[:, None]).mean()))
    assert run.scores["forget"]["probability"].steps[0].value == pytest.approx(np.mean(values), rel=1e-4)


def test_what_is_refused(tokenizer, tofu, model, heard):
    for metric in ("exact_memorization", "extraction_strength", "fast_agreement"):
        with pytest.raises(ValueError, match=f"'{metric}' decodes by itself"):
            score_along_path(None, tokenizer, tofu, metrics=["rougeL", metric])
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        score_along_path(None, tokenizer, tofu, num_steps=0)
    with pytest.raises(ValueError, match="forget set is empty"):
        score_along_path(None, tokenizer, {"forget": tofu["forget"].select([])})
    METRICS["heard"] = Metric(METRICS["exact_memorization"].compute)
    with pytest.raises(ValueError, match="One of the metrics heard decodes by itself"):
        score_along_path(model, tokenizer, tofu, DECODING, num_steps=1, metrics=["heard"])


def record() -> PathScores:
    curve = PathCurve([Estimate(0.5, 0.4, 0.6), None], Estimate(0.25, 0.2, 0.3))
    runs = [
        PathRun(name, {"forget": 4, "retain": 4}, {"forget": {"probability": curve}, "retain": {"probability": curve}})
        for name in ("base", "npo")
    ]
    return PathScores("rows", 2, {"seed": 0}, runs)


def test_record_comes_back_as_it_was(tmp_path):
    scores = record()
    scores.save(tmp_path / "along_path.json")
    assert PathScores.load(tmp_path / "along_path.json") == scores
    assert list(scores.tables()) == ["base: forget", "base: retain", "npo: forget", "npo: retain"]
    table = scores.tables()["npo: retain"]
    interval = "0.500 [0.400, 0.600]"
    assert table == [["revealed", "probability"], ["0.00", interval], ["0.50", ""], [FIXED, "0.250 [0.200, 0.300]"]]
    alone = replace(
        scores,
        runs=[replace(scores.runs[0], summary={"model_utility": scores.runs[0].scores["forget"]["probability"]})],
    )
    assert list(alone.tables()) == ["forget", "retain", "model"] and "[" not in alone.details()
    for wrong, message in (({"num_steps": 3}, "another length than 3"), ({"runs": []}, "no models")):
        replace(scores, **wrong).save(tmp_path / "along_path.json")
        with pytest.raises(ValueError, match=message):
            PathScores.load(tmp_path / "along_path.json")


def test_picture(tmp_path):
    scores = record()
    plot_along_path(scores, tmp_path / "two.svg")
    text = (tmp_path / "two.svg").read_text()
    plot_along_path(scores, tmp_path / "two.svg")
    assert (tmp_path / "two.svg").read_text() == text, "the same figures give the same picture"
    plot_along_path(replace(scores, runs=scores.runs[:1]), tmp_path / "one.svg")
    assert "npo: forget" in text and "npo" not in (tmp_path / "one.svg").read_text()
    with pytest.raises(ValueError, match="no score of forget or retain"):
        plot_along_path(replace(scores, runs=[PathRun("a", {}, {})]), tmp_path / "none.svg")
