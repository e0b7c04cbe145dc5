"""What a bug report needs to say of a machine: versions, devices, memory, disk, extras and environment variables."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mpo
from mpo.common.machine import accelerators, cores, free_disk, main_memory, unused_gpu
from mpo.common.provenance import library_versions, processor_name
from mpo.common.recipe_files import recipe_folder
from mpo.common.redaction import redact
from mpo.common.tables import fact_lines
from mpo.common.words import size

EXTRAS = {
    "deepspeed": ("deepspeed",),
    "liger": ("liger_kernel",),
    "vllm": ("vllm",),
    "quantization": ("bitsandbytes",),
    "eval": ("lm_eval",),
    "build": ("sacrebleu",),
    "embeddings": ("sentence_transformers",),
    "search": ("optuna",),
    "plots": ("matplotlib", "PIL"),
    "analysis": ("matplotlib", "PIL", "sklearn"),
    "trackers": ("tensorboard", "trackio", "wandb"),
    "demo": ("gguf", "matplotlib"),
    "docs": ("material", "mkdocs", "mkdocstrings"),
}
"""The extras of the distribution that users install, each with the modules that it brings."""

_VARIABLES = re.compile(
    r"(ACCELERATE|CUDA|FSDP|GLOO|HF|HIP|HUGGINGFACE|HUGGING_FACE|MKL|MPO|NCCL|NVIDIA|OMP|OPENAI|PYTORCH|ROCR|TENSORBOARD"
    r"|TOKENIZERS|TORCH|TORCHINDUCTOR|TQDM|TRANSFORMERS|TRITON|TRL|VLLM|WANDB|XLA)_\w+|RANK|WORLD_SIZE|LOCAL_RANK"
    r"|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|SLURM_JOB_ID|SLURM_NNODES|PYTHONPATH|VIRTUAL_ENV|CONDA_PREFIX|TMPDIR"
)


def environment() -> dict[str, Any]:
    """What there is, ready for JSON; secrets, user names and home folders are taken out."""
    import torch

    total, available = main_memory()
    hub = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    found: dict[str, Any] = {
        "mpo": mpo.__version__,
        "installed_in": str(Path(mpo.__file__).parent),
        "recipes": str(recipe_folder() or ""),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "torch_build": {
            "version": str(torch.__version__),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "cudnn": torch.backends.cudnn.version() if accelerators() and torch.version.cuda else None,
        },
        "accelerators": [
            {"name": device.name, "memory": device.memory, "bf16": device.bf16} for device in accelerators()
        ],
        "unused_gpu": unused_gpu(),
        "cpu": processor_name(),
        "cores": cores(),
        "memory": total,
        "memory_available": available,
        "disk_free": {"here": free_disk("."), "hub_cache": free_disk(hub)},
        "libraries": library_versions(),
        "extras": {name: all(map(find_spec, modules)) for name, modules in EXTRAS.items()},
        "variables": {name: os.environ[name] for name in sorted(os.environ) if _VARIABLES.fullmatch(name)},
    }
    shown: dict[str, Any] = redact(found)
    return shown


def environment_text() -> str:
    """The same for people: paste it into a bug report."""
    found = environment()
    build = found["torch_build"]
    kind = (
        f"CUDA {build['cuda']}" if build["cuda"] else f"ROCm {build['hip']}" if build["hip"] else "CPU only"
    )
    devices = [
        f"{device['name']}" + (f", {size(device['memory'])}" if device["memory"] else "")
        for device in found["accelerators"]
    ]
    counted = [f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices)]
    memory = size(found["memory"]) if found["memory"] else "unknown"
    if found["memory_available"]:
        memory += f", {size(found['memory_available'])} available"
    disk = found["disk_free"]
    installed = [name for name, there in found["extras"].items() if there]
    missing = [name for name, there in found["extras"].items() if not there]
    facts = {
        "mpo": f"{found['mpo']} in {found['installed_in']}",
        "Python": f"{found['python']} ({found['executable']})",
        "System": found["platform"],
        "torch": f"{build['version']}, {kind}",
        "Accelerators": "; ".join(counted) or "none",
        "Processor": f"{found['cpu']}, {found['cores']} cores",
        "Memory": memory,
        "Disk": f"{_size(disk['here'])} free here, {_size(disk['hub_cache'])} for the Hub's cache",
        "Recipes": found["recipes"] or "not in this installation",
        "Extras": ", ".join(installed) or "none",
        "Not installed": ", ".join(missing) + " (`pip install 'mpo-align[NAME]'`)" if missing else "nothing",
    }
    parts = [fact_lines(facts)]
    if found["unused_gpu"]:
        parts.append(found["unused_gpu"])
    parts.append("Libraries\n" + _columns(found["libraries"]))
    if found["variables"]:
        parts.append("Environment variables (secrets are hidden)\n" + _columns(found["variables"]))
    return "\n\n".join(parts)


def _size(count: int | None) -> str:
    return "unknown" if count is None else size(count)


def _columns(values: dict[str, str]) -> str:
    return "\n".join(f"  {line}" for line in fact_lines(values).splitlines())
