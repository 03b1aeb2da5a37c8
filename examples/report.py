"""One page of a comparison: what was run, tables, pictures, in a single HTML file to open in a browser or to print.

    python examples/report.py outputs/demo

It shows what the folder holds: `results.json` of examples/tofu.py or examples/sweep.py, the models' training curves
and cards, `roles.json`, `recovery.json` and their pictures. It quotes no row to forget unless `--show_forget_text` is
given; the page is then as private as the rows are.
"""

import argparse
from pathlib import Path

# isort: off
from tofu import EMBEDDED, TofuArguments  # takes this folder off the path
# isort: on

from datasets import Dataset

from mdu_trainer import load_tokenizer
from mdu_trainer.analysis.page import ROLES, write_page
from mdu_trainer.evaluation.report import Results
from mdu_trainer.evaluation.sources import load_config
from mdu_trainer.model_card import RESULTS
from mdu_trainer.testing import fictional_authors, forget_retain_split


def load_forget_rows(folder: Path) -> Dataset:
    """The rows that the comparison in a folder was to forget, from where its settings say."""
    if not (folder / RESULTS).is_file():
        raise ValueError(f"--show_forget_text needs {folder / RESULTS}, which names the rows.")
    results = Results.load(folder / RESULTS)
    name, split = (results.settings.get(key, getattr(TofuArguments, key)) for key in ("dataset_name", "forget_split"))
    if not any("forget" in run.rows for run in results.runs) or (name is None and results.dataset != EMBEDDED):
        raise ValueError(
            f"--show_forget_text knows the rows of examples/tofu.py and examples/sweep.py; {folder / RESULTS} is of "
            "neither. Leave it out."
        )
    return forget_retain_split(fictional_authors())[0] if name is None else load_config(name, split)


def main(folder: Path, output: Path | None, show_forget_text: bool) -> None:
    rows = tokenizer = None
    if show_forget_text:
        rows = load_forget_rows(folder)
        models = sorted(path.parent for path in folder.glob("*/tokenizer_config.json"))
        tokenizer = load_tokenizer(str(models[0])) if models and (folder / ROLES).is_file() else None
    print(f"Written to {write_page(folder, output, forget_rows=rows, tokenizer=tokenizer)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="output folder of a comparison")
    parser.add_argument("--output", type=Path, help="file to write; FOLDER/report.html if unset")
    parser.add_argument("--show_forget_text", action="store_true", help="quote the rows to forget in the page")
    try:
        main(**vars(parser.parse_args()))
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
