"""From a conversation to the tokens that a model reads, and from those it writes to its answer; the same for all engines
in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from mpo.data import tokenization
from mpo.data.reasoning import DELIMITERS, left_open
from mpo.errors import DataError
from mpo.evaluation.engines.engine import Conversation

_LONGEST_OPENING = 32  # tokens of a prompt's end that may hold a delimiter of reasoning


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


def opened_reasoning(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> str:
    """The delimiter of reasoning that a prompt ends in, so that the answer begins within it; empty where there is none."""
    end = tokenizer.decode(list(prompt[-_LONGEST_OPENING:]), skip_special_tokens=False)
    assert isinstance(end, str)
    return left_open(end)


def special_delimiters(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Special tokens that delimit reasoning: without them it could not be told from the answer."""
    return frozenset(token for token, text in special_tokens(tokenizer).items() if text in DELIMITERS)


def decode(tokenizer: PreTrainedTokenizerBase, written: Sequence[int]) -> str:
    """The text of tokens that a model wrote, without special tokens other than the delimiters of reasoning."""
    kept = special_delimiters(tokenizer)
    if kept:
        dropped = special_tokens(tokenizer).keys() - kept
        written = [token for token in written if token not in dropped]
    text = tokenizer.decode(list(written), skip_special_tokens=not kept)
    assert isinstance(text, str)
    return text


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Texts of the special tokens by id. Where one is written out in a text, a tokenizer reads the token."""
    return {token: each.content for token, each in tokenizer.added_tokens_decoder.items() if each.special}
