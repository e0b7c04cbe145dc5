"""Detects the known way in which preference training collapses: both likelihoods fall while their gap grows."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

# Standard errors that a fall must have to be more than scatter.
_ERRORS = 6.0


@dataclass(frozen=True)
class Collapse:
    """What was seen: over ``points`` logging points a language's chosen log-likelihood fell while its gap rose."""

    language: str
    points: int
    fall: float
    rise: float
    kind: str = ""

    def __str__(self) -> str:
        return (
            f"the log-likelihood of {self.kind}chosen responses in '{self.language}' fell by {self.fall:.2f} nats per token over "
            f"the last {self.points} logging points while its reward gap rose by {self.rise:.2f}: the model is making "
            f"both answers unlikely, not the {'helpful' if self.kind else 'safe'} one likely. Lower the learning rate or "
            "beta, raise `retain_weight`, or stop here"
        )


class CollapseDetector:
    """Watches the mean log-likelihood of chosen responses and the reward gap of each language.

    A collapse is a steady fall: over ``window`` logging points the least-squares line of the chosen log-likelihood falls
    by at least ``drop`` nats per token and by six of its standard errors, and the gap's line rises. The error comes
    from the scatter between neighbouring points, which batches of different pairs have a lot of: a run of a thousand
    points sees chance falls of three or four errors. Each language is reported once.

    Args:
        window: Number of consecutive logging points.
        drop: Fall in nats per token.
        prefix: Before the names of the metrics: nothing, or ``harmless/``.
    """

    def __init__(self, window: int, drop: float, prefix: str = "") -> None:
        self.window, self.drop, self.prefix = window, drop, prefix
        self._history: dict[str, deque[tuple[float, float]]] = defaultdict(lambda: deque(maxlen=8 * window))
        self._reported: set[str] = set()

    def watch(self, metrics: Mapping[str, float]) -> list[Collapse]:
        """Add the logging point of each language that a training log has metrics of; what is seen now.

        Args:
            metrics: From :meth:`mpo.training.metrics.LanguageMetrics.log`.
        """
        chosen = f"{self.prefix}logps/chosen/"
        languages = [name.removeprefix(chosen) for name in metrics if name.startswith(chosen)]
        found = (
            self.update(
                language, metrics[f"{chosen}{language}"], metrics[f"{self.prefix}reward_gap/{language}"]
            )
            for language in languages
        )
        return [collapse for collapse in found if collapse is not None]

    def update(self, language: str, chosen: float, gap: float) -> Collapse | None:
        """Add one logging point.

        Args:
            language: Language code.
            chosen: Mean log-likelihood of chosen responses, nats per token.
            gap: Mean reward gap, nats per token.

        Returns:
            The collapse, the first time it is seen for this language. A point that is not finite is left out.
        """
        history = self._history[language]
        if not (math.isfinite(chosen) and math.isfinite(gap)):
            return None
        history.append((chosen, gap))
        if len(history) < self.window or language in self._reported:
            return None
        values = np.asarray(history)
        time = np.arange(self.window) - (self.window - 1) / 2
        slopes = time @ values[-self.window :] / (time @ time) * (self.window - 1)
        # A difference of two neighbours has twice the variance of a point; the mean difference is the trend.
        scatter = np.diff(values[:, 0]).std(ddof=1) / math.sqrt(2)
        error = scatter * math.sqrt(12 * (self.window - 1) / (self.window * (self.window + 1)))
        if slopes[0] > -self.drop or slopes[0] > -_ERRORS * error or slopes[1] <= 0:
            return None
        self._reported.add(language)
        kind = self.prefix.replace("/", " ")
        return Collapse(language, self.window, float(-slopes[0]), float(slopes[1]), kind)
