"""Attacks on several models: recovery and its interval, the file, kills, the picture, and the script."""

import json
import re
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import warm
from peft import LoraConfig, get_peft_model
from runs import die_at, draw_moment, status

from mdu_trainer import DiffusionGenerationConfig
from mdu_trainer.attacks import ATTACKS, Attack, AttackScores, AttackSettings
from mdu_trainer.attacks.results import AttackOutcome, Outcome, Recovery
from mdu_trainer.attacks.run import recovery_of, run_attacks
from mdu_trainer.commands.loading import ModelsConfig
from mdu_trainer.commands.options import OptionParser
from mdu_trainer.evaluation import progress
from mdu_trainer.evaluation.results import Estimate
from mdu_trainer.files import UserError
from mdu_trainer.models import weights_fingerprint
from mdu_trainer.report.recovery_plots import plot_recovery, strongest
from mdu_trainer.testing import dataset_texts, fictional_authors, tiny_mdlm, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = AttackSettings(decoding=DiffusionGenerationConfig(max_new_tokens=48, steps=1))
ROWS = 6
MOMENTS = {  # 2 attacks and the plain question on 4 models
    "in an attack": (sys.modules[__name__], "made", 8),
    "an attack kept, or the header": (progress.ProgressFile, "append", 13),
    "the file not renamed yet": (progress.os, "replace", 1),
}


def made(calls: Path | None, name: str, target, seed: int) -> AttackScores:
    """An attack whose scores are a function of the weights, the name and the seed; it notes that it was made."""
    weights = weights_fingerprint(target.model)
    if calls is not None:
        with calls.open("a") as file:
            file.write(f"{name} {weights}\n")
    level = 0.9 if weights == weights_fingerprint(small_model(0)) else 0.1  # the base knows more
    scores = np.random.default_rng(seed + int(weights[:8], 16) + len(name)).normal(level, 0.05, ROWS)
    return AttackScores(list(range(ROWS)), target.plain, scores.tolist(), {"1": float(scores.mean())})


def fakes(calls: Path | None = None) -> dict[str, Attack]:
    def of(name: str) -> Attack:
        return Attack(lambda target, seed: made(calls, name, target, seed), f"words of {name}")

    return {name: of(name) for name in ("one", "second")}


def small_model(seed: int):
    tokenizer = train_tokenizer(dataset_texts(fictional_authors(1)), vocab_size=300)
    return tiny_mdlm(tokenizer, hidden_size=16, num_layers=1, num_heads=2, seed=seed)


def loader(seed: int):
    return lambda: (small_model(seed), train_tokenizer(dataset_texts(fictional_authors(1)), vocab_size=300))


def attack(folder: Path, never: bool = True, rows: int = ROWS, **options) -> Recovery:
    """Attack two models, beside a base and one that never saw the rows."""
    calls = folder / "calls.txt"
    given = {"settings": SETTINGS, "attacks": fakes(calls), "progress_path": folder / "attacks.jsonl"} | options
    unlearned = given.pop("unlearned", {"mdu tau=0": loader(2), "npo": loader(3)})
    return run_attacks(
        unlearned, loader(0), loader(1) if never else None, fictional_authors(1).select(range(rows)), **given
    )


def attack_and_save(folder: Path, kill: tuple[str, int] | None = None) -> None:
    """As a script does it, and killed at some moment."""
    if kill is not None:
        owner, name, _ = MOMENTS[kill[0]]
        die_at(sys.modules[__name__] if name == "made" else owner, name, kill[1])
    attack(folder).save(folder / "recovery.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of attacks that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    attack_and_save(folder)
    return folder


@pytest.fixture
def recovery(whole) -> Recovery:
    return Recovery.load(whole / "recovery.json")


def test_recovery_against_an_independent_computation():
    draw = np.random.default_rng(5)
    never, unlearned, base = (draw.normal(level, 0.1, 12) for level in (0.1, 0.4, 0.9))
    found = recovery_of(unlearned, never, base)
    ratios = []
    for _ in range(20_000):
        chosen = draw.choice(12, size=12)
        ratios.append((unlearned[chosen].mean() - never[chosen].mean()) / (base[chosen].mean() - never[chosen].mean()))
    assert found.value == pytest.approx((unlearned.mean() - never.mean()) / (base.mean() - never.mean()), abs=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(ratios, [2.5, 97.5])), abs=0.01)


def test_rows_are_resampled_of_all_models_together():
    base, never = np.linspace(0.5, 1, 10), np.linspace(0, 0.3, 10)
    halfway = recovery_of((base + never) / 2, never, base)
    assert (halfway.value, halfway.low, halfway.high) == pytest.approx((0.5, 0.5, 0.5))
    shuffled = recovery_of(((base + never) / 2)[::-1], never, base)
    assert shuffled.value == pytest.approx(0.5) and shuffled.high - shuffled.low > 0.1


