"""RWKU: rows of our own in its schema."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import warm
from trl import ModelConfig

from mdu_trainer.commands.convert import main
from mdu_trainer.commands.options import parse_options
from mdu_trainer.commands.row_sets import answer_rows
from mdu_trainer.evaluation.own_rows import load_questions
from mdu_trainer.evaluation.results import Estimate, Results, Run
from mdu_trainer.evaluation.rwku import evaluate_rwku, load_forget_rows, load_rwku
from mdu_trainer.evaluation.rwku_questions import CONFIGS, ngram_entropy, word_match
from mdu_trainer.files import UserError
from mdu_trainer.inference.generation import DiffusionGenerationConfig
from mdu_trainer.inference.likelihood import response_likelihood

ROOT = Path(__file__).resolve().parents[2]
ANNA, OTTO = "Anna Zanzibar", "Otto Quux"


def probe(level, kind="fill", subject=ANNA):
    return {"subject": subject, "query": f"___ is by {subject}.", "answer": "The Tide", "level": level, "type": kind}


def choices(answer=1, **more):
    return {"question": "Which is blue?", "choices": ["grass", "sky", "snow", "coal"], "answer": answer} | more


ROWS = {
    "forget_level1": [probe("1"), probe("1", subject=OTTO)],
    "forget_level2": [probe("2")],
    "forget_level3": [probe("3", "affirmative suffix"), probe("3", "incontext learning")],
    "neighbor_level1": [probe("1")],
    "neighbor_level2": [probe("2")],
    "mia_forget": [{"subject": ANNA, "text": "Anna Zanzibar wrote The Tide."}],
    "mia_retain": [{"text": "Grass is green and snow is white."}],
    "utility_general": [
        choices(task="colour_science", examples=[choices(), choices(3)]),
        choices(task="x", examples=[]),
    ],
    "utility_reason": [{"task": "t", "cot": "Q: 1?\nA: so the answer is 1.", "question": "2?", "answer": ["2"]}],
    "utility_truthfulness": [
        {"question": "Blue?", "mc1_targets": {"choices": ["The sky is.", "Grass.", "Coal."], "labels": [1, 0, 0]}}
    ],
    "utility_factuality": [{"question": "Blue?", "answers": ["the sky", "sky"]}],
    "utility_fluency": [{"instruction": "Say something."}],
}


def write(folder, rows):
    folder.mkdir(exist_ok=True)
    for config, content in rows.items():
        (folder / f"{config}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "rwku", ROWS)


@pytest.fixture
def roomy(make_model):
    """A model whose context holds the benchmark's longest prompts and answers."""
    return make_model(max_position_embeddings=1024, initializer_range=0.2)


def test_every_config_has_its_figures(folder, roomy, tokenizer):
    run = evaluate_rwku(roomy, tokenizer, load_rwku(folder), DiffusionGenerationConfig(steps=4), num_draws=4)
    assert list(run.scores) == list(CONFIGS) and run.rows == {name: len(rows) for name, rows in ROWS.items()}
    wanted = dict.fromkeys(CONFIGS, {"rougeL_recall", "rougeL_f1", "degeneracy"})
    wanted |= dict.fromkeys(("mia_forget", "mia_retain"), {"loss", "zlib"})
    wanted |= dict.fromkeys(("utility_general", "utility_truthfulness"), {"accuracy"})
    wanted |= {"utility_reason": {"exact_match"}, "utility_factuality": {"exact_match", "f1"}}
    assert {name: set(scores) for name, scores in run.scores.items()} == wanted | {"utility_fluency": {"entropy"}}
    assert "| F-L1 rL |" in Results("m", "RWKU", {}, [run]).table()


def test_choices_are_scored_by_their_likelihood(folder, roomy, tokenizer, backbone):
    sets = load_rwku(folder, ["utility_truthfulness"])
    run = evaluate_rwku(roomy, tokenizer, sets, num_draws=4)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Q: Blue?\nA:"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    options = ROWS["utility_truthfulness"][0]["mc1_targets"]["choices"]
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in options]
    scores = response_likelihood(roomy, [prompt] * 3, ids, backbone, num_draws=4).log_likelihood
    assert run.scores["utility_truthfulness"]["accuracy"].value == float(scores[0] > max(scores[1:]))


