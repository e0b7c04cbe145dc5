"""What a person sees while a model works: in training the loss, its two terms, the speed and the time left."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import warnings
from typing import Any, TextIO

from tqdm.auto import tqdm

from mpo.common.characters import printable
from mpo.common.words import duration

_BETWEEN_LINES = 5.0  # seconds


class CountProgress:
    """How many of a known number are done: a bar on a terminal, elsewhere a line for every tenth.

    Use it as a context manager; ``done`` of them are there before it starts. Of what is ``brief`` nothing is said unless it takes
    more than a few seconds.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        done: int = 0,
        unit: str = "it",
        brief: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self.title, self.total, self.count, self.unit = title, total, done, unit
        self.stream = sys.stderr if stream is None else stream
        self._started, self._first = time.monotonic(), done
        self._last_line = self._started
        self._shown_tenth = 10 * done // max(total, 1)
        self._is_brief = brief
        self._bar: tqdm[Any] | None = None
        if self.stream.isatty():
            self._bar = tqdm(
                total=total,
                initial=done,
                desc=title,
                unit=unit,
                file=self.stream,
                dynamic_ncols=True,
                leave=not brief,
            )

    def advance(self, by: int = 1) -> None:
        """One more is done, or several at once."""
        self.count += by
        if self._bar is not None:
            self._bar.update(by)
            return
        tenth, now = 10 * self.count // max(self.total, 1), time.monotonic()
        # What goes by in seconds, or comes in batches, needs no line of its own.
        is_due = tenth > self._shown_tenth and now - self._last_line > _BETWEEN_LINES
        if is_due or (self.count == self.total and not self._is_brief):
            self._shown_tenth, self._last_line, self._is_brief = tenth, now, False
            left = (now - self._started) / (self.count - self._first) * (self.total - self.count)
            rest = f", {duration(left)} left" if self.count < self.total else ""
            print(f"{self.title}: {self.count}/{self.total} {self.unit}s{rest}", file=self.stream, flush=True)

    def __enter__(self) -> CountProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


class _AboveTheBar(logging.Handler):
    """Writes this package's warnings without tearing the bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        text = re.sub(r"^\[RANK \d+\] ", "", record.getMessage())
        tqdm.write(printable(f"{record.levelname.capitalize()}: {text}"), file=sys.stderr)


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def quiet_libraries() -> None:
    """Silences what transformers, TRL, datasets and others say that is none of a user's business.

    This package's own warnings stay. ``MPO_DEBUG=1`` leaves everything on.
    """
    logger = logging.getLogger("mpo")
    if not any(isinstance(handler, _AboveTheBar) for handler in logger.handlers):
        logger.addHandler(_AboveTheBar(logging.WARNING))
    if os.environ.get("MPO_DEBUG"):
        return
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    for name in ("trl", "peft", "accelerate", "torch", "huggingface_hub", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed sets its logger's level when it is imported, which is later than this; a filter stays.
    logging.getLogger("DeepSpeed").addFilter(_errors_only)
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings(
            "ignore", category=category, module=r"(transformers|trl|peft|torch|accelerate|datasets)"
        )
