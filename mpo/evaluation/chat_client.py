"""A client for servers that speak OpenAI's chat completions: vLLM, SGLang, llama.cpp, ``transformers serve``, OpenAI.

It sends one kind of request, so it is written on ``httpx2``, which huggingface_hub uses too, and not on the ``openai``
package, which brings the whole API. Asking again is left to ``tenacity`` and not to the HTTP library, since a reply that
is cut off or no JSON has to be asked for again as well.

A server is not trusted. Requests run in an event loop in a thread of their own: there one deadline covers a whole request,
however slowly its reply drips in, and Ctrl-C leaves behind whatever is under way.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from mpo.common.characters import printable, without_halves
from mpo.common.log import get_logger
from mpo.common.redaction import REDACTED, redact_text
from mpo.errors import ConfigError, DependencyError, ServerError

logger = get_logger(__name__)

Message = Mapping[str, Any]
Item = TypeVar("Item")

OPENAI_URL = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"

_TRY_AGAIN = frozenset({408, 409, 425, 429})  # and every 5xx
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0  # seconds
_LONGEST_DEMANDED_WAIT = 300.0  # seconds; what a server's Retry-After may ask for
_LARGEST_REPLY = 8 * 2**20  # bytes; a model that writes 100,000 tokens fills a quarter of it
_LARGEST_ERROR = 2**16  # bytes of a refusal that are read
_REJECTIONS_WITHOUT_REPLY = 20  # after so many, the requests are at fault and not the texts in them


class RejectedRequest(ServerError):
    """The server refuses this one request (HTTP 400, 413 or 422): it is too long, or a filter dislikes it."""


class _Unusable(Exception):
    """An attempt that failed and may go well another time, and the seconds that the server asks to wait before it."""

    def __init__(self, trouble: str, wait: float | None = None) -> None:
        super().__init__(trouble)
        self.wait = wait


@dataclass(frozen=True)
class Reply:
    """What a model wrote.

    Attributes:
        text: The message's text, empty where the model wrote none.
        finish_reason: ``"stop"`` where the model ended by itself, ``"length"`` where it was cut off, or what else the
            server says.
        reasoning: What the server says apart that the model thought: the field ``reasoning_content`` of vLLM, SGLang,
            llama.cpp and DeepSeek, or ``reasoning`` of newer vLLM and OpenRouter.
    """

    text: str
    finish_reason: str | None
    reasoning: str = ""


@dataclass
class ChatClient:
    """Asks one model behind one URL.

    Attributes:
        url: The server's base URL, ``http://localhost:8000/v1``; ``/v1`` is added where there is no path.
        model: What the server calls the model.
        key_variable: Environment variable that holds the API key. By default OPENAI_API_KEY for OpenAI's own server and
            no key for any other: a key is not sent to where it does not belong.
        timeout: Seconds to wait for a reply, from connecting to its last byte.
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

    def __post_init__(self) -> None:
        """Checks the settings without connecting.

        Raises:
            ConfigError: The URL is none, a number is out of range, or the key is missing or cannot be sent.
            DependencyError: httpx2 or tenacity is not installed.
        """
        self.url = _base_url(self.url)
        if not self.timeout > 0 or self.retries < 0 or self.concurrency < 1:
            raise ConfigError(
                f"timeout, retries and concurrency: expected more than 0, at least 0 and at least 1, got {self.timeout!r}, "
                f"{self.retries!r} and {self.concurrency!r}."
            )
        if self.key_variable is None and self.url == OPENAI_URL:
            self.key_variable = OPENAI_KEY
        try:
            import httpx2  # noqa: F401
            import tenacity  # noqa: F401
        except ImportError as error:
            raise DependencyError(
                f"Talking to a server needs the package {error.name}: pip install {error.name}"
            ) from error
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
        with closing(_Session(self)) as session:
            return session.begin(messages, parameters).result()

    def for_all(
        self,
        items: Sequence[Item],
        request: Callable[[Item], tuple[Sequence[Message], Mapping[str, Any]]],
        *,
        accepted: bool = False,
    ) -> Iterator[tuple[Item, Reply | RejectedRequest]]:
        """Asks about every item, several at a time; yields the replies as they come.

        A request that the server rejects is yielded as its error, once the server has accepted any other: one that
        rejects all is wrongly set up. That, and any other error, ends the work: nothing new is begun, what was under
        way is still yielded, then the error is raised. When interrupted, what has arrived is still yielded.

        Args:
            items: What to ask about.
            request: The conversation and the parameters for one item, as :meth:`ask` takes them.
            accepted: The server is known to accept such requests.

        Raises:
            ServerError: See above.
        """
        rejected: list[tuple[Item, RejectedRequest]] = []
        waiting = iter(items)
        under_way: dict[Future[Reply], Item] = {}
        failure: BaseException | None = None
        with closing(_Session(self)) as session:
            while True:
                if failure is None:
                    for item in islice(waiting, self.concurrency - len(under_way)):
                        under_way[session.begin(*request(item))] = item
                if not under_way:
                    break
                try:
                    done = wait(under_way, return_when=FIRST_COMPLETED).done
                except KeyboardInterrupt as interrupt:
                    failure = interrupt
                    done = {future for future in under_way if future.done()}
                    under_way = {future: under_way[future] for future in done}
                for future in done:
                    item, error = under_way.pop(future), future.exception()
                    if error is None:
                        accepted = True
                        yield item, future.result()
                    elif isinstance(error, RejectedRequest) and (
                        accepted or len(rejected) < _REJECTIONS_WITHOUT_REPLY
                    ):
                        rejected.append((item, error))
                    else:
                        failure = failure or error
                        session.stop_asking_again()
                if accepted:
                    yield from rejected
                    rejected.clear()
        failure = failure or (rejected[0][1] if rejected else None)
        if failure is not None:
            raise failure


