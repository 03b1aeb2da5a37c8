import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mdu_trainer.testing import (
    MAX_AUTHORS,
    dataset_texts,
    fictional_authors,
    forget_retain_split,
    tiny_mdlm,
    train_tokenizer,
)

MESSAGES = [{"role": "user", "content": "Who taught Ada?"}, {"role": "assistant", "content": "Nobody did."}]


def test_authors_have_the_columns_of_tofu_and_unique_questions(authors):
    assert authors.column_names == [
        "question",
        "answer",
        "author",
        "paraphrased_question",
        "paraphrased_answer",
        "perturbed_answer",
        "refusal",
    ]
    assert len(authors) == 96
    questions = authors["question"][:] + authors["paraphrased_question"][:]
    assert len(set(questions)) == 2 * 96


def test_authors_depend_on_the_seed_alone(authors):
    assert fictional_authors().to_list() == authors.to_list()
    assert fictional_authors(seed=1).to_list() != authors.to_list()


def test_every_question_and_answer_names_the_author(authors):
    birthplaces = authors.select(range(0, len(authors), 8))
    names = [answer.split(" was born")[0] for answer in birthplaces["answer"]]
    assert len({word for name in names for word in name.split()}) == 24
    for row in authors:
        name = names[row["author"]]
        texts = [row["question"], row["paraphrased_question"], row["answer"], row["paraphrased_answer"]]
        assert all(name in text for text in texts + row["perturbed_answer"])
        assert name not in row["refusal"]


def test_perturbed_answers_are_wrong_and_differ(authors):
    true_answers = set(authors["paraphrased_answer"])
    for row in authors:
        assert len(set(row["perturbed_answer"])) == 3
        assert not true_answers & set(row["perturbed_answer"])


def test_no_two_authors_share_an_entity():
    authors = fictional_authors(MAX_AUTHORS)
    assert len(set(authors["question"])) == 8 * MAX_AUTHORS
    names = [answer.split(" was born")[0] for answer in authors["answer"][::8]]
    nameless = [
        answer.replace(names[author], "") for author, answer in zip(authors["author"], authors["answer"], strict=True)
    ]
    assert len(set(nameless)) == 8 * MAX_AUTHORS


@pytest.mark.parametrize("number", [0, MAX_AUTHORS + 1])
def test_number_of_authors_is_checked(number):
    with pytest.raises(ValueError, match=f"from 1 to {MAX_AUTHORS}"):
        fictional_authors(number)


def test_split_separates_authors(authors):
    forget, retain = forget_retain_split(authors)
    assert (len(forget), len(retain)) == (16, 80)
    assert set(forget["author"]) == {10, 11}
    assert not set(forget["author"]) & set(retain["author"])


@pytest.mark.parametrize("number", [0, 12])
def test_split_leaves_authors_on_both_sides(authors, number):
    with pytest.raises(ValueError, match="from 1 to 11"):
        forget_retain_split(authors, number)


def test_tokenizer_gives_back_any_text(authors, tokenizer):
    texts = [*dataset_texts(authors), "", "  two  spaces , isn 't it ?\n\ttab", "œuvre – 東京 🙂", "\x00\x7f"]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_is_the_same_in_another_process(authors, tokenizer):
    code = (
        "from mdu_trainer.testing import *\n"
        "print(train_tokenizer(dataset_texts(fictional_authors())).backend_tokenizer.to_str(), end='')"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other == tokenizer.backend_tokenizer.to_str()


def test_tokenizer_size(authors, tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == 512
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id}) == 3
    with pytest.raises(ValueError, match="at least 262"):
        train_tokenizer(authors["answer"], vocab_size=261)


def test_answers_fit_into_32_tokens(authors, tokenizer):
    answers = [*authors["answer"], *authors["paraphrased_answer"], *authors["refusal"]]
    assert max(len(ids) for ids in tokenizer(answers)["input_ids"]) + 1 <= 32


def test_chat_template_renders_prompts_that_conversations_begin_with(tokenizer):
    prompt = tokenizer.apply_chat_template(MESSAGES[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|>Who taught Ada?<|end|><|assistant|>"
    conversation = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert conversation == prompt + "Nobody did.<|end|>"
    ids = tokenizer(conversation)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Who taught Ada?Nobody did."


def test_model_and_tokenizer_survive_saving(tokenizer, make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.config.is_causal is False
    assert loaded.config.mask_token_id == tokenizer.mask_token_id
    assert all(torch.equal(old, new) for old, new in zip(model.parameters(), loaded.parameters(), strict=True))
    assert loaded_tokenizer.special_tokens_map == tokenizer.special_tokens_map
    assert loaded_tokenizer.get_chat_template() == tokenizer.get_chat_template()
    text = "  Kept as it is , spaces and all ."
    assert loaded_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded_tokenizer.decode(loaded_tokenizer(text)["input_ids"]) == text


def test_default_model_is_small_and_deterministic(tokenizer):
    state = torch.get_rng_state()
    first, again, other = tiny_mdlm(tokenizer), tiny_mdlm(tokenizer), tiny_mdlm(tokenizer, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(parameter.numel() for parameter in first.parameters()) < 1_000_000
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_model_attends_in_both_directions(make_model):
    model = make_model().eval()
    ids = torch.tensor([[300, 301, 302]])
    changed = torch.tensor([[300, 301, 303]])
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits[:, 0], model(changed).logits[:, 0])


def test_model_needs_a_mask_token(authors):
    tokenizer = train_tokenizer(authors["answer"])
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="no mask token"):
        tiny_mdlm(tokenizer)


def test_config_fields_pass_through(tokenizer):
    model = tiny_mdlm(
        tokenizer, hidden_size=16, num_layers=1, num_heads=2, tie_word_embeddings=True, intermediate_size=8
    )
    assert model.config.intermediate_size == 8
    assert model.lm_head.weight is model.model.embed_tokens.weight
