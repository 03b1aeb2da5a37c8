"""`subprocess.run`, `Popen` and torchrun for a Python command, from a process that has imported what scripts import.

Importing torch, transformers and PEFT takes most of the time of a small script. Each command is forked from one
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
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch.distributed import TCPStore

PROCESSES = multiprocessing.get_context("forkserver")  # one server a test process, whoever starts it
PROCESSES.set_forkserver_preload(
    [
        *("trl", "matplotlib.pyplot", "mdu_trainer.attacks.run", "mdu_trainer.callbacks", "mdu_trainer.hub.push"),
        *("runs", "frozen"),
    ]
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
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        streams[1].touch()
        shown = nullcontext(list(map(str, streams))) if columns is None else _terminal(columns, streams[0])
        with shown as written:
            process = _start(command, cwd, *written)
            process.join(timeout)
            if process.is_alive():
                process.kill()
                process.join()
                raise subprocess.TimeoutExpired(command, timeout, *(stream.read_bytes() for stream in streams))
        out, err = (stream.read_bytes().decode() for stream in streams)  # with its carriage returns
    return subprocess.CompletedProcess(command, process.exitcode, out, err)


@contextmanager
def started(command: list, log: Path, *, cwd: str | os.PathLike, number: int = 1) -> Iterator[list[BaseProcess]]:
    """Start a command, in processes that know of one another as those of torchrun do. What is left is killed.

    Args:
        log: the file for both streams of all.
    """
    launch = {}
    if number > 1:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's, too, stands outside
        launch = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        launch |= {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "ACCELERATE_USE_CPU": True}
    ranks = [launch and launch | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(number)]
    log.touch()
    processes = [_start(command, cwd, str(log), str(log), rank) for rank in ranks]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def run_together(
    command: list, *, cwd: str | os.PathLike, number: int = 2, timeout: float = 280
) -> subprocess.CompletedProcess:
    """Run a command in several processes to their end, or that of the first that fails: its status, and all output."""
    with tempfile.TemporaryDirectory() as folder:
        log, end, status = Path(folder, "log"), time.monotonic() + timeout, 0
        with started(command, log, cwd=cwd, number=number) as processes:
            left = {process.sentinel: process for process in processes}
            while left and not status:
                ended = wait(list(left), end - time.monotonic())
                assert ended, f"not ended after {timeout:g} s"
                status = next(filter(None, (left.pop(sentinel).exitcode for sentinel in ended)), 0)
        text = log.read_text()
    return subprocess.CompletedProcess(command, status, text, text)


def _start(command: list, cwd: str | os.PathLike | None, out: str, err: str, rank: dict | None = None) -> BaseProcess:
    python, *arguments = map(str, command)
    assert python == sys.executable, "for Python commands"
    process = PROCESSES.Process(target=_main, args=(arguments, str(cwd or Path.cwd()), out, err, rank or {}))
    process.start()
    return process


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


def _main(arguments: list[str], cwd: str, out: str, err: str, rank: dict) -> None:
    os.environ |= {name: str(value) for name, value in rank.items()}
    if rank:  # as torchrun has it
        torch.set_num_threads(1)
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
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
