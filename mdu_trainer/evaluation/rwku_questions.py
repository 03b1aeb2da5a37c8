"""RWKU's questions: how a row of each config is put to a model, with the prompts of the benchmark, and what is scored.

    forget_level1-3       ROUGE-L of cloze, question and adversarial probes about the subjects; lower is better
    neighbor_level1-2     ROUGE-L of cloze and question probes about what is close to them; higher is better
    mia_forget/_retain    loss a token of texts about them and about others, and loss by zlib size
    utility_general       accuracy of multiple-choice questions (MMLU), by the likelihood of the choices' letters
    utility_truthfulness  accuracy of multiple-choice questions (TruthfulQA MC1), by the likelihood of the choices
    utility_reason        exact match of decoded answers (BBH, chain of thought)
    utility_factuality    exact match and F1 of decoded answers (TriviaQA)
    utility_fluency       entropy of word 2- and 3-grams of decoded answers (AlpacaEval), in bits

Each choice is a response whose likelihood is estimated as any other's, where the benchmark reads the next token. With
choices "generated" both are lettered questions instead, and `letter_accuracy` reads the first letter of a decoded
answer. What the protocol "release" changes stands in `protocol`; TriviaQA then has `substring_match`.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import regex
from nltk import ngrams

from ..data.words import SINGLE, SYMBOL, UNSPACED, WORD_CHARACTER, fold, has_words
from .metrics import zlib_score
from .protocol import DECODED
from .registry import METRICS, Metric, RowScores
from .scoring import QuestionBatch, digest

LETTERS = string.ascii_uppercase
BRIEFLY = "Please briefly answer the following question."
SHORT, LONG = 32, 256  # tokens decoded, for probes and for chains of thought

Row = dict[str, Any]


class Asked(NamedTuple):
    """A row as it is put to a model: the prompt, the true answers, and the choices to weigh by role."""

    prompt: str
    references: list[str] = []
    answers: dict[str, list[str]] = {}


class Config(NamedTuple):
    """The way in which one config is asked and scored.

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


def _probe(instruction: str, row: Row) -> Asked:
    return Asked(f"{instruction}\nQuestion: {row['query']}\nAnswer:", [row["answer"]])


def _adversarial(row: Row) -> Asked:
    if row.get("type") == "incontext learning":  # the query holds its examples and their form
        return Asked(f"{BRIEFLY}\n{row['query']}\nAnswer:", [row["answer"]])
    return _probe(BRIEFLY, row)


def _bare(row: Row) -> Asked:
    return Asked(row["query"], [row["answer"]])


def _shown(question: str, choices: Sequence[str]) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([f"Question: {question}", *lines, "Answer:"])


def _multiple_choice(row: Row) -> Asked:
    def shown(question: Row) -> str:
        return _shown(question["question"], question["choices"])

    task = str(row.get("task") or "general knowledge").replace("_", " ")
    examples = [f"{shown(one)} {LETTERS[one['answer']]}" for one in row.get("examples") or []]
    head = f"The following are multiple choice questions (with answers) about {task}."
    letters = list(LETTERS[: len(row["choices"])])
    true = letters.pop(row["answer"])
    return Asked("\n\n".join([head, *examples, shown(row)]), [], {"true": [true], "false": letters})


def _lettered(row: Row) -> Asked:
    """The same, to be answered by a letter. What stands for the references is the true letters, and all letters."""
    prompt, _, choices = _multiple_choice(row)
    return Asked(prompt, ["".join(choices["true"]), LETTERS[: len(row["choices"])]])


def _truthful(row: Row) -> Asked:
    targets = row["mc1_targets"]
    pairs = list(zip(targets["choices"], targets["labels"], strict=True))
    true, false = ([text for text, label in pairs if bool(label) == kind] for kind in (True, False))
    return Asked(f"Q: {row['question']}\nA:", [], {"true": true, "false": false})


def _lettered_truthful(row: Row) -> Asked:
    """The same by letters, in an order that is drawn from the row's text: the data has the true choice first."""
    choices = _truthful(row).answers
    texts = sorted([*choices["true"], *choices["false"]], key=lambda text: digest([row["question"], text]))
    letters = LETTERS[: len(texts)]
    true = [letter for letter, text in zip(letters, texts, strict=True) if text in choices["true"]]
    return Asked(_shown(row["question"], texts), ["".join(true), letters])


