"""What a full disk looks like to the libraries that write to it."""

from __future__ import annotations

import errno

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
