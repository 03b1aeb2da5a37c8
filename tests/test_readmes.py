"""What the README files say: their links and names exist, their examples and commands run, on tiny models and offline.

A command that is new needs a line in `QUICK`, which makes it quick, or in `NOT_RUN`, with the reason. Each runs in a
process of its own, in a copy of a folder that looks like a clone after `make demo`.
"""

import importlib
import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from test_house import FLOORS
from transformers import TrainingArguments
from warm import PROCESSES

import mdu_trainer
from mdu_trainer.commands import mdu
from mdu_trainer.data.reading import read_row, read_text

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("examples", "mdu_trainer", "model_cards", "tests")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("README.md"))
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}

NOT_RUN = {  # how a command begins, and why it is not run here
    "make ": "makes an environment, and then the demo, or these tests",
    "pip install ": "reads from the network",
    "hf jobs ": "starts a machine somewhere else, or asks the Hub",
    "export ": "sets the environment of a shell",
    ".venv/bin/python -m pytest ": "runs tests, as this does",
    "mdu score --benchmark ": "reads from the network; tests/evaluation/test_published.py scores small rows",
    "mdu unlearn --forget muse-bench": "reads from the network",
    "mdu unlearn --forget FOLDER": "needs a copy of LUME; tests/examples/test_unlearn.py names splits and columns",
    "mdu sequential --dataset_name muse-bench": "reads from the network; tests/examples/test_sequential.py has texts",
    "python -m mdu_trainer.evaluation ": "tests/evaluation/test_harness.py runs it; imports take 15 s",
    "accelerate launch examples/rwku.py --config ": "forgets ten people; tests/evaluation/test_rwku.py reads the file",
    "python examples/benchmarks/lasting.py": "tests/examples/test_lasting.py runs it at its smallest scale",
}
TASKS = {  # script or module -> the same as a subcommand of mdu
    "examples/tofu.py": "compare",
    **{f"examples/{n}.py": n for n in ("unlearn", "score", "attack", "roles", "sweep", "report")},
    **{f"examples/{n}.py": n for n in ("publish", "sequential", "rwku")},
    "mdu_trainer.leak_check": "leak-check",
    "mdu_trainer.models": "models",
    "mdu_trainer.model_card": "card",
    "mdu_trainer.convert": "convert",
}
SUBSTITUTES = {  # what stands for something that a reader has
    "PATH": "outputs/demo/base",
    "NAME_OR_PATH": "outputs/demo/base",
    "MODEL": "outputs/demo/mdu-tau0",
    "ORG/NAME": "nobody/nothing",
    "OWNER": "nobody",
    "GSAI-ML/LLaDA-8B-Instruct": "outputs/demo/base",
    "locuslab/TOFU": "../shared/tofu",
    "bf16=True": "bf16=True, use_cpu=True",
}
if "activation_checkpointing" not in TrainingArguments.__dataclass_fields__:  # before transformers 5.23
    SUBSTITUTES |= {f"{mark}activation_checkpointing": f"{mark}gradient_checkpointing" for mark in ("", "--")}
TRAINING = shlex.split(
    "--max_steps 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --logging_steps 1 "
    "--save_strategy no --report_to none --disable_tqdm true --use_cpu true"
)
SCORING = shlex.split("--max_eval_rows 2 --likelihood_draws 2 --decoding_steps 2")
SCRATCH = shlex.split("--finetune_epochs 2 --hidden_size 32 --num_layers 1")  # where no model is named
ONE_RUN = shlex.split("--loss_type mdu --tau 0.5")  # of those that a command makes
QUICK = {  # options that are added
    "unlearn": TRAINING,
    "compare": [*TRAINING, *SCORING, "--overwrite_output_dir"],
    "sweep": [
        *(*TRAINING, *SCORING, "--learning_rate", "1e-4", "--select", "retain>=0*base", "--seed", "42"),
        *("--forget_masking", "content", "--anchor_source", "current"),
    ],
    "score": shlex.split("--max_eval_rows 2 --likelihood_draws 2 --decoding_steps 2"),
    "attack": shlex.split("--attacks prefix quantise-8 --max_eval_rows 2 --decoding_steps 2"),
    "roles": shlex.split("--max_eval_rows 2 --num_steps 2 --num_paths 1"),
    "report": [],
    "publish": ["--dry_run"],
    "leak-check": [],
    "audit": [],
    "models": [],
    "card": [],
    "convert": [],
    "sequential": [*TRAINING, *SCORING],
    "rwku": [*TRAINING, *SCORING, "--dataset_name", "../shared/rwku", "--configs", "forget_level1"],
    "examples/benchmarks/step.py": shlex.split("--shape tiny --repeats 1"),
    "examples/benchmarks/likelihood.py": shlex.split("--num_rows 1 --num_seeds 2 --num_draws 8"),
    "examples/benchmarks/decoding.py": shlex.split("--new_tokens 16 --block_size 8 --hidden_size 32 --repeats 1"),
    "examples/benchmarks/evaluation.py": shlex.split("--num_rows 1 --max_new_tokens 2"),
    "examples/benchmarks/agreement.py": shlex.split("--num_rows 1 --mc_num 32 --length 16"),
}
STATUS = {"leak-check": (0, 1)}  # of the others 0; an untrained model may give something away by chance


