"""Watch, while a model is trained, which tokens it forgets."""

import math

import numpy as np
from datasets import Dataset

from ..evaluation.callback import ScoringCallback
from ..mdlm import MDLMTrainer
from .role_analysis import check_rows, role_data
from .role_report import RoleSettings
from .token_roles import ROLES, Labeller
from .trajectories import FIGURES, by_row, measure_paths, true_paths


class TokenRoleCallback(ScoringCallback):
    """Logs what the prompt tells the model about the tokens to forget, role by role.

    Figures are means over rows along the ground-truth path (see `trajectories`): `eval_forget_kl_stored`,
    `eval_forget_kl_in_context`, `eval_forget_kl_structural`, and the same for `entropy` and `probability` of the true
    token. They go through `Trainer.log`, so to every tracker that the trainer reports to, and join the metrics of the
    trainer's evaluations. All models are asked about the same noisy inputs. Training is not disturbed: the weights end
    up as they would without. Every process computes the same figures.

    Args:
        trainer: the one that trains. Its model must be whole on every process (no FSDP, no ZeRO-3).
        forget: rows with columns `question` and `answer`; a few dozen are enough to watch.
        retain: rows to keep, measured as `eval_retain_...`; template words are found among their answers, too.
        every_steps: measure every so many updates. If None, after each evaluation of the trainer.
        settings: how the path is measured; four moments of one path a row unless given. The example row is not read.
        labeller: as in `label_roles`.

    Raises:
        ValueError: for rows that cannot be asked, a callback that would never be called, or a sharded model.

    Example:

        trainer.add_callback(TokenRoleCallback(trainer, forget, every_steps=20))
    """

    def __init__(
        self,
        trainer: MDLMTrainer,
        forget: Dataset,
        retain: Dataset | None = None,
        *,
        every_steps: int | None = None,
        settings: RoleSettings | None = None,
        labeller: Labeller | None = None,
    ):
        check_rows(forget, retain)
        super().__init__(trainer, every_steps)
        self.settings = settings or RoleSettings(num_steps=4, num_paths=1)
        tokenizer, backbone = trainer.processing_class, trainer.backbone
        sets = {"forget": (forget, retain)} | ({} if retain is None else {"retain": (retain, forget)})
        self.paths = {}
        for name, (rows, others) in sets.items():
            data = role_data(rows, tokenizer, backbone, others, labeller=labeller)
            self.paths[name] = true_paths(
                data.prompts,
                data.responses,
                data.roles,
                num_paths=self.settings.num_paths,
                seed=self.settings.seed,
            )

    def score(self) -> dict[str, float]:
        """Means over rows of each set, figure and role; a role that no row has is left out."""
        figures = {}
        for name, paths in self.paths.items():
            measured = measure_paths(
                self.trainer.model,
                paths,
                self.trainer.backbone,
                num_steps=self.settings.num_steps,
                batch_size=self.settings.batch_size,
            )
            for figure in (figure for figure in FIGURES if figure in measured):
                for role in ROLES:
                    rows = by_row(measured[figure], paths, role)
                    if np.isfinite(rows).any():
                        figures[f"eval_{name}_{figure}_{role}"] = math.fsum(rows[np.isfinite(rows)]) / int(
                            np.isfinite(rows).sum()
                        )
        return figures
