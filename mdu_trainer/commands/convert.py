"""`python -m mdu_trainer.convert rwku SOURCE --output rows.jsonl`: RWKU's files as rows to forget.

    python -m mdu_trainer.convert rwku Target/ --subjects "Stephen King" --output rows.jsonl

SOURCE is what examples/rwku.py takes as `--forget`: one file of pairs or of questions and answers, a folder with a
file a subject, or one with a folder a subject (`1_Stephen_King/pair.json`, `Stephen_King/forget.jsonl`). The output
has a row for each: `question`, `answer`, `subject`, and of pairs `refusal`, the made-up text, which DPO prefers. That
is what examples/unlearn.py takes as `--forget`. Only its owner may read the file.
"""

import json
import sys
from pathlib import Path

from mdu_trainer.commands import ArgumentParser, run
from mdu_trainer.evaluation.rwku import load_forget_rows
from mdu_trainer.files import UserError, write_whole

COLUMNS = ("question", "answer", "refusal", "paraphrased_question", "subject")


def main(arguments: list[str] | None = None) -> int:
    """Write the rows of RWKU's files into one file."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("form", choices=["rwku"], help="of the files")
    parser.add_argument("source", help="a file or a folder")
    parser.add_argument("--subjects", nargs="+", help="whom to forget; everybody in the source if unset")
    parser.add_argument("--output", required=True, help="the file of JSON lines to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
    options = parser.parse_args(arguments)
    source, output = Path(options.source), Path(options.output)
    _check(source, output, options.overwrite)
    read = load_forget_rows(source, options.subjects)
    rows = [{name: row[name] for name in COLUMNS if row.get(name) is not None} for row in read.to_list()]
    preferred = sum("refusal" in row for row in rows)
    write_whole(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), private=True)
    print(f"{len(rows)} rows to forget, {preferred} of them with a text that DPO prefers, written to {output}")
    if 0 < preferred < len(rows):
        print("DPO reads these texts only where every row has one: otherwise it prefers refusals that are built in.")
    return 0


def _check(source: Path, output: Path, overwrite: bool) -> None:
    """Refuse an output that no command would read, or that would be read as a part of the source."""
    if output.suffix != ".jsonl":
        raise UserError(f"--output {output} must end in .jsonl, by which it is read.")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: name a file.")
    if output.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--output {output} lies in what is read: name a file elsewhere.")
    if output.exists() and not overwrite:
        raise UserError(f"--output {output} is there already: pass --overwrite, or name another file.")


if __name__ == "__main__":
    sys.exit(run(main))
