"""What is measured of each language, in training and in evaluation alike."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mpo.modeling.loss import reward_gap, reward_gap_loss
from mpo.modeling.pairs import PairTensors
from mpo.training.config import MPOConfig
from mpo.training.objectives import MISMATCHED, REFERENCE, Objectives
from mpo.training.ranks import Ranks
from mpo.training.records import PairScore, Scores
from mpo.training.reference_policy import needed_for
from mpo.training.retention_weights import RetentionWeights

# Columns of the matrix of sums: one fixed shape, so that reducing it over ranks is one call, whichever languages a rank
# has seen.
(
    _COUNT,
    _GAP,
    _TO_SOURCE,
    _POSITIVE,
    _CHOSEN,
    _REJECTED,
    _GAP_LOSS,
    _RETENTION,
    _GREEDY_CHOSEN,
    _GREEDY_REJECTED,
) = range(_COLUMNS := 10)

_NAMES = {
    "reward_gap": _GAP,
    "gap_to_source": _TO_SOURCE,
    "positive": _POSITIVE,
    "logps/chosen": _CHOSEN,
    "logps/rejected": _REJECTED,
}
_GREEDY = {"greedy/chosen": _GREEDY_CHOSEN, "greedy/rejected": _GREEDY_REJECTED}


class LanguageMetrics:
    """Sums over trained pairs per language, from one log to the next.

    Args:
        languages: A pair's language is its index here.
        beta: Scale of the target gap in ``loss/reward_gap``.
        device: Where the pairs are.
        dtype: Of the sums.
        objectives: What is minimised; None for MPO's objective alone.
        knows_source_gap: Whether the pairs have a ``reference_gap``.
        has_retention: Whether ``loss/retention`` is logged; unset: under ``mpo``.
        delta: From which distance on the target gap's loss is linear in that, see :func:`mpo.modeling.loss.reward_gap_loss`.
        knows_greedy: Whether they have ``below_greedy``; then ``greedy/`` are logged.
    """

    def __init__(
        self,
        languages: Sequence[str],
        beta: float,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        objectives: Objectives | None = None,
        knows_source_gap: bool = True,
        has_retention: bool | None = None,
        delta: float | None = None,
        knows_greedy: bool = False,
    ) -> None:
        self._languages, self._beta, self._delta = languages, beta, delta
        self._objectives = objectives
        self._knows_source_gap = knows_source_gap
        self._is_mpo = objectives is None or "mpo" in objectives.by_name
        self._has_retention = self._is_mpo if has_retention is None else has_retention
        self._names = _NAMES | (_GREEDY if knows_greedy else {})
        self._further = _further_names(objectives)
        columns = _COLUMNS + len(self._further)
        self._sums = torch.zeros((len(languages), columns), device=device, dtype=dtype)
        self._last_log: tuple[float, int] | None = None  # time and step

    def add(self, pairs: PairTensors, counts: Tensor) -> None:
        """Add pairs, without waiting for the device.

        Args:
            pairs: T pairs.
            counts: ``[T]``, 1 for a pair that counts, 0 for a filler.
        """
        with torch.no_grad():
            gap = reward_gap(pairs.chosen_logps, pairs.rejected_logps)
            columns = [torch.ones_like(gap)] * _COLUMNS
            columns[_GAP] = gap
            columns[_TO_SOURCE] = gap - pairs.reference_gap
            columns[_POSITIVE] = (gap > 0).to(gap.dtype)
            columns[_CHOSEN] = pairs.chosen_logps
            columns[_REJECTED] = pairs.rejected_logps
            columns[_GAP_LOSS] = reward_gap_loss(gap, pairs.reference_gap, self._beta, self._delta)
            columns[_RETENTION] = pairs.retention
            if self._names.keys() > _NAMES.keys():
                assert pairs.below_greedy is not None
                columns[_GREEDY_CHOSEN], columns[_GREEDY_REJECTED] = (pairs.below_greedy == 0).to(gap.dtype).T
            if self._further:
                assert self._objectives is not None
                columns += _further_values(self._objectives, pairs)
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
            token. Where it is known, ``greedy/chosen/<language>`` and ``greedy/rejected/<language>``, the share of prompts to
            which greedy decoding says just this response. Nothing without pairs. The first two under ``mpo``
            only, ``gap_to_source`` where the source's gap is known; ``loss/<objective>`` where there are several, without its
            weight; and with an objective that compares with the reference, TRL's ``rewards/chosen``, ``rewards/rejected``,
            ``rewards/margins`` and ``rewards/accuracies``.
        """
        if ranks.num_processes > 1:
            torch.distributed.all_reduce(self._sums)
        table = self._sums.double().cpu().clone().numpy()
        self._sums.zero_()
        total = table.sum(axis=0)
        if total[_COUNT] == 0:
            return {}
        metrics = {}
        if self._is_mpo:
            metrics["loss/reward_gap"] = float(total[_GAP_LOSS] / total[_COUNT])
        if self._has_retention:
            metrics["loss/retention"] = float(total[_RETENTION] / total[_COUNT])
        for name, value in zip(self._further, total[_COLUMNS:], strict=True):
            metrics[name] = float(value / total[_COUNT])
        now = time.monotonic()
        if self._last_log is not None and step > self._last_log[1]:
            metrics["pairs_per_second"] = float(total[_COUNT] / max(now - self._last_log[0], 1e-9))
        self._last_log = (now, step)
        return {**metrics, **self._means(table)}

    def pause(self, seconds: float) -> None:
        """Leave out of the next log's speed so much time, in which nothing was trained."""
        if self._last_log is not None:
            self._last_log = (self._last_log[0] + seconds, self._last_log[1])

    def means(self) -> dict[str, float]:
        """The metrics of each language with pairs, as of :meth:`log`, over this rank's pairs so far."""
        return self._means(self._sums.double().cpu().numpy())

    def _means(self, table: np.ndarray) -> dict[str, float]:
        return {
            f"{name}/{language}": float(row[column] / row[_COUNT])
            for language, row in zip(self._languages, table, strict=True)
            if row[_COUNT]
            for name, column in self._names.items()
            if column != _TO_SOURCE or self._knows_source_gap
        }


