"""Work on the parts of something large in several processes, with the results in the order of the parts.

The processes are forks: what this one holds is theirs without a copy, and of the parts each takes every n-th, so that nothing but
results goes from one to another. What comes out is the same for any number of them.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from mpo.common.machine import cores
from mpo.errors import ProcessLostError

Result = TypeVar("Result")
_MOST = 8  # each takes memory of its own, and reads what it leaves to the others


def available() -> int:
    """Processes that work may be divided among: the cores of this machine, shared with the other ranks of a run on it.

    One where the system cannot fork a process safely.
    """
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return min(_MOST, max(1, cores() // max(1, int(ranks) if ranks.isdecimal() else 1)))


def in_order(work: Callable[[int, int], Iterator[Result]], processes: int) -> Generator[Result, None, None]:
    """The results of all parts, in their order.

    Args:
        work: Takes the number of a first part and a step, and yields the results of this part and of every following one
            that is a multiple of the step further on. What it raises is raised here, behind the results of the parts before.
        processes: How many; with one, this process does the work itself.

    Raises:
        ProcessLostError: A process was ended from outside.
    """
    if processes < 2:
        yield from work(0, 1)
        return
    workers: list[tuple[Connection, BaseProcess]] = []
    try:
        try:
            for first in range(processes):
                _begin(work, first, processes, workers)
        except OSError:  # no room for another process; the work can be done here
            _end(workers)
            yield from work(0, 1)
            return
        while True:
            for connection, process in workers:
                try:
                    kind, value = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError) as error:
                    raise _lost(process) from error
                if kind == "end":
                    return
                if kind == "raised":
                    raise value
                yield value
    finally:
        _end(workers)


def _begin(
    work: Callable[[int, int], Iterator[Any]],
    first: int,
    step: int,
    workers: list[tuple[Connection, BaseProcess]],
) -> None:
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    others = [*(connection for connection, _ in workers), receiving]
    process = context.Process(target=_serve, args=(work, first, step, sending, others), daemon=True)
    workers.append((receiving, process))  # first, so that it is ended whatever interrupts its beginning
    try:
        process.start()
    finally:
        # With no end of it open here, reading ends when the process does.
        sending.close()


def _end(workers: list[tuple[Connection, BaseProcess]]) -> None:
    for connection, process in workers:
        if process.pid is not None:
            process.kill()
            process.join()
        connection.close()
    workers.clear()


def _serve(
    work: Callable[[int, int], Iterator[Any]],
    first: int,
    step: int,
    sending: Connection,
    others: list[Connection],
) -> None:
    # Ctrl-C and what a scheduler sends reach all processes: the one that began this one ends it, or breaks its pipe.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for connection in others:  # so that sending fails once nobody can receive
        connection.close()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()
    with suppress(BrokenPipeError):
        try:
            for result in work(first, step):
                sending.send_bytes(pickle.dumps(("result", result), protocol=pickle.HIGHEST_PROTOCOL))
            sending.send_bytes(pickle.dumps(("end", None)))
        except BrokenPipeError:
            raise
        except Exception as error:
            sending.send_bytes(_error_message(error))


def _error_message(error: Exception) -> bytes:
    """The error, or what is known of it where it cannot be sent."""
    try:
        message = pickle.dumps(("raised", error))
        pickle.loads(message)
    except Exception:
        message = pickle.dumps(("raised", RuntimeError("".join(traceback.format_exception(error)))))
    return message


def _lost(process: BaseProcess) -> ProcessLostError:
    process.join(5)
    code = process.exitcode
    how = "it ended"
    if code is not None and code < 0:
        how = f"it was ended by {signal.Signals(-code).name}"
    elif code:
        how = f"it ended with code {code}"
    return ProcessLostError(
        f"a process that worked on a part of the data is lost: {how}. The system does so where memory is short. Free some, or "
        "use one core, which needs the least: put `taskset -c 0` before the command."
    )
