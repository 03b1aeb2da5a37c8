"""Score a model along the denoising path, as a command line asks for it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..evaluation.tofu import TOFU_METRICS, longest_answer
from ..files import UserError
from ..inference.config import DiffusionGenerationConfig
from ..report.path_plots import plot_along_path
from ..token_roles.along_path import check_metrics, score_along_path
from ..token_roles.path_results import ALONG_PATH, PathRun, PathScores
from .checks import check_least
from .options import settings

logger = logging.get_logger(__name__)

PATH_ROWS = "path_rows.jsonl"  # finished rows, so that a killed run goes on


def check_along_path(args: Any) -> PathScores | None:
    """Refuse what cannot be scored along the path. Returns what was measured beside `--baseline`, if anything was."""
    if args.along_path is None:
        return None
    check_least(args, along_path=1)
    check_metrics(args.metrics or ())
    if args.baseline is None:
        return None
    path, own = Path(args.baseline).with_name(ALONG_PATH), Path(args.output_dir) / ALONG_PATH
    if not path.is_file() or path.resolve() == own.resolve():
        return None
    earlier = PathScores.load(path)
    if earlier.num_steps != args.along_path:
        raise UserError(f"{path} has {earlier.num_steps} moments: pass --along_path {earlier.num_steps}, too.")
    return earlier


def score_path(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, sets: Mapping[str, Dataset], args: Any, name: str
) -> PathRun:
    """Score a model along the path; answers are decoded as `evaluate_tofu` decodes them. Every process calls this."""
    config = DiffusionGenerationConfig(
        max_new_tokens=args.max_new_tokens or longest_answer(sets, tokenizer),
        steps=args.decoding_steps,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    return score_along_path(
        model,
        tokenizer,
        sets,
        config,
        decoding=args.decoding,
        metrics=TOFU_METRICS if args.metrics is None else args.metrics,
        num_steps=args.along_path,
        name=name,
        progress_path=Path(args.output_dir) / PATH_ROWS,
        show_progress=True,
        protocol=args.protocol,
    )


def save_path(run: PathRun, args: Any, dataset: str, earlier: PathScores | None) -> tuple[PathScores, Path]:
    """Save a run as a record and as pictures, beside the models of an earlier record of the same rows.

    Returns:
        The record, and the path of its picture.
    """
    found = [] if earlier is None else earlier.runs
    others = [one for one in found if earlier is not None and (earlier.dataset, one.rows) == (dataset, run.rows)]
    if len(others) < len(found):
        logger.warning("The models along the path beside --baseline were scored on other rows: they are left out.")
    others = [replace(one, name=f"{one.name} (baseline)") if one.name == run.name else one for one in others]
    scores = PathScores(dataset, args.along_path, settings(args), [*others, run])
    path = Path(args.output_dir) / ALONG_PATH
    scores.save(path)
    for suffix in (".svg", ".png"):
        plot_along_path(scores, path.with_suffix(suffix))
    return scores, path.with_suffix(".png")