class _Session:
    """Requests under way, in an event loop in a daemon thread, which neither an interrupt nor the program's end waits for."""

    def __init__(self, client: ChatClient) -> None:
        import httpx2
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

        self._client = client
        # A connection carries one request: what a server sends behind its reply would be taken for the next one's.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "Connection": "close"}
        if client._key:
            headers["Authorization"] = f"Bearer {client._key}"
        self._http = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(None, connect=min(client.timeout, 30.0)),
            limits=httpx2.Limits(max_connections=client.concurrency, max_keepalive_connections=0),
        )
        self._retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Unusable),
            stop=stop_after_attempt(client.retries + 1),
            wait=_wait,
            sleep=self._pause,
            before_sleep=self._say_that_it_waits,
            reraise=True,
        )
        self._has_said = False
        self._stopped, self._closed = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, name="ask", daemon=True).start()

    def begin(self, messages: Sequence[Message], parameters: Mapping[str, Any]) -> Future[Reply]:
        """Sends a request; see :meth:`ChatClient.ask`."""
        body = {"model": self._client.model, "messages": list(messages), **parameters}
        # ASCII, in which half a surrogate pair can be sent, too.
        content = json.dumps({name: value for name, value in body.items() if value is not None})
        return asyncio.run_coroutine_threadsafe(self._ask(content.encode("ascii")), self._loop)

    def stop_asking_again(self) -> None:
        """Ends the requests that wait for another attempt; those that wait for a reply still get it."""
        self._loop.call_soon_threadsafe(self._stopped.set)

    def close(self) -> None:
        """Ends all requests, without waiting until they have ended."""
        self._loop.call_soon_threadsafe(self._closed.set)

    def _run(self) -> None:
        async def until_closed() -> None:
            await self._closed.wait()
            for task in asyncio.all_tasks():
                if task is not asyncio.current_task():
                    task.cancel()
            await self._http.aclose()

        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(until_closed())

    def _say_that_it_waits(self, state: Any) -> None:
        """Once: a server that is not there is asked for minutes, in which nothing else would be printed."""
        if not self._has_said:
            self._has_said = True
            logger.warning(
                f"{self._client.url}: {state.outcome.exception()} Is a server running there? It is asked again, a request up to "
                f"{self._client.retries} times with growing pauses. Further failures like this one are not mentioned."
            )

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), seconds)
            raise ServerError(f"{self._client.url} was not asked again, because another request failed.")

    async def _ask(self, content: bytes) -> Reply:
        client = self._client
        try:
            return await self._retrying.copy()(self._attempt, content)
        except _Unusable as last:
            raise ServerError(
                f"{client.url} gave no usable reply in {client.retries + 1} attempts. The last: {last} What was answered "
                "before is kept: see to the server, and run the same command again."
            ) from None

    async def _attempt(self, content: bytes) -> Reply:
        import httpx2

        client = self._client
        try:
            async with (
                asyncio.timeout(client.timeout),
                self._http.stream("POST", f"{client.url}/chat/completions", content=content) as response,
            ):
                received = await _read(response)
        except (TimeoutError, httpx2.TimeoutException):
            raise _Unusable(f"no reply within {client.timeout:g} seconds.") from None
        except httpx2.TransportError as error:
            said = self._excerpt(str(error) or type(error).__name__).rstrip(".")
            raise _Unusable(f"the connection failed ({said}).") from None
        status = response.status_code
        reply = _parse(received) if status == 200 else None
        if reply is not None:
            return reply
        said = f"HTTP {status}: {self._excerpt(received[:_LARGEST_ERROR].decode('utf-8', 'replace'))}"
        if status == 200:
            raise _Unusable(f"no chat completion, but {said}")
        if status in _TRY_AGAIN or status >= 500:
            raise _Unusable(said, _retry_after(response.headers.get("retry-after")))
        self._refused(status, said)

    def _refused(self, status: int, said: str) -> NoReturn:
        client = self._client
        if status in (400, 413, 422):
            raise RejectedRequest(f"{client.url} rejects a request with {said}")
        hint = {
            401: f"Is the key in {client.key_variable} right?"
            if client.key_variable
            else "It wants a key: name the environment variable that holds it.",
            403: "The key may not use this model.",
            404: f"Does it serve a model called {client.model!r}, and is this the base URL, which mostly ends in /v1?",
        }.get(status, "Is this the base URL of an OpenAI-compatible server?")
        raise ServerError(f"{client.url} answers with {said} {hint}")

    def _excerpt(self, text: str) -> str:
        """The beginning of what a server said, in one line, without the key, which some repeat."""
        key = self._client._key
        text = redact_text(text.replace(key, REDACTED) if key else text)
        text = printable(" ".join(text.split()), lines=False)
        text = text if len(text) <= 300 else text[:297] + "..."
        return text if text.endswith((".", "!", "?")) else text + "."


