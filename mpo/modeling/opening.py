"""Opening a model with its adapter, tokenizer and chat template: what can fail without weights fails before they are read.

An adapter is measured as it was trained: its folder's tokenizer, chat template and `chat_template_kwargs` come before those
of its base model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from mpo.common.log import get_logger
from mpo.data.tokenization import set_chat_template
from mpo.errors import ModelError
from mpo.modeling.identity import (
    ModelIdentity,
    fingerprint_folder,
    fingerprint_template,
    fingerprint_tokenizer,
    identify_files,
)
from mpo.modeling.loading import (
    ModelSource,
    adapter_settings,
    file_of,
    load_adapter,
    load_config,
    load_model,
    load_tokenizer,
    pick_attention,
    pick_device,
    pick_dtype,
)

logger = get_logger(__name__)


@dataclass(frozen=True)
class OpenedModel:
    """A model that can be used, with its adapter if it has one. Its weights are not read yet.

    Attributes:
        source: Where the model comes from.
        adapter: Folder or Hub name of the adapter, or None.
        adapter_revision: Of the adapter on the Hub.
        config: The model's configuration.
        adapter_settings: The adapter's, None without one.
        tokenizer: With a chat template, where one is needed.
        chat_template_kwargs: Extra arguments of the chat template.
        device: Where it will be.
        dtype: Type of its weights.
        attention: Its attention implementation; None for the model's own.
        trained: Whether it is to be trained; then the library, or who trains it, decides where it goes.
    """

    source: ModelSource
    adapter: str | None
    adapter_revision: str | None
    config: PretrainedConfig
    adapter_settings: Mapping[str, Any] | None
    tokenizer: PreTrainedTokenizerBase
    chat_template_kwargs: dict[str, Any]
    device: torch.device
    dtype: str | torch.dtype
    attention: str | None
    trained: bool = False

    def identity(self, *, with_adapter: bool = True) -> ModelIdentity:
        """Who this is. Reads every byte of weights in a folder, once per process.

        Args:
            with_adapter: False for the model with its adapter switched off.
        """
        adapter = None
        if self.adapter is not None and with_adapter:
            adapter = identify_files(self.adapter, "adapter_config.json", self.adapter_revision)
        stored = self.config.dtype if self.dtype == "auto" else None
        return ModelIdentity(
            identify_files(self.source.name, "config.json", self.source.revision),
            adapter,
            fingerprint_tokenizer(self.tokenizer),
            fingerprint_template(self.tokenizer),
            self.chat_template_kwargs,
            str(stored or self.dtype).removeprefix("torch."),
            self.attention,
        )

    def load(self, *, with_adapter: bool = True, **init_kwargs: Any) -> Any:
        """Reads the weights.

        Args:
            with_adapter: False for the model alone; :meth:`put_adapter` adds the adapter later.
            init_kwargs: Further arguments of :func:`mpo.modeling.loading.load_model`.

        Returns:
            The model with its adapter switched on; in evaluation mode on its device where it is not to be trained.

        Raises:
            ModelError: The weights cannot be read, or do not fit.
        """
        placement = {} if self.trained else {"device_map": {"": self.device}}
        model = load_model(
            self.source,
            dtype=self.dtype,
            attn_implementation=self.attention,
            **{**placement, **init_kwargs},
        )
        return self.put_adapter(model) if with_adapter and self.adapter is not None else model

    def put_adapter(self, model: Any) -> Any:
        """Puts the adapter on the loaded model.

        Raises:
            ModelError: It does not fit.
        """
        assert self.adapter is not None
        return load_adapter(model, self.adapter, trainable=self.trained, revision=self.adapter_revision)


def open_model(
    source: ModelSource,
    *,
    adapter: str | None = None,
    adapter_revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    needs_template: bool = True,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    layout: str = "padded",
    trained: bool = False,
    compiled: bool = False,
) -> OpenedModel:
    """Finds a model, its adapter and its tokenizer, and checks everything that can be checked without their weights.

    Args:
        source: Where the model comes from.
        adapter: Folder or Hub name of a PEFT adapter to put on it.
        adapter_revision: Of the adapter on the Hub.
        tokenizer: One that is at hand already, in place of the model's or the adapter's.
        chat_template: Jinja text or a file, in place of the model's or the adapter's.
        chat_template_kwargs: Extra arguments of the chat template; None for those that the adapter or the model was
            trained with, as its ``recipe.yaml`` says.
        needs_template: False for reading texts as they are.
        dtype: Type of the weights, ``"auto"`` for that of the checkpoint; by default bfloat16 on a GPU that has it, else
            float32.
        device: By default a GPU where there is one.
        attn_implementation, layout, compiled: See :func:`mpo.modeling.loading.pick_attention`.
        trained: Whether it is to be trained: `flex_attention` has no backward pass on a CPU, and trainers place models.

    Raises:
        MPOError: Model, adapter or tokenizer cannot be used, or a setting cannot work.
    """
    place = pick_device(str(device) if device is not None else None)
    config = load_config(source)
    settings = None
    if adapter is not None:
        settings = adapter_settings(adapter, revision=adapter_revision)
        said = another_base(adapter, settings, source)
        if said:
            logger.warning_once(said)
    if tokenizer is None:
        tokenizer = open_tokenizer(
            source,
            config,
            adapter,
            adapter_revision=adapter_revision,
            chat_template=chat_template,
            needs_template=needs_template,
        )
    if chat_template_kwargs is None:
        chat_template_kwargs = trained_template_kwargs(source, adapter, adapter_revision=adapter_revision)
    attention = pick_attention(
        config,
        attn_implementation,
        layout=layout,
        gpu=not trained or place.type != "cpu",
        compiled=compiled,
    )
    return OpenedModel(
        source,
        adapter,
        adapter_revision,
        config,
        settings,
        tokenizer,
        dict(chat_template_kwargs),
        place,
        dtype or pick_dtype(place),
        attention,
        trained,
    )


def open_tokenizer(
    source: ModelSource,
    config: PretrainedConfig,
    adapter: str | None = None,
    *,
    adapter_revision: str | None = None,
    chat_template: str | None = None,
    needs_template: bool = True,
) -> PreTrainedTokenizerBase:
    """The tokenizer and chat template that a model or its adapter was trained with.

    Args:
        source: Where the model comes from.
        config: The model's configuration.
        adapter: Folder or Hub name of an adapter; what it brings comes before what the model has.
        adapter_revision: Of the adapter on the Hub.
        chat_template: Comes before both.
        needs_template: False where no chat template is needed.

    Raises:
        ModelError: There is no tokenizer, or no chat template.
    """
    if adapter is None:
        return load_tokenizer(source, chat_template, needs_template=needs_template)
    own = source
    if file_of(adapter, "tokenizer_config.json", revision=adapter_revision) is not None:
        own = ModelSource(adapter, adapter_revision, source.trust_remote_code)
    tokenizer = load_tokenizer(own, needs_template=False, config=config)
    if chat_template is None:
        kept = file_of(adapter, "chat_template.jinja", revision=adapter_revision)
        if kept is not None:
            chat_template = str(kept)
        elif not tokenizer.chat_template and own is not source:
            tokenizer.chat_template = load_tokenizer(source, needs_template=False).chat_template
    if needs_template:
        set_chat_template(tokenizer, chat_template, f"The tokenizer of {own.name}")
    return tokenizer


def trained_template_kwargs(
    source: ModelSource, adapter: str | None = None, *, adapter_revision: str | None = None
) -> dict[str, Any]:
    """`chat_template_kwargs` of the ``recipe.yaml`` that training has left beside the adapter or else the model.

    Raises:
        ModelError: The recipe is damaged.
    """
    for name, revision in ((adapter, adapter_revision), (source.name, source.revision)):
        path = file_of(name, "recipe.yaml", revision=revision) if name is not None else None
        if path is None:
            continue
        try:
            recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
            return dict((recipe.get("chat_template_kwargs") if isinstance(recipe, dict) else None) or {})
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            raise ModelError(
                f"{path} is to say with which `chat_template_kwargs` the model was trained, but it is damaged "
                f"({' '.join(str(error).split())}). Repair it, or give `chat_template_kwargs` ({{}} for none)."
            ) from error
    return {}


def named_base(adapter: str, settings: Mapping[str, Any]) -> str | None:
    """Folder or Hub name of the model that an adapter says it was trained on; a folder may lie inside the adapter's."""
    name = settings.get("base_model_name_or_path")
    if name and not os.path.isdir(name) and os.path.isdir(Path(adapter) / name):
        return str(Path(adapter) / name)
    return str(name) if name else None


