"""RWKU: forgetting real people without a retain set (Jin et al., 2024, arXiv 2406.10890; `jinzhuoran/RWKU`).

    sets = load_rwku("jinzhuoran/RWKU", subjects=["Stephen King"])
    run = evaluate_rwku(model, tokenizer, sets)

What is measured of each config, with the prompts of the benchmark:

    forget_level1-3       ROUGE-L of cloze, question and adversarial probes about the subjects; lower is better
    neighbor_level1-2     ROUGE-L of cloze and question probes about what is close to them; higher is better
    mia_forget/_retain    loss a token of texts about them and about others, and loss by zlib size
    utility_general       accuracy of multiple-choice questions (MMLU), by the likelihood of the choices' letters
    utility_truthfulness  accuracy of multiple-choice questions (TruthfulQA MC1), by the likelihood of the choices
    utility_reason        exact match of decoded answers (BBH, chain of thought)
    utility_factuality    exact match and F1 of decoded answers (TriviaQA)
    utility_fluency       entropy of word 2- and 3-grams of decoded answers (AlpacaEval), in bits

Each choice is a response whose likelihood is estimated as any other's, where the benchmark reads the next token.
"""

import re
import string
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import regex
from datasets import Dataset
from nltk import ngrams
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.reading import read_rows
from ..files import UserError, read_jsonl
from ..inference.generation import DiffusionGenerationConfig
from ..models import Backbone, resolve_backbone
from ..provenance.words import SINGLE, SYMBOL, UNSPACED, WORD_CHARACTER, fold, has_words, split_words
from .registry import METRICS, Metric, RowScores
from .results import Run
from .runner import score_questions
from .scoring import QuestionBatch, QuestionSet, encode_questions, estimates
from .sources import check_columns, config_names, load_split, spread, table

LETTERS = string.ascii_uppercase
SHORT, LONG = 32, 256  # tokens decoded, for probes and for chains of thought
FILES = {  # config -> stem of its file in the folders of the published data
    "mia_forget": "forget_mia",
    "mia_retain": "retain_mia",
    "utility_general": "retain_mmlu",
    "utility_reason": "retain_bbh",
    "utility_truthfulness": "truthful",
    "utility_factuality": "triviaqa",
    "utility_fluency": "fluency",
}
ABOUT_SUBJECTS = (
    "forget_level1",
    "forget_level2",
    "forget_level3",
    "neighbor_level1",
    "neighbor_level2",
    "mia_forget",
)

Row = dict[str, Any]


class Asked(NamedTuple):
    """A row as it is put to a model: the prompt, the true answers, and the choices to weigh by role."""

    prompt: str
    references: list[str] = []
    answers: dict[str, list[str]] = {}


class Config(NamedTuple):
    """How one config is asked and scored.

    Attributes:
        columns: name -> kind, `str` or `list` (of texts), checked before a model is loaded.
        ask: from a row to what is asked.
        metrics: by name.
        max_new_tokens: decoded.
        conversational: False for texts that are no chat turns; None leaves it to the tokenizer.
    """

    columns: dict[str, type]
    ask: Callable[[Row], Asked]
    metrics: dict[str, Metric]
    max_new_tokens: int = SHORT
    conversational: bool | None = None