@pytest.mark.parametrize(
    "never, base",
    [
        ([0.5, 0.2, 0.4], [0.5, 0.2, 0.4]),  # the same
        ([0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.1]),  # as much, as far as one can tell
        ([0.9, 0.9, 0.9], [0.1, 0.1, 0.1]),  # the base knows less
        ([0.0], [1.0]),  # nothing is known of the spread
    ],
)
def test_no_recovery_where_base_and_never_cannot_be_told_apart(never, base):
    assert recovery_of([0.7] * len(base), never, base) is None


def test_what_is_undefined_is_left_out(recovery, tmp_path):
    flat = AttackOutcome(
        "words", 4, {name: Outcome(Estimate(0.5), Estimate(0.5)) for name in recovery.attacks["one"].models}
    )
    recovery = Recovery(recovery.dataset, recovery.settings, recovery.attacks | {"flat": flat})
    assert [set(of) for of in recovery.recoveries().values()] == [{"one", "second"}] * 2
    cells = [cell.strip() for cell in recovery.table().splitlines()[-1].split("|")]
    assert cells == ["", "flat", "0.500", "0.500", "0.500", "", "0.500", "", ""]
    assert "No recovery under none, flat:" in recovery.text()
    recovery.save(tmp_path / "recovery.json")
    assert Recovery.load(tmp_path / "recovery.json") == recovery


def test_figures_of_a_run(whole, recovery):
    lines = [json.loads(line) for line in (whole / "attacks.jsonl").read_text().splitlines()[1:]]
    after = {(line["model"], line["attack"]): line["scores"]["after"] for line in lines}
    assert len(after) == 12 and recovery.models == ["mdu tau=0", "npo"] and recovery.has_floor
    assert list(recovery.attacks) == ["none", "one", "second"]
    for name in recovery.attacks:
        assert recovery.attacks[name].rows == ROWS
        for model, outcome in recovery.attacks[name].models.items():
            assert outcome.after.value == pytest.approx(np.mean(after[model, name]))
    found = recovery.attacks["second"].models["npo"]
    assert found.recovery == recovery_of(*(after[m, "second"] for m in ("npo", "never trained", "base")))
    assert found.path == {"1": pytest.approx(found.after.value)} and -0.3 < found.recovery.value < 0.3
    row = next(line for line in recovery.table().splitlines() if line.startswith("| second"))
    assert f"{found.recovery.value:.2f} [{found.recovery.low:.2f}, {found.recovery.high:.2f}]" in row
    assert f"{recovery.attacks['second'].models['base'].after.value:.3f}" in row


def test_file(whole, recovery, tmp_path):
    path = tmp_path / "recovery.json"
    recovery.save(path)
    assert path.read_bytes() == (whole / "recovery.json").read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["recovery.json"]
    names = {word for text in fictional_authors(1)["answer"] for word in text.split() if word[0].isupper()}
    written = path.read_text() + (whole / "attacks.jsonl").read_text()
    assert len(names) > 5 and not any(name in written for name in names), "figures only"
    with pytest.raises(AttributeError):
        recovery.dataset = "another"
    for content, message in {
        "half a fi": "holds no JSON",
        "[1]": "no schema, this version reads 1",
        '{"schema": 7}': "schema 7, this version reads 1: repeat the attacks",
        '{"schema": 1, "dataset": "d", "settings": {}}': "has no attacks. To mend it, repeat the attacks",
        '{"schema": 1, "dataset": "d", "settings": {}, "attacks": {"one": {"rows": 1}}}': "attacks.one has no words",
    }.items():
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            Recovery.load(path)


@pytest.mark.parametrize("seed", range(6))
def test_killed_and_started_again(whole, tmp_path, seed):
    kill = draw_moment(MOMENTS, seed)
    assert status(attack_and_save, tmp_path, kill=kill) == -signal.SIGKILL, kill
    assert not (tmp_path / "recovery.json").exists()
    before = (tmp_path / "attacks.jsonl").read_text().splitlines(keepends=True)
    kept = [json.loads(line) for line in before[1:] if line.endswith("\n")]
    (tmp_path / "calls.txt").write_text("")
    assert status(attack_and_save, tmp_path) == 0
    assert (tmp_path / "recovery.json").read_bytes() == (whole / "recovery.json").read_bytes(), kill
    repeated = (tmp_path / "calls.txt").read_text().splitlines()
    finished = {f"{line['attack']} {line['weights']}" for line in kept}
    assert not finished & set(repeated) and len(repeated) == 8 - sum(line["attack"] != "none" for line in kept)
    assert {path.name for path in tmp_path.iterdir()} <= {
        "recovery.json",
        "attacks.jsonl",
        "calls.txt",
        ".recovery.json.tmp",
    }


