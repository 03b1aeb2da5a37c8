"""Weights that are not whole or not finite, and files that lie elsewhere, are not published."""

import json
import os
import shutil

import pytest
import torch
from hub_checkpoints import REPO, make_trainer
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from mdu_trainer import load_model
from mdu_trainer.files import UserError
from mdu_trainer.hub.push import push_unlearned_model


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
