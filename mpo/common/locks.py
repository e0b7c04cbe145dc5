"""One process at a time: files and folders that nobody else may write meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mpo.errors import StorageError

LOCK = ".lock"
"""The file in a folder by which it is held."""


def lock(file: IO[Any], message: str) -> None:
    """Hold an open file until it is closed, or the process ends in whatever way.

    On a file system without locks nothing is held; there, two processes at once are the user's to avoid.

    Raises:
        StorageError: With ``message``; another process holds the file.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StorageError(message) from None
    except OSError:
        pass


@contextlib.contextmanager
def locked_folder(folder: Path, message: str) -> Iterator[None]:
    """Hold a folder, which is there, while the block runs.

    Raises:
        StorageError: With ``message``; another process holds it. Or it cannot be written.
    """
    path = folder / LOCK
    while True:
        try:
            file = open(path, "ab")  # noqa: SIM115 - closed below
        except OSError as error:
            raise StorageError(f"Cannot write {path}: {error.strerror or error}.") from error
        try:
            lock(file, message)
            if _is_at(file, path):
                break
        except BaseException:
            file.close()
            raise
        file.close()  # its last owner has just removed it
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # before it is released, so that no one else's is removed
            path.unlink()
        file.close()


def _is_at(file: IO[Any], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
