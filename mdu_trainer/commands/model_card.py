"""`python -m mdu_trainer.model_card FOLDER`: write a checkpoint's card, and the picture it shows.

With `--certificate` also a record of the unlearning on one page, with the checksums of the weights.
"""

import sys
from pathlib import Path

from mdu_trainer.commands import ArgumentParser, run
from mdu_trainer.report.certificate import CERTIFICATE, write_certificate
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
    add_people_options(parser)
    parser.add_argument("--certificate", action="store_true", help=f"write {CERTIFICATE}, too: a deletion record")
    options = vars(parser.parse_args(arguments))
    folder, with_certificate = Path(options.pop("folder")), options.pop("certificate")
    card = write_model_card(folder, **options)
    print(f"Written to {folder / CARD}")
    missing = [name for name in ("license", "language") if card.data.get(name) is None]
    if missing:
        print(f"It names no {' and no '.join(missing)}: pass {' and '.join(f'--{name}' for name in missing)}.")
    if with_certificate:
        print(f"Written to {write_certificate(folder, **options)}")
    return 0


def add_people_options(parser: ArgumentParser) -> None:
    """Add the options of a card that only its author knows."""
    parser.add_argument("--license", help="by default the base's")
    parser.add_argument("--language", help="by default the base's")
    parser.add_argument("--request_id", help="number of the request in your files; it is published, so name nobody")
    parser.add_argument("--request_date", help="day of the request; it is published")


if __name__ == "__main__":
    sys.exit(run(main))