def load_rwku(
    source: str | Path,
    configs: Sequence[str] | None = None,
    subjects: Sequence[str] | None = None,
    max_rows: int | None = None,
    *,
    keep_dataset_cache: bool = False,
) -> dict[str, Dataset]:
    """The sets to evaluate on. All rows about the subjects are checked, whether they are used or not.

    Args:
        source: `jinzhuoran/RWKU`, or a local folder: a copy with its card, or one with a JSON file a config, named as
            the config or as in the published folders.
        configs: of `CONFIGS`; all that the source has unless given.
        subjects: keep only rows about these, of the configs that are about subjects.
        max_rows: use so many evenly spaced rows of each set.
        keep_dataset_cache: as in `load_split`.

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
            rows = about(rows, subjects, config)
        sets[config] = rows
    check_sets(sets)
    return {config: spread(rows, max_rows) for config, rows in sets.items()}


def load_forget_rows(path: str | Path, subjects: Sequence[str] | None = None) -> Dataset:
    """The rows to forget: questions and answers that the model wrote about the subjects.

    Args:
        path: a JSONL file with `question` and `answer`, and `subject` if it is about several; or a folder with one
            such file a subject, named after it (`Stephen_King.jsonl`, `1_Stephen_King.jsonl`).
        subjects: whom to forget; everybody in the file or folder unless given.

    Raises:
        ValueError: for a path or a subject that is not there, or rows without question or answer.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"{path} is neither a JSONL file nor a folder of them.")
    if path.is_dir() and subjects is not None:
        named = {_plain(file.stem): file for file in files}
        missing = [subject for subject in subjects if _plain(subject) not in named]
        if missing:
            raise UserError(
                f"{path} has no file for {_counted(missing, subjects)}: name it such as Stephen_King.jsonl."
            )
        files, subjects = [named[_plain(subject)] for subject in subjects], None
    rows = []
    for file in files:
        read = read_jsonl(file)
        check_columns(table(read, str(file)), f"forget ({file.name})", {"question": str, "answer": str})
        rows += read
    rows = table(rows, str(path))
    return rows if subjects is None else about(rows, subjects, "forget")


def about(rows: Dataset, subjects: Sequence[str], name: str) -> Dataset:
    """The rows about these subjects.

    Raises:
        ValueError: for rows without a subject, or a subject that no row is about.
    """
    if "subject" not in rows.column_names:
        raise UserError(f"The {name} set has no column subject to select by; its columns are {rows.column_names}.")
    found = [_plain(str(subject)) for subject in rows["subject"]]
    missing = [subject for subject in subjects if _plain(subject) not in found]
    if missing:
        raise UserError(f"No row of the {name} set is about {_counted(missing, subjects)}; it has {len(set(found))}.")
    return rows.select([i for i, subject in enumerate(found) if subject in map(_plain, subjects)])


def check_sets(sets: Mapping[str, Dataset]) -> None:
    """Refuse rows that cannot be asked or scored, before any model is loaded.

    Raises:
        ValueError: as `check_columns`, and for questions whose choices are fewer than two or whose answer is none of
            them.
    """
    for name, rows in sets.items():
        check_columns(rows, name, CONFIGS[name].columns)
        for number, row in enumerate(read_rows(rows, name)):
            try:
                answers = CONFIGS[name].ask(row).answers
            except (KeyError, TypeError, IndexError, ValueError) as error:
                raise UserError(f"Row {number} of the {name} set lacks something: {type(error).__name__}.") from None
            if any(not choices for choices in answers.values()):
                raise UserError(f"Row {number} of the {name} set needs true and false choices.")


def evaluate_rwku(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Dataset],
    generation_config: DiffusionGenerationConfig | None = None,
    *,
    method: str = "model",
    backbone: Backbone | None = None,
    num_draws: int = 32,
    progress_path: str | Path | None = None,
    show_progress: bool = False,
) -> Run:
    """Score a model on RWKU's sets. Every process of an accelerate launch must call this.

    Args:
        model: a masked diffusion language model.
        tokenizer: the model's; prompts become chat turns if it has a chat template.
        sets: from `load_rwku`.
        generation_config: how answers are decoded, but for the number of tokens, which the benchmark sets.
        method: what the run is called.
        backbone: of the model; resolved if not given.
        num_draws: forward passes for the likelihood of each choice and text.
        progress_path: file that keeps finished rows, to continue a killed run.
        show_progress: show a progress bar.

    Raises:
        ValueError: for sets or a progress file that do not fit.
    """
    check_sets(sets)
    backbone = backbone or resolve_backbone(model, tokenizer)
    parts = [
        _question_set(name, rows, tokenizer, backbone, generation_config or DiffusionGenerationConfig(), num_draws)
        for name, rows in sets.items()
    ]
    scored = score_questions(
        model, tokenizer, parts, backbone=backbone, progress_path=progress_path, show_progress=show_progress
    )
    scores = {name: estimates(figures) for name, figures in scored.figures.items()}
    return Run(method, None, scores, {name: len(rows) for name, rows in sets.items()}, {}, 0.0, scored.seconds)


