from __future__ import annotations

import socket
import time
from typing import Any

import pytest

from mpo.errors import ConfigError, ServerError
from mpo.evaluation import chat_client
from mpo.evaluation.chat_client import ChatClient, RejectedRequest, Reply
from tests.evaluation.chat_server import FAULTS, ChatServer, serve

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_client, "_FIRST_WAIT", 0.01)


def client(server: ChatServer, **options: Any) -> ChatClient:
    return ChatClient(server.url, "judge", **{"timeout": 2.0, "retries": 3, **options})


def test_a_request_is_what_the_protocol_wants() -> None:
    with serve(ChatServer(reply=lambda body: "hé" + body["messages"][0]["content"])) as server:
        reply = client(server).ask(HELLO, {"max_tokens": 5, "seed": None})
    assert reply == Reply("héhello", "stop")
    assert server.requests == [{"model": "judge", "messages": HELLO, "max_tokens": 5}]


def test_a_model_that_writes_nothing_has_replied() -> None:
    with serve(ChatServer(reply=lambda body: None)) as server:
        assert client(server).ask(HELLO, {}) == Reply("", "stop")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_outlived(fault: str) -> None:
    times = 1 if fault == "slow" else 3
    with serve(ChatServer(fault=lambda number, _: fault if number < times else None)) as server:
        assert client(server).ask(HELLO, {}).text == "Verdict: safe"
    assert len(server.requests) == times + 1
    assert server.answered == {"hello": 1}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_ends_in_one_clear_error(fault: str) -> None:
    with (
        serve(ChatServer(fault=lambda *_: fault)) as server,
        pytest.raises(
            ServerError, match=r"no usable reply in 2 attempts. The last: .+ run the same command again"
        ),
    ):
        client(server, retries=1).ask(HELLO, {})
    assert len(server.requests) == 2


def test_a_server_that_is_not_there_is_a_clear_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(ServerError, match="the connection failed"):
            ChatClient(url, "judge", retries=1).ask(HELLO, {})


@pytest.mark.parametrize("status", ["401", "403", "404", "418"])
def test_what_asking_again_cannot_mend_is_asked_once(status: str) -> None:
    with (
        serve(ChatServer(fault=lambda *_: status)) as server,
        pytest.raises(ServerError, match=status) as caught,
    ):
        client(server).ask(HELLO, {})
    assert len(server.requests) == 1
    assert "as the test wants it" in str(caught.value)


def test_a_server_may_say_how_long_to_wait() -> None:
    assert chat_client._retry_after("7") == 7
    assert chat_client._retry_after("-1") == 0
    assert chat_client._retry_after("99999") == chat_client._LONGEST_DEMANDED_WAIT
    assert chat_client._retry_after("nan") is None and chat_client._retry_after("soon") is None
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    waited = chat_client._retry_after(date)
    assert waited is not None and 90 < waited <= 100
    assert chat_client._delay(0, 7.0) == 7.0


def test_the_wait_that_a_server_asks_for_is_kept() -> None:
    with serve(ChatServer(fault=lambda number, _: "429" if number == 0 else None, retry_after="1")) as server:
        begun = time.monotonic()
        client(server).ask(HELLO, {})
    assert time.monotonic() - begun >= 1


def test_waits_grow_and_stay_bounded() -> None:
    waits = [chat_client._delay(attempt, None) for attempt in range(40)]
    for attempt, wait in enumerate(waits):
        whole = min(0.01 * 2.0**attempt, chat_client._LONGEST_WAIT)
        assert whole / 2 <= wait <= whole


# ---- Keys ------------------------------------------------------------------------------------------------------------


def test_openais_key_goes_to_openai_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789abcdef0123")
    with serve(ChatServer()) as server:
        client(server).ask(HELLO, {})
        assert "authorization" not in server.headers[0]
        client(server, key_variable="OPENAI_API_KEY").ask(HELLO, {})
        assert server.headers[1]["authorization"] == "Bearer sk-0123456789abcdef0123"
    assert ChatClient("https://api.openai.com", "m").key_variable == "OPENAI_API_KEY"


def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is empty"):
        ChatClient("https://api.openai.com/v1", "m")
    with pytest.raises(ConfigError, match="MY_KEY is empty"):
        ChatClient("http://localhost:1", "m", key_variable="MY_KEY")


def test_a_key_is_not_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-0123456789abcdef0123"
    monkeypatch.setenv("MY_KEY", key)
    with serve(ChatServer(fault=lambda *_: "401")) as server:
        asked = client(server, key_variable="MY_KEY")
        with pytest.raises(ServerError, match="Is the key in MY_KEY right") as caught:
            asked.ask(HELLO, {})
    assert key not in str(caught.value) and key not in repr(asked)


