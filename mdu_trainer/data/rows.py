"""From rows of text to batches of forget and retain pairs.

Rows are TRL's dataset types: prompt-completion (strings, or lists of messages), or `messages` whose last turn is the
response. Preference rows serve DPO: `rejected` is the response to forget, `chosen` the preferred one. A plain
question/answer data set maps in one line:

    dataset = dataset.rename_columns({"question": "prompt", "answer": "completion"})

Rows with `text` alone are articles, books or corpora, learned in chunks (`mdu_trainer.data.texts`).
The columns `tools` and `chat_template_kwargs` go to the chat template, as in TRL.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..files import UserError
from ..masking import KEPT, MaskSchedule, pad_rows, permutation
from ..models import Backbone
from .encoding import RowEncoder
from .forget_masks import ForgetMasks
from .reading import Row, check_table, names_of, read_row, read_rows, read_text
from .secrets import SPANS, SecretMarker
from .texts import of_text, text_chunks

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class TokenizedRows:
    """The rows of one data set as token ids.

    Attributes:
        prompt_ids: generation prompt included.
        completion_ids: end of turn included unless truncated.
        preferred: preferred response ids (DPO), or empty.
        secrets: what a counterfactual anchor hides of each row (`mdu_trainer.data.secrets`), or empty.
        prompt_share: share of each chunk that is its prompt, where the rows are chunks of texts; else None.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    preferred: list[list[int]] = field(default_factory=list)
    secrets: list[list[int]] = field(default_factory=list)
    prompt_share: float | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def lengths(self) -> list[int]:
        """Tokens a row, prompt and response together."""
        return [len(p) + len(r) for p, r in zip(self.prompt_ids, self.completion_ids, strict=True)]

    def keys(self) -> list[tuple[int, ...]]:
        """Return the ids of each row, by which two rows are the same."""
        return [tuple(p + r) for p, r in zip(self.prompt_ids, self.completion_ids, strict=True)]


Order = Callable[[TokenizedRows, int, int], Tensor]  # (rows, seed, visit) -> row numbers


def question_answer_rows(dataset: Dataset, conversational: bool, preferred: str | None = None) -> Dataset:
    """Prompt-completion rows of a data set with columns `question` and `answer`, and `secret_spans` if there are any.

    Args:
        dataset: the data set.
        conversational: make turns of user and assistant, for a model that chats.
        preferred: column of the preferred response, which becomes `chosen` (DPO).
    """
    columns = {"question": "prompt", "answer": "completion"} | ({preferred: "chosen"} if preferred else {})
    columns |= {SPANS: SPANS} if SPANS in dataset.column_names else {}
    missing = columns.keys() - set(dataset.column_names)
    if missing:
        raise UserError(f"The data set has no column {sorted(missing)}; its columns are {dataset.column_names}.")
    if not conversational:
        return dataset.select_columns(list(columns)).rename_columns(columns)
    roles = {"prompt": "user", "completion": "assistant", "chosen": "assistant"}
    made = {
        new: [[{"role": roles[new], "content": value}] if new in roles else value for value in dataset[old]]
        for old, new in columns.items()
    }
    return Dataset.from_dict(
        made,
        info=names_of(dataset),
        split=dataset.split,
    )


