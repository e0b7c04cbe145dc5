from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from statsmodels.stats import contingency_tables, inter_rater, multitest, proportion

from mpo.common.statistics import (
    average_change,
    cohen_kappa,
    correlation,
    holm,
    language_average,
    mcnemar,
    paired_difference,
    wilson_interval,
)
from mpo.errors import ConfigError, DataError

_counts = st.integers(0, 60)
_confidence = st.sampled_from([0.8, 0.9, 0.95, 0.99])


# ------------------------------------------------------------------------------------------------------------ one share


@given(_counts, _counts, _confidence)
@settings(deadline=None)
def test_the_interval_of_a_share_is_that_of_statsmodels(
    successes: int, failures: int, confidence: float
) -> None:
    total = successes + failures
    assume(total > 0)
    got = wilson_interval(successes, total, confidence)
    statsmodels = proportion.proportion_confint(successes, total, alpha=1 - confidence, method="wilson")
    assert got == pytest.approx(statsmodels, abs=1e-12)
    assert 0 <= got[0] <= successes / total <= got[1] <= 1


def test_nothing_is_known_of_a_share_without_trials_and_the_ends_are_exact() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 315)[0] == 0.0 and wilson_interval(0, 315)[1] > 0.01
    assert wilson_interval(315, 315)[1] == 1.0


@pytest.mark.parametrize("counts", [(-1, 5), (6, 5), (1, 0)])
def test_more_successes_than_trials_are_refused(counts: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="successes"):
        wilson_interval(*counts)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, math.nan])
def test_a_confidence_out_of_range_is_refused_everywhere(confidence: float) -> None:
    for call in (
        lambda: wilson_interval(1, 2, confidence),
        lambda: paired_difference([True], [False], confidence),
        lambda: cohen_kappa("ab", "ab", confidence),
        lambda: correlation([1, 2, 3], [1, 2, 3], confidence=confidence),
        lambda: language_average({"en": {1: 1.0}}, confidence=confidence),
    ):
        with pytest.raises(ConfigError, match="confidence"):
            call()


# ----------------------------------------------------------------------------------------------------- two paired shares


@given(_counts, _counts, st.booleans())
@settings(deadline=None)
def test_mcnemars_p_value_is_that_of_statsmodels(before: int, after: int, exact: bool) -> None:
    assume(before + after > 0)  # statsmodels divides by zero
    theirs = contingency_tables.mcnemar([[3, before], [after, 9]], exact=exact, correction=False)
    got = mcnemar(before, after, exact=exact)
    assert got.p_value == pytest.approx(theirs.pvalue, rel=1e-9, abs=1e-15)


def test_the_exact_test_is_taken_for_few_differing_prompts_and_survives_thousands() -> None:
    assert mcnemar(0, 0).p_value == 1.0
    assert mcnemar(10, 14).exact and not mcnemar(10, 15).exact
    term = tail = 1  # whole numbers: no rounding, no overflow
    for k in range(4000):
        term = term * (8200 - k) // (k + 1)
        tail += term
    assert mcnemar(4000, 4200, exact=True).p_value == pytest.approx(2 * tail / 2**8200, rel=1e-9)


def _score_statistic(difference: float, gained: int, lost: int, count: int) -> float:
    """Tango's statistic with the nuisance parameter found by maximising the likelihood, not by its formula."""

    def minus_log_likelihood(lost_share: float) -> float:
        same = 1 - 2 * lost_share - difference
        terms = ((gained, lost_share + difference), (lost, lost_share), (count - gained - lost, same))
        return -sum(n * math.log(max(share, 1e-300)) for n, share in terms if n)

    low, high = max(0.0, -difference), (1 - difference) / 2
    best = optimize.minimize_scalar(
        minus_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-13}
    ).x
    variance = count * (2 * best + difference - difference**2)
    return (gained - lost - count * difference) / math.sqrt(variance)


@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 30), _confidence)
@settings(deadline=None, max_examples=60)
def test_the_interval_of_a_paired_difference_ends_where_the_score_test_starts_to_reject(
    gained: int, lost: int, same: int, confidence: float
) -> None:
    count = gained + lost + same
    before = [False] * gained + [True] * lost + [False] * same
    after = [True] * gained + [False] * lost + [False] * same
    got = paired_difference(before, after, confidence)
    z = stats.norm.ppf(0.5 + confidence / 2)
    for end in (got.low, got.high):
        assert abs(_score_statistic(end, gained, lost, count)) == pytest.approx(z, rel=2e-4)
    assert -1 <= got.low < got.difference < got.high <= 1
    assert got.difference == pytest.approx((gained - lost) / count)
    assert (got.test.only_before, got.test.only_after) == (lost, gained)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 200))
