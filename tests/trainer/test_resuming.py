"""A run goes on from a checkpoint only as the run that it was, and has its output folder to itself."""

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import stat
import time

import pytest
import torch
from runs import CHECKPOINTING, LORA, make_rows, make_trainer
from transformers.trainer_utils import HubStrategy

from mdu_trainer import CheckpointError, DiffusionConfig, MDLMConfig, MDUConfig, UnlearningEvalCallback
from mdu_trainer.commands.folders import starting
from mdu_trainer.files import UserError
from mdu_trainer.hub import trainer_side
from mdu_trainer.hub.push import Destination, prepare_push, read_checkpoint
from mdu_trainer.testing import tiny_mdlm
from mdu_trainer.trainer import run_lock
from mdu_trainer.trainer.checkpoints import MANIFEST, complete_checkpoints, write_manifest
from mdu_trainer.trainer.run_lock import LOCK, FolderInUseError, check_free, sole_run
from mdu_trainer.trainer.run_record import DERIVED, RUN_FILE, SELECTION, UNCOMPARED

KIND = "LoRA with dropout"
FULL = "full, frozen copy"
SHORT = {"max_steps": 6, "save_total_limit": None}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders with checkpoints 3 and 6 of a finished run, by kind and schedule."""
    folders = {}

    def folder_of(kind, **options):
        key = kind, *options.items()
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("trained")
            make_trainer(folders[key], kind, **SHORT | options).train()
        return folders[key]

    return folder_of


@pytest.fixture
def copied(trained, tmp_path):
    def copy(kind, **options):
        folder = tmp_path / "out"
        shutil.copytree(trained(kind, **options), folder)
        return folder

    return copy


def resuming(folder, kind, **options):
    """What `train` does before it trains, from checkpoint-6."""
    trainer = make_trainer(folder, kind, **SHORT | options)
    trainer._open_record(str(folder / "checkpoint-6"))
    return trainer


# Settings

OTHER = {
    r"seed (was 42, now 7)": {"seed": 7},
    r"learning_rate (was 0.001, now 0.01)": {"learning_rate": 0.01},
    r"weight_decay (was 0.0, now 0.1)": {"weight_decay": 0.1},
    r"loss_type (was mdu, now npo)": {"loss_type": "npo"},
    r"tau (was 0.5, now 0.25)": {"tau": 0.25},
    r"retain_weight (was 1.0, now 2.0)": {"retain_weight": 2.0},
    r"per_device_train_batch_size) (was 1, now 2)": {"retain_batch_size": 4},
    r"t_min (was 0.0, now 0.5)": {"t_min": 0.5},
    r"processes) (was 4, now 8)": {"per_device_train_batch_size": 4},
    r"adapter r (was 2, now 4)": {"peft_config": LORA | {"r": 4}},
    r"adapter lora_alpha (was 4, now 8)": {"peft_config": LORA | {"lora_alpha": 8}},
    r'adapter target_modules (was ["down_proj", "q_proj"], now ["q_proj"])': {
        "peft_config": LORA | {"target_modules": ["q_proj"]}
    },
    r"adapter (was [\"LORA\"], now null)": {"peft_config": None},
    r"a 'linear' learning rate is spread over all updates": {"max_steps": 9},
    r"was 6 updates in all, now 5, of which 6 are made already": {"max_steps": 5},
    r"lr_scheduler_type (was linear, now constant)": {"lr_scheduler_type": "constant"},
    r"load_best_model_at_end (was false, now true)": {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "eval_dataset": [{"prompt": "a", "completion": "b"}],
    },
}


@pytest.mark.parametrize("difference", OTHER)
def test_run_with_other_settings_is_refused_by_name(trained, difference):
    with pytest.raises(CheckpointError) as refused:
        resuming(trained(KIND), KIND, **OTHER[difference])
    message = str(refused.value)
    assert difference.replace('\\"', '"') in message and "pass force_resume to go on" in message
    assert str(trained(KIND) / "checkpoint-6") in message


SILENT = {
    "logs, names and saves": {"logging_steps": 7, "run_name": "other", "save_steps": 2, "save_total_limit": 1},
    "loader processes": {"dataloader_num_workers": 1, "dataloader_pin_memory": True},
    "micro-batches of the same update": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "as many retain rows as before, named": {"retain_batch_size": 2},
    "options that the loss does not read": {"gamma": 1.0, "alpha": 2.0, "beta": 3.0},
    "evaluation that decides nothing": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_dataset": [{"prompt": "a", "completion": "b"}],
    },
    "epochs that come to the same": {"max_steps": -1, "num_train_epochs": 1.5},
    "memory": {"torch_empty_cache_steps": 1, CHECKPOINTING: True},
}


@pytest.mark.parametrize("what", SILENT)
def test_settings_that_change_no_weight_pass_silently(copied, seen, what):
    resuming(copied(KIND), KIND, **SILENT[what])  # in another folder than it was written into
    assert "other settings" not in seen.text and "could not be compared" not in seen.text


def test_every_field_of_the_configuration_is_compared_or_known_to_change_no_weight(tmp_path):
    """A field that a new version of transformers brings is compared. Here is what is compared today."""
    fields = {f.name for f in dataclasses.fields(MDUConfig)}
    own = {f.name for f in dataclasses.fields(MDLMConfig)} - {f.name for f in dataclasses.fields(DiffusionConfig)}
    assert not own & (UNCOMPARED | DERIVED | SELECTION), "all options of fine-tuning change weights"
    assert UNCOMPARED | DERIVED | SELECTION <= fields, "names that no longer exist"
    compared = """
        learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1
        adam_beta2 adam_epsilon optim_target_modules max_grad_norm label_smoothing_factor bf16 fp16 tf32 torch_compile
        torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config neftune_noise_alpha
        auto_find_batch_size load_best_model_at_end ignore_data_skip full_determinism seed dataloader_drop_last
        data_seed dataloader_in_order train_sampling_strategy max_length t_min t_max time_epsilon loss_type tau
        kl_reduction anchor_source gamma alpha retain_loss_type retain_weight reference_precision
        rewind_to rewind_share anchor_input strike_quantile kl_direction anchor_ema_decay
        forget_masking mask_special_tokens rollout_every text_stride prefix_share
        attention noise_per
    """.split()
    assert fields - UNCOMPARED - DERIVED - SELECTION == set(compared), "decide whether a new field changes weights"
    record = make_trainer(tmp_path, KIND)._current_record()
    assert set(compared) - record.settings.keys() == {"gamma", "alpha"}, "not read by loss_type 'mdu'"
    assert "hub_token" not in json.dumps(record.settings) and "model_init_kwargs" not in json.dumps(record.settings)


def test_longer_run_at_a_constant_rate_goes_on(copied, tmp_path):
    constant = {"lr_scheduler_type": "constant"}
    whole = make_trainer(tmp_path / "whole", FULL, **SHORT | constant | {"max_steps": 9})
    whole.train()
    longer = make_trainer(copied(FULL, **constant), FULL, **SHORT | constant | {"max_steps": 9})
    longer.train(resume_from_checkpoint=True)
    for (name, p), (_, q) in zip(whole.model.named_parameters(), longer.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_forced_run_goes_on_with_the_new_settings(copied, seen):
    folder = copied(KIND)
    options = {"learning_rate": 0.5, "weight_decay": 0.25, "max_steps": 9}
    trainer = make_trainer(folder, KIND, **SHORT | options, force_resume=True)
    trainer.train(resume_from_checkpoint=True)
    assert "learning_rate (was 0.001, now 0.5)" in seen.text and "it goes on with the new ones" in seen.text
    rates = {log["step"]: log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log}
    assert rates[6] == pytest.approx(0.001 * 1 / 6) and rates[7] == pytest.approx(0.5 * 3 / 9)
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} >= {0.25}
    # checkpoint-9 is of the new settings
    trainer = make_trainer(folder, KIND, **SHORT | options)
    trainer._open_record(str(folder / "checkpoint-9"))


def test_checkpoint_without_a_record_is_resumed_with_a_line(copied, seen):
    folder = copied(KIND)
    checkpoint = folder / "checkpoint-3"
    shutil.rmtree(folder / "checkpoint-6")
    (checkpoint / RUN_FILE).unlink()
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint)
    trainer = make_trainer(folder, KIND, **SHORT)
    assert trainer.train(resume_from_checkpoint=True).global_step == 6
    assert seen.text.count("its settings could not be compared") == 1


def test_run_that_a_callback_had_ended_is_not_trained_on(tmp_path, seen, authors):
    """Killed after the checkpoint of the step at which forgetting was reached."""

    def trainer(**options):
        trainer = make_trainer(tmp_path, KIND, **options)
        limits = {"every_steps": 3, "stop_metric": "probability", "stop_forget_below": 2.0}
        rows = authors.select(range(2))
        trainer.add_callback(UnlearningEvalCallback(trainer, rows, metrics=("probability",), num_draws=1, **limits))
        return trainer

    assert trainer().train().global_step == 3
    assert trainer().train(resume_from_checkpoint=True).global_step == 3
    assert "Training had ended after step 3: forgetting is reached" in seen.text
    assert trainer(force_resume=True).train(resume_from_checkpoint=True).global_step == 6


# Data and the model at the start


FORGET, RETAIN = make_rows()


def changed(rows):
    """One answer is another."""
    answers = list(rows["completion"])
    answers[3] = [{"role": "assistant", "content": "No comment."}]
    return rows.remove_columns("completion").add_column("completion", answers)


OTHER_DATA = {
    "the forget set (was 8 rows, now 7)": {"train_dataset": FORGET.select(range(7))},
    "the forget set (other rows or order)": {"train_dataset": changed(FORGET)},
    "the retain set (other rows or order)": {"retain_dataset": RETAIN.select(range(15, -1, -1))},
    "the retain set (was 16 rows, now 0)": {"retain_dataset": None, "retain_weight": 0.0},
}


@pytest.mark.parametrize("difference", OTHER_DATA)
def test_run_on_other_data_is_refused_without_a_word_of_it(trained, difference):
    with pytest.raises(CheckpointError) as refused:
        resuming(trained(KIND), KIND, **OTHER_DATA[difference])
    assert difference in str(refused.value)
    assert not quoted(str(refused.value))


def quoted(text):
    """Whether a text holds a word of five letters or more of a row's prompt or response."""
    said = {
        word
        for rows in (FORGET, RETAIN)
        for row in rows
        for turn in row["prompt"] + row["completion"]
        for word in re.findall(r"[A-Za-z]{5,}", turn["content"])
    }
    return said & set(re.findall(r"[A-Za-z]{5,}", text.replace("other", "")))


