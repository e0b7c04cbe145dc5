"""Talking to a model in the terminal: answers as they are written, and an adapter beside its base model."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from threading import Event, Thread
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpo.common.characters import printable, without_halves
from mpo.common.words import counted
from mpo.data.languages import language_name
from mpo.errors import ConfigError, ModelError, MPOError
from mpo.evaluation.engines import Generation, ModelChoice
from mpo.evaluation.engines.local import generation_config, stop_tokens
from mpo.evaluation.engines.rendering import opened_reasoning, render
from mpo.evaluation.probe import PROBE, load_probe
from mpo.evaluation.prompts import PromptSet, load_prompts
from mpo.modeling.loading import adapter_settings, file_of
from mpo.modeling.opening import named_base

_SIDE_BY_SIDE = 100  # columns of a terminal from which on two answers stand beside each other
_HELP = "/reset begins a new conversation, /quit or Ctrl-D ends. Ctrl-C ends an answer, twice the chat."


@dataclass(frozen=True)
class ChatSettings:
    """A chat.

    Attributes:
        choice: Who answers. An adapter will do as model: its base model is the one that it names.
        generation: How it answers.
        system_prompt: System turn of every conversation.
        compare: Whether the model without its adapter answers, too.
        questions: File of questions with their translations, or ``probe``; None to ask oneself.
        languages: Which translations are asked; None for all.
        limit: Number of questions of the file.
    """

    choice: ModelChoice
    generation: Generation = field(default_factory=Generation)
    system_prompt: str | None = None
    compare: bool = False
    questions: str | None = None
    languages: list[str] | None = None
    limit: int = 1

    def __post_init__(self) -> None:
        if self.languages and self.questions is None:
            raise ConfigError(
                "`--languages` needs the questions in these languages: give a file with a column per language as "
                "`--questions`, or `--questions probe` for those that come with the package."
            )


class Talker:
    """A model that answers conversations piece by piece.

    Args:
        choice: Who answers.
        generation: How it answers.

    Raises:
        MPOError: Model or adapter cannot be used.
    """

    def __init__(self, choice: ModelChoice, generation: Generation) -> None:
        self.choice, self.generation = choice, generation
        self.opened = choice.open()
        self._model: Any = None

    def load(self) -> None:
        """Reads the weights.

        Raises:
            ModelError: They cannot be read, or do not fit.
        """
        model = self.opened.load(with_adapter=False)
        stops = stop_tokens(model, self.opened.tokenizer)
        pad = self.opened.tokenizer.pad_token_id
        assert isinstance(pad, int)
        model.generation_config = generation_config(self.generation, stops, pad)
        self._model = model if self.opened.adapter is None else self.opened.put_adapter(model)

    def answer(
        self, conversation: Sequence[dict[str, str]], *, with_adapter: bool = True
    ) -> Generator[str, None, None]:
        """The pieces of an answer as they are written. Closing the iterator ends it.

        Args:
            conversation: Messages up to the turn that is to be answered.
            with_adapter: False for the model with its adapter switched off.

        Raises:
            MPOError: The conversation is too long, or the memory does not hold it.
        """
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        if self._model is None:
            self.load()
        tokenizer = self.opened.tokenizer
        prompt = render(tokenizer, conversation, self.opened.chat_template_kwargs)
        self._check_length(len(prompt))
        stopped, failed = Event(), list[Exception]()
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

        class Stopped(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                return torch.full((input_ids.shape[0],), stopped.is_set(), device=input_ids.device)

        def write() -> None:
            ids = torch.tensor([prompt], device=self.opened.device)
            switched_off = self.opened.adapter is not None and not with_adapter
            try:
                torch.manual_seed(self.generation.seed)
                with self._model.disable_adapter() if switched_off else nullcontext():
                    self._model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([Stopped()]),
                    )
            except Exception as error:  # raised again where the answer is read
                failed.append(error)
                streamer.end()

        writer = Thread(target=write, daemon=True)
        writer.start()
        try:
            if opening := opened_reasoning(tokenizer, prompt):
                yield opening
            yield from filter(None, streamer)
        finally:
            stopped.set()
            writer.join()
        if failed:
            raise self._explained(failed[0]) from failed[0]

    def _check_length(self, tokens: int) -> None:
        longest = getattr(self.opened.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and tokens + self.generation.max_new_tokens > longest:
            raise ConfigError(
                f"The conversation has {counted(tokens, 'token')}; with an answer of up to {self.generation.max_new_tokens} "
                f"that is more than the {longest} positions of {self.choice.model}. Begin anew with /reset, or lower "
                "`--max_new_tokens`."
            )

    def _explained(self, error: Exception) -> Exception:
        if isinstance(error, torch.OutOfMemoryError):
            return ModelError(
                f"The memory of {self.opened.device} does not hold this conversation. Begin anew with /reset, lower "
                "`--max_new_tokens`, or choose another `--device`."
            )
        return error


def chat(settings: ChatSettings, *, stdin: TextIO | None = None, stdout: TextIO | None = None) -> None:
    """Talks until the user ends it; answers once where the questions come from a file or a pipe.

    Args:
        settings: Who answers, and how.
        stdin: Where questions come from; standard input by default.
        stdout: Where answers go; standard output by default.

    Raises:
        MPOError: Model, adapter or questions cannot be used.
        KeyboardInterrupt: Ctrl-C where nobody can be asked again.
    """
    stdin, stdout = stdin or sys.stdin, stdout or sys.stdout
    choice = on_its_base(settings.choice)
    if settings.compare and choice.adapter is None:
        raise ConfigError(
            f"`--compare` shows a model without and with its adapter, and {choice.model} has none. Give the adapter with "
            "`--adapter`, or its folder as the model."
        )
    questions = _questions(settings)
    talk = _Talk(Talker(choice, settings.generation), settings, stdout)
    if questions is not None:
        for prompt in questions.prompts:
            talk.write(f"\n{language_name(prompt.language)}: {prompt.text}\n")
            talk.reset()
            talk.ask(prompt.text)
    elif stdin.isatty():
        _converse(talk)
    elif asked := stdin.read().strip():
        talk.ask(asked)
    else:
        raise ConfigError(
            "Nothing is asked: standard input is empty. Pipe a question in, or start it in a terminal."
        )


def on_its_base(choice: ModelChoice) -> ModelChoice:
    """The base model with the adapter on it where an adapter is named as model; else the choice as it is.

    Raises:
        ModelError: The adapter is damaged, or does not say what its base model is.
    """

    def has(file: str) -> bool:
        return file_of(choice.model, file, revision=choice.revision) is not None

    try:
        if choice.adapter is not None or has("config.json") or not has("adapter_config.json"):
            return choice
    except ModelError:  # opening it says better what is wrong
        return choice
    adapter = choice.model
    settings = adapter_settings(adapter, revision=choice.revision)
    base = named_base(adapter, settings)
    looks_like_folder = base is not None and (base.startswith(("/", ".", "~")) or base.count("/") > 1)
    if base is None or (looks_like_folder and not os.path.isdir(base)):
        said = "names no base model" if base is None else f"was trained on {base}, which is not here"
        raise ModelError(f"The adapter {adapter} {said}. Name it: mpo chat BASE_MODEL --adapter {adapter}")
    return replace(
        choice,
        model=base,
        revision=settings.get("revision"),
        adapter=adapter,
        adapter_revision=choice.revision,
    )


class _Talk:
    """A conversation, or two beside each other: without and with the adapter."""

    def __init__(self, talker: Talker, settings: ChatSettings, stdout: TextIO) -> None:
        self.talker, self.settings, self.stdout = talker, settings, stdout
        self.sides = {"before": False, "after": True} if settings.compare else {"": True}
        self.console = Console(file=stdout, highlight=False, soft_wrap=False)
        self.reset()

    def write(self, text: str) -> None:
        self.stdout.write(printable(text))
        self.stdout.flush()

    def reset(self) -> None:
        system = self.settings.system_prompt
        opening = [{"role": "system", "content": system}] if system else []
        self.conversations = {side: list(opening) for side in self.sides}

    def ask(self, question: str) -> None:
        """Writes the answer, or both; a question without an answer is taken back.

        Raises:
            KeyboardInterrupt: Ctrl-C, after the answer has ended. What is written of it stays in the conversation.
        """
        question = without_halves(question)  # of bytes that are no UTF-8; no tokenizer takes them
        beside = len(self.sides) > 1 and self.stdout.isatty() and self.console.width >= _SIDE_BY_SIDE
        answers: dict[str, str] = {}
        for side, with_adapter in self.sides.items():
            conversation = self.conversations[side]
            conversation.append({"role": "user", "content": question})
            pieces: list[str] = []
            if side and not beside:
                self.write(f"--- {side} ---\n")
            writing = self.talker.answer(conversation, with_adapter=with_adapter)
            try:
                for piece in writing:
                    pieces.append(piece)
                    if not beside:
                        self.write(piece)
            finally:
                writing.close()
                if pieces:
                    conversation.append({"role": "assistant", "content": "".join(pieces)})
                else:
                    conversation.pop()
                if not beside:
                    self.write("\n")
            answers[side] = "".join(pieces)
        if beside:
            table = Table(*self.sides, expand=True)
            table.add_row(*(Text(printable(answer)) for answer in answers.values()))
            self.console.print(table)


def _questions(settings: ChatSettings) -> PromptSet | None:
    if settings.questions is None:
        return None
    if settings.questions == PROBE and not os.path.exists(PROBE):
        if settings.languages:
            return load_probe(settings.languages, limit=settings.limit)
        return load_probe(limit=settings.limit)
    return load_prompts(settings.questions, languages=settings.languages, limit=settings.limit)


def _converse(talk: _Talk) -> None:
    """Question and answer until the user ends it."""
    choice = talk.talker.choice
    name = choice.model if choice.adapter is None else f"{choice.model} with {choice.adapter}"
    talk.write(f"Loading {name}\n")
    talk.talker.load()
    talk.write(f"{_HELP}\n")
    interrupted = False
    while True:
        try:
            question = input("\n> ").strip()
            interrupted = False
            if question in ("/quit", "/exit"):
                return
            if question == "/reset":
                talk.reset()
                talk.write("A new conversation.\n")
            elif question.startswith("/") and " " not in question:
                talk.write(f"{_HELP}\n")
            elif question:
                talk.ask(question)
        except EOFError:
            talk.write("\n")
            return
        except MPOError as error:
            talk.write(f"{error}\n")
        except KeyboardInterrupt:
            if interrupted:
                talk.write("\n")
                return
            interrupted = True
            talk.write("\n(Ctrl-C again ends the chat.)\n")
