"""Translations from a chat model, in this process or behind a server."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mpo.building.translation.translator import Translated, TranslationChoice
from mpo.common.files import read_named_text
from mpo.data import language_name
from mpo.data.reasoning import split_reasoning
from mpo.errors import ConfigError
from mpo.evaluation.engines import Answer, make_engine

_SLOT = re.compile(r"\{(text|source|target)\}")
_DASHES = re.compile(r"\A-{3,}[ \t]*\n|\n-{3,}[ \t]*\Z")


class ChatTranslator:
    """One request per piece."""

    def __init__(self, choice: TranslationChoice) -> None:
        """Reads the prompt, and of a model in this process what is small.

        Raises:
            MPOError: The prompt or the model cannot be used.
        """
        assert choice.model is not None
        self.choice = choice
        self.prompt = read_prompt(choice.prompt)
        self.engine = make_engine(choice.model, choice.generation())

    def settings(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return {**self.engine.settings(), "engine": f"chat, {self.choice.model.engine}", "prompt": digest}  # type: ignore[union-attr]

    def check(self, source: str, targets: Sequence[str]) -> None:
        pass

    def translate(
        self, pieces: Sequence[str], source: str, target: str, done: Collection[int]
    ) -> Iterator[tuple[int, Translated]]:
        names = {code: self.choice.codes.get(code, language_name(code)) for code in (source, target)}
        conversations = [
            [{"role": "user", "content": self._filled(piece, names[source], names[target])}]
            for piece in pieces
        ]
        for index, answer in self.engine.generate(conversations, done):
            yield index, read_answer(answer)

    def close(self) -> None:
        self.engine.close()

    def _filled(self, piece: str, source: str, target: str) -> str:
        """The prompt about one piece. What stands in a slot is not looked at again: it may hold braces."""
        values = {"text": piece, "source": source, "target": target}
        return _SLOT.sub(lambda slot: values[slot[1]], self.prompt)


def read_answer(answer: Answer) -> Translated:
    """What a chat model says is the translation, without its reasoning and the dashes that it repeats."""
    if answer.blocked is not None:
        return Translated("", "the server withheld the translation")
    parts = split_reasoning(answer.text)
    text = _DASHES.sub("", parts.answer.strip()).strip()
    if not answer.finished or not parts.complete:
        return Translated(text, "the translation was cut off; raise `max_new_tokens`")
    return Translated(text, None if text else "the translator wrote nothing")


def read_prompt(path: str | Path | None) -> str:
    """The prompt of a file, or the built-in one.

    Raises:
        ConfigError: The file cannot be read, or lacks a slot.
    """
    if path is None:
        return resources.files("mpo.building.translation").joinpath("prompt.txt").read_text(encoding="utf-8")
    try:
        text = read_named_text(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"prompt: {path} cannot be read ({error}).") from None
    missing = [slot for slot in ("{text}", "{target}") if slot not in text]
    if missing:
        raise ConfigError(
            f"prompt: {path} has no slot {' and no slot '.join(missing)}. Write it where the text, or the name of the language, "
            "goes."
        )
    return text
