"""From the names and settings of a command or a recipe to an engine."""

from __future__ import annotations

from dataclasses import dataclass

from mpo.errors import ConfigError
from mpo.evaluation.engines.engine import Engine, Generation

ENGINES = ("transformers", "vllm", "server")


@dataclass(frozen=True)
class ModelChoice:
    """Which model answers, where it runs and how it is loaded.

    Attributes:
        model: Folder or Hub name; for a server, what it calls the model.
        adapter: Folder or Hub name of a PEFT adapter to put on it.
        engine: ``transformers``, ``vllm`` or ``server``.
        url: Base URL of an OpenAI-compatible server.
        key_variable: Environment variable with the server's key; see :class:`mpo.evaluation.chat_client.ChatClient`.
        concurrency: Requests to a server at the same time.
        timeout: Seconds to wait for a server's reply.
        batch_size: Prompts per batch of the transformers engine.
        dtype: Type of the weights: auto, bfloat16, float16 or float32; by default bfloat16 on a GPU that has it, else
            float32.
        device: cpu, cuda, cuda:1, ...; by default a GPU where there is one.
        attn_implementation: As in transformers.
        revision: Revision of the model on the Hub.
        adapter_revision: Revision of the adapter on the Hub.
        chat_template: Jinja text or a file, for a tokenizer that has none.
        trust_remote_code: Run code that the model brings.
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


def make_engine(choice: ModelChoice, generation: Generation) -> Engine:
    """The engine of a choice, nothing large loaded yet.

    Raises:
        MPOError: The model cannot be used, a package is missing, or settings contradict each other.
    """
    if choice.engine == "server":
        from mpo.evaluation.engines.server import ServerEngine

        return ServerEngine(choice, generation)
    if choice.engine == "vllm":
        from mpo.evaluation.engines.vllm import VLLMEngine

        return VLLMEngine(choice, generation)
    from mpo.evaluation.engines.local import LocalEngine

    return LocalEngine(choice, generation)
