"""The silhouette score under weights, without ever holding all distances.

scikit-learn's ``silhouette_score`` has no weights, and a bootstrap of it would compute the same distances a thousand
times.
"""

from __future__ import annotations

import numpy as np

from mpo.hidden_space.resampling import Array

_BLOCK = 512


def silhouette(points: Array, harmful: Array, weights: Array | None = None) -> Array:
    """Mean silhouette of two classes (Rousseeuw, 1987, *Journal of Computational and Applied Mathematics* 20).

    For a text, a is its mean distance to the other texts of its class and b that to the texts of the other class; its
    silhouette is ``(b - a) / max(a, b)``, from -1 to 1: above 0 it lies nearer to its own class. Under a row of whole
    weights this is the score of the resampled texts, a text drawn twice lying at distance 0 from itself. Rotations,
    shifts and a common scale change nothing.

    Args:
        points: ``[n, d]``, centred.
        harmful: ``[n]`` booleans.
        weights: ``[R, n]``; by default one row of ones.

    Returns:
        ``[R]``.
    """
    points = np.ascontiguousarray(points, dtype=np.float32)
    weights = np.ones((1, len(points)), dtype=np.float32) if weights is None else weights
    order = np.argsort(harmful, kind="stable")  # classes side by side: their columns are slices
    points, weights = points[order], np.ascontiguousarray(weights[:, order], dtype=np.float32)
    border = int(np.count_nonzero(~harmful))
    slices = (slice(0, border), slice(border, len(points)))
    totals = [weights[:, columns].sum(axis=1, dtype=np.float64).astype(np.float32) for columns in slices]
    by_class = [np.ascontiguousarray(weights[:, columns].T) for columns in slices]
    square = np.einsum("nd,nd->n", points, points)
    sums = np.zeros(len(weights), dtype=np.float64)
    for own, other in ((0, 1), (1, 0)):
        for start in range(slices[own].start, slices[own].stop, _BLOCK):
            stop = min(start + _BLOCK, slices[own].stop)
            distance = distances(points[start:stop], points, square[start:stop], square)
            distance[np.arange(stop - start), np.arange(start, stop)] = 0
            with np.errstate(invalid="ignore", divide="ignore"):
                a = (distance[:, slices[own]] @ by_class[own]) / (totals[own] - 1)
                b = (distance[:, slices[other]] @ by_class[other]) / totals[other]
                score = (b - a) / np.maximum(a, b)
            score[:, totals[own] <= 1] = 0  # a class of one text: 0, by definition
            np.nan_to_num(score, copy=False, nan=0.0)  # all distances 0
            sums += np.einsum("br,rb->r", score, weights[:, start:stop], dtype=np.float64)
    value: Array = sums / (totals[0] + totals[1])
    value[(totals[0] == 0) | (totals[1] == 0)] = np.nan
    return value


def distances(first: Array, second: Array, first_square: Array, second_square: Array) -> Array:
    """``[a, b]`` Euclidean distances, from the squared lengths of both."""
    squared = first @ second.T
    squared *= -2
    squared += first_square[:, None]
    squared += second_square[None, :]
    np.maximum(squared, 0, out=squared)
    return np.asarray(np.sqrt(squared, out=squared))
