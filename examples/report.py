"""One page of a comparison: what was run, tables, pictures, in a single HTML file to open in a browser or to print.

    python examples/report.py outputs/demo

It shows what the folder holds: `results.json` of examples/tofu.py or examples/sweep.py, the models' training curves
and cards, `roles.json`, `along_path.json`, `recovery.json` and their pictures. It quotes no row to forget unless
`--show_forget_text` is given; the page is then as private as the rows are.
"""

import sys
from dataclasses import fields
from pathlib import Path

from datasets import Dataset

from mdu_trainer import load_tokenizer
from mdu_trainer.commands import ArgumentParser, run, task
from mdu_trainer.commands.comparison import ComparisonArguments, load_rows
from mdu_trainer.commands.row_sets import EMBEDDED
from mdu_trainer.evaluation.results import Results
from mdu_trainer.files import UserError
from mdu_trainer.report.page import write_page
from mdu_trainer.report.records import RESULTS


def load_private_rows(folder: Path) -> tuple[Dataset, Dataset]:
    """The rows that the comparison in a folder was to forget and to keep, from where its settings say."""
    if not (folder / RESULTS).is_file():
        raise UserError(f"--show_forget_text needs {folder / RESULTS}, which names the rows.")
    results = Results.load(folder / RESULTS)
    chosen = {f.name: results.settings[f.name] for f in fields(ComparisonArguments) if f.name in results.settings}
    args = ComparisonArguments(**chosen)
    if not any("forget" in run.rows for run in results.runs) or (
        args.dataset_name is None and results.dataset != EMBEDDED
    ):
        raise UserError(
            f"--show_forget_text knows the rows of examples/tofu.py and examples/sweep.py; {folder / RESULTS} is of "
            "neither. Leave it out."
        )
    return load_rows(args, from_scratch=True)[:2]


def main(folder: Path, output: Path | None, show_forget_text: bool) -> None:
    private = {}
    if show_forget_text:
        private["forget_rows"], private["retain_rows"] = load_private_rows(folder)
        models = sorted(path.parent for path in folder.glob("*/tokenizer_config.json"))
        with task("loading the tokenizer"):
            private["tokenizer"] = load_tokenizer(str(models[0])) if models else None
    print(f"Written to {write_page(folder, output, **private)}")


def command() -> None:
    """The script as it is called."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="output folder of a comparison")
    parser.add_argument("--output", type=Path, help="file to write; FOLDER/report.html if unset")
    parser.add_argument("--show_forget_text", action="store_true", help="quote the rows to forget in the page")
    main(**vars(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(run(command))
