"""Publish an unlearned model: an explicit list of files, checks that nothing leaks, a card, one commit.

    push_unlearned_model("outputs/demo/mdu-tau0", "ORG/NAME", results="outputs/demo/results.json")

What is uploaded is safetensors weights, config, generation config, tokenizer, adapter files, the card with its
picture, and `results.json` and `recovery.json` with scores only; those on a public data set stand once more in
`.eval_results`, where the Hub reads them. Whatever else lies in the folder stays there: training arguments (which can
hold a token), optimizer, scheduler and random state, logs, data, predictions, caches.

Before anything is sent, the weights are checked to be whole and finite, and every text and name is scanned for
sentences of the rows to forget, by the hashes that `MDUTrainer` keeps beside the weights; the tokenizer's vocabulary
for words that only those rows hold, other than entries of a base on the Hub. `auto_map` is dropped from the config:
the code that it names is not copied, and `mdu_trainer` loads LLaDA and Dream without it. Weights of an earlier push
under other names are deleted in the same commit, for they would be loaded instead; so are its evaluation results.
"""

import functools
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .. import __version__
from ..files import UserError
from ..inference.config import DiffusionGenerationConfig, has_decoding
from ..models import load_model, load_tokenizer
from ..provenance.facts import FACTS_FILE, Facts
from ..report.eval_results import EVAL_RESULTS
from ..report.model_card import CARD, PICTURE, CardDetails
from ..report.records import RECOVERY, RESULTS, Checkpoint, RecoveryLike, ResultsLike
from ..trainer.run_lock import LOCK
from .files import (
    ADAPTER_CONFIG,
    Source,
    card_files,
    content_of,
    model_files,
    read_object,
    regular_files,
    tokenizer_files,
)
from .leak_scan import LeakError, check_files
from .weight_check import check_weights

__all__ = ["LeakError", "Push", "PushError", "prepare_push", "push_unlearned_model"]

logger = logging.get_logger(__name__)

SHARD_SIZE = "5GB"
# What another push may have left in a repository, and what would be loaded instead of, or on top of, this one's
WEIGHT_FILES = re.compile(
    r"(model|pytorch_model|adapter_model)[^/]*\.(safetensors|bin)(\.index\.json)?|adapter_config.json"
)
OF_CARD = (CARD, PICTURE, RESULTS, RECOVERY, EVAL_RESULTS)  # what copies of a model go without

ADVICE: dict[int | None, str] = {
    401: "The token is missing, wrong or expired: log in with `hf auth login`, or pass token.",
    403: "The token may not write there: use one with write access, or open a pull request (create_pr=True).",
    404: "There is no such repository or revision, or the token may not see it.",
    409: "Something else changed the repository at the same moment, or the name is taken: try again.",
    412: "Something else changed the repository at the same moment: try again.",
    429: "Too many requests: try again later.",
}


class PushError(UserError, RuntimeError):
    """The Hub could not be reached, or refused. The local folder and earlier revisions are as they were."""


class Destination(NamedTuple):
    """The place that a push goes to.

    Attributes:
        repo_id, private, revision, create_pr, token: as in `push_unlearned_model`.
        commit_message: of the commit.
        copy_to: folder of the repository that gets the model's files, too, in a second commit.
    """

    repo_id: str
    private: bool = True
    revision: str | None = None
    create_pr: bool = False
    token: str | None = None
    commit_message: str = "Upload unlearned model"
    copy_to: str | None = None