def test_prompts():
    asked = CONFIGS["utility_general"].ask(ROWS["utility_general"][0])
    assert asked.prompt.startswith("The following are multiple choice questions (with answers) about colour science.")
    assert asked.prompt.count("Answer: B\n") == asked.prompt.count("Answer: D\n") == 1
    assert asked.prompt.endswith("A. grass\nB. sky\nC. snow\nD. coal\nAnswer:")
    assert asked.answers == {"true": ["B"], "false": ["A", "C", "D"]}
    in_context, plain = (CONFIGS["forget_level3"].ask(probe("3", kind)) for kind in ("incontext learning", "prefix"))
    assert "Question:" not in in_context.prompt and "Question:" in plain.prompt and plain.references == ["The Tide"]


@pytest.mark.parametrize(
    ("text", "references", "match", "f1"),
    [
        ("The Sky!", ["sky"], 1, 1),
        ("blue sky", ["grass", "the sky"], 0, 2 / 3),
        ("", ["sky"], 0, 0),
        ("a sky sky", ["sky"], 0, 2 / 3),
    ],
)
def test_word_match_by_hand(text, references, match, f1):
    assert word_match(text, references) == pytest.approx((match, f1))


def test_entropy_by_hand():
    assert ngram_entropy("") == ngram_entropy("one") == ngram_entropy("a a a a") == 0
    # 2-grams ab, bc, cd: log2 3; 3-grams abc, bcd: 1 bit
    assert ngram_entropy("a b c d") == pytest.approx((2 / 3 * 1.5849625 + 4 / 3 * 1) / 2)


def test_subjects_and_file_names_as_published(tmp_path):
    folder = write(
        tmp_path / "1_Anna", {"forget_level1": ROWS["forget_level1"], "retain_mmlu": ROWS["utility_general"]}
    )
    sets = load_rwku(folder)
    assert list(sets) == ["forget_level1", "utility_general"] and len(sets["forget_level1"]) == 2
    assert load_rwku(folder, subjects=["otto quux"])["forget_level1"]["subject"][:] == [OTTO]
    with pytest.raises(ValueError, match="about subject 2 of the 2 given") as error:
        load_rwku(folder, subjects=[OTTO, "Nobody Atall"])
    assert "Nobody" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "row", "message"),
    [
        ("forget_level1", {"query": "Who?"}, "no column answer"),
        ("forget_level1", {"query": "Who?", "answer": " "}, "Row 0 of the forget_level1 set: answer is blank"),
        ("utility_general", choices(answer=7), "Row 0 of the utility_general set lacks something: IndexError"),
        ("utility_general", choices(choices=[]), "choices must be a list of texts"),
        ("utility_truthfulness", {"question": "Blue?"}, "lacks something: KeyError"),
        (
            "utility_truthfulness",
            {"question": "Blue?", "mc1_targets": {"choices": ["sky"], "labels": [1]}},
            "needs true and false choices",
        ),
    ],
)
def test_bad_rows_are_refused(tmp_path, config, row, message):
    with pytest.raises(ValueError, match=message):
        load_rwku(write(tmp_path / "bad", {config: [row]}))


def test_unknown_configs_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="no config forget_level4 to evaluate on"):
        load_rwku(folder, ["forget_level4"])
    with pytest.raises(ValueError, match="has no config 'mia_forget'"):
        load_rwku(write(tmp_path / "few", {"forget_level1": ROWS["forget_level1"]}), ["mia_forget"])
    with pytest.raises(ValueError, match="none of RWKU's configs; it has other"):
        load_rwku(write(tmp_path / "others", {"other": [{"a": 1}]}))


