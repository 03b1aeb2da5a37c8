"""Rows of text as token ids.

Texts are read as TRL reads them, but for one thing: a text that holds a special token of the tokenizer ("[MASK]",
"<|im_end|>") is refused, by its row's number. Read as a token it would end the response, or hide a word; and nobody
could tell it from one that the user meant as such.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..files import UserError
from ..models import Backbone
from .reading import Row, Text, checked_text, private, read_row


class RowEncoder:
    """Encodes rows of one data set.

    Args:
        tokenizer, backbone: of the model.
        name: what messages call the data set.
        preferred: rows have a preferred response.
        allow_blank: whether a response may be empty.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        backbone: Backbone,
        name: str,
        preferred: bool = False,
        allow_blank: bool = False,
    ):
        self.tokenizer, self.backbone = tokenizer, backbone
        self.name, self.preferred, self.allow_blank = name, preferred, allow_blank
        self.special = special_ids(tokenizer, backbone)

    def __call__(self, example: Any, number: int) -> tuple[list[int], list[int], list[int]]:
        """Ids of prompt, response and preferred response (empty unless asked for) of the row of this number.

        Raises:
            UserError: for a row that cannot be read as it was meant.
        """
        where = f"Row {number} of the {self.name} set"
        row = read_row(example, where, self.preferred, self.allow_blank)
        responses = {name: text for name, text in row.items() if name != "prompt"}
        prompt, is_text = row["prompt"], isinstance(row["prompt"], str)
        arguments = {} if is_text else _template_arguments(example, self.tokenizer, self.special, where)
        given = [column for column in ("tools", "chat_template_kwargs") if is_text and example.get(column)]
        if given:
            raise UserError(
                f"{where} has {' and '.join(given)}, which only a chat template reads: write the row as messages, or "
                "remove the column."
            )
        prompt_ids = encode_prompt(prompt, self.tokenizer, self.special, where, **arguments)
        if is_text:
            encoded = [self._encode_text(text, f"{where}: {name}") for name, text in responses.items()]
        else:
            refuse_special(responses, self.tokenizer, self.special, where)
            turns = [prompt + response for response in responses.values()]
            encoded = [self._encode_turns(each, prompt_ids, where, **arguments) for each in turns]
        for ids in (prompt_ids, *encoded):
            check_ids(ids, self.backbone, where)
            if self.backbone.mask_token_id in ids:
                raise UserError(f"{where} holds the mask token. Remove or reword it.")
        if not self.allow_blank and any(all(i in self.backbone.end_token_ids for i in ids) for ids in encoded):
            raise UserError(f"{where}: a response has no tokens, so there is nothing to learn. Remove the row.")
        return prompt_ids, encoded[0], encoded[1] if self.preferred else []

    def _encode_text(self, text: str, where: str) -> list[int]:
        """Return the ids of a text with an end token. The text may bring its own, but not go on after it."""
        ends = self.backbone.end_token_ids
        with private(f"{where}: the tokenizer failed"):
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        first = next((i for i, token in enumerate(ids) if token in self.special), len(ids))
        if first == len(ids):
            return [*ids, ends[0]]
        with private(f"{where}: the tokenizer failed"):
            rest = "".join(self.tokenizer.decode([token]) for token in ids[first:] if token not in ends)
        if ids[first] in ends and not rest.strip():
            return _end(ids, ends)
        raise _holds(where, ids[first], self.tokenizer)

    def _encode_turns(self, turns: list[Row], prompt_ids: list[int], where: str, **arguments: Any) -> list[int]:
        """Return the ids of a conversation that follow those of its prompt."""
        ids = _render(turns, self.tokenizer, where, **arguments)
        if ids[: len(prompt_ids)] != prompt_ids:
            raise UserError(
                f"{where}: The chat template renders the prompt alone (with its generation prompt) differently "
                "from the prompt followed by a response, so the response cannot be told apart. Use a template "
                "whose turns do not depend on later ones."
            )
        return _end(ids[len(prompt_ids) :], self.backbone.end_token_ids)


