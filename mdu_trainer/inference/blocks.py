"""Decoding of block-wise models: block after block, beside what is kept of the finished ones.

    prompt   a b c d e f     in blocks of four:   a b c d | e f [M] [M] | [M] [M] [M] [M] | ...
    prefix   a b c d         run once; its keys and values are kept
    window   e f [M] [M]     predicted step by step, beside the prefix; then run once more, whole, to be kept, too
    window   [M] [M] [M] [M] ...

Blocks are counted from the start of the prompt, so the block in which it ends is decoded with its last tokens in it.
A block sees nothing behind it, so what is kept is exact. How the published decoders are named here:

    SDAR            low_confidence_static     remasking="low_confidence"
                    low_confidence_dynamic    remasking="low_confidence_dynamic", above .85
    LLaDA2.0        threshold=.95             remasking="low_confidence_dynamic"
    LLaDA2.1        editing_threshold=.9      remasking="low_confidence_dynamic", edit_threshold=.9
    Fast-dLLM v2    threshold=.9              remasking="low_confidence_dynamic"; sub-blocks of 8 (block_length)
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..files import UserError
from ..models import Backbone, ReadLogits, block_causal_mask, scan_logits_at
from .canvas import Canvas, Revealed
from .config import DiffusionGenerationConfig
from .sampling import best_positions, random_positions, read_proposals
from .schedule import Step, plan

MOST_EDITS = 16  # passes over a block without masks; two tokens could replace one another without end
THRESHOLDS = {"sdar": 0.85, "llada2": 0.95, "fast_dllm": 0.9}  # published, by backbone
SUB_BLOCKS = {"fast_dllm": 8}
CACHING = ("llada", "llada_moe", "dream", "bidirectional")  # models that attend in full and take a cache


def settle_options(config: DiffusionGenerationConfig, backbone: Backbone) -> DiffusionGenerationConfig:
    """The options of a decoding with what the model's publishers say in place of what is left to them.

    Raises:
        ValueError: an option that the model cannot follow.
    """
    if config.remasking == "low_confidence_dynamic":
        threshold = config.confidence_threshold
        if threshold is None:
            threshold = THRESHOLDS.get(backbone.name)
        if threshold is None:
            raise UserError(
                f"remasking='low_confidence_dynamic' reveals what is above a threshold, and none was published for "
                f"this model ({backbone.name}). Set confidence_threshold, or take remasking='low_confidence'."
            )
        config = replace(config, remasking="low_confidence", confidence_threshold=threshold)
    if backbone.block_size is None:
        if config.edit_threshold is not None:
            raise UserError("edit_threshold is of models that attend between blocks; this one does not. Leave it out.")
        if config.prefix_cache and (backbone.name not in CACHING or config.cfg_scale):
            why = "cfg_scale needs a second one" if config.cfg_scale else f"this model ({backbone.name}) keeps none"
            raise UserError(f"prefix_cache=True keeps the prefix of one pass, and {why}. Leave it out.")
        return config
    if config.cfg_scale:
        raise UserError(
            f"cfg_scale = {config.cfg_scale:g} needs a pass without the prompt, which block-wise models keep from "
            "pass to pass. Set cfg_scale=0."
        )
    return config


def room_behind(backbone: Backbone) -> int:
    """Masks behind a response: its last block is decoded whole, and cut."""
    return 0 if backbone.block_size is None else backbone.block_size - 1


class BlockDecoding:
    """The decoding of the batch on a canvas, whose responses have masks up to the end of their last block.

    Args:
        model: a block-wise model.
        config: how to decode, as `settle_options` returns it.
        backbone: facts of the model.
        canvas: the rows, with what is given of their responses.
        ends: `[E]`, tokens that end a response.
    """

    def __init__(
        self, model: nn.Module, config: DiffusionGenerationConfig, backbone: Backbone, canvas: Canvas, ends: Tensor
    ):
        assert backbone.block_size is not None
        self.ends = ends
        self.config, self.backbone, self.canvas, self.size = config, backbone, canvas, backbone.block_size
        self.free = canvas.masked.clone()  # [B, N], positions that are not given
        self.prefix = _Prefix(model, canvas, self.size, keeps=config.prefix_cache is not False)
        self.steps = self._plan()

    def run(self, on_reveal: Callable[[Revealed], None] | None) -> Iterator[tuple[int, list[int]]]:
        """Decode; yields (place of the prompt, response ids) as responses are settled."""
        number = 0
        finished = self._finished_prompt()
        while True:
            first = Step(number * (len(self.steps) + MOST_EDITS), 0, self.size, 1, 1.0)
            for revealed in self._decode_block(finished, first):
                if on_reveal is not None:
                    on_reveal(revealed)
                if self.config.edit_threshold is None:
                    yield from self._leave()
                    if not len(self.canvas.place):
                        return
            yield from self._leave()
            if not len(self.canvas.place):
                return
            finished, number = self._window()[1], number + 1

    def _plan(self) -> list[Step]:
        """The steps of a block."""
        size = self.size
        length = self.config.block_length or SUB_BLOCKS.get(self.backbone.name, size)
        parts = [(start, min(start + length, size)) for start in range(0, size, length)]
        steps = self.config.steps
        if steps is not None:
            each = math.ceil(steps / math.ceil(self.config.max_new_tokens / size))
            steps = min(max(each, len(parts)), size)
        return list(plan(parts, steps, self.config.schedule))

    def _leave(self) -> Iterator[tuple[int, list[int]]]:
        """Yield the responses that are settled, which then leave the batch."""
        settled, responses = self.canvas.settled(self.ends, self.config.max_new_tokens)
        yield from responses
        if settled.all():
            self.canvas = Canvas(*(part[:0] for part in self.canvas))
        elif settled.any():
            self.canvas, self.free = self.canvas.keep(~settled), self.free[~settled]
            self.prefix.keep(~settled)

    def _finished_prompt(self) -> Tensor:
        """The whole blocks of the prompts, aligned on the right: ids `[B, C]`."""
        columns = torch.arange(int((-self.prefix.padding).max()), device=self.canvas.ids.device)
        whole = -self.prefix.padding  # of each row; the prefix is empty yet
        padding = len(columns) - whole
        self.prefix.padding = padding
        return self.canvas.ids.gather(1, (columns - padding[:, None]).clamp(min=0))

    def _window(self) -> tuple[Tensor, Tensor, Tensor]:
        """The block to decode: positions in the response `[B, W]`, below 0 the prompt; ids; and what is masked."""
        places = self.prefix.positions(self.size)
        position = places - self.canvas.start[:, None]
        masked = (position >= 0) & self.canvas.masked.gather(1, position.clamp(min=0))
        return position, self.canvas.ids.gather(1, places), masked

    def _decode_block(self, finished: Tensor, first: Step) -> Iterator[Revealed]:
        """Keep the finished tokens, and decode the block behind them."""
        if finished.shape[1] or self.prefix.ids.shape[1]:
            yield from self._keep(finished, first)
        for step in self.steps:
            revealed = self._step(replace(step, index=first.index + step.index))
            if revealed is not None:
                yield revealed
            if not len(self.canvas.place):
                return
        if self.config.edit_threshold is None:
            return
        for index in range(MOST_EDITS):
            revealed = self._step(replace(first, index=first.index + len(self.steps) + index))
            if revealed is None:
                return
            yield revealed

    def _keep(self, finished: Tensor, first: Step) -> Iterator[Revealed]:
        """Run the finished tokens to be kept; with a logit shift their last one predicts the next block's first."""
        self.prefix.extend(finished)
        position, _, masked = self._window()
        opening = masked[:, 0] if self.backbone.logit_shift else torch.zeros_like(masked[:, 0])
        if self.prefix.cache is None and not opening.any():
            return
        rows = opening.nonzero()[:, 0]
        tokens, _ = self._propose(partial(self.prefix.run_last, finished, opening), rows, position[rows, 0], first)
        if len(rows):
            yield from self._reveal(rows, position[rows, 0], tokens, first)

    def _step(self, step: Step) -> Revealed | None:
        """Take one step, in place. None if it changes nothing."""
        config, (position, ids, masked) = self.config, self._window()
        chosen = masked.clone()
        chosen[:, : step.start] = chosen[:, step.stop :] = False
        editable = torch.zeros_like(chosen)
        if config.remasking == "random":
            chosen = random_positions(chosen, self.canvas.row, step, config)
        if config.edit_threshold is not None:
            editable = (position >= 0) & self.free.gather(1, position.clamp(min=0)) & ~masked
            editable[:, 0] &= not self.backbone.logit_shift  # the block before decoded it
        wanted = chosen | editable
        if not wanted.any() or not (step.count or editable.any() or config.remasking == "random"):
            return None
        rows, columns = wanted.nonzero(as_tuple=True)
        run = partial(self.prefix.run, ids, wanted, self.backbone.logit_shift)
        tokens, scores = self._propose(run, rows, position[rows, columns], step)
        at_mask = chosen[wanted]
        best = chosen
        if config.remasking != "random":
            best = best_positions(chosen, scores[at_mask], self.canvas.row, step, config)
        if config.edit_threshold is not None:
            edited = ~at_mask & (scores > config.edit_threshold) & (tokens != ids[wanted])
            best[rows[edited], columns[edited]] = True
        taken = best[wanted]
        if not taken.any():
            return None
        rows, columns = rows[taken], columns[taken]
        return next(self._reveal(rows, position[rows, columns], tokens[taken], step))

    def _reveal(self, rows: Tensor, position: Tensor, tokens: Tensor, step: Step) -> Iterator[Revealed]:
        self.canvas.reveal(rows, position, tokens)
        inside = position < self.config.max_new_tokens
        yield Revealed(step.index, self.canvas.place[rows[inside]], position[inside], tokens[inside])

    def _propose(
        self, scan: Callable[[ReadLogits], Tensor], rows: Tensor, position: Tensor, step: Step
    ) -> tuple[Tensor, Tensor]:
        """Token and score of each of the N predictions that `scan` reads: `[N]`, `[N]`."""
        return read_proposals(scan, self.canvas.row[rows], step.index, position, self.config, self.backbone)


