"""Resampling: who is drawn, who is swapped, and what intervals and p-values say of data whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

from mpo.errors import ConfigError
from mpo.hidden_space.resampling import (
    Estimate,
    bootstrap_weights,
    check_resampling,
    estimate,
    permutation_p,
    swap_masks,
)
from tests.hidden_space.clouds import labels


def test_a_sample_has_as_many_texts_of_each_class_as_the_data() -> None:
    harmful = labels(30, 50)
    weights = bootstrap_weights(np.arange(80), harmful, 200, 0)
    assert (weights[0] == 1).all()
    assert (weights[:, harmful].sum(axis=1) == 30).all()
    assert (weights[:, ~harmful].sum(axis=1) == 50).all()
    assert weights[1:].std() == pytest.approx(1, abs=0.05)  # a multinomial count has variance 1 - 1/n


def test_the_texts_of_a_unit_are_drawn_and_swapped_together() -> None:
    unit = np.tile(np.arange(25), 2)
    harmful = labels(25, 25)
    for drawn in (bootstrap_weights(unit, harmful, 50, 0), swap_masks(unit, 50, 0)):
        assert (drawn[:, :25] == drawn[:, 25:]).all()
        assert not (drawn[1:, :5] == drawn[1:, 5:10]).all()


def test_languages_with_the_same_units_share_their_draws() -> None:
    harmful = labels(10, 10)
    order = np.random.default_rng(0).permutation(20)
    weights = bootstrap_weights(np.arange(20), harmful, 30, 7)
    again = bootstrap_weights(order, harmful[order], 30, 7)
    assert (again == weights[:, order]).all()
    assert not (bootstrap_weights(np.arange(20), harmful, 30, 8) == weights).all()
    # Texts of another language that are no translations are drawn on their own.
    others = bootstrap_weights(np.arange(20) + (1 << 32), harmful, 2000, 7)[1:]
    these = bootstrap_weights(np.arange(20), harmful, 2000, 7)[1:]
    assert abs(np.corrcoef(these[:, 0], others[:, 0])[0, 1]) < 0.1


def test_the_interval_covers_a_mean_as_often_as_it_says() -> None:
    rng, covered = np.random.default_rng(0), 0
    for trial in range(400):
        values = rng.exponential(size=60)
        weights = bootstrap_weights(np.arange(60), np.ones(60, dtype=bool), 400, trial)
        found = estimate(weights @ values / 60, 0.9)
        assert found.low is not None and found.high is not None
        covered += found.low <= 1 <= found.high
    # 400 trials of a 90 % interval; the percentile method loses a little on skewed data.
    assert 0.84 <= covered / 400 <= 0.94


def test_the_interval_undoes_a_shift_of_the_replicates() -> None:
    # Replicates with a constant bias of half a standard deviation, as distances between noisy means have.
    replicates = norm.ppf((np.arange(9999) + 0.5) / 9999) + 0.5
    found = estimate(np.concatenate([[0.0], replicates]), 0.95)
    assert found.low == pytest.approx(-1.96, abs=0.02)
    assert found.high == pytest.approx(1.96, abs=0.02)
    bounded = estimate(np.concatenate([[0.0], replicates]), 0.95, limits=(0.0, 1.0))
    assert (bounded.low, bounded.high) == (0.0, 1.0)


def test_an_interval_without_replicates_or_with_undefined_ones_is_none() -> None:
    assert estimate(np.array([0.5]), 0.95).low is None
    assert estimate(np.array([0.5, np.nan, 0.4]), 0.95).high is None
    assert math.isnan(estimate(np.array([np.nan, 1.0]), 0.95).value)


def test_the_p_value_counts_changes_as_large_as_the_observed_one_and_is_never_0() -> None:
    assert permutation_p(np.array([2.0, 1.0, -3.0, 0.0])) == 0.5
    assert permutation_p(np.array([9.0, *np.zeros(99)])) == 0.01
    assert permutation_p(np.array([0.0, 1.0, -1.0])) == 1.0
    assert permutation_p(np.array([1.0])) is None


def test_an_estimate_survives_json() -> None:
    for one in (Estimate(0.25, 0.125, 0.5, 0.01), Estimate(1.0, None, None), Estimate(2.0, 1.0, 3.0)):
        assert Estimate.from_list(one.to_list()) == one
    assert math.isnan(Estimate.from_list(Estimate(math.nan).to_list()).value)


@pytest.mark.parametrize("settings", [(1.0, 1000, 10), (0.95, 5, 10), (0.95, 1000, -1)])
def test_settings_out_of_range_are_refused(settings: tuple[float, int, int]) -> None:
    with pytest.raises(ConfigError):
        check_resampling(*settings)
