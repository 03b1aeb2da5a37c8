"""Masked diffusion language models in lm-evaluation-harness, as `--model mdlm`.

    python -m mdu_trainer.evaluation --model mdlm --model_args pretrained=PATH --tasks mmlu

    import lm_eval, mdu_trainer.evaluation.harness
    lm_eval.simple_evaluate(model="mdlm", model_args="pretrained=PATH,num_draws=32", tasks=["arc_easy"])

Harnesses assume a left-to-right model. In place of what they ask for stands:

- the likelihood of a continuation: `response_likelihood`, a Monte-Carlo estimate of the bound that LLaDA reports
  (arXiv 2502.09992, appendix B); continuations of one token, as in MMLU, are exact with a single pass;
- "is it what greedy decoding gives": greedy decoding of the masked continuation at its length;
- generation until a stop text: diffusion decoding of `max_gen_toks` tokens, cut at the stop text;
- rolling likelihood of running text: refused.
"""

import dataclasses
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from peft import PeftModel
from transformers.utils import logging

from ..data.reading import private
from ..files import UserError
from ..inference.config import Decoding, DiffusionGenerationConfig, check_count, decoded_as
from ..inference.generation import generate_ids
from ..inference.likelihood import response_likelihood
from ..models import load_model, load_tokenizer, resolve_backbone
from ..terminal import Bar
from .fast import SAMPLE, token_agreement
from .metrics import greedy_completions

logger = logging.get_logger(__name__)

BATCHES_A_PART = 8  # what a kill loses of a run with --use_cache
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval takes any of them
DECODING_FIELDS = {field.name for field in dataclasses.fields(DiffusionGenerationConfig)}


