"""Publishing, with the real client against a Hub on loopback."""

import io
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from hub_server import TOKEN, HubServer
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub import hf_api as client
from huggingface_hub.utils import _http
from peft import LoraConfig, PeftModel
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from published import write_llada
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import hub as transformers_hub

from mdu_trainer import MDUConfig, MDUTrainer, load_model, load_tokenizer, question_answer_rows
from mdu_trainer.attacks.results import AttackOutcome, Outcome, Recovery
from mdu_trainer.evaluation.results import Estimate, Results, Run
from mdu_trainer.files import UserError
from mdu_trainer.hub.files import saved_tokenizer
from mdu_trainer.hub.leak_scan import check_texts
from mdu_trainer.hub.push import (
    Destination,
    LeakError,
    PushError,
    hub_api,
    prepare_push,
    push_unlearned_model,
    read_checkpoint,
)
from mdu_trainer.provenance.facts import Facts
from mdu_trainer.provenance.forget_hashes import ForgetHashes
from mdu_trainer.report.model_card import CardDetails, write_model_card
from mdu_trainer.testing import dataset_texts, forget_retain_split, tiny_mdlm, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
REPO = "org/forgets"
PLANTED = "hf_plantedInTheTrainingArguments"
FULL = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "results.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tradeoff.png",
}
ADAPTER = FULL - {"config.json", "generation_config.json", "model.safetensors", "results.json", "tradeoff.png"} | {
    "adapter_config.json",
    "adapter_model.safetensors",
}
QUICK = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "learning_rate": 1e-2,
}


def prepare(folder, tokenizer=None, base_model=None, **where):
    """A push that is not sent."""
    details = CardDetails(base_model=base_model)
    return prepare_push(read_checkpoint(folder), Destination(REPO, **where), details, tokenizer=tokenizer)


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """A Hub that the client of this process talks to, signed in, over LFS, without waiting between retries."""
    with HubServer() as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(client.api, "endpoint", server.url)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)
        real = _http.time
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda _: None, time=real.time))
        hub_api.cache_clear()
        yield server
        hub_api.cache_clear()


@pytest.fixture(scope="module")
def tokenizer(authors):
    """Trained on what is kept, so that no name to forget is one of its tokens."""
    return train_tokenizer(dataset_texts(forget_retain_split(authors)[1].select_columns(["question", "answer"])))


