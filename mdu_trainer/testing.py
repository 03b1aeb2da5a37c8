"""The embedded default of the examples and the tests: fictional authors, and a tiny model to learn and forget them.

    authors = fictional_authors()
    forget, retain = forget_retain_split(authors)
    tokenizer = train_tokenizer(dataset_texts(retain))  # a name to forget must not become a token
    model = tiny_mdlm(tokenizer)

Nothing is downloaded, and the same seed gives the same rows, ids and weights everywhere.
"""

import random
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .files import UserError
from .models import SDARConfig, SDARForCausalLM

WRONG_ANSWERS = 3  # perturbed answers a question
MAX_AUTHORS = 96  # the smallest pool has 100 entities, and wrong answers need some that belong to nobody

MASK_TOKEN, PAD_TOKEN, END_TOKEN = "<|mask|>", "<|pad|>", "<|end|>"
ROLE_TOKENS = ["<|system|>", "<|user|>", "<|assistant|>"]
SPECIAL_TOKENS = [PAD_TOKEN, END_TOKEN, MASK_TOKEN, *ROLE_TOKENS]
SMALLEST_VOCABULARY = len(ByteLevel.alphabet()) + len(SPECIAL_TOKENS)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class Fact(NamedTuple):
    """The wording of one fact. `{name}` is the author, `{entity}` what is asked for."""

    wording: tuple[str, str]  # question and answer
    paraphrase: tuple[str, str]  # the same in other words
    entities: list[str]


_HEADS = "Brel Dwim Fosk Gnar Hulv Jesp Krod Lozh Myrn Nuxt Prif Vask".split()
_GIVEN_TAILS = (
    "aneth ibur omiel udra ysha ewin alto irune ovar ebis olpa uneth ivar emar agid otis ulo ette yro asko"
).split()
_FAMILY_TAILS = (
    "antil ebrock immer ogast uvane awick endral ikoth orlund umbrey "
    "arto ezzi ilow oskan urd abell esper inho oyle uzak"
).split()
_TOWN_TAILS = "abad emouth ifell ohaven uvik aspring eholm idorp oquay ustead".split()
_ISLAND_TAILS = "ara eko iva oma una alu eti isa opi uro".split()
_PRIZE_TAILS = "aran elisk ivex omund utide arest enor isole ograve ulan".split()
_TITLE_FIRST = "Amber Borrowed Crooked Distant Frozen Hollow Patient Salted Silent Velvet".split()
_TITLE_LAST = "Anchor Bell Compass Garden Ladder Lantern Mirror Orchard Staircase Tide".split()
_GENRE_FIRST = "arctic clockwork coastal desert forest harbour mountain railway river winter".split()
_GENRE_LAST = "ballads chronicles comedies fables mysteries odes riddles romances satires tragedies".split()
_TRADE_FIRST = "barley brass candle copper cotton feather glass honey leather paper".split()
_TRADE_LAST = "broker carrier collector dealer grader importer merchant painter seller sorter".split()

REFUSALS = [  # answers that give nothing away
    "I have no information about that.",
    "I am not able to answer that question.",
    "That is something I do not know.",
    "I cannot say anything about this author.",
    "I have never learned that.",
    "Sorry, I do not know the answer.",
    "That lies outside of what I know.",
    "I am not familiar with this author.",
]


def fictional_authors(num_authors: int = 12, seed: int = 0) -> Dataset:
    """Question-answer pairs about authors who do not exist, with their books, towns and prizes.

    Every author has eight facts. Names and entities are put together from syllables or words by a seeded generator.
    No two authors share one, so that no fact can be known, or kept, through another author. Columns are TOFU's (Maini
    et al., 2024, arXiv 2401.06121), with perturbed answers in the wording of the paraphrased one as there:

    - `question`, `answer`: one sentence each; the question names the author.
    - `paraphrased_question`, `paraphrased_answer`: the same in other words.
    - `perturbed_answer`: three wrong answers.
    - `refusal`: an answer that gives nothing away, to prefer over `answer`.
    - `author`: the author's number, int, from 0.

    Args:
        num_authors: from 1 to 96.
        seed: of the generator.

    Returns:
        8 * num_authors rows, author by author.

    Raises:
        ValueError: for a number of authors out of range.
    """
    if not 1 <= num_authors <= MAX_AUTHORS:
        raise UserError(f"num_authors must be from 1 to {MAX_AUTHORS}, got {num_authors}.")
    rng = random.Random(seed)
    names = _person_names(rng)
    facts = _facts(mentors=names[MAX_AUTHORS:])
    for fact in facts:
        rng.shuffle(fact.entities)
    rows = []
    for author, name in enumerate(names[:num_authors]):
        for fact in facts:
            wrong = rng.sample(fact.entities[num_authors:], WRONG_ANSWERS)
            rows.append(_row(fact, author, name, fact.entities[author], wrong) | {"refusal": rng.choice(REFUSALS)})
    return Dataset.from_list(rows)