@settings(deadline=None)
def test_the_interval_leaves_zero_out_exactly_where_mcnemars_test_rejects(
    gained: int, lost: int, same: int
) -> None:
    assume(gained + lost > 0)
    before = [False] * gained + [True] * (lost + same)
    after = [True] * gained + [False] * lost + [True] * same
    got = paired_difference(before, after)
    p_value = mcnemar(lost, gained, exact=False).p_value
    assume(abs(p_value - 0.05) > 1e-9)
    assert (got.low > 0 or got.high < 0) == (p_value < 0.05)


def test_two_models_that_never_differ_have_an_interval_around_zero() -> None:
    got = paired_difference([True] * 20 + [False] * 30, [True] * 20 + [False] * 30)
    z2 = stats.norm.ppf(0.975) ** 2
    assert (got.low, got.high) == pytest.approx((-z2 / (50 + z2), z2 / (50 + z2)), abs=1e-9)
    assert got.test.p_value == 1.0 and got.difference == 0


def test_every_prompt_can_change() -> None:
    got = paired_difference([True] * 30, [False] * 30)
    assert (got.before, got.after, got.difference) == (1, 0, -1)
    assert got.low == pytest.approx(-1) and -1 < got.high < -0.7


@pytest.mark.parametrize(("before", "after"), [([], []), ([True], [True, False])])
def test_outcomes_that_cannot_be_paired_are_refused(before: list[bool], after: list[bool]) -> None:
    with pytest.raises(DataError, match="same prompts"):
        paired_difference(before, after)


def test_p_values_are_adjusted_as_statsmodels_does() -> None:
    random = np.random.default_rng(0)
    for p_values in ([0.04], [0.2, 0.2, 0.01, 0.9], random.random(12).tolist()):
        wanted = multitest.multipletests(p_values, method="holm")[1]
        assert holm(p_values) == pytest.approx(wanted, abs=1e-12)


# ------------------------------------------------------------------------------------------------- mean over languages

_LANGUAGES = ("en", "zh", "sw", "bn")


def _outcomes(random: np.random.Generator, prompts: int, missing: float = 0.0) -> dict[str, dict[int, float]]:
    return {
        language: {p: float(random.random() < 0.4) for p in range(prompts) if random.random() >= missing}
        for language in _LANGUAGES
    }


def test_the_average_is_over_languages_and_its_interval_over_prompts() -> None:
    values = _outcomes(np.random.default_rng(4), 40, missing=0.3)
    got = language_average(values, resamples=400, seed=9)
    assert got.mean == pytest.approx(sum(sum(v.values()) / len(v) for v in values.values()) / 4, abs=1e-12)
    assert (got.languages, got.prompts) == (4, 40)
    weights = np.random.default_rng(9).multinomial(40, np.full(40, 1 / 40), size=400)
    names = sorted({p for v in values.values() for p in v}, key=str)
    means = []
    for draw in weights:
        rates = []
        for rows in values.values():
            again = [rows[p] for p, times in zip(names, draw, strict=True) for _ in range(times) if p in rows]
            rates.append(sum(again) / len(again))
        means.append(sum(rates) / 4)
    # Hesterberg's expansion for 40 prompts, from scipy's distributions.
    tail = stats.norm.cdf(-math.sqrt(40 / 39) * stats.t.ppf(0.975, 39))
    assert (got.low, got.high) == pytest.approx(tuple(np.quantile(means, [tail, 1 - tail])), abs=1e-9)


def test_a_language_that_nobody_answered_in_is_left_out_and_order_changes_nothing() -> None:
    values = _outcomes(np.random.default_rng(0), 25)
    first = language_average({**values, "jv": {}})
    turned = {lang: dict(reversed(rows.items())) for lang, rows in reversed(values.items())}
    assert language_average(turned) == first and first.languages == 4


def test_copies_of_one_language_do_not_narrow_the_interval() -> None:
    rows = _outcomes(np.random.default_rng(2), 30)["en"]
    once, often = language_average({"en": rows}), language_average(dict.fromkeys("abcdef", rows))
    assert (often.low, often.high) == pytest.approx((once.low, once.high), abs=1e-12)


def test_where_every_answer_is_the_same_the_interval_is_wilsons_on_prompts() -> None:
    never = language_average({lang: dict.fromkeys(range(20), 0.0) for lang in _LANGUAGES})
    always = language_average({lang: dict.fromkeys(range(20), 1.0) for lang in _LANGUAGES})
    assert (never.low, never.high) == wilson_interval(0, 20)
    assert (always.low, always.high) == wilson_interval(20, 20)


