"""A prompt out of attention: it changes no prediction, and the tokens after it stay where they are."""

import pytest
import torch
from every_class import tiny_model
from test_every_class import make
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from mdu_trainer.files import UserError
from mdu_trainer.models import hidden_at, logits_at, position_ids
from mdu_trainer.models.positions import _FIRST

PROMPT, LENGTH = 3, 8
TAKEN = ("llada", "Dream", "bert", "roberta", "distilbert", "modernbert", "deberta-v2", "esm", "xlm")


def rows(seed):
    ids = torch.randint(10, 40, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    attention_mask = (torch.arange(LENGTH) >= PROMPT).long().repeat(2, 1)
    attention_mask[1, -1] = 0
    return ids, attention_mask


@pytest.mark.parametrize("model_type", TAKEN)
def test_hidden_prompt(model_type):
    model = make(model_type, MODEL_FOR_MASKED_LM_MAPPING).eval()
    ids, attention_mask = rows(0)
    places = position_ids(model, ids)
    other = torch.cat([rows(1)[0][:, :PROMPT], ids[:, PROMPT:]], dim=1)
    where = (attention_mask, attention_mask.bool())
    found, others = (logits_of(model, hidden_at(model, x, *where, position_ids=places)) for x in (ids, other))
    torch.testing.assert_close(found, others)
    inputs = {"input_ids": ids[:1, PROMPT:], "position_ids": places[:1, PROMPT:]}
    with torch.no_grad():
        alone = model(**inputs, attention_mask=attention_mask[:1, PROMPT:]).logits[0]
    torch.testing.assert_close(found[: LENGTH - PROMPT], alone, rtol=1e-4, atol=1e-4)


def logits_of(model, prediction):
    """Of a prediction that is the head's input, what the head makes of it."""
    head = model.get_output_embeddings()
    return prediction if isinstance(prediction, torch.Tensor) else head(prediction.hidden).detach()


@pytest.mark.parametrize("model_type", TAKEN)
def test_positions_are_those_that_the_model_counts_itself(model_type):
    model = make(model_type, MODEL_FOR_MASKED_LM_MAPPING).eval()
    ids, everything = rows(0)[0], torch.ones(2, LENGTH, dtype=torch.long)
    with torch.no_grad():
        told = model(input_ids=ids, attention_mask=everything, position_ids=position_ids(model, ids)).logits
        plain = logits_at(model, ids, everything, everything.bool())
    torch.testing.assert_close(told.flatten(0, 1), plain, rtol=1e-4, atol=1e-4)


def test_decoders_and_experts():
    for model_type, options in (("qwen2", {}), ("qwen3_moe", {}), ("llama", {})):
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
        model = tiny_model(model_class, {"is_causal": False} | options)
        assert position_ids(model, torch.zeros(2, 3))[1].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "model_type, words",
    [
        ("fnet", "FNetForMaskedLM predicts other tokens by what its attention mask hides"),
        ("convbert", "predicts other tokens by what its attention mask hides"),
        ("mpnet", "MPNetForMaskedLM does not see tokens at the positions"),
    ],
)
def test_models_from_which_no_prompt_can_be_hidden(model_type, words):
    with pytest.raises(
        UserError, match=f"anchor_input='hidden_prompt': .*{words}.* Take anchor_input='masked_prompt'"
    ):
        position_ids(make(model_type, MODEL_FOR_MASKED_LM_MAPPING), torch.zeros(1, 3))


def test_a_model_without_positions():
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(64, 4)

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, input_ids, attention_mask):
            return (self.embedding(input_ids),)

    with pytest.raises(UserError, match="Bare takes no positions .TypeError"):
        position_ids(Bare(), torch.zeros(1, 3))


def test_a_model_is_tried_once(monkeypatch):
    model = make("bert", MODEL_FOR_MASKED_LM_MAPPING)
    position_ids(model, torch.zeros(1, 3))
    assert _FIRST[model] == 0
    monkeypatch.setattr(type(model), "forward", None)
    assert position_ids(model, torch.zeros(1, 4)).tolist() == [[0, 1, 2, 3]]
