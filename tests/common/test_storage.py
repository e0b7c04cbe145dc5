"""A full disk is recognised in the words of every library that writes."""

from __future__ import annotations

import errno

import pytest
from safetensors import SafetensorError

from mpo.common.files import is_full_disk

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError(errno.EFBIG, "File too large"),
    OSError("No space left on device"),
    RuntimeError("[enforce fail at inline_container.cc:595] . unexpected pos 64 vs 0"),
    RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]
OTHER = [
    OSError(errno.EACCES, "Permission denied"),
    OSError(errno.ENOENT, "No such file or directory: 'no space'"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    ValueError("You exceeded your current quota of requests"),
]


@pytest.mark.parametrize("error", FULL, ids=str)
def test_want_of_room_is_recognised(error: Exception) -> None:
    assert is_full_disk(error)


@pytest.mark.parametrize("error", OTHER, ids=str)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_full_disk(error)
