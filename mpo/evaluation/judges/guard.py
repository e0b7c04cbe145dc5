"""A judge in this process: a guard model, or any chat model that is asked for a verdict.

How a guard is asked and what its replies mean is its format, a row of :data:`mpo.evaluation.judges.formats.GUARDS`. A guard
calls an answer safe or unsafe and never invalid.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpo.data.reasoning import split_reasoning
from mpo.errors import ConfigError
from mpo.evaluation.engines import Generation
from mpo.evaluation.judges.formats import GUARDS, GuardFormat, Messages, guard_format
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


class GuardJudge:
    """Asks a model in this process for one verdict per answer."""

    def __init__(self, choice: JudgeChoice, task: Task) -> None:
        """Reads configuration, tokenizer and checksums, but no weights.

        Raises:
            MPOError: The model or the prompt cannot be used, or the guard's replies say nothing about this task.
        """
        from mpo.evaluation.engines.local import LocalEngine
        from mpo.evaluation.engines.rendering import special_tokens

        assert choice.model is not None
        self.task = task
        self.label = f"guard-{short_name(choice.model)}"
        self.question = guard_question(choice, task)
        row = self.question.row
        self.engine = LocalEngine(
            choice.as_model(
                chat_template=row.chat_template, chat_template_kwargs=dict(row.template_kwargs) or None
            ),
            Generation(max_new_tokens=row.max_new_tokens),
        )
        self._marker = _one_of((*row.markers, *special_tokens(self.engine.tokenizer).values()))

    def settings(self) -> dict[str, Any]:
        asked = json.dumps([self.question.messages, self.question.patterns], sort_keys=True)
        return {
            "judge": "guard",
            "format": self.question.format,
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
        """What the guard is shown. A token of its own that is written out in a text would be read as that token."""
        if self._marker is not None:
            exchange = replace(
                exchange,
                prompt=self._marker.sub(_broken, exchange.prompt),
                answer=self._marker.sub(_broken, exchange.answer),
            )
        return [
            {"role": message["role"], "content": _fill(message["content"], exchange)}
            for message in self.question.messages
        ]

    def _verdict(self, reply: str) -> str:
        patterns = self.question.patterns
        if patterns is None:
            return parse_verdict(reply, self.task.verdicts)
        said = split_reasoning(reply).answer
        found = [v for v, pattern in patterns.items() if re.search(pattern, said, re.I | re.M)]
        return found[0] if len(found) == 1 else UNPARSED


@dataclass(frozen=True)
class GuardQuestion:
    """How a guard is asked.

    Attributes:
        format: Name of its format.
        row: The format.
        messages: The conversation it is shown, with the slots of a judging prompt.
        patterns: The regular expression of each verdict; None where the reply is read as an LLM judge's is.
    """

    format: str
    row: GuardFormat
    messages: Messages
    patterns: Mapping[str, str] | None


def guard_question(choice: JudgeChoice, task: Task) -> GuardQuestion:
    """How this guard is asked for this task; nothing is loaded.

    Raises:
        ConfigError: Its format is unknown or says nothing about the task, or its prompt cannot be used.
    """
    assert choice.model is not None
    format = guard_format(choice.model, choice.format)
    row = GUARDS[format]
    messages, patterns = row.messages, row.verdicts.get(task.name)
    if row.verdicts and patterns is None:
        able = ", ".join(f"`{name}`" for name, each in GUARDS.items() if task.name in each.verdicts)
        raise ConfigError(
            f"judge: {format} does not say whether an answer refuses. For {task.name} take another guard ({able}), `llm` or "
            "`refusal-phrases`."
        )
    if not row.verdicts:
        messages = ({"role": "user", "content": judging_prompt(choice.prompt, task)},)
    elif choice.prompt is not None:
        if not row.takes_prompt:
            raise ConfigError(
                f"judge_prompt: {format} asks a question that the guard was trained on; it takes no other. Remove it, or "
                "take the format `chat`."
            )
        messages = ({"role": "user", "content": read_judging_prompt(choice.prompt)},)
    return GuardQuestion(format, row, messages, patterns)


def has_own_replies(choice: JudgeChoice) -> bool:
    """Whether one prompt serves all tasks: the guard says more than one thing in a form of its own."""
    if choice.name != "guard":
        return False
    row = GUARDS[guard_format(choice.model or "", choice.format)]
    return row.takes_prompt and bool(row.verdicts)


def _one_of(markers: Sequence[str]) -> re.Pattern[str] | None:
    longest_first = sorted({marker for marker in markers if len(marker) > 1}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _broken(marker: re.Match[str]) -> str:
    return f"{marker[0][0]} {marker[0][1:]}"


def _fill(content: Any, exchange: Exchange) -> Any:
    if isinstance(content, str):
        return fill_judging_prompt(content, exchange)
    return [{**part, "text": fill_judging_prompt(part["text"], exchange)} for part in content]
