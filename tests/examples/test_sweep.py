"""The sweep, run as a user runs it, and killed as machines kill it."""

import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import warm
import yaml
from trl import ModelConfig

from mdu_trainer import MDUConfig, MDUTrainer
from mdu_trainer.commands.options import OptionParser
from mdu_trainer.commands.training import unlearn
from mdu_trainer.evaluation.frontier import frontier_cells, select
from mdu_trainer.evaluation.results import Results, markdown_table
from mdu_trainer.files import UserError
from mdu_trainer.provenance.facts import Facts
from mdu_trainer.report.model_card import chosen_run
from mdu_trainer.testing import fictional_authors, forget_retain_split

ROOT = Path(__file__).resolve().parents[2]
GRID = [
    *("--loss_type", "npo", "mdu", "--learning_rate", "1e-3", "1e-2", "--max_steps", "2"),
    *("--tau", "0", "--select", "retain>=0*base"),
]
QUICK = [
    *("--finetune_epochs", "1", "--hidden_size", "32", "--num_layers", "2", "--metrics", "rougeL", "probability"),
    *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--logging_steps", "1"),
    *("--max_eval_rows", "2", "--likelihood_draws", "2", "--decoding_steps", "4", "--save_strategy", "no"),
    *("--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"),
]
NAMES = [f"{method}-lr{rate}-steps2-seed42" for method in ("npo", "mdu-tau0") for rate in (0.001, 0.01)]


SCRIPT = [sys.executable, ROOT / "examples" / "sweep.py"]


def sweep(*arguments, expect=0):
    run = warm.run([*SCRIPT, *arguments], cwd=ROOT, timeout=280)
    assert run.returncode == expect, run.stderr[-3000:]
    return run.stdout + run.stderr


def trainings(log):
    return re.findall(r"^unlearning (\S+): 2 steps$", log, re.M)


