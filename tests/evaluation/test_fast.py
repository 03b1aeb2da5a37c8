"""Fast decoding in evaluations: how far it is from exact decoding is measured and told, or it is refused."""

import json
from dataclasses import replace

import pytest

from mdu_trainer.evaluation import (
    benchmarks,  # noqa: F401  registers them
    fast,
)
from mdu_trainer.evaluation.metrics import RougeL
from mdu_trainer.evaluation.registry import BENCHMARKS, BenchmarkOptions, explained
from mdu_trainer.evaluation.results import Results
from mdu_trainer.evaluation.tofu import evaluate_tofu
from mdu_trainer.inference.generation import DiffusionGenerationConfig, generate_ids

# all tokens at once, for an untrained model is never sure of much
DECODING = DiffusionGenerationConfig(max_new_tokens=8, batch_size=4, confidence_threshold=0.0)


@pytest.fixture
def sets(authors):
    return {"forget": authors.select(range(6)), "retain": authors.select(range(10, 13))}


def test_agreement_with_exact_decoding_is_among_the_scores(
    model, tokenizer, backbone, sets, monkeypatch, tmp_path, caplog
):
    monkeypatch.setattr(fast, "SAMPLE", 3)
    how = {"metrics": ["degeneracy", "rougeL"], "backbone": backbone}
    result = evaluate_tofu(model, tokenizer, sets, DECODING, **how)
    rows = sets["forget"]
    chats = [[{"role": "user", "content": question}] for question in rows["question"]]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    quick = generate_ids(model, prompts, DECODING, backbone)
    exact = generate_ids(model, prompts, replace(DECODING, confidence_threshold=None), backbone)
    assert quick != exact
    scores = result.row_scores["forget"]
    rouge = [
        RougeL().compute(
            predictions=tokenizer.batch_decode(ids, skip_special_tokens=True),
            references=rows["answer"],
            use_aggregator=False,
        )["rougeL_recall"]
        for ids in (quick, exact)
    ]
    assert scores["rougeL_recall"] == pytest.approx(rouge[0])
    for row in range(6):
        found = [scores[name][row] for name in ("fast_token_agreement", "fast_rougeL_error")]
        if row % 2:  # not in the sample of 0, 2, 4
            assert found == [None, None]
        else:
            longest = max(len(quick[row]), len(exact[row]))
            same = sum(a == b for a, b in zip(quick[row], exact[row], strict=False))
            share = same / longest if longest else 1.0  # both are empty
            assert found == pytest.approx([share, abs(rouge[0][row] - rouge[1][row])])
    assert "hold no word" not in caplog.text
    results = Results("m", "d", {}, [result.run])
    assert "forget fast = exact" in results.table() and "retain fast = exact" in results.table()
    assert "fast_rougeL_error" in results.details()
    results.save(tmp_path / "results.json")
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    agreement = [part for part in scores["fast_token_agreement"] if part is not None]
    assert run["scores"]["forget"]["fast_token_agreement"]["value"] == pytest.approx(sum(agreement) / 3)
    assert set(explained(run["scores"]["forget"])) >= {"fast_token_agreement", "fast_rougeL_error"}


def test_only_where_answers_are_decoded_fast(model, tokenizer, backbone, sets):
    for decoding, metrics in ((replace(DECODING, confidence_threshold=None), ["rougeL"]), (DECODING, ["probability"])):
        scores = evaluate_tofu(model, tokenizer, sets, decoding, metrics=metrics, num_draws=2, backbone=backbone).run
        assert not any(name.startswith("fast") for part in scores.scores.values() for name in part)
    asked = {"metrics": ["fast_agreement"], "backbone": backbone}
    scores = evaluate_tofu(model, tokenizer, sets, DECODING, **asked).run.scores["forget"]
    assert set(scores) == {"fast_token_agreement", "fast_rougeL_error"}
    with pytest.raises(ValueError, match="fast_agreement is for decoding='fast'"):
        evaluate_tofu(model, tokenizer, sets, replace(DECODING, confidence_threshold=None), **asked)


def test_by_name(model, tokenizer, sets, backbone, tmp_path):
    options = BenchmarkOptions(
        decoding="fast", metrics=["rougeL"], max_new_tokens=4, output_dir=str(tmp_path), batch_size=4
    )
    run = BENCHMARKS["fictional"].evaluate(model, tokenizer, sets, options)
    assert "fast_token_agreement" in run.scores["retain"]
    for how in ({"remasking": "random"}, {"schedule": "dream"}):
        with pytest.raises(ValueError, match="decoding='fast' sets, reveals tokens by their probability"):
            evaluate_tofu(model, tokenizer, sets, DiffusionGenerationConfig(4, **how), decoding="fast")
    with pytest.raises(ValueError, match="decoding must be one of exact, fast"):
        evaluate_tofu(model, tokenizer, sets, DiffusionGenerationConfig(4), decoding="quick")
    exact = replace(options, decoding="exact")
    with pytest.raises(ValueError, match="decoding.confidence_threshold"):  # figures of the two are never mixed
        BENCHMARKS["fictional"].evaluate(model, tokenizer, sets, exact)