def tokenize_rows(
    dataset: Dataset | Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    backbone: Backbone,
    *,
    name: str,
    max_length: int | None = None,
    preferred: bool = False,
    allow_blank: bool = False,
    numbers: Sequence[int] | None = None,
    mark: SecretMarker | None = None,
    text_stride: int | None = None,
    prompt_share: float = 0.0,
) -> TokenizedRows:
    """Tokenise the rows of one data set. Nothing is written to disk.

    Responses end with the backbone's end token. `max_length` truncates responses, never prompts; a row whose prompt
    leaves no response token is dropped, and one warning counts them. Texts become chunks of `max_length` tokens.

    Args:
        dataset: rows in one of the formats above.
        tokenizer, backbone: of the model.
        name: what messages call the data set ("forget", "retain", ...). Messages never hold its text.
        max_length: longest row in tokens; at most (and by default) the model's context length.
        preferred: rows must have a preferred response (`chosen`).
        allow_blank: keep rows whose response is blank: of its end token alone.
        numbers: what messages call each row, where several rows here are of one row of the user's.
        mark: marks what a counterfactual anchor hides.
        text_stride, prompt_share: of chunks of texts, as `mdu_trainer.data.texts.text_chunks` takes them.

    Raises:
        TypeError: for a streaming data set.
        ValueError: for an empty set, missing columns, prompts longer than the model's context, when no row is left, or
            for a row that cannot be read as it was meant (see `mdu_trainer.data.encoding`).
    """
    check_table(dataset, name, preferred)
    limit = min(filter(None, (max_length, backbone.context_length)), default=None)
    if of_text(dataset):
        how = {"name": name, "max_length": limit, "stride": text_stride, "prompt_share": prompt_share}
        return TokenizedRows(*text_chunks(dataset, tokenizer, backbone, **how), prompt_share=prompt_share)
    encode = RowEncoder(tokenizer, backbone, name, preferred, allow_blank)
    rows = TokenizedRows([], [])
    dropped = truncated = too_long = 0
    for i, example in enumerate(read_rows(dataset, name)):
        prompt, response, chosen = encode(example, number := i if numbers is None else numbers[i])
        too_long += backbone.context_length is not None and len(prompt) >= backbone.context_length
        room = None if limit is None else limit - len(prompt)
        if room is not None and room <= 0:
            dropped += 1
            continue
        truncated += room is not None and max(len(response), len(chosen)) > room
        rows.prompt_ids.append(prompt)
        rows.completion_ids.append(response[:room])
        if preferred:
            rows.preferred.append(chosen[:room])
        if mark is not None:
            rows.secrets.append(mark(example, prompt, response[:room], f"Row {number} of the {name} set"))
    _check_room(name, rows, backbone, limit, len(dataset), dropped, too_long)
    _warn(name, rows, limit, len(dataset), dropped, truncated, whole=numbers is None)
    return rows


def _check_room(
    name: str, rows: TokenizedRows, backbone: Backbone, limit: int | None, count: int, dropped: int, too_long: int
) -> None:
    if too_long:
        raise UserError(
            f"{too_long} of {count} prompts of the {name} set fill the model's context of "
            f"{backbone.context_length} tokens and leave no room for a response. Shorten or remove them."
        )
    if not len(rows):
        raise UserError(
            f"Every response of the {name} set is truncated away: all {dropped} prompts have max_length = {limit} "
            "tokens or more. Raise max_length."
        )


def _warn(name: str, rows: TokenizedRows, limit: int | None, count: int, dropped: int, truncated: int, whole: bool):
    if dropped or truncated:
        logger.warning(
            f"{name} set, max_length = {limit}: {dropped} of {count} rows dropped because the prompt leaves no "
            f"response token, {truncated} responses truncated."
        )
    repeated = len(rows) - len(set(rows.keys()))
    if whole and repeated:
        logger.warning(f"{name} set: {repeated} of {len(rows)} rows repeat another one, and so count more than once.")


def check_rows(dataset: Dataset | Sequence[Row], name: str, preferred: bool = False) -> None:
    """Refuse rows that `tokenize_rows` would refuse whatever the tokenizer, before a model is loaded.

    Args:
        dataset: rows in one of the formats above.
        name: what messages call the data set.
        preferred: rows must have a preferred response (`chosen`).

    Raises:
        TypeError, ValueError: as `tokenize_rows`.
    """
    check_table(dataset, name, preferred)
    for i, example in enumerate(read_rows(dataset, name)):
        where = f"Row {i} of the {name} set"
        read_text(example, where) if of_text(dataset) else read_row(example, where, preferred)