def test_without_a_model_that_never_saw_the_rows(tmp_path):
    recovery = attack(tmp_path, never=False)
    assert not recovery.has_floor and recovery.recoveries() == {}
    assert recovery.table().splitlines()[0].split() == "| attack | base | mdu tau=0 | npo |".split()
    assert "No model that never saw the rows was attacked. So it is not known how much" in recovery.text()
    with pytest.raises(ValueError, match="nothing to show"):
        plot_recovery(recovery.recoveries(), tmp_path / "recovery.png")


def test_stale_progress_is_refused_by_name(tmp_path):
    attack(tmp_path)
    path = tmp_path / "attacks.jsonl"
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"attacks.jsonl holds attacks on other weights under the name 'npo'"):
        attack(tmp_path, unlearned={"mdu tau=0": loader(2), "npo": loader(4)})
    with pytest.raises(ValueError, match=r"another attack \(rows differ\)"):
        attack(tmp_path, rows=5)
    with pytest.raises(ValueError, match=r"another attack \(seed differ\)"):
        attack(tmp_path, seed=1)
    decoding = DiffusionGenerationConfig(max_new_tokens=48, steps=2)
    with pytest.raises(ValueError, match=r"another attack \(settings.decoding.steps, settings.samples differ\)"):
        attack(tmp_path, settings=AttackSettings(decoding=decoding, samples=3))
    unseen = AttackSettings(decoding=SETTINGS.decoding, unseen=fictional_authors(2).select(range(8, 16)))
    with pytest.raises(ValueError, match=r"another attack \(settings.unseen differ\)"):
        attack(tmp_path, settings=unseen)
    assert path.read_bytes() == before
    (tmp_path / "calls.txt").unlink()
    attack(tmp_path, unlearned={"npo": loader(3), "ga": loader(5)})  # a further model costs its own attacks only
    assert len((tmp_path / "calls.txt").read_text().splitlines()) == 2
    path.write_text('{"progress": 1}\n')
    with pytest.raises(ValueError, match="not the progress of an attack"):
        attack(tmp_path)


def test_names_and_rows_are_checked(tmp_path):
    for unlearned in ({}, {"base": loader(2)}, {"never trained": loader(2)}):
        with pytest.raises(ValueError, match="at least one unlearned model, none of them 'base' or 'never trained'"):
            attack(tmp_path, unlearned=unlearned)

    def uneven(target, seed):
        rows = [0, 1] if weights_fingerprint(target.model) == weights_fingerprint(small_model(0)) else [0, 2]
        return AttackScores(rows, [0.0, 0.0], [0.5, 0.6])

    with pytest.raises(ValueError, match="uneven scored other rows of never trained than of base"):
        attack(tmp_path, attacks={"uneven": Attack(uneven, "")}, progress_path=None)


def test_an_attack_that_refuses_the_rows_is_left_out_and_said(tmp_path):
    def refusing(target, seed):
        raise ValueError("no row is long enough")

    attacks = fakes() | {"refusing": Attack(refusing, "")}
    with pytest.raises(ValueError, match="no row is long enough"):
        attack(tmp_path, attacks=attacks)
    said = []
    recovery = attack(tmp_path, attacks=attacks, left_out=lambda name, why: said.append(f"{name}: {why}"))
    assert said == ["refusing: no row is long enough"] and list(recovery.attacks) == ["none", "one", "second"]


def test_a_model_without_adapter_is_left_as_it_is(tmp_path):
    def with_adapter():
        model, tokenizer = loader(2)()
        return get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"])), tokenizer

    calls = []

    def switched_off(target, seed):
        calls.append(type(target.model).__name__)
        return AttackScores(list(range(ROWS)), target.plain, [1.0] * ROWS)

    attacks = {"off": Attack(switched_off, "switch the adapter off", ("adapter",))}
    recovery = attack(tmp_path, unlearned={"npo": with_adapter}, attacks=attacks)
    assert len(calls) == 1 and "Peft" in calls[0]
    models = recovery.attacks["off"].models
    assert models["npo"].after.value == 1 and models["base"].after == models["base"].before


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture_is_repeatable_and_shows_every_model(recovery, tmp_path, suffix):
    pictures = []
    for turn in range(2):
        plot_recovery(recovery.recoveries(), tmp_path / f"{turn}.{suffix}")
        pictures.append((tmp_path / f"{turn}.{suffix}").read_bytes())
    assert pictures[0] == pictures[1] and len(pictures[0]) > 5000
    if suffix == "svg":
        for words in ("mdu tau=0", "npo", "one", "second", "never trained", "base"):
            assert f"<!-- {words} -->" in pictures[0].decode()
        assert "<!-- none -->" not in pictures[0].decode(), "no recovery is defined without an attack"


