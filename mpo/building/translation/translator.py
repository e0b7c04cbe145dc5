"""The interface of what translates, and which one is meant."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mpo.errors import ConfigError
from mpo.evaluation.engines import Generation, ModelChoice

ENGINES = ("none", "command", "seq2seq", "chat")


@dataclass(frozen=True)
class TranslationChoice:
    """What translates, and how.

    Attributes:
        engine: ``command`` (any program), ``seq2seq`` (a translation model in this process), ``chat`` (a chat model in this
            process or behind a server) or ``none`` (every text is given in every language).
        command: Program and arguments; ``{source}`` and ``{target}`` in them become language codes. It reads one text a
            line and writes one line for each.
        model: The model of ``seq2seq`` and ``chat``.
        codes: What the engine calls a language, by our code, where it is not found out: ``{zh: zho_Hant}``.
        prompt: File with the prompt of ``chat``, in place of the built-in one: a text with the slots ``{text}``, ``{target}``
            and, where wanted, ``{source}``.
        longest: Characters that are translated at once: sentences of a line, or paragraphs for ``chat``. By default 600,
            and 4,000 for ``chat``.
        max_new_tokens: Longest translation of such a piece, in tokens.
        num_beams: Beams of ``seq2seq``.
        blank_lines: Whether a command gets, and writes, an empty line between two texts. Some take lines that follow each other
            for one text and move words between them; by default so for Apertium, which does.
        timeout: Seconds that a command may take for a block.
    """

    engine: str = "none"
    command: list[str] = field(default_factory=list)
    model: ModelChoice | None = None
    codes: dict[str, str] = field(default_factory=dict)
    prompt: str | None = None
    longest: int | None = None
    max_new_tokens: int = 1024
    num_beams: int = 1
    blank_lines: bool | None = None
    timeout: float = 3600.0

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ConfigError(f"engine: expected {', '.join(ENGINES)}, got {self.engine!r}.")
        if (self.engine == "command") != bool(self.command):
            raise ConfigError(
                "command: the engine `command` needs a program and its arguments, such as `[apertium, -u, eng-spa]`, and no "
                f"other engine takes one; got engine {self.engine!r} and command {self.command!r}."
            )
        if (self.engine in ("seq2seq", "chat")) != (self.model is not None):
            raise ConfigError(
                "model: the engines `seq2seq` and `chat` need a model, such as `model: {model: org/name}`, and no other "
                f"engine takes one; got engine {self.engine!r}."
            )
        if self.engine == "seq2seq" and self.model is not None and self.model.engine != "transformers":
            raise ConfigError(
                "model: the engine `seq2seq` loads its model through transformers; take `chat` for a server."
            )
        if self.blank_lines is not None and self.engine != "command":
            raise ConfigError(f"blank_lines: only the engine `command` has it; got engine {self.engine!r}.")
        if self.prompt is not None and self.engine != "chat":
            raise ConfigError(f"prompt: only the engine `chat` has a prompt; got engine {self.engine!r}.")
        for name in ("longest", "max_new_tokens", "num_beams", "timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}: expected more than 0, got {value!r}.")

    @property
    def whole_passages(self) -> bool:
        """Whether pieces may go over line breaks."""
        return self.engine == "chat"

    @property
    def parts_lines(self) -> bool:
        """Whether an empty line stands between two texts that a command gets."""
        if self.blank_lines is not None:
            return self.blank_lines
        return any(os.path.basename(word) == "apertium" for word in self.command)

    @property
    def piece(self) -> int:
        """Characters that are translated at once."""
        return self.longest or (4000 if self.whole_passages else 600)

    def generation(self) -> Generation:
        """How a model translates: greedily."""
        return Generation(max_new_tokens=self.max_new_tokens)


@dataclass(frozen=True)
class Translated:
    """What became of a piece.

    Attributes:
        text: The translation; empty where there is none.
        fault: Why there is none, or why it is not whole; None where all is well.
    """

    text: str
    fault: str | None = None


class Translator(Protocol):
    """Translates pieces of texts. It is cheap to make: what is large is loaded with the first piece."""

    def settings(self) -> dict[str, Any]:
        """Everything that translations depend on, ready for JSON."""
        ...

    def check(self, source: str, targets: Sequence[str]) -> None:
        """Refuses languages that it cannot translate, before any work.

        Raises:
            MPOError: A language is not known to it, or a program is missing.
        """
        ...

    def translate(
        self, pieces: Sequence[str], source: str, target: str, done: Collection[int]
    ) -> Iterator[tuple[int, Translated]]:
        """Translates every piece whose index is not in ``done``, in any order, each as soon as it is there.

        Raises:
            MPOError: The engine cannot be reached or used.
        """
        ...

    def close(self) -> None:
        """Gives memory and connections back."""
        ...
