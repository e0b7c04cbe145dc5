"""Memory that a step frees stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

_CHILD = """
import resource, sys
import torch
from mpo.training.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    return [torch.ones(1 << 24) for _ in range(2)]  # larger than what glibc keeps by itself
step()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# The least of several steps: the first ones fill the heap, and a system short of memory may take pages away at any time.
print(min(faults() for _ in range(8)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is on Linux only")
def test_memory_freed_by_a_step_is_taken_again_without_new_page_faults() -> None:
    def faults(mode: str) -> int:
        child = subprocess.run(
            [sys.executable, "-c", _CHILD, mode], capture_output=True, text=True, check=True
        )
        return int(child.stdout)

    assert faults("keep") < 1000 < faults("return")
