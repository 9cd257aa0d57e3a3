"""Processes that tests start, forked from one that has imported everything: in 0.1 s, not in 6."""

import multiprocessing
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from simmim.cli import main

CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()
CONTEXT: Any = multiprocessing.get_context("forkserver" if CAN_FORK else "spawn")
if CAN_FORK:
    TASKS = [
        "pretrain",
        "classify",
        "segment",
        "detect",
        "command_line.tasks",
        "training.strategies",
        "data",
    ]
    CONTEXT.set_forkserver_preload(["pytest", *(f"simmim.{name}" for name in TASKS)])
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
LOG = "log.txt"
STARTED: list[BaseProcess] = []


def command(*words: str) -> None:
    """What a process does that runs a command line."""
    sys.exit(main(list(words)))


def commands(lines: list[str]) -> None:
    """Run command lines one after the other; those that begin with "!" are to be refused."""
    for line in lines:
        print(f"> {line}", file=sys.stderr, flush=True)
        status = main(shlex.split(line.removeprefix("! ")))
        if (status != 0) != line.startswith("! "):
            sys.exit(f"exit status {status}")


def program(*words: str) -> None:
    """Become another program."""
    os.execvp(words[0], words)


def _enter(
    function: Callable[..., None], args: Any, folder: str, log: str, environment: dict[str, str]
) -> None:
    if CAN_FORK:
        os.setsid()  # its workers are of its group, as a scheduler's are
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # as in any Python process
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    function(*args)


def start(
    function: Callable[..., None], *args: Any, log: str = LOG, **environment: str
) -> BaseProcess:
    """Call a function in a process, in the working folder, with its output added to a log."""
    # A seed that an earlier test left would be set again, and nobody looks at a board.
    inherited = {key: value for key, value in os.environ.items() if key != "PL_GLOBAL_SEED"}
    environment = {**inherited, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", **environment}
    process: BaseProcess = CONTEXT.Process(
        target=_enter, args=(function, args, os.getcwd(), log, environment)
    )
    process.start()
    STARTED.append(process)
    return process


def start_command(*words: str, **environment: str) -> BaseProcess:
    """Start a command line in a process."""
    return start(command, *words, **environment)


def run_command(*words: str, **environment: str) -> str:
    """Run a command line that succeeds in a process of its own; the log."""
    return in_processes(1, command, *words, **environment)


def run_program(*words: str, **environment: str) -> str:
    """Run a program that succeeds; the log."""
    return in_processes(1, program, *words, **environment)


def said(log: str = LOG) -> str:
    """What processes have printed."""
    return Path(log).read_text() if Path(log).exists() else ""


def end(*processes: BaseProcess, logs: tuple[str, ...] = (LOG,), seconds: float = 600) -> None:
    """Wait until all have succeeded. Where one fails, or takes too long, none is left."""
    deadline = time.monotonic() + seconds
    try:
        while any(process.is_alive() for process in processes):
            if any(process.exitcode for process in processes) or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        for process, log in zip(processes, logs, strict=True):
            assert process.is_alive() or process.exitcode == 0, said(log)[-3000:]
        assert not any(process.is_alive() for process in processes), said(logs[0])[-3000:]
    finally:
        for process in processes:
            kill(process)


def kill(process: BaseProcess, number: int = KILL) -> int | None:
    """Send a signal to a process and what it has started, and tell the exit status."""
    assert process.pid is not None
    with suppress(ProcessLookupError):  # it has ended
        if CAN_FORK:
            os.killpg(process.pid, number)
    if number == KILL:
        process.kill()  # one that has no group yet
    process.join(60)
    if process in STARTED:
        STARTED.remove(process)
    return process.exitcode


def kill_all() -> None:
    """Leave nothing that a test has started."""
    for process in [*STARTED]:
        kill(process)


def in_processes(
    n: int,
    function: Callable[..., None],
    *args: Any,
    nodes: int = 1,
    seconds: float = 600,
    **environment: str,
) -> str:
    """Call a function in n processes that torchrun has started, if n > 1; the log of the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes, logs = [], tuple(LOG if n == 1 else f"log_{rank}.txt" for rank in range(n))
    for rank, log in enumerate(logs):
        node, local = divmod(rank, n // nodes)
        torchrun = {"TORCHELASTIC_RUN_ID": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        torchrun |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n // nodes)}
        torchrun |= {"RANK": str(rank), "LOCAL_RANK": str(local), "GROUP_RANK": str(node)}
        alone = torchrun if n > 1 else {}
        processes.append(start(function, *args, log=log, **alone, **environment))
    end(*processes, logs=logs, seconds=seconds)
    return said(logs[0])