def count_overlap(rows: TokenizedRows, others: TokenizedRows) -> int:
    """How many of `rows` are in `others` too."""
    seen = set(others.keys())
    return sum(key in seen for key in rows.keys())


class RowPairs(torch.utils.data.Dataset):
    """Rows of several sets side by side, addressed by a counter that runs on over epochs.

    An epoch is one pass over the set that lasts longest; the others are cycled. Each pass over a set is a visit, with
    an order and masks that are functions of (seed, visit) alone, so nothing depends on batch size, processes or
    resumption. With 2 rows of "forget" and 4 of "retain", both in order, the first epoch is

        counter    0       1       2       3         4 begins the second epoch
        forget     row 0   row 1   row 0   row 1     visits 0, 0, 1, 1
        retain     row 0   row 1   row 2   row 3     visit 0

    A counter may bring several rows of a set, which then last for fewer counters. With two retain rows a counter,
    number 1 brings row 1 of "forget" and rows 2 and 3 of "retain", and the epoch ends there.

    Args:
        parts: name -> rows, e.g. {"forget": ..., "retain": ...}.
        seed: seed of the orders.
        order: `(rows, seed, visit) -> row numbers`, see `shuffled`, `in_order` and `length_grouped`; or one by name.
        schedules: name -> the times and the mask noise of its rows.
        rows_a_counter: name -> rows of the set that a counter brings; 1 for sets that are not named.

    Attributes:
        anchors: (visit, row) -> `[n, H]`, the anchors of a forget row's masked tokens, where they were computed
            before training. A loader reads ahead of the last step: rows beyond it have none.
        masks: of the rows to forget, where time and noise alone do not decide what is masked.
    """

    def __init__(
        self,
        parts: dict[str, TokenizedRows],
        seed: int,
        order: Order | Mapping[str, Order],
        schedules: dict[str, MaskSchedule],
        rows_a_counter: Mapping[str, int] | None = None,
    ):
        self.parts = parts
        self.seed = seed
        self.order = order
        self.schedules = schedules
        self.rows_a_counter = rows_a_counter or {}
        self.anchors: Mapping[tuple[int, int], Tensor] = {}
        self.masks: ForgetMasks | None = None
        self._orders: dict[tuple[str, int], Tensor] = {}

    def __len__(self) -> int:
        return max(math.ceil(len(rows) / self.rows_a_counter.get(name, 1)) for name, rows in self.parts.items())

    def __getitem__(self, counter: int) -> dict[str, Row | list[Row]]:
        """The rows of a counter `>= 0`; `~counter` stands for the same rows as filler, which weighs nothing.

        Of a set in `rows_a_counter` it is a list of rows.
        """
        weight, counter = float(counter >= 0), max(counter, ~counter)
        item: dict[str, Row | list[Row]] = {}
        for name in self.parts:
            count = self.rows_a_counter.get(name, 1)
            rows = [self._row(name, count * counter + i) | {"weight": weight} for i in range(count)]
            item[name] = rows if name in self.rows_a_counter else rows[0]
        return item

    def _row(self, name: str, number: int) -> Row:
        """Return a row of a set by its number, which runs on over the visits."""
        rows = self.parts[name]
        visit, slot = divmod(number, len(rows))
        row = int(self._order(name, visit)[slot])
        item = {
            "prompt_ids": rows.prompt_ids[row],
            "completion_ids": rows.completion_ids[row],
            "row": row,
            "visit": visit,
        }
        item["schedule"] = self.schedules[name]
        if rows.preferred:
            item["preferred"] = rows.preferred[row]
        if rows.secrets:
            item["secrets"] = rows.secrets[row]
        if name == "forget" and (visit, row) in self.anchors:
            item["anchor"] = self.anchors[visit, row]
        if name == "forget" and self.masks is not None:
            item["masks"] = self.masks
        return item

    def _order(self, name: str, visit: int) -> Tensor:
        key = (name, visit)
        if key not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[0] != name or k[1] >= visit - 1}
            order = self.order[name] if isinstance(self.order, Mapping) else self.order
            self._orders[key] = order(self.parts[name], self.seed, visit)
        return self._orders[key]


