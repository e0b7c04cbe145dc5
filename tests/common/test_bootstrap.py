from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from mpo.common.bootstrap import expanded_tail, grouped_mean_interval
from mpo.errors import ConfigError


@pytest.mark.parametrize(
    ("probability", "degrees", "tabulated"),
    # Table of percentage points of the t distribution, as printed in statistics textbooks.
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 3, 3.182),
        (0.975, 5, 2.571),
        (0.975, 11, 2.201),
        (0.975, 30, 2.042),
        (0.975, 120, 1.980),
        (0.95, 4, 2.132),
        (0.995, 7, 3.499),
        (0.9995, 10, 4.587),
    ],
)
def test_percentiles_are_expanded_by_the_students_quantile_of_the_printed_table(
    probability: float, degrees: int, tabulated: float
) -> None:
    groups = degrees + 1
    tail = expanded_tail(groups, 2 * probability - 1)
    assert -NormalDist().inv_cdf(tail) / math.sqrt(groups / degrees) == pytest.approx(tabulated, abs=6e-4)


@pytest.mark.parametrize(("groups", "per_group"), [(6, 1), (12, 3), (40, 1)])
def test_intervals_of_normal_data_cover_the_true_mean_as_often_as_they_say(
    groups: int, per_group: int
) -> None:
    random = np.random.default_rng(7)
    ids = np.repeat(np.arange(groups), per_group)
    trials, covered = 400, 0
    for trial in range(trials):
        values = random.normal(0, 1, groups)[ids] + 0.3 * random.normal(0, 1, len(ids))
        low, high = grouped_mean_interval(values, ids, resamples=1000, seed=trial) or (1.0, -1.0)
        covered += low <= 0 <= high
    # Three standard errors of a proportion of 0.95 in 400 trials are 0.033.
    assert 0.95 - 0.033 <= covered / trials <= 0.95 + 0.033


def test_whole_groups_are_drawn_so_that_copies_of_a_pair_do_not_narrow_the_interval() -> None:
    random = np.random.default_rng(0)
    values, groups = random.normal(0, 1, 20), np.arange(20)
    once = grouped_mean_interval(values, groups)
    copied = grouped_mean_interval(np.repeat(values, 6), np.repeat(groups, 6))
    as_if_independent = grouped_mean_interval(np.repeat(values, 6), np.arange(120))
    assert once is not None and copied is not None and as_if_independent is not None
    assert copied == pytest.approx(once, abs=1e-12)
    assert copied[1] - copied[0] > 2.2 * (as_if_independent[1] - as_if_independent[0])


def test_the_resampled_mean_is_over_pairs_also_when_groups_differ_in_size() -> None:
    values = np.array([1.0] * 9 + [0.0] * 3)
    groups = np.array([0] * 9 + [1, 2, 3])
    low, high = grouped_mean_interval(values, groups) or (0.0, 0.0)
    # Four groups: their expanded interval reaches the extremes, which only group 0, or only the others, can give.
    assert (low, high) == (0.0, 1.0)
    # 95 of 100 groups of one pair at 0, 5 groups of 19 pairs at 1: the mean over pairs is one half.
    values = np.array([0.0] * 95 + [1.0] * 95)
    groups = np.concatenate([np.arange(95), np.repeat(np.arange(95, 100), 19)])
    low, high = grouped_mean_interval(values, groups) or (0.0, 0.0)
    assert low < 0.5 < high and high - low > 0.3


def test_it_agrees_with_a_plain_loop_over_the_same_draws() -> None:
    random = np.random.default_rng(3)
    groups = random.integers(0, 9, 40)
    values = random.normal(0, 1, 40)
    members = [values[groups == g] for g in np.unique(groups)]
    draws = np.random.default_rng(5).integers(len(members), size=(500, len(members)))
    means = [np.concatenate([members[i] for i in draw]).mean() for draw in draws]
    got = grouped_mean_interval(values, groups, resamples=500, seed=5)
    assert got is not None
    # With the expansion for 9 groups the percentiles are 0.72 and 99.28.
    tail = NormalDist().cdf(-((9 / 8) ** 0.5) * 2.3060041)
    assert got == pytest.approx(np.quantile(means, [tail, 1 - tail]), abs=1e-6)


def test_thousands_of_groups_are_drawn_in_portions_and_give_the_same_as_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.random.default_rng(0).normal(0, 1, 50)
    at_once = grouped_mean_interval(values, np.arange(50), resamples=2000)
    monkeypatch.setattr("mpo.common.bootstrap._INDICES_AT_ONCE", 50 * 37)
    assert grouped_mean_interval(values, np.arange(50), resamples=2000) == at_once


def test_the_order_of_the_pairs_changes_nothing_not_even_the_last_bit() -> None:
    random = np.random.default_rng(1)
    values, groups = random.normal(0, 1, 60), random.integers(0, 7, 60)
    first = grouped_mean_interval(values, groups, resamples=500)
    for _ in range(20):
        order = random.permutation(60)
        assert grouped_mean_interval(values[order], groups[order], resamples=500) == first


def test_one_group_has_no_interval() -> None:
    assert grouped_mean_interval([0.1, 0.2], [4, 4]) is None


@pytest.mark.parametrize("settings", [{"confidence": 0.0}, {"confidence": 95}, {"resamples": 10}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        grouped_mean_interval([0.1, 0.2], [0, 1], **settings)  # type: ignore[arg-type]
