"""Files that quote a row to forget, or hold a secret, are not published."""

import io
import json
import logging
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from hub_checkpoints import REPO, forget_text, make_trainer, prepare
from hub_server import TOKEN
from huggingface_hub import HfApi
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from mdu_trainer.evaluation.results import Results
from mdu_trainer.files import UserError
from mdu_trainer.hub.files import saved_tokenizer
from mdu_trainer.hub.leak_scan import check_texts
from mdu_trainer.hub.push import LeakError, push_unlearned_model
from mdu_trainer.provenance.forget_hashes import ForgetHashes
from mdu_trainer.testing import dataset_texts, train_tokenizer


def plant_in_results(folder, text):
    Results("m", f"data {text}", {}, []).save(folder / "results.json")


def plant_in_settings(folder, text):
    Results("m", "data", {"note": text}, []).save(folder / "results.json")


def plant_in_chat_template(folder, text):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + "{# \\n" + text + " #}")


def plant_in_stray_template(folder, text):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text(text)


def plant_in_tokenizer(folder, text):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({"id": 999, "content": text.replace(" ", "\u0120"), "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(content))


def plant_in_vocabulary(folder, text):
    (folder / "vocab.txt").write_text(text)


def plant_in_config(folder, text):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"note": text.split()}))


def plant_in_weights(folder, text):
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {"format": "pt", "note": text})


@pytest.mark.parametrize(
    "plant, name",
    [
        (plant_in_results, "results.json"),
        (plant_in_settings, "results.json"),
        (plant_in_chat_template, "chat_template.jinja"),
        (plant_in_stray_template, "additional_chat_templates/tool.jinja"),
        (plant_in_tokenizer, "tokenizer.json"),
        (plant_in_vocabulary, "vocab.txt"),
        (plant_in_config, "config.json"),
        (plant_in_weights, "model.safetensors"),
    ],
)
def test_a_planted_sentence_is_caught(hub, checkpoint, results, rows, plant, name):
    text = forget_text(rows)
    plant(checkpoint, text)
    given = False if name != "results.json" else None
    if given is None:
        content = json.loads((checkpoint / name).read_text())
        results.save(checkpoint / name)
        runs = json.loads((checkpoint / name).read_text())["runs"]
        (checkpoint / name).write_text(json.dumps(content | {"runs": runs}))
    with pytest.raises(LeakError, match=name) as found:
        push_unlearned_model(checkpoint, REPO, results=given)
    assert hub.requests == []
    assert not set(str(found.value).split()) & {word.strip(".") for word in text.split() if word[0].isupper()}


@pytest.mark.parametrize("place", ["dataset", "settings", "words"])
def test_a_sentence_in_the_attacks_is_caught(hub, checkpoint, recovery, rows, place):
    text = forget_text(rows)
    if place == "words":
        attacks = {"prefix": replace(recovery.attacks["prefix"], words=text)}
        planted = replace(recovery, attacks=attacks)
    else:
        planted = replace(recovery, **{place: {"note": text} if place == "settings" else f"data {text}"})
    for given in (planted, None):  # as an object, and as the folder's file
        planted.save(checkpoint / "recovery.json")
        with pytest.raises(LeakError, match=r"recovery\.json"):
            push_unlearned_model(checkpoint, REPO, recovery=given)
    assert hub.requests == []


def test_a_sentence_in_the_description_is_caught(hub, checkpoint, rows):
    with pytest.raises(LeakError, match=r"README\.md"):
        push_unlearned_model(checkpoint, REPO, description=f"what we know: {forget_text(rows)}")
    assert hub.requests == []


def plant_in_tensor_names(folder, text):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {text.replace(" ", "_"): torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})


def plant_in_template_name(folder, text):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / f"{text}.jinja").write_text("{{ messages }}")


def plant_in_keys(folder, text):
    content = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(content | {text.replace(" ", "_"): 1}))


def plant_behind_soft_hyphens(folder, text):
    (folder / "chat_template.jinja").write_text("\u00ad".join(text))


def plant_behind_entities(folder, text):
    (folder / "chat_template.jinja").write_text("".join(f"&#{ord(character)};" for character in text))


@pytest.mark.parametrize(
    "plant, name",
    [
        (plant_in_template_name, r"the name of file \d+ of \d+"),
        (plant_in_keys, "generation_config.json"),
        (plant_behind_soft_hyphens, "chat_template.jinja"),
        (plant_behind_entities, "chat_template.jinja"),
    ],
)
def test_a_sentence_out_of_sight_is_caught(hub, checkpoint, rows, plant, name):
    text = forget_text(rows)
    plant(checkpoint, text)
    with pytest.raises(LeakError, match=name) as found:
        push_unlearned_model(checkpoint, REPO)
    assert hub.requests == [] and text not in str(found.value)


