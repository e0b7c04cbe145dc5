"""A judge behind an OpenAI-compatible server. Every reply is kept on disk by content and never paid for twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from mpo.common.files import write_text
from mpo.common.typed_json import parse_line
from mpo.errors import ConfigError
from mpo.evaluation.chat_client import OPENAI_URL, ChatClient, RejectedRequest, Reply
from mpo.evaluation.judges.judge import (
    Exchange,
    JudgeChoice,
    Verdict,
    fill_judging_prompt,
    parse_verdict,
    read_judging_prompt,
    short_name,
)
from mpo.evaluation.tasks import UNPARSED, Task

# One line is asked for; the room is for models that reason first.
_PARAMETERS: dict[str, Any] = {"temperature": 0.0, "max_tokens": 256}
_FIXED = ("model", "messages", "stream", "n")


class ServerAsker:
    """Asks a model behind a server one question at a time, and keeps every reply by content."""

    def __init__(self, choice: JudgeChoice, parameters: Mapping[str, Any]) -> None:
        """Reads the key, and connects to nothing.

        Args:
            choice: Model and server.
            parameters: Of each request, which the choice's own go before.

        Raises:
            ConfigError: The key is missing, or a field of the request is not to be set.
        """
        assert choice.model is not None
        fixed = [name for name in choice.request or {} if name in _FIXED]
        if fixed:
            raise ConfigError(f"judge_request: `{fixed[0]}` cannot be set; it is what the judge is made of.")
        merged = {**parameters, **(choice.request or {})}
        self.parameters = {name: value for name, value in merged.items() if value is not None}
        self.client = ChatClient(
            choice.url or OPENAI_URL,
            choice.model,
            key_variable=choice.key_variable,
            timeout=choice.timeout,
            concurrency=choice.concurrency,
        )
        self.cache = None if choice.cache is None else ReplyCache(Path(choice.cache))

    def ask(self, questions: Sequence[str]) -> Iterator[tuple[int, Reply | RejectedRequest]]:
        """Yields every reply once with the index of its question; questions that are alike are asked once.

        Raises:
            ServerError: The server is out of reach, or refuses whatever it is sent.
        """
        places: dict[str, list[int]] = {}
        contents: dict[str, str] = {}
        for index, content in enumerate(questions):
            key = self._key(content)
            contents[key] = content
            places.setdefault(key, []).append(index)
        missing = []
        for key, indices in places.items():
            reply = None if self.cache is None else self.cache.get(key)
            if reply is None:
                missing.append(key)
                continue
            yield from ((index, reply) for index in indices)
        asked = self.client.for_all(
            missing,
            lambda key: ([{"role": "user", "content": contents[key]}], self.parameters),
            accepted=len(missing) < len(places),
        )
        for key, outcome in asked:
            if self.cache is not None and not isinstance(outcome, RejectedRequest):
                self.cache.put(key, outcome)
            yield from ((index, outcome) for index in places[key])

    def _key(self, content: str) -> str:
        """Everything that a reply depends on. Not the URL: a server that moves to another port is still the same."""
        value = {"model": self.client.model, "content": content, "parameters": self.parameters}
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode("ascii")).hexdigest()


class LLMJudge:
    """Asks a model for one verdict per answer."""

    def __init__(self, choice: JudgeChoice, task: Task) -> None:
        """Reads the judging prompt and the key, and connects to nothing.

        Raises:
            ConfigError: The prompt cannot be read or lacks a slot, the key is missing, or a field of the request is not
                to be set.
        """
        assert choice.model is not None
        self.task = task
        self.label = f"llm-{short_name(choice.model)}"
        self.prompt = judging_prompt(choice.prompt, task)
        self.asker = ServerAsker(choice, _PARAMETERS)
        self.client = self.asker.client

    def settings(self) -> dict[str, Any]:
        return {
            "judge": "llm",
            "model": self.client.model,
            "prompt": hashlib.sha256(self.prompt.encode("utf-8")).hexdigest()[:16],
            "request": self.asker.parameters,
        }

    def judge(self, exchanges: Sequence[Exchange]) -> Iterator[tuple[int, Verdict]]:
        """Yields every verdict once; answers that read alike to the judge are asked about once.

        Raises:
            ServerError: The server is out of reach, or refuses whatever it is sent.
        """
        questions = [fill_judging_prompt(self.prompt, exchange) for exchange in exchanges]
        for index, outcome in self.asker.ask(questions):
            # A text that a filter or a limit of the server keeps out is an answer without a verdict.
            if isinstance(outcome, RejectedRequest):
                yield index, Verdict(UNPARSED, str(outcome))
            else:
                yield index, Verdict(parse_verdict(outcome.text, self.task.verdicts), outcome.text)

    def close(self) -> None:
        pass


class ReplyCache:
    """A folder with one file per reply, which several processes may share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> Reply | None:
        """The reply, or None where there is none or its file is damaged."""
        try:
            return parse_line(self._path(key).read_bytes(), Reply, key)
        except OSError:
            return None

    def put(self, key: str, reply: Reply) -> None:
        """Keeps a reply.

        Raises:
            StorageError: It cannot be written.
        """
        value = {"text": reply.text, "finish_reason": reply.finish_reason}
        write_text(self._path(key), json.dumps(value) + "\n")

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


def judging_prompt(path: str | None, task: Task) -> str:
    """The user's judging prompt, or the built-in one of the task.

    Raises:
        ConfigError: The user's file cannot be read, or lacks a slot.
    """
    if path is not None:
        return read_judging_prompt(path)
    return files("mpo.evaluation.judges").joinpath(f"{task.name}.txt").read_text(encoding="utf-8")
