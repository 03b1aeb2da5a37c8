"""Settings under one name: what they set, what counts before them, and that their sources' figures can be compared."""

import dataclasses
from pathlib import Path

import pytest
from transformers import TrainingArguments
from trl import ModelConfig

from mdu_trainer import MDUConfig
from mdu_trainer.commands.comparison import ComparisonArguments, ComparisonConfig
from mdu_trainer.commands.options import parse_options
from mdu_trainer.config import presets
from mdu_trainer.config.presets import PRESETS
from mdu_trainer.files import UserError

OWN = [field for field in dataclasses.fields(MDUConfig) if field.name not in TrainingArguments.__dataclass_fields__]
OTHERS = {  # values of options without choices, which are not their defaults
    "tau": [0.0, 1.0],
    "anchor_source": ["initial", "current", "ema", "a/checkpoint"],
    "anchor_ema_decay": [0.9],
    "prefix_share": [0.5],
    "strike_quantile": [0.25, None],
    "rollout_every": [2],
    "beta": [0.5],
    "gamma": [0.5],
    "alpha": [2.0],
    "loss_options": [{"cap": 5.0}],
    "retain_weight": [0.0],
    "retain_batch_size": [4, 6],
    "rewind_to": ["a/checkpoint"],
    "rewind_share": [0.5],
    "reference_device": ["cpu"],
    "forget_description": ["Some rows."],
    "model_init_kwargs": [{"dtype": "bfloat16"}],
    "max_length": [64],
    "text_stride": [32],
    "t_min": [0.5],
    "t_max": [0.5],
    "time_epsilon": [0.01],
    "learning_rate": [1e-4],
    "num_train_epochs": [2.0],
    "max_steps": [3],
    "per_device_train_batch_size": [8],
    "gradient_accumulation_steps": [1],
    "lr_scheduler_type": ["linear", "constant"],
    "warmup_steps": [0, 5],
    "dataloader_persistent_workers": [True],
}

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"

LASTING = PRESETS["lasting"].training


def test_a_preset_sets_what_is_not_given(tmp_path, seen):
    args = MDUConfig(str(tmp_path), preset="lasting")
    assert {name: getattr(args, name) for name in LASTING} == LASTING and args.counterfactual
    given = MDUConfig(str(tmp_path), preset="lasting", learning_rate=1e-5, tau=0.5)
    assert (given.learning_rate, given.tau, given.anchor_input) == (1e-5, 0.5, "counterfactual")
    assert "preset 'lasting': loss_type=mdu, tau=0.5, anchor_input=counterfactual" in seen.text

    @dataclasses.dataclass
    class Own(MDUConfig):
        learning_rate: float = 3e-5

    assert Own(str(tmp_path), preset="lasting").learning_rate == LASTING["learning_rate"]
    assert dataclasses.replace(given, seed=1).learning_rate == 1e-5
    with pytest.raises(UserError, match="preset 'best' is unknown; choose one of lasting"):
        MDUConfig(str(tmp_path), preset="best")


def changes():
    """Each option of unlearning, and each that a preset sets, with every value that it may have or some."""
    for field in OWN:
        if field.name != "preset":
            values = OTHERS.get(field.name) or field.metadata.get("choices") or [not field.default]
            yield from ((field.name, value) for value in values)
    own = {field.name for field in OWN}
    yield from ((name, value) for name, values in OTHERS.items() if name not in own for value in values)


def test_values_are_tried_of_every_option_that_a_preset_sets():
    tried = {name for name, _ in changes()}
    assert tried >= {name for preset in PRESETS.values() for name in preset.training}
    for field in OWN:  # others than a switch have choices, or values above
        assert field.name in OTHERS or field.metadata.get("choices") or isinstance(field.default, bool), field.name


@pytest.mark.parametrize("preset", PRESETS)
def test_any_option_beside_a_preset_counts_or_is_refused_with_what_the_preset_sets(preset, tmp_path, monkeypatch):
    monkeypatch.setattr(presets.logger, "warning_once", lambda words: None)  # which other tests are to see
    workers = {"dataloader_num_workers": 1}
    worked = 0
    for name, value in changes():
        try:
            args = MDUConfig(str(tmp_path), preset=preset, **workers | {name: value})
            worked += 1
            assert getattr(args, name) == value, name
        except UserError as error:
            if f"Preset '{preset}' sets " in str(error):
                continue
            with pytest.raises(UserError) as alone:  # a mistake without the preset, too
                MDUConfig(str(tmp_path), **workers | {name: value})
            assert str(error) == str(alone.value), (name, value)
    assert worked > 50


def test_what_a_preset_sets_gives_way_where_it_would_mean_nothing(tmp_path, seen, monkeypatch):
    args = MDUConfig(str(tmp_path), preset="release", forget_masking="content")
    assert (args.forget_masking, args.rollout_every) == ("content", None)
    assert "without rollout_every, which is of forget_masking=generated" in seen.text
    assert "rollout_every=" not in seen.text
    again = dataclasses.replace(MDUConfig(str(tmp_path), preset="release", tau=1.0), forget_masking="random")
    assert again.rollout_every is None
    (args,) = parsed(monkeypatch, "--output_dir out --preset release --forget_masking content", MDUConfig)
    assert args.rollout_every is None
    with pytest.raises(UserError, match="rollout_every is of forget_masking='generated'"):
        MDUConfig(str(tmp_path), preset="release", forget_masking="content", rollout_every=2)
    with pytest.raises(UserError, match="Preset 'lasting' sets tau=1.0, anchor_input=counterfactual; another value"):
        MDUConfig(str(tmp_path), preset="lasting", loss_type="npo")
    MDUConfig(str(tmp_path), preset="lasting", loss_type="npo", anchor_input="masked_prompt")
    with pytest.raises(UserError) as error:
        MDUConfig(str(tmp_path), preset="paper", learning_rate=-1.0)
    assert "Preset" not in str(error.value), "nothing is wrong with what it sets"


