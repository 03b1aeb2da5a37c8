"""Checkpoints that lie: what is damaged, incomplete or of another kind is refused at load, by name."""

import json
import re
import shutil

import pytest
import torch
from peft import (
    LoraConfig,
)
from published import write_llada
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    StableLmConfig,
    StableLmForCausalLM,
)
from trl import ModelConfig

from mdu_trainer import resolve_backbone
from mdu_trainer.commands import loading
from mdu_trainer.commands.leak_check import main as leak_check
from mdu_trainer.files import UserError
from mdu_trainer.models import load_checkpoint, load_model
from mdu_trainer.models.__main__ import main as describe
from mdu_trainer.models.loading import check_tensors

WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
HERE = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
OFFLOADED = dict.fromkeys(HERE, "cpu") | {"model.layers.1": "disk"}


def rewrite(path, change):
    tensors = load_file(path)
    changed = change(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, path, metadata={"format": "pt"})


def edit_config(folder, name="config.json", **values):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- weights ---


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_no_numbers(folder, value, dtype):
    name = "model.layers.1.mlp.up_proj.weight"

    def damage(tensors):
        tensors[name].view(-1)[7] = value
        return {key: tensor.to(dtype) for key, tensor in tensors.items()}

    rewrite(folder / WEIGHTS, damage)
    for load in (load_model, load_checkpoint):
        with pytest.raises(UserError, match=f"NaN or infinite: {name}"):
            load(str(folder))


def test_every_command_refuses_them(folder, authors, make_trainer, tmp_path, capsys, monkeypatch):
    rewrite(folder / WEIGHTS, lambda tensors: tensors["lm_head.weight"].fill_(float("nan")))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": authors["question"][0], "answer": authors["answer"][0]}))
    with pytest.raises(SystemExit) as stopped:
        leak_check(["--model", str(folder), "--forget", str(rows), "--max-leak", "0.5"])
    assert stopped.value.code == 2 and "NaN or infinite: lm_head.weight" in capsys.readouterr().err
    with pytest.raises(UserError, match="NaN or infinite: lm_head.weight"):
        make_trainer(str(folder))
    # the scripts load through one function; the push has a test of its own
    with pytest.raises(UserError, match="NaN or infinite: lm_head.weight"):
        loading.load(str(folder), ModelConfig())


def test_a_live_model_with_such_weights_is_not_trained(make_model, make_trainer):
    model = make_model()
    model.lm_head.weight.data[3, 3] = float("nan")
    with pytest.raises(UserError, match="NaN or infinite: lm_head.weight"):
        make_trainer(model)


SPLIT = [{"distributed_config": object()}, {"tp_plan": "auto"}, {"tp_size": 2}]


@pytest.mark.parametrize("how", SPLIT, ids=lambda how: next(iter(how)))
def test_layers_are_not_split_over_devices(how, folder, make_trainer, make_model):
    name = next(iter(how))
    for load in (load_model, load_checkpoint):
        with pytest.raises(UserError, match=f"{name}: a model whose layers are split over devices .* Leave it out"):
            load(str(folder), **how)
    with pytest.raises(UserError, match="split over devices"):
        make_trainer(str(folder), model_init_kwargs=how)
    model = make_model()
    model.config.distributed_config = object()
    with pytest.raises(UserError, match="split over devices"):
        make_trainer(model)


@pytest.mark.parametrize("how", [{"load_in_8bit": True}, {"load_in_4bit": True}, {"device_map": OFFLOADED}])
def test_quantised_and_offloaded_weights_are_looked_at_too(how, make_model, tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = tmp_path / "wide"  # 4 bit takes blocks of 64 weights of a row, on processors that compute with them
    make_model(hidden_size=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    how = how | {"offload_folder": str(tmp_path / "offloaded")}
    load_checkpoint(str(folder), **how)
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder / WEIGHTS, lambda tensors: tensors[name].view(-1)[7].fill_(float("nan")))
    with pytest.raises(UserError, match=f"NaN or infinite: {name}"):
        load_checkpoint(str(folder), **how)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.norm.weight"), "lacks tensors.*model.norm.weight"),
        (lambda t: t.pop("lm_head.weight"), "lacks tensors.*lm_head.weight"),
        (
            lambda t: {k: v for k, v in t.items() if ".1." not in k},
            r"lacks tensors.*model.layers.1.input_layernorm.weight, .* and \d more.*more layers",
        ),
        (
            lambda t: t | {k.replace(".1.", ".2."): v.clone() for k, v in t.items() if ".1." in k},
            "does not have: model.layers.2.*fewer layers",
        ),
        (lambda t: t | {"lm_head.bias": torch.zeros(1)}, "does not have: lm_head.bias"),
        (
            lambda t: t | {"model.norm.weight": torch.ones(7)},
            r"of other shapes .*: model.norm.weight \(7,\) instead of \(32,\)",
        ),
    ],
)
def test_tensors_missing_or_left_over(folder, change, message):
    check_tensors(str(folder))
    rewrite(folder / WEIGHTS, change)
    for load in (load_model, check_tensors):
        with pytest.raises(UserError, match=message):
            load(str(folder))


