"""The `mdu` command: each subcommand is an example, run as it lies there, or a module of `mdu_trainer`.

It is installed as a module of its own (see setup.py), for importing `mdu_trainer` loads torch, and a list of
subcommands should not take seconds. So it imports nothing of the package before a subcommand runs.
"""

import difflib
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

COMMANDS = {  # name -> what it runs, and what that does
    "unlearn": ("unlearn.py", "make a model forget rows of your own; score it before and after"),
    "compare": ("tofu.py", "unlearn with several methods and compare them; without options, the demo"),
    "sweep": ("sweep.py", "unlearn with every combination of settings, and choose one"),
    "sequential": ("sequential.py", "unlearn one request after the other"),
    "rwku": ("rwku.py", "forget real people, and score on RWKU"),
    "score": ("score.py", "score a checkpoint on your own rows, TOFU, RWKU or the embedded authors"),
    "roles": ("roles.py", "what was forgotten, token by token"),
    "attack": ("attack.py", "how much of what was forgotten comes back under attack"),
    "audit": ("leak_check", "before unlearning: which rows does a model hold?"),
    "leak-check": ("leak_check", "after it: does a model still give rows away? A gate, by its exit status"),
    "report": ("report.py", "one page of a comparison, to open in a browser or to send"),
    "publish": ("publish.py", "send an unlearned model to the Hugging Face Hub"),
    "models": ("models.__main__", "what a checkpoint is, and whether it is supported"),
    "convert": ("convert", "make RWKU's files rows that mdu unlearn --forget takes"),
    "card": ("model_card", "write a checkpoint's card"),
}
FIRST = {"audit": ["--audit"]}  # options that a name stands for


def main() -> int | None:
    """Run the subcommand that the command line names; without one, list them."""
    name, *options = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: mdu COMMAND [--OPTION VALUE ...]\n")
        print("\n".join(f"  {name:<{width}}  {words}" for name, (_, words) in COMMANDS.items()))
        print("\n`mdu COMMAND --help` lists the options. On several devices: accelerate launch -m mdu COMMAND ...")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS) or COMMANDS
        print(f"mdu: error: there is no command {name!r}. Did you mean {' or '.join(near)}?", file=sys.stderr)
        return 2
    target, _ = COMMANDS[name]
    sys.argv = [f"mdu {name}", *FIRST.get(name, []), *options]  # by which it calls itself in messages
    if target.endswith(".py"):
        return run_example(target)
    from mdu_trainer.commands import run

    return run(import_module(f"mdu_trainer.{target}").main)


def run_example(name: str) -> None:
    """Run an example as `python` runs it, but for the name in `sys.argv`."""
    import_module("mdu_trainer.commands")  # first, for it silences messages that other libraries have at import
    path = find_examples() / name
    module = sys.modules["__main__"] = ModuleType("__main__")
    module.__file__ = str(path)
    exec(compile(path.read_bytes(), path, "exec"), vars(module))


def find_examples() -> Path:
    """The folder of the examples: inside the package when installed from a wheel, beside it in a clone."""
    import mdu_trainer

    package = Path(mdu_trainer.__file__).parent
    return package / "examples" if (package / "examples").is_dir() else package.parent / "examples"


if __name__ == "__main__":
    sys.exit(main())
