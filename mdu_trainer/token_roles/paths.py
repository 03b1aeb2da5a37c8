"""Predictions along the denoising path: from an all-[MASK] response, token by token, to text.

A `Path` is a response and the order in which its tokens are revealed. There are two kinds:

- The ground-truth path (`true_paths`) reveals the true answer in random order, as the forward process of training
  does. The order is a hash of (seed, path, row, position), so every model is asked about the same noisy inputs, and
  differences between two are paired.
- The decoding path (`decoded_paths`) is the model's own: what it decodes, in the order in which it reveals it.

Along a path the masked tokens are predicted after a share s/S of it is revealed, s = 0 ... S - 1, and values of each
prediction are kept, never the logits:

    kl           KL(p(. | x, y_t) || p(. | m, y_t)), what the prompt x adds to a prompt m of masks only, at tau = 1
    entropy      of p(. | x, y_t)
    probability  p(y_i | x, y_t) of the token that is revealed there in the end; the true one on the ground-truth path
    shift        KL(p(. | x, y_t) || p_base(. | x, y_t)), how far the model has moved from another

All in nats, but the probability. Source: MDU (arXiv 2605.18253), whose divergence by kind of token `kl` is.

A block-wise model predicts each block beside the whole blocks before it, as it learns and decodes: on a ground-truth
path, what is not yet revealed of them hides nothing from it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from scipy.stats import rankdata
from torch import Tensor, nn

from ..data.roles import Role
from ..divergence import AnchorKL, Prediction, Projection, TokenNLL
from ..files import UserError
from ..inference.config import check_count
from ..inference.generation import DiffusionGenerationConfig, Revealed, generate_ids
from ..masking import corrupt, counter_uniform, pad_rows
from ..models import Backbone, evaluation_mode, hidden_at
from ..terminal import Bar

NEVER = np.iinfo(np.int64).max  # a position behind the end of a decoded response, which nothing revealed
VALUES = ("kl", "entropy", "probability", "shift")

CHUNK_ELEMENTS = 1 << 25  # logits that are compared at a time

PathValues = dict[str, list[np.ndarray]]  # by name, for each path float64 [S, L], NaN where nothing was predicted


@dataclass(frozen=True, repr=False)
class Path:
    """A response, and when each of its tokens is revealed. Its ids appear in no message.

    Attributes:
        row: number of the row. Several paths may be of one row.
        prompt: ids, generation prompt included.
        response: ids `[N]`.
        revealed: int64 `[N]`, the moment at which each is revealed; `NEVER` for a position that stays masked.
        roles: of the first `L <= N` tokens. Those after them belong to the input, but are not measured.
    """

    row: int
    prompt: list[int]
    response: list[int]
    revealed: np.ndarray
    roles: list[Role]

    def masked(self, share: float) -> np.ndarray:
        """The positions still masked once this share of the measured tokens, rounded down, is revealed: bool `[N]`."""
        measured = np.sort(self.revealed[: len(self.roles)])
        return self.revealed >= measured[int(share * len(measured) + 1e-9)]


def true_paths(
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    roles: Sequence[list[Role]],
    *,
    num_paths: int = 1,
    seed: int = 0,
) -> list[Path]:
    """Ground-truth paths of each row: the true answer, revealed in random orders.

    Args:
        prompts, responses: ids of each row.
        roles: of each response's tokens.
        num_paths: orders a row.
        seed: of the orders.

    Raises:
        ValueError: for a number of paths below 1, or a response without tokens.
    """
    check_count("num_paths", num_paths)
    paths = []
    for row, (prompt, response, row_roles) in enumerate(zip(prompts, responses, roles, strict=True)):
        if not response:
            raise UserError(f"The response of row {row} is empty, so it has no tokens to reveal: remove the row.")
        for number in range(num_paths):
            paths.append(Path(row, prompt, response, random_order(seed, number, row, len(response)), row_roles))
    return paths


def random_order(seed: int, number: int, row: int, length: int) -> np.ndarray:
    """The moment at which each token of a path of a row is revealed, at random: int64 `[length]`, 0 the first."""
    noise = counter_uniform(seed, torch.tensor(number), torch.tensor(row), torch.arange(length))
    return noise.argsort(stable=True).argsort().numpy()


def decoded_paths(
    model: nn.Module,
    prompts: Sequence[list[int]],
    backbone: Backbone,
    config: DiffusionGenerationConfig,
    label: Callable[[list[list[int]]], list[list[Role]]],
) -> list[Path]:
    """The model's own path of each row.

    Args:
        model, backbone: what decodes.
        prompts: ids of each row.
        config: how it decodes.
        label: gives decoded responses, ids up to and with their first end token, a role a token.
    """
    decoded, tokens, revealed = watch_decoding(model, prompts, backbone, config)
    measured = [tokens[row, : len(ids) + 1].tolist() for row, ids in enumerate(decoded)]  # with the end token
    return [
        Path(row, prompts[row], tokens[row].tolist(), revealed[row], row_roles)
        for row, row_roles in enumerate(label(measured))
    ]


def watch_decoding(
    model: nn.Module, prompts: Sequence[list[int]], backbone: Backbone, config: DiffusionGenerationConfig, **how: Any
) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """What `generate_ids` returns, each token that it revealed, and in which step, the last if it was edited.

    Args:
        model, prompts, backbone, config: as in `decoded_paths`.
        how: further arguments of `generate_ids`.

    Returns:
        Ids of each response; and of all N positions of the R responses the tokens, int64 `[R, N]`, [MASK] where none
        was revealed, and the steps, int64 `[R, N]`, `NEVER` there.
    """
    shape = len(prompts), config.max_new_tokens
    tokens = np.full(shape, backbone.mask_token_id, dtype=np.int64)
    revealed = np.full(shape, NEVER, dtype=np.int64)

    def record(step: Revealed) -> None:
        place, position = step.place.cpu().numpy(), step.position.cpu().numpy()
        tokens[place, position] = step.token.cpu().numpy()
        revealed[place, position] = step.step

    return generate_ids(model, prompts, config, backbone, on_reveal=record, **how), tokens, revealed


@torch.no_grad()
def measure_paths(
    model: nn.Module,
    paths: Sequence[Path],
    backbone: Backbone,
    *,
    base: nn.Module | None = None,
    num_steps: int = 16,
    batch_size: int = 32,
    show_progress: str | None = None,
) -> PathValues:
    """The values of every masked token along each path.

    Args:
        model: a masked diffusion language model; in evaluation mode during the call.
        paths: what it is asked about.
        backbone: facts of the model.
        base: a model of the same backbone on the same device, to measure the shift from; without it there is none.
        num_steps: S, the moments of each path at which is measured, evenly spaced over the tokens revealed.
        batch_size: sequences a forward pass. It changes nothing but memory and speed.
        show_progress: show a progress bar over moments that says this.

    Raises:
        ValueError: for a number out of range, or a row longer than the model's context.
    """
    _check(paths, backbone, num_steps, batch_size)
    names = VALUES if base is not None else VALUES[:-1]
    measured = {name: [np.full((num_steps, len(path.roles)), np.nan) for path in paths] for name in names}
    moments = [(place, step) for place in range(len(paths)) for step in range(num_steps)]
    moments.sort(key=lambda moment: len(paths[moment[0]].prompt) + len(paths[moment[0]].response))
    asked = [model] if base is None else [model, base]
    with Bar(show_progress or "", total=len(moments), unit="input", show=show_progress is not None) as progress:
        for first in range(0, len(moments), batch_size):
            batch = moments[first : first + batch_size]
            inputs = [(paths[place], paths[place].masked(step / num_steps)) for place, step in batch]
            for (place, step), where, columns in zip(batch, *_measure(asked, inputs, backbone), strict=True):
                for name, column in zip(names, columns, strict=True):
                    measured[name][place][step, where] = column
            progress.update(len(batch))
    return measured


def by_step(values: Sequence[np.ndarray], paths: Sequence[Path], role: Role) -> np.ndarray:
    """The mean over the masked tokens of a role, each row at each step: `[R, S]`, NaN where none is masked."""
    return _mean(values, paths, role, axis=1)


def by_row(values: Sequence[np.ndarray], paths: Sequence[Path], role: Role) -> np.ndarray:
    """The mean over the masked tokens of a role at all steps, each row: `[R]`, NaN for rows without the role.

    Rows are those that have paths, in the order of their numbers. All paths of a row count together.
    """
    return _mean(values, paths, role, axis=None)


def revelation(paths: Sequence[Path], role: Role) -> np.ndarray:
    """The mean moment at which a role's tokens are revealed, a row: 0 first, 1 last, `[R]`, NaN without the role."""
    ranks = [rankdata(path.revealed[: len(path.roles)]) - 1 for path in paths]  # those of one step share their mean
    return by_row([(rank / max(1, len(rank) - 1))[None] for rank in ranks], paths, role)


