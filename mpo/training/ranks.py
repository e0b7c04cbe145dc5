"""What the processes of a run tell each other."""

from __future__ import annotations

import atexit
import os
import sys
from typing import Any, Protocol, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object

Value = TypeVar("Value")


class Ranks(Protocol):
    """The part of ``accelerate.Accelerator`` that knows the process group; a single process may bring its own."""

    num_processes: int
    process_index: int
    is_main_process: bool
    device: torch.device

    def wait_for_everyone(self) -> None: ...


class SingleRank:
    """A process on its own."""

    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait_for_everyone(self) -> None:
        """Return at once."""


def from_main(value: Value, ranks: Ranks) -> Value:
    """The main process's value on every rank. On a network file system, another rank may see a new file later."""
    values = [value]
    if ranks.num_processes > 1:
        broadcast_object_list(values, from_process=0)
    return values[0]


def gathered(values: list[Value], ranks: Ranks) -> list[Value]:
    """The values of all ranks, one after another."""
    if ranks.num_processes == 1:
        return values
    found: Any = gather_object(values)
    return list(found)


def end_rank() -> None:
    """End this process with status 0, if it is one of several; the last thing that it does.

    Libraries refer to the process group to the end, so that gloo's threads outlive ``destroy_process_group``. One of them that
    wants the interpreter while it is taken down aborts the process (status -6), and a launcher reports a run that has succeeded as
    failed. So what is registered for the end is run, and the interpreter is not taken down.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
