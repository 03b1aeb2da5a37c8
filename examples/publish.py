"""Publish an unlearned model on the Hugging Face Hub, privately unless told otherwise.

Look first, send then:

    python examples/publish.py outputs/demo/mdu-tau0 ORG/NAME --results outputs/demo/results.json --dry_run
    python examples/publish.py outputs/demo/mdu-tau0 ORG/NAME --results outputs/demo/results.json

The token is the one that `hf auth login` stored, or HF_TOKEN.
"""

import sys

from mdu_trainer.commands import ArgumentParser, run
from mdu_trainer.commands.checks import check_repository, check_revision
from mdu_trainer.commands.model_card import add_people_options
from mdu_trainer.hub.push import push_unlearned_model


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("folder", help="a checkpoint of MDUTrainer")
    parser.add_argument("repo_id", help="ORG/NAME, created if it does not exist")
    parser.add_argument("--results", help="results.json with the model's figures; by default the one in the folder")
    parser.add_argument("--recovery", help="recovery.json with attacks on it; by default the one in the folder")
    parser.add_argument("--base_model", help="Hub id of the base, if the checkpoint does not know it")
    parser.add_argument(
        "--adapter", choices=["keep", "merge"], default="keep", help="publish the adapter, or merge it"
    )
    parser.add_argument("--public", action="store_true", help="make the repository public, or write to a public one")
    parser.add_argument("--revision", help="branch to push to, created if it does not exist")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument(
        "--forget_description", dest="description", help="one line on what was to be forgotten; it is published"
    )
    add_people_options(parser)
    parser.add_argument("--dry_run", action="store_true", help="print files and card, and send nothing")
    parser.add_argument(
        "--no_leak_scan",
        dest="leak_scan",
        action="store_false",
        help="publish without the scan for rows to forget, also where its hashes are missing",
    )
    options = vars(parser.parse_args())
    private = not options.pop("public")
    check_repository(options["repo_id"], "repo_id")
    check_revision(options["revision"], "revision")
    info = push_unlearned_model(options.pop("folder"), options.pop("repo_id"), private=private, **options)
    if info is not None:
        print(info.pr_url or info.commit_url)


if __name__ == "__main__":
    sys.exit(run(main))
