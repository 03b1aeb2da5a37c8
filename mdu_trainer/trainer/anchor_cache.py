"""Anchors computed before training: what the head is given at every masked token of every step, in a mapped file.

Masks are a function of (seed, visit, row, position), so every anchor that a run is going to read is known beforehand.
Once they are on disk nobody needs theta_0's transformer any more, and full fine-tuning takes one model in memory (and
theta_0's head, where the head is trained).

The file is derived from forget data: it stays in the output folder and is never published.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from torch import Tensor
from transformers.utils import logging

from ..divergence import Prediction, Projection
from ..files import UserError, write_whole
from ..terminal import Bar

logger = logging.get_logger(__name__)

FOLDER = "anchor_cache"


class AnchorBatch(NamedTuple):
    """Rows whose anchor is to be computed."""

    keys: list[tuple[int, int]]  # (visit, row) of each
    num_masked: list[int]
    predict: Callable[[], Prediction]  # of the masked tokens, row after row


class AnchorCache(Mapping[tuple[int, int], Tensor]):
    """The head's input at the masked tokens of each (visit, row), read from a file that is mapped into memory.

    Args:
        folder: where the file lies, or is going to.
        fingerprint: of everything that the anchors depend on. A file with another one is not read.
        batches: what a run reads, in order. Iterated once to lay out the file, and once more to fill it if it is not
            there; every process goes through all of them and computes its share.
    Raises:
        OSError: the disk has no room for the file.
        ValueError: the head cannot be fused, and logits would not fit on a disk.
    """

    def __init__(self, folder: Path, fingerprint: str, batches: Callable[[], Iterable[AnchorBatch]]):
        self.folder = Path(folder)
        self._start: dict[tuple[int, int], tuple[int, int]] = {}
        self._num_batches = self._tokens = 0
        for batch in batches():
            self._num_batches += 1
            for key, count in zip(batch.keys, batch.num_masked, strict=True):
                self._start[key] = (self._tokens, self._tokens + count)
                self._tokens += count
        fingerprint = fingerprint_of(fingerprint, list(self._start.items()))  # the order and lengths lay out the file
        state = PartialState()
        header, stale = self._header(fingerprint)
        if header is None:
            if stale and state.is_main_process:
                logger.warning(f"The anchors in {self.folder} are computed anew: {stale}.")
            state.wait_for_everyone()  # nobody may look for the old header any more
            self._build(fingerprint, batches())
            state.wait_for_everyone()
            header, _ = self._header(fingerprint)
        else:
            logger.info(f"Using the {len(self)} anchors in {self.folder}.")
        self._hidden = self._map(header)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        """The head's input at the masked tokens of (visit, row): `[n, H]`."""
        return self._hidden[slice(*self._start[key])]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._start)

    def __len__(self) -> int:
        return len(self._start)

    @property
    def _paths(self) -> tuple[Path, Path]:
        return self.folder / "hidden.bin", self.folder / "header.json"

    def _header(self, fingerprint: str) -> tuple[dict | None, str]:
        """The header of a complete file with this fingerprint, or None and what is wrong with the file there."""
        data, header_path = self._paths
        if not header_path.is_file():
            return None, "an earlier computation was cut short" if data.exists() else ""
        try:
            header = json.loads(header_path.read_text())
            size = self._tokens * header["width"] * getattr(torch, header["dtype"]).itemsize
        except (ValueError, KeyError, AttributeError):
            return None, "the header of the file cannot be read"
        if header.get("fingerprint") != fingerprint:
            return None, "they are of another model, data set or configuration"
        if not data.is_file() or data.stat().st_size != size:
            return None, "the file is not complete"
        return header, ""

    def _build(self, fingerprint: str, batches: Iterable[AnchorBatch]) -> None:
        state = PartialState()
        data, header_path = self._paths
        if state.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        state.wait_for_everyone()
        mine: Iterator[AnchorBatch] = islice(batches, state.process_index, None, state.num_processes)
        share = self._num_batches // state.num_processes
        progress = Bar("computing anchors", mine, total=share, unit="batch", show=state.is_main_process)
        hidden, header = None, {}
        for batch in progress:
            prediction = batch.predict()
            if not isinstance(prediction, Projection):
                raise UserError(
                    "precompute_anchor needs an LM head that is a plain linear layer; this model's is quantised, "
                    "adapted, or followed by something else. Set precompute_anchor=False."
                )
            new = prediction.hidden
            if hidden is None:
                header = {"fingerprint": fingerprint, "width": new.shape[1], "dtype": str(new.dtype).split(".")[1]}
                _reserve(data, self._tokens * new.shape[1] * new.dtype.itemsize)
                hidden = self._map(header)
            stop = 0
            for key, count in zip(batch.keys, batch.num_masked, strict=True):
                start, stop = stop, stop + count
                hidden[slice(*self._start[key])] = new[start:stop].to("cpu")
        del hidden
        state.wait_for_everyone()
        if state.is_main_process:
            with data.open("rb") as file:
                os.fsync(file.fileno())
            write_whole(header_path, json.dumps(header), private=True)

    def _map(self, header: dict) -> Tensor:
        width, dtype = header["width"], getattr(torch, header["dtype"])
        flat = torch.from_file(str(self._paths[0]), shared=True, size=self._tokens * width, dtype=dtype)
        return flat.view(self._tokens, width)


def fingerprint_of(*facts: object) -> str:
    """A hash of the facts' `repr`."""
    digest = hashlib.blake2b(digest_size=16)
    for fact in facts:
        digest.update(repr(fact).encode())
    return digest.hexdigest()


def _reserve(path: Path, size: int) -> None:
    """Take the room of a mapped file at once: a disk that is full later would kill the process without a word."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if hasattr(os, "posix_fallocate"):  # macOS has none
            os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno)}: the precomputed anchors take {size / 2**30:.2f} GiB in {path.parent}. Make "
            "room, or set precompute_anchor=False, which keeps a frozen copy of the model instead",
        ) from error
    finally:
        os.close(descriptor)
