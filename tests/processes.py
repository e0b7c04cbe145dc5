"""Processes for the tests that kill, interrupt or measure one: forked from one that has imported the libraries and done nothing.

Importing them takes a process longer than what it is then asked to do.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

LIBRARIES = [
    "torch",
    "trl",
    "mpo.training.trainer",
    "mpo.jobs.train",
    "mpo.evaluation.engines.local",
    "mpo.hidden_space.embed",
    "tests.runs",
]


@cache
def context() -> ForkServerContext:
    """The server of these processes, which starts with the first of them and ends with this process."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(LIBRARIES)
    root = str(Path(__file__).parents[1])
    given = {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "TQDM_DISABLE": "1",  # read when it is imported
    }
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return made


def start(function: Callable[..., Any], *arguments: Any, output: Path | None = None) -> BaseProcess:
    """
    Call a function of a module in a process of its own, in this one's folder and with its environment.

    Args:
        function: whose whole number, if it returns one, is the exit code.
        output: file that gets what the process writes to its standard output and error; without one, neither is kept.
    """
    process: BaseProcess = context().Process(
        target=_call, args=(function, arguments, dict(os.environ), output), daemon=True
    )
    process.start()
    return process


def _call(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    environment: Mapping[str, str],
    output: Path | None,
) -> None:
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # as in the tests' own process
    os.environ.clear()
    os.environ.update(environment)
    with open(output or os.devnull, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = function(*arguments)
    if isinstance(code, int):
        sys.exit(code)
