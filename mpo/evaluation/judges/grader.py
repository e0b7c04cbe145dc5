"""An LLM judge that grades an answer from 1 to 10: behind a server as ``llm``, or in this process as ``guard`` with ``chat``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mpo.data.reasoning import split_reasoning
from mpo.errors import ConfigError
from mpo.evaluation.chat_client import RejectedRequest
from mpo.evaluation.engines import Generation
from mpo.evaluation.judges.judge import JudgeChoice, short_name

LOWEST, HIGHEST = 1, 10
_LONGEST = 1024  # tokens; a judge explains itself before it grades
_GRADE = re.compile(r"\[\[\s*(\d{1,4}(?:\.\d{1,4})?)\s*\]\]")


@dataclass(frozen=True)
class Grade:
    """What a judge says of an answer.

    Attributes:
        grade: From 1 to 10; None where its reply has no grade, or several.
        reply: What it wrote, or why it wrote nothing.
    """

    grade: float | None
    reply: str


class Grader(Protocol):
    """Grades answers.

    Attributes:
        label: Short name, part of a file's name.
    """

    label: str

    def settings(self) -> dict[str, Any]:
        """Everything that the grades depend on besides the questions, ready for JSON."""
        ...

    def grade(self, questions: Sequence[str]) -> Iterator[tuple[int, Grade]]:
        """Grades with the index of their question, in any order, each as soon as it is there."""
        ...

    def close(self) -> None:
        """Gives memory and connections back."""
        ...


def check_grader(choice: JudgeChoice) -> None:
    """Refuse a judge that cannot grade. Nothing is loaded or connected to.

    Raises:
        ConfigError: It gives verdicts alone, or has a prompt of its own.
    """
    if choice.name != "llm" and not (choice.name == "guard" and choice.format == "chat"):
        raise ConfigError(
            f"judge: `{choice.name}` gives no grades. Take `llm`, a model behind a server, or `guard` with the format `chat` and "
            "any chat model."
        )
    if choice.prompt is not None:
        raise ConfigError("judge_prompt: MT-Bench has a judging prompt of its own. Leave it out.")


def make_grader(choice: JudgeChoice) -> Grader:
    """The grader of a choice, nothing large loaded yet.

    Raises:
        MPOError: Its model or key cannot be used, or the judge cannot grade.
    """
    check_grader(choice)
    return _ServerGrader(choice) if choice.name == "llm" else _LocalGrader(choice)


def parse_grade(reply: str) -> float | None:
    """The grade ``[[7]]`` of a reply, its reasoning left out; None where there is none from 1 to 10, or more than one."""
    found = {float(text) for text in _GRADE.findall(split_reasoning(reply).answer)}
    grade = found.pop() if len(found) == 1 else None
    return grade if grade is not None and LOWEST <= grade <= HIGHEST else None


class _ServerGrader:
    def __init__(self, choice: JudgeChoice) -> None:
        from mpo.evaluation.judges.llm import ServerAsker

        self.asker = ServerAsker(choice, {"temperature": 0.0, "max_tokens": _LONGEST})
        self.label = f"llm-{short_name(self.asker.client.model)}"

    def settings(self) -> dict[str, Any]:
        return {"judge": "llm", "model": self.asker.client.model, "request": self.asker.parameters}

    def grade(self, questions: Sequence[str]) -> Iterator[tuple[int, Grade]]:
        for index, outcome in self.asker.ask(questions):
            if isinstance(outcome, RejectedRequest):
                yield index, Grade(None, str(outcome))
            else:
                yield index, Grade(parse_grade(outcome.text), outcome.text)

    def close(self) -> None:
        pass


class _LocalGrader:
    def __init__(self, choice: JudgeChoice) -> None:
        from mpo.evaluation.engines.local import LocalEngine

        assert choice.model is not None
        self.label = f"guard-{short_name(choice.model)}"
        self.engine = LocalEngine(choice.as_model(), Generation(max_new_tokens=_LONGEST))

    def settings(self) -> dict[str, Any]:
        return {"judge": "guard", "format": "chat", **self.engine.settings()}

    def grade(self, questions: Sequence[str]) -> Iterator[tuple[int, Grade]]:
        conversations = [[{"role": "user", "content": question}] for question in questions]
        for index, answer in self.engine.generate(conversations, ()):
            yield index, Grade(parse_grade(answer.text), answer.text)

    def close(self) -> None:
        self.engine.close()
