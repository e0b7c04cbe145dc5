"""From the names and settings of a command or a recipe to a judge."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpo.errors import ConfigError
from mpo.evaluation.judges.judge import Judge
from mpo.evaluation.tasks import Task

JUDGES = ("refusal-phrases", "llm", "guard")


@dataclass(frozen=True)
class JudgeChoice:
    """Which judge, and how it is reached.

    Attributes:
        name: ``refusal-phrases`` (needs no model), ``llm`` (behind an OpenAI-compatible server) or ``guard`` (a model in
            this process).
        model: What the server calls the model, or the guard's folder or Hub name.
        url: Base URL of the server; OpenAI's by default.
        key_variable: Environment variable with its key; see :class:`mpo.evaluation.chat_client.ChatClient`.
        prompt: File with the judging prompt, in place of the built-in one.
        format: How a guard is asked and what its replies mean: see :data:`mpo.evaluation.judges.guard.FORMATS`; by
            default guessed from its name.
        request: Further fields of each request to the server; None takes one out (``{"temperature": None}``).
        cache: Folder for the server's replies, by content.
        concurrency, timeout: Of requests to the server.
        batch_size, dtype, device, revision, trust_remote_code: Of a guard, as in
            :class:`mpo.evaluation.engines.ModelChoice`.
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


def check_judge(choice: JudgeChoice, task: Task) -> None:
    """Refuse a judge that cannot judge this task. Nothing is loaded, connected to or looked for on the Hub.

    Raises:
        ConfigError: Its replies say nothing about the task, or its prompt cannot be used.
    """
    if choice.name == "llm":
        from mpo.evaluation.judges.llm import judging_prompt

        judging_prompt(choice.prompt, task)
    elif choice.name == "guard":
        from mpo.evaluation.judges.guard import guard_question

        guard_question(choice, task)


def make_judge(choice: JudgeChoice, task: Task) -> Judge:
    """The judge of a choice, nothing large loaded yet.

    Raises:
        MPOError: Its model, prompt or key cannot be used.
    """
    if choice.name == "llm":
        from mpo.evaluation.judges.llm import LLMJudge

        return LLMJudge(choice, task)
    if choice.name == "guard":
        from mpo.evaluation.judges.guard import GuardJudge

        return GuardJudge(choice, task)
    from mpo.evaluation.judges.phrases import PhraseJudge

    return PhraseJudge(task)


def short_name(model: str) -> str:
    """Last part of a model's name or folder, as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", model.rstrip("/").rpartition("/")[2]).strip("-.") or "model"
