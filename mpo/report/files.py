"""Files that are either written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpo.errors import StorageError
from mpo.report.redaction import redact
from mpo.storage import is_full_disk


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
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner may read; give this one the rights that open() would have.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
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


def _explain(path: Path, error: OSError) -> str:
    if is_full_disk(error):
        return f"Cannot write {path}: the disk (or your quota) is full. Free some space, then run this again."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"Cannot write {path}: no permission. Choose another folder, or change its rights."
    return f"Cannot write {path}: {error.strerror or error}."