@pytest.mark.parametrize(
    "words, file, expected",
    [
        ("--preset lasting", "", {}),
        ("--preset=lasting --tau 0.5", "", {"tau": 0.5}),
        ("", "preset: lasting\nlearning_rate: 1.0e-4\n", {"learning_rate": 1e-4}),
        ("--preset lasting --learning_rate 2e-5", "learning_rate: 1.0e-4\n", {"learning_rate": 2e-5}),
    ],
)
def test_a_preset_on_the_command_line(tmp_path, monkeypatch, words, file, expected):
    (tmp_path / "some.yaml").write_text(file + "output_dir: out\n")
    monkeypatch.setattr("sys.argv", ["unlearn", "--config", str(tmp_path / "some.yaml"), *words.split()])
    (args,) = parse_options(MDUConfig)
    expected = LASTING | expected
    assert {name: getattr(args, name) for name in expected} == expected


def test_a_comparison_has_a_run_for_each_preset(tmp_path):
    config = ComparisonConfig(
        str(tmp_path), loss_type=["ga", "mdu"], tau=[0.0], preset=["lasting"], learning_rate=1e-4
    )
    runs = config.runs()
    assert [Path(run.output_dir).name for run in runs] == ["ga", "mdu-tau0", "mdu-lasting"]
    assert [run.learning_rate for run in runs] == [1e-4, 1e-4, LASTING["learning_rate"]]
    assert [config.swept(run) for run in runs] == [{}, {}, {"preset": "lasting"}]


def parsed(monkeypatch, words, *types):
    monkeypatch.setattr("sys.argv", ["tofu", *words.split()])
    return parse_options(*types)


@pytest.mark.parametrize("name", ["paper", "release", "replication"])
def test_a_published_run_by_name(tmp_path, monkeypatch, seen, name):
    args = MDUConfig(str(tmp_path), preset=name)
    assert {option: getattr(args, option) for option in PRESETS[name].training} == PRESETS[name].training
    for option, value in PRESETS[name].training.items():
        assert f"{option}={value}" in seen.text  # in full
    assert PRESETS[name].unknown in " ".join(seen.text.split())
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 16
    rows, config = parsed(monkeypatch, f"--output_dir {tmp_path} --preset {name}", ComparisonArguments, MDUConfig)
    assert {option: getattr(rows, option) for option in PRESETS[name].scoring} == PRESETS[name].scoring
    assert config.forget_masking == PRESETS[name].training["forget_masking"]
    assert "retain_split=retain_perturbed" in seen.text


def test_what_is_set_counts_before_the_rows_and_decoding_of_a_preset(tmp_path, monkeypatch):
    (tmp_path / "some.yaml").write_text("decoding_steps: 64\npreset: lasting\n")
    words = f"--output_dir out --config {tmp_path / 'some.yaml'} --preset paper --max_new_tokens 32"
    rows, config = parsed(monkeypatch, words, ComparisonArguments, MDUConfig)
    assert (rows.decoding_steps, rows.max_new_tokens, rows.retain_split) == (64, 32, "retain_perturbed")
    assert (config.preset, config.learning_rate, config.anchor_input) == ("paper", 1e-5, "masked_prompt")


def test_the_runs_of_a_comparison_share_what_its_presets_agree_on(tmp_path, monkeypatch):
    words = "--output_dir out --preset paper release lasting --learning_rate 1e-4"
    rows, config = parsed(monkeypatch, words, ComparisonArguments, ComparisonConfig)
    assert (rows.retain_split, rows.decoding_steps, rows.rouge) == ("retain_perturbed", 128, "recall")  # not agreed on
    assert [run.learning_rate for run in config.runs()] == [1e-4, 1e-5, 1e-5, 1e-3]
    rows, config = parsed(monkeypatch, "--output_dir out --preset paper", ComparisonArguments, ComparisonConfig)
    assert rows.rouge == "f1" and [run.tau for run in config.runs()] == [0.0, 0.5]


@pytest.mark.parametrize("backbone, epochs", [("llada", 9), ("dream", 5)])
def test_the_papers_table_is_one_file_with_the_settings_of_its_preset(monkeypatch, backbone, epochs):
    words = f"--config {CONFIGS / f'paper_{backbone}.yaml'} --model PATH --bf16 false"
    rows, config, _ = parsed(monkeypatch, words, ComparisonArguments, ComparisonConfig, ModelConfig)
    paper = PRESETS["paper"]
    assert {option: getattr(rows, option) for option in paper.scoring} == paper.scoring
    runs = [run for run in config.runs() if run.loss_type == "mdu"]
    assert [run.tau for run in runs] == [0.0, 0.25, 0.5, 0.75, 1.0] and len(config.runs()) == 10
    expected = paper.training | {"num_train_epochs": epochs}
    for run in runs:
        assert {option: getattr(run, option) for option in expected} == expected | {"tau": run.tau}
