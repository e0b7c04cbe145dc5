"""Intervals and tests for shares, agreement and correlation: numbers in, small records out.

Everything here is a closed formula or a seeded resampling, and knows nothing of models, files or languages' names.
What SciPy has comes from it, imported where it is used, since ``scipy.stats`` takes a second. It has neither Tango's
interval, nor Holm's adjustment, nor an interval of kappa; statsmodels, which has the last two, is a second library of
that weight for a dozen lines.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo.common.bootstrap import check_settings, expanded_tail
from mpo.common.checks import check_confidence
from mpo.errors import DataError

Interval = tuple[float, float]
Draw = Callable[[np.random.Generator, int, int], NDArray[Any]]

EXACT_BELOW = 25
"""McNemar's test is exact with fewer prompts than this on which the two models differ, asymptotic from there on."""

_ALL_ORDERS_UP_TO = 8  # 8! = 40,320 orders can all be tried
_WEIGHTS_AT_ONCE = 2**21  # 16 MB of float64
_KEPT = 2**22  # 8 MB of uint16: 10,000 resamples of 419 prompts


# ------------------------------------------------------------------------------------------------------------ one share


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> Interval:
    """Confidence interval of a share (Wilson, 1927, *Journal of the American Statistical Association* 22(158)).

    Unlike the textbook interval it stays within 0 and 1, and a share of 0 or 1 does not make it a point. Without any
    trial nothing is known: (0, 1).

    Args:
        successes: Number of successes.
        total: Number of trials.
        confidence: Coverage asked for, between 0 and 1.

    Raises:
        ConfigError: `confidence` is out of range.
        DataError: `successes` is not between 0 and `total`.
    """
    check_confidence(confidence)
    if not 0 <= successes <= total:
        raise DataError(
            f"There are {successes} successes in {total} trials; expected between 0 and {total} of them."
        )
    if total == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest

    interval = binomtest(successes, total).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


# ----------------------------------------------------------------------------------------------------- two paired shares


@dataclass(frozen=True)
class McNemar:
    """McNemar's test of two models on the same prompts.

    Attributes:
        only_before: Prompts on which only the first model has the property.
        only_after: Prompts on which only the second has it.
        p_value: Two-sided p-value.
        exact: True for the binomial test, False for the chi-squared one.
    """

    only_before: int
    only_after: int
    p_value: float
    exact: bool


def mcnemar(only_before: int, only_after: int, *, exact: bool | None = None) -> McNemar:
    """Test whether two models differ, from the prompts on which they differ (McNemar, 1947, *Psychometrika* 12(2)).

    Exact: twice the smaller binomial tail, at most 1. Asymptotic: ``(b - c)^2 / (b + c)`` against chi-squared with
    one degree of freedom, without continuity correction, which Fagerland, Lydersen and Laake (2013, *BMC Medical
    Research Methodology* 13:91) advise against.

    Args:
        only_before: Prompts on which only the first model has the property.
        only_after: Prompts on which only the second has it.
        exact: Which of the two; by default exact below :data:`EXACT_BELOW` such prompts.

    Raises:
        DataError: A count is negative.
    """
    if only_before < 0 or only_after < 0:
        raise DataError(f"The counts are {only_before} and {only_after}; expected none below 0.")
    differing = only_before + only_after
    use_exact = differing < EXACT_BELOW if exact is None else exact
    if differing == 0:
        p_value = 1.0
    elif use_exact:
        from scipy.stats import binomtest

        p_value = float(binomtest(only_before, differing, 0.5).pvalue)
    else:
        from scipy.special import chdtrc  # the upper tail of chi-squared

        p_value = float(chdtrc(1, (only_before - only_after) ** 2 / differing))
    return McNemar(only_before, only_after, p_value, use_exact)


@dataclass(frozen=True)
class PairedDifference:
    """Two shares on the same prompts, and their difference.

    Attributes:
        count: Number of prompts.
        before: Share of the first model.
        after: Share of the second.
        difference: ``after - before``.
        low: Lower end of the difference's confidence interval.
        high: Upper end.
        test: McNemar's test of the difference.
    """

    count: int
    before: float
    after: float
    difference: float
    low: float
    high: float
    test: McNemar


