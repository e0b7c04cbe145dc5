"""Principal components of both classes together: of one model's embeddings, and of two models' in a shared plane."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpo.hidden_space.resampling import Array

_SMALL = 600  # up to here a full decomposition is as fast as Lanczos iterations


@dataclass(frozen=True)
class Plane:
    """The first principal components of a cloud of points.

    Attributes:
        axes: ``[k, d]`` orthonormal, by falling variance.
        explained: ``[k]`` each one's part of the total variance.
    """

    axes: Array
    explained: Array

    def project(self, points: Array) -> Array:
        """``[n, k]`` float64 coordinates of centred points."""
        return np.asarray(points @ self.axes.T, dtype=np.float64)


def centred(points: Array) -> Array:
    """``[n, d]`` the points minus their mean, float32. The mean is summed in float64."""
    mean = points.mean(axis=0, dtype=np.float64)
    return np.asarray(points - mean.astype(points.dtype), dtype=np.float32)


def spread(points: Array) -> float:
    """Root mean square distance of centred points from 0: the scale of a cloud."""
    return float(np.sqrt(np.einsum("nd,nd->", points, points, dtype=np.float64) / len(points)))


def principal_plane(points: Array, components: int) -> Plane:
    """The first principal components, by scikit-learn: exact, with the full decomposition where it is small and Lanczos
    iterations to machine precision (ARPACK) where it is large.

    Args:
        points: ``[n, d]`` centred.
        components: k; fewer come back where the points have no more.
    """
    from sklearn.decomposition import PCA

    smaller = min(points.shape)
    components = min(components, smaller)
    if not points.any():  # all points the same, which has no direction for an iteration to start in
        return Plane(np.eye(components, points.shape[1], dtype=points.dtype), np.full(components, np.nan))
    solver = "arpack" if smaller > _SMALL and components < smaller else "full"
    found = PCA(n_components=components, svd_solver=solver, random_state=0).fit(points)
    return Plane(found.components_, np.asarray(found.explained_variance_ratio_, dtype=np.float64))


def shared_plane(before: Array, after: Array, components: int) -> Plane:
    """Principal components of two clouds together, each centred on its own mean and brought to spread 1.

    So the plane shows how each cloud is laid out: neither a shift of everything from one model to the other nor a
    difference of scale takes a component of its own.

    Args:
        before, after: ``[n, d]`` centred.
        components: k.
    """
    scaled = [cloud / np.float32(spread(cloud) or 1.0) for cloud in (before, after)]
    return principal_plane(np.concatenate(scaled), components)
