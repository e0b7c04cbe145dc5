"""A run that is told to end by a signal saves its state at the end of the step, on all ranks together."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

from transformers import TrainerControl, TrainerState

from mpo.errors import StoppedBySignal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; what a scheduler or a launcher sends before it kills; what a job script may ask a scheduler to send early."""

_ONE_PRESS = 2.0
"""Seconds within which a second SIGINT is the first one again: a terminal and a launcher both send it."""


class StopSignals:
    """What :data:`SIGNALS` do while this is entered. A handler that someone else has set stays.

    Args:
        keep: Whether a signal waits in :attr:`asked` for the end of the step; otherwise it is raised at once. A second
            Ctrl-C is raised in any case.

    Attributes:
        asked: Number of the signal that was received and waits, or 0.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self.keep = keep
        self.asked = 0
        self._received = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self.asked = 0
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            for number in SIGNALS:
                if _is_free(number):
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.keep and not self.asked:
            self.asked, self._received = number, time.monotonic()
        elif not self.keep or (number == signal.SIGINT and time.monotonic() - self._received > _ONE_PRESS):
            raise StoppedBySignal(number)


def _is_free(number: int) -> bool:
    handler = signal.getsignal(number)
    if isinstance(getattr(handler, "__self__", None), StopSignals):
        return True
    # A job script has its launcher ignore SIGUSR1, which its processes inherit.
    ignored = handler == signal.SIG_IGN and number == signal.SIGUSR1
    return ignored or handler in (signal.SIG_DFL, signal.default_int_handler)


class LastStep:
    """Turns the step after which a run ends into its last one: what the loop does there, and at the end of its epoch."""

    def __init__(self) -> None:
        self._leaving = False

    def direct(self, control: TrainerControl, state: TrainerState) -> None:
        """Set what is logged, evaluated and saved, first at the end of the step and then where the epoch is left.

        In the middle of an epoch nothing happens that belongs to its end. At its end the checkpoint comes last, so that it
        knows of the evaluation.
        """
        whole_epoch = float(state.epoch or 0.0).is_integer()
        if not self._leaving:
            self._leaving = control.should_training_stop = True
            control.should_save = not whole_epoch
        elif whole_epoch:
            control.should_save = True
        else:
            control.should_save = control.should_evaluate = control.should_log = False
