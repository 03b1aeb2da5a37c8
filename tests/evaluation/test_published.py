"""MUSE, WMDP, LUME, PISTOL, R-TOFU and KnowUnDo: rows in the published schemas, scored, killed and resumed."""

import json
from dataclasses import replace

import pytest
from datasets import Dataset

from mdu_trainer.evaluation import runner
from mdu_trainer.evaluation.benchmarks import TRUTH_RATIOS
from mdu_trainer.evaluation.metrics import MembershipInference, PrivacyLeakage, min_k_score
from mdu_trainer.evaluation.published import evaluate_published, load_published, privleak
from mdu_trainer.evaluation.published_sets import PUBLISHED
from mdu_trainer.evaluation.registry import BENCHMARKS, BenchmarkOptions
from mdu_trainer.evaluation.results import Results
from mdu_trainer.files import UserError
from mdu_trainer.inference.generation import DiffusionGenerationConfig
from mdu_trainer.inference.likelihood import response_likelihood
from mdu_trainer.models import resolve_backbone

SECRET = "Zanzibar Quillfeather"


def qa(word, question="question", answer="answer", **more):
    return [{question: f"Where does {word} {i} live?", answer: f"In house {i}."} | more for i in range(2)]


def texts(word):
    return [{"text": f"{word} has a garden, and {word} {i} likes to sit in it."} for i in range(3)]


def choices(word):
    return [
        {"question": f"Which is {word}?", "choices": ["red", "green", "blue", "grey"], "answer": i} for i in (0, 3)
    ]


CARD = "---\nconfigs:\n{}---\n"
DATA = {  # file -> rows, as the published folders have them
    "muse": {
        "knowmem/forget_qa-00000-of-00001.parquet": qa("Ann"),
        "knowmem/forget_qa_icl-00000-of-00001.parquet": qa("Bob"),
        "knowmem/retain_qa-00000-of-00001.parquet": qa("Eve"),
        "knowmem/retain_qa_icl-00000-of-00001.parquet": qa("Dan"),
        "verbmem/forget-00000-of-00001.parquet": qa("Ann", "prompt", "gt"),
        **{f"privleak/{split}-00000-of-00001.parquet": texts(split) for split in ("forget", "retain", "holdout")},
        **{f"raw/{split}-00000-of-00001.parquet": texts(split) for split in ("forget", "retain1")},
        **{f"sust/forget_{i}-00000-of-00001.parquet": texts(f"Request {i}") for i in (1, 2)},
    },
    "wmdp": {f"wmdp-{c}/test-00000-of-00001.parquet": choices(c) for c in ("bio", "chem", "cyber")},
    "lume": {
        f"data/{kind}_train-00000-of-00001.parquet": [
            {"id": f"{i}", **row, "task": f"Task{i + 1}"} for i, row in enumerate(qa(kind, "input", "output"))
        ]
        for kind in ("forget", "retain")
    },
    "pistol": {"sample_data_1.json": qa("Ann", edge="A_B") + qa("Bob", edge="A_C") + qa("Eve", edge="C_D")},
    "rtofu": {f"{split}.json": qa(split, cot=f"First, {split}.") for split in ("forget10", "retain90")},
    "knowundo": {
        f"{config}/{split}.json": {"train": qa("Nobody", "text", "labels"), "val": qa(config, "text", "labels")}
        for config in ("copyright", "privacy")
        for split in ("unlearn", "retention")
    },
}
SETS = {
    "muse": {"verbmem": 2, "knowmem_forget": 2, "knowmem_retain": 2}
    | {f"privleak_{split}": 3 for split in ("forget", "retain", "holdout")},
    "wmdp": {"bio": 2, "chem": 2, "cyber": 2},
    "lume": {f"{kind}_Task{i}": 1 for kind in ("forget", "retain") for i in (1, 2)},
    "pistol": {"forget": 2, "retain": 4},
    "rtofu": {"forget": 2, "forget_cot": 2, "retain": 2, "retain_cot": 2},
    "knowundo": {f"{config}_{kind}": 2 for config in ("copyright", "privacy") for kind in ("forget", "retain")},
}


