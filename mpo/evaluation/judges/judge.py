"""The interface of judges, which judge is meant, and how a reply becomes a verdict."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mpo.common.characters import without_halves
from mpo.common.files import read_named_text
from mpo.data import language_name
from mpo.data.reasoning import split_reasoning
from mpo.errors import ConfigError
from mpo.evaluation.engines import ModelChoice
from mpo.evaluation.judges.formats import guard_format
from mpo.evaluation.prompts import MIXED
from mpo.evaluation.tasks import UNPARSED

JUDGES = ("refusal-phrases", "llm", "guard")

_SLOTS = ("{prompt}", "{answer}")
_SLOT = re.compile(r"\{(\w+)\}")
_LABEL = re.compile(r"\W*+verdict\W++(\w++)\W*+", re.IGNORECASE)
_WORD = re.compile(r"\W*+(\w++)\W*+")
_TAG = re.compile(r"</?(\w+)>")


@dataclass(frozen=True)
class JudgeChoice:
    """Which judge, and how it is reached.

    Attributes:
        name: ``refusal-phrases`` (needs no model), ``llm`` (behind an OpenAI-compatible server) or ``guard`` (a model in
            this process).
        model: What the server calls the model, or the guard's folder or Hub name.
        url: Base URL of the server; OpenAI's by default.
        key_variable: Environment variable with its key; by default OPENAI_API_KEY for OpenAI's own server, none for others.
        prompt: File with the judging prompt, in place of the built-in one.
        format: How a guard is asked and what its replies mean: a known format such as ``llama-guard`` or ``qwen3guard``; by default
            that of its name, which has to be a known one.
        request: Further fields of each request to the server; null takes one out (``{temperature: null}``).
        cache: Folder for the server's replies, by content.
        concurrency: Requests to the server at the same time.
        timeout: Seconds to wait for its reply.
        batch_size: Answers per batch of a guard.
        dtype: Type of a guard's weights: auto, bfloat16, float16 or float32.
        device: Where a guard runs: cpu, cuda, ...; by default a GPU where there is one.
        revision: Revision of a guard on the Hub.
        trust_remote_code: Run code that a guard brings.
    """

    name: str = "refusal-phrases"
    model: str | None = None
    url: str | None = None
    key_variable: str | None = None
    prompt: str | None = None
    format: str | None = None
    request: Mapping[str, Any] | None = None
    cache: str | Path | None = None
    concurrency: int = 8
    timeout: float = 120.0
    batch_size: int = 16
    dtype: str | None = None
    device: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.name not in JUDGES:
            raise ConfigError(f"judge: expected {', '.join(JUDGES)}, got {self.name!r}.")
        if (self.model is None) != (self.name == "refusal-phrases"):
            raise ConfigError(
                f"judge: `llm` and `guard` need a model, and `refusal-phrases` has none; got {self.name!r} with the model "
                f"{self.model!r}."
            )
        unused = {
            "refusal-phrases": ("url", "key_variable", "prompt", "format", "request"),
            "llm": ("format",),
            "guard": ("url", "key_variable", "request"),
        }[self.name]
        for setting in unused:
            if getattr(self, setting) is not None:
                raise ConfigError(f"judge: `{self.name}` has no use for `{setting}`.")
        if self.name == "guard":
            guard_format(self.model or "", self.format)

    def as_model(self, **template: Any) -> ModelChoice:
        """A guard as a model that answers; ``template`` is its chat template and the arguments of it."""
        same = ("batch_size", "dtype", "device", "revision", "trust_remote_code")
        return ModelChoice(self.model or "", **{name: getattr(self, name) for name in same}, **template)


@dataclass(frozen=True)
class Exchange:
    """What is judged.

    Attributes:
        prompt: The request as it is in the prompt set, without the template of an attack around it.
        answer: What the model said, without its reasoning.
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


def short_name(model: str) -> str:
    """Last part of a model's name or folder, as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", model.rstrip("/").rpartition("/")[2]).strip("-.") or "model"


def parse_verdict(reply: str, verdicts: Sequence[str]) -> str:
    """The verdict that a reply names beyond doubt, or ``unparsed``.

    That is a last line ``Verdict: WORD``, or a reply that is one word, whatever punctuation or emphasis is around it.
    A word somewhere in a sentence is none ("this is not safe"), nor is a list of all of them. What a reasoning model
    thinks before its reply is not read; where it never stops thinking, there is no reply.
    """
    text = split_reasoning(reply).answer.strip()
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return UNPARSED
    named = _LABEL.fullmatch(lines[-1]) or _WORD.fullmatch(text)
    return named[1].lower() if named and named[1].lower() in verdicts else UNPARSED


def read_judging_prompt(path: str | Path) -> str:
    """A judging prompt: a text with the slots ``{prompt}``, ``{answer}`` and, where wanted, ``{language}``.

    Raises:
        ConfigError: The file cannot be read, or lacks a slot.
    """
    try:
        text = read_named_text(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"judge_prompt: {path} cannot be read ({error}).") from None
    missing = [slot for slot in _SLOTS if slot not in text]
    if missing:
        raise ConfigError(
            f"judge_prompt: {path} has no slot {' and no slot '.join(missing)}. Write it where the text goes."
        )
    return text


def fill_judging_prompt(text: str, exchange: Exchange) -> str:
    """The judging prompt about one exchange; see :func:`fill_slots`."""
    language = "several languages" if exchange.language == MIXED else language_name(exchange.language)
    return fill_slots(text, {"prompt": exchange.prompt, "answer": exchange.answer, "language": language})


def fill_slots(text: str, values: Mapping[str, str]) -> str:
    """A text with values in its slots. What stands in a slot is not looked at again: it may hold braces.

    A tag that the text uses itself is written ``&lt;answer>`` in a value, which could otherwise end its own part and go on as
    instructions. Half a surrogate pair, which no tokenizer takes, becomes U+FFFD.
    """
    tags = "|".join(sorted(set(_TAG.findall(text))))
    if tags:
        opened = re.compile(rf"<(?=\s*+/?\s*+(?:{tags})\b)", re.IGNORECASE)
        values = {slot: opened.sub("&lt;", value) for slot, value in values.items()}
    return _SLOT.sub(lambda slot: without_halves(values[slot[1]]) if slot[1] in values else slot[0], text)
