"""Publishing, with the real client against a Hub on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_checkpoints import ADAPTER, FULL, PLANTED, QUICK, REPO, forget_text, logits, make_trainer, prepare, tree_of
from hub_server import TOKEN, HubServer
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, PeftModel
from published import write_llada
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mdu_trainer import MDUConfig, MDUTrainer, load_model, load_tokenizer
from mdu_trainer.attacks.results import Recovery
from mdu_trainer.evaluation.results import Results
from mdu_trainer.hub.push import PushError, push_unlearned_model
from mdu_trainer.provenance.facts import Facts
from mdu_trainer.report.model_card import write_model_card
from mdu_trainer.testing import tiny_mdlm

ROOT = Path(__file__).resolve().parents[2]


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
