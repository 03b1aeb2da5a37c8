# The public names: `__init__.py` imports each when it is first used, type checkers and editors read them here.

from . import models as models
from .attacks import (
    ATTACKS as ATTACKS,
)
from .attacks import (
    Attack as Attack,
)
from .attacks import (
    AttackSettings as AttackSettings,
)
from .attacks import (
    register_attack as register_attack,
)
from .attacks.results import Recovery as Recovery
from .attacks.run import run_attacks as run_attacks
from .callbacks import TokenRoleCallback as TokenRoleCallback
from .callbacks import UnlearningEvalCallback as UnlearningEvalCallback
from .config import DiffusionConfig as DiffusionConfig
from .config import MDLMConfig as MDLMConfig
from .config import MDUConfig as MDUConfig
from .data.roles import label_roles as label_roles
from .data.rows import (
    DataCollatorForUnlearning as DataCollatorForUnlearning,
)
from .data.rows import (
    question_answer_rows as question_answer_rows,
)
from .divergence import anchor_kl as anchor_kl
from .evaluation.registry import (
    Benchmark as Benchmark,
)
from .evaluation.registry import (
    Metric as Metric,
)
from .evaluation.registry import (
    register_benchmark as register_benchmark,
)
from .evaluation.registry import (
    register_metric as register_metric,
)
from .evaluation.results import Results as Results
from .evaluation.rwku import evaluate_rwku as evaluate_rwku
from .evaluation.rwku import load_rwku as load_rwku
from .evaluation.tofu import evaluate_tofu as evaluate_tofu
from .evaluation.tofu import load_tofu as load_tofu
from .hub.push import LeakError as LeakError
from .hub.push import PushError as PushError
from .hub.push import push_unlearned_model as push_unlearned_model
from .inference.config import DiffusionGenerationConfig as DiffusionGenerationConfig
from .inference.generation import generate as generate
from .inference.likelihood import response_likelihood as response_likelihood
from .masking import corrupt as corrupt
from .models import (
    Backbone as Backbone,
)
from .models import (
    load_model as load_model,
)
from .models import (
    load_tokenizer as load_tokenizer,
)
from .models import (
    resolve_backbone as resolve_backbone,
)
from .objectives import Objective as Objective
from .objectives import register_objective as register_objective
from .report.model_card import write_model_card as write_model_card
from .report.page import write_page as write_page
from .token_roles.results import RoleReport as RoleReport
from .trainer.checkpoints import CheckpointError as CheckpointError
from .trainer.guard import NonFiniteLossError as NonFiniteLossError
from .trainer.guard import TrainingInterrupted as TrainingInterrupted
from .trainer.mdlm import MDLMTrainer as MDLMTrainer
from .trainer.mdu import MDUTrainer as MDUTrainer
from .trainer.run_lock import FolderInUseError as FolderInUseError

__version__: str
