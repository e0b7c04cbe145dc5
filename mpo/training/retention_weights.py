"""A weight of the retention of harmless pairs for each language, which a target adapts while the run goes on.

One weight for all languages holds some too tightly and others too loosely: how much a language would move depends on how well the
model tells harm from harmlessness in it. With a target, each language has the weight that brings it there. This is the adaptive
coefficient of Ziegler et al. (2019), "Fine-Tuning Language Models from Human Preferences", arXiv 1909.08593, section 2.2, once for
each language::

    e = clip(mean retention / target - 1, -1, 1)        weight <- weight * (1 + 0.1 e)

There the error is clipped at 0.2 and is of one batch; here a step has a few pairs of a language, one of which may have moved far, so
the mean is a running one and the error may be larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpo.modeling.pairs import PairTensors
from mpo.training.ranks import Ranks

GAIN = 0.1
DECAY = 0.9
"""Of the running means: a step weighs a tenth."""
_MISSED = 2.0  # times the target
LOWEST, HIGHEST = 0.1, 100.0
"""Bounds of a weight, as multiples of the one that it began with."""


class RetentionWeights:
    """The weights, one for each language.

    Args:
        languages: A pair's language is its index here.
        weight: What they begin with.
        target: Mean retention of a language that they aim at, above 0.
        device: Where the pairs are.
    """

    def __init__(
        self, languages: Sequence[str], weight: float, target: float, device: torch.device | str = "cpu"
    ) -> None:
        self._languages, self._first, self._target = list(languages), weight, target
        self._log_change = torch.zeros(len(languages), device=device)  # log of weight / first weight
        self._mean = torch.zeros_like(self._log_change)
        self._seen = torch.zeros_like(self._log_change)  # share of the running mean that has been seen
        self._sums = torch.zeros((2, len(languages)), device=device)

    @property
    def values(self) -> Tensor:
        """The weights, ``[languages]``."""
        return self._first * self._log_change.exp()

    def add(self, pairs: PairTensors, counts: Tensor) -> None:
        """Add the harmless ones of this optimizer step's pairs, without waiting for the device.

        Args:
            pairs: T pairs.
            counts: ``[T]``, 1 for a pair that counts, 0 for a filler.
        """
        if pairs.is_harmless is None:
            return
        counts = (counts * pairs.is_harmless).to(self._sums.dtype)
        retention = pairs.retention.detach().to(self._sums.dtype) * counts
        self._sums.index_add_(1, pairs.language, torch.stack([retention, counts]))

    def step(self, ranks: Ranks) -> None:
        """Adapt the weights to the pairs added since the last call, of all ranks, which call this together."""
        if ranks.num_processes > 1:
            torch.distributed.all_reduce(self._sums)
        total, count = self._sums
        is_there = count > 0
        part = torch.where(is_there, 1 - DECAY, 0.0)
        self._mean += part * (total / count.clamp(min=1) - self._mean)
        self._seen += part * (1 - self._seen)
        error = (self._mean / self._seen.clamp(min=1e-12) / self._target - 1).clamp(-1, 1)
        change = self._log_change + torch.where(is_there, torch.log1p(GAIN * error), 0.0)
        self._log_change = change.clamp(torch.tensor(LOWEST).log().item(), torch.tensor(HIGHEST).log().item())
        self._sums.zero_()

    def log(self) -> dict[str, float]:
        """``harmless/retain_weight/<language>`` and ``harmless/retention/<language>``, the running mean, of those seen."""
        found = {}
        for language, (weight, mean) in self._now().items():
            found[f"harmless/retain_weight/{language}"] = weight
            found[f"harmless/retention/{language}"] = mean
        return found

    def missed(self) -> dict[str, float]:
        """Running mean of each language whose mean is more than twice the target, more than its noise explains."""
        return {
            language: mean for language, (_, mean) in self._now().items() if mean > _MISSED * self._target
        }

    def _now(self) -> dict[str, tuple[float, float]]:
        """Weight and running mean of the languages seen."""
        rows = zip(
            self._languages, self.values.tolist(), self._mean.tolist(), self._seen.tolist(), strict=True
        )
        return {language: (weight, mean / seen) for language, weight, mean, seen in rows if seen}

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` takes, ready for JSON."""
        return {
            language: list(values)
            for language, *values in zip(
                self._languages,
                self._log_change.tolist(),
                self._mean.tolist(),
                self._seen.tolist(),
                strict=True,
            )
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned; a language that is not in it begins anew."""
        for place, language in enumerate(self._languages):
            if language in state:
                self._log_change[place], self._mean[place], self._seen[place] = state[language]
