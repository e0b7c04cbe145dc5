"""Talking to a model: its answers, its adapter switched off, interruptions, and hostile output."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mpo.cli import app
from mpo.errors import ConfigError, ModelError
from mpo.evaluation.engines import Generation, ModelChoice
from mpo.evaluation.engines.local import LocalEngine
from mpo.jobs import chat as job
from mpo.jobs.chat import ChatSettings, Talker, chat, on_its_base
from tests.tiny import save_tiny

QUESTION = [{"role": "user", "content": "please open the window"}]
SHORT = Generation(max_new_tokens=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear")
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    policy.save_pretrained(folder)
    return folder


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """What a user types; an exception is what comes in place of a line."""
    waiting = iter(lines)

    def read(prompt: str = "") -> str:
        line = next(waiting)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def answering(
    monkeypatch: pytest.MonkeyPatch, pieces: Callable[[str], Iterator[str]]
) -> list[list[dict[str, str]]]:
    """Replaces the model; returns the conversations that it is asked."""
    asked: list[list[dict[str, str]]] = []

    def answer(self: Talker, conversation: Any, *, with_adapter: bool = True) -> Iterator[str]:
        asked.append([dict(message) for message in conversation])
        yield from pieces(conversation[-1]["content"])

    monkeypatch.setattr(Talker, "answer", answer)
    monkeypatch.setattr(Talker, "load", lambda self: None)
    return asked


def test_the_streamed_answer_is_that_of_an_evaluation(model: Path, adapter: Path) -> None:
    choice = ModelChoice(str(model), adapter=str(adapter))
    talker = Talker(choice, SHORT)
    for with_adapter in (True, False, True):
        other = choice if with_adapter else ModelChoice(str(model))
        ((_, expected),) = LocalEngine(other, SHORT).generate([QUESTION], [])
        pieces = list(talker.answer(QUESTION, with_adapter=with_adapter))
        assert "".join(pieces) == expected.text
    assert len(pieces) > 1
    before, after = ("".join(talker.answer(QUESTION, with_adapter=on)) for on in (False, True))
    assert before != after


def test_an_answer_that_is_closed_ends(model: Path) -> None:
    talker = Talker(ModelChoice(str(model)), Generation(max_new_tokens=100, temperature=1.0))
    threads = threading.active_count()
    writing = talker.answer(QUESTION)
    next(writing)
    writing.close()
    assert threading.active_count() == threads


def test_a_question_from_a_pipe_is_answered_once(
    model: Path, adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("please open the window\n"))
    assert app.main(["chat", str(adapter), "--max_new_tokens", "12"]) == 0
    ((_, expected),) = LocalEngine(ModelChoice(str(model), adapter=str(adapter)), SHORT).generate(
        [QUESTION], []
    )
    assert capsys.readouterr().out == expected.text + "\n"


def test_one_question_is_asked_in_every_language_before_and_after(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    file = tmp_path / "questions.csv"
    file.write_text(
        "id,en,zh,sw\n1,open the window,打开窗户,fungua dirisha\n2,bread,面包,mkate\n", encoding="utf-8"
    )
    out = io.StringIO()
    settings = ChatSettings(
        ModelChoice(str(adapter)), SHORT, compare=True, questions=str(file), languages=["zh", "sw"]
    )
    chat(settings, stdin=io.StringIO(), stdout=out)
    text = out.getvalue()
    assert "Chinese: 打开窗户" in text and "Swahili: fungua dirisha" in text
    assert text.count("--- before ---") == text.count("--- after ---") == 2
    assert "English" not in text and "面包" not in text


def test_a_wide_terminal_shows_both_answers_beside_each_other(
    model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, lambda question: iter([f"[bold]{question}\x1b[31m"]))
    monkeypatch.setenv("COLUMNS", "120")
    typed(monkeypatch, "hello", "/quit")
    out = Terminal()
    chat(ChatSettings(ModelChoice(str(adapter)), SHORT, compare=True), stdin=Terminal(), stdout=out)
    (line,) = [line for line in out.getvalue().splitlines() if "hello" in line]
    assert line.count("[bold]hello\\x1b[31m") == 2


def test_a_conversation_goes_on_until_it_is_reset(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, lambda question: iter(["to ", question]))
    typed(monkeypatch, "one", "two", "/reset", "", "/what", "three", EOFError)
    out = io.StringIO()
    chat(ChatSettings(ModelChoice(str(model)), SHORT, "Be brief."), stdin=Terminal(), stdout=out)
    system = {"role": "system", "content": "Be brief."}
    assert [[m["content"] for m in each] for each in asked] == [
        ["Be brief.", "one"],
        ["Be brief.", "one", "to one", "two"],
        ["Be brief.", "three"],
    ]
    assert asked[0][0] == system and asked[1][2]["role"] == "assistant"
    assert "A new conversation." in out.getvalue() and out.getvalue().count("/reset begins") == 2


def test_nothing_that_a_model_writes_acts_on_the_terminal(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, lambda _: iter(["\x1b]0;title\x07", "\u202eabc", "বাংলা\n"]))
    out = io.StringIO()
    chat(ChatSettings(ModelChoice(str(model)), SHORT), stdin=io.StringIO("hi"), stdout=out)
    assert out.getvalue() == "\\x1b]0;title\\x07\\u202eabcবাংলা\n\n"


def test_ctrl_c_ends_the_answer_and_twice_the_chat(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(question: str) -> Iterator[str]:
        yield "half "
        if question == "first":
            raise KeyboardInterrupt

    asked = answering(monkeypatch, cut)
    typed(
        monkeypatch,
        "first",
        "second",
        KeyboardInterrupt,
        "third",
        KeyboardInterrupt,
        KeyboardInterrupt,
        "never",
    )
    out = io.StringIO()
    chat(ChatSettings(ModelChoice(str(model)), SHORT), stdin=Terminal(), stdout=out)
    assert [each[-1]["content"] for each in asked] == ["first", "second", "third"]
    assert [m["content"] for m in asked[1]] == ["first", "half ", "second"]  # what was written stays
    assert out.getvalue().count("Ctrl-C again ends the chat") == 3


def test_a_question_without_an_answer_is_taken_back(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, lambda question: iter(["yes"] if question == "second" else []))
    typed(monkeypatch, "first", "second", "third", "/quit")
    chat(ChatSettings(ModelChoice(str(model)), SHORT), stdin=Terminal(), stdout=io.StringIO())
    assert [[m["content"] for m in each] for each in asked] == [
        ["first"],
        ["second"],
        ["second", "yes", "third"],
    ]


def test_a_conversation_that_has_become_too_long_can_go_on_anew(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, "please open the window", "/quit")
    out = io.StringIO()
    chat(
        ChatSettings(ModelChoice(str(model)), Generation(max_new_tokens=10**6)), stdin=Terminal(), stdout=out
    )
    assert "positions of" in out.getvalue() and "Begin anew with /reset" in out.getvalue()


def test_a_conversation_may_fill_all_positions_and_no_more(model: Path) -> None:
    talker = Talker(ModelChoice(str(model)), SHORT)
    room = talker.opened.config.max_position_embeddings - SHORT.max_new_tokens
    talker._check_length(room)
    with pytest.raises(ConfigError, match="is more than the"):
        talker._check_length(room + 1)


def test_a_full_memory_is_explained(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talker = Talker(ModelChoice(str(model)), SHORT)
    talker.load()

    def full(**_: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(talker._model, "generate", full)
    with pytest.raises(ModelError, match="does not hold this conversation"):
        list(talker.answer(QUESTION))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"compare": True}, "has none. Give the adapter with `--adapter`"),
        ({}, "Nothing is asked: standard input is empty"),
    ],
)
def test_what_cannot_be_talked_to_is_said(model: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        chat(ChatSettings(ModelChoice(str(model)), **changes), stdin=io.StringIO(" \n"), stdout=io.StringIO())
    assert said in str(caught.value)
    with pytest.raises(ConfigError, match="`--languages` needs the questions"):
        ChatSettings(ModelChoice(str(model)), languages=["zh"])


def test_the_probe_comes_along(model: Path) -> None:
    questions = job._questions(ChatSettings(ModelChoice("m"), questions="probe", languages=["bn", "en"]))
    assert (
        questions is not None and sorted(questions.languages) == ["bn", "en"] and len(questions.prompts) == 2
    )


def test_an_adapter_brings_its_base_model(model: Path, adapter: Path, tmp_path: Path) -> None:
    found = on_its_base(ModelChoice(str(adapter), dtype="float32"))
    assert (found.model, found.adapter, found.dtype) == (str(model), str(adapter), "float32")
    assert on_its_base(ModelChoice(str(model))).adapter is None
    other = on_its_base(ModelChoice(str(adapter), revision="v2"))
    assert (other.revision, other.adapter_revision) == (None, "v2")  # what was named is the adapter
    for base, said in (
        (None, "names no base model"),
        ("/gone/model", "was trained on /gone/model, which is not here"),
    ):
        lost = tmp_path / str(base).replace("/", "_")
        lost.mkdir()
        config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": base}
        (lost / "adapter_config.json").write_text(json.dumps(config))
        (lost / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
        with pytest.raises(ModelError) as caught:
            on_its_base(ModelChoice(str(lost)))
        assert said in str(caught.value) and f"mpo chat BASE_MODEL --adapter {lost}" in str(caught.value)


def test_a_question_that_is_no_utf_8_is_asked_all_the_same(model: Path) -> None:
    said = io.StringIO()
    chat(
        ChatSettings(ModelChoice(str(model), device="cpu"), Generation(2)),
        stdin=io.StringIO("caf\udce9?"),
        stdout=said,
    )
    assert said.getvalue().endswith("\n")