def in_order(rows: TokenizedRows, seed: int, visit: int) -> Tensor:
    """The data set's own order: int64 `[len(rows)]`."""
    return torch.arange(len(rows))


def shuffled(rows: TokenizedRows, seed: int, visit: int) -> Tensor:
    """A new shuffle on every visit: int64 `[len(rows)]`."""
    return permutation(seed, visit, len(rows))


@dataclass
class DataCollatorForUnlearning:
    """Pads rows on the right into {"forget": batch, "retain": batch, ...}. Lists of rows are joined.

    A batch has `input_ids`, `attention_mask` and `completion_mask`, int64 `[B, L]`; the diffusion times `t`, float
    `[B]`, and the mask noise `noise`, float `[B, L]`; and `weight`, float `[B]`: 0 for rows that only fill up the
    batches of the last update of an epoch, 1 for all others. Where rows have a preferred response, a further batch
    "preferred" holds prompt and preferred response, masked as the one to forget. Anchors that were computed before
    training stand in `anchor`, `[N, H]` for the N masked tokens. For a counterfactual anchor `secrets`, int64
    `[B, L]`, says what it hides. Where not all of a response may be masked, `maskable`, bool `[B, L]`, says what.

    Args:
        pad_token_id: id that fills the padding.
        end_token_id: if given, the padding becomes further end tokens of the response, which the model learns to
            predict (LLaDA's instruction tuning). Then a row's loss depends on the longest row of its batch.
        multiple: the length of a batch is a multiple of it.
    """

    pad_token_id: int
    end_token_id: int | None = None
    multiple: int = 1

    def __call__(self, features: list[dict[str, Row | list[Row]]]) -> dict[str, dict[str, Tensor]]:
        rows = {name: _flat([f[name] for f in features]) for name in features[0]}
        batch = {name: self._pad(rows[name], "completion_ids") for name in rows}
        first = next(iter(rows.values()))
        if "preferred" in first[0]:
            batch["preferred"] = self._pad(first, "preferred")
        return batch

    def _pad(self, rows: list[Row], response: str) -> dict[str, Tensor]:
        fill = self.pad_token_id if self.end_token_id is None else self.end_token_id
        twice = rows[0]["schedule"].block_size is not None  # the second time with what the first does not mask
        rows = [*rows, *rows] if twice else rows
        ids = [row["prompt_ids"] + row[response] for row in rows]
        input_ids, attention_mask = pad_rows(ids, fill, self.multiple)
        if self.end_token_id is not None:
            attention_mask = torch.ones_like(attention_mask)
        length = input_ids.shape[1]
        start = torch.tensor([len(row["prompt_ids"]) for row in rows])
        response_mask = attention_mask * (torch.arange(length) >= start[:, None])
        visit, number = (torch.tensor([row[name] for row in rows]) for name in ("visit", "row"))
        t, noise, takes_prompt = rows[0]["schedule"].draw(visit, number, length)
        if twice:
            noise = torch.cat([noise[: len(rows) // 2], 1 - noise[len(rows) // 2 :]])
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "completion_mask": torch.where(takes_prompt[:, None], attention_mask, response_mask),
            "t": t,
            "noise": noise,
            "weight": torch.tensor([row["weight"] for row in rows]),
        }
        if "masks" in rows[0]:
            batch |= rows[0]["masks"].apply(number, input_ids, response_mask, t, noise)
        if response == "completion_ids" and "secrets" in rows[0]:
            batch["secrets"] = pad_rows([row["secrets"] for row in rows], KEPT, self.multiple)[0]
        if all("anchor" in row for row in rows):
            batch["anchor"] = torch.cat([row["anchor"] for row in rows])
        return batch


def _flat(rows: Sequence[Row | list[Row]]) -> list[Row]:
    return [row for one in rows for row in (one if isinstance(one, list) else [one])]
