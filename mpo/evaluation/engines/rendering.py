"""From a conversation to the tokens that a model reads, the same for every engine in this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from mpo.data import tokenization
from mpo.errors import DataError
from mpo.evaluation.engines.engine import Conversation


def render(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of the conversation, ending where the model's turn begins, [tokens].

    Raises:
        DataError: The chat template rejects the messages.
    """
    try:
        return tokenization.render(tokenizer, conversation, template_kwargs)
    except DataError as error:
        raise DataError(f"{error} A template without a system turn wants no `system_prompt`.") from error