# Reading the pages


def fences(text: str, language: str) -> list[str]:
    """What stands between fences of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(text: str) -> list[str]:
    """The commands of a page: lines of bash, and code in tables, or anywhere if it is of `mdu` with arguments."""
    lines = "".join(fences(text, "bash")).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    tables = "\n".join(line for line in prose.splitlines() if line.startswith("|"))
    lines += re.findall(r"`((?:make|python|accelerate launch) [^`]+)`", tables)
    lines += re.findall(r"`(mdu [\w-]+ [^`]+)`", prose)
    return [" ".join(line.split("  #")[0].split()) for line in lines if line.strip() and line[0] != "#"]


DEMO = "python examples/tofu.py --output_dir outputs/demo"  # makes the folder that the others run in
COMMANDS = list(dict.fromkeys(command for text in TEXTS.values() for command in commands(text)))


def substituted(text: str) -> str:
    """A command or an example with what stands for something replaced by something that is there."""
    for name, value in SUBSTITUTES.items():
        text = re.sub(rf"(?<![\w/-]){name}(?![\w/-])", value, text)
    return text


def program(command: str) -> tuple[str, list[str]]:
    """What a command starts, "mdu TASK", a script or a module, and its arguments; of a launch, what is launched."""
    words = shlex.split(substituted(command))
    if words[:2] == ["accelerate", "launch"]:
        start = next(number for number, word in enumerate(words) if word == "-m" or word.endswith(".py"))
        words = ["python", *words[start:]]
    if words[:2] == ["python", "-m"]:
        return words[2], words[3:]
    if words[0] == "mdu":
        return " ".join(words[:2]), words[2:]
    if words[0] == "python":
        return words[1], words[2:]
    pytest.fail(f"How is {words[0]!r} run? Name it in NOT_RUN, with the reason, or teach `program` to run it.")


def quick(command: str) -> tuple[str, list[str], tuple[int, ...]]:
    """What a command starts, the arguments that make it quick, and the exit statuses that are right."""
    name, arguments = program(command)
    task = TASKS.get(name, name.removeprefix("mdu "))
    if task not in QUICK:
        pytest.fail(f"{command!r} is not run: say in QUICK what makes it quick, or in NOT_RUN why it cannot be run.")
    left = [word for word in arguments if re.search(r"(?<![A-Za-z_/])[A-Z]{4,}(?![A-Za-z_])", word)]
    if left:
        pytest.fail(f"What stands for {', '.join(left)} in {command!r}? Say so in SUBSTITUTES.")
    arguments += QUICK[task]
    if task in ("compare", "sweep", "sequential") and "--model" not in arguments:
        arguments += SCRATCH
    if task in ("compare", "sweep"):
        arguments += ONE_RUN
    return name, arguments, STATUS.get(task, (0,))


# Running, in processes that are forked from one that has done the imports


def in_process(folder: Path, work: Callable[..., None], *arguments: Any) -> tuple[int, str]:
    """Exit status of `work` in a process of its own, in a folder, and what it printed."""
    log = folder / "log.txt"
    process = PROCESSES.Process(target=_work, args=(folder, log, work, arguments))
    process.start()
    process.join(250)
    return process.exitcode, log.read_text(encoding="utf-8", errors="replace")


def _work(folder: Path, log: Path, work: Callable[..., None], arguments: tuple) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    torch.set_num_threads(1)
    work(*arguments)


def start(name: str, arguments: list[str]) -> None:
    """Run a script, a module or `mdu` as it is started from a shell."""
    fork, multiprocessing.get_context = (
        multiprocessing.get_context("fork"),
        lambda method=None: fork,
    )  # imports no more
    if name.startswith("mdu "):
        sys.path.insert(0, str(ROOT))
        sys.argv = ["mdu", name.removeprefix("mdu "), *arguments]
        sys.exit(mdu.main())
    sys.argv = [name, *arguments]
    if name.endswith(".py"):
        sys.path.insert(0, str((ROOT / name).parent))
        runpy.run_path(str(ROOT / name), run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)


def run_examples(blocks: list[str]) -> None:
    """The Python of a page from top to bottom, for a reader who has a trainer, its rows and a data set already."""
    import datasets

    from mdu_trainer import MDUConfig, MDUTrainer, question_answer_rows

    def load_dataset(source: str, config: str, split: str) -> Dataset:
        return Dataset.from_list(json.loads(Path(source, f"{config}.json").read_text(encoding="utf-8"))[:2])

    datasets.load_dataset = load_dataset
    forget, retain = (load_dataset("../shared/tofu", name, "train") for name in ("forget10", "retain90"))
    args = MDUConfig("outputs/trained", use_cpu=True, report_to="none")
    rows = (question_answer_rows(part, conversational=True) for part in (forget, retain))
    trainer = MDUTrainer("outputs/demo/base", args, *rows)
    known = {"trainer": trainer, "forget": forget, "retain": retain, "dataset": forget, "__name__": "__main__"}
    for number, block in enumerate(blocks):
        exec(compile(substituted(block), f"example {number}", "exec"), known)


@pytest.fixture(scope="module")
def clone(tmp_path_factory, authors):
    """A folder like a clone after a tiny `make demo`, with data beside it."""
    folder = tmp_path_factory.mktemp("readmes") / "clone"
    write_data(folder.parent / "shared", authors)
    folder.mkdir()
    for name in FOLDERS:
        (folder / name).symlink_to(ROOT / name)
    for name, part in {"rows": authors.select(range(94, 96)), "keep": authors.select(range(10))}.items():
        part.select_columns(["question", "answer"]).to_json(folder / f"{name}.jsonl")
    (folder / "intros").mkdir()
    shutil.copy(folder / "rows.jsonl", folder / "intros" / "0_Stephen_King.jsonl")
    status, log = in_process(folder, start, *quick(DEMO)[:2])
    assert status == 0, log[-3000:]
    for name in ("mdu-tau0", "mdu-tau1", "npo", "ga"):
        shutil.copytree(folder / "outputs" / "demo" / "mdu-tau0.5", folder / "outputs" / "demo" / name)
    (folder / "outputs" / "base").mkdir()
    shutil.copy(folder / "outputs" / "demo" / "results.json", folder / "outputs" / "base")
    return folder


def write_data(folder: Path, authors: Dataset) -> None:
    """Copies of TOFU and RWKU, as small as they can be."""
    (folder / "tofu").mkdir(parents=True)
    for name, rows in {"forget10": range(88, 96), "retain90": range(8), "forget01": range(4)}.items():
        authors.select(rows).to_json(folder / "tofu" / f"{name}.json", lines=False)
    shutil.copy(folder / "tofu" / "retain90.json", folder / "tofu" / "retain_perturbed.json")
    (folder / "rwku").mkdir()
    probe = {"subject": "Stephen King", "query": "___ wrote it.", "answer": "He", "level": "1", "type": "fill"}
    (folder / "rwku" / "forget_level1.json").write_text(json.dumps([probe]))


@pytest.fixture
def copy(clone, tmp_path):
    """The folder, for one command to change."""
    shutil.copytree(clone.parent, tmp_path / "readmes", symlinks=True)
    return tmp_path / "readmes" / "clone"


RUN = [command for command in COMMANDS if not command.startswith(tuple(NOT_RUN))]


@pytest.mark.parametrize("command", RUN)
def test_command(copy, command):
    name, arguments, right = quick(command)
    if command == DEMO:
        return  # the folder was made by it
    status, log = in_process(copy, start, name, arguments)
    assert status in right, f"{name} {shlex.join(arguments)}\n{log[-3000:]}"


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if fences(text, "python")])
def test_examples_in_python(copy, page):
    status, log = in_process(copy, run_examples, fences(TEXTS[page], "python"))
    assert status == 0, log[-3000:]


def test_what_is_not_run_is_there():
    for beginning in NOT_RUN:
        assert any(command.startswith(beginning) for command in COMMANDS), f"nothing begins with {beginning!r}"
    assert RUN


def test_new_commands_and_placeholders_are_not_forgotten():
    for command in ("mdu dance --model PATH", "python examples/new.py", "mdu score --model SOMETHING", "curl x"):
        with pytest.raises(pytest.fail.Exception):
            quick(command)


def test_rows():
    for text in TEXTS.values():
        for line in "".join(fences(text, "json")).splitlines():
            row = json.loads(line)
            if "text" in row:
                assert read_text(row, "A row")
                continue
            if "question" in row:
                row = {"prompt": row["question"], "completion": row["answer"]}
            assert read_row(row, "A row")


# What the pages name


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TEXTS)
def test_links(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in slugs(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", TEXTS)
def test_files_tests_and_modules(page):
    text = TEXTS[page]
    for name in re.findall(rf"(?<![\w/])(?:{'|'.join(FOLDERS)})/[\w./-]*\w", text):
        near = (ROOT / page).parent / name  # tests/README.md names its folders
        assert (ROOT / name).exists() or near.exists() or "NAME" in name, name
    path = None
    for name, test in re.findall(r"`((?:\w+/)*test_\w+\.py)?(?:::(\w+))?`", text):
        if name:
            path = ROOT / name if name.startswith("tests/") else ROOT / "tests" / name
            assert path.is_file(), name
        assert not test or re.search(rf"^def {test}\(", path.read_text(encoding="utf-8"), re.M), f"{path}::{test}"
    for name in re.findall(r"(?<![\w/])mdu_trainer(?:\.\w+)+", text):
        found = mdu_trainer
        for number, part in enumerate(name.split(".")[1:], 2):
            if not hasattr(found, part):
                importlib.import_module(".".join(name.split(".")[:number]))
            found = getattr(found, part)


@pytest.mark.parametrize("page", TEXTS)
def test_plain_characters(page):
    assert TEXTS[page].isascii()


def test_the_picture_of_the_house():
    (picture,) = fences(TEXTS["CONTRIBUTING.md"], "text")
    floors = [re.split(r"\s{2,}", line)[0].split() for line in picture.splitlines()]
    assert floors == [list(floor) for floor in reversed(FLOORS)]


def table(page: str, *columns: str) -> list[list[str]]:
    """The cells of the table that begins with these columns, without its header."""
    lines = TEXTS[page].splitlines()
    header = r"\| " + r"\s*\| ".join(columns) + r"\s*\|"
    begin = next(number for number, line in enumerate(lines) if re.match(header, line))
    end = next(number for number in range(begin, len(lines)) if not lines[number].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[begin + 2 : end]]


def test_the_short_table_of_the_demo_is_part_of_the_long_one():
    columns = ("method", "forget rL", "retain rL")
    assert table("README.md", *columns) == [row[:5] for row in table("examples/README.md", *columns)]


@pytest.mark.parametrize(
    "name, layers, hidden, key_value, mlp, vocabulary, bias",
    [("LLaDA-8B", 32, 4096, 4096, 12288, 126464, False), ("Dream-7B", 28, 3584, 512, 18944, 152064, True)],
)
def test_memory(name, layers, hidden, key_value, mlp, vocabulary, bias):
    """The table is what the formula under it gives."""
    linear = layers * (2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * mlp)
    biases = layers * (hidden + 2 * key_value) if bias else 0
    weights = linear + biases + layers * 2 * hidden + hidden + 2 * vocabulary * hidden
    lora = 16 * layers * (2 * 2 * hidden + 2 * (hidden + key_value) + 3 * (hidden + mlp))
    activations = 2 * 4 * 256 * (layers * hidden + 10 * hidden + 4 * mlp)
    head = 4 * 2**26 * 4
    full = 18 * weights + 4 * activations + head
    seconds = (0, 4 * vocabulary * hidden, linear + 4 * (weights - linear), 4 * weights)
    expected = [*(full + second for second in seconds), 2 * weights + 18 * lora + 2 * activations + head]
    rows = {row[0]: row[1:] for row in table("examples/README.md", "model", "all weights, no second model")}
    assert rows[name] == [f"{value / 1e9:.0f}" for value in expected]


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys() and citation["license"] == "MIT"
    assert citation["version"] == mdu_trainer.__version__
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors"} <= paper.keys() and "2605.18253" in paper["url"]
