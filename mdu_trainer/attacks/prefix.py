"""Say the first words of the answer, and let the model go on."""

from ..data.spans import token_spans
from ..data.words import WRITTEN_WORD
from .base import AttackScores, NothingToAttack, Target, recall, said


def attack(target: Target, seed: int) -> AttackScores:
    """Decode on from the first `settings.prefix_words` words of each answer, and score the stored words after them.

    In scripts without spaces, a character counts as a word.

    Rows whose answer has no stored words after the prefix are left out. Decoding is greedy, so the seed changes
    nothing. Source: Carlini et al. (arXiv 2202.07646), extraction from a prefix.

    Raises:
        NothingToAttack: if no row is left.
    """
    prompts, rests = {}, {}
    for row, answer in enumerate(target.rows["answer"]):
        end = list(WRITTEN_WORD.finditer(answer))[: target.settings.prefix_words][-1].end()
        ids = target.answer_ids[row][: len(target.answer_roles[row])]
        count = sum(start < end for start, _ in token_spans(answer, ids, target.tokenizer))
        rest = [word for word in target.stored[row] if word.tokens[-1] >= count]
        if rest:
            prompts[row], rests[row] = target.prompts[row] + ids[:count], said(rest)
    if not prompts:
        raise NothingToAttack(
            f"prefix_words = {target.settings.prefix_words} reveals every stored word of every answer: choose fewer."
        )
    after = target.decode(list(prompts.values()))
    before = [target.plain_answers[row] for row in prompts]
    secrets = list(rests.values())
    return AttackScores(list(prompts), recall(before, secrets), recall(after, secrets))