@dataclass(frozen=True)
class Push:
    """A push that passed its checks; call it to send it.

    Attributes:
        destination: where to.
        folder: where the files are from.
        files: path in the repository -> file or content.
        left: files of the folder that stay where they are.
        scan: what was scanned for rows to forget, in one sentence.
    """

    destination: Destination
    folder: Path
    files: dict[str, Source] = field(repr=False)
    left: list[str]
    scan: str

    def summary(self) -> str:
        """Return the list of files with sizes, of those that stay, and the card."""
        sizes = {name: len(s) if isinstance(s, bytes) else s.stat().st_size for name, s in self.files.items()}
        width = max(map(len, sizes))
        lines = [f"{name:<{width}}  {size:>15,} bytes" for name, size in sizes.items()]
        visibility = "private" if self.destination.private else "public"
        card = content_of(self.files[CARD]).decode()
        return "\n".join(
            [f"To {self.destination.repo_id} ({visibility}), {sum(sizes.values()):,} bytes:", *lines]
            + ["", f"Not uploaded: {', '.join(self.left) or 'nothing'}", self.scan, "", card]
        )

    def __call__(self) -> CommitInfo:
        """Create the repository if there is none, and send everything in one commit.

        Raises:
            ValueError: the repository is public, and was to be private.
            PushError: the Hub could not be reached, or refused.
        """
        destination, api = self.destination, hub_api()
        with _explained(destination.repo_id, self.folder):
            repo_id = api.create_repo(
                destination.repo_id, token=destination.token, private=destination.private, exist_ok=True
            ).repo_id
            is_private = api.model_info(repo_id, token=destination.token).private
        if destination.private and not is_private:
            raise UserError(
                f"{repo_id} exists and is public, and the push is private. Nothing was sent. Pass private=False to "
                "publish there, make the repository private, or choose another name."
            )
        with _explained(repo_id, self.folder):
            if destination.revision and not destination.revision.startswith("refs/"):
                api.create_branch(repo_id, branch=destination.revision, token=destination.token, exist_ok=True)
            info = self._commit(repo_id, self.files)
            if destination.copy_to:
                model_files = {n: s for n, s in self.files.items() if n not in OF_CARD}
                self._commit(repo_id, {f"{destination.copy_to}/{name}": s for name, s in model_files.items()})
        return info

    def _commit(self, repo_id: str, files: dict[str, Source]) -> CommitInfo:
        destination, api = self.destination, hub_api()
        there = api.list_repo_files(repo_id, revision=destination.revision, token=destination.token)
        stale = [n for n in there if (WEIGHT_FILES.fullmatch(n) or n == EVAL_RESULTS) and n not in self.files]
        operations = [CommitOperationAdd(name, s if isinstance(s, bytes) else str(s)) for name, s in files.items()]
        return api.create_commit(
            repo_id,
            [*operations, *map(CommitOperationDelete, stale)],
            commit_message=destination.commit_message,
            revision=destination.revision,
            create_pr=destination.create_pr,
            token=destination.token,
        )


def push_unlearned_model(
    model_or_path: str | Path | PreTrainedModel | PeftModel,
    repo_id: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    results: ResultsLike = None,
    recovery: RecoveryLike = None,
    adapter: Literal["keep", "merge"] = "keep",
    private: bool = True,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    dry_run: bool = False,
    leak_scan: bool = True,
    **details: Any,
) -> CommitInfo | None:
    """Publish an unlearned model, with a card that holds its measured scores, in one commit.

    Args:
        model_or_path: a checkpoint of `MDUTrainer`, or a model loaded from one. (A `PeftModel` does not know the
            folder of its adapter: pass the folder.)
        repo_id: "ORG/NAME", created if it does not exist.
        tokenizer: in place of the checkpoint's.
        results, recovery: the comparison that holds the model's scores, the attacks on it, or their files; by default
            `results.json` and `recovery.json` in the checkpoint, False for none.
        adapter: for a checkpoint that holds an adapter: publish that, or the base with the adapter merged into it.
        private: whether the repository is private. A public one is not written to unless this is False.
        revision: branch to push to, created if it does not exist.
        create_pr: open a pull request instead of committing.
        token: by default the one that `hf auth login` stored.
        dry_run: print the files with sizes and the card, and send nothing.
        leak_scan: False publishes without looking for rows to forget, also where the hashes are missing or damaged.
            The log says so.
        **details: of the card, the fields of `mdu_trainer.report.model_card.CardDetails`: `base_model`, the Hub id of
            the model at the start if the checkpoint does not know it, `description`, `license`, `tags`, ...

    Returns:
        What was committed, None for a dry run.

    Raises:
        LeakError: a file quotes a row to forget. Nothing was sent.
        PushError: the Hub could not be reached or refused. The folder and earlier revisions are as they were.
        ValueError: weights that are not whole or not finite, hashes that are not those which the trainer wrote, a file
            that is a link, an adapter on a base that nobody else has, results of another model, or a public repository
            where a private one was asked for. Nothing was sent.
        FileNotFoundError: weights, or the facts of `MDUTrainer`, are missing.
        TypeError: for a keyword that is no detail of a card.
    """
    _check_arguments(repo_id, adapter, revision, create_pr)
    said, destination = CardDetails.of(**details), Destination(repo_id, private, revision, create_pr, token)
    with tempfile.TemporaryDirectory() as stage:  # for `save_pretrained`, which knows no other place
        source, folder = _folders(model_or_path, adapter, Path(stage) / "model")
        checkpoint = read_checkpoint(source, results, recovery, leak_scan)
        push = prepare_push(checkpoint, destination, said, folder=folder, tokenizer=tokenizer)
        if dry_run:
            print(push.summary())
            return None
        return push()


