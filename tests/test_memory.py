"""Memory of a training process."""

from __future__ import annotations

import subprocess
import sys

import pytest

_CHILD = """
import resource, sys
import torch
from mpo.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    return [torch.ones(1 << 20) for _ in range(16)]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is on Linux only")
def test_memory_freed_by_a_step_is_taken_again_without_new_page_faults() -> None:
    def faults(mode: str) -> int:
        child = subprocess.run(
            [sys.executable, "-c", _CHILD, mode], capture_output=True, text=True, check=True
        )
        return int(child.stdout)

    assert faults("keep") * 4 < faults("return")
