"""Dream-7B, Dream-Coder and DiffuCoder (Ye et al., 2025, arXiv 2508.15487) on transformers' Qwen2.

The published model is a Qwen2 that attends in both directions, under Qwen2's own tensor names. It was adapted from a
causal model and still predicts token i at position i - 1.
"""

from typing import Any, ClassVar, NoReturn

from huggingface_hub.dataclasses import strict
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from .published import PublishedConfigMixin, PublishedTokenizerMixin, refuse_generate, refuse_values

MASK_TOKEN = "<|mask|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REQUIRED = {
    "is_causal": (False,),
    "use_mrope": (False, None),
    "hidden_act": ("silu",),
    "use_sliding_window": (False, None),
}


@strict
class DreamConfig(PublishedConfigMixin, Qwen2Config):
    """A Dream config.json: Qwen2's keys and a mask token.

    Raises:
        ValueError: a value asks for another architecture (a sliding window, multimodal rotary embeddings, ...).
    """

    model_type = "Dream"
    is_causal: ClassVar[bool] = False
    not_published = ("is_causal", "layer_types")

    vocab_size: int = 152064
    use_cache: bool = False
    mask_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        chosen = {"hidden_act": self.hidden_act, "use_sliding_window": self.use_sliding_window}
        refuse_values("Dream", REQUIRED, kwargs | chosen)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The config under the published keys."""
        return {"rope_scaling": None} | super().to_dict()


class DreamModel(Qwen2ForCausalLM):
    """Dream-v0 Base and Instruct, Dream-Coder and DiffuCoder, and whatever was trained from them.

    `forward(input_ids, attention_mask)` gives logits `[B, L, V]` as the published model does: token i is predicted at
    position i - 1, which `Backbone.logit_shift` tells the rest of the package.
    """

    config_class = DreamConfig
    config: DreamConfig

    def __init__(self, config: DreamConfig) -> None:
        super().__init__(config)
        # Padding shares its token with the end of a response, whose row is trained like any other
        self.model.embed_tokens.padding_idx = None

    def generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: this model does not write from left to right."""
        refuse_generate(self)


class DreamTokenizer(PublishedTokenizerMixin, Qwen2Tokenizer):
    """The published tokenizer without its remote code, which is Qwen2's over the same vocabulary and merges.

    Saves `vocab.json` and `merges.txt` beside `tokenizer.json`, for the published class reads only those.
    """

    published_class = "DreamTokenizer"

    def _save_pretrained(
        self,
        save_directory: str,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        file_names = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        written = self.backend_tokenizer.model.save(str(save_directory), filename_prefix)
        return (*file_names, *written)


AutoConfig.register("Dream", DreamConfig)
for auto_class in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
    auto_class.register(DreamConfig, DreamModel)
AutoTokenizer.register(DreamConfig, tokenizer_class=DreamTokenizer)