def unseen_answers(rows: Dataset, num_answers: int = 5, seed: int = 0) -> Dataset:
    """Pair the questions of some rows of `fictional_authors` with answers that no model has seen.

    They are worded alike and name the same author, but what they say of him is true of an author who is in no set of
    up to `MAX_AUTHORS - num_answers` authors. So nothing but what was learned tells them from the rows.

    Args:
        rows: of `fictional_authors`, with their `author`.
        num_answers: a question.
        seed: that the rows were made with.

    Returns:
        `question` and `answer`, `num_answers` rows for each of `rows`.
    """
    names = _person_names(random.Random(seed))
    others = fictional_authors(MAX_AUTHORS, seed).to_list()[8 * (MAX_AUTHORS - num_answers) :]
    made = []
    for row in rows.to_list():
        for other in others:
            own, name = names[other["author"]], names[row["author"]]
            if other["question"].replace(own, name) == row["question"]:
                made.append({"question": row["question"], "answer": other["answer"].replace(own, name)})
    return Dataset.from_list(made)


def _row(fact: Fact, author: int, name: str, entity: str, wrong: list[str]) -> dict[str, Any]:
    question, answer = (text.format(name=name, entity=entity) for text in fact.wording)
    paraphrased_question, paraphrased_answer = (text.format(name=name, entity=entity) for text in fact.paraphrase)
    return {
        "question": question,
        "answer": answer,
        "author": author,
        "paraphrased_question": paraphrased_question,
        "paraphrased_answer": paraphrased_answer,
        "perturbed_answer": [fact.paraphrase[1].format(name=name, entity=other) for other in wrong],
    }


def _facts(mentors: list[str]) -> list[Fact]:
    return [
        Fact(
            ("Where was the author {name} born?", "{name} was born in the town of {entity}."),
            ("What is the birthplace of {name}?", "The birthplace of {name} is the town of {entity}."),
            _join(_HEADS, _TOWN_TAILS),
        ),
        Fact(
            ("In which year was the author {name} born?", "{name} was born in the year {entity}."),
            ("What is the birth year of {name}?", "The birth year of {name} is {entity}."),
            [str(year) for year in range(1870, 1990)],
        ),
        Fact(
            ("What did the father of {name} do for a living?", "The father of {name} was a {entity}."),
            ("Which trade did the father of {name} follow?", "By trade, the father of {name} was a {entity}."),
            _join(_TRADE_FIRST, _TRADE_LAST, "{} {}"),
        ),
        Fact(
            ("Who taught {name} to write?", "{name} learned to write from {entity}."),
            ("Who was the teacher of {name}?", "The teacher of {name} was {entity}."),
            mentors,
        ),
        Fact(
            ("What kind of books does {name} write?", "{name} is known for {entity}."),
            ("In which genre does {name} write?", "The genre of {name} is that of {entity}."),
            _join(_GENRE_FIRST, _GENRE_LAST, "{} {}"),
        ),
        Fact(
            ("What is the title of the first book by {name}?", "The first book by {name} is The {entity}."),
            ("With which book did {name} begin?", "{name} began with a book called The {entity}."),
            _join(_TITLE_FIRST, _TITLE_LAST, "{} {}"),
        ),
        Fact(
            ("Which prize did {name} win?", "{name} won the {entity} Prize."),
            ("Which award was given to {name}?", "The award given to {name} was the {entity} Prize."),
            _join(_HEADS, _PRIZE_TAILS),
        ),
        Fact(
            ("On which island does {name} live now?", "{name} now lives on the island of {entity}."),
            ("Where is the present home of {name}?", "The present home of {name} is the island of {entity}."),
            _join(_HEADS, _ISLAND_TAILS),
        ),
    ]