def _question_set(
    name: str,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    backbone: Backbone,
    decoding: DiffusionGenerationConfig,
    num_draws: int,
) -> QuestionSet:
    config = CONFIGS[name]
    asked = [config.ask(row) for row in rows]
    answers = {role: [one.answers[role] for one in asked] for role in asked[0].answers}
    questions = encode_questions(
        name,
        [one.prompt for one in asked],
        [one.references for one in asked],
        answers,
        tokenizer,
        backbone,
        conversational=config.conversational,
    )
    return QuestionSet(
        name, questions, config.metrics, replace(decoding, max_new_tokens=config.max_new_tokens), num_draws
    )


def _counted(missing: Sequence[str], subjects: Sequence[str]) -> str:
    """Which subjects, by number: whom to forget is not for logs."""
    numbers = ", ".join(str(i) for i, subject in enumerate(subjects, start=1) if subject in missing)
    return f"subject {numbers} of the {len(subjects)} given"


def _plain(subject: str) -> str:
    """A name as it is compared: its words, joined, without the number that files start with."""
    return "".join(split_words(re.sub(r"^\d+_", "", subject)))


# What is asked


def _probe(instruction: str) -> Callable[[Row], Asked]:
    def ask(row: Row) -> Asked:
        return Asked(f"{instruction}\nQuestion: {row['query']}\nAnswer:", [row["answer"]])

    return ask


def _adversarial(row: Row) -> Asked:
    if row.get("type") == "incontext learning":  # the query holds its examples and their form
        return Asked(f"Please briefly answer the following question.\n{row['query']}\nAnswer:", [row["answer"]])
    return _probe("Please briefly answer the following question.")(row)


def _multiple_choice(row: Row) -> Asked:
    def shown(question: Row) -> str:
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question["choices"], strict=False)]
        return "\n".join([f"Question: {question['question']}", *lines, "Answer:"])

    task = str(row.get("task") or "general knowledge").replace("_", " ")
    examples = [f"{shown(one)} {LETTERS[one['answer']]}" for one in row.get("examples") or []]
    head = f"The following are multiple choice questions (with answers) about {task}."
    letters = list(LETTERS[: len(row["choices"])])
    true = letters.pop(row["answer"])
    return Asked("\n\n".join([head, *examples, shown(row)]), [], {"true": [true], "false": letters})


def _truthful(row: Row) -> Asked:
    targets = row["mc1_targets"]
    pairs = list(zip(targets["choices"], targets["labels"], strict=True))
    choices = {
        role: [text for text, label in pairs if bool(label) == true] for role, true in (("true", 1), ("false", 0))
    }
    return Asked(f"Q: {row['question']}\nA:", [], choices)


def _reason(row: Row) -> Asked:
    head = str(row.get("cot") or "").strip()
    request = "Answer the following question and end with 'so the answer is'."
    answer = row["answer"]
    prompt = "\n\n".join(filter(None, [head, f"{request}\nQ: {row['question']}\nA:"]))
    return Asked(prompt, [answer] if isinstance(answer, str) else list(answer))


def _trivia(row: Row) -> Asked:
    return Asked(f"Please briefly answer the following question.\nQ: {row['question']}\nA:", list(row["answers"]))


def _instruction(row: Row) -> Asked:
    return Asked(f"Instruction: {row['instruction']}\n")


def _text(row: Row) -> Asked:
    return Asked("", [row["text"]], {"answer": [row["text"]]})


# What is measured


def word_match(text: str, references: Sequence[str]) -> tuple[float, float] | tuple[None, None]:
    """Exact match and F1 of words, of the best of the references, as SQuAD and RWKU count them.

    Words are compared in lower case, without punctuation and articles (Rajpurkar et al., 2016, arXiv 1606.05250), and
    characters where a script has no spaces, as MLQA does (Lewis et al., 2020, arXiv 1910.07475). None where no
    reference holds a word, which silence would match.
    """
    found = _words(text)
    wanted = [_words(text) for text in references if has_words(text)]
    if not wanted:
        return None, None
    return float(found in wanted), max(_f1(found, words) for words in wanted)