def another_base(adapter: str, settings: Mapping[str, Any], source: ModelSource) -> str | None:
    """One sentence where an adapter is put on another model than it was trained on; None where it is not known to be.

    Training records the content of the base model's weights in ``provenance.json``. Without it, folders are compared by
    their content, and anything else by name.

    Args:
        adapter: Folder or Hub name of the adapter.
        settings: Its ``adapter_config.json``.
        source: Where the model comes from.
    """
    named = named_base(adapter, settings)
    recorded = _recorded_base(adapter)
    if recorded is not None and source.is_local:
        same = recorded == folder_content(source.name)
    elif named is None or named == source.name:
        same = True
    else:
        same = source.is_local and folder_content(named) == folder_content(source.name)
    if same:
        return None
    if named == source.name:
        return f"The adapter {adapter} was trained on {named}, whose weights have changed since."
    return f"The adapter {adapter} was trained on {named} and is put on another model, {source.name}."


def folder_content(folder: str) -> str | None:
    """Hash of a folder's weights; None for a name on the Hub, or a folder that is gone."""
    has_weights = os.path.isdir(folder) and any(Path(folder).glob("*.safetensors"))
    return fingerprint_folder(Path(folder)) if has_weights else None


def _recorded_base(adapter: str) -> str | None:
    path = file_of(adapter, "provenance.json")
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    except (OSError, ValueError):
        return None
    recorded = found.get("base_model_weights") if isinstance(found, dict) else None
    return recorded if isinstance(recorded, str) else None
