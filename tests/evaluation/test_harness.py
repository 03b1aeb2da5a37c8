"""lm-evaluation-harness gives the figures that direct scoring gives. Data and tasks are local."""

import json
import sys

import numpy as np
import pytest
import torch
import warm
from peft import LoraConfig, get_peft_model

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'mdu-trainer[eval]'")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from mdu_trainer import generate, response_likelihood  # noqa: E402
from mdu_trainer.evaluation.harness import MaskedDiffusionLM  # noqa: E402
from mdu_trainer.evaluation.metrics import greedy_completions  # noqa: E402

NUM_ROWS, NUM_DRAWS = 10, 8
START = 99
CHOICES = """\
task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ANSWERS = """\
task: local_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{said}}}}"
generation_kwargs: {{until: ["zzzz"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def rows(authors):
    """Questions with four choices each."""
    picked = authors.select(range(0, 90, 9))
    assert len(picked) == NUM_ROWS
    return [
        {"question": row["question"], "choices": [row["answer"], *row["perturbed_answer"]], "label": i % 4}
        for i, row in enumerate(picked)
    ]


@pytest.fixture
def model(make_model):
    return make_model(max_position_embeddings=128, initializer_range=0.2)


@pytest.fixture
def checkpoint(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def write_task(folder, template, rows):
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(template.format(data=folder / "rows.jsonl"))
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate_task(name, manager, checkpoint, **options):
    arguments = {"pretrained": checkpoint, "num_draws": NUM_DRAWS} | options.pop("model_args", {})
    options = {"batch_size": 4, "device": "cpu", "bootstrap_iters": 0} | options
    found = simple_evaluate(model="mdlm", model_args=arguments, tasks=[name], task_manager=manager, **options)
    return found["results"][name]


def direct_accuracy(model, tokenizer, backbone, rows, render=None):
    """Accuracy by likelihood, and by likelihood a byte, a choice at a time."""
    hits = []
    for row in rows:
        scores = []
        for choice in row["choices"]:
            if render is None:
                prompt, whole = row["question"], f"{row['question']} {choice}"
            else:
                prompt = render(row["question"])
                whole = prompt + choice
            ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
            context = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            assert ids[: len(context)] == context
            estimate = response_likelihood(
                model, [context], [ids[len(context) :]], backbone, num_draws=NUM_DRAWS, batch_size=1
            )
            scores.append(estimate.log_likelihood[0])
        a_byte = [score / len(choice.encode()) for score, choice in zip(scores, row["choices"], strict=True)]
        hits.append([np.argmax(scores) == row["label"], np.argmax(a_byte) == row["label"]])
    return np.mean(hits, axis=0)


def test_accuracy_of_choices_is_that_of_direct_scoring(model, tokenizer, backbone, rows, checkpoint, tmp_path):
    expected = direct_accuracy(model, tokenizer, backbone, rows)
    manager = write_task(tmp_path / "choices", CHOICES, rows)
    for batch_size in (1, 16):
        found = evaluate_task("local_choices", manager, checkpoint, batch_size=batch_size)
        assert [found["acc,none"], found["acc_norm,none"]] == pytest.approx(expected.tolist())
    best = [row | {"label": 0} for row in rows]
    again = evaluate_task("local_choices", write_task(tmp_path / "best", CHOICES, best), checkpoint)
    assert again["acc,none"] == pytest.approx(direct_accuracy(model, tokenizer, backbone, best)[0])


def test_chat_template(model, tokenizer, backbone, rows, checkpoint, tmp_path):
    def render(question):
        history = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)

    expected = direct_accuracy(model, tokenizer, backbone, rows, render)
    manager = write_task(tmp_path / "chat", CHOICES, rows)
    found = evaluate_task("local_choices", manager, checkpoint, apply_chat_template=True)
    assert [found["acc,none"], found["acc_norm,none"]] == pytest.approx(expected.tolist())


def test_generation_is_that_of_generate(model, tokenizer, backbone, rows, checkpoint, tmp_path):
    questions = [row["question"] for row in rows]
    texts = generate(model, tokenizer, questions, backbone=backbone, max_new_tokens=6, block_length=3)
    said = [
        {"question": question, "said": text if i % 2 else f"not {text}"}
        for i, (question, text) in enumerate(zip(questions, texts, strict=True))
    ]
    manager = write_task(tmp_path / "answers", ANSWERS, said)
    found = evaluate_task("local_answers", manager, checkpoint, model_args={"block_length": 3})
    assert found["exact_match,none"] == 0.5


def test_adapters(model, backbone, checkpoint, tmp_path):
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    plain = MaskedDiffusionLM(checkpoint, device="cpu", num_draws=NUM_DRAWS)
    lm = MaskedDiffusionLM(checkpoint, peft=str(tmp_path / "adapter"), device="cpu", num_draws=NUM_DRAWS)
    requests = [("Who", " wrote it at last"), ("Where", " was it written")]
    found = lm.loglikelihood(instances(requests), disable_tqdm=True)
    ids = [lm._encode_pair(*request) for request in requests]
    expected = response_likelihood(adapted, *zip(*ids, strict=True), backbone, num_draws=NUM_DRAWS)
    assert [score for score, _ in found] == pytest.approx(expected.log_likelihood.tolist(), rel=1e-5)
    assert [score for score, _ in plain.loglikelihood(instances(requests), disable_tqdm=True)] != pytest.approx(
        expected.log_likelihood.tolist(), rel=1e-3
    )


def instances(requests, kind="loglikelihood"):
    return [Instance(request_type=kind, doc={}, arguments=request, idx=0) for request in requests]


@pytest.fixture
def lm(checkpoint):
    return MaskedDiffusionLM(checkpoint, device="cpu", num_draws=NUM_DRAWS, batch_size=2, max_new_tokens=5)


def test_greedy_continuations_are_recognised(lm, model, tokenizer, backbone):
    context = tokenizer("Who wrote it?")["input_ids"]
    (said,), _ = greedy_completions(model, [context], [[60] * 5], backbone)
    other = [*said[:-1], said[-1] + 1]
    requests = [(("", ""), context, said), (("", ""), context, other)]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(requests, disable_tqdm=True)] == [True, False]
    lm._check_greedy = False
    assert [greedy for _, greedy in lm._loglikelihood_tokens(requests, disable_tqdm=True)] == [False, False]


def test_generation_settings(lm, monkeypatch):
    config, stops = lm._settings({"until": ["\n", "Q:"], "max_gen_toks": 3, "do_sample": False, "temperature": 0.7})
    assert (config.max_new_tokens, config.temperature, stops) == (3, 0.0, ["\n", "Q:"])
    config, stops = lm._settings({"until": "\n", "do_sample": True, "temperature": 0.7, "top_p": 0.9})
    assert (config.max_new_tokens, config.temperature, config.top_p, stops) == (5, 0.7, 0.9, ["\n"])
    texts = lm.generate_until(instances([("Who", {}), ("Where", {"max_gen_toks": 2})], "generate_until"), True)
    stop = texts[0].strip()[-1]
    (cut,) = lm.generate_until(instances([("Who", {"until": [stop]})], "generate_until"), True)
    assert cut == texts[0][: texts[0].index(stop)]


def test_repetitions_are_drawn_anew_and_alike_in_any_order(lm):
    settings = {"do_sample": True, "temperature": 1.0}
    requests = [("Who", settings), ("Where", settings), ("Who", settings)]
    first, second, third = lm.generate_until(instances(requests, "generate_until"), True)
    assert first != third
    assert lm.generate_until(instances(requests[1:], "generate_until"), True) == [second, first]


def test_long_contexts_lose_their_beginning(lm, tokenizer, caplog, monkeypatch):
    from transformers.utils import logging

    monkeypatch.setattr(logging._get_library_root_logger(), "propagate", True)
    short = "Who wrote it? " * 2
    long = "zanzibar " * 200 + short
    ids = lm.tok_encode(long)
    limit = lm.backbone.context_length
    found = lm._loglikelihood_tokens([(("", ""), ids, [60, 61])], disable_tqdm=True)
    assert found == lm._loglikelihood_tokens([(("", ""), ids[-(limit - 2) :], [60, 61])], disable_tqdm=True)
    assert "1 of 1 requests are longer" in caplog.text and "zanzibar" not in caplog.text
    with pytest.raises(ValueError, match=f"Request 0 needs {limit} tokens"):
        lm._loglikelihood_tokens([(("", ""), [20], [60] * limit)], disable_tqdm=True)


def test_start_tokens_are_added_once(lm, tokenizer):
    assert lm.tok_encode("Who") == tokenizer("Who")["input_ids"]
    chat = lm.apply_chat_template([{"role": "user", "content": "Who"}])
    assert lm.tok_encode(chat)[0] in tokenizer.all_special_ids

    class WithStart:
        all_special_ids = [START]

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [START] * add_special_tokens + [5] * len(text)}

    lm.tokenizer = WithStart()
    assert lm.tok_encode("abc") == [START, 5, 5, 5] and lm.tok_encode("abc", add_special_tokens=False) == [5, 5, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_beams": 4}, "Unknown model_args num_beams"), ({"batch_size": "auto"}, "batch_size must be a number")],
)
def test_bad_arguments_are_refused_before_the_model_is_loaded(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskedDiffusionLM("no/such/model", **arguments)


def test_rolling_likelihood_is_refused_with_the_reason(lm):
    with pytest.raises(NotImplementedError, match="no perplexity of running text"):
        lm.loglikelihood_rolling([])


SCRIPT = """\
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
import mdu_trainer.evaluation.harness
checkpoint, folder, output = sys.argv[1:]
found = simple_evaluate(
    model="mdlm", model_args={"pretrained": checkpoint, "num_draws": 8}, tasks=["local_choices"], batch_size=2,
    task_manager=TaskManager(include_path=folder, include_defaults=False), bootstrap_iters=0,
)
if found is not None:
    with open(output, "w") as file:
        json.dump({name: found["results"]["local_choices"][name] for name in ("acc,none", "acc_norm,none")}, file)
"""


def test_two_processes_give_the_figures_of_one(model, tokenizer, backbone, rows, checkpoint, tmp_path):
    write_task(tmp_path / "choices", CHOICES, rows[:7])  # an odd number: the shares differ
    script, output = tmp_path / "script.py", tmp_path / "found.json"
    script.write_text(SCRIPT)
    done = warm.run_together([sys.executable, script, checkpoint, tmp_path / "choices", output], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(output.read_text())
    expected = direct_accuracy(model, tokenizer, backbone, rows[:7])
    assert list(found.values()) == pytest.approx(expected.tolist())


def test_command_line(rows, checkpoint, tmp_path):
    write_task(tmp_path / "choices", CHOICES, rows[:2])
    arguments = ["--model", "mdlm", "--model_args", f"pretrained={checkpoint},num_draws=2", "--tasks", "local_choices"]
    arguments += [
        "--include_path",
        str(tmp_path / "choices"),
        "--output_path",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-m", "mdu_trainer.evaluation", *arguments]
    done = warm.run(command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "local_choices" in done.stdout and "acc_norm" in done.stdout


def test_fast_decoding_says_how_far_it_is_from_exact(lm, checkpoint):
    requests = [("Who", {"max_gen_toks": 6}), ("Where", {"max_gen_toks": 6})]
    exact = lm.generate_until(instances(requests, "generate_until"), True)
    assert lm.get_model_info() == {}
    fast = MaskedDiffusionLM(checkpoint, device="cpu", batch_size=4, decoding="fast", confidence_threshold=0.0)
    found = fast.generate_until(instances(requests, "generate_until"), True)
    assert found != exact
    told = fast.get_model_info()["fast_decoding"]
    assert told["requests"] == 2 and 0 <= told["fast_token_agreement"] < 1
    with pytest.raises(ValueError, match="does not go with remasking='random'"):
        MaskedDiffusionLM(checkpoint, device="cpu", decoding="fast", remasking="random")
