"""`python -m mdu_trainer.models NAME`: what a checkpoint is, and whether it is supported.

Reads config and tokenizer files only, no weights. Exits with 1 if the checkpoint is not supported.
"""

import dataclasses
import sys

from ..commands import ArgumentParser, run
from .backbone import backbone_name, resolve_backbone
from .loading import adapter_config, base_of, is_adapter, load_config, load_tokenizer


def main(arguments: list[str] | None = None) -> int:
    """Print the `Backbone` of a checkpoint, or why it is not supported."""
    parser = ArgumentParser(__doc__.partition("\n")[0])
    parser.add_argument("name_or_path", help="a Hub id, or a directory of a model or an adapter")
    parser.add_argument("--trust_remote_code", action="store_true", help="run config and tokenizer code it ships")
    parser.add_argument("--model_revision", default="main", help="branch, tag or commit on the Hub")
    options = parser.parse_args(arguments)
    where = {"trust_remote_code": options.trust_remote_code, "revision": options.model_revision}
    print(options.name_or_path)
    try:
        name, adapter = base_of(options.name_or_path), None
        if is_adapter(options.name_or_path):
            adapter = adapter_config(options.name_or_path).peft_type.value
        config = load_config(name, **where)
        backbone_name(config)  # what it is refused for comes before what its tokenizer may lack
        backbone = resolve_backbone(config, load_tokenizer(name, **where))
    except (OSError, ValueError, ImportError) as error:
        print(f"  {'supported':<20} no: {' '.join(str(error).split())}")
        return 1
    print(f"  {'supported':<20} yes")
    if adapter is not None:
        print(f"  {'adapter':<20} {adapter}, on {name}")
    for field in dataclasses.fields(backbone):
        print(f"  {field.name:<20} {getattr(backbone, field.name)}")
    print(f"  {'attention':<20} {'full' if backbone.block_size is None else 'block or full'}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