class KindMetrics:
    """What :class:`LanguageMetrics` sums, of the harmful and of the harmless pairs apart.

    The names of the latter begin with ``harmless/``; ``pairs_per_second`` is of all.

    Args:
        languages, device: As there.
        args: The run's settings.
        harmless: Whether there are harmless groups.
        retain_weights: What adapts to the harmless pairs, and is told of each and logged.
    """

    def __init__(
        self,
        languages: Sequence[str],
        args: MPOConfig,
        device: torch.device | str,
        *,
        harmless: bool,
        retain_weights: RetentionWeights | None = None,
    ) -> None:
        self._retain_weights = retain_weights
        self._of_kind = {
            settings.is_of_harmless: LanguageMetrics(
                languages,
                settings.gap_scale,
                device,
                objectives=settings.objectives,
                knows_source_gap=bool(needed_for(settings).sources),
                has_retention=settings.keeps_own or "mpo" in settings.loss_type,
                delta=settings.mpo_delta,
                knows_greedy=harmless,
            )
            for settings in (args, *([args.harmless] if harmless else []))
        }

    def add(self, pairs: PairTensors, counts: Tensor) -> None:
        """As :meth:`LanguageMetrics.add`."""
        for kind, metrics in self._of_kind.items():
            part = pairs.of_kind(harmless=kind)
            if part is not None:
                metrics.add(part, counts if pairs.by_kind is None else counts[pairs.by_kind[kind]])
        if self._retain_weights is not None:
            self._retain_weights.add(pairs, counts)

    def pause(self, seconds: float) -> None:
        """As :meth:`LanguageMetrics.pause`."""
        for metrics in self._of_kind.values():
            metrics.pause(seconds)

    def log(self, step: int, ranks: Ranks) -> dict[str, float]:
        """As :meth:`LanguageMetrics.log`."""
        harmful = self._of_kind[False].log(step, ranks)
        if True not in self._of_kind:
            return harmful
        harmless = self._of_kind[True].log(step, ranks)
        speeds = [
            found.pop("pairs_per_second") for found in (harmful, harmless) if "pairs_per_second" in found
        ]
        return {
            **harmful,
            **({"pairs_per_second": sum(speeds)} if speeds else {}),
            **{f"harmless/{name}": value for name, value in harmless.items()},
            **(self._retain_weights.log() if self._retain_weights is not None else {}),
        }


def _further_names(objectives: Objectives | None) -> list[str]:
    """What is logged besides under some objectives, over all pairs together."""
    if objectives is None:
        return []
    names = [f"loss/{name}" for name in objectives.by_name] if len(objectives.by_name) > 1 else []
    if REFERENCE in objectives.needs:
        names += [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
    return [*names, "kl"] if MISMATCHED in objectives.needs else names


def _further_values(objectives: Objectives, pairs: PairTensors) -> list[Tensor]:
    values = list(objectives.terms(pairs).values()) if len(objectives.by_name) > 1 else []
    if REFERENCE in objectives.needs:
        chosen, rejected = (objectives.beta * ratio for ratio in pairs.log_ratios)
        values += [chosen, rejected, chosen - rejected, (chosen > rejected).to(chosen.dtype)]
    if MISMATCHED in objectives.needs:
        assert pairs.step is not None
        values.append(torch.zeros_like(pairs.chosen_logps) + pairs.step.kl)
    return values


def evaluation_metrics(scores: Scores, loss: float, languages: Sequence[str]) -> dict[str, float]:
    """``loss``, ``loss/retention`` and the metrics of each language over scored pairs, named as in a training log.

    Args:
        scores: Of held-out groups.
        loss: Mean over the pairs that training would train on.
        languages: Languages, those of the target pairs among them. Source pairs have metrics where theirs is, too; else
            they count for the retention only.
    """
    index_of = {language: i for i, language in enumerate(languages)}
    found = {"loss": loss}
    for prefix, kind in (("", False), ("harmless/", True)):
        retention = scores.harmless_retention if kind else scores.retention
        if retention is not None:
            found[f"{prefix}loss/retention"] = retention
        records = [
            record
            for record in scores.of_kind(harmless=kind)
            if not record.is_source or record.language in index_of
        ]
        if records or not kind:
            means = _record_means(records, languages, index_of)
            found |= {f"{prefix}{name}": value for name, value in means.items()}
    return found


def _record_means(
    records: Sequence[PairScore], languages: Sequence[str], index_of: Mapping[str, int]
) -> dict[str, float]:
    def column(name: str) -> Tensor:
        return torch.tensor([getattr(record, name) for record in records], dtype=torch.float64)

    metrics = LanguageMetrics(languages, beta=1.0, dtype=torch.float64)
    pairs = PairTensors(
        chosen_logps=column("chosen"),
        rejected_logps=column("rejected"),
        reference_gap=column("reference_gap"),
        retention=torch.zeros(len(records), dtype=torch.float64),
        language=torch.tensor([index_of[record.language] for record in records], dtype=torch.long),
        group_of_pair=torch.tensor([record.group for record in records], dtype=torch.long),
    )
    metrics.add(pairs, torch.ones(len(records), dtype=torch.float64))
    return metrics.means()
