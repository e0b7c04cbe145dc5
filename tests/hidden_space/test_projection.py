"""Principal planes, against a full decomposition in float64."""

from __future__ import annotations

import numpy as np
import pytest

from mpo.hidden_space.projection import centred, principal_plane, shared_plane, spread


@pytest.mark.parametrize("shape", [(40, 7), (30, 90), (700, 650)])
def test_the_plane_is_that_of_a_full_decomposition(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    points = centred((rng.standard_normal(shape) / np.arange(1, shape[1] + 1)).astype(np.float32))
    _, singular, axes = np.linalg.svd(points.astype(np.float64), full_matrices=False)
    plane = principal_plane(points, 5)
    assert plane.explained == pytest.approx(singular[:5] ** 2 / (singular**2).sum(), rel=1e-4)
    assert np.abs(plane.axes @ axes[:5].T) == pytest.approx(np.eye(5), abs=2e-3)
    assert plane.project(points).var(axis=0) == pytest.approx(singular[:5] ** 2 / shape[0], rel=1e-4)


def test_more_components_than_there_are_gives_those_there_are() -> None:
    points = centred(np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32))
    assert principal_plane(points, 10).axes.shape == (3, 3)


@pytest.mark.parametrize("shape", [(20, 3), (700, 650)])
def test_points_without_variance_have_axes_that_explain_nothing(shape: tuple[int, int]) -> None:
    points = np.full(shape, 7.3, dtype=np.float32)
    plane = principal_plane(centred(points), 2)
    assert plane.axes @ plane.axes.T == pytest.approx(np.eye(2))
    assert np.isnan(plane.explained).all()
    assert (plane.project(centred(points)) == 0).all()


def test_a_shift_and_a_scale_between_two_models_take_no_axis_of_the_shared_plane() -> None:
    rng = np.random.default_rng(0)
    before = rng.standard_normal((200, 8)).astype(np.float32) * np.float32([9, 5, 1, 1, 1, 1, 1, 1])
    after = 30 * before + np.float32([0, 0, 0, 0, 1e3, 0, 0, 0])
    alone = principal_plane(centred(before), 2)
    both = shared_plane(centred(before), centred(after), 2)
    assert np.abs(both.axes @ alone.axes.T) == pytest.approx(np.eye(2), abs=1e-3)


def test_spread_is_the_root_of_the_total_variance() -> None:
    points = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
    assert spread(centred(points)) == pytest.approx(np.sqrt(points.var(axis=0).sum()), rel=1e-5)
