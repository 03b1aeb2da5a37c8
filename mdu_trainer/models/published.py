"""What the native classes share: reading and writing configs as their authors published them."""

import json
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from torch import nn

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
        return config

    def to_diff_dict(self) -> dict[str, Any]:
        """What goes into config.json."""
        config = super().to_diff_dict()
        if "dtype" in config:
            config["torch_dtype"] = config.pop("dtype")
        return config


def refuse_generate(model: nn.Module) -> NoReturn:
    """`GenerationMixin.generate` would run and write nonsense."""
    raise NotImplementedError(
        f"{type(model).__name__} is a masked diffusion model: it fills in masked tokens and does not write from left "
        "to right. Decode with mdu_trainer.inference.generation."
    )


class PublishedTokenizerMixin:
    """Saves a tokenizer so that the code it was published for reads it, too.

    transformers 5 writes the name of its own base class, the chat template to a file of its own and extra special
    tokens under a new key, and leaves the added tokens to tokenizer.json. transformers 4 reads tokenizer_config.json.
    """

    published_class: ClassVar[str]

    def save_chat_templates(
        self,
        save_directory: str,
        tokenizer_config: dict[str, Any],
        filename_prefix: str | None,
        save_jinja_files: bool,
    ) -> tuple[dict[str, Any], list[str]]:
        return super().save_chat_templates(save_directory, tokenizer_config, filename_prefix, save_jinja_files=False)

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
        config["added_tokens_decoder"] = {
            str(index): {key: value for key, value in token.__getstate__().items()}
            for index, token in sorted(self.added_tokens_decoder.items())
        }
        path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        return super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