def test_the_strongest_attacks_keep_their_order():
    recoveries = {"a": {"one": Estimate(0.1), "two": Estimate(0.9)}, "b": {"two": Estimate(0), "three": Estimate(0.3)}}
    assert strongest(recoveries, 2) == ["two", "three"] and strongest(recoveries, 9) == ["one", "two", "three"]


# The script


def command(*arguments) -> list[str]:
    return [sys.executable, str(ROOT / "examples" / "attack.py"), *map(str, arguments)]


def recover(*arguments, expect: int = 0) -> str:
    run = warm.run(command(*arguments), cwd=ROOT, timeout=280)
    assert run.returncode == expect, run.stderr[-3000:]
    return run.stdout + run.stderr


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tokenizer) -> Path:
    """A folder of untrained models: base, never, and an adapter on the base."""
    folder = tmp_path_factory.mktemp("models")
    make = partial(tiny_mdlm, tokenizer, hidden_size=32, num_layers=1, num_heads=2)
    for seed, name in enumerate(("base", "never", "other")):
        make(seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    adapter = get_peft_model(make(seed=0), LoraConfig(r=1, target_modules=["q_proj"], init_lora_weights=False))
    adapter.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapter.save_pretrained(folder / "adapter")
    return folder


QUICK = ("--max_eval_rows", "4", "--decoding_steps", "1", "--relearn_steps", "1", "--dtype", "float32")


def test_script(checkpoints, tmp_path, authors):
    models = ("--model", checkpoints / "adapter", checkpoints / "other", "--base", checkpoints / "base")
    gold = ("--retain_model", checkpoints / "never")
    options = ("--seed", "3", "--relearn_learning_rate", "0.001", "--batch_size", "2")
    log = recover(*models, *gold, *options, "--output_dir", tmp_path, *QUICK)
    recovery = Recovery.load(tmp_path / "recovery.json")
    assert recovery.models == ["adapter", "other"] and list(recovery.attacks) == ["none", *ATTACKS]
    assert recovery.settings["decoding"]["steps"] == 1 and recovery.settings["relearn_steps"] == 1
    assert recovery.settings["seed"] == 3 and recovery.settings["relearn_learning_rate"] == 0.001
    assert recovery.text() in log and re.search(r"\d+ attacks in [\d.]+ s", log)
    written = log + "".join(path.read_text() for path in tmp_path.glob("*.json*"))
    names = {word for text in fictional_authors(16)["answer"] for word in text.split()[:2] if word[0].isupper()}
    assert len(names) > 20 and not any(name in written for name in names - {"The"})
    alone = recover(*models, "--attacks", "paraphrase", "--output_dir", tmp_path / "alone", *QUICK)
    assert "So it is not known how much" in alone and "never trained" not in alone.splitlines()[-1]
    assert not list((tmp_path / "alone").glob("recovery.[ps]*"))


def test_script_refuses_before_a_model_is_loaded(checkpoints, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import attack as script

    monkeypatch.setattr(script, "load", lambda *_: pytest.fail("a model was loaded"))
    models = ["--model", str(checkpoints / "other"), "--base", str(checkpoints / "base")]
    (tmp_path / "data").mkdir()
    for name in ("forget", "keep"):
        (tmp_path / "data" / f"{name}.json").write_text('[{"question": "Q?", "answer": "A."}]')
    data = ["--dataset_name", str(tmp_path / "data"), "--forget_split", "forget", "--retain_split", "keep"]
    needing = [name for name, one in ATTACKS.items() if "unseen" in one.needs]
    refused = [
        (models[:2], "and --base with the model before"),
        (models[2:], "Pass --model_name_or_path UNLEARNED"),
        ([*models, "--retain_model", str(tmp_path / "nowhere")], "there is no folder .*nowhere"),
        ([*models, "--attacks", "bleu"], "Unknown attacks: bleu"),
        ([*models, "--dataset_name", str(tmp_path / "data"), "--forget_split", "x"], "no config 'x'"),
        *(([*models, *data, "--attacks", name], f"{name!r} needs rows") for name in needing),
    ]
    for arguments, message in refused:
        parsed = OptionParser((script.AttackArguments, ModelsConfig)).parse_args_and_config(
            [*arguments, "--output_dir", str(tmp_path / "out"), *QUICK]
        )
        with pytest.raises(UserError, match=message):
            script.main(*parsed)
    assert not (tmp_path / "out").exists()
    given = ["--unseen_split", "keep", "--batch_size", "2"]
    parser = OptionParser((script.AttackArguments, ModelsConfig))
    parsed, unlearned = parser.parse_args_and_config([*models, *data, *given])
    settings = script.attack_settings(parsed, unlearned, *script.load_sets(parsed))
    assert settings.unseen["answer"] == ["A."] and settings.decoding.batch_size == 2
