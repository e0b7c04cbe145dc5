"""Who a model is: the content of its weights and every setting that changes what it computes, never its name alone.

Whatever is kept for later (reference values, answers, embeddings, results of a suite) is kept under this identity.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

from mpo.errors import ModelError
from mpo.modeling.loading import ModelSource, file_of

_CHUNK = 1 << 24

_INERT = {
    "_name_or_path",
    "architectures",
    "auto_mapping",
    "base_model_name_or_path",
    "dtype",
    "inference_mode",
    "lora_dropout",
    "pad_token_id",
    "peft_version",
    "revision",
    "task_type",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Entries of a config.json or adapter_config.json that change nothing that weights of a known type compute."""

_UNORDERED = {"target_modules", "exclude_modules", "modules_to_save"}
"""Entries that PEFT keeps as sets and saves in whatever order they have."""


@dataclass(frozen=True)
class ModelIdentity:
    """What tells one computation from another. Two models with equal identities compute the same.

    Attributes:
        model: The model without its adapter: ``files:CONTENT:SETTINGS`` (hashes of the safetensors and of the
            configuration, quantization included), ``hub:NAME@COMMIT``, ``tensors:CONTENT:SETTINGS`` of a model in memory,
            or ``unknown:...``, which equals no other.
        adapter: The same of the adapter that is switched on; None without one.
        tokenizer: Hash of the tokenizer's content; None where the token ids themselves are known.
        chat_template: Hash of the chat template, likewise.
        chat_template_kwargs: Extra arguments of the chat template.
        dtype: Type of the weights.
        attention: Attention implementation; None for the model's own.
    """

    model: str
    adapter: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    dtype: str | None = None
    attention: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The attributes, ready for JSON."""
        return asdict(self)

    @property
    def digest(self) -> str:
        """Hash of all of it, 32 hexadecimal digits."""
        return hash_settings(self.to_dict())


def identify_files(name: str, settings_file: str, revision: str | None = None) -> str:
    """A model or an adapter that is read from files, see :attr:`ModelIdentity.model`.

    Args:
        name: Folder or Hub name.
        settings_file: ``config.json`` or ``adapter_config.json``.
        revision: On the Hub.

    Raises:
        ModelError: The folder has no safetensors file, or its settings cannot be read.
    """
    if not os.path.isdir(name):
        return f"hub:{name}@{hub_commit(name, settings_file, revision)}"
    folder = Path(name)
    settings = _read_json(folder / settings_file)
    if (folder / "generation_config.json").is_file():  # which tokens end an answer
        settings["generation"] = _read_json(folder / "generation_config.json").get("eos_token_id")
    return f"files:{fingerprint_folder(folder)}:{hash_settings(computing_settings(settings))}"


def hub_commit(name: str, file: str, revision: str | None = None) -> str | None:
    """The commit that a file of a Hub repository is read from; None for a folder, or where the file is not there."""
    found = None if os.path.isdir(name) else file_of(name, file, revision=revision)
    return None if found is None else found.parent.name  # the cache calls its folders so


def identify_module(
    model: Any, *, adapter_on: bool = True, files: ModelSource | None = None
) -> ModelIdentity:
    """The identity of a model in memory, with the adapter that is on it.

    Args:
        model: A causal language model or a PEFT model of one.
        adapter_on: False where the model computes with its adapter switched off.
        files: Where the base model's weights were read from, if they are still the same: spares hashing them in memory.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    settings = hash_settings(computing_settings(json.loads(base.config.to_json_string(use_diff=False))))
    if files is not None and files.is_local:
        weights = f"files:{fingerprint_folder(Path(files.name))}:{settings}"
    elif files is not None and (commit := hub_commit(files.name, "config.json", files.revision)):
        weights = f"hub:{files.name}@{commit}:{settings}"
    else:
        tensors = fingerprint_module(model)
        # Partitioned weights cannot be told apart here, so nothing is ever found under their identity.
        weights = f"tensors:{tensors}:{settings}" if tensors else f"unknown:{os.urandom(16).hex()}"
    return ModelIdentity(
        weights,
        adapter=hash_settings(list(_adapter_state(model))) if adapter_on and base is not model else None,
        dtype=str(base.dtype).removeprefix("torch."),
        attention=base.config.get_text_config()._attn_implementation,
    )


def _adapter_state(model: Any) -> Iterator[Any]:
    """What an adapter's tensors are computed with: its configuration, and what was switched or scaled since."""
    for name, config in sorted(model.peft_config.items()):
        yield name, computing_settings(config.to_dict())
    for name, module in model.named_modules():
        if hasattr(module, "active_adapters") and isinstance(getattr(module, "scaling", None), dict):
            yield (
                name,
                module.active_adapters,
                module.scaling,
                module.disable_adapters,
                module.merged_adapters,
            )


def computing_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a configuration that change what is computed, ready for JSON: no paths, no library versions."""
    return {
        key: sorted(value)
        if key in _UNORDERED and not isinstance(value, (str, type(None)))
        else _plain(value)
        for key, value in settings.items()
        if key not in _INERT
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return computing_settings(value)
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def hash_settings(settings: Any) -> str:
    """Hash of anything that is ready for JSON, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(json.dumps(settings, sort_keys=True, default=str).encode("utf-8"))


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that turns a text into token ids and back, the chat template left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = json.dumps(sorted(tokenizer.get_vocab().items()))
    else:
        if backend.truncation is not None or backend.padding is not None:  # set by whoever called it last
            backend = type(backend).from_str(backend.to_str())
            backend.no_truncation()
            backend.no_padding()
        content = backend.to_str()
    special = {
        name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"
    }
    return hash_settings([content, special])


def fingerprint_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Hash of the tokenizer's chat template, None without one."""
    return hash_settings(str(tokenizer.chat_template)) if tokenizer.chat_template else None


def fingerprint_folder(folder: Path) -> str:
    """Hash of a model folder's safetensors shards, by content. Each is read once per process, until it changes.

    Raises:
        ModelError: The folder has no safetensors file.
    """
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ModelError(
            f"'{folder}' has no *.safetensors file; weights in other formats are not read. Save the model again with "
            "`save_pretrained`."
        )
    digest = xxhash.xxh3_128()
    for shard in shards:
        status = shard.stat()
        digest.update(shard.name.encode())
        digest.update(_hash_unchanged_file(shard.resolve(), status.st_size, status.st_mtime_ns).encode())
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _hash_unchanged_file(path: Path, size: int, mtime_ns: int) -> str:
    return hash_file(path)


def fingerprint_module(module: nn.Module) -> str | None:
    """Hash of a module's tensors, or None where they are partitioned over ranks (then no two hashes would agree)."""
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
    """Hash of a file's content, 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is damaged: expected a JSON object.")
    return content
