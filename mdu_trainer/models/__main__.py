"""`python -m mdu_trainer.models NAME`: what a checkpoint is, and whether it is supported.

Reads config and tokenizer files only, no weights. Exits with 1 if the checkpoint is not supported.
"""

import dataclasses
import sys

from ..commands import ArgumentParser, run
from .backbone import backbone_name, resolve_backbone
from .loading import load_config, load_tokenizer


def main(arguments: list[str] | None = None) -> int:
    """Print the `Backbone` of a checkpoint, or why it is not supported."""
    parser = ArgumentParser(prog="python -m mdu_trainer.models", description=__doc__.partition("\n")[0])
    parser.add_argument("name_or_path", help="a Hub id or a directory")
    parser.add_argument("--trust_remote_code", action="store_true", help="run config and tokenizer code it ships")
    parser.add_argument("--revision", default="main", help="branch, tag or commit on the Hub")
    options = parser.parse_args(arguments)
    where = {"trust_remote_code": options.trust_remote_code, "revision": options.revision}
    print(options.name_or_path)
    try:
        config = load_config(options.name_or_path, **where)
        backbone_name(config)  # what it is refused for comes before what its tokenizer may lack
        backbone = resolve_backbone(config, load_tokenizer(options.name_or_path, **where))
    except (OSError, ValueError) as error:
        print(f"  supported            no: {error}")
        return 1
    print(f"  {'supported':<20} yes")
    for field in dataclasses.fields(backbone):
        print(f"  {field.name:<20} {getattr(backbone, field.name)}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
