"""Decoding: from an all-[MASK] response, step by step, to text.

Every step predicts the masked tokens of the current block at once, keeps some of the predictions and masks the others
again. Blocks are decoded from left to right. How LLaDA (arXiv 2502.09992) and Dream (arXiv 2508.15487) name their
published samplers, in the fields of `DiffusionGenerationConfig`:

    LLaDA  remasking="low_confidence" or "random"    the same names, schedule="linear"
    dllm   remasking="low_confidence" or "random"    the same names, schedule="dllm"
    Dream  alg="origin"                              remasking="random", schedule="dream"
           alg="maskgit_plus"                        remasking="low_confidence", schedule="dream"
           alg="topk_margin"                         remasking="margin", schedule="dream"
           alg="entropy"                             remasking="entropy", schedule="dream"
           alg_temp                                  position_temperature
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..data.encoding import check_prompt_ids, check_prompts, encode_prompts
from ..files import UserError
from ..masking import pad_rows
from ..models import Backbone, evaluation_mode, resolve_backbone, scan_logits_at
from ..terminal import Bar
from .blocks import BlockDecoding, room_behind, settle_options
from .canvas import Canvas, Revealed
from .config import DiffusionGenerationConfig
from .prefix import PrefixCache
from .sampling import best_positions, random_positions, read_proposals
from .schedule import Step, plan

Prompt = str | list[dict[str, Any]]


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    generation_config: DiffusionGenerationConfig | None = None,
    *,
    backbone: Backbone | None = None,
    row_ids: Sequence[int] | None = None,
    show_progress: bool = False,
    **overrides: Any,
) -> list[str]:
    """Decode a response to each prompt.

    Args:
        model, row_ids, show_progress: as in `generate_ids`.
        tokenizer: the model's. Special tokens are left out of the text.
        prompts: strings, tokenised as they are, markers of a chat template included; or conversations (lists of
            messages with `role` and `content`), which the chat template renders with a generation prompt.
        generation_config: how to decode.
        backbone: facts of the model; resolved from model and tokenizer if not given.
        **overrides: fields of the config to replace.

    Returns:
        One response a prompt, up to its end token, in the order of the prompts.

    Raises:
        ValueError: as `generate_ids`; for prompts that are no list of strings and conversations; for a mask token in
            a string, or any special token in a conversation.

    Example:

        generate(model, tokenizer, ["Who wrote it?"], max_new_tokens=64, block_length=32)

    Source: LLaDA (arXiv 2502.09992, algorithms 4 and 5), Dream (arXiv 2508.15487).
    """
    check_prompts(prompts)
    config = replace(generation_config or DiffusionGenerationConfig(), **overrides)
    backbone = backbone or resolve_backbone(model, tokenizer)
    prompt_ids = encode_prompts(prompts, tokenizer, backbone)
    responses = generate_ids(model, prompt_ids, config, backbone, row_ids=row_ids, show_progress=show_progress)
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in responses]


@torch.no_grad()
def generate_ids(
    model: nn.Module,
    prompt_ids: Sequence[list[int]],
    generation_config: DiffusionGenerationConfig,
    backbone: Backbone,
    *,
    row_ids: Sequence[int] | None = None,
    given: Sequence[Sequence[int | None]] | None = None,
    on_reveal: Callable[[Revealed], None] | None = None,
    past_end: bool = False,
    show_progress: bool = False,
) -> list[list[int]]:
    """Decode a response to each prompt, from token ids to token ids.

    A response is settled once everything up to its first end token is revealed; it then leaves the batch. Steps that
    reveal nothing cost no forward pass. [MASK] is never a prediction, nor is padding unless it ends responses.

    Args:
        model: a masked diffusion language model; in evaluation mode during the call.
        prompt_ids: ids of each prompt, of any lengths.
        generation_config: how to decode.
        backbone: facts of the model.
        row_ids: a number of each prompt, of at least 0, in place of its place in the call: what is random is drawn by
            it, so a part of the prompts is decoded as it would be among all.
        given: of each response what is revealed from the start: its first ids, None for those to decode. The steps
            are those of a response of which nothing is.
        on_reveal: called after each step of a batch with what the step revealed.
        past_end: decode every position, and return all, end tokens and what stands after them included.
        show_progress: show a progress bar over prompts.

    Returns:
        Ids of each response up to, and without, its first end token (unless `past_end`), in the order of the prompts.

    Raises:
        ValueError: if a prompt and `max_new_tokens` together exceed the model's context, there is not one row id a
            prompt, what is given does not fit, or a prompt is no list of ids that the model knows.
    """
    _check(prompt_ids, generation_config.max_new_tokens, backbone, row_ids, given)
    config, end_token_ids = settle_options(generation_config, backbone), () if past_end else backbone.end_token_ids
    decoder = _Decoder(model, config, backbone, end_token_ids)
    by_length = sorted(range(len(prompt_ids)), key=lambda place: len(prompt_ids[place]))
    responses: list[list[int]] = [[] for _ in prompt_ids]
    with evaluation_mode(model), Bar("decoding", total=len(responses), unit="prompt", show=show_progress) as progress:
        for first in range(0, len(by_length), generation_config.batch_size):
            places = by_length[first : first + generation_config.batch_size]
            rows = places if row_ids is None else [row_ids[place] for place in places]
            canvas = decoder.blank(places, rows, [prompt_ids[place] for place in places])
            if given is not None:
                canvas.give([given[place] for place in places])
            cache = PrefixCache(model, backbone) if decoder.config.prefix_cache else None
            for place, ids in decoder._replace(cache=cache).decode(canvas, on_reveal):
                responses[place] = ids
                progress.update()
    return responses


class _Decoder(NamedTuple):
    """Decodes the batches of one call."""

    model: nn.Module
    config: DiffusionGenerationConfig
    backbone: Backbone
    end_token_ids: tuple[int, ...]  # which end a response
    cache: PrefixCache | None = None  # of one batch

    def blank(self, places: list[int], rows: list[int], prompts: list[list[int]]) -> Canvas:
        """The prompts with all-[MASK] responses, on the model's device."""
        response = [self.backbone.mask_token_id] * (self.config.max_new_tokens + room_behind(self.backbone))
        start = [len(prompt) for prompt in prompts]
        padded = pad_rows([[*prompt, *response] for prompt in prompts], self.backbone.pad_token_id)
        masked = torch.ones(len(rows), len(response), dtype=torch.bool)
        parts = (*(torch.tensor(numbers) for numbers in (places, rows, start)), *padded, masked)
        device = next(self.model.parameters()).device
        return Canvas(*(part.to(device) for part in parts))

    def decode(self, canvas: Canvas, on_reveal: Callable[[Revealed], None] | None) -> Iterator[tuple[int, list[int]]]:
        """Decode a batch; yields (place of the prompt, response ids) as responses are settled."""
        ends = torch.tensor(self.end_token_ids, dtype=torch.long, device=canvas.ids.device)
        if self.backbone.block_size is not None:
            yield from BlockDecoding(self.model, self.config, self.backbone, canvas, ends).run(on_reveal)
            return
        for step in plan(self.config.blocks, self.config.steps, self.config.schedule):
            revealed = self.reveal(canvas, step)
            if on_reveal is not None and revealed is not None:
                on_reveal(revealed)
            settled, responses = canvas.settled(ends)
            yield from responses
            if settled.all():
                return
            if settled.any():
                canvas = canvas.keep(~settled)
                if self.cache is not None:
                    self.cache.keep(~settled)

    def reveal(self, canvas: Canvas, step: Step) -> Revealed | None:
        """Take one step, in place. None if it reveals nothing."""
        chosen = canvas.masked.clone()
        chosen[:, : step.start] = chosen[:, step.stop :] = False
        at_random = self.config.remasking == "random"
        if at_random:  # no prediction decides, so only the tokens to reveal are predicted
            chosen = random_positions(chosen, canvas.row, step, self.config)
        if not chosen.any() or (step.count == 0 and not at_random):
            return None
        tokens, scores = self.predict(canvas, chosen, step)
        if not at_random:
            best = best_positions(chosen, scores, canvas.row, step, self.config)
            tokens, chosen = tokens[best[chosen]], best
        batch_index, position = chosen.nonzero(as_tuple=True)
        canvas.reveal(batch_index, position, tokens)
        return Revealed(step.index, canvas.place[batch_index], position, tokens)

    def predict(self, canvas: Canvas, chosen: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Token and score at M response positions (bool `[B, N]`), in their order: `[M]`, `[M]`."""
        batch_index, position = chosen.nonzero(as_tuple=True)
        selected = torch.zeros_like(canvas.ids, dtype=torch.bool)
        selected[batch_index, canvas.start[batch_index] + position] = True
        inputs = [canvas.ids]
        if self.config.cfg_scale:
            prompt = torch.arange(canvas.ids.shape[1], device=canvas.ids.device) < canvas.start[:, None]
            inputs.append(canvas.ids.masked_fill(prompt, self.backbone.mask_token_id))
        if self.cache is not None:
            scan = partial(self.cache.scan_logits_at, canvas, selected, step)
        else:
            where = (canvas.attention_mask, selected)
            scan = partial(scan_logits_at, self.model, inputs, *where, logit_shift=self.backbone.logit_shift)
        return read_proposals(scan, canvas.row[batch_index], step.index, position, self.config, self.backbone)


def _check(
    prompt_ids: Sequence[list[int]],
    max_new_tokens: int,
    backbone: Backbone,
    row_ids: Sequence[int] | None,
    given: Sequence[Sequence[int | None]] | None,
) -> None:
    for name, numbers in (("beginnings given", given), ("row_ids", row_ids)):
        if numbers is not None and len(numbers) != len(prompt_ids):
            raise UserError(f"There are {len(prompt_ids)} prompts and {len(numbers)} {name}: pass one for each.")
    for row, ids in enumerate(given or ()):
        if any(token is not None and not isinstance(token, Integral) for token in ids):
            raise UserError(f"What is given of response {row} must be token ids, and None for those to decode.")
        if len(ids) > max_new_tokens:
            raise UserError(f"{len(ids)} ids are given of response {row}, and max_new_tokens is {max_new_tokens}.")
    check_prompt_ids(prompt_ids, backbone)
    numbers = range(len(prompt_ids)) if row_ids is None else row_ids
    for number, ids in zip(numbers, prompt_ids, strict=True):
        if backbone.context_length is not None and len(ids) + max_new_tokens > backbone.context_length:
            raise UserError(
                f"Prompt {number} has {len(ids)} tokens; with max_new_tokens = {max_new_tokens} that exceeds the "
                f"model's context of {backbone.context_length}. Shorten the prompt or lower max_new_tokens."
            )