def _mean(values: Sequence[np.ndarray], paths: Sequence[Path], role: Role, axis: int | None) -> np.ndarray:
    rows: dict[int, list[np.ndarray]] = defaultdict(list)
    for path, each in zip(paths, values, strict=True):
        rows[path.row].append(each[:, [one == role for one in path.roles]])
    means = []
    for row in sorted(rows):
        pooled = np.concatenate(rows[row], axis=1)
        count = np.isfinite(pooled).sum(axis=axis)
        means.append(np.where(count > 0, np.nansum(pooled, axis=axis) / np.maximum(count, 1), np.nan))
    return np.stack(means)


def _measure(
    models: Sequence[nn.Module], inputs: Sequence[tuple[Path, np.ndarray]], backbone: Backbone
) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """The measured positions `[l]` of each input, and its columns of values, `[l]` each."""
    device = next(models[0].parameters()).device
    ids, attention_mask = pad_rows([path.prompt + path.response for path, _ in inputs], backbone.pad_token_id)
    response = torch.zeros_like(ids)
    noise, rows = torch.ones(ids.shape), torch.zeros(ids.shape, dtype=torch.bool)
    for i, (path, masked) in enumerate(inputs):
        start, stop = len(path.prompt), len(path.prompt) + len(path.response)
        response[i, start:stop] = 1
        noise[i, start:stop] = 1 - torch.from_numpy(masked).float()
        rows[i, start : start + len(path.roles)] = torch.from_numpy(masked[: len(path.roles)])
    tensors = (ids, attention_mask, response, noise, rows)
    ids, attention_mask, response, noise, rows = (tensor.to(device) for tensor in tensors)
    t = torch.full((len(inputs),), 0.5, device=device)
    noisy = corrupt(ids, response, attention_mask, backbone.mask_token_id, t, noise)
    predicted = []
    for model in models:
        with evaluation_mode(model):
            predicted.append(predict_at(model, noisy.noisy_ids, attention_mask, rows, backbone.form(ids)))
            if model is models[0]:
                clean = torch.where(noisy.masked, ids, noisy.anchor_ids)
                unprompted = predict_at(model, noisy.anchor_ids, attention_mask, rows, backbone.form(clean))
    columns = list(_compare(predicted[0], unprompted, ids[rows], predicted[1:]))
    table = torch.cat(columns, dim=1).cpu().double().numpy()
    where = [np.flatnonzero(masked[: len(path.roles)]) for path, masked in inputs]
    return where, [list(part) for part in np.split(table, np.cumsum([len(w) for w in where])[:-1], axis=1)]