def encode_prompt(
    prompt: Text,
    tokenizer: PreTrainedTokenizerBase,
    refused: Collection[int],
    where: str,
    name: str = "prompt",
    **arguments: Any,
) -> list[int]:
    """Return the ids of a prompt: of a text as it is, of messages as the chat template writes them.

    Args:
        prompt: as `checked_text` returns it.
        tokenizer: of the model.
        refused: special tokens that no text may hold.
        where, name: what messages call the row, and the prompt in it.
        **arguments: of the chat template.
    """
    refuse_special({name: prompt}, tokenizer, refused, where)
    if not isinstance(prompt, str):
        return _render(prompt, tokenizer, where, add_generation_prompt=True, **arguments)
    with private(f"{where}: the tokenizer failed"):
        return tokenizer(prompt)["input_ids"]


def encode_prompts(prompts: Any, tokenizer: PreTrainedTokenizerBase, backbone: Backbone) -> list[list[int]]:
    """Return the ids of prompts to decode from: texts, which may hold markers of a rendered template, or messages.

    Raises:
        UserError: for anything else, for a mask token or padding in a text, and special tokens in messages.
    """
    special, encoded = special_ids(tokenizer, backbone), []
    never = {backbone.mask_token_id, backbone.pad_token_id} - set(backbone.end_token_ids)
    for number, prompt in enumerate(prompts):
        where = f"Prompt {number}"
        if not isinstance(prompt, str | list):
            raise UserError(f"{where} is a {type(prompt).__name__}: pass a text, or a list of messages.")
        refused = never if isinstance(prompt, str) else special
        encoded.append(encode_prompt(checked_text(prompt, where), tokenizer, refused, where, "it"))
    return encoded


def check_prompts(prompts: Any) -> None:
    """Refuse what is not a list of prompts, though it can be walked through as if it were."""
    hint = None
    if isinstance(prompts, str):
        hint = "a single string: pass [prompt]"
    elif isinstance(prompts, Mapping):
        hint = f"a {type(prompts).__name__}: pass texts or conversations, or token ids to generate_ids"
    elif isinstance(prompts, Tensor | np.ndarray) or (
        isinstance(prompts, Sequence) and len(prompts) and isinstance(prompts[0], int | Tensor)
    ):
        hint = "token ids: pass them to generate_ids, a list of ids without padding for each prompt"
    elif isinstance(prompts, Sequence) and len(prompts) and isinstance(prompts[0], Mapping):
        hint = "a single conversation: pass [conversation]"
    elif not hasattr(prompts, "__iter__"):
        hint = f"a {type(prompts).__name__}"
    if hint:
        raise UserError(f"prompts must be a list of prompts, got {hint}.")


def check_prompt_ids(prompt_ids: Any, backbone: Backbone) -> None:
    """Refuse what is not a list of ids for each prompt, and ids that the model does not know."""
    if isinstance(prompt_ids, Tensor | np.ndarray | Mapping | str):
        raise UserError(
            f"prompt_ids must be a list of ids for each prompt, without padding, got a {type(prompt_ids).__name__}. "
            "Of a batch: [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask)]."
        )
    for row, ids in enumerate(prompt_ids):
        if not isinstance(ids, list | tuple) or not all(isinstance(token, Integral) for token in ids):
            raise UserError(f"Prompt {row} must be a list of token ids, and is a {type(ids).__name__}.")
        check_ids(ids, backbone, f"Prompt {row}")


def _render(turns: list[Row], tokenizer: PreTrainedTokenizerBase, where: str, **arguments: Any) -> list[int]:
    """Return the ids of a conversation, as the chat template writes it."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{where} has messages, and the tokenizer has no chat template. Set tokenizer.chat_template, or write "
            "texts in place of messages."
        )
    with private(f"{where}: the chat template or the tokenizer failed"):
        return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **arguments)["input_ids"]


def special_ids(tokenizer: PreTrainedTokenizerBase, backbone: Backbone) -> set[int]:
    """The tokens that no text is made of: all special ones but that for unknown text, the model's own included."""
    special = set(tokenizer.all_special_ids)
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {backbone.pad_token_id}
    special.discard(tokenizer.unk_token_id)
    return special | {backbone.mask_token_id, *backbone.end_token_ids}