def paired_difference(
    before: Sequence[bool], after: Sequence[bool], confidence: float = 0.95
) -> PairedDifference:
    """Difference of two shares on the same prompts, with its interval and McNemar's test.

    The interval inverts the score test (Tango, 1998, *Statistics in Medicine* 17(8)). It includes 0 exactly where
    McNemar's asymptotic test does not reject, and is no point where the models never differ.

    Args:
        before: Whether the first model has the property, [prompts].
        after: The same of the second model, in the same order.
        confidence: Coverage asked for, between 0 and 1.

    Raises:
        ConfigError: `confidence` is out of range.
        DataError: The two differ in length, or are empty.
    """
    check_confidence(confidence)
    if len(before) != len(after) or not before:
        raise DataError(
            f"There are {len(before)} outcomes before and {len(after)} after; expected the same prompts in both, and at "
            "least one."
        )
    only_before = sum(bool(b) and not a for b, a in zip(before, after, strict=True))
    only_after = sum(bool(a) and not b for b, a in zip(before, after, strict=True))
    count = len(before)
    low, high = _tango_interval(only_after, only_before, count, _normal_quantile(confidence))
    return PairedDifference(
        count=count,
        before=sum(map(bool, before)) / count,
        after=sum(map(bool, after)) / count,
        difference=(only_after - only_before) / count,
        low=low,
        high=high,
        test=mcnemar(only_before, only_after),
    )


