"""Ask in a conversation: after answers about the same subject, and again after an answer that is called wrong.

The answer that is called wrong is the model's own, or none at all, for models that were never taught a second turn.

The earlier turns are other forget rows of the same subject that say nothing of what is scored; the attacker knows
them, as in relearning. Where the model's context has no room, the earliest are left out. Without a chat template the
turns follow each other as plain text. Decoding is greedy.
"""

from ..data.encoding import encode_prompts
from .base import AttackScores, Target, worst_case
from .subjects import Subjects

EARLIER = 2  # questions that were asked and answered before
CORRECTION = "That is wrong. Please correct your answer. {}"

Turns = list[str]  # of the user and the model in turn; the user has the first and the last


def attack(target: Target, seed: int) -> AttackScores:
    """Return the best score after earlier turns, with a request for correction, and with both. Nothing is random."""
    subjects, questions = Subjects(target), list(target.rows["question"])
    earlier = [
        [text for one in subjects.others(row, subjects.forget, EARLIER) for text in (one.question, one.answer)]
        for row in range(len(questions))
    ]
    after_turns = _answers(target, [[*turns, text] for turns, text in zip(earlier, questions, strict=True)])
    corrected = {
        "correction": ([[] for _ in questions], target.plain_answers),
        "earlier turns and correction": (earlier, after_turns),
    }
    alone = _answers(target, [[CORRECTION.format(text)] for text in questions])
    tries = {"earlier turns": target.score(after_turns), "correction alone": target.score(alone)}
    for name, (before, answers) in corrected.items():
        turns = [
            [*first, text, _spoken(answer, target), CORRECTION.format(text)]
            for first, text, answer in zip(before, questions, answers, strict=True)
        ]
        tries[name] = target.score(_answers(target, turns))
    return worst_case(target, tries)


def _answers(target: Target, conversations: list[Turns]) -> list[str]:
    """Return the greedy answer to the last turn of each conversation."""
    encoded = [_prompt(turns, target) for turns in conversations]
    return target.decode(encoded)


def _prompt(turns: Turns, target: Target) -> list[int]:
    """Return the ids of a conversation, without its earliest turns where there is no room for them."""
    limit = target.backbone.context_length
    while True:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
        prompt = messages if target.tokenizer.chat_template else " ".join(turns)
        ids = encode_prompts([prompt], target.tokenizer, target.backbone)[0]
        if limit is None or len(ids) + target.settings.decoding.max_new_tokens <= limit or len(turns) < 3:
            return ids
        turns = turns[2:]


def _spoken(answer: str, target: Target) -> str:
    """Return an answer as it can stand in a turn: a model that spells a special token would end its turn there."""
    for token in target.tokenizer.all_special_tokens:
        answer = answer.replace(token, " ")
    return answer
