"""What a training shows: one bar, and a line for each log."""

from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import has_length

from ..terminal import Bar, columns, say

NAMES = {  # log -> its name in a line, the first ones first; others follow under their own
    "loss": "loss",
    "forget_loss": "forget",
    "retain_loss": "retain",
    "learning_rate": "lr",
    "grad_norm": "gradient",
    "entropy": "entropy",
    "masked_fraction": "masked",
}
NOT_SHOWN = ("total_flos", "_runtime", "_per_second")  # ends of names
EVAL = "eval_"


class TrainingProgress(ProgressCallback):
    """One bar for a training, with what it does, and one aligned line for each log.

    Without a terminal, or with `disable_tqdm`, there are plain lines only. While an evaluation runs amid a training,
    the bar says so instead of making room for a second one.

    Args:
        doing: what the trainer does, e.g. "unlearning"; the name of the output folder follows it.
    """

    def __init__(self, doing: str = "training"):
        super().__init__()
        self.doing, self.current_step = doing, 0
        self.training_bar: Bar | None = None
        self.prediction_bar: Bar | None = None
        self._mean_loss: float | None = None
        self._name = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar, at the step that a resumed run goes on from."""
        self.close()
        self.current_step, self._mean_loss = state.global_step, None
        self._name = f"{self.doing} {Path(args.output_dir).name}"
        if state.is_world_process_zero:
            self.training_bar = Bar(
                self._name, total=state.max_steps, initial=state.global_step, unit="step", plain=args.disable_tqdm
            )

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Count a batch of an evaluation, or say that there is one amid the training."""
        if not (state.is_world_process_zero and has_length(eval_dataloader)):
            return
        if self.training_bar is not None:
            self._describe(f"{self._name}, evaluating")
            return
        if self.prediction_bar is None:
            name, total = f"evaluating {Path(args.output_dir).name}", len(eval_dataloader)
            self.prediction_bar = Bar(name, total=total, unit="batch", plain=args.disable_tqdm)
        self.prediction_bar.update(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the evaluation's bar."""
        if self.training_bar is not None:
            self._describe(self._name)
        if self.prediction_bar is not None:
            self.prediction_bar.finish()
            self.prediction_bar = None

    on_predict = on_evaluate

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show a line; the last log of a training is part of its end."""
        self._mean_loss = (logs or {}).get("train_loss", self._mean_loss)
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            line = log_line(logs, state.global_step, state.max_steps, columns())
            if line:
                say(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar, and leave a line with the time and the mean loss."""
        if self.training_bar is not None:
            self.training_bar.finish("" if self._mean_loss is None else f", mean loss {self._mean_loss:.4g}")
            self.training_bar = None

    def close(self) -> None:
        """Close what is open, without a word."""
        for bar in (self.training_bar, self.prediction_bar):
            if bar is not None:
                bar.close()
        self.training_bar = self.prediction_bar = None

    def _describe(self, words: str) -> None:
        if self.training_bar is not None and self.training_bar.desc != words:
            self.training_bar.set_description_str(words)


def replace_default(callbacks: list[TrainerCallback], progress: TrainingProgress) -> None:
    """Put our callback in the place of the one that the Trainer has added by itself; those of a user stay."""
    for place in reversed(range(len(callbacks))):
        if type(callbacks[place]) in (ProgressCallback, PrinterCallback):  # a notebook has another one, which stays
            callbacks[place] = progress
            return


def log_line(logs: dict[str, Any], step: int, max_steps: int, room: int | None = None) -> str:
    """One aligned line with the numbers of a log; empty if it has none.

    Args:
        logs: name -> value, as trackers get them.
        step, max_steps: the step that it is of; of how many, 0 outside of a training.
        room: how many characters fit; what does not is left out. None: all of it is shown.
    """
    numbers = {name: value for name, value in logs.items() if isinstance(value, int | float)}
    numbers = {name: value for name, value in numbers.items() if not name.endswith(NOT_SHOWN)}
    epoch = numbers.pop("epoch", None)
    if not numbers:
        return ""
    ordered = [name for name in NAMES if name in numbers] + [name for name in numbers if name not in NAMES]
    is_eval = all(name.startswith(EVAL) for name in ordered)
    if is_eval:  # the losses first, and of them those of a whole set
        ordered.sort(key=lambda name: (0, len(name)) if name.endswith("_loss") else (1, 0))
    line = f"step {step:>{len(str(max_steps))}}/{max_steps}" if max_steps else f"step {step}"
    line += "  eval" if is_eval else ""
    columns = [f"{NAMES.get(name, name.removeprefix(EVAL))} {_number(numbers[name]):>8}" for name in ordered]
    columns += [] if epoch is None else [f"epoch {epoch:.2f}"]
    for column in columns:
        if room is not None and len(line) + 2 + len(column) > room:
            return f"{line[: room - 4]} ..." if is_eval and column is not columns[-1] else line
        line += f"  {column}"
    return line


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 1000 or value != value else f"{value:.2e}"