def predict_at(
    model: nn.Module, ids: Tensor, attention_mask: Tensor, rows: Tensor, form: dict[str, Any]
) -> Prediction:
    """The predictions of the N tokens in `rows` (bool `[B, L]`), with the head's weights; `form` as of a backbone."""
    prediction = hidden_at(model, ids, attention_mask, rows, **form)
    if isinstance(prediction, Tensor):
        return prediction
    head = extract_model_from_parallel(model).get_output_embeddings()
    return prediction._replace(weight=head.weight, bias=head.bias)


def _compare(
    prompted: Prediction, unprompted: Prediction, targets: Tensor, others: Sequence[Prediction]
) -> Iterator[Tensor]:
    """The values of N tokens in the order of `VALUES`, a chunk of C positions at a time: `[V, C]`."""

    def select(prediction: Prediction) -> Prediction:
        return prediction.select(chunk) if isinstance(prediction, Projection) else prediction[chunk]

    vocabulary = prompted.weight.shape[0] if isinstance(prompted, Projection) else prompted.shape[1]
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    for start in range(0, len(targets), size):
        chunk = slice(start, start + size)
        part = select(prompted)
        kl = AnchorKL(1.0, select(unprompted))(part)
        nll = TokenNLL(targets[chunk])(part).value
        shift = [AnchorKL(1.0, select(other))(part).value for other in others]
        yield torch.stack([kl.value, kl.entropy, (-nll).exp(), *shift])


def _check(paths: Sequence[Path], backbone: Backbone, num_steps: int, batch_size: int) -> None:
    for name, value in (("num_steps", num_steps), ("batch_size", batch_size), ("the number of paths", len(paths))):
        check_count(name, value)
    for path in paths:
        length = len(path.prompt) + len(path.response)
        if backbone.context_length is not None and length > backbone.context_length:
            raise UserError(
                f"Row {path.row} has {length} tokens and the model's context is {backbone.context_length}: shorten or "
                "remove the row."
            )
