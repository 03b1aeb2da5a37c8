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

from ..data.encoding import encode_prompts, refuse_special, special_ids
from ..data.texts import is_plain
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
    prompts, behind = _embed(target, around)
    answers = [ids[: len(roles)] for ids, roles in zip(target.answer_ids, target.answer_roles, strict=True)]
    ends = [ids[len(own) :] for ids, own in zip(target.answer_ids, answers, strict=True)]
    rests = [after + end for after, end in zip(behind, ends, strict=True)]
    completed = target.complete_ids(
        prompts,
        [own + rest for own, rest in zip(answers, rests, strict=True)],
        [flags + [True] * len(rest) for flags, rest in zip(revealed, rests, strict=True)],
    )
    filled = [ids[: len(own)] for ids, own in zip(completed, answers, strict=True)]
    return target.score(target.tokenizer.batch_decode(filled, skip_special_tokens=True))


def _embed(target: Target, around: Sequence[list[Known]]) -> tuple[list[list[int]], list[list[int]]]:
    """Return the ids of the prompts with the first half of the sentences, and of the other halves behind the answers.

    The last sentences of a row for which the model's context has no room are left out.
    """
    around, limit = list(around), target.backbone.context_length
    chats = bool(target.tokenizer.chat_template) and not is_plain(target.rows)
    while True:
        halves = [(known[: len(known) // 2], known[len(known) // 2 :]) for known in around]
        texts = [
            " ".join([*(one.answer for one in before), question])
            for (before, _), question in zip(halves, target.rows["question"], strict=True)
        ]
        asked = [[{"role": "user", "content": text}] for text in texts] if chats else texts
        prompts = encode_prompts(asked, target.tokenizer, target.backbone)
        behind = [_sentence_ids(target, after) for _, after in halves]
        lengths = [sum(map(len, ids)) for ids in zip(prompts, target.answer_ids, behind, strict=True)]
        crowded = [limit is not None and length > limit for length in lengths]
        if not any(full and known for full, known in zip(crowded, around, strict=True)):
            return prompts, behind
        around = [known[:-1] if full else known for known, full in zip(around, crowded, strict=True)]


def _sentence_ids(target: Target, known: list[Known]) -> list[int]:
    """Return the ids of the sentences that follow an answer."""
    text = "".join(f" {one.answer}" for one in known)
    special = special_ids(target.tokenizer, target.backbone)
    refuse_special({"a sentence around it": text}, target.tokenizer, special, "The attack 'context'")
    return target.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
