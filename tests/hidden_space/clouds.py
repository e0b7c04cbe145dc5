"""Clouds of harmful and harmless points whose separation is known."""

from __future__ import annotations

import numpy as np


def labels(harmful: int, harmless: int) -> np.ndarray:
    """Harmful first."""
    return np.arange(harmful + harmless) < harmful


def two_classes(
    rng: np.random.Generator, harmful: int, harmless: int, dimensions: int, distance: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Two Gaussian clouds with different covariances, centred together, and their labels."""
    points = np.concatenate(
        [
            rng.standard_normal((harmful, dimensions)) @ rng.standard_normal((dimensions, dimensions))
            + distance,
            rng.standard_normal((harmless, dimensions)) @ rng.standard_normal((dimensions, dimensions)),
        ]
    )
    return points - points.mean(axis=0), labels(harmful, harmless)


def rotation(rng: np.random.Generator, dimensions: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((dimensions, dimensions)))[0]


def whitened(rng: np.random.Generator, count: int, dimensions: int) -> np.ndarray:
    """Points whose mean is exactly 0 and whose covariance (divided by the count) is exactly the identity."""
    points = rng.standard_normal((count, dimensions))
    points -= points.mean(axis=0)
    return points @ np.linalg.inv(np.linalg.cholesky(points.T @ points / count)).T
