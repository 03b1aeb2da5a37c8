"""The common part of the native classes: configs and tokenizers are read and written as they were published."""

import json
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig

from ..files import UserError


def refuse_values(family: str, required: dict[str, tuple], config: dict[str, Any]) -> None:
    """Raise a ValueError that names every key of `config` whose value is not among those of `required`."""
    wrong = [
        f"{key}={config[key]!r} (supported: {' or '.join(map(repr, values))})"
        for key, values in required.items()
        if key in config and config[key] not in values
    ]
    if wrong:
        raise UserError(
            f"This {family} config describes another architecture than the published one: {', '.join(wrong)}."
        )


class PublishedConfigMixin:
    """Writes config.json as code for transformers 4 reads it, which is what the checkpoints ship.

    `rope_parameters` becomes `rope_theta` (and `rope_scaling`, if the rotary embedding is scaled), `dtype` becomes
    `torch_dtype`, and attributes go by their published names. transformers 5 reads both forms.
    """

    not_published: ClassVar[tuple[str, ...]] = ("is_causal",)
    published_as_null: ClassVar[tuple[str, ...]] = ()  # keys that are written even if nothing sets them

    def to_dict(self) -> dict[str, Any]:
        """The config under the published keys."""
        config = super().to_dict()
        for published_name, name in self.attribute_map.items():
            if name in config:
                config[published_name] = config.pop(name)
        for name in self.not_published:
            config.pop(name, None)
        rope = dict(config.pop("rope_parameters", None) or {})
        config |= {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = rope
        return dict.fromkeys(self.published_as_null) | config

    def to_diff_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        config = super().to_diff_dict()
        if "dtype" in config:
            config["torch_dtype"] = config.pop("dtype")
        return config


class PublishedModelMixin:
    """A decoder whose embedding trains every token, and which does not write from left to right."""

    model: Any

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        # Padding shares its token with the end of a response, whose row is trained like any other
        self.model.embed_tokens.padding_idx = None

    def generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: `GenerationMixin.generate` would run and write nonsense."""
        raise NotImplementedError(
            f"{type(self).__name__} is a masked diffusion model: it fills in masked tokens and does not write from "
            "left to right. Decode with mdu_trainer.inference.generation."
        )


def register_model(config_class: type[PreTrainedConfig], model_class: type) -> None:
    """Let the auto classes build `model_class` from a `config_class`."""
    for auto_class in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
        # Not auto_class.register, which allows a model one config class: LLaDA2.1 may have a model_type of its own
        auto_class._model_mapping.register(config_class, model_class)


class PublishedTokenizerMixin:
    """Saves a tokenizer so that the code it was published for reads it, too.

    transformers 5 writes the name of its own base class, the chat template to a file of its own and extra special
    tokens under a new key, and leaves the added tokens to tokenizer.json. transformers 4 reads tokenizer_config.json.
    """

    published_class: ClassVar[str]
    published_vocabulary: ClassVar[bool] = False  # the published class reads vocab.json and merges.txt alone

    def save_chat_templates(
        self, save_directory: str, config: dict[str, Any], prefix: str | None, save_jinja_files: bool
    ) -> tuple[dict[str, Any], list[str]]:
        return super().save_chat_templates(save_directory, config, prefix, save_jinja_files=False)

    def _save_pretrained(
        self,
        save_directory: str,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        path = Path(file_names[0])
        config = json.loads(path.read_text(encoding="utf-8"))
        config["tokenizer_class"] = self.published_class
        for name in ("backend", "is_local", "local_files_only"):  # how it was loaded, not what it is
            config.pop(name, None)
        if "extra_special_tokens" in config:
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        added = sorted(self.added_tokens_decoder.items())
        config["added_tokens_decoder"] = {str(index): dict(token.__getstate__()) for index, token in added}
        path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        file_names = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        if self.published_vocabulary:
            file_names = (*file_names, *self.backend_tokenizer.model.save(str(save_directory), filename_prefix))
        return file_names