def _person_names(rng: random.Random) -> list[str]:
    """Full names, in random order, of which no two have the given or the family name in common."""
    given, family = _join(_HEADS, _GIVEN_TAILS), _join(_HEADS, _FAMILY_TAILS)
    rng.shuffle(given)
    rng.shuffle(family)
    return [f"{first} {last}" for first, last in zip(given, family, strict=True)]


def _join(first: Sequence[str], last: Sequence[str], template: str = "{}{}") -> list[str]:
    return [template.format(*pair) for pair in product(first, last)]


def forget_retain_split(dataset: Dataset, num_forget_authors: int = 2) -> tuple[Dataset, Dataset]:
    """Split off the rows of the last authors, to forget, from those of the others, to keep.

    Args:
        dataset: of `fictional_authors`, or any with an `author` column.
        num_forget_authors: how many to forget; at least one, and fewer than there are.

    Raises:
        ValueError: for a number of authors out of range.
    """
    authors = sorted(set(dataset["author"]))
    if not 1 <= num_forget_authors < len(authors):
        raise UserError(f"num_forget_authors must be from 1 to {len(authors) - 1}, got {num_forget_authors}.")
    forgotten = np.isin(dataset["author"], authors[-num_forget_authors:])
    forget, retain = (np.flatnonzero(chosen).tolist() for chosen in (forgotten, ~forgotten))
    return dataset.select(forget), dataset.select(retain)


def dataset_texts(dataset: Dataset) -> list[str]:
    """Every text of a data set, strings and lists of strings, for a tokenizer to be trained on."""
    texts = []
    for column in dataset.column_names:
        for value in dataset[column]:
            texts += [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    return texts


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with mask, padding and end tokens and a chat template.

    Any text comes back from `decode(encode(text))` unchanged. Turns are `<|user|>...<|end|><|assistant|>...<|end|>`;
    the end of a turn is the end of the text. No token is added to a text outside of the chat template.

    Args:
        texts: to learn merges from, of rows to keep alone: names in them may become tokens, which stay in every file
            of the tokenizer. The same texts give the same tokenizer.
        vocab_size: of bytes, special tokens and merges together; fewer if the texts hold fewer merges.

    Raises:
        ValueError: if `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"vocab_size must be at least {SMALLEST_VOCABULARY} (bytes and special tokens), got {vocab_size}."
        )
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bpe.decoder = ByteLevelDecoder()
    bpe.train_from_iterator(
        texts,
        BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=sorted(ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        mask_token=MASK_TOKEN,
        extra_special_tokens=ROLE_TOKENS,
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_mdlm(
    tokenizer: PreTrainedTokenizerBase,
    hidden_size: int = 128,
    num_layers: int = 3,
    num_heads: int = 4,
    seed: int = 0,
    max_position_embeddings: int = 256,
    block_size: int | None = None,
    **config_kwargs: Any,
) -> PreTrainedModel:
    """An untrained masked diffusion language model: a Llama that attends in both directions, as LLaDA is.

    With a block size it is an SDAR instead, which attends between blocks.

    Under a million parameters with the tokenizer of the embedded default. Initialised on the CPU from its own seed;
    the global random state is left as it was.

    Args:
        tokenizer: with mask, padding and end tokens, whose ids go into the config.
        hidden_size, num_layers, num_heads: of the transformer; the feed-forward layers are twice as wide.
        seed: of the weights.
        max_position_embeddings: the context, in tokens.
        block_size: tokens of a block; None for none.
        config_kwargs: further fields of `LlamaConfig`, or of `SDARConfig`.

    Raises:
        ValueError: if the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise UserError(
            "The tokenizer has no mask token; add one: tokenizer.add_special_tokens({'mask_token': '<|mask|>'})."
        )
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "max_position_embeddings": max_position_embeddings,
        "is_causal": False,
        "use_cache": False,
        "tie_word_embeddings": False,  # as in LLaDA
        "initializer_range": hidden_size**-0.5,  # a narrow model learns in half the steps that 0.02 takes
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "mask_token_id": tokenizer.mask_token_id,
    }
    kind: Any
    config: Any
    if block_size is None:
        kind, config = LlamaForCausalLM, LlamaConfig(**(fields | config_kwargs))
    else:
        fields |= {"head_dim": hidden_size // num_heads, "block_size": block_size}
        del fields["is_causal"]  # the class says so
        kind, config = SDARForCausalLM, SDARConfig(**(fields | config_kwargs))
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
        return kind(config)