@register_model("mdlm")
class MaskedDiffusionLM(TemplateLM):
    """A masked diffusion language model for lm-evaluation-harness.

    With `accelerate launch` each process scores its share of the requests, with the results of one process.

    Args:
        pretrained: a Hub id or a directory.
        tokenizer: another place to load the tokenizer from.
        peft: a Hub id or a directory of an adapter.
        revision: branch, tag or commit on the Hub.
        dtype: of the weights, "auto" for the checkpoint's own.
        trust_remote_code: run the checkpoint's own code, where no native class knows it.
        device: where the model runs; a GPU if there is one. Under accelerate, the process's own.
        batch_size: sequences a forward pass.
        num_draws: forward passes for the likelihood of a continuation, at most.
        check_greedy: find out whether greedy decoding gives a continuation, which costs a pass a token and few tasks
            ask for (LAMBADA's accuracy does). If False, the answer is always no.
        seed: of all that is drawn.
        decoding: "fast" decodes with fewer passes, as an approximation (see `decoded_as`). On a sample of the requests
            the share of tokens that exact decoding gives, too, is measured, and stands among what the results say of
            the model as `fast_token_agreement`.
        max_batch_size: not used; the harness passes it to every model.
        **fields: `DiffusionGenerationConfig` for generation; a task's own settings come first.

    Raises:
        ValueError: for an argument that is not known, or a batch size that is not a number.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        tokenizer: str | None = None,
        peft: str | None = None,
        revision: str = "main",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        device: str | None = None,
        batch_size: int | str = 1,
        num_draws: int = 128,
        check_greedy: bool = True,
        seed: int = 0,
        decoding: Decoding = "exact",
        max_batch_size: int | None = None,
        **fields: Any,
    ):
        super().__init__()
        unknown = fields.keys() - DECODING_FIELDS
        if unknown:
            raise UserError(
                f"Unknown model_args {', '.join(sorted(unknown))}. Besides those of MaskedDiffusionLM there are "
                f"{', '.join(sorted(DECODING_FIELDS))}."
            )
        if not str(batch_size).isdecimal():
            raise UserError(f"batch_size must be a number, got {batch_size!r}: the largest that fits is not sought.")
        config = DiffusionGenerationConfig(**{"seed": seed, "batch_size": int(batch_size), **fields})
        self._decoding = decoded_as(config, decoding)
        self._agreement: list[float] = []  # of the requests that were decoded exactly, too
        check_count("num_draws", num_draws)
        self._num_draws = num_draws
        self._check_greedy = check_greedy
        self._accelerator = Accelerator()
        self._rank, self._world_size = self._accelerator.process_index, self._accelerator.num_processes
        if self._world_size > 1 or device is None:
            device = self._accelerator.device
        self._device = torch.device(device)

        options = {"trust_remote_code": trust_remote_code, "revision": revision}
        self.tokenizer = load_tokenizer(tokenizer or pretrained, **options if tokenizer is None else {})
        model = load_model(pretrained, dtype=dtype, **options)
        self.backbone = resolve_backbone(model, self.tokenizer)
        if peft is not None:
            model = PeftModel.from_pretrained(model, peft)
        self.model = model.to(self._device).eval()

    # What the harness asks of the tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a response."""
        return self.backbone.end_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that a continuation without context is conditioned on."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, for those of caches."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, with the tokenizer's start token unless the text brings its own, as chat templates do."""
        with private("A request cannot be encoded: the tokenizer failed"):
            ids = self.tokenizer(string, add_special_tokens=False)["input_ids"]
        if add_special_tokens is False or (ids and ids[0] in self.tokenizer.all_special_ids):
            return ids
        start = self.tokenizer("")["input_ids"][:1]
        return [*start, *ids] if start and start[0] not in self.backbone.end_token_ids else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation."""
        with private("A request cannot be rendered: the chat template failed"):
            return self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

    # Requests

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, is it greedy) of each (texts, context ids, continuation ids)."""
        continuations = [continuation for _, _, continuation in requests]
        contexts = self._fit([context for _, context, _ in requests], [len(ids) for ids in continuations])
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        lengths = [len(a) + len(b) for a, b in zip(contexts, continuations, strict=True)]
        batch_size, seed = self._decoding.batch_size, self._decoding.seed
        for rows in self._parts(lengths, disable_tqdm):
            part = [contexts[row] for row in rows], [continuations[row] for row in rows]
            estimate = response_likelihood(
                self.model, *part, self.backbone, num_draws=self._num_draws, batch_size=batch_size, seed=seed
            )
            greedy = [False] * len(rows)
            if self._check_greedy:
                decoded, true = greedy_completions(self.model, *part, self.backbone, batch_size=batch_size)
                greedy = [a == b for a, b in zip(decoded, true, strict=True)]
            for row, log_likelihood, is_greedy in zip(rows, estimate.log_likelihood, greedy, strict=True):
                results[row] = (float(log_likelihood), is_greedy)
                self.cache_hook.add_partial("loglikelihood", requests[row][0], results[row])
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refused: perplexities of running text are defined token after token, from left to right."""
        raise NotImplementedError(
            "A masked diffusion model has no perplexity of running text that could stand beside an autoregressive "
            "model's: its bound depends on how the text is cut into windows, each of which is predicted as a whole. "
            "Choose tasks with loglikelihood, multiple_choice or generate_until requests."
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text decoded for each (context, settings), up to its first stop text."""
        by_settings: dict[str, list[int]] = defaultdict(list)
        for row, request in enumerate(requests):
            by_settings[repr(request.args[1])].append(row)
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        row_ids = _numbers(prompts)
        texts = [""] * len(requests)
        for group in by_settings.values():
            settings = requests[group[0]].args[1]
            config, stops = self._settings(settings)
            fitted = self._fit([prompts[row] for row in group], [config.max_new_tokens] * len(group))
            for part in self._parts(list(map(len, fitted)), disable_tqdm):
                rows = [group[i] for i in part]
                asked, numbers = [fitted[i] for i in part], [row_ids[row] for row in rows]
                decoded = generate_ids(self.model, asked, config, self.backbone, row_ids=numbers)
                if config.confidence_threshold is not None:
                    self._compare(asked, numbers, config, decoded)
                for row, ids in zip(rows, decoded, strict=True):
                    texts[row] = _until(self.tokenizer.decode(ids, skip_special_tokens=True), stops)
                    self.cache_hook.add_partial("generate_until", requests[row].args, texts[row])
        return texts

    def _compare(
        self, prompts: list[list[int]], numbers: list[int], config: DiffusionGenerationConfig, fast: list[list[int]]
    ) -> None:
        """Decode some of these requests exactly, until the sample is full."""
        some = slice(0, max(0, SAMPLE - len(self._agreement)))
        exactly = dataclasses.replace(config, confidence_threshold=None)
        exact = generate_ids(self.model, prompts[some], exactly, self.backbone, row_ids=numbers[some])
        self._agreement += [token_agreement(a, b) for a, b in zip(fast[some], exact, strict=True)]

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results beside the arguments of the model."""
        if not self._agreement:
            return {}
        shares = {"fast_token_agreement": float(np.mean(self._agreement)), "requests": len(self._agreement)}
        logger.warning(
            f"Answers were decoded fast, which is an approximation: of {shares['requests']} requests, "
            f"{shares['fast_token_agreement']:.1%} of the tokens are those of exact decoding."
        )
        return {"fast_decoding": shares}

    def _settings(self, settings: dict[str, Any]) -> tuple[DiffusionGenerationConfig, list[str]]:
        """A task's generation settings over those of the model, and the stop texts."""
        settings = dict(settings)
        stops = settings.pop("until", None) or []
        lengths = [settings.pop(name) for name in LENGTH_NAMES if name in settings]
        if settings.pop("do_sample", None) is False:
            settings["temperature"] = 0.0
        fields = {name: value for name, value in settings.items() if name in DECODING_FIELDS}
        ignored = settings.keys() - fields.keys()
        if ignored:
            logger.warning_once(
                f"Diffusion decoding has no {', '.join(sorted(ignored))}: a task's setting is ignored."
            )
        length = _whole(lengths[0]) if lengths else self._decoding.max_new_tokens
        block = _whole(fields.pop("block_length", self._decoding.block_length))
        if isinstance(block, int) and isinstance(length, int):
            block = min(block, length)
        fields |= {"max_new_tokens": length, "block_length": block}
        return dataclasses.replace(self._decoding, **fields), [stops] if isinstance(stops, str) else list(stops)

    def _fit(self, contexts: list[list[int]], room: list[int]) -> list[list[int]]:
        """The contexts, cut on the left where with `room` tokens to come they exceed the model's context."""
        limit = self.backbone.context_length
        if limit is None:
            return contexts
        for row, needed in enumerate(room):
            if needed >= limit:
                raise UserError(f"Request {row} needs {needed} tokens, and the model's context is {limit}.")
        kept = [ids[max(0, len(ids) + needed - limit) :] for ids, needed in zip(contexts, room, strict=True)]
        cut = sum(len(short) < len(ids) for short, ids in zip(kept, contexts, strict=True))
        if cut:
            logger.warning(
                f"{cut} of {len(contexts)} requests are longer than the model's context of {limit} tokens: they lose "
                "their beginning."
            )
        return kept

    def _parts(self, lengths: list[int], disable_tqdm: bool) -> Iterator[list[int]]:
        """Request numbers, some batches at a time, the longest first; shows progress on the main process."""
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        size = BATCHES_A_PART * self._decoding.batch_size
        show = not disable_tqdm and self._rank == 0
        with Bar("answering lm-eval", total=len(order), unit="request", show=show) as progress:
            for first in range(0, len(order), size):
                yield order[first : first + size]
                progress.update(len(order[first : first + size]))

    # Several processes

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes, one after the other."""
        return self._accelerator.gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all processes on process `dst`, None on the others."""
        gathered = gather_object([obj])
        return gathered if self._rank == dst else None

    def barrier(self) -> None:
        """Wait for all processes."""
        self._accelerator.wait_for_everyone()


def _whole(value: Any) -> Any:
    """A whole number that a task file wrote as 256.0 or "256"; all else as it is, for the config to refuse."""
    try:
        return int(value) if float(value).is_integer() else value
    except (TypeError, ValueError):
        return value


def _until(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop texts."""
    return text[: min((text.find(stop) for stop in stops if stop and stop in text), default=len(text))]


def _numbers(prompts: list[list[int]]) -> list[int]:
    """A number for each prompt by which to draw: the same whoever decodes it, another for each repetition."""
    seen: Counter[bytes] = Counter()
    numbers = []
    for ids in prompts:
        content = np.array(ids, dtype=np.int64).tobytes()
        digest = hashlib.blake2b(content + str(seen[content]).encode(), digest_size=6).digest()
        numbers.append(int.from_bytes(digest, "little"))
        seen[content] += 1
    return numbers