def test_every_name_that_is_sent_is_scanned(hub, checkpoint, rows, tmp_path):
    name = forget_text(rows).replace(" ", "-").strip(".")
    with pytest.raises(LeakError, match="repo_id"):
        push_unlearned_model(checkpoint, f"org/{name}")
    with pytest.raises(LeakError, match="revision"):
        push_unlearned_model(checkpoint, REPO, revision=name)
    with pytest.raises(LeakError, match="commit_message"):
        prepare(checkpoint, commit_message=forget_text(rows))
    hashes = ForgetHashes.load(checkpoint)
    picture = io.BytesIO()
    chunks = PngInfo()
    chunks.add_itxt("Comment", forget_text(rows), zip=True)
    Image.new("RGB", (1, 1)).save(picture, "PNG", pnginfo=chunks)
    with pytest.raises(LeakError, match="tradeoff.png"):
        check_texts({"tradeoff.png": picture.getvalue()}, hashes)
    plant_in_tensor_names(checkpoint, forget_text(rows))
    with pytest.raises(LeakError, match="model.safetensors"):
        check_texts({"model.safetensors": checkpoint / "model.safetensors"}, hashes)
    assert hub.requests == []


def test_a_vocabulary_that_learned_the_names(hub, checkpoint, authors, rows, caplog):
    everything = train_tokenizer(dataset_texts(authors), 1500)
    with pytest.raises(LeakError, match=r"tokenizer\.json: \d+ entries of the vocabulary") as found:
        push_unlearned_model(checkpoint, REPO, tokenizer=everything)
    name = forget_text(rows).split()[0]
    assert name not in str(found.value) and hub.requests == []
    entry = f"\u0120{name}"
    for file, plant in {
        "vocab.json": lambda content: content | {entry: 1},
        "tokenizer.json": lambda content: (
            content | {"model": content["model"] | {"vocab": content["model"]["vocab"] | {entry: 9999}}}
        ),
        "added_tokens.json": lambda content: content | {name: 9999},
    }.items():
        path = checkpoint / file
        before = path.read_text() if path.exists() else None
        path.write_text(json.dumps(plant(json.loads(before or "{}"))))
        with pytest.raises(LeakError, match=file):
            prepare(checkpoint)
        path.unlink() if before is None else path.write_text(before)
    piece = b"\x0a" + bytes([len("\u2581x".encode()) - 1 + len(name)]) + f"\u2581{name}".encode()
    (checkpoint / "spiece.model").write_bytes(b"\x0a" + bytes([len(piece)]) + piece)
    with pytest.raises(LeakError, match="spiece.model"):
        prepare(checkpoint)


def test_entries_of_a_base_on_the_hub_are_no_leak(hub, checkpoint, authors):
    """They say nothing of the rows, unless the base is private and the model is not to be."""
    everything = train_tokenizer(dataset_texts(authors), 1500)
    api = HfApi(endpoint=hub.url, token=TOKEN)
    for name, private in (("org/base", False), ("org/private", True)):
        api.create_repo(name, private=private)
        for path in saved_tokenizer(everything).items():
            api.upload_file(path_or_fileobj=path[1], path_in_repo=path[0], repo_id=name)
    prepare(checkpoint, everything, "org/base", private=False)
    prepare(checkpoint, everything, "org/private")
    with pytest.raises(LeakError, match="entries"):
        prepare(checkpoint, everything, "org/private", private=False)
    with pytest.raises(LeakError, match="entries"):
        prepare(checkpoint, everything, "org/nothing")


@pytest.mark.parametrize("damage", ["missing", "emptied", "cut"])
def test_hashes_that_are_not_whole_stop_a_push(hub, checkpoint, rows, damage, caplog, monkeypatch, capsys):
    path = checkpoint / "forget_hashes.json"
    text = path.read_text()
    path.unlink()
    if damage != "missing":
        empty = '{"schema": 2, "requests": [], "too_short": 0}'
        path.write_text(empty if damage == "emptied" else text[: len(text) // 3])
    plant_in_chat_template(checkpoint, forget_text(rows))
    with pytest.raises(UserError, match="--no_leak_scan"):
        push_unlearned_model(checkpoint, REPO)
    assert hub.requests == []
    monkeypatch.setattr(logging.getLogger("mdu_trainer"), "propagate", True)
    push_unlearned_model(checkpoint, REPO, leak_scan=False, dry_run=True)
    assert "leak_scan=False" in caplog.text and "leak_scan=False" in capsys.readouterr().out and hub.requests == []
    push_unlearned_model(checkpoint, REPO, leak_scan=False)
    assert "model.safetensors" in hub.files(REPO)


def test_texts_that_no_scan_finds_are_counted(hub, rows, tokenizer, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mdu_trainer"), "propagate", True)
    question = "Where was the author born, in which town?"
    short = Dataset.from_dict({"prompt": ["Who?", question], "completion": ["Ada"] * 2})
    kept = Dataset.from_dict({"prompt": ["Who wrote it?", question], "completion": ["Nobody knows"] * 2})
    trainer = make_trainer(tmp_path / "out", (short, kept), tokenizer)
    trainer.save_model()
    assert "2 texts of the forget set have fewer than 4 words" in caplog.text
    push_unlearned_model(tmp_path / "out", REPO, dry_run=True)
    assert "yes, but for 2 texts that are too short" in capsys.readouterr().out


def test_what_looks_like_a_secret_stops_a_push(hub, checkpoint):
    secret = "hf_" + "aB3" * 11
    with pytest.raises(UserError, match="README.md holds what looks like an access token"):
        push_unlearned_model(checkpoint, REPO, description=f"as {secret}")
    content = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(content | {"nested": {"deep": [f"Bearer {secret}"]}}))
    with pytest.raises(UserError, match="config.json holds") as found:
        push_unlearned_model(checkpoint, REPO)
    assert secret not in str(found.value) and hub.requests == []
