"""Folds an adapter into its base model, so that the result loads without PEFT."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from mpo.common.files import is_full_disk, whole_folder
from mpo.data.tokenization import render
from mpo.errors import ConfigError, ModelError, StorageError
from mpo.modeling.loading import ModelSource, adapter_settings, is_quantized, load_config, load_model
from mpo.modeling.opening import OpenedModel, another_base, named_base, open_model
from mpo.report.card import write_merged_card

DTYPES = ("auto", "bfloat16", "float16", "float32")

# Far above the rounding of float32, in which both sides compute, and far below what a module that is left out changes.
_TOLERANCE = 5e-4
_TEXTS = (
    "Good morning, how are you?",
    "\u4f60\u597d\uff0c\u8bf7\u95ee\u4f60\u53eb\u4ec0\u4e48\u540d\u5b57\uff1f",
    "Habari ya asubuhi?",
)


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
    appears only when it is complete and the model in it computes what the adapter computes: on a few prompts the logits
    are compared, before the rounding with the adapter's and after it with those of the files.

    Args:
        adapter: Folder of the adapter, or its name on the Hub.
        out: Folder to write; it must not exist yet, or be empty.
        base: Model folder or Hub name, where it is not the one that the adapter names.
        dtype: Type of the saved weights: ``"auto"`` (that of the base, the default), ``"bfloat16"``, ``"float16"`` or
            ``"float32"``.
        revision: Of the base model; that which the adapter names by default.
        trust_remote_code: Run code that the base model brings.

    Returns:
        The folder.

    Raises:
        ModelError: The adapter or its base cannot be opened, do not fit, or the base is quantised; the base that the
            adapter names has changed since; the adapter cannot be folded in, or the result computes something else.
        StorageError: The folder is not empty or cannot be written.
        ConfigError: ``dtype`` is unknown.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"`dtype` is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    target = Path(out)
    _check_target(target)
    settings = adapter_settings(str(adapter))
    name = base or named_base(str(adapter), settings)
    if not name:
        raise ModelError(
            f"The adapter {adapter} does not say which model it was made from. Name it with `--base`."
        )
    source = ModelSource(name, revision or (None if base else settings.get("revision")), trust_remote_code)
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
    if base is None and (said := another_base(str(adapter), settings, source)):
        raise ModelError(f"{said} Name the model to fold it into all the same with `--base`.")
    # The weights are the same whatever the template is given, so a damaged recipe beside the adapter is no obstacle.
    opened = open_model(source, adapter=str(adapter), chat_template_kwargs={}, dtype="float32", device="cpu")
    stored = str(config.dtype or torch.float32).removeprefix("torch.")
    wanted = getattr(torch, stored if dtype in (None, "auto") else str(dtype))
    prompts = _prompts(opened)
    merged = _fold(opened, prompts)
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(wanted).float()
    expected = _logits(merged, prompts)
    merged = merged.to(wanted)
    merged.config.dtype = wanted
    with whole_folder(target) as partial:
        try:
            merged.save_pretrained(partial)
            opened.tokenizer.save_pretrained(partial)
        except Exception as error:
            if isinstance(error, OSError) or is_full_disk(error):
                raise StorageError(f"The merged model cannot be written to {target}: {error}") from error
            raise
        del merged
        saved = load_model(ModelSource(str(partial), None, trust_remote_code), device_map=None)
        _require_equal(_logits(saved, prompts), expected, str(adapter), "read from its files")
        write_merged_card(
            partial, adapter=Path(adapter), base_model=name, adapter_settings=settings, name=target.name
        )
    return target


def _fold(opened: OpenedModel, prompts: list[Tensor]) -> Any:
    """The base model in float32 with the adapter folded into its weights."""
    policy = opened.load(device_map=None)
    expected = _logits(policy, prompts)
    _untie(policy)
    try:
        merged = policy.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise ModelError(
            f"The adapter {opened.adapter} cannot be folded into weights: {error} Use it as an adapter."
        ) from error
    _require_equal(_logits(merged, prompts), expected, str(opened.adapter), "folded in")
    return merged


def _untie(policy: Any) -> None:
    """Gives the LM head weights of its own where it shares those of an embedding and the adapter changes one of the two."""
    base = policy.get_base_model()
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    inner, head = (_without_adapter(module) for module in ends)
    if inner.weight is head.weight and any(isinstance(module, BaseTunerLayer) for module in ends):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def _without_adapter(module: Any) -> Any:
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _prompts(opened: OpenedModel) -> list[Tensor]:
    """Token ids of a few chats, and of tokens from all over the vocabulary, those first that the adapter trains."""
    chats = [
        render(opened.tokenizer, [{"role": "user", "content": text}], opened.chat_template_kwargs)
        for text in _TEXTS
    ]
    assert opened.adapter_settings is not None
    trained = opened.adapter_settings.get("trainable_token_indices") or []
    if isinstance(trained, dict):
        trained = [token for tokens in trained.values() for token in tokens]
    vocabulary = opened.config.get_text_config().vocab_size
    special = {*opened.tokenizer.all_special_ids}
    spread = [token for token in range(0, vocabulary, max(vocabulary // 32, 1)) if token not in special]
    return [torch.tensor(ids) for ids in (*chats, [*trained[:32], *spread])]


def _logits(model: Any, prompts: list[Tensor]) -> list[Tensor]:
    """[tokens, vocabulary] of each prompt."""
    with torch.no_grad():
        return [model.eval()(input_ids=ids[None]).logits[0].float() for ids in prompts]


def _require_equal(found: list[Tensor], expected: list[Tensor], adapter: str, how: str) -> None:
    for own, other in zip(expected, found, strict=True):
        # The median over tokens: in a mixture of experts, rounding may send a single one to another expert.
        difference = ((other - own).norm(dim=-1) / own.norm(dim=-1)).median().item()
        if not difference < _TOLERANCE:
            raise ModelError(
                f"The adapter {adapter}, {how}, gives logits that differ by {difference:.2%} from its own. Rounding does not "
                "explain that: the merged model would be another one. Nothing is written; use the adapter as it is."
            )


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
