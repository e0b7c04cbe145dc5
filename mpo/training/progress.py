"""What a person sees while a model is trained: the loss, its two terms, the held-out gap, the speed and the time left."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mpo.common.words import clock, duration

_MOST_NAMED = 8  # languages whose held-out gap a line has; of more, their mean and the least


class TrainingProgress(TrainerCallback):
    """Shows loss, reward-gap term, retention term, pairs per second and time left.

    On a terminal this is a bar; elsewhere (a log file, a pipe) it is one line for every tenth of the steps, with the time
    of the day. Each evaluation is a line with the held-out gap of every language. It replaces the callbacks of
    transformers, which print a dictionary at every log.

    Args:
        stream: Where to write; standard error by default.
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
            parts = [f"held-out loss {logs['eval_loss']:.4f}", *_gaps(held_out_gaps(logs), source_of(args))]
            self._write(f"Step {state.global_step}: {', '.join(parts)}")
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
            for key, name in (
                ("loss/reward_gap", "gap"),
                ("loss/retention", "retain"),
                ("harmless/loss/retention", "harmless held"),
            )
            if key in logs
        ]
        if terms:
            words[0] += f" ({', '.join(terms)})"
        words += _refusals(logs)
        if "pairs_per_second" in logs:
            words.append(f"{logs['pairs_per_second']:.3g} pairs/s")
        return ", ".join(words)

    def _seconds_left(self, state: TrainerState) -> float:
        done = state.global_step - self._first_step
        return (time.monotonic() - self._started) / max(done, 1) * (state.max_steps - state.global_step)

    def _write(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(f"{clock()} {line}", file=self.stream)
        else:
            print(f"{clock()} {line}", file=self.stream, flush=True)


def source_of(args: TrainingArguments) -> str:
    """The source language of a run's settings."""
    return str(getattr(args, "source_language", "en"))


def held_out_gaps(logs: Mapping[str, Any]) -> dict[str, float]:
    """The held-out gap of each language that an evaluation has logged; empty with several evaluation sets."""
    start = "eval_reward_gap/"
    return {
        key.removeprefix(start): value
        for key, value in logs.items()
        if key.startswith(start) and isinstance(value, float) and math.isfinite(value)
    }


def _refusals(logs: Mapping[str, Any]) -> list[str]:
    """``refused 45 % of harmful, 2 % of harmless``: of how many greedy decoding says the refusal that is taught, as a mean of
    languages.

    Of harmful prompts a refusal is the chosen response and of harmless ones the rejected one. Long responses are never said
    word by word: where none of either kind is, nothing is said.
    """
    kinds = [
        [100 * value for key, value in logs.items() if key.startswith(start) and math.isfinite(value)]
        for start in ("greedy/chosen/", "harmless/greedy/rejected/")
    ]
    if not all(kinds) or not any(map(any, kinds)):
        return []
    harmful, harmless = (math.fsum(values) / len(values) for values in kinds)
    return [f"refused {harmful:.2g} % of harmful, {harmless:.2g} % of harmless"]


def _gaps(gaps: Mapping[str, float], source: str) -> list[str]:
    """``gap en +0.79, bn +0.41``; of many languages the source's, the mean of the others and the least."""
    targets = {code: gap for code, gap in gaps.items() if code != source}
    shown = {code: gap for code, gap in gaps.items() if code == source}
    if len(targets) > _MOST_NAMED:
        least = min(targets, key=lambda code: targets[code])
        shown[f"mean of {len(targets)} others"] = math.fsum(targets.values()) / len(targets)
        shown[f"least {least}"] = targets[least]
    else:
        shown |= targets
    texts = [f"{name} {gap:+.2f}" for name, gap in shown.items()]
    return [f"gap {texts[0]}", *texts[1:]] if texts else []
