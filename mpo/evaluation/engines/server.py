"""Answers from a model behind an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from mpo.evaluation.chat_client import ChatClient, RejectedRequest
from mpo.evaluation.engines.engine import Answer, Conversation, Generation, ModelChoice


class ServerEngine:
    """One request per conversation; how they are batched is the server's business.

    What the server's own filter keeps from the model, or from us, is no answer of the model's: it is ``blocked``. A server
    that rejects every prompt is wrongly set up, and an error.

    The weights are out of sight: that the name still stands for the same ones when a run goes on is the user's to know.
    """

    def __init__(self, choice: ModelChoice, generation: Generation) -> None:
        assert choice.url is not None
        self.choice, self.generation = choice, generation
        self.client = ChatClient(
            choice.url,
            choice.model,
            key_variable=choice.key_variable,
            timeout=choice.timeout,
            concurrency=choice.concurrency,
        )

    def settings(self) -> dict[str, Any]:
        return {
            "engine": "server",
            "served_model": self.client.model,
            **self._template_kwargs(),
            **self.generation.settings(),
        }

    def describe(self) -> dict[str, Any]:
        return {"name": "server", "url": self.client.url}

    def generate(
        self, conversations: Sequence[Conversation], done: Collection[int]
    ) -> Iterator[tuple[int, Answer]]:
        missing = [index for index in range(len(conversations)) if index not in done]
        asked = self.client.for_all(
            missing, lambda index: (conversations[index], self._parameters(index)), accepted=bool(done)
        )
        for index, reply in asked:
            if isinstance(reply, RejectedRequest):
                yield index, Answer("", True, blocked=str(reply))
            elif reply.finish_reason == "content_filter":
                yield (
                    index,
                    Answer(reply.text, True, blocked="a content filter of the server withheld the answer"),
                )
            else:
                yield index, Answer(reply.text, reply.finish_reason != "length")

    def close(self) -> None:
        pass

    def _parameters(self, index: int) -> dict[str, Any]:
        generation = self.generation
        parameters = {
            "max_tokens": generation.max_new_tokens,
            "temperature": generation.temperature,
            **self._template_kwargs(),
        }
        if generation.greedy:
            return parameters
        return {**parameters, "top_p": generation.top_p, "seed": generation.seed + index}

    def _template_kwargs(self) -> dict[str, Any]:
        """A field of requests that vLLM, SGLang and llama.cpp take; other servers never see it unasked."""
        given = self.choice.chat_template_kwargs
        return {} if given is None else {"chat_template_kwargs": given}
