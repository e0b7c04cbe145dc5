"""How often a judge is right, from answers that people have labelled, and what its rates would be without its mistakes.

Labelled answers are a stratified sample: within a stratum, here the answers that got the same verdict, those with a label are
a random part of all. Everything is therefore weighted by the strata's sizes, so that a sample which takes as many rare
verdicts as common ones gives the same numbers, on average, as labelling everything would.

Arrays are ``[..., strata]``; dimensions before the last are resamples.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpo.common.checks import check_confidence
from mpo.common.statistics import Interval

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]


class Accuracy(NamedTuple):
    """A judge against labels; NaN where the labels do not say.

    Attributes:
        sensitivity: Share of the answers with the counted label that get the counted verdict.
        specificity: Share of the others that do not get it.
        kappa: Cohen's kappa (1960, *Educational and Psychological Measurement* 20(1)) of verdicts and labels, counted or not.
    """

    sensitivity: Array
    specificity: Array
    kappa: Array


def accuracy(sizes: Array, flagged: Flags, positive: Array) -> Accuracy:
    """Sensitivity, specificity and kappa of a population of strata.

    Args:
        sizes: ``[..., strata]`` answers.
        flagged: ``[strata]``, whether the judge's verdict is the counted one.
        positive: ``[..., strata]``, share of each stratum whose label is the counted one.
    """
    right, wrong = sizes * positive, sizes * (1 - positive)
    caught, missed = right[..., flagged].sum(axis=-1), right[..., ~flagged].sum(axis=-1)
    false, spared = wrong[..., flagged].sum(axis=-1), wrong[..., ~flagged].sum(axis=-1)
    total = caught + missed + false + spared
    with np.errstate(invalid="ignore", divide="ignore"):
        observed = (caught + spared) / total
        chance = ((caught + false) * (caught + missed) + (spared + missed) * (spared + false)) / total**2
        return Accuracy(
            caught / (caught + missed), spared / (spared + false), (observed - chance) / (1 - chance)
        )


def accuracy_intervals(
    sizes: Array, flagged: Flags, labels: Array, positive: Array, confidence: float = 0.95
) -> tuple[Interval, Interval]:
    """Wilson's intervals of sensitivity and specificity.

    The number of trials is an effective one, ``s (1 - s) / Var(s)`` (Korn and Graubard, 1998, *Survey Methodology* 24(2)). The
    variance is that of the answers as a sample, ``s (1 - s) / n``, and that of labelling only some of them: of a ratio of
    independent stratum totals, by linearisation, with the finite population correction. Where all are labelled, this is
    Wilson's interval of the counts. Shares in the variance are smoothed (:func:`drawn_shares`): twenty answers without one
    mistake do not say that there is none among a thousand.

    Args:
        sizes: ``[strata]`` answers.
        flagged: ``[strata]``, whether the judge's verdict is the counted one.
        labels: ``[strata]`` labelled answers, at least one each.
        positive: ``[strata]``, how many of them have the counted label.
        confidence: Coverage asked for, between 0 and 1.

    Raises:
        ConfigError: `confidence` is out of range.
    """
    check_confidence(confidence)
    found = accuracy(sizes, flagged, positive / labels)
    return (
        _interval(sizes, labels, positive, flagged, float(found.sensitivity), confidence),
        _interval(sizes, labels, labels - positive, ~flagged, float(found.specificity), confidence),
    )


def _interval(
    sizes: Array, labels: Array, count: Array, good: Flags, share: float, confidence: float
) -> Interval:
    """Of ``share``, the part that is in the strata ``good``, of all answers like the ``count`` labelled ones."""
    if np.isnan(share):
        return 0.0, 1.0
    yes, no = _smoothed(labels, count, good)
    part = yes / (yes + no)
    left = 1 - np.minimum(labels / sizes, 1)  # share of each stratum that is not labelled
    spread = sizes**2 * left * part * (1 - part) / (yes + no + 1)  # the variance of a beta distribution
    totals = [float((sizes * part)[side].sum()) for side in (good, ~good)]
    per_trial = 1 / float((sizes * count / labels).sum())
    if min(totals) > 0:
        smoothed = totals[0] / sum(totals)
        relative = sum(
            float(spread[side].sum()) / total**2 for side, total in zip((good, ~good), totals, strict=True)
        )
        per_trial += smoothed * (1 - smoothed) * relative
    return wilson_share(share, 1 / per_trial, confidence)


def wilson_share(share: float, trials: float, confidence: float = 0.95) -> Interval:
    """:func:`~mpo.common.statistics.wilson_interval` of a share of an effective number of trials, which need not be whole."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    middle = share + z * z / (2 * trials)
    half = z * float(np.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)))
    below, above = ((middle + sign * half) / (1 + z * z / trials) for sign in (-1, 1))
    return max(0.0, min(below, share)), min(1.0, max(above, share))


