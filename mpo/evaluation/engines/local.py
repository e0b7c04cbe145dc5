"""Answers from a model in this process, through transformers: batches by length, padded on the left."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from mpo.errors import DataError, ModelError
from mpo.evaluation.engines.engine import Answer, Conversation, Generation, ModelChoice
from mpo.evaluation.engines.rendering import render, template_identity
from mpo.modeling.identity import adapter_identity, model_identity
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
        """Reads configuration, tokenizer and checksums, but no weights.

        Raises:
            MPOError: Model or adapter cannot be used, or a setting cannot work.
        """
        self.choice, self.generation = choice, generation
        self.device = pick_device(choice.device)
        self.dtype = choice.dtype or pick_dtype(self.device)
        self.source = ModelSource(choice.model, choice.revision, choice.trust_remote_code)
        self.config = load_config(self.source)
        if choice.adapter is not None:
            adapter_settings(choice.adapter, revision=choice.adapter_revision)
        self.tokenizer = load_tokenizer(self.source, choice.chat_template)
        # There is no backward pass here, so flex_attention works on a CPU, too.
        self.attention = pick_attention(self.config, choice.attn_implementation, layout="padded", gpu=True)
        self._model: Any = None
        self._stops: list[int] = []
        self._identity: dict[str, Any] | None = None

    def settings(self) -> dict[str, Any]:
        if self._identity is None:  # reads every byte of the weights
            self._identity = {
                "model": model_identity(self.source, self.config),
                "adapter": adapter_identity(self.choice.adapter, self.choice.adapter_revision),
            }
        return {
            "engine": "transformers",
            **self._identity,
            "chat_template": template_identity(self.tokenizer),
            "dtype": self.dtype,
            "device": self.device.type,
            "attention": self.attention,
            "batch_size": self.choice.batch_size,
            **self.generation.settings(),
        }

    def describe(self) -> dict[str, Any]:
        return {"name": "transformers", "dtype": self.dtype, "batch_size": self.choice.batch_size}

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
        prompts = [render(self.tokenizer, conversation) for conversation in conversations]
        longest = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        for index, prompt in enumerate(prompts):
            if longest is not None and len(prompt) + self.generation.max_new_tokens > longest:
                raise DataError(
                    f"prompt {index} has {len(prompt)} tokens. With an answer of up to {self.generation.max_new_tokens} that is "
                    f"more than the {longest} positions of {self.choice.model}. Shorten it, or lower `max_new_tokens`."
                )
        order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
        size = self.choice.batch_size
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        return [_Batch(part, [prompts[index] for index in part]) for part in parts]

    def _load(self) -> Any:
        if self._model is None:
            model: Any = load_model(
                self.source,
                dtype=self.dtype,
                attn_implementation=self.attention,
                device_map={"": self.device},
            )
            self._stops = self._stop_tokens(model)
            # In place of the model's own, of which `generate` would take whatever a call leaves open.
            model.generation_config = self._generation_config()
            if self.choice.adapter is not None:
                model = load_adapter(model, self.choice.adapter, revision=self.choice.adapter_revision)
            self._model = model.eval()
        return self._model

    def _answer(self, model: Any, batch: _Batch, number: int) -> list[Answer]:
        ids, mask = _pad_left(batch.prompts, self._pad_token, self.device)
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.inference_mode(), torch.random.fork_rng(devices):
                # Sampling depends on the batch, not on how many were drawn before it in this process.
                torch.manual_seed(self.generation.seed + number)
                output = model.generate(input_ids=ids, attention_mask=mask)
        except torch.OutOfMemoryError:
            raise ModelError(
                f"The memory of {self.device} does not hold a batch of {len(batch.indices)} prompts of up to "
                f"{ids.shape[1]} tokens. Lower `batch_size` ({self.choice.batch_size}); as that can change last digits, in a "
                "new folder."
            ) from None
        return [self._decode(row) for row in output[:, ids.shape[1] :].tolist()]

    def _decode(self, tokens: list[int]) -> Answer:
        end = next((place for place, token in enumerate(tokens) if token in self._stops), None)
        text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        assert isinstance(text, str)
        return Answer(text, end is not None)

    def _generation_config(self) -> GenerationConfig:
        """Decoding as asked for and nothing else: a model's own repetition penalty or top-k would go unnoticed."""
        generation = self.generation
        sampling: dict[str, Any] = {}
        if not generation.greedy:
            sampling = {"temperature": generation.temperature, "top_p": generation.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=generation.max_new_tokens,
            do_sample=not generation.greedy,
            num_beams=1,
            eos_token_id=self._stops,
            pad_token_id=self._pad_token,
            **sampling,
        )

    @property
    def _pad_token(self) -> int:
        token = self.tokenizer.pad_token_id
        assert isinstance(token, int)
        return token

    def _stop_tokens(self, model: Any) -> list[int]:
        """Tokens that end a turn: the model's generation settings know them all, the tokenizer often only one."""
        named = getattr(model.generation_config, "eos_token_id", None)
        tokens = {*([named] if isinstance(named, int) else named or []), self.tokenizer.eos_token_id}
        return sorted(token for token in tokens if isinstance(token, int))


def _pad_left(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask of a batch, [prompts, longest] each; every prompt ends in the last column."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