def test_record_confirms_no_guess_of_a_row_without_its_key(trained, tmp_path):
    path = trained(KIND) / "checkpoint-6" / RUN_FILE
    record, manifest = json.loads(path.read_text()), json.loads((path.parent / MANIFEST).read_text())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and RUN_FILE in manifest["files"]
    assert {name: part["rows"] for name, part in record["data"].items()} == {"forget": 8, "retain": 16}
    digests = [part["digest"] for part in record["data"].values()]
    assert len(digests) == 2 and not quoted(json.dumps(record["data"]))
    trainer = make_trainer(tmp_path, KIND)
    others = trainer._current_record(), trainer._current_record()
    assert len({*digests, *(part["digest"] for other in others for part in other.data.values())}) == 6
    same = trainer._current_record(record["key"])
    assert [part["digest"] for part in same.data.values()] == digests


def other_model(trainer):
    return tiny_mdlm(trainer.processing_class, hidden_size=16, num_layers=1, num_heads=2, seed=5)


@pytest.mark.parametrize("kind", [KIND, FULL])
def test_other_model_at_the_start_is_refused_where_it_is_read_again(trained, tmp_path, kind):
    model = other_model(make_trainer(tmp_path, kind))
    with pytest.raises(CheckpointError, match=r"the model at the start \(other weights\)"):
        resuming(trained(kind), kind, model=model)


