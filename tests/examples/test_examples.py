"""The scripts, run as a user runs them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm
import yaml
from published import write_dream, write_llada
from safetensors import safe_open

from mdu_trainer import load_model
from mdu_trainer.evaluation.frontier import reading
from mdu_trainer.evaluation.results import Results

ROOT = Path(__file__).resolve().parents[2]
QUICK = [
    *("--max_steps", "2", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"),
    *("--max_eval_rows", "2", "--likelihood_draws", "2", "--decoding_steps", "4", "--logging_steps", "1"),
    *("--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"),
]
FIGURES = {"rougeL_recall", "rougeL_f1", "probability", "truth_ratio", "degeneracy"}


def tofu(*arguments, expect=0):
    return script("tofu.py", *arguments, expect=expect)


def script(name, *arguments, expect=0):
    run = warm.run([sys.executable, ROOT / "examples" / name, *arguments], cwd=ROOT, timeout=280)
    assert run.returncode == expect, run.stderr[-3000:]
    return run.stdout + run.stderr


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """One quick comparison of two methods on the embedded default."""
    folder = tmp_path_factory.mktemp("tofu") / "out"
    small = ("--finetune_epochs", "3", "--hidden_size", "32", "--num_layers", "2")
    secret = ("--hub_token", "hf_planted")
    log = tofu(
        "--output_dir", folder, *small, "--loss_type", "npo", "mdu", "dpo", "--tau", "0", "0.5", *secret, *QUICK
    )
    return folder, log


def test_output(compared):
    folder, log = compared
    results = json.loads((folder / "results.json").read_text())
    assert results["schema"] == 3 and results["model"] and results["dataset"] and results["settings"]
    assert [(run["method"], run["tau"]) for run in results["runs"]] == [
        ("base", None),
        ("retain model", None),
        ("npo", None),
        ("mdu", 0.0),
        ("mdu", 0.5),
        ("dpo", None),
        ("mdu", 1.0),  # the preset's
    ]
    for run in results["runs"]:
        for name in ("forget", "retain"):
            assert set(run["scores"][name]) == FIGURES and run["rows"][name] == 2
        compared_with_it = set() if run["method"] == "retain model" else {"forget_quality"}
        assert set(run["summary"]) == {"model_utility", "utility_score"} | compared_with_it
        assert run["eval_seconds"] > 0 and (run["train_seconds"] > 0) == (run["method"] in ("npo", "mdu", "dpo"))
    comparison = Results.load(folder / "results.json")
    assert f"{comparison.table()}\n\n{reading(comparison.runs)}" in log and "| to never-trained |" in log
    assert re.search(rf"^page +{folder / 'report.html'}$", log, re.M)
    assert "Did it work?" in (folder / "report.html").read_text()
    written = [path.read_text() for path in folder.rglob("*") if path.suffix in (".json", ".yaml", ".md")]
    assert written and not any("hf_planted" in text for text in [*written, log])
    for name in ("tradeoff.png", "losses.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    for name in ("base", "npo", "mdu-tau0", "mdu-tau0.5", "dpo"):
        assert load_model(str(folder / name)).config.is_causal is False
    for name in ("npo", "mdu-tau0", "mdu-tau0.5", "dpo"):
        assert "| forget | rougeL_recall" in (folder / name / "README.md").read_text()


def test_folder_is_not_overwritten_unless_asked(compared):
    folder, _ = compared
    before = (folder / "results.json").read_bytes()
    assert "is not empty" in tofu("--output_dir", folder, *QUICK, expect=2)
    own = ("--model_name_or_path", folder / "base", "--overwrite_output_dir")
    assert "would overwrite" in tofu("--output_dir", folder, *own, *QUICK, expect=2)
    assert "nothing_like_it" in tofu(
        *("--output_dir", folder, "--overwrite_output_dir", "--dataset_name", "nothing_like_it"), *QUICK, expect=2
    )
    assert (folder / "results.json").read_bytes() == before and (folder / "base" / "config.json").is_file()


def test_config_repeats_the_run(compared, tmp_path):
    folder, _ = compared
    assert yaml.safe_load((folder / "config.yaml").read_text())["loss_type"] == ["npo", "mdu", "dpo"]
    tofu("--config", folder / "config.yaml", "--output_dir", tmp_path / "again")
    first, again = (Results.load(path / "results.json").runs for path in (folder, tmp_path / "again"))
    assert [(run.name, run.scores, run.summary) for run in first] == [
        (run.name, run.scores, run.summary) for run in again
    ]


def test_two_processes_do_what_one_does(compared, tmp_path):
    """Two processes on the CPU: half the batch each, the same update."""
    folder, _ = compared
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    run = subprocess.run(
        [sys.executable, *launch, str(ROOT / "examples" / "tofu.py"), "--config", str(folder / "config.yaml")]
        + ["--output_dir", str(tmp_path / "two"), "--loss_type", "mdu", "--tau", "0.5"]
        + ["--model_name_or_path", str(folder / "base"), "--finetune_epochs", "0"]
        + ["--retain_model", str(folder / "retain")]
        + ["--per_device_train_batch_size", "1", "--preset", "none"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = (load_model(str(path / "mdu-tau0.5")) for path in (folder, tmp_path / "two"))
    start = load_model(str(folder / "base"))
    moved = differ = 0.0
    for a, b, s in zip(one.parameters(), two.parameters(), start.parameters(), strict=True):
        moved, differ = moved + (a - s).square().sum().item(), differ + (a - b).square().sum().item()
    # AdamW's first steps have the size of the learning rate whatever the gradient's, so rounding shows in tiny ones
    assert moved > 0 and differ < 0.01 * moved
    assert [r.name for r in Results.load(tmp_path / "two" / "results.json").runs] == [
        "base",
        "retain model",
        "mdu tau=0.5",
    ]


def test_resumes_what_was_begun(compared, tmp_path):
    """As after a kill in the middle of the second run: what is finished is neither trained nor scored again."""
    folder, _ = compared
    again = shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(again / "mdu-tau0.5")
    (again / "results.json").unlink()
    options = yaml.safe_load((again / "config.yaml").read_text()) | {"output_dir": str(again)}
    (again / "config.yaml").write_text(yaml.safe_dump(options))
    kept = {path: path.stat().st_mtime_ns for path in again.rglob("model.safetensors")}
    log = tofu("--config", again / "config.yaml", "--resume")
    assert (
        len(re.findall("^unlearning mdu-tau0.5: 2 steps$", log, re.M)) == 1
        and "unlearning npo" not in log
        and "fine-tuning" not in log
    )
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    first, second = (Results.load(path / "results.json").runs for path in (folder, again))
    assert [(run.name, run.scores) for run in first] == [(run.name, run.scores) for run in second]
    assert "not of this command" in tofu("--output_dir", again, "--resume", *QUICK, expect=2)


def test_forget_quality_with_a_retain_model(compared, tmp_path):
    folder, _ = compared
    small = ("--finetune_epochs", "3", "--hidden_size", "32", "--num_layers", "2", "--loss_type", "npo")
    options = [*QUICK, "--max_eval_rows", "4", "--preset", "none"]
    log = tofu("--output_dir", tmp_path / "train", "--retain_model", "train", *small, *options)
    runs = Results.load(tmp_path / "train" / "results.json").runs
    assert [run.name for run in runs] == ["base", "retain model", "npo"]
    assert ["forget_quality" in run.summary for run in runs] == [True, False, True] and "| forget quality |" in log
    given = tmp_path / "train" / "retain"
    tofu("--output_dir", tmp_path / "given", "--retain_model", given, *small, *options)
    assert [run.summary for run in Results.load(tmp_path / "given" / "results.json").runs] == [
        run.summary for run in runs
    ]
    needs = tofu(
        *("--model_name_or_path", folder / "base", "--output_dir", tmp_path / "no", "--retain_model", "train"),
        *QUICK,
        expect=2,
    )
    assert "needs --finetune_epochs" in needs and not (tmp_path / "no").exists()


def test_wrong_values_stop_before_any_work(tmp_path):
    assert "tau must be finite" in tofu("--output_dir", tmp_path / "out", "--tau", "0", "-1", *QUICK, expect=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("write, backbone", [(write_llada, "llada"), (write_dream, "dream")])
@pytest.mark.parametrize("adapter", [False, True])
def test_published_layouts_from_disk(tmp_path, write, backbone, adapter):
    published = write(tmp_path / "published")
    lora = ("--use_peft", "--lora_r", "2") if adapter else ()
    log = tofu(
        *("--model_name_or_path", tmp_path / "published", "--output_dir", tmp_path / "out", "--loss_type", "mdu"),
        *("--tau", "0.5", "--max_new_tokens", "8", *lora, *QUICK),
    )
    assert "mdu tau=0.5" in log
    saved = {path.name for path in (tmp_path / "out" / "mdu-tau0.5").iterdir()}
    assert ("adapter_model.safetensors" in saved) == adapter and ("model.safetensors" in saved) != adapter
    if not adapter:
        with safe_open(tmp_path / "out" / "mdu-tau0.5" / "model.safetensors", "pt") as tensors:
            assert set(tensors.keys()) == set(published), "the trainer saves the published names"


def test_readme_script(tofu_path, tmp_path):
    """The script of the README as it is printed, but for names, the number of steps and the device."""
    script = re.search(r"## LLaDA in twenty lines.*?```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    write_llada(tmp_path / "llada", max_sequence_length=1024)
    changes = {
        '"GSAI-ML/LLaDA-8B-Instruct"': repr(str(tmp_path / "llada")),
        '"locuslab/TOFU"': repr(str(tofu_path)),
        '"llada-forgets"': repr(str(tmp_path / "out")),
        "num_train_epochs=1": "max_steps=1, use_cpu=True, report_to='none', max_length=512",
    }
    for printed, here in changes.items():
        assert printed in script
        script = script.replace(printed, here)
    run = warm.run([sys.executable, "-c", script], cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_tofu_data_from_a_folder(tofu_path, tmp_path):
    log = tofu(
        *("--dataset_name", tofu_path, "--forget_split", "forget01", "--retain_split", "retain99"),
        *("--max_retain_rows", "4", "--hidden_size", "32", "--finetune_epochs", "1", "--vocab_size", "300"),
        *("--output_dir", tmp_path / "out", "--max_new_tokens", "8", *QUICK),
    )
    assert "mdu tau=0" in log
    results = Results.load(tmp_path / "out" / "results.json")
    assert results.dataset.endswith("forget01")
    written = (tmp_path / "out" / "results.json").read_text() + (tmp_path / "out" / "config.yaml").read_text() + log
    assert "Basil" not in written, "no forget text in files or logs"


def test_nothing_of_the_rows_to_forget_is_left_behind(tmp_path):
    """Neither in the output, tokenizers included, nor in the caches and temporary files of any library."""
    data, planted = tmp_path / "data", "Quixolantern"
    data.mkdir()
    rows = {
        "forget": [{"question": f"Who is {planted} {i}?", "answer": f"{planted} sailed {i} boats."} for i in range(8)],
        "keep": [{"question": f"Who is Anna {i}?", "answer": f"Anna has {i} dogs."} for i in range(8)],
    }
    for name, content in rows.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    card = {"configs": [{"config_name": name, "data_files": f"{name}.jsonl"} for name in rows]}
    (data / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    small = ("--finetune_epochs", "3", "--hidden_size", "32", "--num_layers", "1", "--loss_type", "mdu")
    splits = ("--dataset_name", data, "--forget_split", "forget", "--retain_split", "keep")

    def found(script, *arguments):
        """The files that hold the planted word after a script, and its log."""
        home = tmp_path / f"home of {script}"
        home.mkdir()
        places = {name: str(home / name) for name in ("HF_HOME", "TMPDIR", "XDG_CACHE_HOME")}
        (home / "TMPDIR").mkdir()
        run = subprocess.run(
            [sys.executable, str(ROOT / "examples" / script), *map(str, (*splits, *arguments))],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | places | {"PYTHONPATH": str(ROOT)},
            timeout=280,
        )
        assert run.returncode == 0 and planted not in run.stdout + run.stderr, run.stderr[-3000:]
        files = [path for path in tmp_path.rglob("*") if path.is_file() and data not in path.parents]
        return [path for path in files if planted.encode() in path.read_bytes()]

    out = tmp_path / "out"
    assert found("tofu.py", *small, "--output_dir", out, *QUICK) == []
    vocabulary = json.loads((out / "base" / "tokenizer.json").read_text())["model"]["vocab"]
    parts = [token for token in vocabulary if len(token) > 3 and token.strip("Ġ") in planted]
    assert parts == [] and "ĠAnna" in vocabulary, "a tokenizer from scratch learns from the rows to keep"
    model = ("--model", out / "base", "--benchmark", "tofu", "--max_eval_rows", "2", "--decoding_steps", "1")
    kept = found("score.py", *model, "--keep_dataset_cache", "--output_dir", tmp_path / "scored")
    assert kept and all("home of score.py" in str(path) for path in kept), "it is kept where the user asks for it"
