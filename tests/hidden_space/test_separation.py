"""Separation of two classes, against closed forms, scikit-learn and plain float64 computations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import silhouette_score

from mpo.hidden_space.separation import (
    between_class_ratio,
    between_class_variance,
    bhattacharyya,
    class_moments,
    fisher_ratio,
    full_moments,
)
from mpo.hidden_space.silhouette import silhouette
from tests.hidden_space.clouds import labels, rotation, two_classes, whitened

SIZES = {
    "seed": st.integers(0, 2**32 - 1),
    "harmful": st.integers(12, 40),
    "harmless": st.integers(12, 40),
    "dimensions": st.integers(1, 4),
}
MEASURES = [between_class_ratio, fisher_ratio, bhattacharyya]


def on(points: np.ndarray, harmful: np.ndarray, measure: object) -> float:
    return float(measure(class_moments(points, harmful))[0])  # type: ignore[operator]


# ---- Closed forms ------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(**SIZES)
def test_bhattacharyya_of_samples_with_exact_moments_is_that_of_the_normals(
    seed: int, harmful: int, harmless: int, dimensions: int
) -> None:
    rng = np.random.default_rng(seed)
    mean = rng.standard_normal((2, dimensions))
    scale = rng.uniform(0.5, 2.0, (2, dimensions))
    points = np.concatenate(
        [
            whitened(rng, count, dimensions) * scale[label] + mean[label]
            for label, count in ((1, harmful), (0, harmless))
        ]
    )
    # For diagonal covariances the distance is a sum over the dimensions.
    middle = (scale[0] ** 2 + scale[1] ** 2) / 2
    expected = (
        np.sum((mean[1] - mean[0]) ** 2 / middle) / 8 + np.sum(np.log(middle / (scale[0] * scale[1]))) / 2
    )
    turn = rotation(rng, dimensions)  # which makes the covariances full and changes nothing
    assert on(points @ turn, labels(harmful, harmless), bhattacharyya) == pytest.approx(
        expected, rel=1e-9, abs=1e-12
    )


def test_the_distance_of_two_known_normals_is_found_from_many_samples() -> None:
    rng = np.random.default_rng(0)
    root = np.array([[1.0, 0.0], [0.5, 2.0]])
    points = np.concatenate(
        [rng.standard_normal((200_000, 2)) @ root.T + [1.0, -1.0], rng.standard_normal((200_000, 2))]
    )
    cov, middle = root @ root.T, (root @ root.T + np.eye(2)) / 2
    apart = np.array([1.0, -1.0])
    expected = apart @ np.linalg.inv(middle) @ apart / 8 + 0.5 * np.log(
        np.linalg.det(middle) / np.sqrt(np.linalg.det(cov))
    )
    assert on(points, labels(200_000, 200_000), bhattacharyya) == pytest.approx(expected, rel=0.01)


@settings(max_examples=30, deadline=None)
@given(**SIZES)
def test_fishers_ratio_is_what_linear_discriminant_analysis_reaches(
    seed: int, harmful: int, harmless: int, dimensions: int
) -> None:
    points, harmful_ = two_classes(np.random.default_rng(seed), harmful, harmless, dimensions)
    line = LinearDiscriminantAnalysis(solver="lsqr").fit(points, harmful_).coef_[0]
    scores = points @ line
    one, other = scores[harmful_], scores[~harmful_]
    within = (one.var() * len(one) + other.var() * len(other)) / len(scores)
    expected = (one.mean() - other.mean()) ** 2 / within
    assert on(points, harmful_, fisher_ratio) == pytest.approx(expected, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(**SIZES)
def test_between_and_within_variance_add_up_and_their_ratio_is_eta_squared(
    seed: int, harmful: int, harmless: int, dimensions: int
) -> None:
    points, harmful_ = two_classes(np.random.default_rng(seed), harmful, harmless, dimensions)
    fitted = np.where(harmful_[:, None], points[harmful_].mean(axis=0), points[~harmful_].mean(axis=0))
    moments = class_moments(points, harmful_)
    assert between_class_variance(moments)[0] == pytest.approx(fitted.var(axis=0).sum())
    assert moments.total[0] == pytest.approx(points.var(axis=0).sum())
    eta_squared = 1 - (points - fitted).var(axis=0).sum() / points.var(axis=0).sum()
    assert between_class_ratio(moments)[0] == pytest.approx(eta_squared)
    assert full_moments(points, harmful_).ratio[0] == pytest.approx(eta_squared)


@settings(max_examples=30, deadline=None)
@given(**SIZES)
def test_the_silhouette_is_scikit_learns(seed: int, harmful: int, harmless: int, dimensions: int) -> None:
    points, harmful_ = two_classes(np.random.default_rng(seed), harmful, harmless, dimensions)
    assert silhouette(points, harmful_)[0] == pytest.approx(silhouette_score(points, harmful_), abs=2e-5)


def test_the_silhouette_is_the_same_over_several_blocks() -> None:
    points, harmful = two_classes(np.random.default_rng(1), 700, 600, 3, distance=2.0)
    assert silhouette(points, harmful)[0] == pytest.approx(silhouette_score(points, harmful), abs=2e-5)


# ---- Invariances -------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(**SIZES, factor=st.floats(0.01, 100.0))
def test_rotation_shift_and_scale_change_no_measure(
    seed: int, harmful: int, harmless: int, dimensions: int, factor: float
) -> None:
    rng = np.random.default_rng(seed)
    points, harmful_ = two_classes(rng, harmful, harmless, dimensions)
    moved = factor * points @ rotation(rng, dimensions) + rng.standard_normal(dimensions)
    for measure in MEASURES:
        assert on(moved, harmful_, measure) == pytest.approx(on(points, harmful_, measure), rel=1e-6), measure
    centred = moved - moved.mean(axis=0)
    assert silhouette(centred, harmful_)[0] == pytest.approx(silhouette(points, harmful_)[0], abs=1e-4)
    assert full_moments(centred, harmful_).ratio[0] == pytest.approx(full_moments(points, harmful_).ratio[0])
    assert between_class_variance(class_moments(moved, harmful_))[0] == pytest.approx(
        factor**2 * between_class_variance(class_moments(points, harmful_))[0]
    )


@settings(max_examples=30, deadline=None)
@given(**SIZES)
def test_no_linear_map_changes_fisher_and_bhattacharyya(
    seed: int, harmful: int, harmless: int, dimensions: int
) -> None:
    rng = np.random.default_rng(seed)
    points, harmful_ = two_classes(rng, harmful, harmless, dimensions)
    stretched = points @ (rotation(rng, dimensions) * rng.uniform(0.2, 5.0, dimensions))
    for measure in (fisher_ratio, bhattacharyya):
        assert on(stretched, harmful_, measure) == pytest.approx(on(points, harmful_, measure), rel=1e-6)


def test_the_names_of_the_classes_change_nothing() -> None:
    points, harmful = two_classes(np.random.default_rng(3), 30, 20, 3)
    for measure in MEASURES:
        assert on(points, ~harmful, measure) == pytest.approx(on(points, harmful, measure))
    assert silhouette(points, ~harmful)[0] == pytest.approx(silhouette(points, harmful)[0], abs=1e-6)


# ---- Weights -----------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(**SIZES)
def test_whole_weights_are_that_many_copies_of_a_text(
    seed: int, harmful: int, harmless: int, dimensions: int
) -> None:
    rng = np.random.default_rng(seed)
    points, harmful_ = two_classes(rng, harmful, harmless, dimensions)
    weights = rng.integers(0, 4, (3, len(points))).astype(np.float32)
    weights[:, :3] += 1
    weights[:, -3:] += 1
    copies = [np.repeat(np.arange(len(points)), row.astype(int)) for row in weights]
    for measure in (*MEASURES, between_class_variance):
        assert measure(class_moments(points, harmful_, weights)) == pytest.approx(
            [on(points[rows], harmful_[rows], measure) for rows in copies], rel=1e-6
        ), measure
    full = full_moments(points, harmful_, weights)
    expected = [full_moments(points[rows] - points[rows].mean(axis=0), harmful_[rows]) for rows in copies]
    assert full.ratio == pytest.approx([one.ratio[0] for one in expected], rel=1e-4)
    assert full.difference == pytest.approx(
        np.stack([one.difference[0] for one in expected]), rel=1e-4, abs=1e-4
    )
    assert silhouette(points, harmful_, weights) == pytest.approx(
        [silhouette_score(points[rows], harmful_[rows]) for rows in copies], abs=3e-5
    )


# ---- Few texts ---------------------------------------------------------------------------------------------------


def test_a_class_with_fewer_texts_than_dimensions_is_shrunk_as_ledoit_and_wolf_do() -> None:
    rng = np.random.default_rng(4)
    points, harmful = rng.standard_normal((18, 6)) * [5, 4, 3, 2, 1, 1], labels(5, 13)
    points[harmful] += 1
    small, large = LedoitWolf().fit(points[harmful]).covariance_, np.cov(points[~harmful].T, bias=True)
    middle = (small + large) / 2
    apart = points[harmful].mean(axis=0) - points[~harmful].mean(axis=0)
    expected = mahalanobis(apart, np.zeros(6), np.linalg.inv(middle)) ** 2 / 8 + 0.5 * np.log(
        np.linalg.det(middle) / np.sqrt(np.linalg.det(small) * np.linalg.det(large))
    )
    assert on(points, harmful, bhattacharyya) == pytest.approx(expected)


def test_fishers_ratio_is_undefined_with_too_few_texts_for_the_dimensions() -> None:
    rng = np.random.default_rng(0)
    points, harmful = rng.standard_normal((8, 50)), labels(4, 4)
    points -= points.mean(axis=0)
    coordinates = points @ np.linalg.svd(points, full_matrices=False)[2][:8].T
    # Eight texts less the two means leave six dimensions of variance within the classes.
    assert np.isnan(on(coordinates, harmful, fisher_ratio))
    assert np.isfinite(on(coordinates[:, :5], harmful, fisher_ratio))
    assert np.isfinite(on(coordinates, harmful, bhattacharyya))  # its covariances are shrunk


def test_points_without_variance_have_no_distance_instead_of_an_error() -> None:
    points, harmful = np.ones((20, 3)), labels(10, 10)
    for measure in MEASURES:
        assert np.isnan(on(points, harmful, measure))
