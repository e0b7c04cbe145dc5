"""Folds an adapter into its base model, so that the result loads without PEFT."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch

from mpo.errors import ConfigError, ModelError, MPOError, StorageError
from mpo.modeling.loading import (
    ModelSource,
    adapter_settings,
    is_quantized,
    load_adapter,
    load_config,
    load_model,
    load_tokenizer,
)

DTYPES = ("auto", "bfloat16", "float16", "float32")


def merge_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Folds an adapter into its base model and saves the result as safetensors, with tokenizer and generation settings.

    The sums are made in float32 and rounded once, when saving, which takes 4 bytes of main memory per weight. The folder
    appears only when it is complete.

    Args:
        adapter: folder of the adapter, or its name on the Hub.
        out: folder to write; it must not exist yet, or be empty.
        base: model folder or Hub name, where it is not the one that the adapter names.
        dtype: type of the saved weights: ``"auto"`` (that of the base, the default), ``"bfloat16"``, ``"float16"`` or
            ``"float32"``.
        revision: of the base model; that which the adapter names by default.
        trust_remote_code: run code that the base model brings.

    Returns:
        The folder.

    Raises:
        ModelError: the adapter or its base cannot be opened, do not fit, or the base is quantised.
        StorageError: the folder is not empty or cannot be written.
        ConfigError: ``dtype`` is unknown.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"`dtype` is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    target = Path(out)
    _check_target(target)
    settings = adapter_settings(str(adapter))
    name = base or settings.get("base_model_name_or_path")
    if not name:
        raise ModelError(
            f"The adapter {adapter} does not say which model it was made from. Name it with `--base`."
        )
    if base is None and not os.path.isdir(name) and os.path.isdir(Path(adapter) / name):
        name = str(Path(adapter) / name)
    source = ModelSource(
        str(name), revision or (None if base else settings.get("revision")), trust_remote_code
    )
    try:
        config = load_config(source)
    except ModelError as error:
        if base is None:
            raise ModelError(
                f"{error} The adapter {adapter} names it as its base; `--base` names another."
            ) from error
        raise
    if is_quantized(config):
        raise ModelError(
            f"{name} is quantised: folding an adapter into rounded weights changes what it was trained to do. Pass the "
            "unquantised model with `--base`."
        )
    stored = str(config.dtype or torch.float32).removeprefix("torch.")
    wanted = getattr(torch, stored if dtype in (None, "auto") else str(dtype))
    try:
        tokenizer = load_tokenizer(ModelSource(str(adapter)))
    except ModelError:  # an adapter that was saved without one
        tokenizer = load_tokenizer(source)
    model = load_model(source, dtype="float32", device_map=None)
    merged = load_adapter(model, str(adapter)).merge_and_unload(safe_merge=True)
    merged = merged.to(wanted)
    merged.config.dtype = wanted

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        os.chmod(partial, 0o755)
        if target.exists():
            target.rmdir()
        os.replace(partial, target)
    except Exception as error:
        if isinstance(error, OSError) or "No space left" in str(error):
            raise StorageError(f"The merged model cannot be written to {target}: {error}") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _describe(Path(adapter), target, str(name))
    return target


def _check_target(target: Path) -> None:
    if target.is_dir() and any(target.iterdir()):
        raise StorageError(f"{target} is not empty. Choose a folder that does not exist yet.")
    if target.exists() and not target.is_dir():
        raise StorageError(f"{target} is a file. Choose a folder that does not exist yet.")
    parent = target.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise StorageError(f"{target} cannot be written: no permission in {parent}. Choose another folder.")


def _describe(adapter: Path, folder: Path, base: str) -> None:
    """Takes the adapter's measurements along, which hold for the merged model, too, and writes its card."""
    for name in ("metrics.json", "provenance.json", "recipe.yaml", "reward_gap.png", "training_curve.png"):
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, folder / name)
    if not (folder / "metrics.json").is_file():
        return
    from mpo.common.provenance import Provenance
    from mpo.common.typed_json import read_typed
    from mpo.evaluation.results import TrainingMetrics
    from mpo.report.card import write_card

    try:
        metrics = read_typed(folder / "metrics.json", TrainingMetrics)
        made = folder / "provenance.json"
        provenance = read_typed(made, Provenance) if made.is_file() else {}
        before, after = metrics.before, metrics.after
        if before is None or after is None:
            return
        first, last = (metrics.retention_loss.get(when) for when in ("before", "after"))
        card = write_card(
            folder,
            base_model=base,
            peft=False,
            languages=[row.language for row in after.targets],
            source_language=after.source.language if after.source is not None else "en",
            before=before,
            after=after,
            recipe_yaml=_text(folder / "recipe.yaml"),
            provenance=provenance,
            retention=None if first is None or last is None else (first, last),
        )
    except MPOError as error:
        print(f"The merged model has no card, since the adapter's measurements cannot be used: {error}")
        return
    text = card.read_text(encoding="utf-8")
    card.write_text(text.replace("A full fine-tune of", "A LoRA adapter folded into", 1), encoding="utf-8")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
