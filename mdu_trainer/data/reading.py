"""Tables of rows as users pass them: read one by one, and refused where they cannot mean what they say.

Rows hold what is to be forgotten, so no message quotes one: it names the data set, the row's number and what to do.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any

from datasets import Dataset, DatasetDict, DatasetInfo
from pandas import DataFrame
from pyarrow.lib import ArrowException
from transformers.utils import logging

from ..files import UserError

logger = logging.get_logger(__name__)

Row = dict[str, Any]
Text = str | list[Row]  # a text, or a list of messages

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
TOKEN_MASKS = ("completion_mask", "assistant_masks")
UNREAD = (  # TRL's columns that mean something to other trainers
    *("input_ids", "attention_mask", "labels", "label", "kl", "weight", "sample_weight", "margin", "score"),
    *("ref_chosen_logps", "ref_rejected_logps", "reference_logps"),
)
TEXT = "text"  # column of a plain text, where a row has nothing else to learn
RESPONSES = ("messages", "prompt", "completion", "rejected")
SHAREGPT = (
    "turns have 'from' and 'value' (ShareGPT). Rename them to 'role' and 'content', and the roles 'human' and 'gpt' "
    "to 'user' and 'assistant'"
)


@contextmanager
def private(what: str) -> Iterator[None]:
    """Keep what an error says out of messages and logs: libraries quote the text that they fail on.

    Args:
        what: what failed, the row's number included.

    Raises:
        UserError: `what` and the class of the error, in place of any error but a `UserError`.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} ({type(error).__name__}).") from None


@contextmanager
def whole_cache(name: str) -> Iterator[None]:
    """Say so where `datasets` cannot read its own files: a cache was cut short by a full disk or a kill.

    Raises:
        ValueError: with the name of the data and what to do. It quotes no row.
    """
    try:
        yield
    except (ArrowException, OSError) as error:
        if not isinstance(error, ArrowException) and error.errno is not None:  # the system's, and clear as it is
            raise
        raise UserError(
            f"The Arrow file of {name} is cut short or damaged. Delete that file, or the cache that it lies in "
            "(HF_DATASETS_CACHE), and load the data again."
        ) from None


def check_table(dataset: Any, name: str, preferred: bool = False) -> None:
    """Refuse what is no table of rows, and columns that would be dropped though they mean something.

    Args:
        dataset: a `Dataset`, or a list of rows.
        name: what messages call the data set.
        preferred: rows must have a preferred response (`chosen`).

    Raises:
        TypeError: for a streaming data set.
        UserError: for another kind of table, no rows, or columns that do not fit.
    """
    if isinstance(dataset, DataFrame):
        raise UserError(f"The {name} set is a pandas DataFrame: pass Dataset.from_pandas(frame).")
    if isinstance(dataset, DatasetDict):
        raise UserError(f"The {name} set is a DatasetDict: choose one of its splits, {', '.join(dataset)}.")
    if isinstance(dataset, Mapping):
        raise UserError(f"The {name} set is a {type(dataset).__name__}: pass Dataset.from_dict(columns), or the rows.")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"The {name} set is a {type(dataset).__name__}; masks are tied to row numbers, so pass a `Dataset`."
        )
    if isinstance(dataset, str | bytes):
        raise UserError(f"The {name} set is a text: pass the rows themselves, as a `Dataset`.")
    if len(dataset) == 0:
        raise UserError(f"The {name} set is empty. Check the split's name and any filter applied to it.")
    _check_columns(_columns(dataset, name), name, preferred)


def read_rows(dataset: Any, name: str) -> Iterator[Any]:
    """The rows one by one; what goes wrong in reading them quotes none of them."""
    with private(f"The {name} set cannot be read"), whole_cache(f"the {name} set"):
        rows = iter(dataset)
    for number in count():
        with private(f"Row {number} of the {name} set cannot be read"), whole_cache(f"the {name} set"):
            try:
                row = next(rows)
            except StopIteration:
                return
        yield row


def read_row(example: Any, where: str, preferred: bool = False, allow_blank: bool = False) -> dict[str, Text]:
    """The row as `prompt`, `completion` and, if asked for, `chosen`: all texts, or all lists of messages.

    Raises:
        UserError: for values of the wrong kind, blank responses, or turns without role and content.
    """
    if not isinstance(example, Mapping):
        raise UserError(f"{where} is a {type(example).__name__}; a row is an object with a value for each column.")
    messages = example.get("messages")
    if messages is not None:
        row = _last_turn(messages, where)
    else:
        response = "completion" if example.get("completion") is not None or "rejected" not in example else "rejected"
        row = {"prompt": example.get("prompt"), "completion": example.get(response)}
    row |= {"chosen": example.get("chosen")} if preferred else {}
    if not any(all(isinstance(value, kind) for value in row.values()) for kind in (str, list)):
        kinds = {name: type(value).__name__ for name, value in row.items()}
        raise UserError(f"{where} must have strings only, or lists of messages only, but has {kinds}.")
    row = {name: checked_text(value, f"{where}: {name}") for name, value in row.items()}
    for name, value in row.items():
        texts = [value] if isinstance(value, str) else [turn["content"] for turn in value]
        if name != "prompt" and not allow_blank and not any(text.strip() for text in texts):
            raise UserError(f"{where}: {name} is blank, so there is nothing to learn. Remove the row.")
    return row