def _tango_interval(gained: int, lost: int, count: int, z: float) -> Interval:
    """Where the score statistic of ``difference = (gained - lost) / count`` is z and -z, by bisection."""

    def statistic(difference: float) -> float:
        a = 2 * count
        b = -gained - lost + (2 * count - gained + lost) * difference
        c = -lost * difference * (1 - difference)
        lost_share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)  # its maximum-likelihood estimate
        variance = count * (2 * lost_share + difference * (1 - difference))
        distance = gained - lost - count * difference
        if variance <= 0:
            return math.copysign(math.inf, distance) if distance else 0.0
        return distance / math.sqrt(variance)

    def crossing(target: float, low: float, high: float) -> float:
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if statistic(middle) > target else (low, middle)
        return (low + high) / 2

    difference = (gained - lost) / count
    # The statistic falls with the difference that is assumed.
    return crossing(z, -1.0, difference), crossing(-z, difference, 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number (Holm, 1979, *Scandinavian Journal of Statistics* 6(2)), in the same order."""
    count = len(p_values)
    adjusted = [0.0] * count
    largest = 0.0
    for rank, index in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


# ------------------------------------------------------------------------------------------------- mean over languages

Outcomes = Mapping[str, Mapping[Any, float]]
"""``{language: {prompt: value}}``; a prompt has the same name in every language it was translated to."""


@dataclass(frozen=True)
class LanguageAverage:
    """The mean over languages, each weighing the same.

    Attributes:
        mean: Mean of the languages' means.
        low: Lower end of its confidence interval; None with fewer than two prompts whose values differ.
        high: Upper end.
        languages: Number of languages.
        prompts: Number of prompts, translations of one prompt counted once.
    """

    mean: float
    low: float | None
    high: float | None
    languages: int
    prompts: int


@dataclass(frozen=True)
class AverageChange:
    """The change of a share, averaged over languages, between two models on the same prompts.

    Attributes:
        before: Mean over languages of the first model's shares, on the prompts that both have.
        after: The same of the second model.
        change: ``after - before``, with its interval and numbers of languages and prompts.
        p_value: Two-sided p-value of the randomisation test.
    """

    before: float
    after: float
    change: LanguageAverage
    p_value: float


def language_average(
    values: Outcomes, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> LanguageAverage:
    """Mean share over languages, with an interval that knows that translations of one prompt belong together.

    Prompts are drawn again with all their translations, as in
    :func:`~mpo.common.bootstrap.grouped_mean_interval`, whose expanded percentiles are used. Where all values are
    0, or all are 1, resampling cannot show any doubt; there it is Wilson's interval on the number of prompts.

    Args:
        values: 0 or 1 per prompt, or the mean of several answers to it. A language may lack prompts; languages
            without any are left out.
        confidence: Coverage asked for, between 0 and 1.
        resamples: Number of bootstrap samples.
        seed: Seed of the resampling.

    Raises:
        ConfigError: `confidence` or `resamples` is out of range.
        DataError: There is no value at all.
    """
    check_settings(confidence, resamples)
    table = _prompts_by_languages(values)
    prompts, constant = len(table), _only_value(table)
    if constant in (0.0, 1.0):
        ends: Interval | None = wilson_interval(prompts * int(constant), prompts, confidence)
    else:
        ends = _resampled_mean_of_columns(table, confidence, resamples, seed)
    return _average(table, ends)


def average_change(
    before: Outcomes,
    after: Outcomes,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> AverageChange:
    """Change of a share averaged over languages, paired by prompt.

    The interval resamples prompts as :func:`language_average` does; where no value changes, or all do, it is Tango's
    on the number of prompts. The test exchanges the two models' outcomes on a prompt, in all languages at once, with
    probability one half (the randomisation test of Fisher, *The Design of Experiments*, 1935, section 21): what it
    takes as exchangeable is the prompt, not the translation, so translations do not count as independent evidence.

    Args:
        before: Outcomes of the first model, 0 or 1 per prompt.
        after: Outcomes of the second. Only what both have is compared.
        confidence: Coverage asked for, between 0 and 1.
        resamples: Number of bootstrap samples, and of random exchanges.
        seed: Seed of both.

    Raises:
        ConfigError: `confidence` or `resamples` is out of range.
        DataError: The two have no prompt in common.
    """
    check_settings(confidence, resamples)
    both = {
        language: sorted(before[language].keys() & after[language].keys(), key=str)
        for language in before
        if language in after
    }
    old = _prompts_by_languages({lang: {p: before[lang][p] for p in both[lang]} for lang in both})
    new = _prompts_by_languages({lang: {p: after[lang][p] for p in both[lang]} for lang in both})
    change = new - old
    prompts, constant = len(change), _only_value(change)
    if constant in (-1.0, 0.0, 1.0):
        gained, lost = prompts * (constant == 1.0), prompts * (constant == -1.0)
        ends: Interval | None = _tango_interval(gained, lost, prompts, _normal_quantile(confidence))
    else:
        ends = _resampled_mean_of_columns(change, confidence, resamples, seed)
    p_value = _exchange_test(change, resamples, seed)
    return AverageChange(_mean_of_columns(old), _mean_of_columns(new), _average(change, ends), p_value)


def _prompts_by_languages(values: Outcomes) -> NDArray[np.float64]:
    """[prompts, languages], NaN where a language lacks a prompt; both sorted, so that their order changes nothing."""
    by_language = [rows for _, rows in sorted(values.items()) if rows]
    if not by_language:
        raise DataError("There are no outcomes to average; expected at least one language with one prompt.")
    prompts = sorted({prompt for rows in by_language for prompt in rows}, key=lambda p: (str(p), repr(p)))
    return np.array([[rows.get(p, math.nan) for rows in by_language] for p in prompts], dtype=np.float64)


def _average(table: NDArray[np.float64], ends: Interval | None) -> LanguageAverage:
    low, high = (None, None) if ends is None else ends
    prompts, languages = table.shape
    return LanguageAverage(_mean_of_columns(table), low, high, languages, prompts)


def _mean_of_columns(table: NDArray[np.float64]) -> float:
    return float(np.nanmean(table, axis=0).mean())


def _only_value(table: NDArray[np.float64]) -> float | None:
    found = set(table[~np.isnan(table)].tolist())
    return found.pop() if len(found) == 1 else None


def _resampled_mean_of_columns(
    table: NDArray[np.float64], confidence: float, resamples: int, seed: int
) -> Interval | None:
    prompts = len(table)
    if prompts < 2:
        return None
    known = (~np.isnan(table)).astype(np.float64)
    filled = np.nan_to_num(table)
    means = np.empty(resamples)
    start = 0
    for drawn in _of_all_resamples(_draw_weights, prompts, resamples, seed):
        weights = drawn.astype(np.float64)
        with np.errstate(invalid="ignore"):  # a draw may leave a language that has few prompts without any
            by_language = (weights @ filled) / (weights @ known)
        means[start : start + len(weights)] = np.nanmean(by_language, axis=1)
        start += len(weights)
    tail = expanded_tail(prompts, confidence)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _draw_weights(random: np.random.Generator, prompts: int, draws: int) -> NDArray[Any]:
    """How often each prompt is drawn, [draws, prompts]."""
    drawn = random.multinomial(prompts, np.full(prompts, 1 / prompts), size=draws)
    return drawn.astype(np.uint16) if prompts < 2**16 else drawn


def _draw_signs(random: np.random.Generator, prompts: int, draws: int) -> NDArray[np.int8]:
    """1 or -1 for each prompt, [draws, prompts]."""
    return random.choice([-1.0, 1.0], size=(draws, prompts)).astype(np.int8)


def _of_all_resamples(draw: Draw, prompts: int, resamples: int, seed: int) -> Iterator[NDArray[Any]]:
    """What is drawn for all resamples, [draws, prompts] at a time, as many as fit in the memory meant for it.

    The draws depend on no outcome, and a report asks for the same ones for every model and prompt set: some are kept.
    """
    if resamples * prompts <= _KEPT:
        yield from _kept(draw, prompts, resamples, seed)
    else:
        yield from _drawn(draw, prompts, resamples, seed)


def _drawn(draw: Draw, prompts: int, resamples: int, seed: int) -> Iterator[NDArray[Any]]:
    random = np.random.default_rng(seed)
    step = max(1, _WEIGHTS_AT_ONCE // prompts)
    for start in range(0, resamples, step):
        yield draw(random, prompts, min(step, resamples - start))


@lru_cache(maxsize=8)
def _kept(draw: Draw, prompts: int, resamples: int, seed: int) -> list[NDArray[Any]]:
    return list(_drawn(draw, prompts, resamples, seed))


def _exchange_test(change: NDArray[np.float64], resamples: int, seed: int) -> float:
    """Share of random sign changes of whole prompts whose mean is as far from 0 as the one seen."""
    per_prompt = (np.nan_to_num(change) / (~np.isnan(change)).sum(axis=0)).sum(axis=1)
    if not per_prompt.any():
        return 1.0
    seen, extreme = abs(per_prompt.sum()), 0
    for drawn in _of_all_resamples(_draw_signs, len(per_prompt), resamples, seed):
        signs = drawn.astype(np.float64)
        extreme += int((np.abs(signs @ per_prompt) >= seen - 1e-12).sum())
    return (extreme + 1) / (resamples + 1)  # the order that was seen is one of them


# ---------------------------------------------------------------------------------------------------------- agreement


@dataclass(frozen=True)
class Kappa:
    """Agreement of two judges beyond chance.

    Attributes:
        count: Number of answers both have judged.
        agreement: Share on which they agree.
        kappa: Cohen's kappa; None where both give one and the same verdict to everything, so that chance alone would
            make them agree.
        low: Lower end of its confidence interval; None with `kappa`.
        high: Upper end.
    """

    count: int
    agreement: float
    kappa: float | None
    low: float | None
    high: float | None


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable], confidence: float = 0.95) -> Kappa:
    """Cohen's kappa (1960, *Educational and Psychological Measurement* 20(1)), unweighted.

    The interval takes the large-sample variance of Fleiss, Cohen and Everitt (1969, *Psychological Bulletin* 72(5)),
    cut at -1 and 1.

    Args:
        first: Verdicts of one judge, [answers].
        second: Verdicts of the other, in the same order.
        confidence: Coverage asked for, between 0 and 1.

    Raises:
        ConfigError: `confidence` is out of range.
        DataError: The two differ in length, or are empty.
    """
    check_confidence(confidence)
    if len(first) != len(second) or not first:
        raise DataError(
            f"The judges gave {len(first)} and {len(second)} verdicts; expected the same answers judged by both, and at "
            "least one."
        )
    count = len(first)
    places = {label: place for place, label in enumerate(dict.fromkeys([*first, *second]))}
    table = np.zeros((len(places), len(places)))
    for pair, number in Counter(zip(first, second, strict=True)).items():
        table[places[pair[0]], places[pair[1]]] = number
    rows, columns = table.sum(axis=1) / count, table.sum(axis=0) / count
    observed = float(table.trace()) / count
    if len(places) == 1:
        return Kappa(count, observed, None, None, None)
    expected = float(rows @ columns)
    kappa = (observed - expected) / (1 - expected)
    # Fleiss et al., equation 8: a weight for each cell of agreement and one for each other.
    agreeing = (1 - (rows + columns) * (1 - kappa)) ** 2
    differing = (1 - kappa) ** 2 * (columns[:, None] + rows) ** 2
    weights = np.where(np.eye(len(places), dtype=bool), agreeing, differing)
    spread = float((table * weights).sum()) / count - (kappa - expected * (1 - kappa)) ** 2
    half = _normal_quantile(confidence) * math.sqrt(max(0.0, spread) / count) / (1 - expected)
    return Kappa(count, observed, kappa, max(-1.0, kappa - half), min(1.0, kappa + half))


def pairwise_agreement(verdicts: Mapping[str, Mapping[Any, Hashable]]) -> float | None:
    """Share of prompts on which two languages get the same verdict, averaged over all pairs of languages.

    The consistency that MLC is measured by (*Align Once, Benefit Multilingually*, ICLR 2026). It is 1 for a model that
    treats a request alike in whatever language it comes, be it by refusing everything.

    Args:
        verdicts: ``{language: {prompt: verdict}}``; a pair of languages is compared on the prompts that both have.

    Returns:
        From 0 to 1; None where no two languages share a prompt.
    """
    shares = []
    for first, second in itertools.combinations(verdicts.values(), 2):
        if both := first.keys() & second.keys():
            shares.append(sum(first[prompt] == second[prompt] for prompt in both) / len(both))
    return math.fsum(shares) / len(shares) if shares else None


# --------------------------------------------------------------------------------------------------------- correlation


@dataclass(frozen=True)
class Coefficient:
    """One correlation coefficient.

    Attributes:
        value: The coefficient, from -1 to 1.
        low: Lower end of its bootstrap interval; None with fewer than four points.
        high: Upper end.
        p_value: Two-sided p-value of the permutation test.
    """

    value: float
    low: float | None
    high: float | None
    p_value: float


@dataclass(frozen=True)
class Correlation:
    """How two numbers per language go together.

    Attributes:
        count: Number of points.
        pearson: Linear correlation; None where either number never changes, or with fewer than three points.
        spearman: Correlation of the ranks; None with `pearson`.
    """

    count: int
    pearson: Coefficient | None
    spearman: Coefficient | None


def correlation(
    x: Sequence[float],
    y: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Correlation:
    """Pearson's and Spearman's correlation with bootstrap intervals and permutation tests.

    Points are drawn again in pairs, with the percentile interval; a draw in which either number is constant has no
    correlation and is left out. With the handful of languages of a safety benchmark such an interval is rough. The
    test tries all orders of `y` up to eight points, and `resamples` random ones beyond, the observed order counted in.

    Args:
        x: One number per point, [points].
        y: The other, in the same order.
        confidence: Coverage asked for, between 0 and 1.
        resamples: Number of bootstrap samples, and of random orders.
        seed: Seed of both.

    Raises:
        ConfigError: `confidence` or `resamples` is out of range.
        DataError: The two differ in length, or a number is not finite.
    """
    check_settings(confidence, resamples)
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise DataError(f"There are {len(x)} and {len(y)} numbers to correlate; expected as many of each.")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise DataError("A number to correlate is NaN or infinite; expected finite numbers.")
    count = len(first)
    if count < 3 or _is_constant(first) or _is_constant(second):
        return Correlation(count, None, None)
    from scipy.stats import rankdata

    random = np.random.default_rng(seed)
    draws = random.integers(count, size=(resamples, count))
    exact = count <= _ALL_ORDERS_UP_TO
    orders = (
        np.array(list(itertools.permutations(range(count))))
        if exact
        else random.permuted(np.tile(np.arange(count), (resamples, 1)), axis=1)
    )
    pearson = _coefficient(first, second, first[draws], second[draws], orders, exact, confidence)
    x_ranks, y_ranks = rankdata(first), rankdata(second)
    drawn_ranks = rankdata(first[draws], axis=-1), rankdata(second[draws], axis=-1)
    spearman = _coefficient(x_ranks, y_ranks, *drawn_ranks, orders, exact, confidence)
    return Correlation(count, pearson, spearman)


def _coefficient(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    drawn_x: NDArray[np.float64],
    drawn_y: NDArray[np.float64],
    orders: NDArray[np.int64],
    exact: bool,
    confidence: float,
) -> Coefficient:
    value = float(_pearson(x, y))
    permuted = np.abs(_pearson(x, y[orders]))
    # The order that was seen counts as one, and rounding must not push it, or one as extreme, below itself.
    extreme = int((permuted >= abs(value) - 1e-12).sum())
    p_value = extreme / len(orders) if exact else (extreme + 1) / (len(orders) + 1)
    low = high = None
    if len(x) >= 4:
        found = _pearson(drawn_x, drawn_y)
        found = found[np.isfinite(found)]
        tail = (1 - confidence) / 2
        low, high = (float(end) for end in np.quantile(found, [tail, 1 - tail]))
    return Coefficient(value, low, high, p_value)


def _pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson's correlation along the last axis; NaN where either is constant."""
    from scipy.stats import ConstantInputWarning, NearConstantInputWarning, pearsonr

    with warnings.catch_warnings():
        for category in (ConstantInputWarning, NearConstantInputWarning):  # a draw may take one point only
            warnings.simplefilter("ignore", category)
        found: NDArray[np.float64] = pearsonr(*np.broadcast_arrays(x, y), axis=-1).statistic
    return found


def _is_constant(values: NDArray[np.float64]) -> bool:
    return float(np.ptp(values)) == 0.0


def _normal_quantile(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)
