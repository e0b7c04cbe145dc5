"""Options of the step that need a package or a device, checked before any time is spent on them."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

from mpo.errors import ConfigError, DependencyError

# Optimizers of bitsandbytes whose names do not say so.
_BITSANDBYTES = ("adamw_8bit", "ademamix", "ademamix_8bit", "lion_8bit", "lion_32bit")
_TORCHAO = ("adamw_torch_4bit", "adamw_torch_8bit")


def keep_to_one_gpu() -> None:
    """Keeps a single process to one GPU: with several, transformers would split batches over them (DataParallel)."""
    if "WORLD_SIZE" in os.environ or os.environ.get("ACCELERATE_USE_CPU"):
        return
    if torch.cuda.device_count() > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        print(
            "Several GPUs are visible; one process uses one of them. For all of them: accelerate launch "
            "scripts/train.py RECIPE ..."
        )


def check_compute_options(
    args: Any, *, load_in_4bit: bool = False, load_in_8bit: bool = False, on_this_machine: bool = True
) -> None:
    """Make sure that the packages and the device are there which the options of the step ask for.

    Args:
        args: An ``MPOConfig``.
        load_in_4bit, load_in_8bit: Whether the base model is quantised by bitsandbytes.
        on_this_machine: False for a run that is only planned, perhaps for another machine: devices are not looked at.

    Raises:
        DependencyError: A package is missing, or needs a GPU that is not there.
        ConfigError: An option means nothing on this device.
    """
    gpu = not on_this_machine or (torch.cuda.is_available() and not args.use_cpu)
    optimizer = str(getattr(args.optim, "value", args.optim))
    bitsandbytes = optimizer in _BITSANDBYTES or "bnb" in optimizer or optimizer.startswith("paged_")
    for setting, wanted in (
        ("load_in_4bit", load_in_4bit),
        ("load_in_8bit", load_in_8bit),
        (f"optim: {optimizer}", bitsandbytes),
    ):
        if wanted:
            require_package("bitsandbytes", setting, "quantization")
            _require_gpu(gpu, setting, "bitsandbytes")
    if optimizer in _TORCHAO:
        require_package("torchao", f"optim: {optimizer}", None)
    if args.use_liger_kernel:
        require_package("liger_kernel", "use_liger_kernel", "liger")
        _require_gpu(gpu, "use_liger_kernel", "liger-kernel")
    if (
        args.activation_offloading
        and on_this_machine
        and (args.use_cpu or not torch.accelerator.is_available())
    ):
        raise ConfigError(
            "`activation_offloading` moves activations from an accelerator to the CPU's memory, and there is no "
            "accelerator here. Remove it; `gradient_checkpointing: true` saves memory anywhere."
        )


def require_package(module: str, setting: str, extra: str | None) -> None:
    """Make sure that an optional package is installed.

    Args:
        module: Its import name.
        setting: What asks for it.
        extra: The extra of this distribution that brings it, if one does.

    Raises:
        DependencyError: It is not installed; says how to install it.
    """
    if is_installed(module):
        return
    name = module.replace("_", "-")
    ways = f"`pip install {name}`" + (f" or `pip install 'mpo-align[{extra}]'`" if extra else "")
    raise DependencyError(
        f"`{setting}` needs the package {name}, which is not installed. Install it with {ways}, or remove the setting."
    )


def is_installed(module: str) -> bool:
    """Whether a module could be imported; it is not."""
    return importlib.util.find_spec(module) is not None


def _require_gpu(gpu: bool, setting: str, package: str) -> None:
    if not gpu:
        raise DependencyError(
            f"`{setting}` needs {package} with a GPU, and this machine has none that torch can use. Remove the setting, "
            "or train on a machine with a GPU."
        )
