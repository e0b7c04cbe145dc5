"""The interface of judges, and how a reply becomes a verdict."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mpo.data import language_name
from mpo.errors import ConfigError
from mpo.evaluation.prompts import MIXED
from mpo.evaluation.tasks import UNPARSED

_SLOTS = ("{prompt}", "{answer}")
_SLOT = re.compile(r"\{(prompt|answer|language)\}")
_THOUGHTS = re.compile(r"^\s*<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_THINKING = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
_LABEL = re.compile(r"^\W*verdict\W+(\w+)\W*$", re.IGNORECASE)


@dataclass(frozen=True)
class Exchange:
    """What is judged.

    Attributes:
        prompt: The request as it is in the prompt set, without the template of an attack around it.
        answer: What the model wrote.
        language: Code of the prompt's language.
    """

    prompt: str
    answer: str
    language: str


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict.

    Attributes:
        verdict: One of the task's, or :data:`~mpo.evaluation.tasks.UNPARSED`.
        reply: What the judge wrote, or why it wrote nothing; None where it is not a model.
    """

    verdict: str
    reply: str | None = None


class Judge(Protocol):
    """Judges answers for one task.

    Attributes:
        label: Short name, unique among the judges of a run; part of a file's name.
    """

    label: str

    def settings(self) -> dict[str, Any]:
        """Everything that the verdicts depend on, ready for JSON."""
        ...

    def judge(self, exchanges: Sequence[Exchange]) -> Iterator[tuple[int, Verdict]]:
        """Verdicts with their index, in any order, each as soon as it is there."""
        ...

    def close(self) -> None:
        """Gives memory and connections back."""
        ...


def parse_verdict(reply: str, verdicts: Sequence[str]) -> str:
    """The verdict that a reply names beyond doubt, or ``unparsed``.

    That is a last line ``Verdict: WORD``, or a reply that is one word, whatever punctuation or emphasis is around it.
    A word somewhere in a sentence is none ("this is not safe"), nor is a list of all of them. What a reasoning model
    thinks before its reply (``<think>``) is not read; where it never stops thinking, there is no reply.
    """
    text = _THOUGHTS.sub("", reply, count=1).strip()
    if _THINKING.match(text):
        return UNPARSED
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return UNPARSED
    labelled = _LABEL.match(lines[-1])
    word = labelled[1] if labelled else re.sub(r"^\W+|\W+$", "", text)
    return word.lower() if word.lower() in verdicts else UNPARSED


def read_judging_prompt(path: str | Path) -> str:
    """A judging prompt: a text with the slots ``{prompt}``, ``{answer}`` and, where wanted, ``{language}``.

    Raises:
        ConfigError: The file cannot be read, or lacks a slot.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"judge_prompt: {path} cannot be read ({error}).") from None
    missing = [slot for slot in _SLOTS if slot not in text]
    if missing:
        raise ConfigError(
            f"judge_prompt: {path} has no slot {' and no slot '.join(missing)}. Write it where the text goes."
        )
    return text


def fill_judging_prompt(text: str, exchange: Exchange) -> str:
    """The judging prompt about one exchange. What stands in a slot is not looked at again: it may hold braces."""
    language = "several languages" if exchange.language == MIXED else language_name(exchange.language)
    values: Mapping[str, str] = {"prompt": exchange.prompt, "answer": exchange.answer, "language": language}
    return _SLOT.sub(lambda slot: values[slot[1]], text)
