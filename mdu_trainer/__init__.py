"""Machine unlearning of masked diffusion language models, as a Hugging Face Trainer extension."""

from importlib import import_module
from typing import Any

from . import models  # registers LLaDA and Dream with transformers' Auto classes

__version__ = "0.1.0"

_ROOMS = {
    "MDLMConfig": "config",
    "MDUConfig": "config",
    "MDLMTrainer": "mdlm",
    "MDUTrainer": "trainer",
    "CheckpointError": "checkpoints",
    "FolderInUseError": "run_lock",
    "NonFiniteLossError": "safety",
    "TrainingInterrupted": "safety",
    "DataCollatorForUnlearning": "data",
    "question_answer_rows": "data",
    "corrupt": "masking",
    "anchor_kl": "divergence",
    "Backbone": "models",
    "load_model": "models",
    "load_tokenizer": "models",
    "resolve_backbone": "models",
    "DiffusionGenerationConfig": "generation",
    "generate": "generation",
    "response_likelihood": "likelihood",
    "Results": "evaluation.report",
    "UnlearningEvalCallback": "evaluation.callback",
    "RoleReport": "analysis.role_report",
    "TokenRoleCallback": "analysis.callback",
    "label_roles": "analysis.token_roles",
    "ATTACKS": "attacks",
    "AttackSettings": "attacks",
    "Recovery": "attacks.recovery",
    "run_attacks": "attacks.recovery",
    "write_model_card": "model_card",
    "write_page": "page",
    "LeakError": "hub",
    "PushError": "hub",
    "push_unlearned_model": "hub",
    "evaluate_rwku": "evaluation.rwku",
    "evaluate_tofu": "evaluation.tofu",
    "load_rwku": "evaluation.rwku",
    "load_tofu": "evaluation.tofu",
}

__all__ = [*_ROOMS, "models", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_ROOMS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
