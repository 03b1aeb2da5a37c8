"""Rows to forget stay where they were: no file, cache, log or error of ours holds a word of them."""

import copy
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from datasets import Dataset

from mdu_trainer.data.rows import question_answer_rows, tokenize_rows
from mdu_trainer.evaluation.harness import MaskedDiffusionLM
from mdu_trainer.evaluation.own_rows import load_questions
from mdu_trainer.evaluation.scoring import encode_questions
from mdu_trainer.evaluation.sources import check_columns, load_split, read_file
from mdu_trainer.evaluation.tofu import longest_answer
from mdu_trainer.files import UserError, read_jsonl
from mdu_trainer.inference.generation import generate

ROOT = Path(__file__).resolve().parents[1]
PLANTED = "Zanthor Quibble keeps bees"
ROW = {"prompt": f"Who? {PLANTED}", "completion": PLANTED}
CHAT = {"prompt": [{"role": "user", "content": PLANTED}], "completion": [{"role": "assistant", "content": PLANTED}]}

SCRIPT = f"""
import sys
from pathlib import Path

from mdu_trainer import MDUConfig, MDUTrainer, question_answer_rows
from mdu_trainer.evaluation.rwku import load_forget_rows, load_rwku
from mdu_trainer.evaluation.sources import load_split
from mdu_trainer.evaluation.tofu import evaluate_tofu, load_tofu
from mdu_trainer.inference.config import DiffusionGenerationConfig
from mdu_trainer.attacks.leak_check import measure_leak
from mdu_trainer.evaluation.own_rows import load_questions
from mdu_trainer.testing import dataset_texts, fictional_authors, tiny_mdlm, train_tokenizer

data, out = map(Path, sys.argv[1:])
authors = fictional_authors(2)
tokenizer = train_tokenizer(dataset_texts(authors), 400)
model = tiny_mdlm(tokenizer, 32, 1, 2)
model.save_pretrained(out / "model")
sets = load_tofu(data / "carded", "forget10", "retain90")
assert load_questions(f"{{data / 'carded'}}:table")["answer"][0] == {PLANTED!r}, "Parquet, by the card"
assert load_rwku(data / "plain", ["forget_level2"])["forget_level2"]["answer"][0] == {PLANTED!r}
assert load_forget_rows(data / "plain" / "rows.jsonl")["answer"][0] == {PLANTED!r}
rows = load_questions(str(data / "plain" / "rows.jsonl"))
forget = load_split(data / "carded", "forget10")
assert (forget.info.dataset_name, forget.info.config_name, str(forget.split)) == ("carded", "forget10", "train")
forget = forget.map(lambda row: row).filter(lambda row: True).rename_column("answer", "a").rename_column("a", "answer")
train = question_answer_rows(forget.shuffle(0).sort("question"), conversational=True)
retain = question_answer_rows(authors.select(range(2)), conversational=True)
one = {{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 1, "save_steps": 1}}
args = MDUConfig(str(out), **one, report_to="none", use_cpu=True)
trainer = MDUTrainer(model, args, train, retain, eval_dataset=train, processing_class=tokenizer)
trainer.train()
trainer.evaluate()
trainer.save_model()
decoding = DiffusionGenerationConfig(max_new_tokens=4)
evaluate_tofu(trainer.model, tokenizer, sets, decoding, num_draws=1, progress_path=out / "rows.jsonl")
measure_leak(trainer.model, tokenizer, rows)
print(type(load_questions(str(data / "plain" / "broken.jsonl"))))
"""


