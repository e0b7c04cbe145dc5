"""Runs a command of mpo in a process of its own, so that its memory is given back and its end is not the caller's."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from mpo.common.characters import printable
from mpo.common.words import shortened
from mpo.errors import StoppedBySignal, StorageError

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_KEPT_LINES = 40


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: Its exit code; below 0 the signal that ended it.
        said: Its error, or its last line.
    """

    code: int
    said: str

    @property
    def reason(self) -> str:
        """Why it failed, as one line."""
        if self.code < 0:
            name = signal.Signals(-self.code).name
            memory = "; the system may have run out of memory" if -self.code == signal.SIGKILL else ""
            return f"its process was ended by {name}{memory}"
        return self.said or f"its process ended with exit code {self.code}"


def run_mpo(words: Sequence[str], log: Path) -> Ended:
    """Runs ``mpo`` with these words, shows what it prints, and adds that to a log.

    What tells this process to end is passed on, and the end of the command is waited for, so that it can save its state.

    Args:
        words: Behind ``mpo``.
        log: A file; made where it is missing.

    Raises:
        StoppedBySignal: This process was told to end.
        StorageError: The log cannot be written.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            return _run([sys.executable, "-m", "mpo", *words], file)
    except OSError as error:
        raise StorageError(f"Cannot write {log}: {error.strerror or error}.") from error


def _run(command: Sequence[str], log: Any) -> Ended:
    last: deque[str] = deque(maxlen=_KEPT_LINES)
    # In a session of its own, a Ctrl-C at the terminal reaches it once, from here.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"},
    )
    assert process.stdout is not None
    with _forwarding(process) as received:
        for line in process.stdout:
            log.write(line)
            log.flush()
            text = printable(line.rstrip())
            last.append(text)
            print(f"    {text}" if text else "", flush=True)
        code = process.wait()
    if received:
        raise StoppedBySignal(received[0])
    errors = [line for line in last if line.startswith("Error: ")]
    said = (
        errors[-1].removeprefix("Error: ") if errors else next((line for line in reversed(last) if line), "")
    )
    return Ended(code, shortened(said, 600))


@contextlib.contextmanager
def _forwarding(process: subprocess.Popen[str]) -> Iterator[list[int]]:
    """Passes signals on to the process; yields those that came."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if process.poll() is None:  # an error on this side, such as a full disk
            process.terminate()
            process.wait()
