"""Decoding: from an all-[MASK] response, step by step, to text.

Every step predicts the masked tokens of the current block at once, keeps some of the predictions and masks the others
again. Blocks are decoded from left to right. How LLaDA (arXiv 2502.09992) and Dream (arXiv 2508.15487) name their
published samplers, in the fields of `DiffusionGenerationConfig`:

    LLaDA  remasking="low_confidence" or "random"    the same names, schedule="linear"
    Dream  alg="origin"                              remasking="random", schedule="dream"
           alg="maskgit_plus"                        remasking="low_confidence", schedule="dream"
           alg="topk_margin"                         remasking="margin", schedule="dream"
           alg="entropy"                             remasking="entropy", schedule="dream"
           alg_temp                                  position_temperature
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.encoding import check_prompt_ids, check_prompts, encode_prompts
from ..files import UserError
from ..models import Backbone, logits_at, resolve_backbone
from .config import DiffusionGenerationConfig
from .sampling import best_positions, propose, random_positions
from .schedule import Step, plan

CHUNK_ELEMENTS = 1 << 25  # logits that are turned into probabilities at a time

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
        model: a masked diffusion language model; in evaluation mode during the call.
        tokenizer: the model's. Special tokens are left out of the text.
        prompts: strings, tokenised as they are, markers of a chat template included; or conversations (lists of
            messages with `role` and `content`), which the chat template renders with a generation prompt.
        generation_config: how to decode.
        backbone: facts of the model; resolved from model and tokenizer if not given.
        row_ids: as in `generate_ids`.
        show_progress: show a progress bar over prompts.
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
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]


@torch.no_grad()
def generate_ids(
    model: nn.Module,
    prompt_ids: Sequence[list[int]],
    generation_config: DiffusionGenerationConfig,
    backbone: Backbone,
    *,
    row_ids: Sequence[int] | None = None,
    given: Sequence[Sequence[int | None]] | None = None,
    on_reveal: Callable[["Revealed"], None] | None = None,
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
        show_progress: show a progress bar over prompts.

    Returns:
        Ids of each response up to, and without, its first end token, in the order of the prompts.

    Raises:
        ValueError: if a prompt and `max_new_tokens` together exceed the model's context, there is not one row id a
            prompt, what is given does not fit, or a prompt is no list of ids that the model knows.
    """
    config = generation_config
    if given is not None:
        _check_given(given, len(prompt_ids), config.max_new_tokens)
    if row_ids is not None and len(row_ids) != len(prompt_ids):
        raise UserError(f"There are {len(prompt_ids)} prompts and {len(row_ids)} row_ids: pass one for each.")
    check_prompt_ids(prompt_ids, backbone)
    for row, ids in enumerate(prompt_ids):
        if backbone.context_length is not None and len(ids) + config.max_new_tokens > backbone.context_length:
            raise UserError(
                f"Prompt {row} has {len(ids)} tokens; with max_new_tokens = {config.max_new_tokens} that exceeds the "
                f"model's context of {backbone.context_length}. Shorten the prompt or lower max_new_tokens."
            )
    by_length = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]))
    responses: list[list[int]] = [[] for _ in prompt_ids]
    device = next(model.parameters()).device
    with evaluation_mode(model), tqdm(total=len(responses), unit="prompt", disable=not show_progress) as progress:
        for first in range(0, len(by_length), config.batch_size):
            places = by_length[first : first + config.batch_size]
            prompts = [prompt_ids[place] for place in places]
            rows = places if row_ids is None else [row_ids[place] for place in places]
            canvas = _blank(places, rows, prompts, config.max_new_tokens, backbone)
            for i, place in enumerate(places if given is not None else ()):
                canvas.give(i, given[place])
            canvas = canvas.to(device)
            for place, ids in _decode(model, canvas, config, backbone, on_reveal):
                responses[place] = ids
                progress.update()
    return responses


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch a model to evaluation mode, and each of its modules back to its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Revealed(NamedTuple):
    """What a step revealed of the prompts of a batch: M tokens.

    Attributes:
        step: number of the step, from 0.
        place: `[M]`, place of the prompt in the call.
        position: `[M]`, in the response.
        token: `[M]`, its id.
    """

    step: int
    place: Tensor
    position: Tensor
    token: Tensor


class _Canvas(NamedTuple):
    """B rows in the making: the prompt, then N response positions, then padding up to L."""

    place: Tensor  # [B] place of the prompt in the call
    row: Tensor  # [B] number of the prompt, by which is drawn
    start: Tensor  # [B] where the response starts
    ids: Tensor  # [B, L]
    attention_mask: Tensor  # [B, L]
    masked: Tensor  # bool [B, N], response positions yet to reveal

    def to(self, device: torch.device) -> "_Canvas":
        return _Canvas(*(part.to(device) for part in self))

    def keep(self, rows: Tensor) -> "_Canvas":
        """The canvas of some rows (bool `[B]`), without padding that all of them share."""
        kept = _Canvas(*(part[rows] for part in self))
        width = int(kept.start.max()) + kept.masked.shape[1]
        return kept._replace(ids=kept.ids[:, :width], attention_mask=kept.attention_mask[:, :width])

    def give(self, i: int, ids: Sequence[int | None]) -> None:
        """Reveal the first ids of a response but for those that are None, in place."""
        for position, token in enumerate(ids):
            if token is not None:
                self.ids[i, self.start[i] + position] = token
                self.masked[i, position] = False

    def response(self) -> Tensor:
        """The response positions: ids `[B, N]`."""
        return self.ids.gather(1, self.start[:, None] + torch.arange(self.masked.shape[1], device=self.ids.device))


