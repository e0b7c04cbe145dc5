"""Files and folders that are either written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import math
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mpo.common.characters import without_halves
from mpo.common.redaction import redact
from mpo.common.words import nearest, show_name
from mpo.errors import ConfigError, MPOError, StorageError

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
    number = _error_number(error)
    if number is not None:
        return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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
    """Write a file atomically; see :func:`whole_file`."""
    with whole_file(path) as file:
        file.write(content)
    return Path(path)


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """Write a file atomically: to a temporary file beside it, flushed to disk, then renamed over it when the block ends.

    A reader, or a run that is killed, sees the old file or the new one, never a part. The folder is made where it is
    missing. When the block raises, the old file stays. What a killed process left is removed as by :func:`whole_folder`.

    Raises:
        StorageError: The disk is full, or the folder cannot be written. The old file is still there.
    """
    target = Path(path)
    temporary = _temporary(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except MPOError:
        raise
    except OSError as error:
        raise StorageError(_explain(target, error)) from error
    finally:
        with contextlib.suppress(OSError):  # once it is renamed there is none
            os.unlink(temporary)


def did_you_mean(path: str | Path) -> str:
    """A sentence with the name beside it that a misspelt path most likely meant; nothing where none is near."""
    path = Path(path)
    try:
        near = nearest(path.name, os.listdir(path.parent))
    except OSError:
        return ""
    return f" Did you mean {path.with_name(near)}?" if near else ""


def refuse_input(output: str | Path, inputs: Iterable[str | Path], *, setting: str = "output") -> None:
    """Refuses a file to write that is one of those that are read, which would be lost.

    Raises:
        ConfigError: It is one of them, under whatever name.
    """
    target = Path(output).expanduser().resolve()
    if any(Path(name).expanduser().resolve() == target for name in inputs):
        raise ConfigError(f"{setting}: {show_name(str(output))!r} is an input. Choose another name.")


def read_named(path: str | Path) -> bytes:
    """The bytes of a file that a person names.

    Raises:
        OSError: It cannot be read; or it is no file: a pipe would be waited for, and a device may have no end.
    """
    path = Path(path).expanduser()
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "it is a pipe or a device; expected a file")
    return path.read_bytes()


def read_named_text(path: str | Path) -> str:
    """The same as text: UTF-8 with or without a mark of its order of bytes, lines ended in any way.

    Raises:
        OSError, UnicodeDecodeError: It cannot be read.
    """
    return read_named(path).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text atomically; see :func:`write_bytes`. Half a surrogate pair becomes U+FFFD."""
    return write_bytes(path, without_halves(text).encode("utf-8"))


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
        StorageError: The disk is full, the place cannot be written, or ``target`` is there already and not empty. An
            error of the operating system inside the block counts as one in writing.
    """
    target = Path(target)
    temporary = _temporary(target)
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise StorageError(
                f"{target} is there already and not empty. Choose a folder that does not exist yet."
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        temporary.mkdir()
        yield temporary
        publish(temporary, target)
    except MPOError:
        raise
    except Exception as error:
        if _error_number(error) is None and not is_full_disk(error):
            raise
        raise StorageError(_explain(target, error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(folder: Path, target: Path) -> None:
    """Flush a finished folder with all that is in it to disk and give it its name, in one step.

    Args:
        folder: On the same file system as ``target``.
        target: Where it goes. It must not exist, or be an empty folder.

    Raises:
        OSError: It cannot be flushed or renamed, for example because another process was first, or the disk is full.
    """
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() or path.is_dir():  # a pipe would wait for a reader
            sync(path)
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
        with contextlib.suppress(OSError):  # another process was faster
            written = max(path.lstat().st_mtime for path in (leftover, *leftover.rglob("*")))
            if time.time() - written < ABANDONED_AFTER:
                continue
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink()


def _temporary(target: Path) -> Path:
    """A name beside ``target`` that nobody else takes."""
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}{PART}")


def _error_number(error: BaseException) -> int | None:
    """The operating system's number of an error, which libraries written in Rust have in their text only."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return error.errno if isinstance(error, OSError) else int(found[1]) if found else None


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
    if _error_number(error) in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"Cannot write {path}: no permission. Choose another folder, or change its rights."
    return f"Cannot write {path}: {getattr(error, 'strerror', None) or error}."