def names_of(dataset: Dataset) -> DatasetInfo:
    """The names by which a card knows a data set, for another one of other columns that is made of its rows."""
    return DatasetInfo(dataset_name=dataset.info.dataset_name, config_name=dataset.info.config_name)


def is_text(columns: Collection[str]) -> bool:
    """Whether rows with these columns are plain texts: they have `text`, and no prompt or response under any name."""
    return TEXT in columns and not set(columns) & {*RESPONSES, "question", "answer"}


def read_text(example: Any, where: str) -> str:
    """The text of a row of plain text.

    Raises:
        UserError: for a row that is none, a value that is no text, or a blank one.
    """
    text = example.get(TEXT) if isinstance(example, Mapping) else None
    if not isinstance(text, str):
        raise UserError(f"{where}: {TEXT} must be a text, and is a {type(text).__name__}.")
    if not text.strip():
        raise UserError(f"{where}: {TEXT} is blank, so there is nothing to learn. Remove the row.")
    _whole_characters(text, where)
    return text


def _columns(dataset: Any, name: str) -> set[str]:
    """The columns of a data set; of a list, those of any row."""
    if hasattr(dataset, "column_names"):
        return set(dataset.column_names)
    columns: set[str] = set()
    for number, row in enumerate(read_rows(dataset, name)):
        if not isinstance(row, Mapping):
            raise UserError(
                f"Row {number} of the {name} set is a {type(row).__name__}; a row is an object with a value for each "
                "column."
            )
        columns |= row.keys()
    return columns


def _check_columns(columns: set[str], name: str, preferred: bool) -> None:
    if is_text(columns):
        if preferred:
            raise UserError(
                f"loss_type 'dpo' prefers another response to a prompt, and the {name} set has texts, without prompts "
                "and responses. Take another loss_type."
            )
    elif preferred and "chosen" not in columns:
        raise UserError(
            f"loss_type 'dpo' needs a preferred response (a refusal, say) in a column 'chosen'; the {name} set has "
            f"{sorted(columns)}."
        )
    if "conversations" in columns and not columns & {"messages", "prompt"}:
        raise UserError(f"The {name} set has 'conversations': rename the column to 'messages'. If its {SHAREGPT}.")
    if (
        not is_text(columns)
        and "messages" not in columns
        and not ("prompt" in columns and columns & {"completion", "rejected"})
    ):
        raise UserError(
            f"The {name} set needs 'prompt' and 'completion' columns, 'messages' or 'text'; it has {sorted(columns)}. "
            'A question/answer set: dataset.rename_columns({"question": "prompt", "answer": "completion"}).'
        )
    twice = "messages" in columns and columns & {"prompt", "completion", "rejected"}
    if twice or {"completion", "rejected"} <= columns:
        named = sorted(columns & {"messages", "prompt", "completion", "rejected"})
        raise UserError(f"The {name} set says twice what the response is: of {named}, remove those not meant.")
    media, masks = columns & set(MEDIA), columns & set(TOKEN_MASKS)
    if media:
        raise UserError(f"The {name} set has {sorted(media)}, and these models read text alone: remove the column.")
    if masks:
        raise UserError(
            f"The {name} set has {sorted(masks)}, which chooses tokens of a response; here all of it is learned. "
            "Remove the column, and write into the response what is meant alone."
        )
    unread = sorted(columns & set(UNREAD))
    if unread:
        logger.warning_once(
            f"{name} set: {', '.join(unread)} not read. Every row counts alike, and is tokenised here."
        )


def _last_turn(messages: Any, where: str) -> dict[str, list[Row]]:
    """Messages as the prompt and, the last turn, the response."""
    if not isinstance(messages, list):
        raise UserError(f"{where}: `messages` is a {type(messages).__name__}, and must be a list of turns.")
    messages = checked_text(messages, f"{where}: messages")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: `messages` must end with an assistant turn that follows another turn.")
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def checked_text(value: Text, where: str) -> Text:
    """A text, or messages whose contents are texts.

    Raises:
        UserError: for no messages, a message without role or content, or half a character.
    """
    if isinstance(value, str):
        _whole_characters(value, where)
        return value
    if not value:
        raise UserError(f"{where} is an empty list: it needs a message.")
    return [_message(turn, where) for turn in value]


def _message(turn: Any, where: str) -> Row:
    if not isinstance(turn, Mapping):
        raise UserError(f"{where} has a {type(turn).__name__} among its messages, which have 'role' and 'content'.")
    if turn.get("from") is not None and turn.get("role") is None:
        raise UserError(f"{where}: {SHAREGPT}.")
    if not isinstance(turn.get("role"), str):
        raise UserError(f"{where} has a message without a 'role': 'user', 'assistant' or 'system'.")
    content = content_text(turn.get("content"))
    if content is None:
        raise UserError(
            f"{where} has a message whose 'content' is no text, and no list of texts, but a "
            f"{type(turn.get('content')).__name__}. Write a text ('' for a turn without one)."
        )
    _whole_characters(content, where)
    return {**turn, "content": content}


def content_text(content: Any) -> str | None:
    """The text of a message: a text, or OpenAI's list of parts if all are texts; None for anything else."""
    if isinstance(content, list) and content:
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        return "".join(parts) if all(isinstance(part, str) for part in parts) else None
    return content if isinstance(content, str) else None


def _whole_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} holds half a character (a lone surrogate). Write the text anew.") from None
