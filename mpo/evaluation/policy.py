"""A model with its adapter and tokenizer, loaded as a choice says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mpo.errors import ConfigError
from mpo.evaluation.engines import ModelChoice


@dataclass(frozen=True)
class Policy:
    """What a measurement in this process works on.

    Attributes:
        model: The model in eval mode on its device, with its adapter.
        tokenizer: Its tokenizer.
        device: Where it is.
        dtype: Type of its weights.
        chat_template_kwargs: Extra arguments of its chat template.
        identity: Who it is, see :class:`mpo.modeling.identity.ModelIdentity`; ready for JSON.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: str
    chat_template_kwargs: dict[str, Any]
    identity: dict[str, Any]


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
    opened = choice.open()
    print(f"Loading {choice.adapter or choice.model}", flush=True)
    return Policy(
        opened.load(),
        opened.tokenizer,
        opened.device,
        str(opened.dtype),
        opened.chat_template_kwargs,
        opened.identity().to_dict(),
    )
