"""Confidence intervals by resampling groups.

The pairs of a group are translations of one prompt, so they are not independent: what is drawn again is the group,
with all its pairs (the cluster bootstrap; Davison and Hinkley, *Bootstrap Methods and their Application*, 1997,
section 3.8).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from mpo.common.checks import check_confidence
from mpo.errors import ConfigError

_INDICES_AT_ONCE = 2**21  # 16 MB of int64: keeps thousands of groups from filling the memory


def grouped_mean_interval(
    values: Sequence[float],
    groups: Sequence[int],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Confidence interval of a mean over pairs whose groups were drawn independently.

    The percentile interval (Efron, 1979, *Annals of Statistics* 7(1); Efron and Tibshirani, *An Introduction to the
    Bootstrap*, 1993, chapter 13) with the expanded percentiles of Hesterberg (2015, *The American Statistician*
    69(4), section 5.3). A plain percentile interval of n groups is too narrow by ``sqrt((n-1)/n)`` and takes the
    normal's quantile where Student's is due; with the 6 to 12 held-out groups of a small run that turns "95 %" into
    less than 90 %. The percentiles are therefore moved to ``Phi(-sqrt(n/(n-1)) * t_{n-1})``. With fewer than about
    five groups this is the whole range of the resampled means, and still too narrow.

    The draws depend on nothing but `seed` and the number of groups, and the result does not depend on the order of
    the pairs.

    Args:
        values: One value per pair, [pairs].
        groups: The group of each pair, [pairs]. Groups may differ in size; the mean is over pairs.
        confidence: Coverage asked for, between 0 and 1.
        resamples: Number of bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        Lower and upper end in the unit of `values`, or None where fewer than two groups leave nothing to resample.

    Raises:
        ConfigError: `confidence` or `resamples` is out of range.
    """
    check_settings(confidence, resamples)
    value = np.asarray(values, dtype=np.float64)
    group = np.asarray(groups)
    order = np.lexsort((value, group))  # sums of floats depend on their order; this one is always the same
    _, index = np.unique(group[order], return_inverse=True)
    sizes = np.bincount(index).astype(np.float64)
    sums = np.bincount(index, weights=value[order])
    return ratio_interval(sums, sizes, confidence=confidence, resamples=resamples, seed=seed)


def ratio_interval(
    sums: ArrayLike,
    sizes: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Confidence interval of ``sum(sums) / sum(sizes)`` over groups that were drawn independently.

    The same as :func:`grouped_mean_interval`, from the groups' totals: a group may be a text of many tokens.

    Args:
        sums: Total of each group, [groups].
        sizes: Size of each group, [groups], above 0.
        confidence: Coverage asked for, between 0 and 1.
        resamples: Number of bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        Lower and upper end, or None where fewer than two groups leave nothing to resample.

    Raises:
        ConfigError: `confidence` or `resamples` is out of range.
    """
    check_settings(confidence, resamples)
    total, size = np.asarray(sums, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    n = len(size)
    if n < 2:
        return None
    random = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _INDICES_AT_ONCE // n)
    for start in range(0, resamples, step):
        drawn = random.integers(n, size=(min(step, resamples - start), n))
        means[start : start + step] = total[drawn].sum(axis=1) / size[drawn].sum(axis=1)
    tail = expanded_tail(n, confidence)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def expanded_tail(groups: int, confidence: float) -> float:
    """Share of the resampled means to cut off at each end; see :func:`grouped_mean_interval`.

    Args:
        groups: Number of groups that are resampled, at least 2.
        confidence: Coverage asked for, between 0 and 1.
    """
    from scipy.special import ndtr, stdtrit

    quantile = stdtrit(groups - 1, 0.5 + confidence / 2)
    return float(ndtr(-math.sqrt(groups / (groups - 1)) * quantile))


def check_settings(confidence: float, resamples: int) -> None:
    """Refuse settings that no bootstrap can be run with.

    Raises:
        ConfigError: `confidence` is not strictly between 0 and 1, or `resamples` is below 100.
    """
    check_confidence(confidence)
    if not isinstance(resamples, int) or resamples < 100:
        raise ConfigError(f"`resamples` is {resamples!r}; expected a whole number of at least 100.")