def test_a_single_prompt_has_no_interval_unless_its_answers_agree() -> None:
    assert language_average({"en": {1: 0.0}, "sw": {1: 1.0}}).low is None


def test_intervals_of_translated_prompts_cover_the_true_average_as_often_as_they_say() -> None:
    random = np.random.default_rng(11)
    trials, covered = 300, 0
    for trial in range(trials):
        difficulty = random.normal(0, 1, 30)
        values = {
            lang: {p: float(difficulty[p] + random.normal(0, 0.5) > shift) for p in range(30)}
            for lang, shift in zip(_LANGUAGES, (0.0, 0.3, -0.2, 0.1), strict=True)
        }
        truth = np.mean([stats.norm.sf(s / math.sqrt(1.25)) for s in (0.0, 0.3, -0.2, 0.1)])
        got = language_average(values, resamples=500, seed=trial)
        assert got.low is not None and got.high is not None
        covered += got.low <= truth <= got.high
    assert 0.95 - 0.045 <= covered / trials <= 0.95 + 0.045  # 3.5 standard errors


def test_the_average_change_is_paired_and_tested_by_exchanging_prompts() -> None:
    random = np.random.default_rng(5)
    before, after = _outcomes(random, 9), _outcomes(random, 9)
    for language in _LANGUAGES:
        after[language] = {p: v * float(random.random() < 0.3) for p, v in after[language].items()}
    got = average_change(before, after)
    change = np.array([[after[lang][p] - before[lang][p] for lang in _LANGUAGES] for p in range(9)])
    assert got.change.mean == pytest.approx(change.mean()) == pytest.approx(got.after - got.before)

    def difference(x: Any, y: Any, axis: int) -> Any:
        return np.mean(y, axis=axis) - np.mean(x, axis=axis)

    means = [
        np.array([np.mean([m[lang][p] for lang in _LANGUAGES]) for p in range(9)]) for m in (before, after)
    ]
    exact = stats.permutation_test(
        means, difference, permutation_type="samples", n_resamples=np.inf, vectorized=True
    ).pvalue
    assert 0.01 < exact < 0.9
    assert got.p_value == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000))


def test_only_prompts_that_both_models_answered_are_compared() -> None:
    before = {"en": {1: 1.0, 2: 1.0, 3: 0.0}, "sw": {1: 1.0}, "de": {1: 1.0}}
    after = {"en": {1: 0.0, 2: 1.0, 9: 1.0}, "sw": {1: 0.0}}
    got = average_change(before, after)
    assert (got.before, got.after, got.change.mean) == (1.0, 0.25, -0.75)
    assert (got.change.languages, got.change.prompts) == (2, 2)
    with pytest.raises(DataError, match="no outcomes"):
        average_change({"en": {1: 1.0}}, {"en": {2: 1.0}})


def test_what_is_drawn_does_not_depend_on_whether_it_is_kept_or_how_much_fits_into_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(4)
    before, after = (
        {"sw": dict(enumerate((random.random(37) < share).astype(float)))} for share in (0.3, 0.6)
    )
    other = {"sw": dict(list(before["sw"].items())[:20])}

    def found() -> list[Any]:
        return [
            (language_average(each), average_change(each, after)) for each in (before, other, before, other)
        ]

    kept = found()
    monkeypatch.setattr("mpo.common.statistics._KEPT", 0)
    monkeypatch.setattr("mpo.common.statistics._WEIGHTS_AT_ONCE", 37 * 99)
    assert found() == kept


def test_no_change_at_all_has_an_interval_on_both_sides_of_zero() -> None:
    values = _outcomes(np.random.default_rng(0), 50)
    got = average_change(values, values)
    assert got.p_value == 1.0 and got.change.mean == 0
    alone = paired_difference([True] * 50, [True] * 50)
    assert (got.change.low, got.change.high) == (alone.low, alone.high)


def test_no_number_of_random_draws_makes_a_p_value_zero() -> None:
    everywhere = dict.fromkeys(range(40), 1.0)
    change = average_change({"en": dict.fromkeys(everywhere, 0.0)}, {"en": everywhere}, resamples=200)
    assert change.p_value == 1 / 201
    line = correlation(range(40), range(40), resamples=200)
    assert line.pearson is not None and line.pearson.p_value == 1 / 201


