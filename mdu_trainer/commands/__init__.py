"""What all commands share: a user's mistake ends in one line on stderr and status 2, not in a traceback."""

import sys
from collections.abc import Callable

from ..files import UserError

TRACEBACK = "--traceback"
STATUS = 2  # as argparse ends for wrong options


def run(main: Callable[[], int | None]) -> int:
    """Run a command, and turn a user's mistake into one line and a status.

    `--traceback`, taken off the command line here, shows where the mistake was noticed.

    Args:
        main: the command; it reads `sys.argv`. What it returns is the exit status.

    Returns:
        The exit status: 2 for a `UserError`, a file that cannot be read or written, or a package that is missing.
    """
    show = TRACEBACK in sys.argv[1:]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != TRACEBACK]
    try:
        return main() or 0
    except (UserError, OSError, ImportError) as error:
        if show:
            raise
        print(f"{sys.argv[0]}: error: {error} (--traceback shows where)", file=sys.stderr)
        return STATUS