def _blank(places: list[int], rows: list[int], prompts: list[list[int]], length: int, backbone: Backbone) -> _Canvas:
    ids = torch.full((len(rows), max(map(len, prompts)) + length), backbone.pad_token_id)
    attention_mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, : len(prompt)] = torch.tensor(prompt, dtype=torch.long)
        ids[i, len(prompt) : len(prompt) + length] = backbone.mask_token_id
        attention_mask[i, : len(prompt) + length] = 1
    start = torch.tensor([len(prompt) for prompt in prompts])
    masked = torch.ones(len(rows), length, dtype=torch.bool)
    return _Canvas(torch.tensor(places), torch.tensor(rows), start, ids, attention_mask, masked)


def _check_given(given: Sequence[Sequence[int | None]], num_prompts: int, max_new_tokens: int) -> None:
    if len(given) != num_prompts:
        raise UserError(f"There are {num_prompts} prompts and {len(given)} beginnings given: pass one for each.")
    for row, ids in enumerate(given):
        if any(token is not None and not isinstance(token, Integral) for token in ids):
            raise UserError(f"What is given of response {row} must be token ids, and None for those to decode.")
        if len(ids) > max_new_tokens:
            raise UserError(f"{len(ids)} ids are given of response {row}, and max_new_tokens is {max_new_tokens}.")


def _decode(
    model: nn.Module,
    canvas: _Canvas,
    config: DiffusionGenerationConfig,
    backbone: Backbone,
    on_reveal: Callable[[Revealed], None] | None,
) -> Iterator[tuple[int, list[int]]]:
    """Decode a batch; yields (place of the prompt, response ids) as responses are settled."""
    ends = torch.tensor(backbone.end_token_ids, device=canvas.ids.device)
    for step in plan(config.blocks, config.steps, config.schedule):
        revealed = _reveal(model, canvas, step, config, backbone)
        if on_reveal is not None and revealed is not None:
            on_reveal(revealed)
        response = canvas.response()
        first_end = _first(torch.isin(response, ends) & ~canvas.masked)
        settled = first_end <= _first(canvas.masked)  # equal only if there is neither
        for place, ids, end in zip(canvas.place[settled], response[settled], first_end[settled], strict=True):
            yield int(place), ids[:end].tolist()
        if settled.all():
            return
        if settled.any():
            canvas = canvas.keep(~settled)


def _first(flags: Tensor) -> Tensor:
    """Where each row of bool `[B, N]` is first true, N if nowhere: `[B]`."""
    return torch.where(flags.any(dim=1), flags.int().argmax(dim=1), flags.shape[1])


def _reveal(
    model: nn.Module, canvas: _Canvas, step: Step, config: DiffusionGenerationConfig, backbone: Backbone
) -> Revealed | None:
    """One step, in place; None if it reveals nothing."""
    chosen = canvas.masked.clone()
    chosen[:, : step.start] = chosen[:, step.stop :] = False
    if config.remasking == "random":  # no prediction decides, so only the tokens to reveal are predicted
        chosen = random_positions(chosen, canvas.row, step, config)
        if not chosen.any():
            return None
        tokens, _ = _predict(model, canvas, chosen, step, config, backbone)
    elif step.count == 0:
        return None
    else:
        tokens, scores = _predict(model, canvas, chosen, step, config, backbone)
        best = best_positions(chosen, scores, canvas.row, step, config)
        tokens, chosen = tokens[best[chosen]], best
    row, position = chosen.nonzero(as_tuple=True)
    canvas.ids[row, canvas.start[row] + position] = tokens
    canvas.masked[row, position] = False
    return Revealed(step.index, canvas.place[row], position, tokens)


def _predict(
    model: nn.Module,
    canvas: _Canvas,
    positions: Tensor,
    step: Step,
    config: DiffusionGenerationConfig,
    backbone: Backbone,
) -> tuple[Tensor, Tensor]:
    """Token and score at M response positions (bool `[B, N]`), in their order: `[M]`, `[M]`."""
    row, position = positions.nonzero(as_tuple=True)
    wanted = torch.zeros_like(canvas.ids, dtype=torch.bool)
    wanted[row, canvas.start[row] + position] = True
    passes = [canvas.ids]
    if config.cfg_scale:
        prompt = torch.arange(canvas.ids.shape[1], device=canvas.ids.device) < canvas.start[:, None]
        passes.append(canvas.ids.masked_fill(prompt, backbone.mask_token_id))
    logits = [logits_at(model, ids, canvas.attention_mask, wanted, logit_shift=backbone.logit_shift) for ids in passes]
    banned = list({backbone.mask_token_id, backbone.pad_token_id} - set(backbone.end_token_ids))
    rows_a_chunk = max(1, CHUNK_ELEMENTS // logits[0].shape[1])
    found = []
    for *parts, prompt_number, where in zip(
        *(part.split(rows_a_chunk) for part in (*logits, canvas.row[row], position)), strict=True
    ):
        guided, *unguided = (part.float() for part in parts)
        for other in unguided:
            guided = other + (config.cfg_scale + 1) * (guided - other)
        guided[:, banned] = -torch.inf
        found.append(propose(guided, prompt_number, step.index, where, config))
    tokens, scores = zip(*found, strict=True)
    return torch.cat(tokens), torch.cat(scores)
