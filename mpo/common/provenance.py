"""Where a number came from: versions, hardware, data and command, without secrets, user names and home folders."""

from __future__ import annotations

import os
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from typing import Annotated, Any

import mpo
from mpo.common.files import write_json
from mpo.common.redaction import portable_path, redact
from mpo.common.typed_json import NO_KEY_IF_EMPTY, Count, open_mapping

__all__ = ["collect", "portable_path", "redact", "write_json"]

# Everything that takes part in computing a result. Those that are not installed are left out.
_LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "deepspeed",
    "bitsandbytes",
    "liger-kernel",
    "flash-attn",
    "triton",
    "vllm",
    "lm-eval",
    "gguf",
    "py3langid",
    "matplotlib",
    "scikit-learn",
    "scipy",
)

Provenance = Annotated[
    dict[str, Any],
    open_mapping(
        created=str,
        mpo=str,
        precision=str,
        data_fingerprint=str,
        base_model=str,
        adapter=str,
        libraries=dict[str, str],
        devices=Annotated[dict[str, Any], open_mapping(cpu=str, accelerators=dict[str, int])],
    ),
]
"""What :func:`collect` gives, as files hold it."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What every result file says of itself.

    Attributes:
        version: Version of the file's form.
        provenance: Where it was made.
    """

    version: Count = 1
    provenance: Annotated[Provenance, NO_KEY_IF_EMPTY] = field(default_factory=dict)


def collect(
    *,
    seed: int | None = None,
    precision: str | None = None,
    data_fingerprint: str | None = None,
    base_model: str | None = None,
    argv: Sequence[str] | None = None,
    **more: Any,
) -> Provenance:
    """Everything needed to say how a result was made. JSON-ready and safe to publish.

    Args:
        seed: Seed of the run.
        precision: Precision of the run: ``"bf16"``, ``"fp16"``, ``"fp32"``.
        data_fingerprint: Content hash of the data.
        base_model: Hub id or folder of the model; a folder is shown by its path relative to the working folder, or
            its name.
        argv: Command line; that of this process by default.
        more: Further entries, such as the number of training pairs.

    Returns:
        ``{"created", "mpo", "python", "platform", "libraries": {name: version}, "devices": {...}, "processes",
        "precision", "seed", "data_fingerprint", "base_model", "command": [...], **more}``; entries that were not
        given are left out.
    """
    arguments = list(sys.argv if argv is None else argv)
    command = [os.path.basename(arguments[0]), *arguments[1:]] if arguments else []
    if base_model is not None and os.path.exists(os.path.expanduser(base_model)):
        base_model = portable_path(base_model)
    entries: dict[str, Any] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "mpo": mpo.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),  # system and release; unlike platform.node(), no host name
        "libraries": library_versions(),
        "devices": devices(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "precision": precision,
        "seed": seed,
        "data_fingerprint": data_fingerprint,
        "base_model": base_model,
        "command": command,
        **more,
    }
    return {key: value for key, value in redact(entries).items() if value is not None}


def library_versions() -> dict[str, str]:
    """Installed version of every library that takes part in a result, by its distribution name."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def devices() -> dict[str, Any]:
    """Names of the processor and of the accelerators that this process sees, with their number."""
    import torch

    out: dict[str, Any] = {"cpu": processor_name(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        names = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        out["accelerators"] = dict(names)
        out["cuda"] = torch.version.cuda or torch.version.hip
    elif torch.backends.mps.is_available():
        out["accelerators"] = {"Apple Metal": 1}
    return out


def processor_name() -> str:
    """What this machine calls its processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
