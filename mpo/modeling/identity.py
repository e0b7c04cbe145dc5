"""What tells one model from another: the content of its weights, or its commit on the Hub, never its name alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig

from mpo.errors import ModelError
from mpo.modeling.loading import ModelSource

_CHUNK = 1 << 24


def model_identity(source: ModelSource, config: PretrainedConfig) -> dict[str, Any]:
    """Hash of a folder's weights, or name and commit of a model on the Hub.

    Args:
        source: Where the model comes from.
        config: Its configuration, which knows the commit.
    """
    if source.is_local:
        return {"weights": fingerprint_folder(Path(source.name))}
    return {"hub": source.name, "commit": getattr(config, "_commit_hash", None) or source.revision}


def adapter_identity(adapter: str | None, revision: str | None) -> dict[str, Any] | None:
    """As :func:`model_identity`, for an adapter; None without one."""
    if adapter is None:
        return None
    if os.path.isdir(adapter):
        return {"weights": fingerprint_folder(Path(adapter))}
    from transformers.utils import cached_file, extract_commit_hash

    found = cached_file(adapter, "adapter_config.json", revision=revision)
    return {"hub": adapter, "commit": extract_commit_hash(found, None) or revision}


def fingerprint_folder(folder: Path) -> str:
    """
    Hash of a model folder's safetensors shards, by content.

    Raises:
        ModelError: the folder has no safetensors file.
    """
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ModelError(f"'{folder}' has no *.safetensors file; weights in other formats are not read.")
    digest = xxhash.xxh3_128()
    for shard in shards:
        digest.update(shard.name.encode())
        digest.update(hash_file(shard).encode())
    return digest.hexdigest()


def fingerprint_module(module: nn.Module) -> str | None:
    """
    Hash of a module's tensors, or None where they are partitioned over ranks (then no two hashes would agree).
    """
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        return None  # a state_dict would give up gathered weights, here on one rank only, and set the ranks apart
    digest = xxhash.xxh3_128()
    # `keep_vars`, since a detached tensor no longer says that ZeRO-3 has divided it.
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        if not isinstance(tensor, torch.Tensor) or hasattr(tensor, "ds_id") or tensor.is_meta:
            return None
        if type(tensor) not in (torch.Tensor, nn.Parameter) and hasattr(tensor, "full_tensor"):
            return None
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
