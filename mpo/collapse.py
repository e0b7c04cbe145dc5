"""Detects the known way in which preference training collapses: both likelihoods fall while their gap grows."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Collapse:
    """What was seen: over ``points`` logging points a language's chosen log-likelihood fell while its gap rose."""

    language: str
    points: int
    fall: float
    rise: float

    def __str__(self) -> str:
        return (
            f"the log-likelihood of chosen responses in '{self.language}' fell by {self.fall:.2f} nats per token over "
            f"the last {self.points} logging points while its reward gap rose by {self.rise:.2f}: the model is making "
            "both answers unlikely, not the safe one likely. Lower the learning rate or beta, raise `retain_weight`, or "
            "stop here"
        )


class CollapseDetector:
    """
    Watches the mean log-likelihood of chosen responses and the reward gap of each language.

    A collapse is a steady fall: over ``window`` logging points the least-squares line of the chosen log-likelihood falls
    by at least ``drop`` nats per token, explains most of its variance (correlation with time at most -0.8, so that the
    scatter between batches does not count), and the gap's line rises. Each language is reported once.

    Args:
        window: number of consecutive logging points.
        drop: fall in nats per token.
    """

    def __init__(self, window: int, drop: float) -> None:
        self.window, self.drop = window, drop
        self._history: dict[str, deque[tuple[float, float]]] = defaultdict(lambda: deque(maxlen=window))
        self._reported: set[str] = set()

    def update(self, language: str, chosen: float, gap: float) -> Collapse | None:
        """
        Add one logging point.

        Args:
            language: language code.
            chosen: mean log-likelihood of chosen responses, nats per token.
            gap: mean reward gap, nats per token.

        Returns:
            The collapse, the first time it is seen for this language.
        """
        history = self._history[language]
        history.append((chosen, gap))
        if len(history) < self.window or language in self._reported:
            return None
        values = np.asarray(history)
        time = np.arange(self.window)
        slopes = np.polyfit(time, values, 1)[0] * (self.window - 1)
        spread = values[:, 0].std()
        correlation = np.corrcoef(time, values[:, 0])[0, 1] if spread > 0 else 0.0
        if slopes[0] > -self.drop or correlation > -0.8 or slopes[1] <= 0:
            return None
        self._reported.add(language)
        return Collapse(language, self.window, float(-slopes[0]), float(slopes[1]))