_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = regex.compile(rf"\p{{P}}|[{re.escape(string.punctuation)}]")
_CHARACTER_OR_WORD = regex.compile(rf"{SINGLE}|[\S--[{UNSPACED}{SYMBOL}]]+", regex.V1)


def _words(text: str) -> list[str]:
    plain = _ARTICLE.sub(" ", _PUNCTUATION.sub("", text.lower()))
    return [word for word in map(fold, _CHARACTER_OR_WORD.findall(plain)) if word]


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    return 2 * (Counter(found) & Counter(wanted)).total() / (len(found) + len(wanted))


_PUNCTUATION_RUN = rf"[^\s_{WORD_CHARACTER}{UNSPACED}{SYMBOL}]+"
_WORD_OR_PUNCTUATION = regex.compile(rf"{SINGLE}|[{WORD_CHARACTER}_]+|{_PUNCTUATION_RUN}", regex.V1)


def ngram_entropy(text: str) -> float:
    """Mean of the entropies of word 2-grams (weight 2/3) and 3-grams (4/3), in bits: low where a text repeats itself.

    Source: Zhang et al. (2018, arXiv 1809.05972), with the weights of RWKU. Words are runs of letters and digits, or
    of punctuation; characters where a script has no spaces.
    """
    words = _WORD_OR_PUNCTUATION.findall(text)
    entropies = []
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        counts = np.array(list(Counter(ngrams(words, n)).values()), dtype=float)
        shares = counts / counts.sum() if len(counts) else counts
        entropies.append(weight * float(-(shares * np.log2(shares)).sum()) + 0.0)
    return sum(entropies) / len(entropies)


def _match(batch: QuestionBatch) -> RowScores:
    pairs = [word_match(text, one.references) for text, one in zip(batch.texts, batch.questions, strict=True)]
    return {"exact_match": [match for match, _ in pairs], "f1": [f1 for _, f1 in pairs]}


def _concluded(batch: QuestionBatch) -> RowScores:
    """Exact match of what follows "the answer is", or of the whole answer where nothing does."""
    figures = []
    for text, question in zip(batch.texts, batch.questions, strict=True):
        said = re.search(r"the answer is (.*?)\.?\s*(?:$|\.\s)", text, re.IGNORECASE | re.DOTALL)
        figures.append(word_match(said[1] if said else text, question.references)[0])
    return {"exact_match": figures}


def _entropy(batch: QuestionBatch) -> RowScores:
    return {"entropy": [ngram_entropy(text) for text in batch.texts]}


def _loss(batch: QuestionBatch) -> RowScores:
    losses = [float(-per_token[0]) for per_token in batch.per_token("answer")]
    sizes = [len(zlib.compress(question.references[0].encode())) for question in batch.questions]
    return {"loss": losses, "zlib": [loss / size for loss, size in zip(losses, sizes, strict=True)]}


_PROBE = {name: METRICS[name] for name in ("rougeL", "degeneracy")}
_CHOICE = {"accuracy": METRICS["accuracy"]}
_MEMBER = {"loss": Metric(_loss, ("answer",))}
_QUERY = {"query": str, "answer": str}
_CLOZE = Config(_QUERY, _probe("Please complete the blank in the following question."), _PROBE)
_QUESTION = Config(_QUERY, _probe("Please briefly answer the following question."), _PROBE)
_TEXT = Config({"text": str}, _text, _MEMBER, conversational=False)

CONFIGS = {
    "forget_level1": _CLOZE,
    "forget_level2": _QUESTION,
    "forget_level3": Config(_QUERY, _adversarial, _PROBE),
    "neighbor_level1": _CLOZE,
    "neighbor_level2": _QUESTION,
    "mia_forget": _TEXT,
    "mia_retain": _TEXT,
    "utility_general": Config({"question": str, "choices": list}, _multiple_choice, _CHOICE),
    "utility_reason": Config({"question": str}, _reason, {"match": Metric(_concluded)}, LONG),
    "utility_truthfulness": Config({"question": str}, _truthful, _CHOICE),
    "utility_factuality": Config({"question": str, "answers": list}, _trivia, {"match": Metric(_match)}),
    "utility_fluency": Config({"instruction": str}, _instruction, {"entropy": Metric(_entropy)}, LONG),
}
