"""Attention between blocks: a token sees its own block whole, and the blocks before it.

    tokens     a b c d e f      block_size 2: blocks 0 0 1 1 2 2
    c sees     a b c d

Masks are boolean `[B, 1, Q, K]`, true where query q may attend to key k. Padding is a key to nobody. As a query it
sees what tokens of its block see; padding on the left stands in the first block.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..files import UserError
from .published import PublishedConfigMixin, PublishedModelMixin

BLOCK_SIZE_KEYS = ("block_size", "bd_size", "block_length")  # in the configs of one model or another
IMPLEMENTATIONS = ("sdpa", "eager")
FORMS = ("block", "full")  # of a config's attention_form


def block_indices(block_size: int, attention_mask: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """The block of each key: `[B, K]`, from 0.

    Blocks are counted from the first token of a row that is not padding, so padding on the left moves none, and
    padding on the right has the blocks after the text. Where positions are told, they decide: the block of the
    position p is p // block_size, whatever else is hidden before it.

    Args:
        block_size: tokens of a block.
        attention_mask: `[B, K]`, 1 for tokens and 0 for padding and for what else is hidden.
        position_ids: `[B, Q]` or `[1, Q]`, of the last Q keys. They count one a token.
    """
    real = attention_mask.bool()
    length = real.shape[1]
    places = torch.arange(length, device=real.device)
    if position_ids is None:
        first = real.int().argmax(dim=1)
    else:  # the place of position 0, told by the last token that is seen; padding may have any position
        last = torch.where(real, places, -1).amax(dim=1)
        queries = position_ids.shape[1]
        told = position_ids.to(real.device).expand(len(real), -1)
        index = (last - (length - queries)).clamp(min=0)
        first = (length - queries) + index - told.gather(1, index[:, None])[:, 0]
    return (places - first[:, None]).clamp(min=0) // block_size


def block_causal_mask(
    block_size: int, attention_mask: Tensor, query_length: int | None = None, position_ids: Tensor | None = None
) -> Tensor:
    """The mask of a plain pass: query q may attend to key k if block(k) <= block(q) and k is not padding.

    Args:
        block_size, attention_mask, position_ids: as in `block_indices`.
        query_length: Q, where the first K - Q keys come from a cache. All by default.

    Returns:
        bool `[B, 1, Q, K]`.
    """
    block = block_indices(block_size, attention_mask, position_ids)
    queries = block[:, block.shape[1] - (query_length or block.shape[1]) :]
    mask = block[:, None, :] <= queries[:, :, None]
    return (mask & attention_mask.bool()[:, None, :])[:, None]


def noisy_clean_mask(block_size: int, attention_mask: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """The mask of a training pass over `[x_t ; x_0]`, the noisy sequence and, behind it, the clean one.

    A noisy token sees its own noisy block and the clean blocks before it; a clean one, the clean blocks up to its own.
    Both halves have the positions 0..n-1.

    Args:
        block_size, attention_mask, position_ids: as in `block_indices`, of one half: `[B, n]`.

    Returns:
        bool `[B, 1, 2n, 2n]`.
    """
    block = block_indices(block_size, attention_mask, position_ids)
    query, key = block[:, :, None], block[:, None, :]
    nothing = torch.zeros_like(query == key)
    noisy = torch.cat([query == key, query > key], dim=2)
    clean = torch.cat([nothing, query >= key], dim=2)
    seen = attention_mask.bool().repeat(1, 2)[:, None, :]
    return (torch.cat([noisy, clean], dim=1) & seen)[:, None]


def full_mask(attention_mask: Tensor, query_length: int | None = None) -> Tensor:
    """The mask of a pass in which every token sees every other, whatever the blocks: bool `[B, 1, Q, K]`.

    Args:
        attention_mask: `[B, K]`, 1 for tokens and 0 for padding.
        query_length: Q, as in `block_causal_mask`.
    """
    return attention_mask.bool()[:, None, None, :].expand(-1, 1, query_length or attention_mask.shape[1], -1)


class BlockConfigMixin(PublishedConfigMixin):
    """A config that knows its block size, from its own key or, where it has none, from what was published."""

    published_block_size: ClassVar[int]
    block_size: Any
    max_position_embeddings: int

    def check_block_size(self, published: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Take the block size from the published keys, where it goes by one of them, and refuse one that is none.

        Args:
            published: what the config.json says beside the fields of the class.

        Raises:
            ValueError: the keys contradict each other, or say no whole number from 2 to the context.
        """
        said = {key: published[key] for key in BLOCK_SIZE_KEYS if published.get(key) is not None}
        if self.block_size is not None:
            said["block_size"] = self.block_size
        if len(set(map(str, said.values()))) > 1:
            found = ", ".join(f"{key}={value!r}" for key, value in said.items())
            raise UserError(
                f"The config contradicts itself about its block size: {found}. Leave the one that the model was "
                "trained with."
            )
        key = next(iter(said), "block_size")
        size = self.block_size = said.get(key, self.published_block_size)
        if not isinstance(size, int) or isinstance(size, bool) or not 2 <= size <= self.max_position_embeddings:
            raise UserError(
                f"The config says {key}={size!r}: it must be a whole number from 2 (blocks of one token make a causal "
                f"model) to max_position_embeddings={self.max_position_embeddings}. Correct it, or load the model "
                "with the block_size that it was trained with."
            )
        if getattr(self, "attention_form", "block") not in FORMS:
            raise UserError(f"attention_form must be one of {', '.join(FORMS)}, got {self.attention_form!r}.")


