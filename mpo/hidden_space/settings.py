"""How a model reads texts and how they become embeddings. Imports nothing heavy: recipes are checked before torch is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mpo.errors import ConfigError

NORM = "norm"
POOLINGS = ("last", "mean")
TEMPLATES = ("chat", "raw")


@dataclass(frozen=True)
class ReadingSettings:
    """How a model reads texts.

    Attributes:
        layers: ``all``, or numbers of layers and ``norm``; negative numbers count from the last block.
        template: ``chat`` renders each text as a user's turn, up to where the answer would begin; ``raw`` reads it as it is.
        max_length: Longest text in tokens; longer ones are cut at their end, with the template kept whole.
        tokens_per_batch: Tokens of a model call, padding included. Unset: 16,384 on a GPU, 2,048 on a CPU.
        dtype: Of the loaded weights; unset: bfloat16 on a GPU that has it, else float32.
        device: Unset: a GPU where there is one.
        attn_implementation: Unset: the model's default.
        chat_template: Jinja text or a file, in place of the one that the adapter or the model brings.
        chat_template_kwargs: Extra arguments of the chat template; unset: those that the adapter or the model was trained
            with.
        trust_remote_code: Run code that the model brings.
    """

    layers: tuple[str, ...] = (NORM,)
    template: str = "chat"
    max_length: int = 512
    tokens_per_batch: int | None = None
    dtype: str | None = None
    device: str | None = None
    attn_implementation: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise ConfigError(f"`template` is {self.template!r}; expected chat or raw.")
        if self.max_length < 1 or (self.tokens_per_batch is not None and self.tokens_per_batch < 1):
            raise ConfigError("`max_length` and `tokens_per_batch` are numbers of tokens of at least 1.")


@dataclass(frozen=True)
class EmbeddingSettings(ReadingSettings):
    """How to embed.

    Attributes:
        poolings: Of ``last`` and ``mean``.
    """

    poolings: tuple[str, ...] = ("last",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.poolings or set(self.poolings) - set(POOLINGS):
            raise ConfigError(f"`pooling` is {list(self.poolings)}; expected one or both of last, mean.")
