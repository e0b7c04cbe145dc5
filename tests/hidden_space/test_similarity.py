"""Cosines, kernel alignment, drift and pairs, against plain computations and known cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo.hidden_space.pairs import pair_measures, pair_rows, pairing_test
from mpo.hidden_space.projection import centred
from mpo.hidden_space.resampling import bootstrap_weights, estimate
from mpo.hidden_space.similarity import cosine, drift, linear_cka, mean_points, shift_along
from tests.hidden_space.clouds import rotation


def clouds(seed: int, count: int, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    before = rng.standard_normal((count, dimensions))
    after = before @ rng.standard_normal((dimensions, dimensions)) + 0.5 * rng.standard_normal(
        (count, dimensions)
    )
    return centred(before.astype(np.float32)), centred(after.astype(np.float32))


def unbiased_hsic(k: np.ndarray, el: np.ndarray) -> float:
    """Song et al. (2012), as an average over all quadruples of different texts: slow and obvious."""
    total, count = 0.0, 0
    for i, j, q, r in itertools.permutations(range(len(k)), 4):
        total += k[i, j] * (el[i, j] + el[q, r] - 2 * el[i, q])
        count += 1
    return total / count


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(5, 9), dimensions=st.integers(2, 12))
def test_kernel_alignment_is_the_average_over_all_quadruples(seed: int, count: int, dimensions: int) -> None:
    x, y = (cloud.astype(np.float64) for cloud in clouds(seed, count, dimensions))
    k, el = x @ x.T, y @ y.T
    squares = unbiased_hsic(k, k) * unbiased_hsic(el, el)
    found = linear_cka(x.astype(np.float32), y.astype(np.float32))[0]
    if squares <= 1e-9:
        return  # too few texts: an unbiased estimate of a square may be negative
    assert found == pytest.approx(unbiased_hsic(k, el) / np.sqrt(squares), rel=1e-3, abs=1e-3)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), factor=st.floats(0.01, 100))
def test_kernel_alignment_knows_no_rotation_and_no_scale(seed: int, factor: float) -> None:
    before, after = clouds(seed, 60, 5)
    turned = (factor * after @ rotation(np.random.default_rng(seed), 5)).astype(np.float32)
    assert linear_cka(before, turned)[0] == pytest.approx(linear_cka(before, after)[0], rel=1e-4)
    assert linear_cka(after, turned)[0] == pytest.approx(1, rel=1e-4)


def test_kernel_alignment_of_unrelated_texts_is_about_0_even_with_more_dimensions_than_texts() -> None:
    rng = np.random.default_rng(0)
    values = [
        linear_cka(*(centred(rng.standard_normal((50, 200)).astype(np.float32)) for _ in range(2)))[0]
        for _ in range(40)
    ]
    assert abs(np.mean(values)) < 0.02  # the plain estimate is 0.8 here


def test_kernel_alignment_over_several_blocks_is_the_same() -> None:
    before, after = clouds(0, 1500, 4)
    x, y = before.astype(np.float64), after.astype(np.float64)
    plain = np.sum((x.T @ y) ** 2) / np.sqrt(np.sum((x.T @ x) ** 2) * np.sum((y.T @ y) ** 2))
    assert linear_cka(before, after)[0] == pytest.approx(plain, abs=2e-3)  # n is large against d


def test_the_interval_of_the_kernel_alignment_is_as_wide_as_its_error() -> None:
    def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        before = rng.standard_normal((150, 6)).astype(np.float32)
        return centred(before), centred(
            before + rng.standard_normal((150, 6)).astype(np.float32) * [1, 0, 2, 0, 3, 0]
        )

    values = [linear_cka(*draw(seed))[0] for seed in range(150)]
    weights = bootstrap_weights(np.arange(150), np.ones(150, dtype=bool), 400, 0)
    errors = [np.std(linear_cka(*draw(seed), weights)[1:]) for seed in range(10)]
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.25)


def test_cosines_of_known_directions() -> None:
    first, second = (
        np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]),
        np.array([[0.0, 2.0], [-3.0, -3.0], [1.0, 0.0]]),
    )
    assert cosine(first, second) == pytest.approx([0, -1, np.nan], nan_ok=True)


def test_drift_is_the_mean_distance_in_units_of_the_spread() -> None:
    before = np.zeros((4, 2), dtype=np.float32)
    after = np.array([[3, 4], [0, 0], [0, 5], [0, 10]], dtype=np.float32)
    weights = np.array([[1, 1, 1, 1], [0, 0, 0, 2]], dtype=np.float32)
    assert drift(before, after, 2.0, weights) == pytest.approx([2.5, 5.0])


def test_a_way_is_gone_as_far_as_a_shift_goes_along_it() -> None:
    way = np.array([[0.0, 4.0], [2.0, 0.0], [0.0, 0.0]])
    shift = np.array([[9.0, 1.0], [-2.0, 5.0], [1.0, 1.0]])
    assert shift_along(shift, way) == pytest.approx([0.25, -1, np.nan], nan_ok=True)
    points = np.array([[1, 3], [5, 7]], dtype=np.float32)
    assert mean_points(points, np.array([[1, 1], [3, 1]])).tolist() == [[3, 5], [2, 4]]


# ---- Pairs -------------------------------------------------------------------------------------------------------


def test_the_rows_of_a_pair_are_found_in_any_order_and_incomplete_units_left_out() -> None:
    unit = np.array([7, 3, 9, 3, 7, 1, 1])
    harmful = np.array([True, False, True, True, False, True, True])
    bad, good = pair_rows(unit, harmful)
    assert bad.tolist() == [3, 0] and good.tolist() == [1, 4]


def test_pair_measures_are_plain_means_also_under_weights() -> None:
    rng = np.random.default_rng(0)
    harmless = rng.standard_normal((12, 3))
    harmful = harmless + 0.5 + 0.3 * rng.standard_normal((12, 3))
    distance = np.linalg.norm(harmful[:, None] - harmless[None], axis=2)
    step = harmful - harmless
    unit = step / np.linalg.norm(step, axis=1, keepdims=True)
    different = ~np.eye(12, dtype=bool)
    found = pair_measures(harmful, harmless)
    assert found["pair_distance_ratio"][0] == pytest.approx(
        np.diag(distance).mean() / distance[different].mean(), rel=1e-5
    )
    assert found["pair_nearest"][0] == pytest.approx(np.mean(distance.argmin(axis=1) == np.arange(12)))
    assert found["pair_consistency"][0] == pytest.approx(np.sqrt((unit @ unit.T)[different].mean()), rel=1e-5)
    weights = np.ones((2, 12))
    weights[1, 0] = 0
    weighted, without = pair_measures(harmful, harmless, weights), pair_measures(harmful[1:], harmless[1:])
    for name in ("pair_distance_ratio", "pair_consistency"):
        assert weighted[name][1] == pytest.approx(without[name][0], rel=1e-5)


def test_rewrites_that_are_all_as_near_are_found_by_chance() -> None:
    same = np.ones((20, 4), dtype=np.float32)
    assert pair_measures(same, same)["pair_nearest"][0] == pytest.approx(1 / 20)
    harmless = np.repeat(np.arange(10.0), 2)[:, None]  # each text twice
    assert pair_measures(harmless + 0.1, harmless)["pair_nearest"][0] == pytest.approx(1 / 2)


def test_pairs_that_have_nothing_in_common_are_at_chance() -> None:
    rng = np.random.default_rng(0)
    found = pair_measures(rng.standard_normal((300, 20)), rng.standard_normal((300, 20)))
    assert found["pair_distance_ratio"][0] == pytest.approx(1, abs=0.02)
    assert found["pair_nearest"][0] < 0.02
    assert abs(found["pair_consistency"][0]) < 0.15
    p_values = [
        pairing_test(rng.standard_normal((30, 4)), rng.standard_normal((30, 4)), 99, seed)
        for seed in range(60)
    ]
    assert 0.3 < np.mean(p_values) < 0.7


def test_pairs_in_one_common_direction_are_consistent_and_nearer_than_chance() -> None:
    rng = np.random.default_rng(0)
    harmless = rng.standard_normal((100, 10))
    harmful = harmless + np.eye(10)[0]
    weights = bootstrap_weights(np.arange(100), np.ones(100, dtype=bool), 200, 0)
    found = {
        name: estimate(values, 0.95) for name, values in pair_measures(harmful, harmless, weights).items()
    }
    assert found["pair_consistency"].value == pytest.approx(1, abs=1e-6)
    ratio = found["pair_distance_ratio"]
    assert ratio.high is not None and ratio.high < 0.5
    assert pairing_test(harmful, harmless, 99, 0) == 0.01


@pytest.mark.parametrize(("pairs", "dimensions"), [(1, 3), (7, 2), (1023, 5), (1025, 5), (2100, 3)])
def test_the_pairing_test_is_that_of_all_distances_at_once(pairs: int, dimensions: int) -> None:
    rng = np.random.default_rng(pairs)
    harmless = rng.standard_normal((pairs, dimensions)).astype(np.float32)
    harmful = (harmless * 0.03 + rng.standard_normal((pairs, dimensions))).astype(np.float32)
    every = np.linalg.norm(harmful[:, None].astype(np.float64) - harmless[None], axis=2)
    draws, rows = np.random.default_rng([5, 3]), np.arange(pairs)
    observed = np.trace(every)
    smaller = sum(every[rows, draws.permutation(pairs)].sum() <= observed + 1e-6 for _ in range(50))
    assert pairing_test(harmful, harmless, 50, 5) == pytest.approx((1 + smaller) / 51, rel=1e-12)
