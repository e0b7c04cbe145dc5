"""Answers from a model in this process, through transformers: batches by length, padded on the left."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mpo.errors import DataError, ModelError
from mpo.evaluation.engines.engine import Answer, Conversation, Generation, ModelChoice
from mpo.evaluation.engines.rendering import decode, opened_reasoning, render
from mpo.modeling.padding import padded


@dataclass(frozen=True)
class _Batch:
    """Conversations that go through the model together."""

    indices: list[int]
    prompts: list[list[int]]


class LocalEngine:
    """transformers' ``generate``.

    Which conversations share a batch depends on all conversations, their lengths and the batch size, never on what is
    answered already. A batch of which a part is missing is computed again as a whole, and only the missing part is
    given out. So a run that was killed goes on with the very numbers that an undisturbed one computes: what a padded
    batch mate changes in the last bits of a float is the same in both.
    """

    def __init__(self, choice: ModelChoice, generation: Generation) -> None:
        """Reads configuration and tokenizer, but no weights.

        Raises:
            MPOError: Model or adapter cannot be used, or a setting cannot work.
        """
        self.choice, self.generation = choice, generation
        self.opened = choice.open()
        self.tokenizer, self.device = self.opened.tokenizer, self.opened.device
        self._model: Any = None
        self._stops: list[int] = []

    def settings(self) -> dict[str, Any]:
        return {
            "engine": "transformers",
            **self.opened.identity().to_dict(),
            "device": self.device.type,
            "batch_size": self.choice.batch_size,
            **self.generation.settings(),
        }

    def describe(self) -> dict[str, Any]:
        return {
            "name": "transformers",
            "dtype": str(self.opened.dtype),
            "batch_size": self.choice.batch_size,
        }

    def generate(
        self, conversations: Sequence[Conversation], done: Collection[int]
    ) -> Iterator[tuple[int, Answer]]:
        answered = set(done)
        if len(answered) == len(conversations):
            return
        batches = self._plan(conversations)
        model = self._load()
        for number, batch in enumerate(batches):
            if answered.issuperset(batch.indices):
                continue
            for index, answer in zip(batch.indices, self._answer(model, batch, number), strict=True):
                if index not in answered:
                    yield index, answer

    def close(self) -> None:
        self._model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _plan(self, conversations: Sequence[Conversation]) -> list[_Batch]:
        """Batches of similar length, the longest first: what does not fit into memory shows at once."""
        prompts = [
            render(self.tokenizer, conversation, self.opened.chat_template_kwargs)
            for conversation in conversations
        ]
        longest = getattr(self.opened.config.get_text_config(), "max_position_embeddings", None)
        for index, prompt in enumerate(prompts):
            if longest is not None and len(prompt) + self.generation.max_new_tokens > longest:
                raise DataError(
                    f"prompt {index} has {len(prompt)} tokens. With an answer of up to {self.generation.max_new_tokens} that is "
                    f"more than the {longest} positions of {self.choice.model}. Shorten it, or lower `max_new_tokens`."
                )
        return [
            _Batch(part, [prompts[index] for index in part])
            for part in by_length(prompts, self.choice.batch_size)
        ]

    def _load(self) -> Any:
        if self._model is None:
            model = self.opened.load(with_adapter=False)
            self._stops = stop_tokens(model, self.tokenizer)
            # In place of the model's own, of which `generate` would take whatever a call leaves open.
            model.generation_config = generation_config(self.generation, self._stops, self._pad_token)
            self._model = model if self.opened.adapter is None else self.opened.put_adapter(model)
        return self._model

    def _answer(self, model: Any, batch: _Batch, number: int) -> list[Answer]:
        ids, mask = padded(batch.prompts, self.device, fill=self._pad_token, side="left")
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.inference_mode(), torch.random.fork_rng(devices), head_input_in_one_piece(model):
                # Sampling depends on the batch, not on how many were drawn before it in this process.
                torch.manual_seed(self.generation.seed + number)
                output = model.generate(input_ids=ids, attention_mask=mask, **no_router_loss(model))
        except torch.OutOfMemoryError:
            raise ModelError(
                f"The memory of {self.device} does not hold a batch of {len(batch.indices)} prompts of up to "
                f"{ids.shape[1]} tokens. Lower `batch_size` ({self.choice.batch_size}); as that can change last digits, in a "
                "new folder."
            ) from None
        written = output[:, ids.shape[1] :].tolist()
        return [
            read_answer(self.tokenizer, prompt, tokens, self._stops)
            for prompt, tokens in zip(batch.prompts, written, strict=True)
        ]

    @property
    def _pad_token(self) -> int:
        token = self.tokenizer.pad_token_id
        assert isinstance(token, int)
        return token


def generation_config(generation: Generation, stops: list[int], pad: int) -> GenerationConfig:
    """Decoding as asked for and nothing else: a model's own repetition penalty or top-k would go unnoticed.

    Args:
        generation: How to answer.
        stops: Tokens that end an answer.
        pad: Token of padding.
    """
    sampling: dict[str, Any] = {}
    if not generation.greedy:
        sampling = {"temperature": generation.temperature, "top_p": generation.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=generation.max_new_tokens,
        do_sample=not generation.greedy,
        num_beams=1,
        eos_token_id=stops,
        pad_token_id=pad,
        **sampling,
    )


def by_length(prompts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Indices of prompts, in batches of similar length, the longest first; the same for the same prompts."""
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    return [order[start : start + size] for start in range(0, len(order), size)]


def stop_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a turn: the model's generation settings know them all, the tokenizer often only one."""
    named = getattr(model.generation_config, "eos_token_id", None)
    tokens = {*([named] if isinstance(named, int) else named or []), tokenizer.eos_token_id}
    return sorted(token for token in tokens if isinstance(token, int))


@contextmanager
def head_input_in_one_piece(model: Any) -> Iterator[None]:
    """Copies what the output head is given, where it is a slice of more, for as long as this lasts.

    The head reads the last state of each prompt of a batch: a slice that is not contiguous, which torch multiplies prompt by
    prompt. On a CPU in bfloat16, with a large vocabulary, that is slower than all the rest of a call.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def no_router_loss(model: Any) -> dict[str, bool]:
    """Arguments of a call of a mixture of experts that would compute its router's loss, of a mask that does not fit."""
    config = model.config.get_text_config()
    return {"output_router_logits": False} if getattr(config, "output_router_logits", False) else {}


def read_answer(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], tokens: Sequence[int], stops: Collection[int]
) -> Answer:
    """The answer that a model wrote after a prompt, up to the first of the tokens that end a turn."""
    end = next((place for place, token in enumerate(tokens) if token in stops), None)
    return Answer(opened_reasoning(tokenizer, prompt) + decode(tokenizer, tokens[:end]), end is not None)
