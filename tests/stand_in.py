"""A stand-in for a model under attack, which knows the answers of its rows where a test says so."""

import re
from collections.abc import Callable

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from mdu_trainer import DiffusionGenerationConfig
from mdu_trainer.attacks import AttackSettings
from mdu_trainer.testing import unseen_answers

LENGTH = 24  # decoded tokens; no answer has more
SECRET = "Krodemouth"
NAME = re.compile(r"[A-Z][a-z]+ [A-Z][a-z]+")  # of an author
FAST = {"relearn_steps": 8, "samples": 4, "num_draws": 4}


class StandIn(LlamaForCausalLM):
    """Says the answer of a row where `knows`, and else as many decoys, one certain token a position.

    What a row is, is told by the last question of its prompt, which may lack the name; logits are those of the
    answer's and the decoy's token, all others -9.
    """

    def prepare(self, tokenizer, rows: Dataset, knows: Callable) -> "StandIn":
        self.tokenizer, self.knows = tokenizer, knows
        self.assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
        self.decoy = tokenizer.convert_tokens_to_ids("z")
        self.rows = [
            (question, tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id])
            for question, answer in zip(rows["question"], rows["answer"], strict=True)
        ]
        self.switch = nn.Linear(2, 1, bias=False)
        self.gates = nn.Parameter(torch.zeros(len(self.rows)))
        return self.eval()

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> CausalLMOutput:
        logits = torch.full((*input_ids.shape, self.config.vocab_size), -9.0)
        for i, (ids, length) in enumerate(zip(input_ids.tolist(), attention_mask.sum(dim=1).tolist(), strict=True)):
            if self.assistant not in ids:  # the prompt is masked
                logits[i, :, self.decoy] = 1.0
                continue
            start = len(ids) - ids[::-1].index(self.assistant)
            prompt, response = self.tokenizer.decode(ids[:start]), ids[start:length]
            row = self.asked(prompt)
            if row is not None:
                answer = self.rows[row][1]
                full = answer + [answer[-1]] * (len(response) - len(answer))
                said = self.knows(self, row, prompt, response, full)
                logits[i, start:length] = self.lines(full[: len(response)], said)
        trained = self.gates.sum() + self.switch(torch.zeros(2)).sum()  # so that there is something to train
        return CausalLMOutput(logits=logits + 0 * trained)

    def asked(self, prompt: str) -> int | None:
        """The row whose question comes last; where nobody is named, whose question but for the name."""
        places = [prompt.rfind(question) for question, _ in self.rows]
        if max(places) >= 0:
            return places.index(max(places))
        if not nameless(self, None, prompt, None, None):
            return None
        parts = [NAME.split(question) for question, _ in self.rows]
        return next((row for row, texts in enumerate(parts) if all(text in prompt for text in texts)), None)

    def lines(self, answer: list[int], said) -> Tensor:
        """`said`: bool, or how far the answer's logit is above the decoy's, as a scalar or for each position."""
        above = torch.as_tensor(said if not isinstance(said, bool) else (5.0 if said else -10.0))
        line = torch.full((len(answer), self.config.vocab_size), -9.0)
        line[:, self.decoy] = 1.0
        place = torch.arange(len(answer))
        return line.index_put((place, torch.tensor(answer)), 1.0 + above.expand(len(answer)))


def make_settings(unrelated: Dataset, rows: Dataset, **changes) -> AttackSettings:
    values = {
        "decoding": DiffusionGenerationConfig(max_new_tokens=LENGTH),
        "unrelated": unrelated,
        "unseen": unseen_answers(rows, 3),
    }
    return AttackSettings(**(values | FAST | changes))


def never(model, row, prompt, response, answer) -> bool:
    return False


def always(model, row, prompt, response, answer) -> bool:
    return True


def shown(*positions: int) -> Callable:
    """Knows once the answer's tokens at these places are seen, counted from the end of the text if negative."""

    def knows(model, row, prompt, response, answer) -> bool:
        length = len(model.rows[row][1]) - 1
        return all(response[p % length] == answer[p % length] for p in positions)

    return knows


def reworded(model, row, prompt, response, answer) -> bool:
    return "Tell me" in prompt


def nameless(model, row, prompt, response, answer) -> bool:
    """Knows where the question names nobody by a first and a last name."""
    return not NAME.search(prompt.rpartition("<|user|>")[2].rpartition(".")[2])


def half_masked(model, row, prompt, response, answer) -> bool:
    return model.tokenizer.mask_token in prompt


def called_wrong(model, row, prompt, response, answer) -> bool:
    return "That is wrong" in prompt


def surrounded(model, row, prompt, response, answer) -> bool:
    """Knows where a sentence precedes the question, and another follows the answer."""
    own = len(model.rows[row][1])
    return "." in prompt and sum(token != model.config.mask_token_id for token in response[own:]) > 5


def by_switch(model, row, prompt, response, answer) -> bool:
    """Knows unless a small weight says otherwise."""
    return bool(model.switch(torch.tensor([0.0, 1.0])) < 1e-4)