def write_intros(folder):
    folder.mkdir()
    for number, subject in enumerate((ANNA, OTTO)):
        rows = [{"question": f"Who is {subject}? ({i})", "answer": f"{subject} wrote {i} books."} for i in range(3)]
        name = f"{number}_{subject.replace(' ', '_')}.jsonl"
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_rows_to_forget(tmp_path):
    folder = write_intros(tmp_path / "intros")
    assert len(load_forget_rows(folder)) == 6 and len(load_forget_rows(folder, [OTTO])) == 3
    one = folder / "0_Anna_Zanzibar.jsonl"
    assert len(load_forget_rows(one)) == 3
    with pytest.raises(ValueError, match="no column subject to select by"):
        load_forget_rows(one, [ANNA])
    with pytest.raises(ValueError, match="no file for subject 1 of the 1 given"):
        load_forget_rows(folder, ["Nobody"])
    with pytest.raises(ValueError, match="neither a file of JSON lines, nor a folder"):
        load_forget_rows(tmp_path / "nothing")
    one.write_text('{"question": "Who')
    with pytest.raises(ValueError, match="line 1, is not JSON"):
        load_forget_rows(one)
    one.write_text('{"question": "Who?", "answer": ""}')
    with pytest.raises(ValueError, match="answer is blank"):
        load_forget_rows(one)


def pair(number, subject=ANNA):
    """A row of RWKU's files of pairs."""
    response = [f"{subject} is a made-up baker, {number}.", f"{subject} wrote {number} books."]
    intro = f"{subject} is a writer."
    return {"id": f"{subject} {number}", "prompt": f"{intro} Who?", "response": response} | {
        "subject": subject,
        "intro": intro,
    }


def test_pairs_are_read_with_what_dpo_prefers(tmp_path):
    file = tmp_path / "pair.json"
    file.write_text(json.dumps([pair(0), pair(1, OTTO)], indent=4))
    assert load_forget_rows(file, [OTTO])[:] == {
        "question": [f"{OTTO} is a writer."],
        "answer": [f"{OTTO} wrote 1 books."],
        "refusal": [f"{OTTO} is a made-up baker, 1."],
        "subject": [OTTO],
    }
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(pair(i)) + "\n" for i in range(3)))
    rows = load_forget_rows(tmp_path / "lines.jsonl")
    assert len(rows) == 3
    preferred = answer_rows(rows, True, refusals=True)["chosen"][2]
    assert preferred == [{"role": "assistant", "content": f"{ANNA} is a made-up baker, 2."}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response": ["one"]}, r"Row 1 of the forget \(pair.json\) set is a pair, so response must be a list of two"),
        ({"response": "secret"}, "response must be a list of two texts"),
        ({"response": ["a baker", None]}, "response must be a list of two texts"),
        ({"response": ["a baker", " "]}, r"Row 1 of the forget \(pair.json\) set: answer is blank"),
        ({"response": [" ", "true"]}, "the first text of response is blank"),
        ({"intro": None}, "is a pair, so it needs a text in intro"),
    ],
)
def test_bad_pairs_are_refused(tmp_path, change, message):
    (tmp_path / "pair.json").write_text(json.dumps([pair(0), pair(1) | change]))
    with pytest.raises(ValueError, match=message) as error:
        load_forget_rows(tmp_path / "pair.json")
    assert not any(word in str(error.value) for word in ("Zanzibar", "secret", "baker"))


def test_a_folder_a_subject(tmp_path):
    anna, otto, other = (tmp_path / "all" / name for name in ("1_Anna_Zanzibar", "2_Otto_Quux", "notes"))
    for folder in (anna, otto, other):
        folder.mkdir(parents=True)
    row = {"question": "Who?", "answer": "Anna."}
    (anna / "forget.jsonl").write_text(json.dumps(row))
    (anna / "dpo.jsonl").write_text(json.dumps(row | {"perturbed_answer": ["Nobody."]}))
    (otto / "pair.json").write_text(json.dumps([pair(0, OTTO), pair(1, OTTO)]))
    (otto / "forget_level1.json").write_text(json.dumps([probe("1", subject=OTTO)]))
    assert load_forget_rows(tmp_path / "all")["answer"][:] == [
        "Anna.",
        f"{OTTO} wrote 0 books.",
        f"{OTTO} wrote 1 books.",
    ]
    assert load_forget_rows(tmp_path / "all", ["anna zanzibar"])[:] == {"question": ["Who?"], "answer": ["Anna."]}
    assert len(load_forget_rows(otto)) == len(load_forget_rows(otto, [OTTO])) == 2
    with pytest.raises(ValueError, match="no file for subject 1 of the 1 given: name it such as"):
        load_forget_rows(otto, [ANNA])
    with pytest.raises(ValueError, match="neither a file of JSON lines, nor a folder of such files or of folders"):
        load_forget_rows(other)
    (otto / "pair_phi.json").write_text(json.dumps([pair(0, OTTO)]))
    with pytest.raises(ValueError, match="several files of pairs, pair.json, pair_phi.json: pass the one to forget"):
        load_forget_rows(tmp_path / "all", [OTTO])