def figures(folder):
    """The results without seconds and folders."""
    content = json.loads((folder / "results.json").read_text())
    content["settings"].pop("output_dir")
    return content | {"runs": [{k: v for k, v in run.items() if "seconds" not in k} for run in content["runs"]]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep that nothing disturbs."""
    folder = tmp_path_factory.mktemp("sweep") / "whole"
    return folder, sweep("--output_dir", folder, *GRID, *QUICK)


@pytest.fixture
def script(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import sweep

    return sweep


def test_output(whole):
    folder, log = whole
    assert trainings(log) == NAMES
    results = Results.load(folder / "results.json")
    assert [run.name for run in results.runs] == [
        "base",
        *(f"{m} lr={rate}" for m in ("npo", "mdu tau=0") for rate in ("0.001", "0.01")),
    ]
    chosen = select(results.runs, "retain>=0*base")
    assert markdown_table(frontier_cells(results, chosen)) in log and f"Selected: {chosen.name}, in {folder}" in log
    assert "No never-trained model was scored, so a lower forget score counts as better" in log
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (folder / "frontier.svg").read_text()
    for name, run in zip(NAMES, results.runs[1:], strict=True):
        training = Facts.load(folder / name).training
        assert training["learning_rate"] == run.settings["learning_rate"] and training["steps"] == 2
        assert chosen_run(results, Facts.load(folder / name)) == run, "which the card is about"
        card = (folder / name / "README.md").read_text()
        assert run.name in card and str(run.figure("forget", "probability")) in card


def test_killed_in_the_middle_and_started_again(whole, tmp_path):
    """No finished run is trained again, and the results are those of a sweep that nothing disturbed."""
    folder, log = tmp_path / "killed", tmp_path / "log.txt"
    with warm.started([*SCRIPT, "--output_dir", folder, *GRID, *QUICK], log, cwd=ROOT) as (process,):
        while f"\nunlearning {NAMES[2]}:" not in log.read_text():  # the third of four has begun
            assert process.is_alive(), log.read_text()[-3000:]
            time.sleep(0.002)
    assert process.exitcode == -signal.SIGKILL and trainings(log.read_text()) == NAMES[:3]
    finished = [run.name for run in Results.load(folder / "results.json").runs]
    assert len(finished) == 1 + 2, "the results of the finished runs were written"
    weights = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    assert len(weights) == 1 + 2
    after = sweep("--output_dir", folder, *GRID, *QUICK, "--resume")
    assert trainings(after) == NAMES[2:] and "fine-tuning" not in after
    assert all(path.stat().st_mtime_ns == written for path, written in weights.items())
    assert figures(folder) == figures(whole[0])


def test_more_values_later(whole, tmp_path, script):
    """A resumed sweep may have other values: what is there is taken over, and named as the new sweep names it."""
    folder = shutil.copytree(whole[0], tmp_path / "more")
    options = yaml.safe_load((folder / "config.yaml").read_text()) | {"output_dir": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    other = [*GRID, *("--learning_rate", "1e-2", "--loss_type", "mdu", "--seed", "42", "7", "--select", "retain>=2")]
    log = sweep("--output_dir", folder, *other, *QUICK, "--resume", expect=2)
    assert trainings(log) == ["mdu-tau0-lr0.01-steps2-seed7"]
    assert "No run satisfies retain>=2. The nearest is mdu tau=" in log.splitlines()[-1]
    first, second = (Results.load(path / "results.json").runs for path in (whole[0], folder))
    assert [run.name for run in second] == ["base", "mdu tau=0 seed=42", "mdu tau=0 seed=7"]
    assert second[1].scores == first[4].scores != second[2].scores
    with pytest.raises(UserError, match="not of this command"):  # the base is of the first seed
        in_process(script, "--output_dir", folder, *other, *QUICK, "--resume", "--seed", "7")


def in_process(script, *arguments):
    """The command in this process: for what stops before any work."""
    parser = OptionParser((script.SweepArguments, script.SweepConfig, ModelConfig))
    script.main(*parser.parse_args_and_config([str(argument) for argument in arguments]))


def test_run_that_left_checkpoints_goes_on_from_the_last(monkeypatch, tmp_path, tokenizer, make_model):
    for part in (make_model(), tokenizer):
        part.save_pretrained(tmp_path / "base")
    forget, retain = (rows.select(range(4)) for rows in forget_retain_split(fictional_authors(3), 1))
    kept = {"save_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "logging_steps": 1}
    config = MDUConfig(str(tmp_path / "run"), max_steps=4, use_cpu=True, report_to="none", disable_tqdm=True, **kept)
    steps, step = [], MDUTrainer.training_step

    def counted(trainer, *arguments):
        steps.append(trainer.state.global_step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(trainer, *arguments)

    monkeypatch.setattr(MDUTrainer, "training_step", counted)
    with pytest.raises(KeyboardInterrupt):
        unlearn(config, str(tmp_path / "base"), ModelConfig(), forget, retain)
    unlearn(config, str(tmp_path / "base"), ModelConfig(), forget, retain)
    assert steps == [0, 1, 2, 3] + [2, 3]


def test_every_combination_is_a_run(script, tmp_path):
    axes = {"learning_rate": [1e-5, 3e-5], "num_train_epochs": [1.0, 2.5], "seed": 3}
    config = script.SweepConfig(output_dir=str(tmp_path), loss_type=["mdu", "ga"], tau=[0.0, 0.5], **axes)
    names = [Path(run.output_dir).name for run in config.runs()]
    assert len(names) == len(set(names)) == 2 * 2 * (2 + 1)
    assert names[0] == "mdu-tau0-lr1e-05-epochs1-seed3" and names[-1] == "ga-lr3e-05-epochs2.5-seed3"
    assert config.swept(config.runs()[-1]) == {"learning_rate": 3e-5, "num_train_epochs": 2.5}


def test_masks_and_anchors_are_swept_where_they_are_read(script, tmp_path):
    axes = {"forget_masking": ["random", "content"], "anchor_source": ["initial", "ema", "some-org/model"]}
    shared = {"output_dir": str(tmp_path), "max_steps": 2, "preset": ["lasting"]}
    config = script.SweepConfig(loss_type=["mdu", "ga"], tau=[0.0, 0.5], **axes, **shared)
    runs = config.runs()
    names = [Path(run.output_dir).name.replace("-lr1e-05-steps2-seed42", "") for run in runs]
    anchored = ["", "-anchorema", "-anchorsome-org_model"]
    assert names == [
        *(f"mdu-tau0{masks}" for masks in ("", "-maskscontent")),
        *(f"mdu-tau0.5{masks}{anchor}" for masks in ("", "-maskscontent") for anchor in anchored),
        *(f"{name}{masks}" for name in ("ga", "mdu-lasting") for masks in ("", "-maskscontent")),
    ]
    assert config.swept(runs[-1])["forget_masking"] == "content" and runs[-1].anchor_input == "counterfactual"
    assert runs[4].anchor_source == "some-org/model" and runs[-1].anchor_source == "initial"


def test_sweep_over_masks_and_anchors(script):
    parser = OptionParser((script.SweepArguments, script.SweepConfig, ModelConfig))
    masks = str(ROOT / "examples" / "configs" / "masks.yaml")
    _, config, _ = parser.parse_args_and_config(["--config", masks])
    runs = config.runs()
    assert len(runs) == 3 * (3 + 4 * 3 * 2)
    assert all((run.rollout_every == 3) == (run.forget_masking == "generated") for run in runs)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (("--select", "retain>0.9"), "--select: 'retain>0.9' is no condition"),
        (("--max_steps", "2", "-1"), "--max_steps must be positive, got 2 -1"),
        (("--tau", "0", "0.5", "0.0"), "--tau names value 3 twice"),
        (("--select", "retain.truth>=0.9"), "--select: retain.truth is not measured here"),
        (("--select", "forget_quality>=0.1"), "forget_quality is not measured here"),
        (("--metrics", "probability", "--select", ""), "--select: forget is not measured here"),
        (("--max_steps", "2", "--num_train_epochs", "1", "2"), "Sweep over --max_steps or over --num_train_epochs"),
    ],
)
def test_wrong_values_stop_before_any_work(script, tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        in_process(script, "--output_dir", tmp_path / "out", *GRID, *QUICK, *wrong)
    assert not (tmp_path / "out").exists()