class _Prefix:
    """The finished blocks of B rows, C tokens, aligned on the right, and what the model keeps of them.

    Attributes:
        ids: `[B, C]`.
        padding: `[B]`, columns on the left that hold nothing, whole blocks.
    """

    def __init__(self, model: nn.Module, canvas: Canvas, block_size: int, keeps: bool):
        self.model, self.block_size = model, block_size
        self.ids = canvas.ids[:, :0]
        self.padding = -(canvas.start // block_size * block_size)
        self.cache = DynamicCache() if keeps else None

    def positions(self, width: int) -> Tensor:
        """The positions of the next tokens in their rows: `[B, width]`."""
        columns = torch.arange(width, device=self.ids.device)
        return self.ids.shape[1] - self.padding[:, None] + columns

    def keep(self, rows: Tensor) -> None:
        """Keep some rows, bool `[B]`, alone."""
        self.ids, self.padding = self.ids[rows], self.padding[rows]
        if self.cache is not None and self.cache.get_seq_length():
            self.cache.batch_select_indices(rows.nonzero()[:, 0])

    def extend(self, ids: Tensor) -> None:
        """Take finished tokens `[B, W]` in; what the model keeps of them comes with `run_last`."""
        self.ids = torch.cat([self.ids, ids], dim=1)

    def run_last(self, ids: Tensor, wanted: Tensor, read: ReadLogits) -> Tensor:
        """Run the last tokens `[B, W]`, to be kept. Reads what follows them in the wanted rows, bool `[B]`."""
        selected = torch.zeros(self.ids.shape, dtype=torch.bool, device=wanted.device)
        selected[:, -1] = wanted
        if self.cache is None:
            return self._scan(self.ids, selected, False, read)
        return self._scan(ids, selected[:, selected.shape[1] - ids.shape[1] :], False, read)

    def run(self, ids: Tensor, wanted: Tensor, logit_shift: bool, read: ReadLogits) -> Tensor:
        """Read the predictions of the wanted (bool `[B, W]`) of the tokens `[B, W]` behind the finished ones."""
        if self.cache is None:
            before = torch.zeros(self.ids.shape, dtype=torch.bool, device=wanted.device)
            whole = torch.cat([self.ids, ids], dim=1), torch.cat([before, wanted], dim=1)
            return self._scan(*whole, logit_shift, read)
        found = self._scan(ids, wanted, logit_shift, read)
        self.cache.crop(-ids.shape[1])
        return found

    def _scan(self, ids: Tensor, selected: Tensor, logit_shift: bool, read: ReadLogits) -> Tensor:
        """Run tokens `[B, Q]` behind those that the model keeps, or from the first column on."""
        kept = 0 if self.cache is None else self.cache.get_seq_length()
        columns = torch.arange(kept + ids.shape[1], device=ids.device)
        positions = columns - self.padding[:, None]
        mask = block_causal_mask(self.block_size, positions >= 0, ids.shape[1])
        mask = mask | (columns == columns[kept:, None])  # padding sees itself, not nothing
        inputs: dict[str, Any] = {} if self.cache is None else {"past_key_values": self.cache, "use_cache": True}
        inputs["position_ids"] = positions[:, kept:].clamp(min=0)
        return scan_logits_at(self.model, [ids], mask, selected, read, logit_shift=logit_shift, **inputs)
