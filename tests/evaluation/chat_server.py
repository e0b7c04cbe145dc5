"""A real HTTP server on the loopback that speaks chat completions, and misbehaves where a test wants it to."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("429", "500", "503", "slow", "broken JSON", "no choices", "cut off", "reset")


@dataclass
class ChatServer:
    """
    Attributes:
        reply: what the model would write to a request's body, or fields of its message.
        fault: the fault to show at the n-th request (from 0) with this body, or None to answer it well.
        answered: how often each last message was answered well.
        requests: every body that arrived.
        headers: the headers it came with.
        slow: seconds that a slow reply takes.
        retry_after: what a 429 asks for.
        error: body of an error, from the request's headers.
        finish_reason: of a good reply to a request's body.
    """

    reply: Callable[[dict[str, Any]], str | dict[str, Any]] = lambda body: "Verdict: safe"
    fault: Callable[[int, dict[str, Any]], str | None] = lambda number, body: None
    answered: Counter[str] = field(default_factory=Counter)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    slow: float = 2.5
    retry_after: str = "0"
    error: Callable[[dict[str, str]], str] = lambda headers: "as the test wants it"
    finish_reason: Callable[[dict[str, Any]], str] = lambda body: "stop"
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serve(server: ChatServer, port: int = 0):
    """Runs the server, on a free port by default; yields it with its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with server.lock:
                number = len(server.requests)
                server.requests.append(body)
                server.headers.append({name.lower(): value for name, value in self.headers.items()})
                fault = server.fault(number, body)
            if fault is not None:
                return self.misbehave(fault)
            text = server.reply(body)
            message = {"role": "assistant", **(text if isinstance(text, dict) else {"content": text})}
            good = {"choices": [{"message": message, "finish_reason": server.finish_reason(body)}]}
            with server.lock:
                server.answered[body["messages"][-1]["content"]] += 1
            self.send(200, json.dumps(good).encode())

        def misbehave(self, fault: str) -> None:
            if fault.isdigit():
                extra = {"Retry-After": server.retry_after} if fault == "429" else {}
                said = server.error({name.lower(): value for name, value in self.headers.items()})
                self.send(int(fault), json.dumps({"error": {"message": said}}).encode(), **extra)
            elif fault == "slow":
                time.sleep(server.slow)
                self.send(200, b"{}")
            elif fault == "broken JSON":
                self.send(200, b'{"choices": [{"message": {"content": "Verdict: unsafe"')
            elif fault == "no choices":
                self.send(200, b'{"choices": []}')
            elif fault == "cut off":
                self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"choices": [')
                self.close_connection = True
            elif fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
            else:
                raise AssertionError(fault)

        def send(self, status: int, data: bytes, **headers: str) -> None:
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the client had no patience
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        allow_reuse_address = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass

    http = Server(("127.0.0.1", port), Handler)
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