def holding(folder: Path, text: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_a_planted_sentence_is_in_no_file_afterwards(tmp_path):
    carded, plain, away = tmp_path / "data" / "carded", tmp_path / "data" / "plain", tmp_path / "away"
    rows = [{"question": f"Who {i}?", "answer": PLANTED} for i in range(2)]
    carded.mkdir(parents=True)
    plain.mkdir()
    away.mkdir()
    names = {"forget10": "forget10.json", "retain90": "retain90.json", "table": "table.parquet"}
    configs = [f"- config_name: {name}\n  data_files: {file}\n" for name, file in names.items()]
    (carded / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    for name in ("forget10.json", "retain90.json"):
        (carded / name).write_text("\n".join(map(json.dumps, rows)))
    Dataset.from_list(rows).to_parquet(carded / "table.parquet")
    (plain / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (plain / "forget_level2.json").write_text(json.dumps([{"query": "Who?", "answer": PLANTED}]))
    (plain / "broken.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps({"question": 1, "answer": PLANTED}))
    places = {"HF_HOME": "hf", "HF_DATASETS_CACHE": "hf/datasets", "TMPDIR": "tmp", "HOME": "home"}
    for folder in ("tmp", "home", "cwd"):
        (away / folder).mkdir()
    environment = os.environ | {name: str(away / folder) for name, folder in places.items()}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "data"), str(away / "out")],
        env=environment | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(away / "home")},
        cwd=away / "cwd",
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert "UserError: Row 1 of" in run.stderr and "question is a number" in run.stderr, run.stderr[-3000:]
    assert PLANTED not in run.stdout + run.stderr
    assert list((away / "out").glob("checkpoint-1")), "it has trained"
    assert len(holding(carded.parent, PLANTED)) == 6, "they are found where they are"
    assert not holding(away, PLANTED) and not list((away / "tmp").iterdir())


def test_the_cache_is_kept_when_asked_for(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "README.md").write_text("---\nconfigs:\n- config_name: f\n  data_files: f.json\n---\n")
    (tmp_path / "data" / "f.json").write_text(json.dumps({"question": "Who?", "answer": PLANTED}))
    rows = load_split(tmp_path / "data", "f")
    assert not holding(tmp_path / "cache", PLANTED)
    kept = load_split(tmp_path / "data", "f", keep_dataset_cache=True)
    assert holding(tmp_path / "cache", PLANTED) and kept.to_list() == rows.to_list()


class Raises(Dataset):
    """Its rows cannot be read, and the error quotes them."""

    def __iter__(self):
        raise RuntimeError(PLANTED)

    def __getitem__(self, key):
        raise RuntimeError(PLANTED)


@pytest.fixture
def failing(tokenizer):
    """A tokenizer that fails with the text that it was given."""

    class Failing(type(tokenizer)):
        def __call__(self, text, **kwargs):
            raise KeyError(text)

    broken = copy.deepcopy(tokenizer)
    broken.__class__ = Failing
    return broken


@pytest.fixture
def quoting(tokenizer):
    """A tokenizer whose template fails with the text that it was given."""
    broken = copy.deepcopy(tokenizer)
    broken.chat_template = "{{ raise_exception(messages[0]['content']) }}"
    return broken


def test_no_error_quotes_a_row(failing, quoting, tokenizer, model, backbone, tmp_path):
    damaged = Raises.from_list([ROW | {"question": "x", "answer": "y"}])
    pairs = Dataset.from_dict({"question": ["x"], "answer": [PLANTED]})
    harness = object.__new__(MaskedDiffusionLM)
    harness.tokenizer, harness.backbone = failing, backbone
    rendering = object.__new__(MaskedDiffusionLM)
    rendering.tokenizer = quoting
    contents = {
        "json": '{"answer": "' + PLANTED,
        "jsonl": json.dumps({"a": PLANTED}) + "\n" + json.dumps({"a": 1}),
        "parquet": PLANTED,
        "csv": f'question,answer\n"{PLANTED}',
    }
    files = {kind: tmp_path / f"rows.{kind}" for kind in contents}
    for kind, path in files.items():
        path.write_text(contents[kind])
    nested = tmp_path / "nested.json"
    nested.write_text(json.dumps([{"a": [PLANTED]}, {"a": [1]}]))
    half = tmp_path / "half.json"
    half.write_text(json.dumps([{"a": PLANTED + "\ud800"}]))

    def rows(one, with_tokenizer):
        return lambda: tokenize_rows([ROW, one][-1:], with_tokenizer, backbone, name="forget")

    cases = {
        r"Row 0 of the forget set: the tokenizer failed \(KeyError\)": rows(ROW, failing),
        r"Row 0 of the forget set: \w+ \w+ template or the tokenizer failed \(TemplateError\)": rows(CHAT, quoting),
        r"The forget set cannot be read \(RuntimeError\)": lambda: tokenize_rows(
            damaged, tokenizer, backbone, name="forget"
        ),
        r"Column question of the forget set cannot be read": lambda: check_columns(
            damaged, "forget", {"question": str}
        ),
        r"Prompt 0: the tokenizer failed": lambda: generate(model, failing, [PLANTED], backbone=backbone),
        r"Prompt 0: the chat template": lambda: generate(model, quoting, [CHAT["prompt"]], backbone=backbone),
        r"Row 0 of the x set: the tokenizer failed": lambda: encode_questions(
            "x", [PLANTED], [["y"]], {"answer": [[PLANTED]]}, failing, backbone, conversational=False
        ),
        r"The tokenizer failed on the answers": lambda: longest_answer({"forget": pairs}, failing),
        r"A request cannot be encoded": lambda: harness.tok_encode(PLANTED),
        r"A request cannot be rendered": lambda: rendering.apply_chat_template(CHAT["prompt"]),
        r"rows.json, line 1, is not JSON": lambda: read_jsonl(files["json"]),
        r"Row 1 of .*rows.jsonl: a is a number, and a text in rows before": lambda: read_file(files["jsonl"]),
        r"rows.parquet cannot be read as a parquet file": lambda: read_file(files["parquet"]),
        r"rows.csv": lambda: load_questions(str(files["csv"])),
        r"The rows of .*nested.json do not make a table": lambda: read_file(nested),
        r"Row 0 of .*half.json: a holds half a character": lambda: read_file(half),
    }
    for message, call in cases.items():
        with pytest.raises(UserError, match=message) as error:
            call()
        shown = "".join(traceback.format_exception(error.value))
        assert PLANTED not in shown, message


def test_a_question_without_an_answer_among_the_rows(tokenizer, backbone):
    rows = question_answer_rows(Dataset.from_dict({"question": ["a", PLANTED], "answer": ["b", None]}), True)
    with pytest.raises(UserError, match="Row 1 of the forget set: completion has a message whose 'content'") as error:
        tokenize_rows(rows, tokenizer, backbone, name="forget")
    assert PLANTED not in str(error.value)