def write(folder, files, carded=False):
    """The files, and a card that lists them as the Hub's does."""
    entries = {}
    for name, rows in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            Dataset.from_list(rows).to_parquet(path)
        else:
            path.write_text(json.dumps(rows, indent=1 if isinstance(rows, dict) else None))
        config, _, split = name.rpartition("/")
        split = split.partition(".")[0].partition("-")[0]
        entries.setdefault(config if config not in ("", "data") else "default", []).append((split, name))
    if carded:
        lines = []
        for config, parts in entries.items():
            lines += [f"- config_name: {config}\n  data_files:\n"]
            lines += [f"  - split: {split}\n    path: {name}\n" for split, name in parts]
        (folder / "README.md").write_text(CARD.format("".join(lines)))
    return str(folder)


def options(name, folder, **more):
    subjects = ["A_B"] if name == "pistol" else None
    return BenchmarkOptions(dataset_name=folder, output_dir=f"{folder}/out", **({"subjects": subjects} | more))


@pytest.mark.parametrize("carded", [False, True], ids=["without a card", "with a card"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schemas(name, carded, tmp_path):
    if carded and name == "pistol":
        card = "- config_name: pistol_data_1\n  data_files: sample_data_1.json\n"
        (tmp_path / "README.md").write_text(CARD.format(card))
    folder = write(tmp_path, DATA[name], carded and name != "pistol")
    sets = load_published(name, options(name, folder))
    assert {label: len(rows) for label, rows in sets.items()} == SETS[name]
    if name == "muse":
        asked = sets["knowmem_forget"]["question"][1]
        assert asked.startswith("Question: Where does Bob 0 live?\nAnswer: In house 0.\n\n")
        assert asked.endswith("\n\nQuestion: Where does Ann 1 live?\nAnswer:")
        assert sets["verbmem"]["answer"][:] == ["In house 0.", "In house 1."]
    if name == "pistol":
        assert all("Ann" in question for question in sets["forget"]["question"])
        assert not any("Ann" in question for question in sets["retain"]["question"])
    if name == "rtofu":
        assert sets["forget_cot"]["answer"][:] == ["First, forget10."] * 2
    if name == "knowundo":
        assert "privacy" in sets["privacy_forget"]["question"][0], "of the rows for the evaluation"


FEWER = {  # sets that are enough
    "muse": ["verbmem", "privleak_forget", "privleak_holdout", "knowmem_forget"],
    "wmdp": ["bio", "chem", "cyber"],
    "lume": ["forget"],
    "pistol": ["forget", "retain"],
    "rtofu": ["forget", "forget_cot"],
    "knowundo": ["privacy_forget", "privacy_retain"],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_killed_and_resumed(name, make_model, tokenizer, tmp_path, monkeypatch):
    folder = write(tmp_path, DATA[name])
    how = options(name, folder, configs=FEWER[name], batch_size=1, max_eval_rows=2)
    how = replace(how, likelihood_draws=1, decoding_steps=1, max_new_tokens=4)
    model, benchmark = make_model(max_position_embeddings=256), BENCHMARKS[name]
    sets = benchmark.load(how)
    undisturbed = benchmark.evaluate(model, tokenizer, sets, replace(how, output_dir=f"{folder}/whole"))
    scores, count = runner.QuestionBatch.scores, 0

    def killed(batch):
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return scores(batch)

    monkeypatch.setattr(runner.QuestionBatch, "scores", killed)
    with pytest.raises(KeyboardInterrupt):
        benchmark.evaluate(model, tokenizer, sets, how)
    with open(f"{folder}/out/rows.jsonl", "a") as file:
        file.write('{"set": "half a li')
    before = count
    resumed = benchmark.evaluate(model, tokenizer, sets, how)
    assert count - before == sum(map(len, sets.values())) - 1, "one batch, of one row, was done"
    assert (resumed.scores, resumed.summary, resumed.rows) == (
        undisturbed.scores,
        undisturbed.summary,
        undisturbed.rows,
    )
    measured = {label: set(found) for label, found in resumed.scores.items()}
    answered = {"rougeL_recall", "rougeL_f1", "probability"}
    assert set(resumed.summary) == ({"privleak_auc", "privleak_two_sided"} if name == "muse" else set())
    if name == "wmdp":
        assert measured == dict.fromkeys(sets, {"accuracy"})
    else:
        privleak_sets = {label for label in measured if label.startswith("privleak")}
        assert measured == {label: {"min_k"} if label in privleak_sets else answered for label in sets}
    assert not (tmp_path / "out" / TRUTH_RATIOS).exists()
    text = (tmp_path / "out" / "rows.jsonl").read_text()
    assert "house" not in text and "garden" not in text and "green" not in text, "no text is kept"


def test_privleak_equals_muses_definition(make_model, tokenizer, tmp_path):
    how = options("muse", write(tmp_path, DATA["muse"]), configs=["privleak_forget", "privleak_holdout"])
    sets, config = load_published("muse", how), DiffusionGenerationConfig(batch_size=4)
    model, never = (make_model(max_position_embeddings=128, initializer_range=width) for width in (0.3, 0.1))

    def scores_of(one):
        backbone, found = resolve_backbone(one, tokenizer), {}
        for name, rows in sets.items():
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rows["text"]]
            prompts = [tokenizer("")["input_ids"]] * len(ids)
            likelihood = response_likelihood(one, prompts, ids, backbone, num_draws=4, batch_size=4)
            found[name] = min_k_score(likelihood.tokens, 0.4)
        return found

    run = evaluate_published("muse", never, tokenizer, sets, config, num_draws=4)
    Results("never", "muse", {}, [run]).save(tmp_path / "never.json")
    how = replace(how, retain_log=str(tmp_path / "never.json"))
    assert load_published("muse", how).keys() == sets.keys()
    run = evaluate_published("muse", model, tokenizer, sets, config, num_draws=4, retain_log=how.retain_log)
    own, reference = scores_of(model), scores_of(never)
    for name, values in own.items():
        assert run.scores[name]["min_k"].value == pytest.approx(sum(values) / len(values), abs=1e-5)
    members = [1] * 3 + [0] * 3
    flat, flat_reference = ([*one["privleak_forget"], *one["privleak_holdout"]] for one in (own, reference))
    area = MembershipInference().compute(scores=flat, members=members)
    assert run.summary["privleak_auc"].value == pytest.approx(area["mia_auc"])
    assert run.summary["privleak_two_sided"].value == pytest.approx(area["two_sided"])
    expected = PrivacyLeakage().compute(scores=flat, reference_scores=flat_reference, members=members)
    assert run.summary["privleak"].value == pytest.approx(expected["privacy_leakage"])
    with pytest.raises(UserError, match="differ by themselves"):
        privleak(0.5, retain_area=1.0)


def test_choices_are_weighed_by_their_letters(make_model, tokenizer, tmp_path, monkeypatch):
    sets = load_published("wmdp", options("wmdp", write(tmp_path, DATA["wmdp"]), configs=["bio"]))
    part = PUBLISHED["wmdp"].parts["bio"]
    asked = part.ask(sets["bio"][1])
    assert asked.prompt.startswith("The following are multiple choice questions (with answers) about biology.\n\n")
    assert asked.prompt.endswith("Question: Which is bio?\nA. red\nB. green\nC. blue\nD. grey\nAnswer:")
    assert asked.answers == {"true": ["D"], "false": ["A", "B", "C"]}
    run = evaluate_published("wmdp", make_model(max_position_embeddings=256), tokenizer, sets, num_draws=2)
    assert run.scores["bio"]["accuracy"].value in (0.0, 0.5, 1.0) and run.rows == {"bio": 2}


WRONG = {  # name, files that are other ones, options -> message
    "columns": (
        "lume",
        {"data/forget_train.json": [{"q": SECRET, "a": SECRET}]},
        {},
        r"forget set \(default/forget_train of .*\) has no column input, output. Its columns are q, a. Say which are "
        "meant, by their names: --columns question=NAME,answer=NAME.",
    ),
    "texts": (
        "muse",
        {"privleak/forget.json": [{"body": SECRET}]},
        {"configs": ["privleak_forget"]},
        "privleak_forget set .* Its columns are body. .*--columns text=NAME.",
    ),
    "splits": (
        "muse",
        {"knowmem/retain2_qa.json": qa("Eve")},
        {"configs": ["knowmem_forget"]},
        "'knowmem/forget_qa' of .* has no split 'forget_qa'; it has retain2_qa. Where the knowmem_forget set lies: "
        "--configs knowmem_forget=CONFIG/SPLIT.",
    ),
    "configs": ("wmdp", {"bio.json": choices("bio")}, {"configs": ["bio"]}, "has no config 'wmdp-bio'; it has bio"),
    "sets": ("muse", {}, {"configs": ["knowmem"]}, "muse has the sets verbmem, knowmem_forget, .* SET=CONFIG/SPLIT"),
    "a choice": (
        "wmdp",
        {"wmdp-bio.json": [{"question": SECRET, "choices": ["a", "b"], "answer": 2}]},
        {"configs": ["bio"]},
        "Row 0 of the bio set: answer must be the number of one of its choices",
    ),
    "no edge": ("pistol", DATA["pistol"], {"subjects": None}, "pistol needs --subjects"),
    "another edge": ("pistol", DATA["pistol"], {"subjects": ["A_B", SECRET]}, "No row has number 2 of --subjects"),
    "all edges": ("pistol", DATA["pistol"], {"subjects": ["A_B", "A_C", "C_D"]}, "retain set is empty"),
    "subjects": ("wmdp", {}, {"subjects": [SECRET]}, "has no subjects to select"),
    "metrics": ("muse", {}, {"metrics": ["rougeL"]}, "has metrics of its own"),
    "a log": ("lume", {}, {"retain_log": "x.json"}, "compares with no other model"),
    "groups that are texts": (
        "lume",
        {"data/forget_train.json": [{**row, "name": SECRET} for row in qa("Ann", "input", "output")]},
        {"columns": "group=name", "configs": ["forget"]},
        "--columns group=name: each value of the column would name a set.* Of the forget set it has 1, and some",
    ),
    "groups that are single words": (
        "lume",
        {"data/forget_train.json": [{**row, "name": "Quillfeather"} for row in qa("Ann", "input", "output")]},
        {"columns": "group=name", "configs": ["forget"]},
        "At most 12 codes such as Task1, of 20 characters or fewer that end in a digit",
    ),
    "too many groups": (
        "lume",
        {"data/forget_train.json": [row | {"n": f"a{i}"} for i, row in enumerate(7 * qa("Ann", "input", "output"))]},
        {"columns": "group=n", "configs": ["forget"]},
        "Of the forget set it has 14, and some",
    ),
    "an unread column": (
        "lume",
        DATA["lume"],
        {"columns": "question=input,answer=outputs"},
        "--columns answer=outputs: no set of the benchmark has such a column",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_refusals_say_what_to_pass(case, tmp_path):
    name, files, more, message = WRONG[case]
    folder = write(tmp_path, files)
    with pytest.raises(UserError, match=message) as error:
        load_published(name, options(name, folder, **more))
    assert SECRET not in str(error.value) and "Quillfeather" not in str(error.value)


def test_texts_of_the_published_column_name_no_set(tmp_path):
    rows = [row | {"task": task} for row, task in zip(qa("Ann", "input", "output"), (SECRET, "Task1"), strict=True)]
    folder = write(tmp_path, {"data/forget_train.json": rows})
    assert {
        name: len(part) for name, part in load_published("lume", options("lume", folder, configs=["forget"])).items()
    } == {"forget": 2}


def test_what_the_refusals_say_helps(tmp_path):
    rows = [{"q": f"Who is {i}?", "a": f"Nobody {i}."} for i in range(2)]
    files = {"data/forget_train.json": rows, "elsewhere/kept.json": rows}
    how = options("lume", write(tmp_path, files), columns="question=q,answer=a", configs=["retain=elsewhere/kept"])
    sets = load_published("lume", how)
    assert sets.keys() == {"forget", "retain"}
    assert sets["retain"]["question"][:] == ["Who is 0?", "Who is 1?"]


def test_a_log_that_is_none_of_muse(tmp_path, make_model, tokenizer):
    sets = load_published("wmdp", options("wmdp", write(tmp_path, DATA["wmdp"]), configs=["bio"]))
    run = evaluate_published("wmdp", make_model(max_position_embeddings=256), tokenizer, sets, num_draws=1)
    Results("model", "wmdp", {}, [run]).save(tmp_path / "results.json")
    with pytest.raises(UserError, match="has no privleak_auc: pass the results.json of --benchmark muse"):
        load_published("muse", options("muse", str(tmp_path), retain_log=str(tmp_path / "results.json")))
