"""Answers of a model to a prompt set, on disk as they are made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mpo.common.journal import Journal, settle
from mpo.common.progress import CountProgress
from mpo.errors import DataError
from mpo.evaluation.engines import Engine
from mpo.evaluation.engines.engine import Conversation
from mpo.evaluation.prompts import Prompt, PromptSet, fill_template

FILE = "answers.jsonl"


@dataclass(frozen=True)
class Framing:
    """What is put around a prompt before a model sees it.

    Attributes:
        template: Text with the slot ``{prompt}``, for example of an attack; None for the prompt alone.
        system_prompt: System turn before it; None for none.
    """

    template: str | None = None
    system_prompt: str | None = None

    def conversation(self, prompt: Prompt) -> Conversation:
        """The messages that the model answers."""
        user = {"role": "user", "content": fill_template(self.template, prompt.text)}
        if self.system_prompt is None:
            return [user]
        return [{"role": "system", "content": self.system_prompt}, user]

    def settings(self) -> dict[str, Any]:
        """Hashes of both, ready for JSON."""
        return {"template": _short_hash(self.template), "system_prompt": _short_hash(self.system_prompt)}


@dataclass(frozen=True)
class AnswerRow:
    """One row of ``answers.jsonl``.

    Attributes:
        id: ``PROMPT_ID/LANGUAGE``.
        prompt_id: The same for the translations of one request.
        language: Code of the prompt's language.
        prompt: The request, without what was put around it.
        answer: What the model wrote.
        finished: False where it was cut off.
        blocked: Why the server let no answer through; None where the model answered.
    """

    id: str
    prompt_id: str
    language: str
    prompt: str
    answer: str
    finished: bool
    blocked: str | None = None

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> AnswerRow:
        return cls(**{f.name: row[f.name] for f in fields(cls) if f.name in row})


def make_answers(
    engine: Engine, prompts: PromptSet, folder: Path, framing: Framing | None = None
) -> list[AnswerRow]:
    """Answers every prompt that has no answer in ``folder/answers.jsonl`` yet.

    Args:
        engine: What answers.
        prompts: The prompts.
        folder: Where the answers are, and where they go.
        framing: What is put around the prompts.

    Returns:
        One row per prompt, in the order of the prompts.

    Raises:
        ConfigError: The folder holds answers that were made with other settings.
        MPOError: The model cannot be used, or the folder cannot be written. Answers made before are kept.
    """
    framing = framing or Framing()
    with Journal(folder / FILE, AnswerRow) as journal:
        settings = {"prompts": prompts.fingerprint, **framing.settings(), **engine.settings()}
        settle(journal.path, settings, empty=not journal.rows)
        done = {index for index, prompt in enumerate(prompts.prompts) if prompt.id in journal.rows}
        conversations = [framing.conversation(prompt) for prompt in prompts.prompts]
        with CountProgress("Answering", len(conversations), done=len(done), unit="prompt") as progress:
            for index, answer in engine.generate(conversations, done):
                prompt = prompts.prompts[index]
                journal.append(
                    {
                        "id": prompt.id,
                        "prompt_id": prompt.prompt_id,
                        "language": prompt.language,
                        "prompt": prompt.text,
                        "answer": answer.text,
                        "finished": answer.finished,
                        **({} if answer.blocked is None else {"blocked": answer.blocked}),
                    }
                )
                progress.advance()
        missing = [prompt.id for prompt in prompts.prompts if prompt.id not in journal.rows]
        if missing:
            raise DataError(f"{len(missing)} prompts were left without an answer, {missing[0]} for one.")
        return [AnswerRow.from_json(journal.rows[prompt.id]) for prompt in prompts.prompts]


def fingerprint_answers(answers: list[AnswerRow]) -> str:
    """SHA-256 of all ids and answers: verdicts belong to these texts and no others."""
    digest = hashlib.sha256(b"mpo answers 2")
    for row in answers:
        for text in (row.id, row.answer, row.blocked or ""):
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _short_hash(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
