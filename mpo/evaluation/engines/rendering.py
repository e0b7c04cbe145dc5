"""From a conversation to the tokens that a model reads, the same for every engine in this process."""

from __future__ import annotations

import hashlib
from typing import Any

from transformers import PreTrainedTokenizerBase

from mpo.errors import DataError
from mpo.evaluation.engines.engine import Conversation


def render(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[int]:
    """Token ids of the conversation, ending where the model's turn begins, [tokens].

    Raises:
        DataError: The chat template rejects the messages.
    """
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in conversation], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # Jinja raises what the template's author chose to raise
        roles = [message.get("role") for message in conversation]
        raise DataError(
            f"The chat template rejects the messages ({error}). Roles given: {roles}. A template without a system turn wants "
            "no `system_prompt`."
        ) from error
    # The template writes the special tokens itself.
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert isinstance(ids, list)
    return ids


def template_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Short hash of the chat template, by which two of them are told apart."""
    template: Any = tokenizer.chat_template
    return hashlib.sha256(str(template).encode("utf-8")).hexdigest()[:16]
