"""Published benchmarks beside TOFU and RWKU: where their rows lie, and how each set is asked and scored.

    mdu score --model PATH --benchmark muse --dataset_name muse-bench/MUSE-News
    mdu score --model PATH --benchmark wmdp --dataset_name cais/wmdp
    mdu score --model PATH --benchmark lume --dataset_name FOLDER
    mdu score --model PATH --benchmark pistol --dataset_name xinchiqiu/PISTOL --subjects A_B
    mdu score --model PATH --benchmark rtofu --dataset_name sangyon/R-TOFU --forget_split forget10
    mdu score --model PATH --benchmark knowundo --dataset_name zjunlp/KnowUnDo --configs privacy_forget privacy_retain

Each is a few declarations in `PUBLISHED`: name of a set -> its config and split, its columns, how it is asked, what is
measured. Data with other places or columns needs no code: `--configs SET=CONFIG/SPLIT` and `--columns NAME=COLUMN`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from .columns import GROUP, ROWS
from .metrics import min_k_score
from .registry import METRICS, Metric, RowScores
from .rwku_questions import CONFIGS, Asked
from .scoring import QuestionBatch

Row = dict[str, Any]
QUESTION, CHOICES, TEXT = ("question", "answer"), ("question", "choices", "answer"), ("text",)
LEAST_LIKELY = 0.4  # MUSE's share of a text's tokens


def _ask(row: Row) -> Asked:
    return Asked(row["question"], [row["answer"]], {"answer": [row["answer"]]})


def _member(row: Row) -> Asked:
    return Asked("", [row["text"]], {"answer": [row["text"]]})


def _choose(subject: str, row: Row) -> Asked:
    """Four choices with letters, as lm-evaluation-harness puts WMDP's."""
    return CONFIGS["utility_general"].ask(row | {"task": subject})


def _min_k(batch: QuestionBatch) -> RowScores:
    tokens = [roles["answer"].tokens[0] for roles in batch.likelihoods]
    return {"min_k": min_k_score(tokens, LEAST_LIKELY)}


METRICS_OF = {name: METRICS[name] for name in ("rougeL", "probability", "accuracy")}
METRICS_OF["min_k"] = Metric(_min_k, ("answer",))


@dataclass(frozen=True)
class Part:
    """One set of a benchmark.

    Attributes:
        place: CONFIG, or CONFIG/SPLIT; `{forget}` and `{retain}` stand for `forget_split` and `retain_split`.
        wanted: names here of the columns that it needs.
        columns: name here -> name in the published data, where it differs. `rows` is read where the data has it.
        ask: from a row to what is asked.
        metrics: of `METRICS_OF`.
        max_new_tokens: decoded.
        plain: the rows are running text, no turns of a chat.
        examples: place of questions with answers that stand before each question, where the data has them.
        chosen: of rows about several subjects, whether those about `subjects` are meant (True) or all others (False).
            The column `group` says whom a row is about. None: it makes a set of each of its values.
    """

    place: str
    wanted: tuple[str, ...] = QUESTION
    columns: Mapping[str, str] = field(default_factory=dict)
    ask: Callable[[Row], Asked] = _ask
    metrics: tuple[str, ...] = ("rougeL", "probability")
    max_new_tokens: int = 128
    plain: bool = False
    examples: str | None = None
    chosen: bool | None = None


class Source(NamedTuple):
    """A benchmark: where it is published, and its sets by name. `files` are config -> stem of its file in a folder."""

    hub: str
    parts: dict[str, Part]
    files: Mapping[str, str] = {}


def _knowmem(kind: str) -> Part:
    return Part(f"knowmem/{kind}_qa", max_new_tokens=32, examples=f"knowmem/{kind}_qa_icl")


def _privleak(kind: str) -> Part:
    return Part(f"privleak/{kind}", TEXT, ask=_member, metrics=("min_k",), plain=True)


def _wmdp(config: str, subject: str) -> Part:
    ask = partial(_choose, subject)
    return Part(f"wmdp-{config}", CHOICES, ask=ask, metrics=("accuracy",))


def _lume(kind: str) -> Part:
    return Part(f"default/{kind}_train", columns={"question": "input", "answer": "output", GROUP: "task"})


def _knowundo(config: str, split: str) -> Part:
    return Part(f"{config}/{split}", columns={ROWS: "val", "question": "text", "answer": "labels"})


PUBLISHED = {
    "muse": Source(  # Shi et al., arXiv 2407.06460
        "muse-bench/MUSE-News, muse-bench/MUSE-Books",
        {
            "verbmem": Part("verbmem/forget", columns={"question": "prompt", "answer": "gt"}, plain=True),
            "knowmem_forget": _knowmem("forget"),
            "knowmem_retain": _knowmem("retain"),
            **{f"privleak_{kind}": _privleak(kind) for kind in ("forget", "retain", "holdout")},
        },
    ),
    "wmdp": Source(  # Li et al., arXiv 2403.03218
        "cais/wmdp",
        {
            name: _wmdp(name, subject)
            for name, subject in (("bio", "biology"), ("chem", "chemistry"), ("cyber", "cybersecurity"))
        },
    ),
    "lume": Source(  # Ramakrishna et al., arXiv 2502.15097
        "llmunlearningsemeval2025organization/semeval25-unlearning-dataset-public",
        {kind: _lume(kind) for kind in ("forget", "retain")},
    ),
    "pistol": Source(  # Qiu et al., arXiv 2406.16810
        "xinchiqiu/PISTOL",
        {
            "forget": Part("pistol_data_1", columns={GROUP: "edge"}, chosen=True),
            "retain": Part("pistol_data_1", columns={GROUP: "edge"}, chosen=False),
        },
        {"pistol_data_1": "sample_data_1", "pistol_data_2": "sample_data_2"},
    ),
    "rtofu": Source(  # Yoon et al., arXiv 2505.15214
        "sangyon/R-TOFU",
        {
            "forget": Part("default/{forget}"),
            "forget_cot": Part("default/{forget}", columns={"answer": "cot"}, max_new_tokens=512),
            "retain": Part("default/{retain}"),
            "retain_cot": Part("default/{retain}", columns={"answer": "cot"}, max_new_tokens=512),
        },
    ),
    "knowundo": Source(  # Tian et al., arXiv 2407.01920
        "zjunlp/KnowUnDo",
        {
            f"{config}_{name}": _knowundo(config, split)
            for config in ("copyright", "privacy")
            for name, split in (("forget", "unlearn"), ("retain", "retention"))
        },
    ),
}
