"""Memory that a step frees stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

_CHILD = """
import resource
import torch
from mpo.training.allocator import keep_freed_memory
def step():
    return [torch.ones(1 << 24) for _ in range(2)]  # larger than what glibc keeps by itself
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# The least of several steps: the first ones fill the heap, and a system short of memory may take pages away at any time.
print(min(faults() for _ in range(8)))
assert keep_freed_memory()
print(min(faults() for _ in range(8)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is on Linux only")
def test_memory_freed_by_a_step_is_taken_again_without_new_page_faults() -> None:
    child = subprocess.run([sys.executable, "-c", _CHILD], capture_output=True, text=True, check=True)
    returned, kept = map(int, child.stdout.split())
    assert kept < 1000 < returned
