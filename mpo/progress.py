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
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_BETWEEN_LINES = 5.0  # seconds


class TrainingProgress(TrainerCallback):
    """Shows loss, reward-gap term, retention term, pairs per second and time left.

    On a terminal this is a bar; elsewhere (a log file, a pipe) it is one line for every tenth of the steps. It replaces
    the callbacks of transformers, which print a dictionary at every log.

    Args:
        stream: where to write; standard error by default.
        bar: True for a bar, False for lines; by default a bar where ``stream`` is a terminal.
    """

    def __init__(self, stream: TextIO | None = None, bar: bool | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.wants_bar = self.stream.isatty() if bar is None else bar
        self._bar: tqdm[Any] | None = None
        self._latest: dict[str, float] = {}
        self._started = 0.0
        self._first_step = 0
        self._shown_tenth = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._started, self._first_step = time.monotonic(), state.global_step
        self._shown_tenth = 10 * state.global_step // max(state.max_steps, 1)
        if self.wants_bar:
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="Training",
                unit="step",
                file=self.stream,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs:
            self._write(f"Step {state.global_step}: held-out loss {logs['eval_loss']:.4f}")
        if "loss" not in logs:
            return
        self._latest = logs
        if self._bar is not None:
            self._bar.set_postfix_str(self._numbers(), refresh=True)
            return
        tenth = 10 * state.global_step // max(state.max_steps, 1)
        if tenth > self._shown_tenth and not self.wants_bar:
            self._shown_tenth = tenth
            left = self._seconds_left(state)
            self._write(
                f"Step {state.global_step}/{state.max_steps}: {self._numbers()}"
                + (f", {duration(left)} left" if state.global_step < state.max_steps else "")
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the bar on the screen as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _numbers(self) -> str:
        logs = self._latest
        words = [f"loss {logs['loss']:.4f}"]
        terms = [
            f"{name} {logs[key]:.4f}"
            for key, name in (("loss/reward_gap", "gap"), ("loss/retention", "retain"))
            if key in logs
        ]
        if terms:
            words[0] += f" ({', '.join(terms)})"
        if "pairs_per_second" in logs:
            words.append(f"{logs['pairs_per_second']:.3g} pairs/s")
        return ", ".join(words)

    def _seconds_left(self, state: TrainerState) -> float:
        done = state.global_step - self._first_step
        return (time.monotonic() - self._started) / max(done, 1) * (state.max_steps - state.global_step)

    def _write(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=self.stream)
        else:
            print(line, file=self.stream, flush=True)


class CountProgress:
    """How many of a known number are done: a bar on a terminal, elsewhere a line for every tenth.

    Use it as a context manager; ``done`` of them are there before it starts.
    """

    def __init__(
        self, title: str, total: int, *, done: int = 0, unit: str = "it", stream: TextIO | None = None
    ) -> None:
        self.title, self.total, self.count, self.unit = title, total, done, unit
        self.stream = sys.stderr if stream is None else stream
        self._started, self._first = time.monotonic(), done
        self._last_line = self._started
        self._shown_tenth = 10 * done // max(total, 1)
        self._bar: tqdm[Any] | None = None
        if self.stream.isatty():
            self._bar = tqdm(
                total=total, initial=done, desc=title, unit=unit, file=self.stream, dynamic_ncols=True
            )

    def advance(self) -> None:
        """One more is done."""
        self.count += 1
        if self._bar is not None:
            self._bar.update(1)
            return
        tenth, now = 10 * self.count // max(self.total, 1), time.monotonic()
        # What goes by in seconds, or comes in batches, needs no line of its own.
        if self.count == self.total or (tenth > self._shown_tenth and now - self._last_line > _BETWEEN_LINES):
            self._shown_tenth, self._last_line = tenth, now
            left = (now - self._started) / (self.count - self._first) * (self.total - self.count)
            rest = f", {duration(left)} left" if self.count < self.total else ""
            print(f"{self.title}: {self.count}/{self.total} {self.unit}s{rest}", file=self.stream, flush=True)

    def __enter__(self) -> CountProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class _AboveTheBar(logging.Handler):
    """Writes this package's warnings without tearing the bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        text = re.sub(r"^\[RANK \d+\] ", "", record.getMessage())
        tqdm.write(f"{record.levelname.capitalize()}: {text}", file=sys.stderr)


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