def test_heads_and_poolers_of_other_tasks_are_no_fault(tmp_path):
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = BertForPreTraining(config)
    model.save_pretrained(tmp_path / "pretraining")
    edit_config(tmp_path / "pretraining", architectures=["BertForMaskedLM"])
    loaded = load_model(str(tmp_path / "pretraining"))
    assert type(loaded) is BertForMaskedLM
    torch.testing.assert_close(
        loaded.cls.predictions.transform.dense.weight, model.cls.predictions.transform.dense.weight
    )
    # without a head it would be drawn at random
    BertModel(config).save_pretrained(tmp_path / "headless")
    edit_config(tmp_path / "headless", architectures=["BertForMaskedLM"])
    with pytest.raises(UserError, match="lacks tensors of its BertForMaskedLM.*cls.predictions"):
        load_model(str(tmp_path / "headless"))


def test_a_file_of_weights_that_is_cut_short(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="weights of .* cannot be read"):
        load_model(str(folder))


# --- files that lie elsewhere ---


@pytest.mark.parametrize(
    "entry", ["/etc/hostname", "../outside.safetensors", "forget_hashes.json", "training_args.bin", 7]
)
def test_an_index_names_shards_in_the_folder_only(entry, tmp_path):
    write_llada(tmp_path / "model", shards=2)
    shutil.copy(tmp_path / "model" / "model-00001-of-00002.safetensors", tmp_path / "outside.safetensors")
    index = tmp_path / "model" / f"{WEIGHTS}.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.transformer.ln_f.weight"] = entry
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="not an index" if entry == 7 else f"names '{entry}'"):
        load_model(str(tmp_path / "model"))


def test_a_shard_that_is_not_there(tmp_path):
    write_llada(tmp_path, shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="names 'model-00002-of-00002.safetensors', which is not there"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "notes.txt"])
def test_symlinks_out_of_the_folder(folder, name, tmp_path):
    outside = tmp_path / "elsewhere"
    if (folder / name).exists():
        (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(UserError, match=f"{name} is a symlink that leads out"):
        load_model(str(folder))


def test_symlinks_in_the_cache_of_the_hub(folder, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "123", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    model, _ = load_checkpoint(str(snapshot))
    stored = load_file(blobs / "model.safetensors")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in stored.items())


# --- model and tokenizer ---


def test_a_tokenizer_that_does_not_fit(folder, make_model, tokenizer):
    smaller = make_model(vocab_size=len(tokenizer) - 3)
    smaller.save_pretrained(folder)
    with pytest.raises(UserError, match=f"has {len(tokenizer)} tokens, the embedding {len(tokenizer) - 3} rows"):
        load_checkpoint(str(folder))


def test_a_tokenizer_without_a_mask_token(folder):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("mask_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    edit_config(folder, mask_token_id=None)
    with pytest.raises(UserError, match="no mask token"):
        load_checkpoint(str(folder))


# --- direction ---


def test_a_decoder_that_does_not_read_is_causal(tmp_path, tokenizer):
    config = StableLmConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=32, is_causal=False,
    )  # fmt: skip
    model = StableLmForCausalLM(config)
    with pytest.raises(UserError, match="StableLmForCausalLM .*causal language model, whatever its config says"):
        resolve_backbone(model, tokenizer)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'stablelm'.*does not read is_causal"):
        load_model(str(tmp_path))


def test_a_live_decoder_that_attends_both_ways_needs_no_word_in_its_config(make_model, tokenizer):
    from transformers import BertLMHeadModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)
    assert resolve_backbone(BertLMHeadModel(config).eval(), tokenizer).name == "bidirectional"
    causal = make_model(is_causal=True)
    with pytest.raises(UserError, match="causal"):
        resolve_backbone(causal, tokenizer)
    causal.config.is_causal = False  # what was found to be causal is tried again
    assert resolve_backbone(causal, tokenizer).name == "bidirectional"


