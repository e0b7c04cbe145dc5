"""The interface of everything that answers prompts, which model does, and how answers are to be generated."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mpo.errors import ConfigError

if TYPE_CHECKING:
    from mpo.modeling.opening import OpenedModel

ENGINES = ("transformers", "vllm", "server")

Conversation = Sequence[Mapping[str, Any]]
"""Messages, ``{"role": ..., "content": ...}`` each, up to the turn that is to be answered."""


@dataclass(frozen=True)
class ModelChoice:
    """Which model answers, where it runs and how it is loaded.

    Attributes:
        model: Folder or Hub name; for a server, what it calls the model.
        adapter: Folder or Hub name of a PEFT adapter to put on it.
        engine: ``transformers``, ``vllm`` or ``server``.
        url: Base URL of an OpenAI-compatible server.
        key_variable: Environment variable with the server's key; by default OPENAI_API_KEY for OpenAI's own, none for others.
        concurrency: Requests to a server at the same time.
        timeout: Seconds to wait for a server's reply.
        batch_size: Prompts per batch of the ``transformers`` engine.
        dtype: Type of the weights: auto, bfloat16, float16 or float32; by default bfloat16 on a GPU that has it, else
            float32.
        device: cpu, cuda, cuda:1, ...; by default a GPU where there is one.
        attn_implementation: As in transformers; by default the model's.
        revision: Revision of the model on the Hub.
        adapter_revision: Revision of the adapter on the Hub.
        chat_template: Jinja text or a file, in place of the one that the adapter or the model brings.
        trust_remote_code: Run code that the model brings.
        chat_template_kwargs: Extra arguments of the chat template, for example ``{enable_thinking: false}``; by default
            those that the adapter or the model was trained with, as its ``recipe.yaml`` says. A server gets them with
            each request.
    """

    model: str
    adapter: str | None = None
    engine: str = "transformers"
    url: str | None = None
    key_variable: str | None = None
    concurrency: int = 8
    timeout: float = 600.0
    batch_size: int = 16
    dtype: str | None = None
    device: str | None = None
    attn_implementation: str | None = None
    revision: str | None = None
    adapter_revision: str | None = None
    chat_template: str | None = None
    trust_remote_code: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ConfigError(f"engine: expected {', '.join(ENGINES)}, got {self.engine!r}.")
        if (self.url is not None) != (self.engine == "server"):
            raise ConfigError(
                "url: the engine `server` needs the server's base URL, and no other engine takes one; got "
                f"engine {self.engine!r} and url {self.url!r}."
            )
        if self.engine == "server" and self.adapter is not None:
            raise ConfigError(
                "adapter: a server loads its own adapters. Give it a name there (vLLM: --enable-lora --lora-modules "
                "NAME=FOLDER) and pass that name as the model."
            )
        if self.batch_size < 1:
            raise ConfigError(f"batch_size: expected at least 1, got {self.batch_size!r}.")

    def open(self, layout: str = "padded") -> OpenedModel:
        """The model with its adapter and tokenizer, checked; weights are not read yet.

        Args:
            layout: How batches will be laid out, see :func:`mpo.modeling.opening.open_model`.

        Raises:
            MPOError: Model or adapter cannot be used, or a setting cannot work.
        """
        from mpo.modeling.loading import ModelSource
        from mpo.modeling.opening import open_model

        return open_model(
            ModelSource(self.model, self.revision, self.trust_remote_code),
            adapter=self.adapter,
            adapter_revision=self.adapter_revision,
            chat_template=self.chat_template,
            chat_template_kwargs=self.chat_template_kwargs,
            dtype=self.dtype or ("auto" if self.engine == "vllm" else None),
            device=self.device,
            attn_implementation=self.attn_implementation,
            layout=layout,
        )


@dataclass(frozen=True)
class Generation:
    """How an answer is generated.

    Attributes:
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 for greedy decoding, the most likely token each time, as in the papers; above 0 for sampling.
        top_p: Share of the probability mass that is sampled from.
        seed: Seed of the sampling.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens!r}.")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature: expected 0 (greedy) or more, got {self.temperature!r}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: expected a share above 0 and up to 1, got {self.top_p!r}.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def settings(self) -> dict[str, Any]:
        """What the answers depend on: neither ``top_p`` nor the seed matters to greedy decoding."""
        if self.greedy:
            return {"decoding": "greedy", "max_new_tokens": self.max_new_tokens}
        return {
            "decoding": "sampling",
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        text: The answer without special tokens other than the delimiters of reasoning, from where the reasoning begins: an
            opening delimiter that the chat template wrote into the prompt is part of it.
        finished: False where it was cut off at ``max_new_tokens``.
        blocked: Why a server rejected the prompt or withheld the answer, which says nothing of the model; None where it
            answered.
        reasoning: What a server says apart that the model thought; None where it says nothing of it. In ``text`` may be
            reasoning, too: :func:`mpo.data.reasoning.split_reasoning` finds it.
    """

    text: str
    finished: bool
    blocked: str | None = None
    reasoning: str | None = None


class Engine(Protocol):
    """Answers conversations.

    An engine is cheap to make: what is large is loaded with the first answer, so that a run with nothing left to
    answer needs neither time nor memory for it.
    """

    def settings(self) -> dict[str, Any]:
        """Everything that the answers depend on, ready for JSON; equal settings give equal answers."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a reader wants to know of it besides, ready for JSON: names, versions, places."""
        ...

    def generate(
        self, conversations: Sequence[Conversation], done: Collection[int]
    ) -> Iterator[tuple[int, Answer]]:
        """Answers every conversation whose index is not in ``done``, in any order, each as soon as it is there.

        The answers do not depend on ``done``: a run that goes on where another was killed gives the same ones.
        """
        ...

    def close(self) -> None:
        """Gives memory and connections back. The engine can be used again and loads anew then."""
        ...