def refuse_special(
    texts: Mapping[str, Text], tokenizer: PreTrainedTokenizerBase, special: Collection[int], where: str
) -> None:
    """Refuse texts, or messages, that hold special tokens.

    Args:
        texts: what messages call it -> a text, or messages.
        tokenizer: of the model.
        special: ids that no text may hold.
        where: the row.

    Raises:
        UserError: names row, text and token.
    """
    flat = [
        (name, text)
        for name, value in texts.items()
        for text in ([value] if isinstance(value, str) else [turn["content"] for turn in value])
    ]
    with private(f"{where}: the tokenizer failed"):
        encoded = tokenizer([text for _, text in flat], add_special_tokens=False)["input_ids"] if flat else []
    for (name, _), ids in zip(flat, encoded, strict=True):
        found = next((token for token in ids if token in special), None)
        if found is not None:
            raise _holds(f"{where}: {name}", found, tokenizer)


def check_ids(ids: Sequence[int], backbone: Backbone, where: str) -> None:
    """Refuse ids that the model has no embedding for."""
    if ids and not 0 <= min(ids) <= max(ids) < backbone.vocab_size:
        raise UserError(
            f"{where} has the token id {max(ids) if max(ids) >= backbone.vocab_size else min(ids)}, and the model's "
            f"embedding {backbone.vocab_size} rows: the tokenizer is of another model, or got tokens that the model "
            "was not resized for (model.resize_token_embeddings)."
        )


def _holds(where: str, token_id: int, tokenizer: PreTrainedTokenizerBase) -> UserError:
    return UserError(
        f"{where} holds {tokenizer.convert_ids_to_tokens(token_id)!r}, a special token of the tokenizer, which the "
        "model reads as a marker and not as text. Remove or reword it."
    )


def _end(ids: list[int], end_token_ids: tuple[int, ...]) -> list[int]:
    """The response up to its last end token, or with one appended."""
    for i in range(len(ids) - 1, -1, -1):
        if ids[i] in end_token_ids:
            return ids[: i + 1]
    return [*ids, end_token_ids[0]]


def _template_arguments(
    example: Row, tokenizer: PreTrainedTokenizerBase, special: Collection[int], where: str
) -> dict[str, Any]:
    """The columns `tools` and `chat_template_kwargs` as TRL passes them on, without values that are None.

    Raises:
        UserError: for a value that the template does not read: it would change nothing.
    """
    tools, options = example.get("tools"), example.get("chat_template_kwargs")
    if not tools and not options:
        return {}
    with private(f"{where}: tools is not JSON"):
        tools = json.loads(tools) if isinstance(tools, str) else tools
    if tools:
        refuse_special({"tools": json.dumps(tools, default=str)}, tokenizer, special, where)
    if options and not isinstance(options, Mapping):
        raise UserError(f"{where}: chat_template_kwargs is a {type(options).__name__}, and must be an object.")
    arguments = {name: value for name, value in (options or {}).items() if value is not None}
    arguments |= {"tools": tools} if tools else {}
    with private(f"{where}: the tokenizer has no chat template to read tools or chat_template_kwargs"):
        template = tokenizer.get_chat_template(tools=tools or None)
    unread = [name for name in arguments if not re.search(rf"\b{re.escape(str(name))}\b", template)]
    unread += [name for name in arguments if name in ("messages", "add_generation_prompt")]
    if unread:
        raise UserError(
            f"{where} sets {', '.join(map(str, unread))} for the chat template, which does not read it. Remove it, or "
            "use a template that does."
        )
    return arguments
