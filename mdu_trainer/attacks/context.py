"""Embed the question in informative text: a masked model sees what stands before it and what comes after the answer.

Published work on masked diffusion models finds that forgotten content comes back between text that informs about it.
Each template below puts some sentences in front of the question, and others behind the answer, and lets the model fill
in the answer at its true length, as `infill` does:

- `forget rows`: answers of other forget rows of the same subject that say nothing of what is scored.
- `retain rows`: such answers of the unrelated rows, where there are any.
- `frame`: nothing around, and all of the answer but its stored tokens revealed.
- `forget rows and frame`: the first and the third.

What an attacker knows of the forget rows here is what relearning trains on, too.
"""

from collections.abc import Sequence

from ..data.encoding import refuse_special, special_ids
from ..evaluation.metrics import greedy_completions
from .base import AttackScores, Target, worst_case
from .subjects import Known, Subjects

AROUND = 2  # sentences on each side


def attack(target: Target, seed: int) -> AttackScores:
    """Return the best score over the templates. Decoding is greedy, so the seed changes nothing.

    Templates without a sentence for any row, and sentences for which the model's context has no room, are left out.
    """
    subjects, rows = Subjects(target), range(len(target.rows))
    around = {
        "forget rows": [subjects.others(row, subjects.forget, 2 * AROUND) for row in rows],
        "retain rows": [subjects.others(row, subjects.retain, 2 * AROUND) for row in rows],
    }
    hidden = [[False] * len(roles) for roles in target.answer_roles]
    frame = [[role != "stored" for role in roles] for roles in target.answer_roles]
    tries = {name: _fill_in(target, known, hidden) for name, known in around.items() if any(known)}
    tries["frame"] = _fill_in(target, [[] for _ in rows], frame)
    if "forget rows" in tries:
        tries["forget rows and frame"] = _fill_in(target, around["forget rows"], frame)
    return worst_case(target, tries)


def _fill_in(target: Target, around: Sequence[list[Known]], revealed: Sequence[list[bool]]) -> list[float]:
    """Return the score of each answer, filled in between its sentences. Only stored tokens are scored."""
    embedded = [_embed(target, row, known) for row, known in enumerate(around)]
    answers = [ids[: len(roles)] for ids, roles in zip(target.answer_ids, target.answer_roles, strict=True)]
    ends = [ids[len(own) :] for ids, own in zip(target.answer_ids, answers, strict=True)]
    completed, _ = greedy_completions(
        target.model,
        [prompt for prompt, _ in embedded],
        [own + after + end for own, (_, after), end in zip(answers, embedded, ends, strict=True)],
        target.backbone,
        revealed=[
            flags + [True] * (len(after) + len(end))
            for flags, (_, after), end in zip(revealed, embedded, ends, strict=True)
        ],
        batch_size=target.settings.decoding.batch_size,
    )
    filled = [ids[: len(own)] for ids, own in zip(completed, answers, strict=True)]
    return target.score(target.tokenizer.batch_decode(filled, skip_special_tokens=True))


def _embed(target: Target, row: int, known: list[Known]) -> tuple[list[int], list[int]]:
    """Return the ids of the prompt with the first half of the sentences, and of the other half behind the answer."""
    question, limit = target.rows[row]["question"], target.backbone.context_length
    while True:
        before, after = known[: len(known) // 2], known[len(known) // 2 :]
        text = " ".join([*(one.answer for one in before), question])
        prompt = target.encode([text], target.rows.select([row]))[0].prompt if before else target.prompts[row]
        ids = _sentence_ids(target, after)
        if not known or limit is None or len(prompt) + len(target.answer_ids[row]) + len(ids) <= limit:
            return prompt, ids
        known = known[:-1]


def _sentence_ids(target: Target, known: list[Known]) -> list[int]:
    """Return the ids of the sentences that follow an answer."""
    text = "".join(f" {one.answer}" for one in known)
    special = special_ids(target.tokenizer, target.backbone)
    refuse_special({"a sentence around it": text}, target.tokenizer, special, "The attack 'context'")
    return target.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
