"""A client for servers that speak OpenAI's chat completions: vLLM, SGLang, llama.cpp, ``transformers serve``, OpenAI.

It sends one kind of request, so it is written on ``httpx2``, which huggingface_hub uses too, and not on the ``openai``
package, which brings the whole API. Asking again is decided here, since a reply that is cut off or no JSON has to be
asked for again as well.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mpo.common.redaction import REDACTED, redact_text
from mpo.errors import ConfigError, DependencyError, ServerError

Message = Mapping[str, Any]
Item = TypeVar("Item")
Result = TypeVar("Result")

OPENAI_URL = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"

_TRY_AGAIN = frozenset({408, 409, 425, 429})  # and every 5xx
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0  # seconds
_LONGEST_DEMANDED_WAIT = 300.0  # seconds; what a server's Retry-After may ask for
_REJECTIONS_WITHOUT_REPLY = 20  # after so many, the requests are at fault and not the texts in them


class RejectedRequest(ServerError):
    """The server refuses this one request (HTTP 400, 413 or 422): it is too long, or a filter dislikes it."""


@dataclass(frozen=True)
class Reply:
    """What a model wrote.

    Attributes:
        text: The message's text, empty where the model wrote none.
        finish_reason: ``"stop"`` where the model ended by itself, ``"length"`` where it was cut off, or what else the
            server says.
    """

    text: str
    finish_reason: str | None


@dataclass
class ChatClient:
    """Asks one model behind one URL.

    Safe to use from several threads.

    Attributes:
        url: The server's base URL, ``http://localhost:8000/v1``; ``/v1`` is added where there is no path.
        model: What the server calls the model.
        key_variable: Environment variable that holds the API key. By default OPENAI_API_KEY for OpenAI's own server and
            no key for any other: a key is not sent to where it does not belong.
        timeout: Seconds to wait for a reply.
        retries: How often a request is sent again after a failure that may pass.
        concurrency: Requests under way at the same time.
    """

    url: str
    model: str
    key_variable: str | None = None
    timeout: float = 120.0
    retries: int = 8
    concurrency: int = 8
    _key: str = field(default="", repr=False)
    _stopped: threading.Event = field(default_factory=threading.Event, repr=False)
    _http: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Checks the settings without connecting.

        Raises:
            ConfigError: The URL is none, a number is out of range, or the key is missing or cannot be sent.
            DependencyError: httpx2 is not installed.
        """
        self.url = _base_url(self.url)
        if self.timeout <= 0 or self.retries < 0 or self.concurrency < 1:
            raise ConfigError(
                f"timeout, retries and concurrency: expected more than 0, at least 0 and at least 1, got {self.timeout!r}, "
                f"{self.retries!r} and {self.concurrency!r}."
            )
        if self.key_variable is None and self.url == OPENAI_URL:
            self.key_variable = OPENAI_KEY
        try:
            import httpx2
        except ImportError as error:
            raise DependencyError(
                "Talking to a server needs the package httpx2: pip install httpx2"
            ) from error
        headers = {}
        if self.key_variable is not None:
            key = os.environ.get(self.key_variable, "").strip()
            if not key:
                raise ConfigError(
                    f"{self.url} needs a key, but the environment variable {self.key_variable} is empty. Set it (a key is read "
                    "from nowhere else)."
                )
            if not (key.isascii() and key.isprintable()) or " " in key:
                raise ConfigError(
                    f"The environment variable {self.key_variable} does not hold a key: expected letters, digits and signs of "
                    "ASCII in one line, without spaces. Was more than the key copied?"
                )
            self._key = key
            headers["Authorization"] = f"Bearer {key}"
        self._http = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(self.timeout, connect=min(self.timeout, 30.0), pool=None),
            limits=httpx2.Limits(
                max_connections=self.concurrency, max_keepalive_connections=self.concurrency
            ),
        )

    def ask(self, messages: Sequence[Message], parameters: Mapping[str, Any]) -> Reply:
        """Sends one conversation and returns the model's reply, asking again as often as allowed.

        Args:
            messages: The conversation, ``{"role", "content"}`` each.
            parameters: Further fields of the request (``max_tokens``, ``temperature``, ...); those that are None are
                left out.

        Raises:
            RejectedRequest: The server refuses this request and would refuse it again.
            ServerError: The server refuses any request (wrong key, unknown model), or gave no usable reply in time.
        """
        body = {"model": self.model, "messages": list(messages), **parameters}
        body = {name: value for name, value in body.items() if value is not None}
        trouble = ""
        for attempt in range(self.retries + 1):
            reply, trouble, demanded = self._try(body)
            if reply is not None:
                return reply
            if attempt < self.retries and self._stopped.wait(_delay(attempt, demanded)):
                break
        raise ServerError(
            f"{self.url} gave no usable reply in {self.retries + 1} attempts. The last: {trouble} What was answered before is "
            "kept: see to the server, and run the same command again."
        )

    def for_all(
        self, items: Sequence[Item], work: Callable[[Item], Result], *, accepted: bool = False
    ) -> Iterator[tuple[Item, Result | RejectedRequest]]:
        """Calls ``work``, which asks this client, on every item, several at a time; yields results as they come.

        A request that the server rejects is yielded as its error, once the server has accepted any other: one that
        rejects all is wrongly set up. That, and any other error, ends the work: nothing new is begun, what was under
        way is still yielded, then the error is raised.

        Args:
            items: What to work on.
            work: Called with one item, in a thread.
            accepted: The server is known to accept such requests.

        Raises:
            ServerError: See above.
        """
        rejected: list[tuple[Item, RejectedRequest]] = []
        self._stopped.clear()
        waiting = iter(items)
        under_way: dict[Future[Result], Item] = {}
        failure: BaseException | None = None
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="ask")

        def begin() -> None:
            for item in waiting:
                under_way[pool.submit(work, item)] = item
                if len(under_way) >= self.concurrency:
                    return

        try:
            begin()
            while under_way:
                done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in done:
                    item = under_way.pop(future)
                    error = future.exception()
                    if error is None:
                        accepted = True
                        yield item, future.result()
                    elif isinstance(error, RejectedRequest) and (
                        accepted or len(rejected) < _REJECTIONS_WITHOUT_REPLY
                    ):
                        rejected.append((item, error))
                    else:
                        failure = failure or error
                        self._stopped.set()
                if accepted:
                    yield from rejected
                    rejected.clear()
                if failure is None:
                    begin()
            failure = failure or (rejected[0][1] if rejected else None)
            if failure is not None:
                raise failure
        finally:
            self._stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def _try(self, body: Mapping[str, Any]) -> tuple[Reply | None, str, float | None]:
        """One attempt: the reply, or what went wrong and the seconds that the server asks to wait."""
        import httpx2

        try:
            response = self._http.post(f"{self.url}/chat/completions", json=body)
        except httpx2.TimeoutException:
            return None, f"no reply within {self.timeout:g} seconds.", None
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            return None, f"the connection failed ({self._shown(str(error)) or type(error).__name__}).", None
        status = response.status_code
        reply = _parse(response) if status == 200 else None
        if reply is not None:
            return reply, "", None
        said = f"HTTP {status}: {_excerpt(self._shown(response.text))}"
        if status == 200:
            return None, f"no chat completion, but {said}", None
        if status in _TRY_AGAIN or status >= 500:
            return None, said, _retry_after(response.headers.get("retry-after"))
        if status in (400, 413, 422):
            raise RejectedRequest(f"{self.url} rejects a request with {said}")
        hint = {
            401: f"Is the key in {self.key_variable} right?"
            if self.key_variable
            else "It wants a key: name the environment variable that holds it.",
            403: "The key may not use this model.",
            404: f"Does it serve a model called {self.model!r}, and is this the base URL, which mostly ends in /v1?",
        }.get(status, "Is this the base URL of an OpenAI-compatible server?")
        raise ServerError(f"{self.url} answers with {said} {hint}")

    def _shown(self, text: str) -> str:
        """What a server said, without the key, which some repeat."""
        return redact_text(text.replace(self._key, REDACTED) if self._key else text)


def _base_url(url: str) -> str:
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"url: expected http://HOST:PORT/v1 or https://..., got {redact_text(url)!r}.")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            "url: expected a plain address without a login, a query or a fragment. A key belongs in an environment variable."
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"


def _parse(response: Any) -> Reply | None:
    try:
        choice = response.json()["choices"][0]
        text = choice["message"].get("content")
        reason = choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
    if text is not None and not isinstance(text, str):
        return None
    return Reply(text or "", reason if isinstance(reason, str) else None)


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    text = "".join(c for c in text if c.isprintable())
    text = text if len(text) <= 300 else text[:297] + "..."
    return text if text.endswith((".", "!", "?")) else text + "."


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date (RFC 9110, section 10.2.3)."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(seconds, 0.0), _LONGEST_DEMANDED_WAIT) if seconds == seconds else None


def _delay(attempt: int, demanded: float | None) -> float:
    """Seconds before the next attempt: doubled each time, spread at random so that threads do not return as one."""
    growing = min(_FIRST_WAIT * 2.0**attempt, _LONGEST_WAIT) * random.uniform(0.5, 1.0)
    return growing if demanded is None else max(demanded, growing)