def read_checkpoint(
    folder: str | Path, results: ResultsLike = None, recovery: RecoveryLike = None, leak_scan: bool = True
) -> Checkpoint:
    """Read what is on record of a model that is to be pushed. The arguments are those of `push_unlearned_model`."""
    regular_files(Path(folder), *(n for n, given in ((RESULTS, results), (RECOVERY, recovery)) if given is None))
    return Checkpoint.read(folder, results, recovery, scan=leak_scan)


def prepare_push(
    checkpoint: Checkpoint,
    destination: Destination,
    details: CardDetails | None = None,
    *,
    folder: Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Push:
    """Collect, render and check everything that a push sends; nothing is sent before the `Push` is called.

    Args:
        checkpoint: what is on record of the model.
        destination: where the files go.
        details: what else the card says; where the model is comes from the destination.
        folder: with the files of the model, where that is not the checkpoint's.
        tokenizer: in place of the folder's.

    What is raised is that of `push_unlearned_model`.
    """
    folder = folder or checkpoint.folder
    repo_id, revision, token = destination.repo_id, destination.revision, destination.token
    details = replace(details or CardDetails(), repo_id=repo_id, revision=revision, token=token)
    base = details.base_model or checkpoint.facts.base_model
    files = model_files(folder, checkpoint.facts, base, tokenizer)
    check_weights(folder, files)  # before the card, which may ask the Hub for that of the base
    files |= card_files(checkpoint, details, folder, tokenizer, lambda dataset: _is_public(dataset, token))
    _ask_for_license(files[CARD])
    names = {name: getattr(destination, name) for name in ("repo_id", "revision", "commit_message", "copy_to")}
    check_files(files, checkpoint, names, lambda: _published_vocabulary(base, checkpoint.facts, destination))
    left = sorted(path.name for path in folder.iterdir() if path.name not in {LOCK, *(n.split("/")[0] for n in files)})
    return Push(destination, checkpoint.folder, files, left, _scan_words(checkpoint))


def _scan_words(checkpoint: Checkpoint) -> str:
    """Say what was scanned, also in the log where it is less than everything."""
    hashes = checkpoint.hashes
    if hashes is None:
        words = "Scanned for rows to forget: no (leak_scan=False). Nothing has looked whether these files quote them."
    elif hashes.too_short:
        words = (
            f"Scanned for rows to forget: yes, but for {hashes.too_short} texts that are too short to be told from "
            "ordinary language, their questions included."
        )
    else:
        return "Scanned for rows to forget: yes"
    logger.warning(f"{checkpoint.folder}: {words}")
    return words


def _published_vocabulary(base: str | None, facts: Facts, destination: Destination) -> set[str]:
    """Return the entries of the base's tokenizer, if whoever will see the model can see the base."""
    if base is None:
        return set()
    try:
        if not destination.private and hub_api().model_info(base, token=destination.token).private:
            return set()
        revision = facts.revision_of(base) or "main"
        return set(load_tokenizer(base, revision=revision, token=destination.token).get_vocab())
    except (OSError, ValueError, KeyError, ImportError) as error:
        logger.warning(f"The tokenizer of {base} cannot be read to compare vocabularies ({type(error).__name__}).")
        return set()


def _ask_for_license(card: Source) -> None:
    data = ModelCard(content_of(card).decode(), ignore_metadata_errors=True).data
    missing = [name for name in ("license", "language") if data.get(name) is None]
    if missing:
        logger.warning_once(
            f"The card names no {' and no '.join(missing)}, and neither does that of the base: pass "
            f"{' and '.join(missing)}."
        )


def _is_public(dataset: str, token: str | None) -> bool:
    """Whether anybody can see a data set on the Hub; not if that cannot be asked."""
    try:
        return not hub_api().dataset_info(dataset, token=token).private
    except (OSError, ValueError) as error:
        logger.warning(
            f"{dataset} cannot be seen on the Hub ({type(error).__name__}): {EVAL_RESULTS} is left out, and the "
            "scores stand in the card alone."
        )
        return False


@functools.cache
def hub_api() -> HfApi:
    """Return the client of the Hub; the Hub sees this package's name and version."""
    return HfApi(library_name="mdu_trainer", library_version=__version__)


def _checkpoint_folder(model_or_path: str | Path | PreTrainedModel | PeftModel) -> Path:
    """Return the folder with the facts and hashes of a model, or say with a FileNotFoundError why there is none."""
    if isinstance(model_or_path, str | Path):
        folder = Path(model_or_path)
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder}. Pass the checkpoint of a MDUTrainer.")
    else:
        folder = Path(getattr(model_or_path.config, "_name_or_path", "") or "")
        if isinstance(model_or_path, PeftModel) or not (folder / FACTS_FILE).is_file():
            raise FileNotFoundError(
                f"The {type(model_or_path).__name__} does not say which checkpoint of MDUTrainer it is from, without "
                "which it cannot be scanned for rows to forget. Pass the checkpoint's folder, or call "
                "trainer.push_to_hub()."
            )
    if not (folder / FACTS_FILE).is_file():
        Facts.load(folder)  # says what is missing
    return folder


