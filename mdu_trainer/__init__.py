"""Machine unlearning of masked diffusion language models, as a Hugging Face Trainer extension."""

from importlib import import_module
from typing import Any

from . import models  # registers LLaDA and Dream with transformers' Auto classes

__version__ = "0.1.0"
__path__.append(f"{__path__[0]}/commands")  # so that users type `python -m mdu_trainer.leak_check`

_ROOMS = {
    "DiffusionConfig": "config",
    "MDLMConfig": "config",
    "MDUConfig": "config",
    "MDLMTrainer": "trainer.mdlm",
    "MDUTrainer": "trainer.mdu",
    "CheckpointError": "trainer.checkpoints",
    "FolderInUseError": "trainer.run_lock",
    "NonFiniteLossError": "trainer.guard",
    "TrainingInterrupted": "trainer.guard",
    "DataCollatorForUnlearning": "data.rows",
    "question_answer_rows": "data.rows",
    "corrupt": "masking",
    "anchor_kl": "divergence",
    "Objective": "objectives",
    "register_objective": "objectives",
    "Backbone": "models",
    "load_model": "models",
    "load_tokenizer": "models",
    "resolve_backbone": "models",
    "DiffusionGenerationConfig": "inference.generation",
    "generate": "inference.generation",
    "response_likelihood": "inference.likelihood",
    "Benchmark": "evaluation.registry",
    "Metric": "evaluation.registry",
    "register_benchmark": "evaluation.registry",
    "register_metric": "evaluation.registry",
    "Results": "evaluation.results",
    "UnlearningEvalCallback": "callbacks",
    "RoleReport": "token_roles.results",
    "TokenRoleCallback": "callbacks",
    "label_roles": "token_roles.labels",
    "ATTACKS": "attacks",
    "Attack": "attacks",
    "AttackSettings": "attacks",
    "register_attack": "attacks",
    "Recovery": "attacks.results",
    "run_attacks": "attacks.run",
    "write_model_card": "report.model_card",
    "write_page": "report.page",
    "LeakError": "hub.push",
    "PushError": "hub.push",
    "push_unlearned_model": "hub.push",
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
