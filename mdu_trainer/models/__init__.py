"""Backbones: native LLaDA and Dream, and the facts of every masked diffusion model.

Importing this package registers the native classes with transformers, so that `AutoConfig`, `AutoModel`,
`AutoModelForMaskedLM` and `AutoModelForCausalLM` load the published checkpoints without remote code.
"""

from .backbone import Backbone, resolve_backbone
from .checks import weights_fingerprint
from .dream import DreamConfig, DreamModel, DreamTokenizer
from .head import hidden_at, logits_at, measure_at, scan_logits_at
from .llada import LLaDAConfig, LLaDAModelLM, LLaDATokenizer
from .llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM
from .loading import base_of, is_adapter, load_checkpoint, load_model, load_tokenizer
from .positions import position_ids
from .probe import evaluation_mode

__all__ = [
    "Backbone",
    "DreamConfig",
    "DreamModel",
    "DreamTokenizer",
    "LLaDAConfig",
    "LLaDAMoEConfig",
    "LLaDAMoEModelLM",
    "LLaDAModelLM",
    "LLaDATokenizer",
    "base_of",
    "evaluation_mode",
    "is_adapter",
    "load_checkpoint",
    "load_model",
    "load_tokenizer",
    "position_ids",
    "resolve_backbone",
    "measure_at",
    "logits_at",
    "hidden_at",
    "scan_logits_at",
    "weights_fingerprint",
]
