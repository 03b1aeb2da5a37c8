"""RWKU: forgetting real people without a retain set (Jin et al., 2024, arXiv 2406.10890; `jinzhuoran/RWKU`).

    sets = load_rwku("jinzhuoran/RWKU", subjects=["Stephen King"])
    run = evaluate_rwku(model, tokenizer, sets)

What is asked and scored of each config stands in `rwku_questions`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.reading import read_rows
from ..data.words import split_words
from ..files import UserError, read_jsonl
from ..inference.config import Decoding, DiffusionGenerationConfig, decoded_as
from ..models import Backbone, resolve_backbone
from .pairs import questions_of_pairs
from .protocol import MMLU_ROWS, Choices, Protocol, check_protocol
from .results import Run
from .runner import score_run
from .rwku_questions import CONFIGS, config_of
from .scoring import QuestionSet, encode_questions
from .sources import QUESTION_ANSWER, check_columns, config_names, first_rows, load_split, spread, table

FILES = {  # config -> stem of its file in the folders of the published data
    "mia_forget": "forget_mia",
    "mia_retain": "retain_mia",
    "utility_general": "retain_mmlu",
    "utility_reason": "retain_bbh",
    "utility_truthfulness": "truthful",
    "utility_factuality": "triviaqa",
    "utility_fluency": "fluency",
}
MMLU = "utility_general"
ABOUT_SUBJECTS = [*(f"forget_level{n}" for n in (1, 2, 3)), *(f"neighbor_level{n}" for n in (1, 2)), "mia_forget"]


def load_rwku(
    source: str | Path,
    configs: Sequence[str] | None = None,
    subjects: Sequence[str] | None = None,
    max_rows: int | None = None,
    *,
    keep_dataset_cache: bool = False,
    protocol: Protocol = "ours",
) -> dict[str, Dataset]:
    """The sets to evaluate on. All rows about the subjects are checked, whether they are used or not.

    Args:
        source: `jinzhuoran/RWKU`, or a local folder: a copy with its card, or one with a JSON file a config, named as
            the config or as in the published folders.
        configs: of `CONFIGS`; all that the source has unless given.
        subjects: keep only rows about these, of the configs that are about subjects.
        max_rows: use so many evenly spaced rows of each set.
        keep_dataset_cache: as in `load_split`.
        protocol: by "release", MMLU is its first 100 rows, of which `max_rows` are used.

    Raises:
        ValueError: for an unknown config or subject, rows that cannot be asked or scored, or `max_rows` below 1.
    """
    unknown = [config for config in configs or () if config not in CONFIGS]
    if unknown:
        raise UserError(f"RWKU has no config {', '.join(unknown)} to evaluate on; choose from {', '.join(CONFIGS)}.")
    names = config_names(source)
    configs = configs or [config for config in CONFIGS if config in names or FILES.get(config) in names]
    if not configs:
        raise UserError(f"{source} has none of RWKU's configs; it has {', '.join(names) or 'none'}.")
    sets = {}
    for config in configs:
        rows = load_split(source, config, FILES, keep_dataset_cache=keep_dataset_cache)
        if subjects is not None and config in ABOUT_SUBJECTS:
            rows = _about(rows, subjects, config)
        sets[config] = rows
    check_sets(sets)
    if protocol == "release" and MMLU in sets:
        sets[MMLU] = first_rows(sets[MMLU], MMLU_ROWS)
    return {config: spread(rows, max_rows) for config, rows in sets.items()}


def load_forget_rows(path: str | Path, subjects: Sequence[str] | None = None) -> Dataset:
    """The rows to forget: questions and answers that the model wrote about the subjects.

    A row has `question` and `answer`, and `subject` where a file is about several. RWKU's pairs are read, too, such as
    `pair.json`: `intro` is the question, the second of the two texts in `response` the answer, and the first, made up,
    the `refusal`, which DPO prefers.

    Args:
        path: a file of JSON lines or one JSON array; or a folder with one file a subject, named after it
            (`Stephen_King.jsonl`, `1_Stephen_King.jsonl`), or with a folder a subject that has a `forget.jsonl`, or
            else one of RWKU's files of pairs; or such a folder itself.
        subjects: whom to forget; everybody in the file or folder unless given.

    Raises:
        ValueError: for a path or a subject that is not there, several files of pairs, or rows without question or
            answer.
    """
    path = Path(path)
    files = _files_by_subject(path) if path.is_dir() else [("", path)]
    if not files or not all(file.is_file() for _, file in files):
        raise UserError(
            f"{path} is neither a file of JSON lines, nor a folder of such files or of folders with a forget.jsonl."
        )
    if path.is_dir() and subjects is not None:
        named = dict(files)
        missing = [subject for subject in subjects if _plain(subject) not in named]
        if missing:
            raise UserError(
                f"{path} has no file for {_counted(missing, subjects)}: name it such as Stephen_King.jsonl, or "
                "Stephen_King/forget.jsonl."
            )
        files, subjects = [("", named[_plain(subject)]) for subject in subjects], None
    rows: list[Any] = []
    for _, file in files:
        name = f"forget ({file.relative_to(path) if path.is_dir() else file.name})"
        read = questions_of_pairs(read_jsonl(file), f"the {name} set")
        check_columns(table(read, str(file)), name, QUESTION_ANSWER)
        rows += read
    found = table(rows, str(path))
    return found if subjects is None else _about(found, subjects, "forget")


def _files_by_subject(folder: Path) -> list[tuple[str, Path]]:
    """The files of a folder with rows to forget, each with the name of its subject."""
    own = _file_of_subject(folder)
    if own is not None:
        return [(_plain(folder.resolve().name), own)]
    files = [(_plain(file.stem), file) for file in sorted(folder.glob("*.jsonl"))]
    within = [(_plain(part.name), _file_of_subject(part)) for part in sorted(folder.iterdir()) if part.is_dir()]
    return files + [(subject, file) for subject, file in within if file is not None]


def _file_of_subject(folder: Path) -> Path | None:
    """The file with the rows to forget in the folder of one subject; None if it has none."""
    if (folder / "forget.jsonl").is_file():
        return folder / "forget.jsonl"
    pairs = sorted(folder.glob("pair*.json"))
    if len(pairs) > 1:
        raise UserError(
            f"{folder} has several files of pairs, {', '.join(file.name for file in pairs)}: pass the one to forget."
        )
    return pairs[0] if pairs else None


def _about(rows: Dataset, subjects: Sequence[str], name: str) -> Dataset:
    """The rows about these subjects. Each must have some."""
    if "subject" not in rows.column_names:
        raise UserError(f"The {name} set has no column subject to select by; its columns are {rows.column_names}.")
    found = [_plain(str(subject)) for subject in rows["subject"]]
    missing = [subject for subject in subjects if _plain(subject) not in found]
    if missing:
        raise UserError(f"No row of the {name} set is about {_counted(missing, subjects)}; it has {len(set(found))}.")
    return rows.select([i for i, subject in enumerate(found) if subject in map(_plain, subjects)])


def check_sets(sets: Mapping[str, Dataset], protocol: Protocol = "ours", choices: Choices | None = None) -> None:
    """Refuse rows that cannot be asked or scored, and questions without a true and a false choice."""
    for name, rows in sets.items():
        check_columns(rows, name, CONFIGS[name].columns)
        ask = config_of(name, protocol, choices).ask
        for number, row in enumerate(read_rows(rows, name)):
            try:
                answers = CONFIGS[name].ask(row).answers
                ask(row)
            except (KeyError, TypeError, IndexError, ValueError) as error:
                raise UserError(f"Row {number} of the {name} set lacks something: {type(error).__name__}.") from None
            if any(not choices for choices in answers.values()):
                raise UserError(f"Row {number} of the {name} set needs true and false choices.")
    if protocol == "release" and len(sets.get(MMLU, ())) > MMLU_ROWS:
        raise UserError(
            f"{MMLU} has more than its first {MMLU_ROWS} rows: load_rwku(..., protocol='release') takes them."
        )


def evaluate_rwku(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Dataset],
    generation_config: DiffusionGenerationConfig | None = None,
    *,
    decoding: Decoding = "exact",
    method: str = "model",
    backbone: Backbone | None = None,
    num_draws: int = 32,
    progress_path: str | Path | None = None,
    show_progress: bool | str = False,
    max_new_tokens: int | None = None,
    protocol: Protocol = "ours",
    choices: Choices | None = None,
) -> Run:
    """Score a model on RWKU's sets. Every process of an accelerate launch must call this.

    Args:
        model: a masked diffusion language model.
        tokenizer: the model's; prompts become chat turns if it has a chat template.
        sets: from `load_rwku`, of the same protocol.
        generation_config: how answers are decoded, but for the number of tokens, which the benchmark sets.
        num_draws: forward passes for the likelihood of each choice and text.
        decoding, method, backbone, progress_path, show_progress: as in `evaluate_tofu`.
        max_new_tokens: decoded, in place of the protocol's number, of all but chains of thought and long texts.
        protocol: "ours", or "release" for figures beside those of the MDU paper's code.
        choices: multiple choice by "likelihood", or the first letter that is "generated"; the protocol's by default.

    Raises:
        ValueError: for sets, options or a progress file that do not fit.
    """
    check_protocol(protocol, choices)
    check_sets(sets, protocol, choices)
    backbone = backbone or resolve_backbone(model, tokenizer)
    generation_config = decoded_as(generation_config or DiffusionGenerationConfig(), decoding)
    parts = []
    for name, rows in sets.items():
        config = config_of(name, protocol, choices, max_new_tokens)
        asked = [config.ask(row) for row in rows]
        prompts, references = [one.prompt for one in asked], [one.references for one in asked]
        answers = {role: [one.answers[role] for one in asked] for role in asked[0].answers}
        form: dict[str, Any] = {"conversational": config.conversational, "protocol": protocol}
        questions = encode_questions(name, prompts, references, answers, tokenizer, backbone, **form)
        of_set = replace(generation_config, max_new_tokens=config.max_new_tokens)
        parts.append(QuestionSet(name, questions, config.metrics, of_set, num_draws, protocol))
    how: dict[str, Any] = {"backbone": backbone, "progress_path": progress_path, "show_progress": show_progress}
    return score_run(model, tokenizer, parts, method, **how, protocol=protocol)[0]


def _counted(missing: Sequence[str], subjects: Sequence[str]) -> str:
    """The missing subjects by number: whom to forget is not for logs."""
    numbers = ", ".join(str(i) for i, subject in enumerate(subjects, start=1) if subject in missing)
    return f"subject {numbers} of the {len(subjects)} given"


def _plain(subject: str) -> str:
    """A name as it is compared: its words, joined, without the number that files start with."""
    return "".join(split_words(re.sub(r"^\d+_", "", subject)))
