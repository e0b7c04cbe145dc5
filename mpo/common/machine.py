"""The machine that this runs on: accelerators, memory and disk."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Accelerator:
    """A device that torch can use.

    Attributes:
        name: As its driver names it.
        memory: Bytes; None where it shares the main memory.
        bf16: Whether it computes in bfloat16.
    """

    name: str
    memory: int | None
    bf16: bool


@cache
def accelerators() -> tuple[Accelerator, ...]:
    """The accelerators that torch sees in this process; imports torch."""
    import torch

    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        bf16 = torch.cuda.is_bf16_supported()
        return tuple(Accelerator(device.name, device.total_memory, bf16) for device in found)
    if torch.backends.mps.is_available():
        return (Accelerator("Apple Metal", None, False),)
    return ()


def unused_gpu() -> str | None:
    """Why a GPU of this machine cannot be used, where there is one and torch sees none; None otherwise."""
    import torch

    nvidia = os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi") is not None
    amd = os.path.exists("/dev/kfd")
    if not (nvidia or amd) or accelerators():
        return None
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return f"GPUs are hidden from this process: CUDA_VISIBLE_DEVICES is {hidden!r}."
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"This machine has a GPU, but torch {torch.__version__} is a build for CPUs. Install the build for it, see "
            "https://pytorch.org/get-started/locally."
        )
    return "This machine has a GPU, but torch cannot use it; `nvidia-smi` (or `rocm-smi`) says whether its driver works."


def main_memory() -> tuple[int | None, int | None]:
    """Bytes of main memory, and those that are free for use; a limit of the container counts."""
    total = available = None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        known = {
            name: 1024 * int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)
        }
        total, available = known.get("MemTotal"), known.get("MemAvailable")
    except (OSError, ValueError, IndexError):
        if sys.platform == "darwin":
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = int(Path(file).read_text(encoding="ascii"))
        except (OSError, ValueError):  # "max" is no limit
            continue
        if total is None or limit < total:
            total, available = limit, None if available is None else min(available, limit)
    return total, available


def cores() -> int:
    """Processor cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def free_disk(folder: str | Path) -> int | None:
    """Bytes that are free where a folder is, or would be made; None where that cannot be known."""
    place = Path(folder).expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None
