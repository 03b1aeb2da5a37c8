"""`python -m mdu_trainer.model_card FOLDER`: write a checkpoint's card, and the picture it shows."""

import sys
from pathlib import Path

from mdu_trainer.commands import ArgumentParser, run
from mdu_trainer.report.model_card import CARD, write_model_card


def main(arguments: list[str] | None = None) -> int:
    """Write the card of a checkpoint."""
    parser = ArgumentParser("Write a checkpoint's card.")
    parser.add_argument("folder", help="a checkpoint of MDUTrainer")
    parser.add_argument("--results", help="results.json of a comparison; by default the one in the folder")
    parser.add_argument("--recovery", help="recovery.json of attacks; by default the one in the folder")
    parser.add_argument("--repo_id", help="where the model is, or will be, on the Hub")
    parser.add_argument("--base_model", help="Hub id of the base, if the checkpoint does not know it")
    parser.add_argument(
        "--forget_description", dest="description", help="one line on what was to be forgotten; it is published"
    )
    parser.add_argument("--license", help="by default the base's")
    options = vars(parser.parse_args(arguments))
    folder = Path(options.pop("folder"))
    write_model_card(folder, **options)
    print(f"Written to {folder / CARD}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