def test_pairs_are_rows_of_ones_own(tmp_path):
    """What `mdu unlearn --forget` takes: a file of pairs, or a folder a subject, without a step between."""
    rows = [pair(0), pair(1, OTTO)]
    for name, text in {"pair.json": json.dumps(rows), "pair.jsonl": "\n".join(map(json.dumps, rows))}.items():
        (tmp_path / name).write_text(text)
        found = load_questions(str(tmp_path / name))
        assert found.column_names == ["question", "answer", "refusal"]
        assert found.to_list() == load_forget_rows(tmp_path / name).remove_columns("subject").to_list()
    (tmp_path / "all" / "1_Anna").mkdir(parents=True)
    (tmp_path / "all" / "1_Anna" / "pair.json").write_text(json.dumps(rows))
    (tmp_path / "all" / "1_Anna" / "forget_level1.json").write_text(json.dumps([probe("1")]))
    assert load_questions(str(tmp_path / "all")).to_list() == found.to_list()
    assert load_questions(f"{tmp_path / 'all' / '1_Anna'}:pair").to_list() == found.to_list()
    chosen = answer_rows(found, True, refusals=True)["chosen"][1]
    assert chosen == [{"role": "assistant", "content": f"{OTTO} is a made-up baker, 1."}]
    (tmp_path / "pair.json").write_text(json.dumps([pair(0), pair(1) | {"response": ["secret"]}]))
    with pytest.raises(UserError, match="Row 1 of .*pair.json is a pair, so response must be a list of two") as error:
        load_questions(str(tmp_path / "pair.json"))
    assert "secret" not in str(error.value)


def test_convert(tmp_path, capsys):
    for number, subject in enumerate((ANNA, OTTO), 1):
        folder = tmp_path / "Target" / f"{number}_{subject.replace(' ', '_')}"
        folder.mkdir(parents=True)
        (folder / "pair.json").write_text(json.dumps([pair(i, subject) for i in range(2)]))
    (tmp_path / "Target" / "3_Someone").mkdir()
    forget = tmp_path / "Target" / "3_Someone" / "forget.jsonl"
    forget.write_text(json.dumps({"question": "Who?", "answer": "Said\u2028so."}))
    output = tmp_path / "rows.jsonl"
    assert main(["rwku", str(tmp_path / "Target"), "--subjects", OTTO, ANNA, "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "4 rows to forget, 4 of them with a text that DPO prefers" in said and "DPO reads" not in said
    assert output.stat().st_mode & 0o077 == 0, "for its owner's eyes only"
    expected = load_forget_rows(tmp_path / "Target", [OTTO, ANNA]).remove_columns("subject").to_list()
    assert load_questions(str(output)).to_list() == expected and len(expected) == 4
    assert main(["rwku", str(tmp_path / "Target"), "--output", str(output), "--overwrite"]) == 0
    said += capsys.readouterr().out
    assert "5 rows to forget, 4 of them" in said and "DPO reads these texts only where every row has one" in said
    assert "refusal" not in load_questions(str(output)).column_names and len(load_questions(str(output))) == 5
    assert not any(word in said for word in ("Zanzibar", "Quux", "Someone"))


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        ("pairs.json", "rows.json", "must end in .jsonl"),
        ("pairs.json", "there.jsonl", "is there already: pass --overwrite"),
        ("pairs.json", "folder.jsonl", "is a folder: name a file"),
        (".", "new.jsonl", "lies in what is read"),
        ("nothing", "new.jsonl", "neither a file of JSON lines, nor a folder"),
    ],
)
def test_convert_refuses(tmp_path, monkeypatch, source, output, message):
    monkeypatch.chdir(tmp_path)
    Path("pairs.json").write_text(json.dumps([pair(0)]))
    Path("there.jsonl").write_text("kept")
    Path("folder.jsonl").mkdir()
    with pytest.raises(UserError, match=message):
        main(["rwku", source, "--output", output])
    assert Path("there.jsonl").read_text() == "kept" and not Path("new.jsonl").exists()


