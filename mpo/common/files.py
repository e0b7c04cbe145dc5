"""Files and folders that are either written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mpo.common.redaction import redact
from mpo.errors import StorageError

PART = ".part"
"""Ending of what is being written."""

ABANDONED_AFTER = 24 * 3600.0
"""Seconds without a write after which an unfinished folder is nobody's any more."""

# torch and safetensors report a failed write as errors of their own, with words from their own code.
_SIGNS = (
    "no space",
    "enospc",
    "file write failed",
    "unexpected pos",
    "i/o error",
    "disk quota",
    "file too large",
)


def is_full_disk(error: BaseException) -> bool:
    """Whether something could not be written for want of room: the disk, a quota or the largest file size is reached."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return any(sign in str(error).lower() for sign in _SIGNS)


def check_writable(folder: Path, *, setting: str = "output_dir", create: bool = True) -> None:
    """Make ``folder`` and write a file in it; with ``create=False``, in the nearest folder above that exists.

    Args:
        folder: The output folder of a command.
        setting: What names it, for the error.
        create: Whether to make it.

    Raises:
        StorageError: It cannot be made or written.
    """
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"The output folder {folder} is a file. Choose another with `{setting}`.")
    place = folder
    try:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        while not place.exists() and place != place.parent:
            place = place.parent
        # A file without a name, which a killed process cannot leave behind.
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise StorageError(
            f"The output folder {folder} cannot be written: {error.strerror or error}. Choose another with "
            f"`{setting}`, or make room there."
        ) from None


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file atomically: to a temporary file beside it, flushed to disk, then renamed over it.

    A reader, or a run that is killed, sees the old file or the new one, never a part. The folder is made where it is
    missing.

    Raises:
        StorageError: The disk is full, or the folder cannot be written. The old file is still there.
    """
    target = Path(path)
    temporary: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=PART, dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner may read; give this one the rights that open() would have.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise StorageError(_explain(target, error)) from error
    except BaseException:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise
    return target


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text atomically; see :func:`write_bytes`."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Mapping[str, Any]) -> Path:
    """Write strict, indented JSON atomically, with secrets, user names and home folders taken out.

    Values that are not finite become null, since JSON has no NaN. What JSON does not know becomes its string. A list
    of plain values takes one line, so that a person can read a file with hundreds of scores in it.

    Raises:
        StorageError: The disk is full, or the folder cannot be written.
    """
    text = json.dumps(_finite(redact(value)), indent=2, ensure_ascii=False, allow_nan=False, default=str)
    # A line break never stands inside a JSON string, so these brackets are the list's own.
    text = re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda m: "[" + re.sub(r",\n\s+", ", ", m[1]) + "]", text)
    return write_text(path, text + "\n")


@contextlib.contextmanager
def whole_folder(target: str | Path) -> Iterator[Path]:
    """Write a folder atomically: yields a temporary folder beside ``target`` that takes its name when the block ends.

    What was written is flushed to disk before the renaming. When the block raises, the temporary folder is removed; one
    that a killed process left behind is removed by the next to write the same target, once it is
    :data:`ABANDONED_AFTER` old.

    Args:
        target: The folder to make. It must not exist, or be empty.

    Raises:
        StorageError: The disk is full, the place cannot be written, or ``target`` is there already and not empty.
    """
    target = Path(target)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=PART, dir=target.parent))
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        publish(temporary, target)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(_explain(target, error)) from error
    except Exception as error:
        if is_full_disk(error):
            raise StorageError(_explain(target, error)) from error
        raise
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def publish(folder: Path, target: Path) -> None:
    """Flush every file of a finished folder to disk and give it its name, in one step.

    Raises:
        OSError: It cannot be renamed, for example because another process was first, or the disk is full.
    """
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        sync(path)
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    os.replace(folder, target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk; a file system that cannot is left alone.

    Raises:
        OSError: What was written does not fit on the disk, or could not be stored.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        # A network file system may report only now what it could not store.
        if is_full_disk(error) or error.errno == errno.EIO:
            raise


def remove_leftovers(target: Path) -> None:
    """Remove what killed processes left while they wrote ``target``, but nothing that is being written now."""
    for leftover in target.parent.glob(f"{glob.escape('.' + target.name)}.*{PART}"):
        try:
            written = max(path.stat().st_mtime for path in (leftover, *leftover.rglob("*")))
        except OSError:
            continue
        if time.time() - written < ABANDONED_AFTER:
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist") and not isinstance(value, str):  # numpy and torch, without importing them
        return _finite(value.tolist())
    return value


def _explain(path: Path, error: Exception) -> str:
    if is_full_disk(error):
        return f"Cannot write {path}: the disk (or your quota) is full. Free some space, then run this again."
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"Cannot write {path}: no permission. Choose another folder, or change its rights."
    return f"Cannot write {path}: {getattr(error, 'strerror', None) or error}."
