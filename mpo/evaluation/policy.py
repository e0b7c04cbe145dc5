"""A model with its adapter and tokenizer, loaded as a choice says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mpo.errors import ConfigError
from mpo.evaluation.engines import ModelChoice
from mpo.modeling.loading import (
    ModelSource,
    adapter_settings,
    load_adapter,
    load_config,
    load_model,
    load_tokenizer,
    pick_attention,
    pick_device,
    pick_dtype,
)


@dataclass(frozen=True)
class Policy:
    """What a measurement in this process works on.

    Attributes:
        model: The model in eval mode on its device, with its adapter.
        tokenizer: Its tokenizer.
        device: Where it is.
        dtype: Type of its weights.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: str


def load_policy(choice: ModelChoice) -> Policy:
    """Load a model and its adapter through transformers.

    Raises:
        ConfigError: The choice is of another engine.
        MPOError: Model or adapter cannot be used; found out before weights are loaded where possible.
    """
    if choice.engine != "transformers":
        raise ConfigError(
            f"engine: this measurement needs the model's probabilities in this process, so the engine is "
            f"`transformers`; got {choice.engine!r}."
        )
    device = pick_device(choice.device)
    dtype = choice.dtype or pick_dtype(device)
    source = ModelSource(choice.model, choice.revision, choice.trust_remote_code)
    config = load_config(source)
    if choice.adapter is not None:
        adapter_settings(choice.adapter, revision=choice.adapter_revision)
    tokenizer = load_tokenizer(source, choice.chat_template)
    attention = pick_attention(config, choice.attn_implementation, layout="padded", gpu=True)
    print(f"Loading {choice.adapter or choice.model}", flush=True)
    model: Any = load_model(source, dtype=dtype, attn_implementation=attention, device_map={"": device})
    if choice.adapter is not None:
        model = load_adapter(model, choice.adapter, revision=choice.adapter_revision)
    return Policy(model.eval(), tokenizer, device, dtype)