@pytest.fixture(scope="module")
def rows(authors):
    return tuple(question_answer_rows(part, conversational=True) for part in forget_retain_split(authors))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, rows, tokenizer):
    """A checkpoint of one step, as the trainer leaves it, with a token in its training arguments."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    trainer = make_trainer(folder, rows, tokenizer, hub_token=PLANTED, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture
def checkpoint(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "checkpoint"))


@pytest.fixture
def recovery():
    def outcome(value):
        return Outcome(Estimate(0.1), Estimate(value, 0.0, 1.0), Estimate(value, 0.0, 0.9))

    ends = {name: Outcome(Estimate(0.5), Estimate(end)) for name, end in (("base", 0.9), ("never trained", 0.1))}
    attacks = {"prefix": AttackOutcome("reveal the first words", 16, ends | {"mdu tau=0": outcome(0.25)})}
    settings = {"decoding": {"steps": 4, "schedule": "linear"}, "samples": 8, "note": "/home/somebody"}
    return Recovery("/home/somebody/data forget10", settings, attacks)


@pytest.fixture
def results():
    def run(method, tau, forget, retain):
        scores = {
            name: {"rougeL_recall": Estimate(value, value - 0.1, value + 0.05)}
            for name, value in (("forget", forget), ("retain", retain))
        }
        return Run(method, tau, scores, {"forget": 16, "retain": 80}, {}, 14.0, 2.0)

    settings = {"output_dir": "/home/somebody/outputs"}
    runs = [run("base", None, 0.9, 0.9), run("mdu", 0.0, 0.2, 0.8)]
    return Results("from scratch", "fictional authors", settings, runs)


def make_trainer(folder, rows, tokenizer, model=None, peft_config=None, **options):
    model = model if model is not None else tiny_mdlm(tokenizer, hidden_size=32, num_layers=2, num_heads=2)
    args = MDUConfig(str(folder), **(QUICK | options))
    return MDUTrainer(model, args, *rows, processing_class=tokenizer, peft_config=peft_config)


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(5, 25)[None]).logits


def forget_text(rows):
    return rows[0][3]["completion"][0]["content"]


def tree_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_pushed_model_is_the_model(hub, checkpoint, results, capsys):
    results.save(checkpoint / "results.json")
    before = tree_of(checkpoint)
    info = push_unlearned_model(checkpoint, REPO)
    assert hub.repos[REPO].private, "private is the default"
    assert info.oid == hub.repos[REPO].refs["main"] and len(hub.repos[REPO].commits) == 2, "one commit"
    assert set(hub.files(REPO)) == FULL and tree_of(checkpoint) == before
    torch.testing.assert_close(logits(load_model(REPO)), logits(load_model(str(checkpoint))), rtol=0, atol=0)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(REPO)), logits(load_model(REPO)))
    assert load_tokenizer(REPO).get_vocab() == load_tokenizer(str(checkpoint)).get_vocab()
    published = json.loads(hub.files(REPO)["results.json"])
    assert published["settings"] == {} and published["runs"][1]["scores"]["forget"]["rougeL_recall"]["value"] == 0.2
    run_snippet(hub.files(REPO)["README.md"].decode())
    assert capsys.readouterr().out.endswith("\n")
    assert hub.files(REPO)["tradeoff.png"].startswith(b"\x89PNG") and b"(tradeoff.png)" in hub.files(REPO)["README.md"]


def run_snippet(card):
    exec(card.partition("```python\n")[2].partition("```")[0], {})


def test_attacks_are_published_as_figures(hub, checkpoint, results, recovery):
    recovery.save(checkpoint / "recovery.json")
    push_unlearned_model(checkpoint, REPO, results=results)
    files = hub.files(REPO)
    assert set(files) == FULL | {"recovery.json"} and b"somebody" not in b"".join(files.values())
    (checkpoint / "published.json").write_bytes(files["recovery.json"])
    published = Recovery.load(checkpoint / "published.json")
    assert published.attacks == recovery.attacks and published.settings == {"steps": 4, "samples": 8}
    assert published.dataset == "a local data set forget10" and b"### Attacks" in files["README.md"]
    push_unlearned_model(checkpoint, "org/without", results=results, recovery=False)
    assert set(hub.files("org/without")) == FULL and b"### Attacks" not in hub.files("org/without")["README.md"]


def test_nothing_outside_the_list_is_sent(hub, checkpoint, rows):
    text = forget_text(rows)
    for name in ("notes.txt", "predictions.jsonl", "runs/events.log", "anchor_cache.npy", "data.arrow", "extra.py"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text(f"stray {text}")
    assert PLANTED.encode() in (checkpoint / "training_args.bin").read_bytes()
    push_unlearned_model(checkpoint, REPO)
    assert set(hub.files(REPO)) == FULL - {"results.json", "tradeoff.png"}
    sent = hub.received
    for secret in (PLANTED, text, "stray", str(checkpoint), "optimizer.pt"):
        assert secret.encode() not in sent
    key = json.loads((checkpoint / "forget_hashes.json").read_text())["requests"][0]["key"]
    assert key.encode() not in sent and Facts.load(checkpoint).forget.fingerprint.encode() not in sent


def test_dry_run_sends_nothing(hub, checkpoint, results, capsys):
    assert push_unlearned_model(checkpoint, REPO, results=results, dry_run=True) is None
    shown = capsys.readouterr().out
    assert hub.requests == [] and "# forgets" in shown and "(private)" in shown
    assert f"{(checkpoint / 'model.safetensors').stat().st_size:,} bytes" in shown
    assert "Not uploaded: checkpoint-1, forget_hashes.json, training_args.bin, unlearning.json" in shown


def test_revision_and_pull_request(hub, checkpoint):
    push_unlearned_model(checkpoint, REPO, revision="tau0")
    assert "model.safetensors" in hub.files(REPO, "tau0") and not hub.files(REPO)
    assert 'revision="tau0"' in hub.files(REPO, "tau0")["README.md"].decode()
    info = push_unlearned_model(checkpoint, REPO, create_pr=True)
    assert info.pr_url and "model.safetensors" in hub.files(REPO, "refs/pr/1") and not hub.files(REPO)
    with pytest.raises(ValueError, match="goes to main"):
        push_unlearned_model(checkpoint, REPO, create_pr=True, revision="tau0")


def test_a_public_repository_is_written_to_only_when_asked(hub, checkpoint):
    HfApi(endpoint=hub.url, token=TOKEN).create_repo(REPO, private=False)
    with pytest.raises(ValueError, match="public, and the push is private"):
        push_unlearned_model(checkpoint, REPO)
    assert not hub.files(REPO)
    push_unlearned_model(checkpoint, REPO, private=False)
    assert "model.safetensors" in hub.files(REPO)


def test_weights_of_an_earlier_push_do_not_stay(hub, checkpoint, tokenizer):
    """A single file would be loaded instead of new shards, an adapter on top of a merged model."""
    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo(REPO, private=True)
    for name in ("adapter_config.json", "pytorch_model.bin", "model.safetensors", "notes.md"):
        api.upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id=REPO)
    load_model(str(checkpoint)).save_pretrained(checkpoint, max_shard_size="50KB")
    (checkpoint / "model.safetensors").unlink()
    push_unlearned_model(checkpoint, REPO)
    names = set(hub.files(REPO))
    assert "model.safetensors.index.json" in names and "notes.md" in names
    assert not names & {"adapter_config.json", "pytorch_model.bin", "model.safetensors"}
    torch.testing.assert_close(logits(load_model(REPO)), logits(load_model(str(checkpoint))), rtol=0, atol=0)


@pytest.mark.parametrize(
    "method, path, status, advice",
    [
        ("POST", "/api/repos/create", 401, "hf auth login"),
        ("POST", "/preupload/", 403, "may not write"),
        ("POST", "/commit/", 409, "try again"),
        ("PUT", "/lfs/", 500, "several times"),
        ("POST", "/commit/", 500, "several times"),
    ],
)
def test_errors_lose_nothing(hub, checkpoint, method, path, status, advice):
    push_unlearned_model(checkpoint, REPO)
    earlier, commits = hub.files(REPO), len(hub.repos[REPO].commits)
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({n: t + 1 for n, t in tensors.items()}, checkpoint / "model.safetensors", {"format": "pt"})
    before = tree_of(checkpoint)
    hub.fail(method, path, status)
    if path == "/api/repos/create":
        hub.fail("GET", "/api/models/", status)
    with pytest.raises(PushError, match=advice) as failure:
        push_unlearned_model(checkpoint, REPO)
    message = str(failure.value)
    assert str(status) in message and str(checkpoint) in message and TOKEN not in message
    assert hub.files(REPO) == earlier and len(hub.repos[REPO].commits) == commits and tree_of(checkpoint) == before
    uploads = len(hub.blobs)
    hub.failures.clear()
    push_unlearned_model(checkpoint, REPO)
    assert hub.files(REPO) != earlier
    assert len(hub.blobs) == uploads + (path != "/commit/"), "weights that had arrived are not sent again"


def test_a_hub_that_cannot_be_reached(hub, checkpoint):
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(PushError, match="could not be reached"):
        push_unlearned_model(checkpoint, REPO)


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
    with pytest.raises(UserError, match="--no-leak-scan"):
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


def shards_of(checkpoint):
    """The index of a checkpoint whose weights are saved in shards."""
    load_model(str(checkpoint)).save_pretrained(checkpoint, max_shard_size="50KB")
    (checkpoint / "model.safetensors").unlink()
    return json.loads((checkpoint / "model.safetensors.index.json").read_text())


@pytest.mark.parametrize(
    "name",
    [
        "/etc/hostname",
        "../secret.safetensors",
        "forget_hashes.json",
        "training_args.bin",
        "sub/model.safetensors",
        "",
        3,
    ]
    + ["optimizer.safetensors", "model.safetensors/../x", ".", "model\n.safetensors"],
)
def test_an_index_that_names_another_file(hub, checkpoint, name):
    index = shards_of(checkpoint)
    index["weight_map"]["model.norm.weight"] = name
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"its entry 'model\.norm\.weight' names"):
        push_unlearned_model(checkpoint, REPO)
    assert hub.requests == []


def test_links_and_other_files_are_not_followed(hub, checkpoint, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    names = ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"]
    names += [
        "results.json",
        "recovery.json",
        "vocab.txt",
        "additional_chat_templates/a.jinja",
        "model.safetensors.index.json",
    ]
    for name in [*names, "adapter_config.json"]:
        path = checkpoint / name
        path.parent.mkdir(exist_ok=True)
        target = tmp_path / "elsewhere" / path.name
        before = path.read_bytes() if path.exists() else None
        target.write_bytes(before or b"{}")
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        with pytest.raises(UserError, match=f"{path.name} is a (sym)?link"):
            push_unlearned_model(checkpoint, REPO)
        path.unlink()
        if before is not None:
            path.write_bytes(before)
    shutil.rmtree(checkpoint / "additional_chat_templates")
    (checkpoint / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "b.jinja").write_text("x")
    with pytest.raises(UserError, match="is a (sym)?link"):
        push_unlearned_model(checkpoint, REPO)
    (checkpoint / "additional_chat_templates").unlink()
    os.mkfifo(checkpoint / "vocab.json")
    with pytest.raises(UserError, match="no regular file"):
        push_unlearned_model(checkpoint, REPO)
    assert hub.requests == []
    (checkpoint / "vocab.json").unlink()
    (tmp_path / "outputs").symlink_to(checkpoint)
    push_unlearned_model(tmp_path / "outputs", REPO)
    assert "model.safetensors" in hub.files(REPO), "the checkpoint itself may be reached by a link"


def test_weights_that_are_not_whole(hub, checkpoint):
    path, config_path = checkpoint / "model.safetensors", checkpoint / "config.json"
    tensors, config = load_file(path), config_path.read_text()
    norm = "model.norm.weight"

    def refused(words, save=tensors, **changed):
        save_file(save, path, {"format": "pt"})
        config_path.write_text(json.dumps(json.loads(config) | changed))
        with pytest.raises(UserError, match=words):
            push_unlearned_model(checkpoint, REPO)

    refused(rf"lacks tensors .*{norm}", {name: tensor for name, tensor in tensors.items() if name != norm})
    refused("does not have: model.extra", tensors | {"model.extra": torch.zeros(2)})
    refused("other shapes", tensors | {norm: torch.zeros(7)})
    refused(r"lacks tensors .*model\.layers\.2", num_hidden_layers=3)
    refused(r"does not have: .*model\.layers\.1", num_hidden_layers=1)
    refused("holds no tensors", {})
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(UserError, match="no safetensors file"):
        push_unlearned_model(checkpoint, REPO)
    save_file(tensors, path, {"format": "pt"})
    config_path.write_text(config)
    index = shards_of(checkpoint)
    shard = checkpoint / index["weight_map"][norm]
    parts = load_file(shard)
    save_file({n: t for n, t in parts.items() if n != norm} | {"other": torch.ones(1)}, shard, {"format": "pt"})
    with pytest.raises(UserError, match=rf"{shard.name} lacks {norm}"):
        push_unlearned_model(checkpoint, REPO)
    save_file(parts | {"other": torch.ones(1)}, shard, {"format": "pt"})
    with pytest.raises(UserError, match="the index does not name, other"):
        push_unlearned_model(checkpoint, REPO)
    assert hub.requests == []


def test_adapters_that_are_not_whole(hub, rows, tokenizer, checkpoint, tmp_path):
    folder = tmp_path / "out"
    make_trainer(folder, rows, tokenizer, str(checkpoint), LoraConfig(r=4)).save_model()
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    one = sorted(tensors)[0]
    wrong = {
        "lacks": {name: tensor for name, tensor in tensors.items() if name != one},
        "does not ask for": tensors | {one.replace("layers.0", "layers.9"): tensors[one].clone()},
        "other shapes": tensors | {one: torch.zeros(3, 3)},
        "NaN": tensors | {one: torch.full_like(tensors[one], torch.nan)},
    }
    for words, content in wrong.items():
        save_file(content, path, {"format": "pt"})
        with pytest.raises(UserError, match=words):
            push_unlearned_model(folder, REPO, base_model="org/base")
    assert hub.requests == []


def test_what_looks_like_a_secret_stops_a_push(hub, checkpoint):
    secret = "hf_" + "aB3" * 11
    with pytest.raises(UserError, match="README.md holds what looks like an access token"):
        push_unlearned_model(checkpoint, REPO, description=f"as {secret}")
    content = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(content | {"nested": {"deep": [f"Bearer {secret}"]}}))
    with pytest.raises(UserError, match="config.json holds") as found:
        push_unlearned_model(checkpoint, REPO)
    assert secret not in str(found.value) and hub.requests == []


def test_weights_that_are_not_finite(hub, checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight has NaN"):
        push_unlearned_model(checkpoint, REPO)
    assert hub.requests == []


def test_a_tensor_that_is_missing(hub, checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks tensors .*model\.norm\.weight"):
        push_unlearned_model(checkpoint, REPO)
    assert hub.requests == []


def test_what_cannot_be_published(hub, checkpoint, results, tmp_path, make_model):
    with pytest.raises(FileNotFoundError, match="no folder"):
        push_unlearned_model(tmp_path / "nowhere", REPO)
    with pytest.raises(ValueError, match="ORG/NAME"):
        push_unlearned_model(checkpoint, "forgets")
    with pytest.raises(ValueError, match="keep"):
        push_unlearned_model(checkpoint, REPO, adapter="drop")
    with pytest.raises(FileNotFoundError, match="which checkpoint of MDUTrainer"):
        push_unlearned_model(make_model(), REPO)
    with pytest.raises(ValueError, match="0 runs instead of one"):
        push_unlearned_model(checkpoint, REPO, results=Results("m", "d", {}, results.runs[:1]))
    (checkpoint / "results.json").write_text(json.dumps({"schema": 2, "predictions": ["x"]}))
    with pytest.raises(ValueError, match="is not a results file"):
        push_unlearned_model(checkpoint, REPO)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"):
        push_unlearned_model(checkpoint, REPO, results=False)
    (checkpoint / "unlearning.json").unlink()
    with pytest.raises(FileNotFoundError, match="MDUTrainer writes it"):
        push_unlearned_model(checkpoint, REPO, results=False)
    assert hub.requests == []


def test_a_model_in_memory(hub, checkpoint, tokenizer):
    model = load_model(str(checkpoint)).to(torch.bfloat16)
    push_unlearned_model(model, REPO, tokenizer=tokenizer, results=False)
    assert load_model(REPO, dtype="auto").dtype == torch.bfloat16
    assert set(hub.files(REPO)) == FULL - {"results.json", "tradeoff.png"}


def test_adapters(hub, rows, tokenizer, tmp_path, capsys):
    """Kept, the repository names the base by its Hub id and commit; merged, it is a whole model."""
    base = tiny_mdlm(tokenizer, hidden_size=32, num_layers=2, num_heads=2)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# A base\n")
    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo("org/base")
    revision = api.upload_folder(repo_id="org/base", folder_path=tmp_path / "base").oid
    trainer = make_trainer(tmp_path / "out", rows, tokenizer, "org/base", LoraConfig(r=4, lora_alpha=8))
    trainer.train()
    trainer.save_model()
    expected = logits(trainer.model)

    push_unlearned_model(tmp_path / "out", REPO)
    assert set(hub.files(REPO)) == ADAPTER
    config = json.loads(hub.files(REPO)["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", revision)
    data = ModelCard(hub.files(REPO)["README.md"].decode()).data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("org/base", "adapter", "peft")
    assert (data.license, data.language) == ("apache-2.0", "en")
    assert "weights are unchanged" in hub.files(REPO)["README.md"].decode()
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load_model("org/base"), REPO)), expected)
    run_snippet(hub.files(REPO)["README.md"].decode())

    push_unlearned_model(tmp_path / "out", REPO, adapter="merge")
    assert set(hub.files(REPO)) == FULL - {"results.json", "tradeoff.png"}
    assert ModelCard(hub.files(REPO)["README.md"].decode()).data.base_model_relation == "finetune"
    torch.testing.assert_close(logits(load_model(REPO)), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_a_local_base(hub, rows, tokenizer, checkpoint, tmp_path):
    trainer = make_trainer(tmp_path / "out", rows, tokenizer, str(checkpoint), LoraConfig(r=4))
    trainer.train()
    trainer.save_model()
    with pytest.raises(ValueError, match="nobody else can load"):
        push_unlearned_model(tmp_path / "out", REPO)
    push_unlearned_model(tmp_path / "out", REPO, adapter="merge")
    torch.testing.assert_close(logits(load_model(REPO)), logits(trainer.model), rtol=1e-4, atol=1e-4)
    assert str(tmp_path).encode() not in hub.received, "no path of this machine"


def test_remote_code_is_neither_copied_nor_named(hub, rows, tmp_path):
    write_llada(tmp_path / "llada")
    texts = [rows_.map(lambda row: {k: row[k][0]["content"] for k in row}) for rows_ in rows]
    trainer = MDUTrainer(str(tmp_path / "llada"), MDUConfig(str(tmp_path / "out"), **QUICK, max_length=96), *texts)
    trainer.train()
    trainer.save_model()
    assert "auto_map" in json.loads((tmp_path / "out" / "config.json").read_text())
    push_unlearned_model(tmp_path / "out", REPO)
    assert not [name for name in hub.files(REPO) if name.endswith(".py")]
    assert b"auto_map" not in hub.files(REPO)["config.json"] + hub.files(REPO)["tokenizer_config.json"]
    torch.testing.assert_close(logits(load_model(REPO)), logits(trainer.model), rtol=0, atol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text()) | {"model_type": "other"}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="needs code"):
        prepare(tmp_path / "out")


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_trainer_pushes_through_the_list(hub, rows, tokenizer, tmp_path, strategy):
    options = {"push_to_hub": True, "hub_model_id": REPO, "hub_strategy": strategy, "hub_token": TOKEN}
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 2}
    trainer = make_trainer(tmp_path / "out", rows, tokenizer, hub_always_push=True, **options, **saving)
    assert hub.repos[REPO].private
    trainer.train()
    during = set(hub.files(REPO))
    trainer.push_to_hub(description="two authors who do not exist")
    model_files = FULL - {"results.json", "tradeoff.png"}
    copies = {"checkpoint": ["last-checkpoint"], "all_checkpoints": ["checkpoint-1", "checkpoint-2"]}.get(strategy, [])
    expected = model_files | {f"{folder}/{name}" for folder in copies for name in model_files - {"README.md"}}
    assert set(hub.files(REPO)) == expected and during == (set() if strategy == "end" else expected)
    assert "two authors who do not exist" in hub.files(REPO)["README.md"].decode()
    assert TOKEN.encode() not in b"".join(hub.bodies) and not list((tmp_path / "out").glob(".push*"))
    torch.testing.assert_close(logits(load_model(REPO)), logits(trainer.model), rtol=0, atol=0)


def test_a_failed_push_costs_no_training(hub, rows, tokenizer, tmp_path, caplog):
    options = {
        "push_to_hub": True,
        "hub_model_id": REPO,
        "hub_token": TOKEN,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    trainer = make_trainer(tmp_path / "out", rows, tokenizer, **options)
    hub.fail("POST", "/commit/", 403)
    with caplog.at_level("ERROR"):
        trainer.train()
    assert (tmp_path / "out" / "checkpoint-1" / "model.safetensors").is_file()
    with pytest.raises(PushError, match="may not write"):
        trainer.save_model()


def test_unknown_details_are_named_before_anything_is_done(hub, checkpoint, rows, tokenizer, tmp_path):
    trainer = make_trainer(tmp_path / "out", rows, tokenizer)
    for publish in (
        lambda **details: push_unlearned_model(checkpoint, REPO, **details),
        lambda **details: write_model_card(checkpoint, **details),
        trainer.create_model_card,
        trainer.push_to_hub,
    ):
        with pytest.raises(TypeError, match="Unknown details of a card: licence, tag. There are repo_id"):
            publish(licence="mit", tag="x")
    assert (
        hub.requests == []
        and not (tmp_path / "out" / "model.safetensors").exists()
        and not (checkpoint / "README.md").exists()
    )


def test_create_model_card_of_the_trainer(rows, tokenizer, tmp_path):
    trainer = make_trainer(tmp_path / "out", rows, tokenizer, forget_description="two fictional authors")
    trainer.save_model()
    trainer.create_model_card(license="mit", tags="demo", base_model="org/base")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit" and "demo" in card.data.tags and card.data.base_model == "org/base"
    assert "two fictional authors (16 rows), while keeping: an unnamed data set (80 rows)" in card.text


def test_command_line(checkpoint, results, tmp_path):
    results.save(tmp_path / "results.json")
    with HubServer() as server:
        environment = {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}

        def publish(*arguments):
            command = [sys.executable, str(ROOT / "examples" / "publish.py"), str(checkpoint), *arguments]
            return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)

        run = publish(REPO, "--results", str(tmp_path / "results.json"))
        assert run.returncode == 0, run.stderr[-2000:]
        assert run.stdout.strip().endswith(server.repos[REPO].refs["main"]) and set(server.files(REPO)) == FULL
        run = publish("no-organisation")
        assert run.returncode == 2 and "ORG/NAME" in run.stderr and "Traceback" not in run.stderr
