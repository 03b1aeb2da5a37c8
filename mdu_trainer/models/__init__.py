"""Backbones: native LLaDA, LLaDA2, Dream, SDAR and Fast-dLLM, and the facts of every masked diffusion model.

Importing this package registers the native classes with transformers, so that `AutoConfig`, `AutoModel`,
`AutoModelForMaskedLM` and `AutoModelForCausalLM` load the published checkpoints without remote code.
"""

from .backbone import Backbone, resolve_backbone
from .block_attention import block_causal_mask, full_mask, noisy_clean_mask
from .checks import weights_fingerprint
from .dream import DreamConfig, DreamModel, DreamTokenizer
from .fast_dllm import Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM
from .head import ReadLogits, hidden_at, logits_at, measure_at, scan_logits_at
from .llada import LLaDAConfig, LLaDAModelLM, LLaDATokenizer
from .llada2 import LLaDA2MoeConfig, LLaDA2MoeModelLM
from .llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM
from .loading import base_of, is_adapter, load_checkpoint, load_model, load_tokenizer
from .positions import position_ids
from .probe import evaluation_mode
from .sdar import SDARConfig, SDARForCausalLM

__all__ = [
    "Backbone",
    "DreamConfig",
    "DreamModel",
    "DreamTokenizer",
    "Fast_dLLM_QwenConfig",
    "Fast_dLLM_QwenForCausalLM",
    "LLaDA2MoeConfig",
    "LLaDA2MoeModelLM",
    "LLaDAConfig",
    "LLaDAMoEConfig",
    "LLaDAMoEModelLM",
    "LLaDAModelLM",
    "LLaDATokenizer",
    "ReadLogits",
    "SDARConfig",
    "SDARForCausalLM",
    "base_of",
    "block_causal_mask",
    "evaluation_mode",
    "full_mask",
    "is_adapter",
    "load_checkpoint",
    "load_model",
    "load_tokenizer",
    "noisy_clean_mask",
    "position_ids",
    "resolve_backbone",
    "measure_at",
    "logits_at",
    "hidden_at",
    "scan_logits_at",
    "weights_fingerprint",
]
