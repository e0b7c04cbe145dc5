"""A judge in this process: a guard model, or any chat model that is asked for a verdict.

How a guard is asked and what its replies mean is its *format*, in ``guards.json``:

- ``llama-guard``: Llama-Guard-1 to 3. Their chat template holds the question; they reply ``safe``, or ``unsafe`` and
  the categories.
- ``llama-guard-4``: the same with the message parts that Llama-Guard-4's template wants.
- ``polyguard``: PolyGuard replies three lines, of which "Harmful response" decides an attack and "Response refusal" an
  over-refusal. The text that asks it is ours; with ``judge_prompt`` it can be that of its model card.
- ``chat``: any chat model; it is asked as an LLM judge is.

A guard calls an answer safe or unsafe and never invalid.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from mpo.errors import ConfigError
from mpo.evaluation.engines import Generation, ModelChoice, make_engine
from mpo.evaluation.judges.judge import (
    Exchange,
    JudgeChoice,
    Verdict,
    fill_judging_prompt,
    parse_verdict,
    read_judging_prompt,
    short_name,
)
from mpo.evaluation.judges.llm import judging_prompt
from mpo.evaluation.tasks import UNPARSED, Task

FORMATS = ("llama-guard", "llama-guard-4", "polyguard", "chat")


class GuardJudge:
    """Asks a model in this process for one verdict per answer."""

    def __init__(self, choice: JudgeChoice, task: Task) -> None:
        """Reads configuration, tokenizer and checksums, but no weights.

        Raises:
            MPOError: The model or the prompt cannot be used, or the guard's replies say nothing about this task.
        """
        assert choice.model is not None
        self.task = task
        self.label = f"guard-{short_name(choice.model)}"
        question = guard_question(choice, task)
        self.format, self.messages, self.patterns = question.format, question.messages, question.patterns
        self.engine = make_engine(
            ModelChoice(
                choice.model,
                batch_size=choice.batch_size,
                dtype=choice.dtype,
                device=choice.device,
                revision=choice.revision,
                trust_remote_code=choice.trust_remote_code,
            ),
            Generation(max_new_tokens=question.max_new_tokens),
        )

    def settings(self) -> dict[str, Any]:
        asked = json.dumps([self.messages, self.patterns], sort_keys=True)
        return {
            "judge": "guard",
            "format": self.format,
            "question": hashlib.sha256(asked.encode("ascii")).hexdigest()[:16],
            **self.engine.settings(),
        }

    def judge(self, exchanges: Sequence[Exchange]) -> Iterator[tuple[int, Verdict]]:
        conversations = [self._conversation(exchange) for exchange in exchanges]
        for index, answer in self.engine.generate(conversations, ()):
            yield index, Verdict(self._verdict(answer.text), answer.text)

    def close(self) -> None:
        self.engine.close()

    def _conversation(self, exchange: Exchange) -> list[dict[str, Any]]:
        return [
            {"role": message["role"], "content": _fill(message["content"], exchange)}
            for message in self.messages
        ]

    def _verdict(self, reply: str) -> str:
        if self.patterns is None:
            return parse_verdict(reply, self.task.verdicts)
        found = [
            verdict
            for verdict, pattern in self.patterns.items()
            if re.search(pattern, reply, re.IGNORECASE | re.MULTILINE)
        ]
        return found[0] if len(found) == 1 else UNPARSED


@dataclass(frozen=True)
class GuardQuestion:
    """How a guard is asked.

    Attributes:
        format: One of :data:`FORMATS`.
        messages: The conversation it is shown, with the slots of a judging prompt.
        patterns: The regular expression of each verdict; None where the reply is read as an LLM judge's is.
        max_new_tokens: Longest reply.
    """

    format: str
    messages: list[dict[str, Any]]
    patterns: dict[str, str] | None
    max_new_tokens: int


def guard_question(choice: JudgeChoice, task: Task) -> GuardQuestion:
    """How this guard is asked for this task; nothing is loaded.

    Raises:
        ConfigError: Its format is unknown or says nothing about the task, or its prompt cannot be used.
    """
    assert choice.model is not None
    format = choice.format or guess_format(choice.model)
    if format not in FORMATS:
        raise ConfigError(f"judge_format: expected {', '.join(FORMATS)}, got {format!r}.")
    description = _descriptions()[format]
    patterns: dict[str, str] | None = description["verdicts"].get(task.name)
    if patterns is None and format != "chat":
        raise ConfigError(
            f"judge: {format} does not say whether an answer refuses. For {task.name} take another guard, `llm` or "
            "`refusal-phrases`."
        )
    messages: list[dict[str, Any]] = description["messages"]
    if format == "chat":
        messages = [{"role": "user", "content": judging_prompt(choice.prompt, task)}]
    elif choice.prompt is not None:
        if format != "polyguard":
            raise ConfigError(
                f"judge_prompt: the question that {format} is asked is in its chat template; it takes no other."
            )
        messages = [{"role": "user", "content": read_judging_prompt(choice.prompt)}]
    return GuardQuestion(format, messages, patterns, description["max_new_tokens"])


def has_own_replies(choice: JudgeChoice) -> bool:
    """Whether one prompt serves all tasks: the guard says more than one thing in a form of its own."""
    return choice.name == "guard" and (choice.format or guess_format(choice.model or "")) == "polyguard"


def guess_format(model: str) -> str:
    """The format that a model's name speaks of: ``llama-guard-4`` for ``meta-llama/Llama-Guard-4-12B``."""
    name = re.sub(r"[^a-z0-9]", "", model.lower())
    if "polyguard" in name:
        return "polyguard"
    if "llamaguard4" in name:
        return "llama-guard-4"
    return "llama-guard" if "llamaguard" in name else "chat"


def _fill(content: Any, exchange: Exchange) -> Any:
    if isinstance(content, str):
        return fill_judging_prompt(content, exchange)
    return [{**part, "text": fill_judging_prompt(part["text"], exchange)} for part in content]


@lru_cache(maxsize=1)
def _descriptions() -> dict[str, Any]:
    descriptions: dict[str, Any] = json.loads(
        files("mpo.evaluation.judges").joinpath("guards.json").read_text(encoding="utf-8")
    )
    return descriptions