def rogan_gladen(rate: Array, sensitivity: Array, specificity: Array) -> Array:
    """A rate without the judge's mistakes: ``(rate + specificity - 1) / (sensitivity + specificity - 1)``, within 0 and 1.

    Rogan and Gladen (1978, *American Journal of Epidemiology* 107(1)). It is NaN where sensitivity and specificity are
    together at most 1: the verdicts of such a judge say no more than a coin.
    """
    better = np.asarray(sensitivity + specificity - 1, dtype=np.float64)
    known = better > 1e-12
    with np.errstate(invalid="ignore", divide="ignore"):
        raw = (rate + specificity - 1) / np.where(known, better, np.nan)
    return np.clip(raw, 0.0, 1.0)


def drawn_shares(
    labels: Array, positive: Array, flagged: Flags, resamples: int, random: np.random.Generator
) -> Array:
    """Shares of the counted label as other labelled samples of the same size would make them seem, ``[resamples, ..., strata]``.

    The Bayesian bootstrap (Rubin, 1981, *Annals of Statistics* 9(1)), with two changes that a sum over many small strata needs.
    Half a label of each kind, Jeffreys' prior, is added to all strata of a verdict together, in equal parts, as Tiwari, Clegg
    and Zou (2006, *Statistical Methods in Medical Research* 15(6)) add one event to a weighted sum of counts: resampling a
    sample without a single mistake would never show one, but half a mistake in each stratum would add up to many. And the
    counts are scaled by ``n / (n + 2)``, so that a stratum of n labels has about the variance ``p (1 - p) / (n - 1)``, which is
    unbiased, as in the rescaling bootstrap of Rao and Wu (1988, *Journal of the American Statistical Association* 83(401)).

    The strata should be those of one estimate: draws for one language differ from the same language's among others.

    Args:
        labels: ``[..., strata]`` labelled answers; strata without any have no part in the prior, and draws that say nothing.
        positive: ``[..., strata]``, how many of them have the counted label.
        flagged: ``[strata]``, whether the judge's verdict is the counted one.
        resamples: Number of draws.
        random: Source of the draws.
    """
    return random.beta(*_smoothed(labels, positive, flagged), size=(resamples, *labels.shape))


def _smoothed(labels: Array, positive: Array, flagged: Flags) -> tuple[Array, Array]:
    """Parameters of :func:`drawn_shares`' beta distributions, ``[..., strata]`` each."""
    strata = ((labels > 0)[..., None, :] & (flagged[:, None] == flagged)).sum(axis=-1)  # of the same verdict
    half, scale = 0.5 / np.maximum(strata, 1), labels / (labels + 2)
    return scale * positive + half, scale * (labels - positive) + half


def drawn_interval(draws: Array, value: float, confidence: float, ends: Interval = (0.0, 1.0)) -> Interval:
    """Percentile interval of resamples, which holds the value itself; a draw that is NaN may be anything between `ends`."""
    tail = (1 - confidence) / 2
    low = float(np.quantile(np.where(np.isnan(draws), ends[0], draws), tail))
    high = float(np.quantile(np.where(np.isnan(draws), ends[1], draws), 1 - tail))
    return min(low, value), max(high, value)