def test_probing_leaves_modes_and_random_numbers_alone(make_model, tokenizer):
    model = make_model(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    resolve_backbone(model, tokenizer)
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    with torch.device("meta"):  # no weights to try: the config is believed
        assert resolve_backbone(make_model().to("meta"), tokenizer).name == "bidirectional"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probing_in_half_precision(folder, dtype):
    assert load_checkpoint(str(folder), dtype=dtype)[0].dtype == dtype


# --- adapters ---


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop(min(t)), "lacks tensors that its config asks for"),
    (lambda t: t | {min(t).replace(".0.", ".7."): torch.ones(2, 32)}, "tensors too many"),
    (lambda t: t[min(t)].fill_(float("nan")), "NaN or infinite"),
])  # fmt: skip
def test_damaged_adapters(adapter, change, message):
    rewrite(adapter / ADAPTER, change)
    with pytest.raises(UserError, match=message):
        load_checkpoint(str(adapter))


def test_an_adapter_without_weights(adapter):
    (adapter / ADAPTER).unlink()
    with pytest.raises(UserError, match="has no adapter_model.safetensors"):
        load_checkpoint(str(adapter))


# --- precision ---


def test_all_weights_of_a_half_precision_checkpoint_train_in_float32(folder, make_model, make_trainer, monkeypatch):
    make_model().to(torch.bfloat16).save_pretrained(folder)
    said = []
    monkeypatch.setattr("mdu_trainer.trainer.loading.logger.warning", said.append)
    assert make_trainer(str(folder)).model.dtype == torch.float32 and not said
    assert make_trainer(str(folder), peft_config=LoraConfig(r=2)).model.dtype == torch.bfloat16 and not said
    insisting = make_trainer(str(folder), model_init_kwargs={"dtype": "bfloat16"})
    assert insisting.model.dtype == torch.bfloat16 and "94 % in float32" in said.pop()
    make_trainer(load_model(str(folder)))
    assert "All weights are trained in bfloat16" in said.pop()


# --- python -m mdu_trainer.models ---


def test_an_adapter_is_described_with_its_base(adapter, folder, capsys):
    assert describe([str(adapter)]) == 0
    printed = capsys.readouterr().out
    assert f"LORA, on {folder}" in printed and "LlamaDecoderLayer" in printed


MALFORMED = {
    "{": "not a valid JSON",
    "[]": "cannot be read",
    "null": "cannot be read",
    "{}": "model_type",
    '{"model_type": 5}': "model_type is of the wrong type",
    '{"model_type": ["llama"]}': "model_type is of the wrong type",
    '{"model_type": "llama", "architectures": "LlamaForCausalLM"}': "architectures is of the wrong type",
    '{"model_type": "llama", "architectures": [3]}': "architectures is of the wrong type",
    '{"model_type": "llama", "auto_map": []}': "auto_map is of the wrong type",
    '{"model_type": "llama", "is_causal": false, "hidden_size": -32}': "hidden_size",
    '{"model_type": "llama", "is_causal": false, "hidden_size": "wide"}': "hidden_size",
    '{"model_type": "llama", "is_causal": false, "num_hidden_layers": 0}': "num_hidden_layers=0",
    '{"model_type": "llama", "is_causal": false, "num_attention_heads": 0}': "num_attention_heads",
    '{"model_type": "llama", "is_causal": false, "vocab_size": 1.5}': "vocab_size",
    '{"model_type": "llama", "is_causal": false, "mask_token_id": "[MASK]"}': "mask_token_id='\\[MASK\\]'",
    '{"model_type": "llama", "is_causal": false, "mask_token_id": -1}': "mask_token_id|mask token id",
    '{"model_type": "gpt2", "is_causal": false, "n_layer": -1}': "num_hidden_layers=-1",
    '{"model_type": "bert", "hidden_size": 30, "num_attention_heads": 4}': "multiple of|built from this config",
    '{"model_type": "llada", "n_heads": "many"}': "config.json",
    '{"model_type": "llada", "mlp_ratio": "big"}': "config.json",
}


@pytest.mark.parametrize("config", MALFORMED)
def test_malformed_configs_end_in_one_line(config, folder, capsys):
    (folder / "config.json").write_text(config)
    assert describe([str(folder)]) == 1
    name, line = capsys.readouterr().out.strip().splitlines()
    assert name == str(folder) and "no: " in line
    assert re.search(MALFORMED[config], line), line


def test_what_is_no_checkpoint_ends_in_one_line(adapter, folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "tokenizer.json").write_text('{"model": 3}')
    edited = {"json": "{", "kind": '{"peft_type": "NOVEL"}', "base": '{"peft_type": "LORA"}'}
    places = [tmp_path / "empty", tmp_path / "nowhere", folder / "config.json", broken]
    for name, content in edited.items():
        places.append(tmp_path / name)
        shutil.copytree(adapter, places[-1])
        (places[-1] / "adapter_config.json").write_text(content)
    for place in places:
        assert describe([str(place)]) == 1
        assert len(capsys.readouterr().out.strip().splitlines()) == 2, place
