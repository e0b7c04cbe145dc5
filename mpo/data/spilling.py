"""Tables that are larger than memory should hold: they go to a file without a name and are read from it as mapped memory.

The file is removed from its folder as soon as it exists, so that nothing is left of it whatever ends the process.
"""

from __future__ import annotations

import logging
import mmap
import os
import tempfile
import weakref
from functools import cache
from pathlib import Path
from typing import Any

_LOG = logging.getLogger(__name__)
SPILL_BYTES = 64 << 20  # of a table; smaller ones stay in memory

_MAPPED: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def to_disk(table: Any) -> Any:
    """The same Arrow table, its buffers mapped from a file in the datasets cache.

    Without room for it there, the table stays in memory and a warning says so.

    Args:
        table: A ``pyarrow.Table``.
    """
    import datasets
    import pyarrow as pa

    folder = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            file.flush()
            # What was promised room may still find none: better now than when the pages are read.
            os.fsync(file.fileno())
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        _say_once(str(folder), str(error.strerror or error))
        return table
    _MAPPED.add(mapped)
    return pa.ipc.open_file(pa.py_buffer(mapped)).read_all()


@cache
def _say_once(folder: str, reason: str) -> None:
    _LOG.warning(
        "Data stay in memory, since %s cannot be written to: %s. HF_DATASETS_CACHE names another folder.",
        folder,
        reason,
    )


def release() -> None:
    """Lets the system take back the memory of all pages that were read; those that are read again come from the file."""
    if hasattr(mmap, "MADV_DONTNEED"):
        for mapped in list(_MAPPED):
            mapped.madvise(mmap.MADV_DONTNEED)