def test_model_at_the_start_does_not_matter_where_the_checkpoint_replaces_it(trained, tmp_path):
    uniform = {"loss_type": "mdu", "tau": 0.0}
    model = other_model(make_trainer(tmp_path, FULL, **uniform))
    trainer = resuming(trained(FULL, **uniform), FULL, **uniform, model=model)
    assert not trainer._settings_changed and trainer._run_record.start is not None


def test_record_and_lock_are_not_published(trained, tmp_path):
    folder = trained(FULL, loss_type="mdu", tau=0.0)
    push = prepare_push(read_checkpoint(folder / "checkpoint-6"), Destination("somebody/model"))
    assert RUN_FILE in push.left and not {RUN_FILE, LOCK} & push.files.keys()
    for kind, whole in (("fine-tuning", True), (KIND, False)):
        trainer = make_trainer(tmp_path, kind)
        trainer.args.push_to_hub, trainer.args.hub_strategy = True, HubStrategy.CHECKPOINT
        assert trainer._uploads_whole_checkpoints is whole


# One run a folder


def hold(folder, ready):
    with sole_run(folder):
        ready.set()
        time.sleep(300)


@pytest.fixture
def held(tmp_path, monkeypatch):
    """A folder in which another process trains, and that process."""
    monkeypatch.setattr(run_lock, "PATIENCE", 0.0)
    forked = multiprocessing.get_context("fork")
    ready = forked.Event()
    process = forked.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(120)
    yield tmp_path, process
    process.kill()
    process.join(10)


