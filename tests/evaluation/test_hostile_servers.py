"""A server may be broken, overloaded or hostile: whatever it does ends in a reply or in one clear error, in time."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest

from mpo.common.characters import printable
from mpo.common.journal import read_rows
from mpo.errors import ServerError
from mpo.evaluation import chat_client
from mpo.evaluation.answers import make_answers
from mpo.evaluation.chat_client import ChatClient, RejectedRequest, Reply
from mpo.evaluation.engines import Generation, ModelChoice
from mpo.evaluation.engines.server import ServerEngine
from mpo.evaluation.judges import Exchange, JudgeChoice, make_judge
from mpo.evaluation.prompts import Prompt, PromptSet
from mpo.evaluation.tasks import ATTACK

TIMEOUT = 0.4
PATIENCE = 15.0  # for a machine that does much else; what is not cut short goes on for 20 seconds at least
HELLO = [{"role": "user", "content": "hello"}]
KEY = "correct-horse-battery"

Act = Callable[[socket.socket], None]


def good(content: Any = "fine", **choice: Any) -> bytes:
    return json.dumps(
        {"choices": [{"message": {"content": content}, "finish_reason": "stop", **choice}]}
    ).encode()


def http(body: bytes, *headers: str, status: str = "200 OK", length: int | str | None = None) -> bytes:
    lines = [
        f"HTTP/1.1 {status}",
        f"Content-Length: {len(body) if length is None else length}",
        *headers,
        "",
        "",
    ]
    return "\r\n".join(lines).encode("latin-1") + body


def head(*headers: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode("latin-1")


def endless(begin: bytes, unit: bytes) -> Act:
    def act(connection: socket.socket) -> None:
        connection.sendall(begin)
        while True:
            connection.sendall(unit * (1 + 16_384 // len(unit)))

    return act


def dripping(begin: bytes, rest: bytes) -> Act:
    def act(connection: socket.socket) -> None:
        connection.sendall(begin)
        for byte in rest * 1000:
            connection.sendall(bytes([byte]))
            time.sleep(0.02)

    return act


def stalling(begin: bytes = b"") -> Act:
    def act(connection: socket.socket) -> None:
        connection.sendall(begin)
        while connection.recv(1024):
            pass

    return act


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def sent(content: bytes) -> Act:
    return lambda connection: connection.sendall(content)


BOMB = gzip.compress(gzip.compress(b" " * 50_000_000))
CHUNKED = head("Transfer-Encoding: chunked")
NESTED = b"[" * 200_000

# What is done, and the reply that there is nevertheless.
REPLIES: dict[str, tuple[Act, str]] = {
    "plain": (sent(http(good())), "fine"),
    "no length, then closed": (sent(head() + good()), "fine"),
    "chunked": (sent(CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(good()), good())), "fine"),
    "after a hundred continues": (sent(head(status="100 Continue") * 100 + http(good())), "fine"),
    "a byte order mark": (sent(http(b"\xef\xbb\xbf" + good())), "fine"),
    "UTF-16": (sent(http(good().decode().encode("utf-16"))), "fine"),
    "called an image": (sent(http(good(), "Content-Type: image/png; charset=no-such-thing")), "fine"),
    "cookies": (sent(http(good(), *["Set-Cookie: a=" + "b" * 3000 + "; Expires=" + "9" * 2000] * 5)), "fine"),
    "a duplicate key": (sent(http(good("no")[:-1] + b',"choices":' + good()[12:])), "fine"),
    "null": (sent(http(good(None))), ""),
    "a list for a reason": (sent(http(good(finish_reason=[1]))), "fine"),
    "NUL and escapes": (sent(http(good("\0\x1b[2J"))), "\0\x1b[2J"),
    "half a surrogate": (sent(http(rb'{"choices":[{"message":{"content":"a\ud83d!\udc00"}}]}')), "a\ufffd!\ufffd"),
    "a whole pair": (sent(http(rb'{"choices":[{"message":{"content":"\ud83d\ude00"}}]}')), "\U0001f600"),
    "infinity beside it": (sent(http(good()[:-1] + b',"usage":[1e999,NaN,-Infinity]}')), "fine"),
    "more than announced": (sent(http(good(), length=len(good())) + b"x" * 1000), "fine"),
    "another reply behind it": (sent(http(good()) + http(good("smuggled"))), "fine"),
    "HTTP/9.9": (sent(http(good()).replace(b"HTTP/1.1", b"HTTP/9.9")), "fine"),
    "a weird reason phrase": (sent(http(good(), status="200 \x1b[31m")), "fine"),
}  # fmt: skip

ERRORS: dict[str, Act] = {
    # Connections
    "closed at once": sent(b""),
    "reset": reset,
    "reset in the body": lambda c: (c.sendall(http(b"{", length=500)), reset(c))[1],
    "silent": stalling(),
    "stalled status line": stalling(b"HTTP/1.1 20"),
    "stalled headers": stalling(b"HTTP/1.1 200 OK\r\nContent-Le"),
    "stalled body": stalling(http(good()[:20], length=len(good()))),
    "stalled chunk": stalling(CHUNKED + b"500\r\n{"),
    "stalled error": stalling(http(b"so", status="500 No", length=50)),
    "dripping status line": dripping(b"", b"HTTP/1.1 200 OK" + b" " * 50),
    "dripping headers": dripping(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"),
    "dripping continues": dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "dripping body": dripping(http(b"", length=10**9), b" "),
    "dripping chunks": dripping(CHUNKED, b"1\r\n \r\n"),
    "dripping without length": dripping(head(), b" "),
    "dripping refusal": dripping(head(status="401 No"), b" "),
    # HTTP
    "noise": sent(os.urandom(500)),
    "another protocol": sent(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "TLS": sent(b"\x15\x03\x01\x00\x02\x02\x46"),
    "only a body": sent(good()),
    "half a status line": sent(b"HTTP/1.1 2"),
    "no status": sent(b"HTTP/1.1\r\n\r\n"),
    "status in words": sent(http(good(), status="two hundred")),
    "status 99999": sent(http(good(), status="99999 OK")),
    "status 000": sent(http(good(), status="000 OK")),
    "a header without a colon": sent(head("nonsense") + good()),
    "a header with NUL": sent(head("X: a\0b") + good()),
    "an endless header": endless(b"HTTP/1.1 200 OK\r\nX: ", b"a"),
    "endless headers": endless(b"HTTP/1.1 200 OK\r\n", b"X: a\r\n"),
    "an endless status line": endless(b"HTTP/1.1 200 ", b"O"),
    "endless continues": endless(b"", head(status="100 Continue")),
    "switching protocols": sent(head("Upgrade: websocket", status="101 Switching Protocols")),
    "no content": sent(head(status="204 No Content")),
    "not modified": sent(head(status="304 Not Modified")),
    "redirected to itself": sent(http(b"", "Location: /", status="307 Temporary Redirect")),
    "redirected to a file": sent(http(b"", "Location: file:///etc/passwd", status="302 Found")),
    "a negative length": sent(http(good(), length=-5)),
    "a length in words": sent(http(good(), length="many")),
    "a length of 5,000 digits": sent(http(good(), length="9" * 5000)),
    "two lengths": sent(http(good(), "Content-Length: 3")),
    "less than announced": sent(http(good(), length=5000)),
    "length 0 with a body": sent(http(good(), length=0)),
    "a chunk without size": sent(CHUNKED + b"\r\n\r\n"),
    "a negative chunk": sent(CHUNKED + b"-1\r\nabc\r\n"),
    "a huge chunk": sent(CHUNKED + b"f" * 15 + b"\r\nabc"),
    "a chunk size without end": endless(CHUNKED, b"0"),
    "no last chunk": sent(CHUNKED + b"%x\r\n%s\r\n" % (len(good()), good())),
    "an unknown transfer coding": sent(head("Transfer-Encoding: gzip, sausages") + good()),
    "an endless body": endless(head(), b" "),
    "an endless announced body": endless(http(b"", length=10**12), b" "),
    "endless chunks": endless(CHUNKED, b"4\r\n    \r\n"),
    "an endless error": endless(head(status="500 No"), b"no "),
    "an endless refusal": endless(head(status="403 No"), b"no "),
    "compressed noise": sent(http(b"\x1f\x8b nonsense", "Content-Encoding: gzip")),
    "a compressed bomb": sent(http(BOMB, "Content-Encoding: gzip, gzip")),
    "an unknown coding": sent(http(b"\0" * 100, "Content-Encoding: sausages")),
    # JSON
    "an empty body": sent(http(b"")),
    "blanks": sent(http(b" \n" * 1000)),
    "a page": sent(http(b"<html><body>Bad gateway</body></html>", "Content-Type: text/html")),
    "a stream of events": sent(http(b"data: " + good() + b"\n\ndata: [DONE]\n\n")),
    "cut off": sent(http(good()[:-8])),
    "two documents": sent(http(good() + good())),
    "no UTF-8": sent(http(b'{"choices": "\xff\xfe\xfd"}')),
    "nested lists": sent(http(NESTED)),
    "nested lists, closed": sent(http(NESTED + b"]" * 200_000)),
    "nested objects": sent(http(b'{"a":' * 60_000)),
    "nested content": sent(http(b'{"choices":[{"message":{"content":' + NESTED)),
    "a nested error": sent(http(NESTED, status="500 No")),
    "a number of 100,000 digits": sent(http(b"9" * 100_000)),
    **{
        f"JSON {text}": sent(http(text.encode()))
        for text in (
            "null", "1", '"choices"', "[]", "{}", '{"choices": null}', '{"choices": {}}', '{"choices": "abc"}',
            '{"choices": []}', '{"choices": [null]}', '{"choices": [[]]}', '{"choices": [{}]}',
            '{"choices": [{"message": null}]}', '{"choices": [{"message": "text"}]}',
            '{"choices": [{"message": {"content": 5}}]}', '{"choices": [{"message": {"content": ["a"]}}]}',
            '{"choices": [{"message": {"content": {"text": "a"}}}]}', '{"choices": [{"text": "old"}]}',
            '{"error": {"message": "overloaded"}}',
        )
    },
    # Refusals
    **{f"status {status}": sent(http(b"no", status=f"{status} No")) for status in (402, 404, 409, 418, 451, 502, 599)},
    **{
        f"Retry-After: {value[:12]}": sent(http(b"", f"Retry-After: {value}", status="429 No"))
        for value in ("1e308", "nan", "-5", "inf", "9" * 3000, "Fri, 31 Dec 99999 23:59:59 GMT", "\x80\xff")
    },
    "terminal codes": sent(http("\x1b[2J\x9b31m\u202egnp\u2066\0\r\u2028".encode(), status="500 No")),
    "a refusal without UTF-8": sent(http(b"\xff\xfe\xd8\x00" * 100, status="403 No")),
    "the key": sent(http(f"{KEY} is wrong".encode(), status="401 No")),
    "the key in pieces": sent(http((f"key={KEY}" * 9000).encode(), status="400 No")),
}  # fmt: skip


class Hostile(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 100

    def __init__(self) -> None:
        self.acts: list[Act] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    def url(self, act: Act) -> str:
        self.acts.append(act)
        return f"http://127.0.0.1:{self.server_address[1]}/{len(self.acts) - 1}/v1"

    def handle_error(self, *_: object) -> None:
        pass  # the client had enough


class _Handler(socketserver.StreamRequestHandler):
    server: Hostile

    def handle(self) -> None:
        number = int(self.rfile.readline().split(b"/")[1])
        while (line := self.rfile.readline()).strip():
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        self.rfile.read(length)
        self.server.acts[number](self.connection)


@pytest.fixture(scope="module")
def server() -> Iterator[Hostile]:
    with Hostile() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_client, "_LARGEST_REPLY", 2**20)
    monkeypatch.setattr(chat_client, "_FIRST_WAIT", 0.01)
    monkeypatch.setenv("MY_JUDGE", KEY)
    # Loading the certificates takes longer than all the rest.
    monkeypatch.setattr("httpx2.AsyncClient", partial(httpx2.AsyncClient, verify=False))


def client(server: Hostile, act: Act, **options: Any) -> ChatClient:
    return ChatClient(server.url(act), "m", **{"timeout": TIMEOUT, "retries": 0, **options})


@pytest.mark.parametrize("name", REPLIES)
def test_an_odd_reply_is_a_reply(name: str, server: Hostile) -> None:
    act, text = REPLIES[name]
    assert client(server, act, timeout=10.0).ask(HELLO, {}).text == text


@pytest.mark.parametrize("name", ERRORS)
def test_whatever_a_server_does_ends_in_time_in_one_error_that_can_be_shown(
    name: str, server: Hostile
) -> None:
    asked = client(server, ERRORS[name], key_variable="MY_JUDGE")
    started = time.monotonic()
    with pytest.raises(ServerError) as caught:
        asked.ask(HELLO, {})
    assert time.monotonic() - started < TIMEOUT + PATIENCE  # without a deadline some never end
    message = str(caught.value)
    assert asked.url in message and KEY not in message
    assert len(message) < 700 and printable(message, lines=False) == message


def test_there_are_many_of_them() -> None:
    assert len(REPLIES) + len(ERRORS) >= 100


@pytest.mark.parametrize("name", [name for name in ERRORS if name.startswith("dripping")])
def test_a_reply_that_drips_in_has_no_more_time_than_one_that_does_not_come(
    name: str, server: Hostile
) -> None:
    started = time.monotonic()
    with pytest.raises(ServerError, match=r"no reply within 0\.4 seconds"):
        client(server, ERRORS[name]).ask(HELLO, {})
    assert TIMEOUT <= time.monotonic() - started < TIMEOUT + PATIENCE


@pytest.mark.parametrize(
    ("begin", "limit"), [(head(), "_LARGEST_REPLY"), (head(status="403 No"), "_LARGEST_ERROR")]
)
def test_of_an_endless_reply_no_more_is_read_than_the_limit(
    begin: bytes, limit: str, server: Hostile
) -> None:
    count = []

    def act(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
        connection.sendall(begin)
        while True:
            connection.sendall(b"a" * 2**14)
            count.append(2**14)

    with pytest.raises(ServerError, match=r"more than 1 MiB|HTTP 403: a+\.\.\."):
        client(server, act, timeout=30.0).ask(HELLO, {})
    # What lies in the buffers of the two sockets is on top.
    assert sum(count) < getattr(chat_client, limit) + 12 * 2**20


def test_a_reply_that_was_smuggled_in_behind_another_answers_no_request(server: Hostile) -> None:
    number = iter(range(100))

    def act(connection: socket.socket) -> None:
        connection.sendall(http(good(f"reply {next(number)}")) + http(good("smuggled")))
        connection.recv(1)  # the connection stays open until the client has had enough of it

    asked = client(server, act, timeout=10.0, concurrency=1)
    replies = [reply for _, reply in asked.for_all(range(5), lambda n: (HELLO, {}))]
    assert [reply.text for reply in replies if isinstance(reply, Reply)] == [f"reply {n}" for n in range(5)]


def test_one_bad_request_among_many_costs_the_others_nothing(server: Hostile) -> None:
    done = iter(range(1000))

    def act(connection: socket.socket) -> None:
        # Every third attempt fails, each in another way; five in a row never do.
        number = next(done)
        acts = [
            act for name, act in ERRORS.items() if name.startswith(("JSON", "nested", "a chunk", "reset"))
        ]
        (acts[number // 3 % len(acts)] if number % 3 == 0 else sent(http(good())))(connection)

    asked = client(server, act, timeout=10.0, retries=8)
    found = dict(asked.for_all(range(60), lambda n: (HELLO, {})))
    assert len(found) == 60 and not any(isinstance(reply, RejectedRequest) for reply in found.values())


def test_half_a_surrogate_is_sent_judged_and_written(server: Hostile, tmp_path: Path) -> None:
    act = sent(http(rb'{"choices":[{"message":{"content":"Verdict: safe \ud83d"}}]}'))
    choice = JudgeChoice("llm", "m", url=server.url(act), cache=tmp_path, timeout=10.0)
    for _ in range(2):  # the second time from the cache
        judge = make_judge(choice, ATTACK)
        ((_, verdict),) = judge.judge([Exchange("half \ud83d", "and \udc00 half", "en")])
        assert verdict.reply == "Verdict: safe \N{REPLACEMENT CHARACTER}" and verdict.verdict == "safe"


# ---- Interrupts ------------------------------------------------------------------------------------------------------


def _interrupt_after(seconds: float) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()


def test_an_interrupt_does_not_wait_for_a_slow_server_and_keeps_what_was_answered(
    server: Hostile, tmp_path: Path
) -> None:
    number, interrupted = iter(range(100)), []

    def act(connection: socket.socket) -> None:
        asked = next(number)
        if asked == 7:  # the third that waits, and no more than three are under way
            interrupted.append(time.monotonic())
            _interrupt_after(0.8)
        (sent(http(good())) if asked < 5 else stalling())(connection)

    choice = ModelChoice("m", engine="server", url=server.url(act), concurrency=3, timeout=600.0)
    prompts = PromptSet("p", tuple(Prompt(str(n), "en", f"question {n}") for n in range(20)), "here")
    with pytest.raises(KeyboardInterrupt):
        make_answers(ServerEngine(choice, Generation()), prompts, tmp_path)
    assert time.monotonic() - interrupted[0] < PATIENCE  # the server has 600 seconds
    assert len(read_rows(tmp_path / "answers.jsonl", dict)) == 5


@pytest.mark.parametrize(
    "act", [stalling(), sent(http(b"", "Retry-After: 300", status="429 No"))], ids=["reply", "wait"]
)
def test_an_interrupted_program_is_gone_at_once(act: Act, server: Hostile) -> None:
    code = (
        "import sys\nfrom mpo.evaluation.chat_client import ChatClient\n"
        "client = ChatClient(sys.argv[1], 'm', timeout=600.0)\nprint('asking', flush=True)\n"
        "list(client.for_all(range(9), lambda n: ([], {})))"
    )
    asked = threading.Event()
    process = subprocess.Popen(
        [sys.executable, "-c", code, server.url(lambda connection: (asked.set(), act(connection))[1])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "asking\n"
    assert asked.wait(60)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - started < PATIENCE  # the server has 600 seconds
    assert process.returncode != 0 and errors.rstrip().endswith("KeyboardInterrupt")