def _reason(row: Row) -> Asked:
    head = str(row.get("cot") or "").strip()
    request = "Answer the following question and end with 'so the answer is'."
    answer = row["answer"]
    prompt = "\n\n".join(filter(None, [head, f"{request}\nQ: {row['question']}\nA:"]))
    return Asked(prompt, [answer] if isinstance(answer, str) else list(answer))


def _trivia(row: Row) -> Asked:
    return Asked(f"{BRIEFLY}\nQ: {row['question']}\nA:", list(row["answers"]))


def _instruction(row: Row) -> Asked:
    return Asked(f"Instruction: {row['instruction']}\n")


def _text(row: Row) -> Asked:
    return Asked("", [row["text"]], {"answer": [row["text"]]})


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


_CONCLUSION = re.compile(r"the answer is (.*?)\.?\s*(?:$|\.\s)", re.IGNORECASE | re.DOTALL)
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


def _letter(batch: QuestionBatch) -> RowScores:
    """Whether the first of a question's letters that stands alone, as in "B", "(B)" or "B. sky", is a true one."""
    right = []
    for text, question in zip(batch.ended, batch.questions, strict=True):
        true, letters = question.references
        said = re.search(rf"(?<![A-Za-z])[{letters}](?![A-Za-z])", text)
        right.append(float(said is not None and said[0] in true))
    return {"letter_accuracy": right}


def _substring(batch: QuestionBatch) -> RowScores:
    """Whether an answer that holds a word occurs in the decoded text, in any case; None where no answer does."""
    pairs = zip(batch.texts, batch.questions, strict=True)
    wanted = [
        (text.casefold(), [one.casefold() for one in asked.references if has_words(one)]) for text, asked in pairs
    ]
    return {
        "substring_match": [float(any(one in text for one in of_row)) if of_row else None for text, of_row in wanted]
    }


def _concluded(batch: QuestionBatch) -> RowScores:
    """Exact match of what follows "the answer is", or of the whole answer where nothing does."""
    said = [_CONCLUSION.search(text) for text in batch.texts]
    texts = [found[1] if found else text for found, text in zip(said, batch.texts, strict=True)]
    pairs = zip(texts, batch.questions, strict=True)
    return {"exact_match": [word_match(text, question.references)[0] for text, question in pairs]}


def _entropy(batch: QuestionBatch) -> RowScores:
    return {"entropy": [ngram_entropy(text) for text in batch.texts]}


def _loss(batch: QuestionBatch) -> RowScores:
    per_token = batch.first("answer")
    zlib = zlib_score(per_token, [question.references[0] for question in batch.questions])
    return {"loss": [-value for value in per_token], "zlib": [-value for value in zlib]}


_PROBE = {name: METRICS[name] for name in ("rougeL", "degeneracy")}
_CHOICE = {"accuracy": METRICS["accuracy"]}
_MEMBER = {"loss": Metric(_loss, ("answer",))}
_QUERY = {"query": str, "answer": str}
_CLOZE = Config(_QUERY, partial(_probe, "Please complete the blank in the following question."), _PROBE)
_QUESTION = Config(_QUERY, partial(_probe, BRIEFLY), _PROBE)
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
GENERATED = {  # where choices are scored by the letter that is generated
    "utility_general": Config({"question": str, "choices": list}, _lettered, {"letter": Metric(_letter)}),
    "utility_truthfulness": Config({"question": str}, _lettered_truthful, {"letter": Metric(_letter)}),
}
RELEASE = {
    **{name: Config(_QUERY, _bare, _PROBE, DECODED) for name in CONFIGS if "_level" in name},
    **{name: config._replace(max_new_tokens=DECODED) for name, config in GENERATED.items()},
    "utility_factuality": Config(
        {"question": str, "answers": list}, _trivia, {"substring": Metric(_substring)}, DECODED
    ),
}


def config_of(
    name: str, protocol: str = "ours", choices: str | None = None, max_new_tokens: int | None = None
) -> Config:
    """The way in which a config is asked and scored by a protocol.

    Args:
        name: in `CONFIGS`.
        protocol, choices: as in `evaluation.protocol`.
        max_new_tokens: decoded, of all but chains of thought and long texts.
    """
    generated = GENERATED if choices == "generated" else {}
    config = {**CONFIGS, **generated, **(RELEASE if protocol == "release" else {})}[name]
    short = config.max_new_tokens < LONG and max_new_tokens is not None
    return config._replace(max_new_tokens=max_new_tokens) if short else config
