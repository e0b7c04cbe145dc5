"""What tells one model from another: the content of its weights, or its commit on the Hub, never its name alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from mpo.model import ModelSource
from mpo.reference import fingerprint_folder


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