class BlockModelMixin(PublishedModelMixin):
    """A decoder that attends between blocks, in front of transformers' own.

    `forward` takes `attention_mask` in two forms beside none:

    - `[B, K]`, 1 for tokens and 0 for padding: the block form, `block_causal_mask`, or `full_mask` if the config says
      `"attention_form": "full"`. With a cache, K counts its tokens, too, as everywhere in transformers.
    - bool `[B, 1, Q, K]`, taken as it is: `noisy_clean_mask`, `full_mask`, or any other.

    Everything else is as transformers' decoders take it, `past_key_values` with it: only finished blocks belong there.
    """

    config: Any
    dtype: torch.dtype

    def __init__(self, config: Any) -> None:
        config.check_block_size()  # it may have been set since the config was read
        super().__init__(config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is not None:  # the decoder's own message names what is missing
            cached = past_key_values.get_seq_length() if past_key_values is not None else 0
            attention_mask = self._mask(tokens, attention_mask, position_ids, cached)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def _mask(self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cached: int) -> Tensor:
        """What the decoder's layers take: bool of sdpa, numbers to add of eager."""
        implementation = self.config._attn_implementation
        if implementation not in IMPLEMENTATIONS:
            raise UserError(
                f"{type(self).__name__} attends between blocks, which attn_implementation={implementation!r} cannot. "
                f"Load it with {' or '.join(map(repr, IMPLEMENTATIONS))}."
            )
        rows, queries = tokens.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones(rows, cached + queries, dtype=torch.bool, device=tokens.device)
        if attention_mask.dim() == 2:
            if attention_mask.shape != (rows, cached + queries):
                raise UserError(
                    f"The attention mask is {list(attention_mask.shape)}, for {rows} rows of {cached} cached and "
                    f"{queries} new tokens: it must be {[rows, cached + queries]}."
                )
            if attends_in_full(self.config):
                attention_mask = full_mask(attention_mask, queries)
            else:
                attention_mask = block_causal_mask(self.config.block_size, attention_mask, queries, position_ids)
            # Among hidden tokens alone a query sees nothing, which some kernels answer with NaN. Nobody reads it
            attention_mask = attention_mask | ~attention_mask.any(dim=-1, keepdim=True)
        shape, keys = list(attention_mask.shape), cached + queries
        if len(shape) != 4 or shape[0] not in (1, rows) or shape[2] not in (1, queries) or shape[3] != keys:
            raise UserError(
                f"The attention mask is {shape}: it must be {[rows, keys]}, or {[rows, 1, queries, keys]} and true "
                "where a query may attend to a key."
            )
        if attention_mask.is_floating_point():  # it is to be added already
            return attention_mask
        mask = attention_mask.to(device=tokens.device, dtype=torch.bool)
        if implementation == "sdpa":
            return mask
        nothing = torch.zeros((), dtype=self.dtype, device=mask.device)
        return torch.where(mask, nothing, torch.finfo(self.dtype).min)


def attends_in_full(config: Any) -> bool:
    """Whether a block-wise model was trained, and is to be run, as if it had one block."""
    return getattr(config, "attention_form", "block") == "full"


def block_size_of(config: Any) -> int | None:
    """The block size of a model that attends between blocks, None of any other."""
    return config.block_size if isinstance(config, BlockConfigMixin) and not attends_in_full(config) else None


def set_attention_form(config: Any, form: str | None) -> None:
    """Say in a config in which form its model attends, with its blocks or in full; None leaves it as it is.

    Model, decoding and saved files take it from there. It is a matter of training: public recipes train some
    block-wise models (LLaDA2.x) in full.

    Raises:
        ValueError: blocks are asked of a model that has none.
    """
    if isinstance(config, BlockConfigMixin):
        if form is not None:
            config.attention_form = form
    elif form == "block":
        raise UserError(
            f"attention='block' is for models that attend between blocks; one of model_type "
            f"{getattr(config, 'model_type', None)!r} has none. Leave it out."
        )


def set_block_size(config: Any, block_size: int) -> None:
    """Set the block size of a config, from which model, decoding and saved files take it.

    Raises:
        ValueError: the model is none that attends between blocks, or the size is none.
    """
    if not isinstance(config, BlockConfigMixin):
        raise UserError(
            f"block_size={block_size!r} is for models that attend between blocks; one of model_type "
            f"{getattr(config, 'model_type', None)!r} has none. Leave it out."
        )
    config.block_size = block_size
    config.check_block_size()