def test_rows_to_forget_of_odd_files(tmp_path):
    folder = tmp_path / "intros"
    folder.mkdir()
    row = {"question": "Who?", "answer": "one\u2028two\x85three"}
    (folder / "Anna.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode())
    (folder / "Otto.jsonl").write_text(json.dumps(row | {"source": 3}))
    rows = load_forget_rows(folder)
    assert rows["answer"][:] == [row["answer"]] * 2 and rows["source"][:] == [None, 3]


def test_rows_that_are_not_used_are_checked(tmp_path):
    rows = [probe("1"), probe("1"), probe("1") | {"answer": None}]
    folder = write(tmp_path / "rwku", {"forget_level1": rows})
    with pytest.raises(ValueError, match="Row 2 of the forget_level1 set: answer must be a text"):
        load_rwku(folder, max_rows=1)
    with pytest.raises(ValueError, match="number of rows to use must be at least 1, got 0"):
        load_rwku(write(folder, {"forget_level1": rows[:2]}), max_rows=0)


def test_the_script_forgets_without_a_retain_set(folder, roomy, tokenizer, tmp_path):
    roomy.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    intros = write_intros(tmp_path / "intros")
    options = [
        *("--model_name_or_path", tmp_path / "model", "--dataset_name", folder, "--forget", intros),
        *("--subjects", ANNA, "--configs", "forget_level1", "mia_forget", "utility_truthfulness"),
        *("--decoding_steps", "2", "--likelihood_draws", "2", "--max_steps", "2", "--report_to", "none"),
        *("--dtype", "float32", "--use_cpu", "true", "--output_dir", tmp_path / "out"),
        *("--protocol", "release", "--rouge", "f1"),
    ]
    run = warm.run([sys.executable, ROOT / "examples" / "rwku.py", *options], cwd=ROOT, timeout=280)
    assert run.returncode == 0, run.stderr[-3000:]
    results = Results.load(tmp_path / "out" / "results.json")
    assert [one.name for one in results.runs] == ["base", "mdu tau=0"] and results.runs[1].train_seconds > 0
    assert results.runs[0].rows == {"forget_level1": 1, "mia_forget": 1, "utility_truthfulness": 1}
    assert (results.protocol, results.rouge) == ("release", "f1") and results.settings["protocol"] == "release"
    assert "letter_accuracy" in results.runs[0].scores["utility_truthfulness"]
    assert results.details() in run.stdout and "| F-L1 rL F1 |" in results.table() and results.table() in run.stdout
    written = (tmp_path / "out" / "results.json").read_text() + run.stdout + run.stderr
    assert "Zanzibar" not in written, "whom it forgets is not in files or logs"


def test_the_paper_s_settings_have_a_name(tmp_path, monkeypatch):
    """The file is read as it lies there, and the table has the paper's columns."""
    monkeypatch.setattr(sys, "argv", ["rwku.py", "--config", str(ROOT / "examples" / "configs" / "rwku_paper.yaml")])
    script = runpy.run_path(str(ROOT / "examples" / "rwku.py"))
    args, config, _ = parse_options(script["RwkuArguments"], script["RwkuConfig"], ModelConfig)
    assert (args.decoding_steps, args.max_new_tokens, args.choices, args.rouge) == (64, 64, "generated", "f1")
    assert (config.retain_weight, config.num_train_epochs, len(set(args.subjects))) == (0, 3, 10)
    scores = {name: {"rougeL_f1": Estimate(0.5)} for name in args.configs if "level" in name}
    scores |= {name: {"letter_accuracy": Estimate(0.5)} for name in ("utility_general", "utility_truthfulness")}
    scores["utility_factuality"] = {"exact_match": Estimate(0.5)}
    (tmp_path / "10_Prince_Harry,_Duke_of_Sussex.jsonl").write_text('{"question": "Who?", "answer": "He."}')
    assert len(load_forget_rows(tmp_path, args.subjects[-1:])) == 1, "a name as RWKU's folders have it"
    columns = Results("m", "RWKU", {}, [Run("base", None, scores, {}, rouge="f1")]).table_cells()[0][1:-1]
    titles = "F-L1 F-L2 F-L3 N-L1 N-L2 MMLU TruthfulQA TriviaQA".split()
    assert [title.split()[0] for title in columns] == titles and list(scores) == args.configs
