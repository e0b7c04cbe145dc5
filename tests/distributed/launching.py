"""Starts two processes on this machine's CPU as ``accelerate launch`` starts them on GPUs."""

from __future__ import annotations

import faulthandler
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "accelerate"
LIMIT = "MPO_TEST_LIMIT"


def environment() -> dict[str, str]:
    """The variables of a launched process: this checkout, one thread, and nothing of a launcher around the tests."""
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    theirs = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    return {**{name: value for name, value in os.environ.items() if name not in theirs}, **ours}


def run(command: Sequence[str | Path], variables: dict[str, str], limit: float) -> tuple[int, str]:
    """
    Run a launcher, and end it with its processes when they take more than ``limit`` seconds.

    The workers end themselves first, each with a traceback of where it is: see :func:`end_after_limit`.

    Returns:
        The exit status and all that was written.
    """
    # To a file: a pipe stays open as long as any process holds it.
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env={**variables, LIMIT: str(limit)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        ended = True
        try:
            process.wait(limit + 30)
        except subprocess.TimeoutExpired:
            ended = False
            process.terminate()  # upon which the launcher ends its workers
            process.wait(60)
        finally:
            process.kill()
        output.seek(0)
        written = output.read().decode("utf-8", errors="replace")
    assert ended, f"the processes did not end within {limit} s:\n{written[-8000:]}"
    return process.returncode, written


def end_after_limit() -> None:
    """In a worker: write a traceback and end when the time given to :func:`run` is over."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(float(os.environ[LIMIT]), exit=True)


def launch(engine: str, arguments: Sequence[str | Path], *, limit: float) -> tuple[int, str]:
    """
    Run a script on two ranks under one of the Accelerate configurations of the repository.

    Args:
        engine: name of the configuration.
        arguments: the script and its own arguments.
        limit: seconds after which the processes are taken to hang and are ended.

    Returns:
        As :func:`run`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = environment()
    if not engine.startswith("zero"):
        # The configuration is for GPUs; this is what makes it gloo on a CPU. DeepSpeed looks for itself.
        variables["ACCELERATE_USE_CPU"] = "true"
    configuration = ("--config_file", str(CONFIGS / f"{engine}.yaml"))
    place = ("--num_processes", "2", "--main_process_port", str(port))
    return run(["-m", "accelerate.commands.launch", *configuration, *place, *arguments], variables, limit)