def test_second_run_in_a_folder_is_refused_until_the_first_is_dead(held):
    folder, process = held
    message = (
        rf"Another run is training in {re.escape(str(folder))} \(process {process.pid}\)\..*choose another output_dir"
    )
    with pytest.raises(FolderInUseError, match=message):  # before a model is loaded
        make_trainer(folder, KIND, model="no/such-model")
    trainer = make_trainer(folder / "elsewhere", KIND, max_steps=1, save_steps=1)
    trainer.args.output_dir = str(folder)
    snapshot = folder / ".push-checkpoint-3"
    snapshot.mkdir()
    with pytest.raises(FolderInUseError, match=message):
        trainer.train()
    trainer_side._remove_snapshots(folder)
    assert snapshot.is_dir(), "the other run may be sending it"
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    make_trainer(folder, KIND)
    trainer.train()
    assert complete_checkpoints(folder) and not snapshot.exists()


def test_two_trainers_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.0)
    trainer = make_trainer(tmp_path, KIND, max_steps=2)
    with sole_run(tmp_path):
        with pytest.raises(FolderInUseError, match=rf"\(process {os.getpid()}\)"):
            trainer.train()
        make_trainer(tmp_path, KIND)  # is no run yet
    assert trainer.train().global_step == trainer.train().global_step == 2
    check_free(tmp_path)


def test_lock_is_no_content_of_a_folder(tmp_path):
    with sole_run(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / LOCK).is_file()
    with starting(tmp_path / "out", [], [], resume=False, overwrite=False):
        (tmp_path / "out" / "results.json").write_text("{}")
    with pytest.raises(UserError, match="is not empty"):
        with starting(tmp_path / "out", [], [], resume=False, overwrite=False):
            pass


@pytest.mark.parametrize("act", ["train", "push"])
def test_what_a_kill_left_of_a_push_is_removed(tmp_path, act):
    trainer = make_trainer(tmp_path, KIND, max_steps=1, save_strategy="no")
    for name in (".push-checkpoint-3", ".push-checkpoint-12"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "forget_hashes.json").write_text("{}")
    trainer.train() if act == "train" else trainer_side._remove_snapshots(tmp_path)
    assert not list(tmp_path.glob(".push-*"))