async def _read(response: Any) -> bytes:
    """The body as it comes, up to a limit: a refusal is cut off there, and a reply is of no use.

    Nothing is decompressed, which was not asked for: a small body could fill the memory.
    """
    limit = _LARGEST_REPLY if response.status_code == 200 else _LARGEST_ERROR
    received = bytearray()
    async for chunk in response.aiter_raw():
        received += chunk
        if len(received) > limit:
            if response.status_code == 200:
                raise _Unusable(f"a reply of more than {limit // 2**20} MiB.")
            break
    return bytes(received)


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


def _parse(content: bytes) -> Reply | None:
    try:
        choice = json.loads(content)["choices"][0]
        message = choice["message"]
        text = message.get("content")
        thoughts = message.get("reasoning_content") or message.get("reasoning")
        reason = choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None
    if text is not None and not isinstance(text, str):
        return None
    return Reply(
        without_halves(text or ""),
        reason if isinstance(reason, str) else None,
        without_halves(thoughts) if isinstance(thoughts, str) else "",
    )


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


def _wait(state: Any) -> float:
    """Seconds that tenacity waits after a failed attempt."""
    return _delay(state.attempt_number - 1, state.outcome.exception().wait)


def _delay(attempt: int, demanded: float | None) -> float:
    """Seconds before the next attempt: doubled each time, spread at random so that requests do not return as one."""
    growing = min(_FIRST_WAIT * 2.0**attempt, _LONGEST_WAIT) * random.uniform(0.5, 1.0)
    return growing if demanded is None else max(demanded, growing)