@pytest.mark.parametrize("status", ["400", "401", "418", "500"])
def test_a_server_that_repeats_the_key_does_not_get_it_into_an_error(
    status: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = "correct-horse-battery"  # of no known shape, in a variable of no telling name
    monkeypatch.setenv("MY_JUDGE", key)
    caplog.set_level("DEBUG")
    repeated = ChatServer(fault=lambda *_: status, error=lambda headers: f"no: {headers['authorization']}")
    with serve(repeated) as server:
        asked = client(server, key_variable="MY_JUDGE", retries=0)
        with pytest.raises(ServerError, match="no: Bearer") as caught:
            asked.ask(HELLO, {})
    assert server.headers[0]["authorization"] == f"Bearer {key}"
    assert key not in str(caught.value) + repr(asked) + repr(vars(caught.value)) + caplog.text


@pytest.mark.parametrize(
    "key", ["two words", "first\nsecond", "\N{LEFT DOUBLE QUOTATION MARK}sk-quoted", "tab\tbed"]
)
def test_what_cannot_be_a_key_is_refused_without_being_shown(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(ConfigError, match="MY_KEY does not hold a key") as caught:
        ChatClient("http://localhost:1", "m", key_variable="MY_KEY")
    assert not any(word in str(caught.value) for word in key.split())


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("https://host/api/v3/", "https://host/api/v3"),
        ("http://host/v1/chat/completions", "http://host/v1"),
    ],
)
def test_a_base_url_is_understood(given: str, base: str) -> None:
    assert ChatClient(given, "m").url == base


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host", "http://", "http://u:secret@host/v1", "http://h/v1?k=1"]
)
def test_another_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="url: expected") as caught:
        ChatClient(url, "m")
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_mentioned_at_once_and_once(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        asked = ChatClient(f"http://127.0.0.1:{taken.getsockname()[1]}", "m", retries=3)
        with pytest.raises(ServerError, match="no usable reply in 4 attempts"):
            list(asked.for_all(range(3), lambda n: (HELLO, {})))
    (said,) = [message for message in caplog.messages if "asked again" in message]
    assert asked.url in said and "the connection failed" in said and "up to 3 times" in said


# ---- Many at once ----------------------------------------------------------------------------------------------------


def test_every_item_is_asked_about_once_and_rejections_are_handed_on() -> None:
    def fault(number: int, body: dict[str, Any]) -> str | None:
        content = body["messages"][0]["content"]
        if content in ("3", "8"):
            return "400"
        seen = sum(each["messages"][0]["content"] == content for each in server.requests)
        return "500" if int(content) % 2 and seen < 3 else None

    with serve(ChatServer(reply=lambda body: body["messages"][0]["content"], fault=fault)) as server:
        asked = client(server, concurrency=4)
        found = dict(asked.for_all(range(20), lambda n: ([{"role": "user", "content": str(n)}], {})))
    rejected = {n for n, outcome in found.items() if isinstance(outcome, RejectedRequest)}
    assert rejected == {3, 8}
    assert {n: outcome.text for n, outcome in found.items() if isinstance(outcome, Reply)} == {
        n: str(n) for n in range(20) if n not in rejected
    }
    assert set(server.answered.values()) == {1}


def test_what_was_under_way_when_the_server_failed_is_not_lost() -> None:
    def fault(number: int, body: dict[str, Any]) -> str | None:
        return "403" if body["messages"][0]["content"] == "2" else None

    def reply(body: dict[str, Any]) -> str:
        time.sleep(0.2)
        return "done"

    with serve(ChatServer(reply=reply, fault=fault)) as server:
        asked = client(server, concurrency=3, timeout=5)
        kept = []
        with pytest.raises(ServerError, match="403"):
            for n, _ in asked.for_all(range(20), lambda n: ([{"role": "user", "content": str(n)}], {})):
                kept.append(n)
    assert sorted(map(str, kept)) == sorted(server.answered)
    assert {0, 1} <= set(kept) and len(kept) < 10


def test_a_quick_rejection_is_not_taken_for_a_server_that_rejects_all() -> None:
    def reply(body: dict[str, Any]) -> str:
        time.sleep(0.2)
        return "done"

    def fault(_: int, body: dict[str, Any]) -> str | None:
        return "400" if int(body["messages"][0]["content"]) % 3 == 0 else None

    with serve(ChatServer(reply=reply, fault=fault)) as server:
        asked = client(server, concurrency=4)
        found = dict(asked.for_all(range(9), lambda n: ([{"role": "user", "content": str(n)}], {})))
    assert {n for n, outcome in found.items() if isinstance(outcome, RejectedRequest)} == {0, 3, 6}
    assert len(found) == 9


def test_a_server_that_rejects_all_is_not_asked_for_ever() -> None:
    with serve(ChatServer(fault=lambda *_: "422")) as server:
        asked = client(server, concurrency=4)
        with pytest.raises(RejectedRequest, match="422"):
            list(asked.for_all(range(500), lambda n: (HELLO, {})))
    assert len(server.requests) < 40
