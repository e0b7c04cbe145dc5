"""What ``accelerate launch`` has told this process."""

from __future__ import annotations

import os

import torch

from mpo.errors import ConfigError
from mpo.training.compute import is_installed


def launched_with(engine: str) -> bool:
    """Whether ``accelerate launch`` was given a configuration of ``"DEEPSPEED"`` or ``"FSDP"``."""
    return _is_set(f"ACCELERATE_USE_{engine}")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true")


def deepspeed_backend(use_cpu: bool) -> str | None:
    """What DeepSpeed's processes communicate with where it has to be said, before they begin to.

    Without an accelerator that is gloo: left to themselves, Accelerate takes the processes for single ones. DeepSpeed's own
    sum over shared memory, which it compiles for a minute or more on its first start, is left out.

    Args:
        use_cpu: Whether the settings ask for the CPU.

    Returns:
        A backend of torch, or None to leave it to Accelerate.

    Raises:
        ConfigError: The CPU is asked for, where Accelerate sets DeepSpeed aside.
    """
    if not launched_with("DEEPSPEED"):
        return None
    if use_cpu or _is_set("ACCELERATE_USE_CPU"):
        raise ConfigError(
            "the Accelerate configuration asks for DeepSpeed, which Accelerate sets aside under `use_cpu` "
            "(ACCELERATE_USE_CPU). Remove that: without a GPU, DeepSpeed takes the CPU by itself."
        )
    if torch.accelerator.is_available():
        return None
    if is_installed("deepspeed"):  # where it is not, its absence is reported later
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return "gloo"
