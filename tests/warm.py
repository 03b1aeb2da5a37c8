"""`subprocess.run` for a Python command, from a process that has imported what all scripts import.

Importing torch, transformers and PEFT takes most of the time of a small script. `run` forks each command from one
process that has done no more than that, so it is as fresh as a new interpreter otherwise: own memory, own streams, own
signals. What is read when a library is imported (HF_HOME and the like) must be the tests' own; a command that needs
another environment takes `subprocess.run`.
"""

import atexit
import fcntl
import multiprocessing
import os
import runpy
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")  # one server a test process, whoever starts it
PROCESSES.set_forkserver_preload(
    ["trl", "matplotlib.pyplot", "mdu_trainer.attacks.run", "mdu_trainer.callbacks", "mdu_trainer.hub.push", "runs"]
)


def run(
    command: list,
    *,
    cwd: str | os.PathLike | None = None,
    timeout: float = 240,
    columns: int | None = None,
) -> subprocess.CompletedProcess:
    """Run `[sys.executable, SCRIPT | -m MODULE | -c CODE, ARGUMENT...]` to its end.

    Args:
        columns: run it on a terminal of this width, of which `stdout` has what it shows, as it is sent there.

    Returns:
        Its exit status (negative: the signal that ended it) and the text of both streams.

    Raises:
        subprocess.TimeoutExpired: it was killed after `timeout` seconds.
    """
    python, *arguments = map(str, command)
    assert python == sys.executable, "for Python commands"
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        streams[1].touch()
        shown = nullcontext(list(map(str, streams))) if columns is None else _terminal(columns, streams[0])
        with shown as written:
            process = PROCESSES.Process(target=_main, args=(arguments, str(cwd or Path.cwd()), *written))
            process.start()
            process.join(timeout)
            if process.is_alive():
                process.kill()
                process.join()
                raise subprocess.TimeoutExpired(command, timeout, *(stream.read_bytes() for stream in streams))
        out, err = (stream.read_bytes().decode() for stream in streams)  # with its carriage returns
    return subprocess.CompletedProcess(command, process.exitcode, out, err)


@contextmanager
def _terminal(columns: int, copy: Path) -> Iterator[list[str]]:
    """Open a terminal for both streams, what it is sent kept in a file. Yields its path, twice."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    reader = threading.Thread(target=_keep, args=(ours, copy))
    reader.start()
    try:
        yield [os.ttyname(theirs)] * 2
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)


def _keep(terminal: int, copy: Path) -> None:
    with copy.open("wb") as file, suppress(OSError):  # which is how the end is told
        while sent := os.read(terminal, 1 << 16):
            file.write(sent)


def _main(arguments: list[str], cwd: str, out: str, err: str) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    os.chdir(cwd)
    status = 1
    try:
        _run(arguments)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # as an interpreter does at its end; a forked process leaves without
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run(arguments: list[str]) -> None:
    first, *rest = arguments
    if first == "-c":
        code, *rest = rest
        sys.argv, sys.path[0] = ["-c", *rest], ""
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(code, "<string>", "exec"), main.__dict__)
    elif first == "-m":
        module, *rest = rest
        sys.argv, sys.path[0] = [module, *rest], os.getcwd()
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [first, *rest], str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")