# ---------------------------------------------------------------------------------------------------------- agreement


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["safe", "unsafe", "invalid"]), st.sampled_from(["safe", "unsafe", "invalid"])
        ),
        min_size=2,
        max_size=60,
    ),
    _confidence,
)
@settings(deadline=None)
def test_kappa_and_its_interval_are_those_of_statsmodels(
    pairs: list[tuple[str, str]], confidence: float
) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    labels = sorted(set(first) | set(second))
    assume(len(labels) > 1)
    table = [[sum((a, b) == pair for pair in pairs) for b in labels] for a in labels]
    theirs = inter_rater.cohens_kappa(table, return_results=True)
    got = cohen_kappa(first, second, confidence)
    assert got.kappa is not None and got.low is not None and got.high is not None
    assert got.kappa == pytest.approx(theirs.kappa, abs=1e-12)
    half = stats.norm.ppf(0.5 + confidence / 2) * math.sqrt(max(0.0, theirs.var_kappa))
    wanted = max(-1.0, theirs.kappa - half), min(1.0, theirs.kappa + half)
    assert (got.low, got.high) == pytest.approx(wanted, abs=1e-6)
    assert got.agreement == pytest.approx(np.trace(table) / len(pairs))


def test_two_judges_with_one_verdict_for_everything_have_no_kappa() -> None:
    got = cohen_kappa(["safe"] * 9, ["safe"] * 9)
    assert got.kappa is None and got.agreement == 1.0


def test_verdicts_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(DataError, match="verdicts"):
        cohen_kappa(["safe"], [])


# --------------------------------------------------------------------------------------------------------- correlation

_numbers = st.lists(st.integers(-6, 6).map(float), min_size=3, max_size=12)


@given(st.data(), _numbers)
@settings(deadline=None, max_examples=60)
def test_coefficients_are_those_of_numpy_and_scipy(data: st.DataObject, x: list[float]) -> None:
    y = data.draw(st.lists(st.integers(-6, 6).map(float), min_size=len(x), max_size=len(x)))
    got = correlation(x, y, resamples=100)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert got.pearson is None and got.spearman is None
        return
    assert got.pearson is not None and got.spearman is not None
    assert got.pearson.value == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
    assert got.spearman.value == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)


def test_the_test_of_few_points_tries_every_order() -> None:
    x, y = [0.57, -0.24, -0.13, -0.12, -0.05, 0.0], [0.03, 0.6, 0.55, 0.4, 0.45, 0.3]
    got = correlation(x, y, resamples=100)
    assert got.pearson is not None and got.spearman is not None
    for coefficient, scipys in ((got.pearson, stats.pearsonr), (got.spearman, stats.spearmanr)):
        orders = [scipys(x, [y[i] for i in order]).statistic for order in itertools.permutations(range(6))]
        wanted = np.mean(np.abs(orders) >= abs(scipys(x, y).statistic) - 1e-12)
        assert coefficient.p_value == pytest.approx(wanted, abs=1e-9)


def test_the_test_of_many_points_takes_random_orders() -> None:
    random = np.random.default_rng(1)
    x = random.normal(size=40)
    y = 0.1 * x + random.normal(size=40)
    got = correlation(x.tolist(), y.tolist())
    theirs = stats.pearsonr(x, y).pvalue
    assert got.pearson is not None and 0.01 < theirs < 0.5
    assert got.pearson.p_value == pytest.approx(theirs, abs=0.02)


def test_the_interval_of_a_correlation_is_that_of_a_plain_loop_over_the_same_draws() -> None:
    random = np.random.default_rng(3)
    x = [*random.normal(size=6), 0.0, 0.0]
    y = [*(0.5 * np.array(x[:6]) + random.normal(size=6)), 0.0, 0.0]
    got = correlation(x, y, resamples=600, seed=8, confidence=0.9)
    found = {"pearson": [], "spearman": []}  # type: dict[str, list[float]]
    for draw in np.random.default_rng(8).integers(8, size=(600, 8)):
        a, b = [x[i] for i in draw], [y[i] for i in draw]
        if len(set(a)) > 1 and len(set(b)) > 1:
            found["pearson"].append(stats.pearsonr(a, b).statistic)
            found["spearman"].append(stats.spearmanr(a, b).statistic)
    for name, coefficient in (("pearson", got.pearson), ("spearman", got.spearman)):
        assert coefficient is not None
        assert (coefficient.low, coefficient.high) == pytest.approx(
            tuple(np.quantile(found[name], [0.05, 0.95])), abs=1e-9
        )


def test_too_few_points_have_no_coefficient_or_no_interval() -> None:
    assert correlation([1, 2], [2, 1]).pearson is None
    three = correlation([1, 2, 3], [2, 1, 4]).pearson
    assert three is not None and three.low is None and three.p_value > 0.3


@pytest.mark.parametrize(("x", "y"), [([1, 2], [1, 2, 3]), ([1, 2, math.nan], [1, 2, 3])])
def test_numbers_that_cannot_be_correlated_are_refused(x: list[float], y: list[float]) -> None:
    with pytest.raises(DataError, match="correlate"):
        correlation(x, y)
