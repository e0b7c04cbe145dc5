"""What a person sees in a notebook while a model is trained: one small table that is rewritten in place."""

from __future__ import annotations

import html
import time
from collections.abc import Iterable
from typing import Any

from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.utils import is_in_notebook

from mpo.common.words import MINUS, duration
from mpo.training.progress import TrainingProgress, held_out_gaps, source_of

_BETWEEN_UPDATES = 0.5  # seconds
_MOST_COLUMNS = 8  # measurements side by side


def show_compactly(trainer: Trainer, own: Iterable[Any]) -> None:
    """Show a run as fits where it is started: a live table in a notebook, a bar on a terminal, lines elsewhere.

    What transformers would show is taken away: a dictionary at every log, or a column for each metric of each language.

    Args:
        trainer: Any trainer.
        own: Callbacks that it was given; nothing is added where one of them shows the run.
    """
    for shown in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
        trainer.remove_callback(shown)
    if not any(isinstance(each, (TrainingProgress, NotebookProgress)) for each in own):
        trainer.add_callback(NotebookProgress() if is_in_notebook() else TrainingProgress())


class NotebookProgress(TrainerCallback):
    """A live table: steps, time, the loss with its terms, and per language the held-out gap at each evaluation.

    It takes the place of the table of transformers, which has a column for every metric of every language. Needs IPython,
    which a notebook has.
    """

    def __init__(self) -> None:
        self._handle: Any = None
        self._shown_at = 0.0
        self._started = 0.0
        self._first_step = 0
        self._latest: dict[str, float] = {}
        self._measured: dict[int, dict[str, float]] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._handle = None
        self._started, self._first_step = time.monotonic(), state.global_step
        self._latest, self._measured = {}, {}
        self._show(args, state, now=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._show(args, state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self._latest = logs
        if gaps := held_out_gaps(logs):
            self._measured[state.global_step] = gaps
            self._show(args, state, now=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._show(args, state, now=True)

    def _show(self, args: TrainingArguments, state: TrainerState, *, now: bool = False) -> None:
        if not state.is_world_process_zero:
            return
        time_now = time.monotonic()
        if not now and time_now - self._shown_at < _BETWEEN_UPDATES:
            return
        self._shown_at = time_now
        from IPython.display import HTML, display

        page = HTML(self._page(source_of(args), state))
        if self._handle is None:
            self._handle = display(page, display_id=True)
        else:
            self._handle.update(page)

    def _page(self, source: str, state: TrainerState) -> str:
        spent = time.monotonic() - self._started
        done = state.global_step - self._first_step
        left = spent / max(done, 1) * (state.max_steps - state.global_step)
        times = [duration(spent), *([f"{duration(left)} left"] if done and left else [])]
        head = (
            f"Step {state.global_step} of {state.max_steps} "
            f'<progress value="{state.global_step}" max="{max(state.max_steps, 1)}"></progress> {", ".join(times)}'
        )
        facts = [
            (name, f"{self._latest[key]:{form}}")
            for name, key, form in (
                ("loss", "loss", ".4f"),
                ("gap", "loss/reward_gap", ".4f"),
                ("retain", "loss/retention", ".4f"),
                ("pairs/s", "pairs_per_second", ".3g"),
            )
            if key in self._latest
        ]
        line = ", ".join(f"{name} {value}" for name, value in facts)
        return f"<p>{head}<br>{html.escape(line)}</p>{self._table(source)}"

    def _table(self, source: str) -> str:
        if not self._measured:
            return ""
        steps = sorted(self._measured)
        if len(steps) > _MOST_COLUMNS:  # the first, and the last ones
            steps = [steps[0], *steps[1 - _MOST_COLUMNS :]]
        codes = {code: None for gaps in self._measured.values() for code in gaps}
        codes = dict.fromkeys(sorted(codes, key=lambda code: (code != source, code)))
        heads = "".join(f"<th>step {step}</th>" for step in steps)
        rows = "".join(
            f"<tr><th>{html.escape(code)}</th>"
            + "".join(f"<td>{_signed(self._measured[step].get(code))}</td>" for step in steps)
            + "</tr>"
            for code in codes
        )
        return f"<table><tr><th>held-out gap</th>{heads}</tr>{rows}</table>"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}".replace("-", MINUS)
