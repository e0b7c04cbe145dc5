"""What is measured of each target language, in training and in evaluation alike."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mpo.modeling.loss import reward_gap, reward_gap_loss
from mpo.modeling.pairs import PairTensors
from mpo.training.ranks import Ranks
from mpo.training.records import Scores

# Columns of the matrix of sums: one fixed shape, so that reducing it over ranks is one call, whichever languages a rank
# has seen.
_COUNT, _GAP, _TO_SOURCE, _POSITIVE, _CHOSEN, _REJECTED, _GAP_LOSS, _RETENTION = range(8)

_NAMES = {
    "reward_gap": _GAP,
    "gap_to_source": _TO_SOURCE,
    "positive": _POSITIVE,
    "logps/chosen": _CHOSEN,
    "logps/rejected": _REJECTED,
}


class LanguageMetrics:
    """Sums over target pairs per language, from one log to the next; ``beta`` is the scale of ``loss/reward_gap``."""

    def __init__(
        self,
        languages: Sequence[str],
        beta: float,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._languages, self._beta = languages, beta
        self._sums = torch.zeros((len(languages), 8), device=device, dtype=dtype)
        self._last_log: tuple[float, int] | None = None  # time and step

    def add(self, pairs: PairTensors, counts: Tensor) -> None:
        """Add T pairs, of which those count whose ``counts`` ``[T]`` is 1 and not 0; without waiting for the device."""
        with torch.no_grad():
            gap = reward_gap(pairs.chosen_logps, pairs.rejected_logps)
            columns = [torch.ones_like(gap)] * 8
            columns[_GAP] = gap
            columns[_TO_SOURCE] = gap - pairs.reference_gap
            columns[_POSITIVE] = (gap > 0).to(gap.dtype)
            columns[_CHOSEN] = pairs.chosen_logps
            columns[_REJECTED] = pairs.rejected_logps
            columns[_GAP_LOSS] = reward_gap_loss(gap, pairs.reference_gap, self._beta)
            columns[_RETENTION] = pairs.retention
            values = torch.stack(columns, dim=1).to(self._sums.dtype) * counts[:, None]
            self._sums.index_add_(0, pairs.language, values)

    def log(self, step: int, ranks: Ranks) -> dict[str, float]:
        """Means over the pairs of all ranks since the last log, which all ranks call for together.

        Args:
            step: Optimizer steps so far.
            ranks: The process group.

        Returns:
            ``loss/reward_gap``, ``loss/retention``, ``pairs_per_second`` (from the second log on) and, for each
            language with pairs, ``reward_gap/<language>``, ``gap_to_source/<language>``, ``positive/<language>`` (the
            share of gaps above 0), ``logps/chosen/<language>`` and ``logps/rejected/<language>``; all in nats per
            token. Nothing without pairs.
        """
        if ranks.num_processes > 1:
            torch.distributed.all_reduce(self._sums)
        table = self._sums.double().cpu().clone().numpy()
        self._sums.zero_()
        total = table.sum(axis=0)
        if total[_COUNT] == 0:
            return {}
        metrics = {
            "loss/reward_gap": float(total[_GAP_LOSS] / total[_COUNT]),
            "loss/retention": float(total[_RETENTION] / total[_COUNT]),
        }
        now = time.monotonic()
        if self._last_log is not None and step > self._last_log[1]:
            metrics["pairs_per_second"] = float(total[_COUNT] / max(now - self._last_log[0], 1e-9))
        self._last_log = (now, step)
        return {**metrics, **_means(self._languages, table)}

    def means(self) -> dict[str, float]:
        """The metrics of each language with pairs, as of :meth:`log`, over this rank's pairs so far."""
        return _means(self._languages, self._sums.double().cpu().numpy())


def evaluation_metrics(scores: Scores, loss: float, languages: Sequence[str]) -> dict[str, float]:
    """``loss``, ``loss/retention`` and the metrics of each language over scored pairs, named as in a training log."""
    index_of = {language: i for i, language in enumerate(languages)}
    targets = [record for record in scores.records if not record.is_source]

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(record, name) for record in targets], dtype=torch.float64)

    metrics = LanguageMetrics(languages, beta=1.0, dtype=torch.float64)
    pairs = PairTensors(
        chosen_logps=column("chosen"),
        rejected_logps=column("rejected"),
        reference_gap=column("reference_gap"),
        retention=torch.zeros(len(targets), dtype=torch.float64),
        language=torch.tensor([index_of[record.language] for record in targets], dtype=torch.long),
        group_of_pair=torch.tensor([record.group for record in targets], dtype=torch.long),
    )
    metrics.add(pairs, torch.ones(len(targets), dtype=torch.float64))
    retention = {} if scores.retention is None else {"loss/retention": scores.retention}
    return {"loss": loss, **retention, **metrics.means()}


def _means(languages: Sequence[str], table: np.ndarray) -> dict[str, float]:
    metrics = {}
    for language, row in zip(languages, table, strict=True):
        if row[_COUNT]:
            for name, column in _NAMES.items():
                metrics[f"{name}/{language}"] = float(row[column] / row[_COUNT])
    return metrics