def _check_arguments(repo_id: str, adapter: str, revision: str | None, create_pr: bool) -> None:
    if adapter not in ("keep", "merge"):
        raise UserError(f"adapter must be 'keep' or 'merge', got {adapter!r}.")
    if repo_id.count("/") != 1:
        raise UserError(f"repo_id must be 'ORG/NAME', got {repo_id!r}.")
    if create_pr and revision not in (None, "main"):
        raise UserError(f"A pull request goes to main: leave out revision={revision!r}, or create_pr.")


def _folders(model_or_path: str | Path | PreTrainedModel | PeftModel, adapter: str, stage: Path) -> tuple[Path, Path]:
    """Return the checkpoint's folder, and the one with the files to send: a model in memory is saved to `stage`."""
    source = _checkpoint_folder(model_or_path)
    if not isinstance(model_or_path, str | Path):
        model = model_or_path
    elif adapter == "merge" and (source / ADAPTER_CONFIG).is_file():
        model = _merged(source)
    else:
        return source, source
    model.save_pretrained(str(stage), max_shard_size=SHARD_SIZE)
    if has_decoding(source):  # an adapter's, which the base does not know
        DiffusionGenerationConfig.from_pretrained(source).save_pretrained(stage)
    for name, file in tokenizer_files(source).items():
        (stage / name).parent.mkdir(exist_ok=True)
        (stage / name).write_bytes(content_of(file))
    return source, stage


def _merged(folder: Path) -> PreTrainedModel:
    """Load the base of an adapter, and merge the adapter into it."""
    facts = Facts.load(folder)
    base = load_model(
        read_object(folder / ADAPTER_CONFIG)["base_model_name_or_path"],
        dtype=facts.training["weights"],
        revision=facts.base_revision or "main",
    )
    return PeftModel.from_pretrained(base, folder).merge_and_unload()


@contextmanager
def _explained(repo_id: str, folder: Path) -> Iterator[None]:
    """Turn whatever goes wrong on the way to the Hub into a `PushError` that says how to go on."""
    try:
        yield
    except Exception as error:
        response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
        status = getattr(response, "status_code", None)
        where = "could not be reached or understood" if status is None else f"answered {status}"
        advice = ADVICE.get(status, "Try again: the client has tried several times already.")
        raise PushError(
            f"The push to {repo_id} failed: the Hub {where} ({type(error).__name__}). {advice} The commit was not "
            f"made: {folder} and earlier revisions are as they were. The same call goes on where it stopped, for "
            "files that have arrived are not sent again."
        ) from error
