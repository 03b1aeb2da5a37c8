"""How figures are made and shown, by name, so that nobody mixes what does not compare.

`Protocol` is how questions are asked and answers scored. "ours" is what this package recommends and does by default.
"release" does as the code that was released with the MDU paper (arXiv 2605.18253), for figures beside its own:

- All that is decoded counts, also what stands after the end token: for ROUGE-L, TriviaQA, and the entropy.
- Answers are weighed without their end token: the probability, the truth ratio, and losses.
- The truth ratio takes the true answer, not a rewording of it, and the first three wrong ones.
- RWKU: a probe is its bare query, 64 tokens are decoded, MMLU is its first 100 rows, choices are scored by the first
  generated letter, and TriviaQA by whether an answer occurs in the text.

What is not in this list is as in "ours". `Choices` is how RWKU's multiple choice is scored: by the likelihood of the
choices, or by the first letter that is generated. `Rouge` is what tables and pictures call rL; both are measured.
"""

from typing import Literal, get_args

from ..files import UserError

Protocol = Literal["ours", "release"]
Choices = Literal["likelihood", "generated"]
Rouge = Literal["recall", "f1"]

PROTOCOL_WORDS = {
    "ours": "ours (mdu_trainer)",
    "release": "release (as the code released with the MDU paper asks and scores)",
}
ROUGE_WORDS = {"recall": "ROUGE-L recall", "f1": "ROUGE-L F1"}
RL = {"recall": "rL", "f1": "rL F1"}  # in titles of tables
WRONG_ANSWERS, MMLU_ROWS, DECODED = 3, 100, 64  # of the release


def check_protocol(protocol: str, choices: str | None = None) -> None:
    """Refuse names that are none, and choices that the protocol scores otherwise."""
    for name, value, known in (("protocol", protocol, Protocol), ("choices", choices, Choices)):
        if value is not None and value not in get_args(known):
            raise UserError(f"{name} '{value}' is unknown; choose one of {', '.join(get_args(known))}.")
    if protocol == "release" and choices == "likelihood":
        raise UserError(
            "protocol 'release' scores choices by the first generated letter: leave choices='likelihood' out, or take "
            "protocol 'ours'."
        )
