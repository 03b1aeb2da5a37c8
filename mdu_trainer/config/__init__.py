"""Configuration of the trainers: TrainingArguments plus what the diffusion and the unlearning need."""

from .diffusion import DiffusionConfig as DiffusionConfig
from .diffusion import MDLMConfig as MDLMConfig
from .unlearning import MDUConfig as MDUConfig
