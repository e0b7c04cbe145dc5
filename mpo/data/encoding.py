"""Token ids of the rendered texts of preference pairs: each text once, and what two texts begin with once for both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase


class PairTexts(NamedTuple):
    """A preference pair as the chat template renders it: the prompt, and the prompt with either response."""

    prompt: str
    chosen: str
    rejected: str


class _Cut(NamedTuple):
    """Where a text's last token of its own ends the part that is encoded by itself."""

    characters: int  # before that token
    tokens: int  # up to and with it


class PairEncoder:
    """Encodes many pairs in two calls of a tokenizer, with the ids that it gives for each text alone.

    A prompt is the beginning of two more texts. The tokenizer takes tokens of their own (``<|im_start|>``) out of a text before it
    reads the rest, so what stands before such a token and what stands behind it are encoded independently of each other: of the
    two longer texts only what begins with the prompt's last such token is encoded. Where a tokenizer does not work that
    way, or a template renders the prompt in another way before a response, the whole text is.

    Args:
        tokenizer: Of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tails: dict[str, list[int]] = {}

    def pairs(self, texts: Sequence[PairTexts]) -> list[tuple[list[int], list[int], list[int]]]:
        """Ids of prompt, prompt and chosen, prompt and rejected of each pair."""
        prompts = self.encode([text.prompt for text in texts])
        cuts = [self._cut(text.prompt, ids) for text, ids in zip(texts, prompts, strict=True)]
        wholes = [(i, whole) for i, text in enumerate(texts) for whole in text[1:]]
        begun = []
        for i, whole in wholes:
            cut = cuts[i]
            same = cut is not None and whole.startswith(texts[i].prompt[: cut.characters])
            begun.append(cut if same else None)
        rests = self.encode(
            [
                whole if cut is None else whole[cut.characters :]
                for (_, whole), cut in zip(wholes, begun, strict=True)
            ]
        )
        found = []
        for (i, whole), cut, ids in zip(wholes, begun, rests, strict=True):
            if cut is None:
                found.append(ids)
            elif ids[:1] == prompts[i][cut.tokens - 1 : cut.tokens]:
                found.append(prompts[i][: cut.tokens] + ids[1:])
            else:
                found.extend(self.encode([whole]))
        return [(prompts[i], found[2 * i], found[2 * i + 1]) for i in range(len(texts))]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; the chat template has written the special tokens."""
        if not texts:
            return []
        found = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)
        ids: list[list[int]] = found["input_ids"]
        return ids

    @cached_property
    def _own(self) -> Mapping[int, str]:
        """Tokens that are taken out of a text before anything else, whatever stands around them."""
        if not self._tokenizer.is_fast:
            return {}
        tokens = self._tokenizer.added_tokens_decoder
        return {
            number: token.content
            for number, token in tokens.items()
            if not token.normalized and not token.single_word
        }

    def _cut(self, text: str, ids: Sequence[int]) -> _Cut | None:
        last = next((place for place in range(len(ids) - 1, -1, -1) if ids[place] in self._own), None)
        if last is None:
            return None
        start = text.rfind(self._own[ids[last]])
        tail = text[start:]
        if start < 0 or len(tail) > 200:
            return None
        if tail not in self._tails:
            (self._tails[tail],) = self.encode([tail])
        return _Cut(start, last + 1) if self._tails[tail] == list(ids[last:]) else None
