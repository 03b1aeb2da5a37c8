"""Several processes do what one does: DDP and FSDP2 on the CPU with gloo. ZeRO needs a GPU; its branches are asked."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm
import yaml
from distributed_worker import CASES, run

from mdu_trainer.trainer.distributed import DistributedBackend

ROOT = Path(__file__).resolve().parents[2]
FULL, LORA = list(CASES), ["mdu tau=0 + lora", "mdu tau=.5 + lora", "npo + lora"]
TOLERANCE = 1e-4  # of the distance that the weights have moved: float32 sums in another order


def launch(folder, backend, cases):
    worker = ROOT / "tests" / "distributed_worker.py"
    done = warm.run_together([sys.executable, worker, folder, backend, *cases], cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return {case: torch.load(folder / f"{backend} {case}.pt") for case in cases}


def check(one, two):
    moved = sum((one["weights"][n] - p).square().sum() for n, p in one["start"].items()).sqrt()
    differ = sum((one["weights"][n] - two["weights"][n]).square().sum() for n in one["start"]).sqrt()
    assert moved > 1e-3 and differ < TOLERANCE * moved, (moved, differ)
    assert one["start"].keys() == two["weights"].keys()
    for name in one["start"]:
        assert not torch.equal(one["weights"][name], one["start"][name]), name
    for figures in ("logs", "metrics"):
        assert two[figures] == pytest.approx(one[figures], rel=1e-3, abs=1e-5), figures


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The run of one process, by case."""
    folder, results = tmp_path_factory.mktemp("one"), {}

    def result(case):
        if case not in results:
            results[case] = run(folder, "ddp", case)
        return results[case]

    return result


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("ddp"), "ddp", FULL + LORA)


@pytest.mark.parametrize("case", FULL + LORA)
def test_ddp(one_process, ddp, case):
    check(one_process(case), ddp[case])


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("fsdp2"), "fsdp2", FULL + LORA)


@pytest.mark.parametrize("case", FULL + LORA)
def test_fsdp2(one_process, fsdp2, case):
    check(one_process(case), fsdp2[case])
    assert fsdp2[case]["sharded"] > 0


def fake(fsdp=None, zero_stage=None):
    deepspeed = zero_stage and SimpleNamespace(zero_stage=zero_stage)
    state = SimpleNamespace(fsdp_plugin=fsdp, deepspeed_plugin=deepspeed)
    return SimpleNamespace(state=state, device=torch.device("cpu"))


def plugin(**kwargs):
    defaults = {"fsdp_version": 2, "transformer_cls_names_to_wrap": None, "cpu_ram_efficient_loading": False}
    return SimpleNamespace(**(defaults | kwargs))


def test_layers_are_wrapped_unless_the_user_says_which():
    ours, theirs = plugin(), plugin(transformer_cls_names_to_wrap=["Block"])
    DistributedBackend(fake(ours), "LlamaDecoderLayer")
    DistributedBackend(fake(theirs), "LlamaDecoderLayer")
    assert ours.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"]
    assert theirs.transformer_cls_names_to_wrap == ["Block"]


@pytest.mark.parametrize(("stage", "shards"), [(None, False), (1, False), (2, False), (3, True)])
def test_zero_shards_weights_at_stage_three(stage, shards):
    assert DistributedBackend(fake(zero_stage=stage)).shards is shards


def test_fsdp1_is_refused():
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        DistributedBackend(fake(plugin(fsdp_version=1)))


def test_anchors_of_a_model_that_was_loaded_in_pieces_are_refused(model):
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading: false"):
        DistributedBackend(fake(plugin(cpu_ram_efficient_loading=True))).place_whole(model)
    next(model.parameters()).ds_id = 0
    with pytest.raises(ValueError, match="zero3_init_flag: false"):
        DistributedBackend(fake(zero_stage=3)).place_whole(model)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3", "ddp_cpu"])
def test_configs_are_read_by_accelerate(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = ROOT / "examples" / "accelerate_configs" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "ddp_cpu": "MULTI_CPU"}
    assert str(config.distributed_type).endswith(kinds[name])
    raw = yaml.safe_load(path.read_text())
    if name == "fsdp2":
        assert raw["fsdp_config"]["fsdp_version"] == 2
        assert "fsdp_transformer_layer_cls_to_wrap" not in raw["fsdp_config"], "the backbone knows it"
    if name.startswith("zero"):
        assert raw["deepspeed_config"]["zero_stage"] == int(name[-1])
